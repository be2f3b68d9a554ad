"""Data sets of other packages: found by entry points, wrapped if they are plain ones of PyTorch.

They never take the name of one of ours.
"""

import importlib, pickle, sys
import numpy as np, pytest, torch
from PIL import Image
from torchvision.transforms.v2 import PILToTensor
from fdsl_nb.data import datasets
from fdsl_nb.data.cifar import CifarDataset
from fdsl_nb.data.datasets import known_collections, named_dataset, open_dataset
from fdsl_nb.data.loading import (
    AdaptedDataset,
    DigitsDataset,
    EpochBatchSampler,
    ImageDataset,
    Part,
    as_images,
    hold_out,
    train_loader,
)
from fdsl_nb.training.plan import RunConfig
from fdsl_nb.training.training import make_loaders, many_labels
from fdsl_nb.training.validation import picture_names

BIRDS = '''
import numpy as np
from PIL import Image

class Birds:
    classes = ['owl', 'wren', 'swan']
    def __init__(self, side): self.side = side
    def __len__(self): return 12
    def label(self, i): return i % 3
    def __getitem__(self, i):
        grey = np.full((self.side, self.side), 20 * i, np.uint8)
        return Image.fromarray(grey), self.label(i)

class Nothing:
    def __len__(self): return 1

def open_birds(split, data, side=8):
    if data: raise FileNotFoundError(f'birds: {data} is not there')
    return Birds(side) if split == 'train' else None

def open_nothing(split, data): return Nothing()
def open_false(split, data): raise AssertionError('nobody takes the name digits')
'''
ENTRIES = '''[fdsl_nb.datasets]
birds = birds:open_birds
nothing = birds:open_nothing
lost = birds:open_lost
gone = no_such_module:open_it
digits = birds:open_false
rcdb = birds:open_false
'''


@pytest.fixture
def birds(tmp_path, monkeypatch):
    "A package with data sets of its own, as pip would have installed it."
    (tmp_path / 'birds.py').write_text(BIRDS)
    info = tmp_path / 'birds-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: birds\nVersion: 1.0\n')
    (info / 'entry_points.txt').write_text(ENTRIES)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    datasets._entered.cache_clear()
    yield
    datasets._entered.cache_clear()
    sys.modules.pop('birds', None)


# By name


def test_another_package_brings_a_data_set(birds):
    train = open_dataset('birds', side=16)
    assert isinstance(train, ImageDataset)
    assert train.classes == ['owl', 'wren', 'swan']
    assert len(train) == 12
    assert not train.multilabel
    image, label = train[5]
    assert image.size == (16, 16)
    assert label == train.label(5) == 2
    assert open_dataset('birds', 'val') is None
    with pytest.raises(FileNotFoundError, match='birds: /x is not there'):
        open_dataset('birds', data_dir='/x')
    with pytest.raises(TypeError, match='sde'):
        open_dataset('birds', sde=4)


def test_what_another_package_lacks_is_said_with_its_name(birds):
    with pytest.raises(
        ImportError,
        match='birds:open_lost of the package birds cannot be loaded.*install that package anew',
    ):
        open_dataset('lost')
    with pytest.raises(
        ImportError, match='no_such_module:open_it of the package birds cannot be loaded'
    ):
        open_dataset('gone')
    with pytest.raises(TypeError, match="dataset='nothing': Nothing has no classes"):
        open_dataset('nothing')


def test_names_of_ours_stay_ours(birds):
    assert len(open_dataset('digits')) == 797
    assert type(open_dataset('rcdb', classes=2)).__name__ == 'FormulaDataset'
    assert known_collections()[:5] == ['digits', 'cifar10', 'cifar100', 'imagenet', 'coyo']


def test_an_unknown_name_is_answered_with_the_nearest_of_all(birds):
    for wrong, meant in (('brids', 'birds'), ('cifar1000', 'cifar100'), ('rcbd', 'rcdb')):
        with pytest.raises(
            ValueError, match=f"is not known and is not a folder.*did you mean '{meant}'"
        ):
            open_dataset(wrong)


def test_nothing_is_imported_before_it_is_asked_for(birds):
    assert 'birds' in known_collections()
    assert named_dataset('birds', 'manifest.json') == 'birds'
    assert 'birds' not in sys.modules


def test_a_file_may_not_name_what_is_not_installed():
    with pytest.raises(ValueError, match='which no file may name'):
        named_dataset('birds', 'manifest.json')


# Plain data sets of PyTorch


class Greys(torch.utils.data.Dataset):
    classes = ['dark', 'light']

    def __len__(self):
        return 20

    def label(self, i):
        return int(i >= 10)

    def __getitem__(self, i):
        return Image.fromarray(np.full((8, 8), 10 * i, np.uint8)), self.label(i)


class Named(Greys):
    multilabel = True

    def name(self, i):
        return f'{i}.png'

    def train_loader(self, transform, batches, workers=0):
        return 'my own'


def seen(loader):
    return [(x.tolist(), y.tolist()) for x, y in loader]


@pytest.mark.process
def test_a_plain_data_set_trains_like_one_of_ours():
    one, other = (EpochBatchSampler(20, 4, seed=3) for _ in range(2))
    assert seen(train_loader(Greys(), PILToTensor(), one)) == seen(
        as_images(Greys()).train_loader(PILToTensor(), other, 2)
    )
    train, _ = make_loaders(RunConfig(batch_size=4, img_size=8, workers=0), {'train': Greys()})
    assert len(train) == 5 and not many_labels({'train': Greys()})
    rest, aside = hold_out(Greys(), 0.2)
    assert isinstance(rest, Part)
    assert (len(rest), len(aside)) == (16, 4)
    assert aside.classes == ['dark', 'light']
    with pytest.raises(ValueError, match='labels=real needs images with file names'):
        picture_names(Greys())


def test_what_a_plain_data_set_brings_is_used():
    images = pickle.loads(pickle.dumps(as_images(Named())))
    assert isinstance(images, AdaptedDataset)
    assert images.multilabel
    assert images.train_loader(None, None) == 'my own'
    assert picture_names(Named())[7] == '7.png'
    assert Part(Named(), [3, 7]).name(1) == '7.png'
    assert many_labels({'train': Named()})


def test_ours_are_not_wrapped():
    cifar = CifarDataset(np.zeros((2, 32, 32, 3), np.uint8), np.array([0, 1]), ['a', 'b'])
    assert as_images(cifar) is cifar
    assert as_images(DigitsDataset()).name.__func__ is ImageDataset.name

"""CIFAR: torchvision's layout read whole or not at all, downloaded once by any number of processes.

The images held out for validation are always the same.
"""

import hashlib, http.server, pickle, random, shutil, tarfile, threading
from concurrent.futures import ThreadPoolExecutor
import numpy as np, pytest
from sklearn.datasets import load_sample_images
from torchvision.datasets import CIFAR10, CIFAR100
from fdsl_nb.data import cifar
from fdsl_nb.data.cifar import faults, held_out, open_cifar


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def pack(
    folder,
    base,
    label_key='labels',
    archive='archive.tar.gz',
    batches=2,
    each=30,
    name_key='label_names',
    meta='batches.meta',
    known=CIFAR10,
):
    "Crops of two photographs in CIFAR's layout, and a torchvision class with their checksums."
    (folder / base).mkdir(parents=True)
    chance, photos = np.random.default_rng(0), load_sample_images().images

    def write(name, content):
        (folder / base / name).write_bytes(pickle.dumps(content))
        return [name, md5(folder / base / name)]

    def batch(n):
        labels = chance.permutation(np.arange(n) % 10)
        places = [(photos[c % 2], *chance.integers(0, 350, 2)) for c in labels]
        images = np.stack(
            [photo[y : y + 32, x : x + 32].transpose(2, 0, 1) for photo, y, x in places]
        )
        return {'data': images.reshape(n, -1), label_key: [int(c) for c in labels]}

    train, test = (
        [write(f'batch_{i}', batch(each)) for i in range(batches)],
        [write('test', batch(20))],
    )
    meta = write(meta, {name_key: [f'class {i}' for i in range(10)]})
    with tarfile.open(folder / archive, 'w:gz') as tar:
        tar.add(folder / base, base)
    return type(
        'Small',
        (known,),
        dict(
            base_folder=base,
            filename=archive,
            url='http://127.0.0.1:9/none.tar.gz',
            tgz_md5=md5(folder / archive),
            train_list=train,
            test_list=test,
            meta=dict(filename=meta[0], key=name_key, md5=meta[1]),
        ),
    )


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A packed data set under the name 'cifar10', its folder in `whole`, its archive beside it."
    source = pack(tmp_path / 'whole', 'small-batches-py')
    monkeypatch.setitem(cifar.SOURCES, 'cifar10', source)
    cifar._loaded.cache_clear()
    return source


def raw(folder, source, files):
    entries = [pickle.loads((folder / source.base_folder / name).read_bytes()) for name, _ in files]
    return np.concatenate([e['data'] for e in entries]), np.concatenate(
        [e['labels'] for e in entries]
    )


def test_pixels_and_labels(small, tmp_path):
    opened = {
        split: open_cifar('cifar10', split, tmp_path / 'whole')
        for split in ('train', 'val', 'test')
    }
    assert [len(d) for d in opened.values()] == [50, 10, 20] and opened['train'].classes[
        3
    ] == 'class 3'
    data, labels = raw(tmp_path / 'whole', small, small.train_list)
    chosen = held_out(labels)
    for split, keep in (('train', ~chosen), ('val', chosen)):
        for i, j in enumerate(np.flatnonzero(keep)):
            image, label = opened[split][i]
            assert (
                image.mode == 'RGB'
                and np.array_equal(np.array(image).transpose(2, 0, 1).reshape(-1), data[j])
                and label == opened[split].label(i) == labels[j]
            )
    assert np.array_equal(
        [opened['test'].label(i) for i in range(20)],
        raw(tmp_path / 'whole', small, small.test_list)[1],
    )


def test_cifar100(tmp_path, monkeypatch):
    monkeypatch.setitem(
        cifar.SOURCES,
        'cifar100',
        pack(
            tmp_path,
            'small-100',
            'fine_labels',
            name_key='fine_label_names',
            meta='meta',
            batches=1,
            known=CIFAR100,
        ),
    )
    assert (
        len(open_cifar('cifar100', 'train', tmp_path)) == 30
        and open_cifar('cifar100', 'test', tmp_path).classes[0] == 'class 0'
    )


def test_published_choice(small, tmp_path):
    train, val, test = (
        open_cifar('cifar10', split, tmp_path / 'whole', val='test')
        for split in ('train', 'val', 'test')
    )
    assert len(train) == 60 and np.array_equal(val.images, test.images)


@pytest.mark.parametrize(
    'classes, each, known', [(10, 5000, '9dfeddd844087aa5'), (100, 500, 'f19e9b87385ee06f')]
)
def test_held_out_is_a_tenth_of_each_class_and_never_changes(classes, each, known):
    labels = np.repeat(np.arange(classes), each)
    chosen = held_out(labels)
    assert set(np.bincount(labels[chosen])) == {each // 10}
    assert hashlib.sha256(np.packbits(chosen)).hexdigest()[:16] == known


def test_folder_or_archive_itself_may_be_named(small, tmp_path):
    for name in (small.base_folder, small.filename):
        assert len(open_cifar('cifar10', 'test', tmp_path / 'whole' / name)) == 20


def test_data_root_of_the_machine(small, tmp_path, monkeypatch):
    monkeypatch.setenv('FDSL_DATA_ROOT', str(tmp_path / 'whole'))
    assert len(open_cifar(split='test')) == 20


# Archives and networks


def test_archive_by_hand(small, tmp_path):
    (tmp_path / 'hand').mkdir()
    shutil.copy(tmp_path / 'whole' / small.filename, tmp_path / 'hand')
    assert len(open_cifar('cifar10', 'test', tmp_path / 'hand')) == 20
    assert sorted(f.name for f in (tmp_path / 'hand').iterdir()) == [
        small.filename,
        small.base_folder,
    ]


def test_damaged_archive(small, tmp_path):
    data = (tmp_path / 'whole' / small.filename).read_bytes()
    for bad in (data[: len(data) // 2], b'', data[:99] + bytes([data[99] ^ 1]) + data[100:]):
        folder = tmp_path / f'hand{len(bad)}{bad[99:100].hex()}'
        folder.mkdir()
        (folder / small.filename).write_bytes(bad)
        with pytest.raises(ValueError, match=f'{small.filename} in .* is damaged'):
            open_cifar('cifar10', 'test', folder)
        assert not (folder / small.base_folder).exists() and not list(folder.glob('.*draft*'))


def test_no_network(small, tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=f'could not be downloaded .*put {small.filename} into that folder, '
        'or name a folder of pictures',
    ):
        open_cifar('cifar10', 'train', tmp_path / 'new')


@pytest.fixture
def server(small, tmp_path, monkeypatch):
    "The archive on a server of this machine; gives the list of what was fetched."
    fetched = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / 'whole')

        def do_GET(self):
            if 'Method' not in self.headers:
                fetched.append(self.path)  # torchvision first asks where it is
            super().do_GET()

        def log_message(self, *args):
            pass

    for variable in ('no_proxy', 'NO_PROXY'):
        monkeypatch.setenv(variable, '*')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as http_server:
        small.url = f'http://127.0.0.1:{http_server.server_port}/{small.filename}'
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        yield fetched
        http_server.shutdown()
        thread.join()


def test_download_once_however_many_ask(small, server, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(
                lambda split: len(open_cifar('cifar10', split, tmp_path / 'new')),
                ['train', 'val', 'test', 'test'],
            )
        )
    assert found == [50, 10, 20, 20] and len(server) == 1
    assert [f.name for f in (tmp_path / 'new').iterdir()] == [small.base_folder]


def test_download_of_something_else(small, server, tmp_path):
    small.tgz_md5 = '0' * 32
    with pytest.raises(FileNotFoundError, match='could not be downloaded'):
        open_cifar('cifar10', 'test', tmp_path / 'new')
    assert not list((tmp_path / 'new').iterdir())


def test_what_a_kill_left_is_cleared(small, server, tmp_path):
    draft = tmp_path / 'new' / f'.{small.base_folder}.draftabc' / small.base_folder
    draft.mkdir(parents=True)
    (draft / 'batch_0').write_bytes(b'half')
    open_cifar('cifar10', 'test', tmp_path / 'new')
    assert not list((tmp_path / 'new').glob('.*draft*'))


# Damage


def test_every_damaged_or_missing_file_is_named(small, tmp_path):
    here, chance = tmp_path / 'whole' / small.base_folder, random.Random(0)
    for file in sorted(here.iterdir()):
        data = file.read_bytes()
        flipped = bytearray(data)
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        for bad in (bytes(flipped), data[:-1], b''):
            file.write_bytes(bad)
            with pytest.raises(ValueError, match=f'{file.name} is damaged'):
                open_cifar('cifar10', 'train', tmp_path / 'whole')
        file.unlink()
        assert faults(small, tmp_path / 'whole') == {file.name: 'missing'}
        with pytest.raises(ValueError, match=f'{file.name} is missing'):
            open_cifar('cifar10', 'test', tmp_path / 'whole')
        file.write_bytes(data)
    assert len(open_cifar('cifar10', 'test', tmp_path / 'whole')) == 20


def test_a_pickle_that_runs_is_not_opened(small, tmp_path):
    class Payload:
        def __reduce__(self):
            return (tmp_path / 'it ran').mkdir, ()

    (tmp_path / 'whole' / small.base_folder / 'test').write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match='test is damaged'):
        open_cifar('cifar10', 'test', tmp_path / 'whole')
    assert not (tmp_path / 'it ran').exists()


@pytest.mark.parametrize(
    'given, said',
    [
        (dict(name='cifar'), "dataset='cifar' is not known; did you mean 'cifar10'"),
        (dict(split='tests'), "did you mean 'test'"),
        (dict(val='heldout'), "did you mean 'held_out'"),
    ],
)
def test_misspelt(given, said):
    with pytest.raises(ValueError, match=said):
        open_cifar(**given)

"""Folders as others write and read them: published layouts open, builds shift nobody's labels."""

import hashlib, json, os, shutil, tarfile, zipfile
from pathlib import Path
import numpy as np, pytest, timm.data, torch, webdataset
from PIL import Image
from scipy.io import savemat
from torchvision import datasets as vision
from torchvision.transforms.v2 import PILToTensor
from fdsl_nb.app.runs import configuration
from fdsl_nb.build.build import build, make_plan
from fdsl_nb.build.parquet import export_parquet
from fdsl_nb.build.verify import repair, verify
from fdsl_nb.core.folder import RunFolder
from fdsl_nb.core.settings import Resolved
from fdsl_nb.data import datasets as opening
from fdsl_nb.data.datasets import open_dataset, open_split
from fdsl_nb.data.loading import EpochBatchSampler, FolderDataset, FormulaDataset, train_loader
from fdsl_nb.formulas.layout import metadata_folder
from fdsl_nb.data.shards import BuiltDataset
from fdsl_nb.formulas.formula import formula
from fdsl_nb.training.plan import run_config
from fdsl_nb.training.training import open_splits, run_training

pytestmark = pytest.mark.usefixtures('own_data_root')
RCDB = formula('rcdb', classes=12, instances=3, size=24, start_range=4)


# no two of its images are alike
ALL_DIFFERENT = formula('onepfrac', classes=12, instances=3, size=48, points=3000)


def quiet(*_):
    pass


def make(out, source=RCDB, **more):
    return build(source, out, workers=0, progress=quiet, **more)


def picture(path, grey):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('L', (12, 12), grey).save(path)


# What other readers see in a build


def as_torchvision(root):
    return [(np.array(image)[..., 0], c) for image, c in vision.ImageFolder(root)]


def as_timm(root):
    return [(np.array(image)[..., 0], c) for image, c in timm.data.create_dataset('', str(root))]


def as_hugging_face(root):
    hub = pytest.importorskip('datasets')
    found = hub.load_dataset(
        'imagefolder', data_dir=str(root), cache_dir=str(root.parent / 'cache'), split='train'
    )
    return [(np.array(row['image']), row['label']) for row in found]


def as_ofdb(root):
    "As OFDB's data.py:16-36 lists views: everything that is not hidden is a class number."
    found = []
    for folder in root.glob('*'):
        label = int(folder.name)
        found += [(np.array(Image.open(p)), label) for p in sorted(folder.glob('*.png'))]
    return found


def as_fractaldb(root):
    "As FractalDB's loadDB.py:15-22 lists a split: everything is a class, hidden or not."
    found = []
    for c, name in enumerate(sorted(os.listdir(root))):
        found += [(np.array(Image.open(p)), c) for p in sorted((root / name).glob('*'))]
    return found


@pytest.mark.parametrize(
    'read',
    [as_torchvision, as_timm, as_hugging_face, as_ofdb, as_fractaldb],
    ids=lambda f: f.__name__,
)
def test_a_built_folder_has_the_right_labels_for_every_reader(tmp_path, read):
    make(tmp_path / 'train', ALL_DIFFERENT)
    drawn = {ALL_DIFFERENT.render(c, k).tobytes(): c for c in range(12) for k in range(3)}
    found = read(tmp_path / 'train')
    assert sorted(drawn.values()) == sorted(c for _, c in found)
    assert all(drawn[np.ascontiguousarray(image).tobytes()] == c for image, c in found)


def test_a_folder_of_built_splits_is_read_by_their_names(tmp_path):
    hub = pytest.importorskip('datasets')
    for split in ('train', 'val'):
        make(tmp_path / 'all' / split)
    assert len(timm.data.create_dataset('', str(tmp_path / 'all'), split='validation')) == 36
    found = hub.load_dataset(
        'imagefolder', data_dir=str(tmp_path / 'all'), cache_dir=str(tmp_path / 'cache')
    )
    assert {s: len(images) for s, images in found.items()} == dict(train=36, validation=36)
    assert found['train'].features['label'].names == [f'{c:05d}' for c in range(12)]


@pytest.mark.parametrize('reader', ['webdataset', 'datasets'])
def test_built_shards_have_the_right_labels_for_every_reader(tmp_path, reader):
    make(tmp_path / 'shards', ALL_DIFFERENT, layout='shards', shard_images=10)
    if reader == 'webdataset':
        urls = sorted(map(str, (tmp_path / 'shards').iterdir()))
        rows = webdataset.WebDataset(urls, shardshuffle=False).decode('pil').to_tuple('png', 'cls')
    else:
        hub = pytest.importorskip('datasets')
        rows = hub.load_dataset(
            'webdataset',
            data_dir=str(tmp_path / 'shards'),
            cache_dir=str(tmp_path / 'cache'),
            split='train',
        )
        rows = ((row['png'], row['cls']) for row in rows)
    drawn = {ALL_DIFFERENT.render(c, k).tobytes(): c for c in range(12) for k in range(3)}
    found = [(np.array(image.convert('L')).tobytes(), c) for image, c in rows]
    assert len(found) == 36 and all(drawn[image] == c for image, c in found)


# Where the metadata are


def as_before(out):
    "A build as earlier versions left it: the metadata among the images."
    for path in metadata_folder(out).iterdir():
        path.rename(out / path.name)
    metadata_folder(out.parent / out.name)
    (out.parent / f'.{out.name}.fdsl_nb').rmdir()
    said = json.loads((out / 'manifest.json').read_text())
    said['plan'].pop('threads')
    (out / 'manifest.json').write_text(json.dumps(said))


@pytest.mark.parametrize('layout', ['plain', 'published', 'shards'])
def test_builds_of_earlier_versions_open_verify_and_mend(tmp_path, layout):
    out = tmp_path / 'out'
    make(out, layout=layout)
    as_before(out)
    back = open_dataset(str(out))
    assert isinstance(back, BuiltDataset) and len(back) == 36
    np.testing.assert_array_equal(np.array(back[7][0]), RCDB.render(2, 1))
    assert verify(out) == [] and make(out, layout=layout)['images'] == 36
    lost = next(out.rglob('SHARDS*.tar' if layout == 'shards' else '00002_0001.png'))
    lost.unlink()
    assert len(repair(out)) == 1 and verify(out) == []
    (out / 'manifest.csv').unlink()  # killed, and continued by this version
    shutil.rmtree(lost.parent) if layout != 'shards' else lost.unlink()
    make(out, layout=layout)
    assert verify(out) == [] and not (tmp_path / '.out.fdsl_nb').exists()


def test_an_archive_of_an_earlier_build_has_no_class_for_its_contact_sheet(tmp_path):
    make(tmp_path / 'out')
    as_before(tmp_path / 'out')
    with tarfile.open(tmp_path / 'out.tar', 'w') as tar:
        tar.add(tmp_path / 'out', 'out')
    assert open_dataset(str(tmp_path / 'out.tar')).classes == [f'{c:05d}' for c in range(12)]


def test_a_build_whose_images_were_removed_is_built_anew_or_refused(tmp_path):
    out = tmp_path / 'out'
    make(out)
    shutil.rmtree(out)
    with pytest.raises(ValueError, match='or remove .*out.fdsl_nb, which is all that is left'):
        make(out, formula('rcdb', classes=2, instances=1, size=24, start_range=4))
    make(out)
    assert verify(out) == []


def test_a_moved_build_says_what_it_lacks_and_is_a_folder_of_pictures(tmp_path):
    make(tmp_path / 'out')
    (tmp_path / 'out').rename(tmp_path / 'moved')
    with pytest.raises(FileNotFoundError, match='where a build was moved, move that folder too'):
        verify(tmp_path / 'moved')
    assert isinstance(open_dataset(str(tmp_path / 'moved')), FolderDataset)
    (tmp_path / '.out.fdsl_nb').rename(tmp_path / '.moved.fdsl_nb')
    assert verify(tmp_path / 'moved') == []


# Layouts as published

LAYOUTS = {
    'RCDB': ['image/{c:05d}/{c:05d}_{k:04d}.png', 'param/{c:05d}.csv'],
    'VisualAtom': ['{c:05d}/vertex_0321_instance_{k:04d}.png'],
    'ExFractalDB': ['cat{c:06d}/img{k}_{c:06d}_000000_{k:03d}.png'],
    'MV-FractalDB': ['images/{c:06d}/{c:06d}_{k:05d}_000.png', '3Dmodels/{c:06d}/a.ply'],
    'FractalDB': ['{c:05d}/{c:05d}_{k:02d}_count_0_flip0.png'],
    '2D-OFDB': ['image/{c:05d}/{c:05d}_00_count_{k}_flip0.png'],
    '1p-frac': [
        'sigma3.5_perturb0.1_sample1000_Kift13W5/{c:02d}/{c:02d}_{c:02d}_count_{k}_flip0.png'
    ],
    'by macOS': ['{c:05d}/{k}.png', '__MACOSX/{c:05d}/._{k}.png', '.cache/{c:05d}/{k}.csv'],
}


def arranged(root, names):
    "Three classes of two pictures, grey 30 c + 10 k, and whatever else lies there."
    for c in range(3):
        for k in range(2):
            for name in names:
                path = root / name.format(c=c, k=k)
                if path.suffix == '.png' and not path.name.startswith('._'):
                    picture(path, 30 * c + 10 * k)
                else:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text('x')


def packed(root, kind):
    if kind == 'folder':
        return root
    files = [p for p in sorted(root.rglob('*')) if p.is_file()]
    path = root.with_name(f'{root.name}.{kind}')
    if kind == 'zip':
        with zipfile.ZipFile(path, 'w') as z:
            for file in files:
                z.write(file, file.relative_to(root.parent))
    else:
        with tarfile.open(path, 'w') as tar:
            for file in files:
                tar.add(file, file.relative_to(root.parent))
    return path


def greys(images):
    return [(np.array(image).flat[0].item(), c) for image, c in images]


EXPECTED = [(30 * c + 10 * k, c) for c in range(3) for k in range(2)]


@pytest.mark.parametrize('kind', ['folder', 'zip', 'tar'])
@pytest.mark.parametrize('whose', LAYOUTS)
def test_a_published_layout_opens(tmp_path, whose, kind):
    arranged(tmp_path / 'set', LAYOUTS[whose])
    images = open_dataset(str(packed(tmp_path / 'set', kind)))
    assert greys(images[i] for i in range(len(images))) == EXPECTED
    assert open_dataset(str(packed(tmp_path / 'set', kind)), 'val') is None


@pytest.mark.parametrize('kind', ['folder', 'zip', 'tar'])
@pytest.mark.parametrize('called', ['val', 'validation', 'valid'])
def test_splits_are_found_by_their_usual_names(tmp_path, called, kind):
    for split in ('train', called, 'test'):
        arranged(tmp_path / 'set' / 'CIFAR10' / split, ['{c}/{k}.png'])
    path = str(packed(tmp_path / 'set', kind))
    for split in ('train', 'val', 'test'):
        images = open_dataset(path, split)
        assert greys(images[i] for i in range(len(images))) == EXPECTED


@pytest.mark.parametrize('kind', ['folder', 'zip', 'tar'])
def test_splits_by_choice_and_under_two_roots(tmp_path, kind):
    arranged(tmp_path / 'one', ['fold1/{c}/{k}.png', 'fold2/{c}/{k}.png'])
    arranged(tmp_path / 'deep' / 'two', LAYOUTS['RCDB'])
    one, two = (str(packed(p, kind)) for p in (tmp_path / 'one', tmp_path / 'deep' / 'two'))
    names = dict(train_split='fold1', val_split='fold2')
    for split in ('train', 'val'):
        assert len(open_split(one, split, **names)) == 6
    assert open_split(one, 'test', **names) is None
    with pytest.raises(FileNotFoundError, match="no split 'fold3'"):
        open_split(one, 'val', val_split='fold3')
    assert greys(open_split(two, 'val', val_dir=two)) == EXPECTED
    assert greys(open_split('rcdb', 'val', val_dir=two, classes=3)) == EXPECTED
    assert len(open_split('rcdb', 'train', val_dir=two, classes=3, instances=5)) == 15


def test_a_folder_that_cannot_be_taken_says_why(tmp_path):
    arranged(tmp_path / 'one', ['val/{c}/{k}.png'])
    with pytest.raises(FileNotFoundError, match='has no folder train/.*found: val'):
        open_dataset(str(tmp_path / 'one'))
    picture(tmp_path / 'flat' / '1.png', 3)
    with pytest.raises(ValueError, match='has no class folders'):
        open_dataset(str(tmp_path / 'flat'))
    (tmp_path / 'a.tar.gz').write_bytes(b'\x1f\x8b' + bytes(600))
    with pytest.raises(ValueError, match='is compressed.*unpack it'):
        open_dataset(str(tmp_path / 'a.tar.gz'))


@pytest.mark.parametrize(
    'whose, kind',
    [('RCDB', 'folder'), ('ExFractalDB', 'zip'), ('1p-frac', 'folder'), ('1p-frac', 'tar')],
)
def test_published_layouts_are_trained_on(tmp_path, whose, kind):
    "Training images in a published layout, validation images under another root."
    arranged(tmp_path / 'one' / 'set', LAYOUTS[whose])
    arranged(tmp_path / 'two', [name.replace('set/', '') for name in LAYOUTS[whose]])
    asked = dict(
        dataset=str(packed(tmp_path / 'one' / 'set', kind)),
        val_dir=str(tmp_path / 'two'),
        epochs=1,
        batch_size=3,
        warmup_epochs=0,
        wandb_mode='disabled',
    )
    tiny = Resolved(dict(patch_size=8, embed_dim=32, depth=1, num_heads=2), 'test')
    config = configuration('finetune', asked, RunFolder(tmp_path / 'run'))
    result = run_training(config | dict(model_kwargs=tiny))
    assert result['split'] == 'val' and result['images'] == 6
    with pytest.raises(FileNotFoundError, match="no split 'half'"):
        open_splits(run_config({k: r.value for k, r in config.items()} | dict(val_split='half')))


@pytest.mark.parametrize('build_of', ['a build', 'a folder'])
def test_3d_ofdb_from_disk_trains_as_online(tmp_path, build_of):
    "OFDB's data.py:16-59: an epoch is one view of each class."
    f = formula('ofdb3d', classes=4, size=32, points=1500)
    make(tmp_path / 'out', f, layout='published')
    knobs = {}
    if build_of == 'a folder':
        shutil.rmtree(metadata_folder(tmp_path / 'out'))
        knobs = dict(one_per_class=True)
    stored, online = open_split(str(tmp_path / 'out'), **knobs), FormulaDataset(f)
    assert len(stored) == len(online) == 4 and len(open_dataset(str(tmp_path / 'out'))) == 48
    batches = EpochBatchSampler(4, 4, seed=3)
    for epoch in range(3):
        batches.epoch = epoch
        (one, classes), (other, labels) = (
            next(iter(train_loader(d, PILToTensor(), batches))) for d in (stored, online)
        )
        assert torch.equal(one, other) and torch.equal(classes, labels)


# FractalDB's category folders


def test_category_folders_open_with_their_numbers(tmp_path):
    "As parallel_dir.py:24-34 deals 40 files out to csv0 … csv9."
    rng = np.random.RandomState(0)
    for i in range(40):
        path = tmp_path / 'csv_rate0.2_category40' / f'csv{i // 4}' / f'{i:05d}.csv'
        path.parent.mkdir(parents=True, exist_ok=True)
        maps = np.column_stack([rng.uniform(-0.5, 0.5, (2, 6)), [0.25, 0.75]])
        maps[0, 0] = i / 100
        np.savetxt(path, maps, delimiter=',')
    knobs = dict(instances=2, size=24, points=300, draw_type='point_gray')
    whole = formula('fractaldb', classes=40, categories=str(tmp_path / path.parts[-3]), **knobs)
    assert [whole.category(c)[0, 0] for c in range(40)] == [i / 100 for i in range(40)]
    part = formula('fractaldb', classes=4, categories=str(path.parent), **knobs)
    assert part.category(1)[0, 0] == 0.37 and part.published_file(1, 0).startswith('00037/00037_')
    make(tmp_path / 'out', part, layout='published')
    assert sorted(os.listdir(tmp_path / 'out')) == ['00036', '00037', '00038', '00039']
    assert verify(tmp_path / 'out') == []
    make(tmp_path / 'reference', part, mode='reference')
    assert sorted(os.listdir(tmp_path / 'reference')) == ['00036', '00037', '00038', '00039']


# The published program's own pixels

GOLDEN = Path(__file__).parent / 'golden'


def sha256_of(path):
    return hashlib.sha256(np.array(Image.open(path)).tobytes()).hexdigest()


@pytest.mark.parametrize('name', ['rcdb_thread', 'visualatom_script'])
def test_reference_builds_hold_the_published_files(tmp_path, name):
    from fdsl_nb.formulas.contours import RCDB, VisualAtom

    golden = json.loads((GOLDEN / f'{name}.json').read_text())
    flags = dict(golden['flags'])
    threads, _ = flags.pop('numof_thread'), flags.pop('thread_num')
    f = (RCDB if name.startswith('rcdb') else VisualAtom).from_flags(**flags)
    make(tmp_path / 'out', f, mode='reference', threads=threads)
    for file, (_, _, sha) in golden['images'].items():
        assert sha256_of(tmp_path / 'out' / file) == sha
    for file, text in golden.get('parameters', {}).items():
        path = tmp_path / 'out' / 'param' / file
        assert path.read_text() == text and path.read_bytes() == text.replace('\n', '\r\n').encode()
    back = open_dataset(str(tmp_path / 'out'))
    assert len(back) == len(f) and {back.label(i) for i in range(len(back))} == {*range(f.classes)}
    assert verify(tmp_path / 'out') == []


def test_reference_builds_continue_and_mend(tmp_path):
    kw = dict(mode='reference', threads=3)
    make(tmp_path / 'whole', **kw)

    def stop(done, *_):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(RCDB, tmp_path / 'out', workers=0, progress=stop, **kw)
    drawn = []
    progress = lambda done, total, now, *_: drawn.append(now)
    build(RCDB, tmp_path / 'out', workers=0, progress=progress, **kw)
    assert drawn[-1] == 24
    names = sorted(p.relative_to(tmp_path / 'whole') for p in (tmp_path / 'whole').rglob('*.*'))
    for n in names:
        assert (tmp_path / 'out' / n).read_bytes() == (tmp_path / 'whole' / n).read_bytes()
    (tmp_path / 'out' / 'image' / '00007' / '00007_0001.png').unlink()
    (tmp_path / 'out' / 'image' / '00002' / '00002_0000.png').write_bytes(b'half')
    (tmp_path / 'out' / 'param' / '00004.csv').unlink()
    assert sorted(f.part for f in repair(tmp_path / 'out')) == [2, 4, 7]
    assert verify(tmp_path / 'out') == []
    with pytest.raises(ValueError, match='holds another build: plan threads=3 there, 2 here'):
        make(tmp_path / 'out', mode='reference', threads=2)


@pytest.mark.parametrize('name', ['ofdb2d', 'onepfrac', 'mvfractaldb', 'ofdb3d'])
def test_reference_builds_of_the_other_families(tmp_path, name):
    knobs = dict(classes=3, size=32, points=2000)
    knobs |= dict(rows=25, views=2, variance=0.15) if '3d' in name or 'mv' in name else {}
    f = formula(name, **knobs)
    make(tmp_path / 'out', f, mode='reference')
    samples = {s.file: s for s in f.reference()}
    files = {
        p.relative_to(tmp_path / 'out').as_posix(): p for p in (tmp_path / 'out').rglob('*.png')
    }
    assert files.keys() == samples.keys()
    for file, path in files.items():
        expected = samples[file].image
        expected = expected if expected.ndim == 2 else expected[..., 0]
        np.testing.assert_array_equal(np.array(Image.open(path).convert('L')), expected)
    back = open_dataset(str(tmp_path / 'out'))
    assert len(back) == len(files) and back[len(back) - 1][1] == 2
    assert verify(tmp_path / 'out') == []


def test_reference_mode_says_what_it_cannot_do(tmp_path):
    with pytest.raises(ValueError, match='build those first, and then shards from that folder'):
        make_plan(RCDB, 'shards', mode='reference')
    with pytest.raises(ValueError, match='does not divide classes=12'):
        make_plan(RCDB, mode='reference', threads=5)
    with pytest.raises(ValueError, match="mode='publised' is not known"):
        make_plan(RCDB, mode='publised')
    make(tmp_path / 'out', mode='reference', threads=3)
    make(tmp_path / 'shards', str(tmp_path / 'out'), layout='shards')
    assert len(open_dataset(str(tmp_path / 'shards'))) == 36
    assert export_parquet(str(tmp_path / 'out'), tmp_path / 'hub', workers=0, progress=quiet)


# The data sets that the papers fine-tune on


def flowers(root):
    root = root / 'flowers-102'
    for i in range(1, 7):
        picture(root / 'jpg' / f'image_{i:05d}.jpg', 10 * i)
    savemat(root / 'imagelabels.mat', dict(labels=[[1, 2, 3, 1, 2, 3]]))
    savemat(root / 'setid.mat', dict(trnid=[[1, 2]], valid=[[3, 4]], tstid=[[5, 6]]))


def cars(root):
    root = root / 'stanford_cars'
    field = [(n, object) for n in ('bbox_x1', 'bbox_y1', 'bbox_x2', 'bbox_y2', 'class', 'fname')]
    for split, file in (
        ('train', 'devkit/cars_train_annos'),
        ('test', 'cars_test_annos_withlabels'),
    ):
        for i in (1, 2):
            picture(root / f'cars_{split}' / f'{i:05d}.jpg', 10 * i)
        rows = np.array([(1, 1, 9, 9, i, f'{i:05d}.jpg') for i in (1, 2)], field)
        (root / 'devkit').mkdir(exist_ok=True)
        savemat(root / f'{file}.mat', dict(annotations=rows))
    names = np.array(['AM General', 'Acura RL'], object)
    savemat(root / 'devkit' / 'cars_meta.mat', dict(class_names=names))


def pets(root):
    root = root / 'oxford-iiit-pet'
    (root / 'annotations').mkdir(parents=True)
    for split, image in (('trainval', 'Abyssinian_1 1 1 1'), ('test', 'Abyssinian_2 1 1 1')):
        picture(root / 'images' / f'{image.split()[0]}.jpg', 90)
        (root / 'annotations' / f'{split}.txt').write_text(f'{image}\n')


def dtd(root):
    root = root / 'dtd' / 'dtd'
    (root / 'labels').mkdir(parents=True)
    for n, split in enumerate(('train', 'val', 'test')):
        names = [f'{c}/{c}_{n}.jpg' for c in ('banded', 'woven')]
        for name in names:
            picture(root / 'images' / name, 30)
        (root / 'labels' / f'{split}1.txt').write_text('\n'.join(names) + '\n')


def aircraft(root):
    data = root / 'fgvc-aircraft-2013b' / 'data'
    for n, split in enumerate(('train', 'val', 'test')):
        picture(data / 'images' / f'{n:07d}.jpg', 30)
        (data / f'images_variant_{split}.txt').write_text(f'{n:07d} 707-320\n')
    (data / 'variants.txt').write_text('707-320\n727-200\n')


def voc12(root):
    voc = root / 'VOCdevkit' / 'VOC2012'
    (voc / 'ImageSets' / 'Main').mkdir(parents=True)
    (voc / 'Annotations').mkdir()
    thing = '<object><name>{}</name><difficult>{}</difficult></object>'
    for split, seen in (('train', [('cat', 0), ('dog', 1)]), ('val', [('person', 0)])):
        picture(voc / 'JPEGImages' / f'{split}_1.jpg', 50)
        (voc / 'ImageSets' / 'Main' / f'{split}.txt').write_text(f'{split}_1\n')
        body = ''.join(thing.format(*one) for one in seen)
        (voc / 'Annotations' / f'{split}_1.xml').write_text(f'<annotation>{body}</annotation>')


FOUND = dict(
    cars=(cars, dict(train=[0, 1], val=None, test=[0, 1])),
    flowers=(flowers, dict(train=[0, 1], val=[2, 0], test=[1, 2])),
    pets=(pets, dict(train=[0], val=None, test=[0])),
    dtd=(dtd, dict(train=[0, 1], val=[0, 1], test=[0, 1])),
    aircraft=(aircraft, dict(train=[0], val=[0], test=[0])),
)


@pytest.mark.parametrize('name', FOUND)
def test_collections_are_read_as_torchvision_lays_them_out(tmp_path, name, monkeypatch):
    monkeypatch.setattr(vision.Flowers102, '_check_integrity', lambda self: True)
    write, expected = FOUND[name]
    write(tmp_path)
    for place in (tmp_path, tmp_path / opening.COLLECTED[name].folder):
        for split, labels in expected.items():
            images = open_dataset(name, split, data_dir=str(place))
            if labels is None:
                assert images is None
                continue
            assert [images.label(i) for i in range(len(images))] == labels
            assert images[0][0].mode == 'RGB' and images[0][1] == labels[0]
            assert Path(images.name(0)).is_file() and len(images.classes) >= len({*labels})


def test_validation_images_can_be_trained_on(tmp_path):
    dtd(tmp_path)
    joined = open_dataset('dtd', data_dir=str(tmp_path), trainval=True)
    assert len(joined) == 4 and open_dataset('dtd', 'val', str(tmp_path), trainval=True) is None


def test_voc_has_several_labels_an_image(tmp_path):
    voc12(tmp_path)
    for place in (tmp_path, tmp_path / 'VOCdevkit', tmp_path / 'VOCdevkit' / 'VOC2012'):
        images = open_dataset('voc12', data_dir=str(place))
        seen = [images.classes[c] for c in np.flatnonzero(images.label(0))]
        assert images.multilabel and seen == ['cat']  # the dog is difficult
    assert open_dataset('voc12', 'test', str(tmp_path)) is None


@pytest.mark.parametrize(
    'name', ['cars', 'flowers', 'pets', 'dtd', 'aircraft', 'cub', 'voc12', 'places30']
)
def test_collections_open_as_class_folders_too(tmp_path, name):
    for split in ('train', 'val'):
        arranged(tmp_path / 'set' / split, ['{c}/{k}.png'])
    for kind in ('folder', 'zip', 'tar'):
        images = open_dataset(name, 'val', data_dir=str(packed(tmp_path / 'set', kind)))
        assert greys(images[i] for i in range(len(images))) == EXPECTED
    with pytest.raises(FileNotFoundError, match='data_dir'):
        open_dataset(name, data_dir=str(tmp_path / 'nothing') if name != 'places30' else '')


# The misprint of weights_ins145.csv


def test_reference_pixels_follow_the_misprint_of_cloud_108():
    "`weights_ins145.csv`, line 109: 0.6 where the series has 1.6."
    from fdsl_nb.formulas.ifs3d import weight_table

    series, published = weight_table(), weight_table(misprint=True)
    assert series[108, 8] == 1.6 and published[108, 8] == 0.6
    assert np.argwhere(series != published).tolist() == [[108, 8]]
    assert (published[99] == published[108]).all()

"""The augmentation kernel, run by threads of a CPU: the bits of `GreyTransform.from_seed`."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from cuda_races import barriers, races, without_barrier
from test_cuda import cpu_device
from test_fast_augment import SETTINGS, drawn, pictures
from training_helpers import DRAWN, trained

from fdsl_nb.data import cuda_augment
from fdsl_nb.data.augment import train_transform
from fdsl_nb.data.augmentation import Augmentation
from fdsl_nb.formulas import cuda
from fdsl_nb.data.datasets import open_dataset
from fdsl_nb.data.loading import AugmentedDataset, EpochBatchSampler
from fdsl_nb.formulas.formula import PUBLISHED
from fdsl_nb.training import training
from fdsl_nb.training.recipes import recipe

AUGMENT_CU = cuda_augment.SOURCE.read_text()


@pytest.fixture(scope='module')
def emulated():
    if not shutil.which('g++'):
        pytest.skip('no g++, which would compile the kernel for this CPU')
    return cuda.EmulatedKernels(cuda_augment.SOURCE)


def assert_equal(transform, images, seeds, emulated, threads=(1, 8)):
    expected = [transform.from_seed(x, seed).numpy() for x, seed in zip(images, seeds)]
    launch = cuda_augment.pack_views(transform, np.stack(images), seeds)
    for n in threads:
        found, _ = emulated.draw(launch, n)
        differ = [s for s, a, b in zip(seeds, found, expected) if not np.array_equal(a, b)]
        assert found.dtype == expected[0].dtype and not differ


@pytest.mark.process
@pytest.mark.parametrize('name', SETTINGS)
def test_every_setting_gives_the_bits_of_the_transform(name, emulated):
    known = pictures(120)
    images = [known[i % len(known)] for i in range(64)]
    assert_equal(train_transform(SETTINGS[name]), images, [*range(64)], emulated)


@pytest.mark.process
@pytest.mark.parametrize('shape', [(40, 300), (300, 40), (20, 17), (64, 64)])
def test_images_of_any_shape(shape, emulated):
    chance = np.random.default_rng(1)
    images = [chance.integers(0, 256, shape, dtype=np.uint8) for _ in range(24)]
    assert_equal(train_transform(SETTINGS['ofdb']), images, [*range(2**40, 2**40 + 24)], emulated)


@pytest.mark.process
def test_images_that_were_drawn_on_the_device_stay_there(emulated, monkeypatch):
    transform, images = train_transform(SETTINGS['ofdb']), torch.from_numpy(np.stack(pictures(64)))
    kernels = cpu_device(emulated, monkeypatch)
    views, drawn = kernels.draw(cuda_augment.pack_views(transform, images, range(len(images))))
    assert views.dtype == torch.float32 and drawn.all()
    expected = [transform.from_seed(x.numpy(), seed) for seed, x in enumerate(images)]
    assert torch.equal(views, torch.stack(expected))


def published(name):
    return train_transform(recipe(dataset=name))


@pytest.mark.process
def test_512_pixels_as_published(emulated):
    assert_equal(published('visualatom'), drawn('visualatom', 512, 8), [*range(8)], emulated)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize('name', PUBLISHED)
def test_64_images_of_each_family_in_its_recipe(name, emulated):
    images = drawn(name, 512 if name in ('rcdb', 'visualatom') else 224, 8) * 8
    assert_equal(published(name), images, [*range(64)], emulated)


@pytest.mark.long
def test_what_only_timm_knows_is_refused(capsys):
    transform = train_transform(replace(SETTINGS['ofdb'], aa='augmix-m3'))
    with pytest.raises(cuda.CannotPack, match='a step that only timm knows'):
        cuda_augment.pack_views(transform, np.zeros((1, 32, 32), np.uint8), [0])


@pytest.mark.long
def test_nine_operations_are_too_many():
    transform = train_transform(Augmentation(img_size=16, aa='rand-m9-n9'))
    with pytest.raises(cuda.CannotPack, match='9 operations and .* a kernel takes 8 each'):
        cuda_augment.pack_views(transform, np.zeros((1, 32, 32), np.uint8), [0])


def test_records_have_the_fields_of_the_structs():
    without_comments = re.sub('//.*', '', AUGMENT_CU)
    for struct, record in (
        ('Operation', cuda_augment._OPERATION),
        ('Rectangle', cuda_augment._RECTANGLE),
        ('View', cuda_augment._VIEW),
        ('ViewSettings', cuda_augment._SETTINGS),
    ):
        (body,) = re.findall(rf'struct {struct} \{{(.*?)\}};', without_comments, re.DOTALL)
        names = [n for line in re.findall(r'\w+ ([\w, \[\]]+);', body) for n in line.split(',')]
        assert [n.strip().split('[')[0] for n in names] == [*record.names]
    for name in ('LAYERS', 'RECTANGLES'):
        assert f'{name} = {getattr(cuda_augment, name)}' in AUGMENT_CU


@pytest.mark.long
@pytest.mark.parametrize('arch', ['sm_80', 'sm_90', 'sm_100'])
def test_it_compiles_without_a_gpu_and_fuses_nothing(arch):
    try:
        compiled = cuda.compile_cuda(AUGMENT_CU, arch, name='augment.cu')
    except RuntimeError as e:
        if 'NVRTC is not here' in str(e):
            pytest.skip(str(e))
        raise
    assert 'fma' not in compiled.ptx
    used = cuda.resources(compiled.log)['augment']
    assert used.registers <= 128 and used.spilled == 0 and used.shared <= 48 * 1024


# Whole batches, drawn and augmented by kernels


@pytest.fixture(scope='module')
def kernels(emulated):
    return cuda_augment.Kernels(cuda.EmulatedKernels(), emulated)


@pytest.fixture
def as_on_a_gpu(kernels, monkeypatch):
    "Kernels of this CPU where those of a GPU are asked for."
    monkeypatch.setattr(cuda_augment, 'why_not_cuda', lambda formula, addresses: '')
    monkeypatch.setattr(training, 'device_kernels', lambda device: kernels)


CHANCES = dict(
    aa='rand-m9-mstd0.5-inc1',
    reprob=0.5,
    hflip=0.5,
    scale=(0.3, 1.0),
    mixup=0.8,
    smoothing=0.1,
    drop_path=0.1,
    aug_repeats=3,
    valid_pct=0.25,
    eval_metric='top1',
    batch_size=8,
)


def losses_and_weights(folder, **given):
    learn, watch, _ = trained(folder, **CHANCES | given)
    return watch.losses, [p.detach().clone() for p in learn.model.parameters()]


@pytest.mark.process
@pytest.mark.parametrize('prefetcher', (True, False))
def test_two_epochs_are_those_of_the_cpu(prefetcher, tmp_path, as_on_a_gpu, capsys):
    given = dict(prefetcher=prefetcher)
    losses, weights = losses_and_weights(tmp_path / 'cpu', **given)
    assert 'drawn' not in capsys.readouterr().out
    found, ours = losses_and_weights(tmp_path / 'cuda', **given, draw_on='cuda', workers=2)
    assert 'images are drawn and augmented on the GPU' in capsys.readouterr().out
    assert found == losses and len(losses) == 2 * 24 // 8
    assert all(torch.equal(a, b) for a, b in zip(ours, weights, strict=True))


@pytest.mark.process
def test_a_run_goes_on_where_images_are_drawn_elsewhere(tmp_path, as_on_a_gpu):
    losses, weights = losses_and_weights(tmp_path / 'whole')
    first, _ = losses_and_weights(tmp_path / 'moved', pause=1)
    then, ours = losses_and_weights(tmp_path / 'moved', draw_on='cuda')
    assert first + then == losses
    assert all(torch.equal(a, b) for a, b in zip(ours, weights, strict=True))


@pytest.mark.process
def test_an_image_that_a_kernel_cannot_draw_is_drawn_by_the_cpu(kernels):
    class Failing:
        def draw(self, launch):
            images, drawn = kernels.draw.draw(launch)
            images[1], drawn[1] = 0, False
            return images, drawn

    images = open_dataset('visualatom', **DRAWN)
    transform = train_transform(SETTINGS['ofdb'])
    batches = EpochBatchSampler(32, 8, repeats=2, epochs=1)
    failing = cuda_augment.Kernels(Failing(), kernels.augment)
    loader = cuda_augment.device_loader(images, transform, batches, failing, torch.device('cpu'))
    dataset = AugmentedDataset(images, transform, repeats=2)
    for (views, labels), samples in zip(loader, batches, strict=True):
        expected, classes = zip(*[dataset[sample] for sample in samples])
        assert torch.equal(views, torch.stack(expected)) and labels.tolist() == [*classes]


CUDA = torch.device('cuda', 0)


@pytest.mark.process
@pytest.mark.parametrize(
    'images, said',
    (
        (lambda: open_dataset('digits'), 'the images are read, not drawn'),
        (lambda: open_dataset('fractaldb', classes=2, draw_type='patch_color'), 'in colour'),
        (lambda: open_dataset('visualatom', **DRAWN), ''),
    ),
    ids=('read', 'colour', 'grey'),
)
def test_where_images_are_drawn(images, said, as_on_a_gpu):
    transform, data = train_transform(SETTINGS['ofdb']), images()
    cpu = torch.device('cpu')
    assert cuda_augment.choose_feed('cpu', CUDA, data, transform) == ('cpu', '')
    assert cuda_augment.choose_feed('auto', cpu, data, transform) == ('cpu', '')
    where, line = cuda_augment.choose_feed('auto', CUDA, data, transform)
    assert where == ('cpu' if said else 'cuda')
    if said:
        assert (said in line) == ('read' not in said)
        with pytest.raises(ValueError, match=f"draw_on='cuda': .*{said}.*; or give draw_on='auto'"):
            cuda_augment.choose_feed('cuda', CUDA, data, transform)


def test_without_a_gpu_cuda_is_refused_with_its_remedy(tmp_path):
    with pytest.raises(ValueError, match="draw_on='cuda': .*(install torch|nvidia-smi)"):
        trained(tmp_path, draw_on='cuda')


def test_plans_of_many_images_are_those_of_each():
    for name, chances in dict(both=(0.5, 0.3), none=(0.0, 0.0), second=(0.0, 1.0)).items():
        a = Augmentation(img_size=32, hflip=chances[0], vflip=chances[1], reprob=0.6, recount=3)
        transform, seeds = train_transform(replace(a, prefetcher=False)), [0, 1, 2**32 + 5, 2**62]
        plans = cuda_augment._drawn_plans(transform, seeds, 40, 60)
        for i, seed in enumerate(seeds):
            plan = transform.draw_from(seed, 40, 60)
            assert plans.crop[i].tolist() == plan.crop.tolist()
            assert [*plans.flips[i]] == [*plan.flips, False, False][:2], name
            assert np.array_equal(plans.operations[i], plan.operations)
            assert plans.erased[i] == len(plan.erased)


# Threads that run ahead: every operation once, and two images after one another


def all_operations():
    transform = train_transform(Augmentation(img_size=17, aa='rand-m9-n8', reprob=0.9, recount=3))
    images = torch.arange(6 * 23 * 19).reshape(6, 23, 19).to(torch.uint8).numpy()
    return cuda_augment.pack_views(transform, images, [*range(6)])


@pytest.mark.slow
@pytest.mark.process
def test_threads_of_a_block_do_not_race(tmp_path, emulated):
    assert races(AUGMENT_CU, all_operations(), tmp_path) == ''


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize('n', range(len(barriers(AUGMENT_CU))))
def test_every_barrier_is_missed(n, tmp_path, emulated):
    assert 'data race' in races(without_barrier(AUGMENT_CU, n), all_operations(), tmp_path)

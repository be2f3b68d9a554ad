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

from fdsl_nb.data import cuda_augment
from fdsl_nb.data.augment import train_transform
from fdsl_nb.data.augmentation import Augmentation
from fdsl_nb.formulas import cuda
from fdsl_nb.formulas.formula import PUBLISHED
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

"""The CUDA kernels, without a GPU: their source run by threads of the CPU, and what NVRTC makes of
it. `benchmarks/gpu.py` is for machines with one."""

import contextlib
import ctypes
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cuda_races import barriers, races, without_barrier

from fdsl_nb.formulas import cuda
from fdsl_nb.formulas.contours import VisualAtom
from fdsl_nb.formulas.formula import PUBLISHED, formula

DRAW_CU = (cuda.SOURCES / 'draw.cu').read_text()
ARCHITECTURES = 'sm_80', 'sm_90', 'sm_100'


@pytest.fixture(scope='module')
def emulated():
    if not shutil.which('g++'):
        pytest.skip('no g++, which would compile the kernels for this CPU')
    return cuda.EmulatedKernels()


def spread(f, n):
    "Addresses far apart, in few classes: a class may have to be searched."
    return [(i * 7919 % min(f.classes, 24), i * 104729 % f.instances) for i in range(n)]


def assert_equal(f, addresses, emulated):
    expected = np.stack([f.render(*a) for a in addresses])
    launch = cuda.pack(f, addresses)
    for threads in (1, 8):
        images, drawn = emulated.draw(launch, threads)
        differ = np.flatnonzero((images != expected).reshape(len(addresses), -1).any(1))
        assert not differ.size, [addresses[i] for i in differ]
        assert drawn.all()


# Equal pixels


@pytest.mark.process
@pytest.mark.parametrize('name', PUBLISHED)
def test_kernels_draw_what_render_draws(name, emulated):
    f = formula(name)
    assert_equal(f, spread(f, 3), emulated)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize('name', PUBLISHED)
def test_24_full_size_images_of_each_family(name, emulated):
    f = formula(name)
    assert_equal(f, spread(f, 24), emulated)


SMALL_GAME = dict(size=50, points=3000, search_points=20_000, rate=0.05)
KNOBS = [
    ('rcdb', dict(size=33, seed=2**64 - 1)),
    ('rcdb', dict(size=600, radius_min=300)),  # 301 greys, of which those above 255 are 255
    ('visualatom', dict(size=40, start_class=1000, noise_min=50.0)),
    ('visualatom', dict(size=64, vertices_min=1020, vertices_max=1300, lines_max=4)),
    *[
        ('fractaldb', dict(SMALL_GAME, weight=0.5, draw_type=draw))
        for draw in ('point_gray', 'point_color', 'patch_gray', 'patch_color', 'patch_fill')
    ],
    ('fractaldb', dict(SMALL_GAME, padding=1, size=9)),  # patches stick out
    ('ofdb2d', dict(SMALL_GAME, instances=3)),
    ('onepfrac', dict(size=50, points=3000, instances=4)),
    ('onepfrac', dict(size=50, points=3000, mask_mode='fill', maps=3)),
    ('mvfractaldb', dict(size=50, points=500, point_size=4, near=3.5, far=4.5)),
    ('exfractaldb', dict(size=50, points=500, half_side=3.0)),  # behind the camera too
    ('ofdb3d', dict(size=50, points=500, axes=3)),
]


@pytest.mark.process
@pytest.mark.parametrize('name, knobs', KNOBS)
def test_kernels_know_every_knob(name, knobs, emulated):
    f = formula(name, **knobs)
    assert_equal(f, spread(f, 12), emulated)


@pytest.mark.process
def test_a_game_that_runs_away_is_cut_where_the_cpu_cuts_it(emulated, tmp_path):
    # grows only where weights double `a`: x is infinite after some 1,200 points, then y no number
    (tmp_path / '00000.csv').write_text('0.9,0.01,0,0.5,0.1,0.2,0.5\n0.9,0,0.0,-0.5,0.3,0.1,0.5\n')
    f = formula('fractaldb', classes=1, size=64, points=4000, weight=0.5, categories=str(tmp_path))
    far = [k for k in range(25) if not np.isfinite(played(f, k)).all()]
    assert far
    assert_equal(f, [(0, k) for k in far[:4]] + [(0, 2)], emulated)


def played(f, k):
    "Where instance `k` of class 0 ends, without the cut."
    maps = f.category(0) * np.append(cuda.plane_weights(f.weight)[k], 1.0)
    x = y = 0.0
    with np.errstate(all='ignore'):
        for pick in cuda.canonical_picks(f.seed, f.points)[:-1]:
            a, b, c, d, e, g, _ = maps[min((np.cumsum(maps[:, 6]) < pick).sum(), len(maps) - 1)]
            x, y = x * a + y * b + e, x * c + y * d + g
    return x, y


# What does not pack


class Dotted(VisualAtom):
    def draw(self, c, k):
        return super().draw(c, k) & 127


def test_a_subclass_may_draw_otherwise_and_is_not_packed():
    with pytest.raises(cuda.CannotPack, match='no CUDA kernel draws Dotted'):
        cuda.pack(Dotted(size=32), [(0, 0)])


def test_an_address_outside_is_refused():
    with pytest.raises(IndexError, match='class 1000'):
        cuda.pack(formula('rcdb'), [(1000, 0)])


def test_auto_falls_back_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    cuda._say_once.cache_clear()
    images = [cuda.draw_images(formula('rcdb', size=16), [(0, k)]) for k in range(3)]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith('rcdb is drawn on the CPU: torch ')
    assert (images[2][0].numpy() == formula('rcdb', size=16).render(0, 2)).all()


def test_cuda_where_it_cannot_be_is_an_error_with_its_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ValueError, match="draw_on='cuda': torch .*; (look|inst).*draw_on='auto'"):
        cuda.drawing_device(formula('rcdb'), 'cuda')
    with pytest.raises(ValueError, match="draw_on='gpu' is not known"):
        cuda.drawing_device(formula('rcdb'), 'gpu')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    with pytest.raises(ValueError, match='no CUDA kernel draws Dotted'):
        cuda.drawing_device(Dotted(), 'cuda')


def test_a_machine_without_nvrtc_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setitem(sys.modules, 'cuda.bindings', None)
    with pytest.raises(ValueError, match='NVRTC is not here .*pip install cuda-bindings'):
        cuda.drawing_device(formula('rcdb'), 'cuda')


# Python and CUDA C agree on the layout of their records


def test_records_have_the_fields_of_the_structs():
    kinds = {'i64': '<i8', 'u64': '<u8', 'double': '<f8'}
    records = {
        'ContourPicture': cuda._CONTOUR_PICTURE,
        'ContourClass': cuda._CONTOUR_CLASS,
        'ContourSettings': cuda._CONTOUR_SETTINGS,
        'PlanePicture': cuda._PLANE_PICTURE,
        'PlaneSettings': cuda._PLANE_SETTINGS,
        'SpacePicture': cuda._SPACE_PICTURE,
        'SpaceSettings': cuda._SPACE_SETTINGS,
    }
    without_comments = re.sub('//.*', '', DRAW_CU)
    for struct, record in records.items():
        (body,) = re.findall(rf'struct {struct} \{{(.*?)\}};', without_comments, re.DOTALL)
        lines = re.findall(r'(\w+) ([\w, \[\]]+);', body)
        fields = [(n.strip(), kinds[kind]) for kind, names in lines for n in names.split(',')]
        ours = [(name, record[name]) for name in record.names]
        plain = [(n, k.str) if not k.shape else (f'{n}[{k.shape[0]}]', k.base.str) for n, k in ours]
        assert fields == plain, struct


def test_constants_agree():
    for name, value in (('STRIDE', cuda._STRIDE), ('SHARED_VERTICES', cuda._SHARED_VERTICES)):
        assert re.search(rf'\b{name} = {value}\b', DRAW_CU)


# What NVRTC makes of it


@pytest.fixture(scope='module')
def compiled():
    try:
        return {arch: cuda.compile_cuda(DRAW_CU, arch) for arch in ARCHITECTURES}
    except RuntimeError as e:
        if 'NVRTC is not here' in str(e):
            pytest.skip(str(e))
        raise


@pytest.mark.long
@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_nothing_is_fused_and_all_is_rounded_to_nearest(arch, compiled):
    ptx = compiled[arch].ptx
    assert 'fma' not in ptx
    reals = set(re.findall(r'\b(?:mul|add|sub|div)\S*\.f\d\d\b', ptx))
    assert {'mul.rn.f64', 'add.rn.f32', 'div.rn.f64'} <= reals
    assert all('.rn.' in operation for operation in reals)


@pytest.mark.long
@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_kernels_fit_a_multiprocessor(arch, compiled):
    used = cuda.resources(compiled[arch].log)
    assert sorted(used) == ['draw_contours', 'draw_plane', 'draw_space']
    for registers, spilled, shared in used.values():
        assert registers <= 128 and spilled == 0 and shared <= 48 * 1024


@pytest.mark.long
@pytest.mark.parametrize('options', [('--fmad=true',), ('--use_fast_math',)])
def test_code_that_rounds_otherwise_is_refused(options, compiled):
    source = '__global__ void f(float *a) { a[0] = a[1] * a[2] + a[3]; }'
    with pytest.raises(RuntimeError, match=r'the compiler made .* compile with --fmad=false'):
        cuda.compile_cuda(source, 'sm_90', options)


@pytest.mark.long
def test_a_fault_in_the_source_is_shown(compiled):
    with pytest.raises(RuntimeError, match='does not compile for sm_90 .*\n.*draw.cu'):
        cuda.compile_cuda('__global__ void f() { g(); }', 'sm_90')


@pytest.mark.long
def test_machine_code_is_compiled_once_and_a_torn_file_again(tmp_path, monkeypatch, compiled):
    asked = []
    monkeypatch.setattr(
        cuda, 'compile_cuda', lambda source, arch, name: asked.append(arch) or compiled[arch]
    )
    first = cuda.cached_cubin('sm_90', tmp_path)
    assert cuda.cached_cubin('sm_90', tmp_path) == first == compiled['sm_90'].cubin
    assert asked == ['sm_90']
    (file,) = tmp_path.rglob('*.cubin')
    file.write_bytes(file.read_bytes()[:-1])
    assert cuda.cached_cubin('sm_90', tmp_path) == first
    assert asked == ['sm_90', 'sm_90']
    assert [p.name for p in tmp_path.rglob('*.*')] == [file.name]


# The launch, with a driver that hands the kernel to the CPU


class CpuDriver:
    "Takes a launch as the CUDA driver does, and runs it on the CPU."

    def __init__(self, emulated):
        self.library, self.starts = emulated.library, []

    def cuCtxSetCurrent(self, context):
        return (0,)

    def cuModuleGetFunction(self, module, name):
        return 0, name.decode()

    def cuLaunchKernel(self, name, gx, gy, gz, bx, by, bz, shared, stream, arguments, extra):
        self.starts.append((name, gx, bx, stream))
        values = [kind(v) for v, kind in zip(*arguments, strict=True)]
        getattr(self.library, f'{name}_on_cpu')(ctypes.c_uint(gx), ctypes.c_uint(2), *values)
        return (0,)


def cpu_device(emulated, monkeypatch):
    "`DeviceKernels` with that driver, for tensors of the CPU."
    monkeypatch.setattr(torch.cuda, 'device', lambda device: contextlib.nullcontext())
    stream = SimpleNamespace(cuda_stream=17)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: stream)
    kernels = cuda.DeviceKernels.__new__(cuda.DeviceKernels)
    kernels.device, kernels.processors = torch.device('cpu'), 1
    kernels._driver, kernels._module, kernels._context = CpuDriver(emulated), None, None
    return kernels


@pytest.mark.process
def test_a_launch_gives_the_kernel_what_it_asks_for(emulated, monkeypatch):
    kernels = cpu_device(emulated, monkeypatch)
    for name, knobs in [KNOBS[3], KNOBS[6], KNOBS[-1]]:
        f = formula(name, **knobs)
        addresses = spread(f, 10)
        images, drawn = kernels.draw(cuda.pack(f, addresses))
        assert drawn.all()
        assert (images.numpy() == np.stack([f.render(*a) for a in addresses])).all()
    names = ['draw_contours', 'draw_plane', 'draw_space']
    assert kernels._driver.starts == [(name, 8, 256, 17) for name in names]


# Threads that run ahead


LAUNCHES = {
    'draw_contours': ('visualatom', dict(size=40, lines_min=3, lines_max=3, vertices_max=210)),
    'draw_plane': ('fractaldb', dict(SMALL_GAME, size=25, points=2000)),
    'draw_space': ('mvfractaldb', dict(size=24, points=300)),
}
BARRIERS = barriers(DRAW_CU)


def small_launch(kernel):
    name, knobs = LAUNCHES[kernel]
    f = formula(name, **knobs)
    return cuda.pack(f, spread(f, 2))


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize('kernel', LAUNCHES)
def test_threads_of_a_block_do_not_race(kernel, tmp_path, emulated):
    assert races(DRAW_CU, small_launch(kernel), tmp_path) == ''


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize('n, kernel', [*enumerate(BARRIERS.values())])
def test_every_barrier_is_missed(n, kernel, tmp_path, emulated):
    mutant = without_barrier(DRAW_CU, n)
    assert 'data race' in races(mutant, small_launch(kernel), tmp_path)

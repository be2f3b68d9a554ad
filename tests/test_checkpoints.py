"""Checkpoints: every layout, every kind of bad file, kills, full disks, and reports."""

import argparse, os, pickle, signal, subprocess, sys
from pathlib import Path
import numpy as np, pytest, safetensors.torch, timm, torch
from timm.utils import CheckpointSaver
import fdsl_nb.models.checkpoints
from helpers import equal
from fdsl_nb.models.checkpoints import (
    CheckpointError,
    export_model,
    load_weights,
    read_checkpoint,
    read_weights,
    save_checkpoint,
)
from fdsl_nb.models.models import create_model, freeze, resize_position_embedding

GOLDEN = Path(__file__).parent / 'golden'
ARCH = 'vit_tiny_patch16_224'


def vit(classes=10, img_size=32, seed=0, **kwargs):
    small = dict(patch_size=8, depth=2, embed_dim=48, num_heads=3)
    return create_model(ARCH, classes, img_size, seed=seed, **small | kwargs)


def save(path, model=None, **kwargs):
    return save_checkpoint(path, model or vit(), **dict(arch=ARCH, epoch=0) | kwargs)


def names(folder):
    return sorted(f.name for f in folder.iterdir())


# Layouts


def timm_file(path, weights):
    args = argparse.Namespace(lr=0.1)
    content = dict(epoch=3, arch=ARCH, state_dict=weights, version=2, args=args, metric=1.0)
    torch.save(content, path)


def model_file(path, weights):
    torch.save(dict(model=weights, optimizer={}, lr_scheduler={}, scaler={}, epoch=80), path)


def trunk_file(path, weights):
    other = {'pos_embed': 'pos_embedding', 'cls_token': 'class_token'}
    trunk = {k: v for k, v in weights.items() if 'head.' not in k}
    for ours, theirs in other.items():
        trunk = {k.replace(ours, theirs): v for k, v in trunk.items()}
    base_model = dict(model=dict(trunk=trunk, heads={}))
    torch.save(dict(phase_idx=1, classy_state_dict=dict(base_model=base_model)), path)


def bare_file(path, weights):
    torch.save(weights, path)


def old_file(path, weights):
    torch.save(weights, path, _use_new_zipfile_serialization=False)


def safetensors_file(path, weights):
    safetensors.torch.save_file(weights, path)


FILES = [
    ('timm', 'last.pth.tar', timm_file),
    ('model', 'tiny_080ep.pth', model_file),
    ('VISSL trunk', 'trunk.torch', trunk_file),
    ('weights', 'bare.pth', bare_file),
    ('weights', 'old.pth', old_file),
    ('weights', 'model.safetensors', safetensors_file),
]


@pytest.mark.parametrize('wrapper', ['', 'module.', '_orig_mod.', 'module._orig_mod.'])
@pytest.mark.parametrize('layout, name, write', FILES, ids=[f[1] for f in FILES])
def test_every_layout_loads(tmp_path, layout, name, write, wrapper):
    source, target = vit(seed=0), vit(seed=1)
    write(tmp_path / name, {wrapper + k: v for k, v in source.state_dict().items()})
    report = load_weights(target, tmp_path / name)
    assert (report.layout, report.unexpected, report.resized) == (layout, (), ())
    skipped = 2 if layout == 'VISSL trunk' else 0  # a trunk has no head
    assert (report.loaded, len(report.missing)) == (len(source.state_dict()) - skipped, skipped)

    def body(model):
        return {
            k: v for k, v in model.state_dict().items() if not (skipped and k.startswith('head.'))
        }

    assert equal(body(source), body(target))


def test_layout_of_timm_itself(tmp_path):
    model = vit()
    saver = CheckpointSaver(
        model,
        torch.optim.AdamW(model.parameters()),
        args=argparse.Namespace(model=ARCH, lr=0.1),
        checkpoint_dir=str(tmp_path),
    )
    saver.save_checkpoint(4, metric=70.0)
    target = vit(seed=1)
    assert load_weights(target, tmp_path / 'last.pth.tar').layout == 'timm'
    assert equal(model.state_dict(), target.state_dict())


def test_timm_resumes_from_ours(tmp_path):
    model, target = vit(), vit(seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    other = torch.optim.AdamW(target.parameters(), lr=1.0)
    model(torch.ones(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    path = save(
        tmp_path / 'new' / 'last.pth.tar',
        model,
        epoch=6,
        optimizer=optimizer,
        metric=71,
        args=dict(lr=1e-3, data=tmp_path, sizes=(1, 2)),
        ema=vit(seed=2),
        extra=dict(amp_scaler=dict(scale=65536.0), step=17),
    )
    assert timm.models.resume_checkpoint(target, str(path), other, log_info=False) == 7
    assert equal(model.state_dict(), target.state_dict())
    assert other.param_groups[0]['lr'] == 1e-3
    states = [o.state_dict()['state'][0]['exp_avg'] for o in (optimizer, other)]
    assert torch.equal(*states)
    content = read_checkpoint(path)
    assert content['args'] == argparse.Namespace(
        model=ARCH, lr=1e-3, data=str(tmp_path), sizes=[1, 2]
    )
    expected = dict(version=2, arch=ARCH, metric=71.0, amp_scaler=dict(scale=65536.0), step=17)
    assert {name: content[name] for name in expected} == expected


def test_averaged_weights_on_request(tmp_path):
    path = save(tmp_path / 'last.pth.tar', vit(seed=0), ema=vit(seed=2))
    assert equal(read_weights(path)[1], vit(seed=0).state_dict())
    assert equal(read_weights(path, use_ema=True)[1], vit(seed=2).state_dict())
    with pytest.raises(CheckpointError, match='no averaged weights'):
        read_weights(save(tmp_path / 'plain.pth.tar'), use_ema=True)


def test_wrapped_models_are_saved_and_loaded_bare(tmp_path):
    wrapped = torch.nn.Module()
    wrapped.module = vit()
    path = save(tmp_path / 'last.pth.tar', wrapped, ema=wrapped)
    for entry in ('state_dict', 'state_dict_ema'):
        assert equal(read_checkpoint(path)[entry], vit().state_dict())
    wrapped.module = vit(seed=1)
    load_weights(wrapped, path)
    assert equal(wrapped.module.state_dict(), vit().state_dict())


def test_hub_addresses_go_to_timm(monkeypatch):
    asked = []
    monkeypatch.setattr(
        fdsl_nb.models.checkpoints,
        'load_state_dict_from_hf',
        lambda where, weights_only: asked.append((where, weights_only)) or vit().state_dict(),
    )
    assert load_weights(vit(seed=1), 'hf-hub:someone/model').layout == 'hf-hub'
    assert asked == [('someone/model', True)]

    def offline(where, weights_only):
        raise OSError('no network')

    monkeypatch.setattr(fdsl_nb.models.checkpoints, 'load_state_dict_from_hf', offline)
    with pytest.raises(CheckpointError, match='use local-dir:FOLDER'):
        load_weights(vit(), 'hf-hub:someone/model')


def test_old_swin_names(tmp_path):
    "Until 2023 timm's Swin had its downsampling a stage earlier, and another name for its head."

    def make(seed):
        return create_model(
            'swin_tiny_patch4_window7_224',
            5,
            64,
            seed=seed,
            window_size=4,
            embed_dim=24,
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 4, 8),
        )

    source, target = make(0), make(1)

    def old(name):
        for stage in (1, 2, 3):
            name = name.replace(f'layers.{stage}.downsample', f'layers.{stage - 1}.downsample')
        return name.replace('head.fc.', 'head.')

    torch.save(
        dict(state_dict={old(k): v for k, v in source.state_dict().items()}),
        tmp_path / 'swin.pth.tar',
    )
    assert load_weights(target, tmp_path / 'swin.pth.tar', head='keep').missing == ()
    assert equal(source.state_dict(), target.state_dict())


# Bad files


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    'write',
    [
        torch.save,
        lambda x, path: torch.save(x, path, _use_new_zipfile_serialization=False),
        lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2)),
        lambda x, path: path.write_bytes(pickle.dumps(x)),
    ],
    ids=['zip', 'old torch', 'pickle 2', 'pickle'],
)
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize(
    'name', ['last.pth.tar', 'pytorch_model.bin', 'model.safetensors', 'trunk.torch']
)
def test_code_is_not_run(tmp_path, write, name):
    path, ran = tmp_path / name, tmp_path / 'ran'
    write(dict(state_dict=dict(weight=torch.zeros(2)), args=Payload(ran)), path)
    if write is torch.save:
        with open(path, 'rb') as file:
            torch.load(file, weights_only=False)
        assert ran.exists()  # the payload works
        ran.rmdir()
    for read in (
        read_checkpoint,
        lambda path: load_weights(vit(), path),
        lambda path: load_weights(vit(), f'local-dir:{path.parent}'),
    ):
        with pytest.raises(CheckpointError):
            read(path)
        assert not ran.exists()


def test_refused_code_is_named(tmp_path):
    torch.save(dict(args=Payload(tmp_path / 'ran')), tmp_path / 'last.pth.tar')
    with pytest.raises(
        CheckpointError,
        match=r"'last.pth.tar' asks to run or build posix.mkdir, and was not opened",
    ):
        read_checkpoint(tmp_path / 'last.pth.tar')


@pytest.mark.parametrize('share', [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(
    'name, old', [('last.pth.tar', False), ('last.pth.tar', True), ('model.safetensors', False)]
)
def test_truncated_files_are_refused(tmp_path, name, old, share):
    path, weights = tmp_path / name, vit().state_dict()
    if name.endswith('safetensors'):
        safetensors.torch.save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=not old)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=f"'{name}' is (damaged|no checkpoint).* again"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    'content, message',
    [
        (b'', 'is empty'),
        (b'<!DOCTYPE html>', "begins with '<!DOCTYPE html>'"),
        (b'version https://git-lfs.github.com/spec/v1\n', 'Git LFS pointer'),
        (b'\xff\xd8\xff\xe0 a picture', 'is no checkpoint'),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / 'last.pth.tar').write_bytes(content)
    with pytest.raises(CheckpointError, match=f"'last.pth.tar' .*{message}"):
        read_checkpoint(tmp_path / 'last.pth.tar')


def test_other_contents_are_refused(tmp_path):
    path = tmp_path / 'other.pth'
    torch.save([torch.zeros(1)], path)
    with pytest.raises(CheckpointError, match='holds a list'):
        read_checkpoint(path)
    for content in (
        {},
        dict(net=dict(a=torch.zeros(1))),
        dict(state_dict={}),
        dict(classy_state_dict=3),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match='none of the layouts'):
            read_weights(path)


def test_missing_files_name_the_nearest(tmp_path):
    save(tmp_path / 'model_best.pth.tar')
    (tmp_path / 'notes.txt').write_text('not a candidate')
    with pytest.raises(FileNotFoundError, match="did you mean 'model_best.pth.tar'"):
        read_checkpoint(tmp_path / 'modelbest.pth.tar')
    with pytest.raises(FileNotFoundError, match="known: model_best.pth.tar"):
        read_checkpoint(tmp_path / 'x')
    with pytest.raises(FileNotFoundError, match='no folder'):
        read_checkpoint(tmp_path / 'nowhere' / 'last.pth.tar')
    (tmp_path / 'bare').mkdir()
    with pytest.raises(FileNotFoundError, match='nor any other'):
        read_checkpoint(tmp_path / 'bare' / 'last.pth.tar')
    with pytest.raises(CheckpointError, match='is a folder'):
        read_checkpoint(tmp_path)


# Completely or not at all


def test_failures_leave_the_earlier_file(tmp_path, monkeypatch):
    path = save(tmp_path / 'last.pth.tar', epoch=1)
    before = path.read_bytes()

    def fails(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    def stops(*args, **kwargs):
        raise KeyboardInterrupt

    for target, fault, error in [
        ('os.replace', fails, OSError),
        ('os.fsync', fails, OSError),
        ('torch.save', fails, OSError),
        ('torch.save', stops, KeyboardInterrupt),
    ]:
        with monkeypatch.context() as patch, pytest.raises(error) as e:
            patch.setattr(target, fault)
            save(path, epoch=2)
        if error is OSError:
            assert 'last.pth.tar was not written' in str(e.value)
            assert 'No space left' in str(e.value)
        assert path.read_bytes() == before and names(tmp_path) == ['last.pth.tar']


def test_unsafe_entries_are_not_written(tmp_path):
    path = save(tmp_path / 'last.pth.tar', epoch=1)
    for value in (np.zeros(2), np.float64(1), Payload(tmp_path / 'ran'), Path('data')):
        with pytest.raises(TypeError, match='no safe reader opens'):
            save(path, epoch=2, extra=dict(value=value))
    with pytest.raises(ValueError, match="'epoch'"):
        save(path, extra=dict(epoch=3))
    assert read_checkpoint(path)['epoch'] == 1 and names(tmp_path) == ['last.pth.tar']


WRITER = """
import resource, signal, sys
from fdsl_nb.models.checkpoints import save_checkpoint
from fdsl_nb.models.models import create_model
path, fault = sys.argv[1:]
small = dict(patch_size=8, depth=2, embed_dim=48, num_heads=3)
model = create_model('vit_tiny_patch16_224', 10, 32, **small)
if fault == 'full disk':
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
else:
    import os, torch
    save = torch.save
    def killed(content, file):
        file.write(b'half'); file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save = killed
save_checkpoint(path, model, arch='vit_tiny_patch16_224', epoch=2)
"""


def writer(path, fault):
    return subprocess.run(
        [sys.executable, '-c', WRITER, str(path), fault],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )


@pytest.mark.process
def test_full_disk(tmp_path):
    path = save(tmp_path / 'last.pth.tar', epoch=1)
    done = writer(path, 'full disk')
    assert done.returncode == 1, done.stderr
    assert 'OSError: last.pth.tar was not written' in done.stderr
    assert read_checkpoint(path)['epoch'] == 1 and names(tmp_path) == ['last.pth.tar']


@pytest.mark.process
def test_killed_while_writing(tmp_path):
    path = save(tmp_path / 'last.pth.tar', epoch=1)
    (tmp_path / '.last.pth.tar.keep-me').touch()
    assert writer(path, 'kill').returncode == -signal.SIGKILL
    assert read_checkpoint(path)['epoch'] == 1
    assert len(names(tmp_path)) == 3  # the killed process could not clean up, the next save does
    save(path, epoch=2)
    assert names(tmp_path) == ['.last.pth.tar.keep-me', 'last.pth.tar']


# Reports


def test_head_by_class_count(tmp_path):
    path = save(tmp_path / 'last.pth.tar', vit(classes=21))
    target = vit(classes=5, seed=1)
    fresh = target.head.weight.clone()
    report = load_weights(target, path)
    assert (report.head, report.missing) == (
        '21 classes in the file, 5 in the model, fresh',
        ('head.weight', 'head.bias'),
    )
    assert torch.equal(target.head.weight, fresh)
    assert torch.equal(target.cls_token, vit(classes=21).cls_token)
    assert load_weights(vit(classes=0), path).head == '21 classes in the file, the model has none'
    with pytest.raises(
        CheckpointError, match="21 classes in the file and 5 in the model; use 'auto'"
    ):
        load_weights(target, path, head='keep')


@pytest.mark.parametrize('classes', [10, 5])
def test_head_zeroed_or_new(tmp_path, classes):
    path, target = save(tmp_path / 'last.pth.tar'), vit(classes, seed=1)
    fresh = target.head.weight.clone()
    assert load_weights(target, path, head='new').head.endswith('fresh')
    assert torch.equal(target.head.weight, fresh)
    assert load_weights(target, path, head='zero').head.endswith('zeroed')
    assert not target(torch.randn(2, 3, 32, 32)).any()


@pytest.mark.parametrize('mode', ['bicubic', 'bilinear', 'bilinear_corners'])
def test_position_embedding_is_resized(tmp_path, mode):
    path, target = save(tmp_path / 'last.pth.tar'), vit(img_size=48, seed=1)
    report = load_weights(target, path, resize=mode)
    assert report.resized == (('position embedding', (4, 4), (6, 6)),)
    assert 'position embedding: 4×4 → 6×6' in repr(report)
    expected = resize_position_embedding(vit().pos_embed, (4, 4), (6, 6), mode)
    assert torch.equal(target.pos_embed, expected)


def test_patch_kernel_is_resized_and_reported(tmp_path):
    report = load_weights(vit(img_size=64, patch_size=16), save(tmp_path / 'last.pth.tar'))
    assert report.resized == (('patch_embed.proj.weight', (48, 3, 8, 8), (48, 3, 16, 16)),)


def test_misfits_change_nothing(tmp_path):
    path = save(tmp_path / 'last.pth.tar')
    small = dict(patch_size=8, depth=2, embed_dim=48, num_heads=3)
    distilled = create_model('deit_tiny_distilled_patch16_224', 10, 48, **small)
    width = r'cls_token: \(1, 1, 48\) in the file, \(1, 1, 24\) in the model'
    for target, message in [
        (vit(depth=3, seed=1), 'blocks.2.norm1.weight: not in the file.* partial=True'),
        (vit(depth=1, seed=1), 'blocks.1.norm1.weight: not in the model'),
        (vit(embed_dim=24, seed=1), width),
        (create_model('resnet18', 10), 'conv1.weight: not in the file'),
        (distilled, 'no square grid'),
    ]:
        before = {k: v.clone() for k, v in target.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            load_weights(target, path, head='zero')
        assert equal(before, target.state_dict())
    with pytest.raises(CheckpointError, match='no name in common'):
        load_weights(create_model('resnet18', 10), path, partial=True)


def test_partial_reports_what_is_left(tmp_path):
    path = save(tmp_path / 'last.pth.tar')
    report = load_weights(vit(depth=1), path, partial=True)
    assert (len(report.unexpected), report.missing) == (12, ())
    assert report.loaded == len(vit(depth=1).state_dict())
    assert len(load_weights(vit(depth=3), path, partial=True).missing) == 12
    with pytest.raises(CheckpointError, match=r'\(1, 1, 48\) in the file'):
        load_weights(vit(embed_dim=24), path, partial=True)


def test_frozen_batch_norm_goes_back_into_a_free_network(tmp_path):
    frozen = create_model('resnet18', 10, seed=0)
    freeze(frozen, 'bn1*', 'layer*')
    save(tmp_path / 'last.pth.tar', frozen, arch='resnet18')
    free = create_model('resnet18', 10, seed=1)
    missing = load_weights(free, tmp_path / 'last.pth.tar').missing
    assert all(name.endswith('num_batches_tracked') for name in missing)
    assert torch.equal(free.conv1.weight, frozen.conv1.weight)


# Exported models, and the published way to resize


def test_exported_models_are_rebuilt_by_timm(tmp_path):
    model = vit(classes=3).eval()
    folder = export_model(
        tmp_path / 'gift',
        model,
        ARCH,
        license='mit',
        description='Three classes.',
        label_names=['a', 'b', 'c'],
        data_config=dict(mean=(0.25,) * 3, std=(0.25,) * 3),
    )
    assert names(folder) == ['README.md', 'config.json', 'model.safetensors']
    card = (folder / 'README.md').read_text()
    assert 'license: mit' in card and 'Three classes.' in card and str(tmp_path) not in card
    again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), model(images))
    assert list(again.pretrained_cfg['mean']) == [0.25] * 3
    assert again.pretrained_cfg['label_names'] == ['a', 'b', 'c']
    larger = create_model(f'local-dir:{folder}', 5, 48)
    assert load_weights(larger, f'local-dir:{folder}').resized == (
        ('position embedding', (4, 4), (6, 6)),
    )


def test_a_model_in_another_memory_order_is_exported(tmp_path):
    model = create_model('resnet18', 3, channels=(8, 16, 16, 32), seed=0)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    export_model(tmp_path, model.to(memory_format=torch.channels_last))
    assert equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).state_dict(), weights)


def test_exports_say_the_truth(tmp_path):
    with pytest.raises(ValueError, match='2 label_names for 10 classes'):
        export_model(tmp_path, vit(), label_names=['a', 'b'])
    with pytest.raises(ValueError, match="made as 'vit_tiny_patch16_224'"):
        export_model(tmp_path, vit(), 'resnet50')
    with pytest.raises(ValueError, match='was not made by timm'):
        export_model(tmp_path, torch.nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match='is it a folder with model.safetensors'):
        load_weights(vit(), f'local-dir:{tmp_path}')


def test_corners_are_what_vit_pytorch_does():
    golden = np.load(GOLDEN / 'vit_pytorch_positions.npz')
    trained = torch.tensor(golden['grid4'])

    def resized(mode):
        return resize_position_embedding(trained, (4, 4), (6, 6), mode).numpy()

    np.testing.assert_allclose(resized('bilinear_corners'), golden['grid6'], atol=1e-6)
    for mode in ('bicubic', 'bilinear'):
        assert abs(resized(mode) - golden['grid6']).max() > 0.01

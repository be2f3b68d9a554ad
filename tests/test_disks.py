"""Disks that are full, can only be read, or have lost a folder.

The error names the path and the remedy, what was there before is there afterwards, and once the
cause is gone the same goes on to the same end.
"""

import errno
import json
import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest
import torch
from training_helpers import resolved, values, watching

from fastai.callback.core import Callback

from fdsl_nb.build.build import build
from fdsl_nb.core import folder as records
from fdsl_nb.core.folder import (
    RunFolder,
    add_epoch,
    append_text,
    atomic_write,
    locked,
    log_event,
    note_files,
    noted_files,
    read_summary,
    remove_leftovers,
)
from fdsl_nb.formulas.contours import VisualAtom
from fdsl_nb.models.checkpoints import read_checkpoint
from fdsl_nb.training.saving import same_file
from fdsl_nb.training.training import run_training

FAULTS = {
    errno.ENOSPC: 'the disk is full: make room',
    errno.EDQUOT: 'the quota is used up: make room',
    errno.EROFS: 'the disk can only be read',
    errno.EACCES: 'it may not be written: change its rights',
}


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())


def fail_with(fault):
    def failing(*_, **__):
        raise OSError(fault, os.strerror(fault))

    return failing


@pytest.mark.parametrize('fault', FAULTS)
@pytest.mark.parametrize('call', ('fsync', 'replace'))
def test_a_file_that_cannot_be_written_is_named_and_stays(tmp_path, monkeypatch, fault, call):
    path = tmp_path / 'note.txt'
    path.write_text('before')
    monkeypatch.setattr(records.os, call, fail_with(fault))
    with pytest.raises(OSError) as failed, atomic_write(path, 'w') as f:
        f.write('after')
    assert failed.value.errno == fault and failed.value.filename == str(path)
    assert FAULTS[fault] in str(failed.value) and os.strerror(fault) in str(failed.value)
    assert path.read_text() == 'before' and names(tmp_path) == ['note.txt']


def test_the_error_of_another_file_is_left_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError) as failed, atomic_write(tmp_path / 'note.txt'):
        (tmp_path / "missing.png").read_bytes()
    assert str(failed.value).endswith(f"No such file or directory: '{tmp_path}/missing.png'")
    assert 'put it back' not in str(failed.value)


@contextmanager
def full_after(monkeypatch, space):
    "In the block `os.write` takes so many bytes, and no more."
    left, write = [space], os.write

    def writing(handle, data):
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(handle, data[: left[0]])
        left[0] -= done
        return done

    with monkeypatch.context() as m:
        m.setattr(records.os, 'write', writing)
        yield


@pytest.mark.parametrize('space', (0, 1, 7))
def test_lines_are_added_whole_or_not_at_all(tmp_path, monkeypatch, space):
    run = RunFolder(tmp_path)
    rows = [dict(epoch=n, train_loss=2.5, lr=0.1) for n in range(3)]
    add_epoch(run, rows[0])
    log_event(run, 'start')
    before = {name: run.file(name).read_bytes() for name in names(tmp_path)}
    for write in (
        lambda: add_epoch(run, rows[1]),
        lambda: log_event(run, 'epoch'),
        lambda: note_files(run, ['curve.png']),
    ):
        with full_after(monkeypatch, space):
            with pytest.raises(OSError, match='the disk is full: make room'):
                write()
        assert {name: run.file(name).read_bytes() for name in names(tmp_path)} == before
    add_epoch(run, rows[1])
    assert [r['epoch'] for r in read_summary(run)] == [0, 1]


def test_a_line_that_a_kill_cut_short_spoils_no_other(tmp_path):
    run = RunFolder(tmp_path)
    note_files(run, ['a.png'])
    with open(run.file('files.txt'), 'a') as f:
        f.write('last.pth')
    run = RunFolder(tmp_path)
    note_files(run, ['last.pth.tar'])
    assert {'a.png', 'last.pth.tar'} <= noted_files(RunFolder(tmp_path))
    append_text(tmp_path / 'log.jsonl', '{"event": 1}\n')
    assert json.loads((tmp_path / 'log.jsonl').read_text())['event'] == 1


def test_a_folder_that_was_removed_is_not_made_again(tmp_path):
    "Its records would be in two places, if it was moved."
    run = RunFolder(tmp_path / 'run')
    log_event(run, 'start')
    run.path.rename(tmp_path / 'moved')
    for write in (
        lambda: log_event(run, 'epoch'),
        lambda: add_epoch(run, dict(epoch=0)),
        lambda: run.output('new.png'),
    ):
        with pytest.raises(
            FileNotFoundError, match='its folder is gone, or was moved.*put it back'
        ):
            write()
    assert not run.path.exists()
    (tmp_path / 'moved').rename(run.path)
    add_epoch(run, dict(epoch=0, train_loss=1.0))
    assert names(run.path) == ['files.txt', 'log.jsonl', 'summary.csv']


@pytest.mark.parametrize('place', ('run', 'run/deeper'))
def test_a_file_where_a_folder_should_be(tmp_path, place):
    (tmp_path / 'run').write_text('mine')
    with pytest.raises(OSError, match='a file stands where a folder should be: move it away'):
        locked(tmp_path / place).__enter__()
    assert (tmp_path / 'run').read_text() == 'mine'


def test_leftovers_of_noted_files_go_and_no_others(tmp_path):
    run = RunFolder(tmp_path / 'run')
    note_files(run, ['last.pth.tar', 'model/model.safetensors'])
    (run.path / 'model').mkdir()
    mine = ['.last.pth.tar.a1b2c3d4', 'model/.model.safetensors.a1b2c3d4', '.files.txt.a1b2c3d4']
    theirs = [
        '.notes.txt.a1b2c3d4',
        '.gitignore',
        'model/.last.pth.tar.a1b2c3d4',
        '../.last.pth.tar',
    ]
    for name in (*mine, *theirs):
        (run.path / name).write_text('half')
    remove_leftovers(run)
    assert [n for n in mine if (run.path / n).exists()] == [mine[2]]
    assert [n for n in theirs if not (run.path / n).exists()] == []


def test_no_name_in_the_list_leads_outside(tmp_path, monkeypatch):
    "`files.txt` may be from somebody else."
    run = RunFolder(tmp_path / 'run')
    note_files(run, ['../mine/last.pth.tar'])
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / '.last.pth.tar.a1b2c3d4').write_text('half')
    for name in ('rmtree',):
        monkeypatch.setattr(records.shutil, name, fail_with(errno.EPERM))
    with pytest.raises(ValueError, match='leads out of its folder'):
        remove_leftovers(run)
    assert (tmp_path / 'mine' / '.last.pth.tar.a1b2c3d4').exists()


def test_another_name_for_a_checkpoint_is_whole_or_the_old_one(tmp_path, monkeypatch):
    for name, text in (('last.pth.tar', 'new'), ('model_best.pth.tar', 'old')):
        (tmp_path / name).write_text(text)
    with monkeypatch.context() as m:
        m.setattr(os, 'link', fail_with(errno.EPERM))

        def half(source, target):
            target.write_text('n')
            fail_with(errno.ENOSPC)()

        m.setattr(shutil, 'copyfile', half)
        with pytest.raises(OSError, match='the disk is full.*model_best.pth.tar'):
            same_file(tmp_path / 'last.pth.tar', tmp_path / 'model_best.pth.tar')
    assert names(tmp_path) == ['last.pth.tar', 'model_best.pth.tar']
    assert (tmp_path / 'model_best.pth.tar').read_text() == 'old'
    same_file(tmp_path / 'last.pth.tar', tmp_path / 'model_best.pth.tar')
    assert (tmp_path / 'model_best.pth.tar').read_text() == 'new'


# Whole runs


class At(Callback):
    "Calls a function before a step."

    order = 55

    def __init__(self, step, act):
        self.step, self.act = step, act

    def before_batch(self):
        if self.learn.training and self.learn.steps_done == self.step:
            self.act()


GIVEN = dict(epochs=4, batch_size=8, workers=0, save_every=1, recovery_interval=2, save_images=True)


def go(folder, *callbacks):
    with watching(*callbacks):
        return run_training(resolved(values(folder, **GIVEN)))


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole') / 'run'
    go(folder)
    return folder


def assert_same_end(run, whole):
    one, other = (read_checkpoint(f / 'last.pth.tar')['state_dict'] for f in (run, whole))
    assert [k for k in one if not torch.equal(one[k], other[k])] == []
    assert (run / 'summary.csv').read_bytes() == (whole / 'summary.csv').read_bytes()
    assert names(run) == names(whole) and RunFolder(run).state == 'done'


@pytest.mark.parametrize('name', ('last.pth.tar', 'summary.csv', 'recovery-1', 'result.json'))
def test_a_run_on_a_full_disk_goes_on_when_there_is_room(tmp_path, monkeypatch, whole, name):
    run, atomic, append = tmp_path / 'run', records.atomic_write, records.append_text
    failed = []

    def is_full(path):
        late = RunFolder(run).file('last.pth.tar').exists() or name == 'recovery-1'
        failed.append(late and path.name.startswith(name))
        return failed[-1]

    @contextmanager
    def writing(path, mode='wb'):
        with atomic(path, mode) as f:
            yield f
            if is_full(path):
                with records.named_errors(path):
                    fail_with(errno.ENOSPC)()

    def appending(path, text):
        if is_full(path):
            with records.named_errors(path):
                fail_with(errno.ENOSPC)()
        append(path, text)

    with monkeypatch.context() as m:
        m.setattr(records, 'append_text', appending)
        for module in ('core.folder', 'models.serialization', 'training.training'):
            m.setattr(f'fdsl_nb.{module}.atomic_write', writing)
        with pytest.raises(OSError, match=f'(?s){name}.*|the disk is full.*{name}') as said:
            go(run)
    assert 'the disk is full: make room' in str(said.value) and str(run) in str(said.value)
    status = RunFolder(run).status
    assert status['state'] == 'failed' and 'the disk is full' in status['reason']
    assert not list(run.glob('.*'))
    go(run)
    assert_same_end(run, whole)


def test_a_run_whose_folder_is_moved_ends_and_goes_on(tmp_path, whole):
    run, away = tmp_path / 'run', tmp_path / 'away'
    with pytest.raises(OSError, match='put it back'):
        go(run, At(6, lambda: run.rename(away)))
    assert not run.exists()
    away.rename(run)
    go(run)
    assert_same_end(run, whole)


# Small disks that are really full


@pytest.fixture
def disk(tmp_path):
    "An empty disk of a megabyte."
    at = tmp_path / 'disk'
    at.mkdir()
    words = ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', at]
    if subprocess.run(words, check=False, capture_output=True).returncode:
        pytest.skip('a small disk cannot be mounted here, which takes root')
    try:
        yield at
    finally:
        subprocess.run(['umount', '--lazy', at], check=True)


def fill(disk, but):
    "Leaves `but` bytes, in pages of 4096."
    free = shutil.disk_usage(disk).free
    (disk / 'filler').write_bytes(bytes(max(free - but, 0)))


@contextmanager
def only_read(disk):
    "In the block the disk can only be read."
    subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
    try:
        yield
    finally:
        subprocess.run(['mount', '-o', 'remount,rw', disk], check=True)


process = [pytest.mark.process]
slow = [pytest.mark.slow, pytest.mark.process]
ROOMS = (0, 4096, 8192, 24_576, 40_000, 61_440, 90_000, 233_472, 300_000)


@pytest.mark.parametrize(
    'room',
    [pytest.param(140_000, marks=process), *(pytest.param(n, marks=slow) for n in ROOMS)],
)
def test_training_on_a_full_disk(disk, whole, room):
    run = disk / 'run'
    try:
        go(run, At(6, lambda: fill(disk, room)))
        assert room > 200_000
    except OSError as e:
        assert 'the disk is full: make room' in str(e) and str(run) in str(e)
        assert not list(run.glob('.*.????????'))
    (disk / 'filler').unlink()
    go(run)
    assert_same_end(run, whole)


@pytest.mark.process
def test_training_on_a_disk_that_can_only_be_read(disk, whole):
    with pytest.raises(ArithmeticError):
        go(disk / 'run', At(6, lambda: 1 // 0))
    before = contents(disk)
    with only_read(disk), pytest.raises(OSError, match='the disk can only be read') as said:
        go(disk / 'run')
    assert str(disk / 'run') in str(said.value) and contents(disk) == before
    go(disk / 'run')
    assert_same_end(disk / 'run', whole)


def contents(folder):
    return {n: (folder / n).read_bytes() for n in names(folder)}


def make(at, layout, progress=lambda *_, **__: None):
    more = dict(shard_images=8) if layout == 'shards' else {}
    return build(
        VisualAtom(classes=4, instances=16, size=64),
        at / 'out',
        workers=0,
        layout=layout,
        progress=progress,
        **more,
    )


@pytest.fixture(scope='module')
def builds(tmp_path_factory):
    "By layout: the files of a build without disturbance."
    found = {}
    for layout in ('shards', 'plain'):
        at = tmp_path_factory.mktemp(layout)
        make(at, layout)
        found[layout] = contents(at)
    return found


FULL = [pytest.param('shards', 4096, marks=process)] + [
    pytest.param(layout, room, marks=slow)
    for layout in ('shards', 'plain')
    for room in (0, 8192, 12_288, 150_000, 172_032, 250_000)
]


@pytest.mark.parametrize('layout, room', FULL)
def test_a_build_on_a_full_disk(disk, builds, layout, room):
    fill(disk, room)
    with pytest.raises(OSError, match='the disk is full: make room') as said:
        make(disk, layout)
    assert str(disk) in str(said.value) and not list(disk.rglob('.*.????????'))
    (disk / 'filler').unlink()
    make(disk, layout)
    assert contents(disk) == builds[layout]


@pytest.mark.process
@pytest.mark.parametrize('layout', ('shards', 'plain'))
def test_a_build_on_a_disk_that_can_only_be_read(disk, builds, layout):
    "The one that stopped half-way is as it was, and a complete one is answered all the same."
    with only_read(disk), pytest.raises(OSError, match=f'can only be read.*{disk}'):
        make(disk, layout)
    assert not names(disk)

    def stop(done, total, drawn, seconds, part=None):
        assert not drawn, 'stopped'

    with pytest.raises(AssertionError, match='stopped'):
        make(disk, layout, stop)
    before = contents(disk)
    with only_read(disk), pytest.raises(OSError, match=f'can only be read.*{disk}'):
        make(disk, layout)
    assert contents(disk) == before
    whole = make(disk, layout)
    assert contents(disk) == builds[layout]
    with only_read(disk):
        assert make(disk, layout) == whole

"""Killed at any step and started again, a run ends as if nothing had happened.

Every weight, every average and `summary.csv` are the same to the last bit. `test_kills.py` has more
kills, at moments of no choice.
"""

import random
import shutil
import signal
import subprocess

import pytest
import torch
from training_helpers import (
    BASE,
    PowerCut,
    command,
    printed,
    run_ranks,
    start_ranks,
    values,
    wait_ranks,
)

from fdsl_nb.build.build import build
from fdsl_nb.models.checkpoints import read_checkpoint
from fdsl_nb.formulas.contours import VisualAtom
from fdsl_nb.core.folder import RunFolder, read_summary

# Everything that has chance or memory in it: AdamW, averages, mixing, drop path, repeated images,
# images held out, worker processes, recovery every few steps.
ALL_ON = dict(
    aa='rand-m9-mstd0.5-inc1',
    reprob=0.5,
    hflip=0.5,
    scale=(0.3, 1.0),
    ratio=(3 / 4, 4 / 3),
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
    drop_path=0.1,
    clip_grad=1.0,
    model_ema_decay=0.9,
    aug_repeats=3,
    valid_pct=0.25,
    eval_metric='top1',
    warmup_epochs=1,
    workers=2,
    epochs=3,
    batch_size=8,
    checkpoint_hist=2,
    recovery_interval=2,
    model_kwargs=BASE['model_kwargs'] | dict(depth=2),
)
# 48 of 64 images train: 6 steps an epoch, 18 in all
IMAGES = VisualAtom(classes=4, instances=16, size=96, start_range=10, lines_max=20)
STEPS = 18
MOMENTS = ('before_batch', 'after_backward', 'after_batch', 'before_validate')

pytestmark = pytest.mark.process


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    "The same images drawn online, in a folder and in shards: dataset and knobs of each."
    root = tmp_path_factory.mktemp('sources')
    for layout, more in dict(plain={}, shards=dict(shard_images=20)).items():
        build(IMAGES, root / layout, workers=0, progress=lambda *_: None, layout=layout, **more)
    names = 'classes', 'instances', 'size', 'start_range', 'lines_max'
    drawn = {k: getattr(IMAGES, k) for k in names}
    return dict(
        online=dict(dataset='visualatom', knobs=drawn),
        folder=dict(dataset=str(root / 'plain'), knobs={}),
        shards=dict(dataset=str(root / 'shards'), knobs={}),
    )


def moments(seed, kills):
    "(step, event) of each kill, in order; at the end of an epoch it may hit evaluation or saving."
    rng = random.Random(seed)
    chosen = []
    for step in sorted(rng.sample(range(1, STEPS), kills)):
        when = rng.choice(MOMENTS[:3])
        chosen.append((step, 'before_validate' if step % 6 == 0 and rng.random() < 0.5 else when))
    return chosen


def assert_same_end(killed, whole):
    one, other = (read_checkpoint(f / 'last.pth.tar') for f in (killed, whole))
    for entry in ('state_dict', 'state_dict_ema'):
        assert one[entry].keys() == other[entry].keys()
        assert [k for k in one[entry] if not torch.equal(one[entry][k], other[entry][k])] == []
    states = (c['optimizer']['state'].values() for c in (one, other))
    for a, b in zip(*states, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert (killed / 'summary.csv').read_bytes() == (whole / 'summary.csv').read_bytes()
    assert [row['epoch'] for row in read_summary(RunFolder(whole))] == [0, 1, 2]

    def names(f):
        return sorted(p.name for p in f.glob('*.tar'))

    assert names(killed) == names(whole)
    assert (killed / 'result.json').exists() and RunFolder(killed).state == 'done'


def run_cut(folder, given, processes, cuts):
    "Ranks killed at each of `cuts`, then let go on to the end."
    for step, when in cuts:
        ranks = start_ranks(values(folder, **given), processes, (PowerCut, (step, when)))
        codes, missed = wait_ranks(ranks), f'no kill at step {step}, {when}:\n'
        assert codes == [-signal.SIGKILL] * processes, missed + printed(folder)
        assert RunFolder(folder).state == 'interrupted'
    run_ranks(values(folder, **given), processes)


def test_two_kills_of_two_processes_change_nothing(sources, tmp_path):
    given = ALL_ON | sources['online']
    run_ranks(values(tmp_path / 'whole', **given), 2)
    run_cut(tmp_path / 'killed', given, 2, moments(0, 2))
    assert_same_end(tmp_path / 'killed', tmp_path / 'whole')
    assert 'continuing after epoch' in printed(tmp_path / 'killed')


@pytest.mark.parametrize('opt', ('keras_sgd', 'keras_adamw'))
def test_a_kill_changes_nothing_with_kerass_optimizers(opt, sources, tmp_path):
    given = ALL_ON | sources['online'] | dict(opt=opt, lr=1e-3, workers=0)
    given |= dict(filter_bias_and_bn=False, model_ema_warmup=True)
    run_ranks(values(tmp_path / 'whole', **given), 1)
    run_cut(tmp_path / 'killed', given, 1, [(9, 'after_backward')])
    assert_same_end(tmp_path / 'killed', tmp_path / 'whole')
    moved = read_checkpoint(tmp_path / 'killed' / 'last.pth.tar')['optimizer']['state'].values()
    assert all('velocity' in state or 'exp_avg' in state for state in moved)


@pytest.mark.slow
@pytest.mark.parametrize('processes', (1, 2))
def test_kills_of_a_program_and_its_own_processes_change_nothing(processes, sources, tmp_path):
    "A whole Python program that launches its own ranks; all its descendants are killed with it."
    given = ALL_ON | sources['folder'] | dict(processes=processes)

    def run(folder, *callbacks):
        words, environment = command(values(folder, **given), *callbacks)
        return subprocess.run(
            words, check=False, env=environment, capture_output=True, text=True, timeout=300
        )

    assert run(tmp_path / 'whole').returncode == 0
    for step, when in moments(7 + processes, 3):
        assert run(tmp_path / 'killed', ('PowerCut', [step, when])).returncode == -signal.SIGKILL
    assert run(tmp_path / 'killed').returncode == 0
    assert_same_end(tmp_path / 'killed', tmp_path / 'whole')


@pytest.mark.slow
def test_another_number_of_processes_and_workers_may_go_on(sources, tmp_path):
    "Without mixing and drop path, whose chance belongs to a process, the losses agree."
    still = dict(mixup=0.0, cutmix=0.0, drop_path=0.0, opt='sgd', lr=0.05)
    given = ALL_ON | sources['online'] | still
    run_ranks(values(tmp_path / 'whole', **given), 1)
    for processes, workers, cut in (
        (1, 2, (4, 'after_batch')),
        (2, 0, (9, 'after_backward')),
        (1, 0, (15, 'before_batch')),
    ):
        config = values(tmp_path / 'killed', **given | dict(workers=workers))
        wait_ranks(start_ranks(config, processes, (PowerCut, cut)))
    run_ranks(values(tmp_path / 'killed', **given), 2)
    summaries = (read_summary(RunFolder(tmp_path / f)) for f in ('whole', 'killed'))
    for one, other in zip(*summaries, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.slow
def test_the_statistics_of_batch_norm_go_on(sources, tmp_path):
    network = dict(model='resnet18', model_kwargs=dict(channels=(8, 16, 16, 32)), drop_path=0.0)
    given = ALL_ON | sources['online'] | network
    run_ranks(values(tmp_path / 'whole', **given), 2)
    run_cut(tmp_path / 'killed', given, 2, moments(3, 3))
    assert_same_end(tmp_path / 'killed', tmp_path / 'whole')


def test_files_that_a_kill_left_half_written_are_passed_over(sources, tmp_path):
    "A kill in the middle of writing leaves a file with a dot, which is neither read nor kept."
    given = ALL_ON | sources['online'] | dict(workers=0)
    run_ranks(values(tmp_path / 'whole', **given), 1)
    wait_ranks(start_ranks(values(tmp_path / 'killed', **given), 1, (PowerCut, (9, 'after_batch'))))
    for name in (
        '.last.pth.tar.abcd1234',
        '.summary.csv.abcd1234',
        '.recovery-1-2.pth.tar.abcd1234',
    ):
        (tmp_path / 'killed' / name).write_bytes(b'PK\x03\x04 cut')
    run_ranks(values(tmp_path / 'killed', **given), 1)
    assert_same_end(tmp_path / 'killed', tmp_path / 'whole')
    assert not (tmp_path / 'killed' / '.last.pth.tar.abcd1234').exists()
    shutil.rmtree(tmp_path / 'killed')

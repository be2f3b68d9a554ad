"""Training without papermill: every family, worker processes, ranks, and what an epoch holds."""

from collections import Counter
import json

import pytest
import torch
from PIL import Image

from helpers import weights

from fdsl_nb.data.augmentation import Augmentation
from fdsl_nb.data.augment import train_transform
from fdsl_nb.data.loading import EpochBatchSampler, seeded
from fdsl_nb.core.folder import RunFolder
from fdsl_nb.formulas.formula import formula, formulas
from fdsl_nb.app.runs import configuration
from fdsl_nb.core.settings import Resolved
from fdsl_nb.training.training import architecture_of, run_training

pytestmark = pytest.mark.long

SMALL = dict(budget='demo', epochs=1, batch_size=16, warmup_epochs=0, wandb_mode='disabled')
TINY_MODEL = dict(patch_size=8, embed_dim=48, depth=1, num_heads=2)


def run(folder, stage='pretrain', **given):
    config = configuration(stage, SMALL | given, RunFolder(folder))
    return run_training(config | dict(model_kwargs=Resolved(TINY_MODEL, 'test')))


def differing(one, other):
    return [k for k in one if not torch.equal(one[k], other[k])]


@pytest.mark.parametrize('name', [n for n in formulas() if n != 'disks'])
def test_every_formula_trains(name, tmp_path):
    result = run(tmp_path, dataset=name, classes=4, samples_per_epoch=64)
    assert 0 < result['train_loss'] < 3
    assert weights(tmp_path)['head.weight'].shape[0] == 4


@pytest.mark.process
def test_workers_change_nothing(tmp_path):
    given = dict(
        dataset='rcdb',
        classes=4,
        instances=16,
        mixup=0.4,
        reprob=0.5,
        aa='rand-m9-mstd0.5-inc1',
    )
    run(tmp_path / 'alone', **given)
    run(tmp_path / 'helped', workers=2, **given)
    assert differing(weights(tmp_path / 'alone'), weights(tmp_path / 'helped')) == []


def test_the_published_augmentation_runs_at_every_strength():
    image = Image.fromarray(formula('rcdb', size=64).render(0, 0)).convert('RGB')
    transform = train_transform(Augmentation(img_size=32, aa='rand-m10-mstd0-inc1'))
    for seed in range(200):
        with seeded(seed):
            assert transform(image).shape == (3, 32, 32)


def test_another_seed_is_another_run(tmp_path):
    given = dict(dataset='rcdb', classes=4, instances=16)
    run(tmp_path / 'a', **given)
    run(tmp_path / 'b', seed=1, **given)
    assert 'patch_embed.proj.weight' in differing(weights(tmp_path / 'a'), weights(tmp_path / 'b'))


@pytest.mark.parametrize('args', (None, {'model': 'deit_tiny'}, []))
def test_checkpoints_of_other_programs_bring_no_architecture(args, tmp_path):
    torch.save(dict(model={}, args=args), tmp_path / 'other_300ep.pth')
    assert architecture_of(tmp_path / 'other_300ep.pth') == {}
    assert architecture_of('local-dir:exported') == {}


@pytest.mark.process
def test_two_processes_measure_every_image_once(tmp_path):
    result = run(tmp_path, 'finetune', dataset='digits', batch_size=160, processes=2)
    assert result['images'] == 800 and sum(map(sum, result['confusion'])) == 800
    log = (tmp_path / 'log.jsonl').read_text().splitlines()
    assert [json.loads(line)['processes'] for line in log if 'start' in line] == [2]


@pytest.mark.parametrize('world_size', (1, 2, 4))
@pytest.mark.parametrize('repeats, images', ((1, None), (3, None), (1, 240), (3, 240)))
def test_an_epoch_holds_each_draw_once(world_size, repeats, images):
    parts = [
        EpochBatchSampler(96, 8, rank=r, world_size=world_size, repeats=repeats, images=images)
        for r in range(world_size)
    ]
    draws = [d for part in parts for batch in part for d in batch]
    assert len(draws) == len(set(draws)) == (images or 96)
    whole = {d for batch in EpochBatchSampler(96, 8, repeats=repeats, images=images) for d in batch}
    assert set(draws) == whole
    appearances = Counter(d.index for d in draws).values()
    passes = -(-(images or 96) // (96 * repeats))  # begun in this epoch
    assert max(appearances) <= repeats * passes
    if repeats == 1:
        assert min(appearances) == max(1, (images or 96) // 96)


def test_a_loss_that_is_no_number_is_a_failed_run(tmp_path):
    with pytest.raises(FloatingPointError, match='lower lr'):
        run(tmp_path, dataset='rcdb', classes=4, instances=16, opt='sgd', lr=1e38)
    status = RunFolder(tmp_path).status
    assert status['state'] == 'failed' and 'loss=' in status['reason']
    assert not (tmp_path / 'last.pth.tar').exists()

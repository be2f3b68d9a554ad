"""Multi-label pre-training from img2dataset's shards, with papermill: one process and two."""

import json

import numpy as np
import pytest

from fdsl_nb.data.coyo import example_rows, write_shards
from fdsl_nb.core.folder import RunFolder, read_summary
from fdsl_nb.app.runs import configuration
from fdsl_nb.core.settings import Resolved
from fdsl_nb.training.training import run_training

TINY = dict(patch_size=8, embed_dim=48, depth=1, num_heads=2)


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp('coyo')
    for split, n in (('train', 96), ('val', 41)):
        write_shards(root / split, example_rows(n, np.random.default_rng(0), split))
    return root


def train(folder, shards, **given):
    knobs = dict(classes=10, threshold=0.1)
    given = (
        dict(
            dataset='coyo',
            data_dir=str(shards),
            knobs=knobs,
            epochs=2,
            samples_per_epoch=64,
            batch_size=16,
            warmup_epochs=0,
            wandb_mode='disabled',
        )
        | given
    )
    config = configuration('pretrain', given, RunFolder(folder))
    return run_training(config | dict(model_kwargs=Resolved(TINY, 'test')))


@pytest.mark.process
def test_one_process_and_two_measure_every_image(shards, tmp_path):
    alone, two = train(tmp_path / '1', shards), train(tmp_path / '2', shards, processes=2)
    assert alone['images'] == two['images'] == 41 and alone['split'] == 'val'
    assert alone['train_loss'] == pytest.approx(two['train_loss'], rel=1e-3)
    rows = read_summary(RunFolder(tmp_path / '1'))
    assert {'eval_micro_f1', 'eval_macro_f1', 'eval_auc', 'eval_top1'} <= rows[-1].keys() and rows[
        -1
    ]['train_loss'] < rows[0]['train_loss']
    json.dumps(alone)


def test_a_loss_for_one_label_is_refused(shards, tmp_path):
    with pytest.raises(ValueError, match='set loss=bce'):
        train(tmp_path, shards, options=dict(loss='cross_entropy'))

"""ViT-pytorch's fine-tuning as a run.

Google's weights, a zeroed head, a length in steps, its own schedule and dropout.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdsl_nb.models.checkpoints import read_checkpoint
from fdsl_nb.core.folder import RunFolder, read_summary
from fdsl_nb.app.runs import configuration
from fdsl_nb.training.plan import run_config
from fdsl_nb.training.training import make_model, run_training

NPZ = Path(__file__).parent / 'golden' / 'google_vit_tiny.npz'
MODEL = dict(
    model='vit_base_patch16_224',
    img_size=64,
    options=dict(model_kwargs=dict(embed_dim=64, depth=2, num_heads=4, mlp_ratio=2.0)),
)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for split, n in (('train', 40), ('test', 7)):
        for c, colour in enumerate(((200, 60, 60), (60, 60, 200))):
            (root / split / f'c{c}').mkdir(parents=True)
            for k in range(n):
                noise = rng.integers(-60, 60, (32, 32, 3))
                pixels = np.uint8(np.clip(noise + colour, 0, 255))
                Image.fromarray(pixels).save(root / split / f'c{c}' / f'{k}.png')
    return root


def config(folder, pictures, **given):
    asked = dict(
        recipe='vitpytorch_cifar10_b16',
        dataset='cifar10',
        data_dir=str(pictures),
        weights=str(NPZ),
        wandb_mode='disabled',
        **MODEL,
    )
    return configuration('finetune', asked | given, RunFolder(folder))


def test_the_published_recipe_in_steps_from_googles_weights(pictures, tmp_path):
    options = MODEL['options'] | dict(max_steps=6, eval_every=2, warmup_steps=2)
    asked = config(tmp_path, pictures, budget='paper', batch_size=16, options=options)
    result = run_training(asked)
    rows = read_summary(RunFolder(tmp_path))
    assert [r['epoch'] for r in rows] == [0, 1, 2]
    assert result['images'] == 14 and result['split'] == 'test'
    # updates 2, 4 and 6 of the published schedule: warm-up over 2 steps, then a cosine to 0
    assert [r['lr'] for r in rows] == pytest.approx([0.03, 0.015, 0.0], abs=1e-12)
    saved = read_checkpoint(tmp_path / 'last.pth.tar')
    assert saved['state_dict']['head.weight'].shape == (2, 64)


def test_a_run_starts_with_a_zeroed_head_and_the_published_dropout(pictures, tmp_path):
    values = {k: v.value for k, v in config(tmp_path, pictures, budget='paper').items()}
    model, loaded = make_model(run_config(values), 2)
    assert not model.head.weight.any() and 'zeroed' in loaded.head
    block = model.blocks[0]
    assert (block.mlp.drop1.p, block.attn.proj_drop.p, model.pos_drop.p) == (0.1, 0, 0.1)
    assert run_config(values).epochs == 100


def test_a_budget_of_minutes_keeps_weights_and_data(pictures, tmp_path):
    result = run_training(config(tmp_path, pictures, epochs=1, batch_size=16))
    assert result['images'] == 14

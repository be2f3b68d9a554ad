"""Checkpoints that somebody names, of other programs and of other runs."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from training_helpers import TINY, trained

from fdsl_nb.core.folder import RunFolder, read_summary
from fdsl_nb.models.checkpoints import CheckpointError, load_weights, read_checkpoint, read_weights
from fdsl_nb.models.models import create_model
from fdsl_nb.training.saving import epochs_done
from fdsl_nb.training.training import architecture_of
from fdsl_nb.training.validation import brought

pytestmark = pytest.mark.long


def small(classes=4):
    return create_model('deit_tiny_patch16_224', classes, 32, seed=0, **TINY)


def rates(folder):
    return [row['lr'] for row in read_summary(RunFolder(folder))]


def epochs(folder):
    return [row['epoch'] for row in read_summary(RunFolder(folder))]


def equal(one, other):
    return all(torch.equal(one[k], other[k]) for k in one)


def written(path, **changes):
    "A checkpoint of ours, changed into what another program writes; None removes an entry."
    saved = dict(read_checkpoint(path)) | changes
    torch.save({k: v for k, v in saved.items() if v is not None}, path.with_name('theirs.pth.tar'))
    return path.with_name('theirs.pth.tar')


# A file that names its network


@pytest.mark.parametrize(
    'name, content, expected',
    [
        (
            'last.pth.tar',
            dict(arch='deit_base_patch16_224', state_dict={}),
            'deit_base_patch16_224',
        ),
        ('last.pth.tar', dict(arch='vit_deit_tiny_patch16_224'), 'vit_deit_tiny_patch16_224'),
        ('last.pth.tar', dict(arch='no_such_network'), None),
        ('last.pth.tar', dict(arch='hf-hub:someone/else'), None),
        ('last.pth.tar', dict(arch=['resnet50']), None),
        ('vit_tiny_patch16_224_2d-ofdb-1k_80000ep.pth', dict(model={}), 'vit_tiny_patch16_224'),
        ('resnet50_CIFAR10_010ep.pth', dict(model={}), 'resnet50'),
        ('mine_CIFAR10_010ep.pth', dict(model={}), None),
        ('resnet50_CIFAR10.pth', dict(model={}), None),
    ],
)
def test_a_checkpoint_names_its_network(name, content, expected, tmp_path):
    torch.save(content, tmp_path / name)
    found = dict(model=expected, model_kwargs={}) if expected else {}
    assert architecture_of(tmp_path / name) == found
    assert brought(str(tmp_path / name)) == found


def test_an_exported_folder_names_its_network(tmp_path):
    config = dict(architecture='deit_tiny_patch16_224', model_args=TINY | dict(img_size=32))
    (tmp_path / 'config.json').write_text(json.dumps(config))
    found = architecture_of(f'local-dir:{tmp_path}')
    assert found == dict(model='deit_tiny_patch16_224', model_kwargs=TINY, img_size=32)
    config['model_args'] = dict(checkpoint_path='a.pth')  # loads another file
    (tmp_path / 'config.json').write_text(json.dumps(config))
    assert architecture_of(f'local-dir:{tmp_path}') == {}
    (tmp_path / 'config.json').write_text('[]')
    assert architecture_of(f'local-dir:{tmp_path}') == {}


# What the programs' flags took


def trunk(model):
    names = dict(cls_token='class_token', pos_embed='pos_embedding')
    found = {names.get(k, k): v for k, v in model.state_dict().items() if 'head' not in k}
    return dict(classy_state_dict=dict(base_model=dict(model=dict(trunk=found))))


@pytest.mark.parametrize(
    'name, content',
    [
        # CVPR 2022: state_dict, model, or the dictionary itself; with DDP's prefix
        ('a.pth.tar', lambda m: dict(state_dict=m.state_dict(), epoch=3)),
        ('b.pth.tar', lambda m: {f'module.{k}': v for k, v in m.state_dict().items()}),
        ('c.pth.tar', lambda m: dict(model={f'module.{k}': v for k, v in m.state_dict().items()})),
        # CVPR 2023, OFDB and 1p-frac: .pth has model, .torch a trunk
        ('d_010ep.pth', lambda m: dict(model=m.state_dict(), optimizer={}, epoch=10)),
        ('e.torch', trunk),
        # FractalDB: the dictionary itself
        ('f_epoch90.pth', lambda m: m.state_dict()),
    ],
)
def test_weights_take_what_the_flags_took(name, content, tmp_path):
    model, other = small(), create_model('deit_tiny_patch16_224', 4, 32, seed=1, **TINY)
    torch.save(content(model), tmp_path / name)
    load_weights(other, tmp_path / name)
    theirs, ours = read_weights(tmp_path / name)[1], other.state_dict()
    assert theirs and equal(theirs, ours) and equal(theirs, model.state_dict())


# Which checkpoints there are


def test_held_checkpoints_have_the_published_numbers(tmp_path):
    trained(tmp_path, epochs=5, interval_saved_epochs=2)
    held = sorted(p.name for p in tmp_path.glob('held-*'))
    assert held == [f'held-checkpoint-{n}.pth.tar' for n in (0, 2, 4)]
    assert read_checkpoint(tmp_path / held[1])['epoch'] == 2


@pytest.mark.parametrize('metric', ('last', 'top1', 'top1_test', 'loss'))
def test_the_best_is_there_when_something_is_measured(metric, tmp_path):
    digits = dict(dataset='digits', knobs={}, batch_size=160, epochs=2)
    trained(tmp_path, **digits, stage='finetune', eval_metric=metric)
    best = read_checkpoint(tmp_path / 'model_best.pth.tar')
    rows = read_summary(RunFolder(tmp_path))
    worth = [-row['train_loss'] if metric == 'loss' else row['eval_top1'] for row in rows]
    assert worth[best['epoch']] == max(worth)
    if metric == 'last':  # what is exported and counted stays the last epoch
        assert read_checkpoint(tmp_path / 'last.pth.tar')['epoch'] == 1


def test_no_best_where_nothing_is_measured(tmp_path):
    trained(tmp_path, epochs=1, eval_metric='last')
    assert not (tmp_path / 'model_best.pth.tar').exists()


# Going on from a named file


def test_another_run_goes_on_where_a_checkpoint_ends(tmp_path):
    "With the same settings, the weights are those of one run, to the bit."
    trained(tmp_path / 'whole', epochs=4, checkpoint_hist=4)
    named = tmp_path / 'whole/checkpoint-1.pth.tar'
    trained(tmp_path / 'rest', epochs=4, resume=str(named))
    assert epochs(tmp_path / 'rest') == [2, 3]
    ends = [read_checkpoint(tmp_path / f / 'last.pth.tar') for f in ('whole', 'rest')]
    assert equal(ends[0]['state_dict'], ends[1]['state_dict'])


def test_a_longer_schedule_is_that_of_the_new_run(tmp_path):
    trained(tmp_path / 'short', epochs=2, sched='cosine')
    trained(tmp_path / 'long', epochs=4, sched='cosine')
    last = str(tmp_path / 'short/last.pth.tar')
    trained(tmp_path / 'more', epochs=4, sched='cosine', resume=last)
    assert rates(tmp_path / 'more') == rates(tmp_path / 'long')[2:]


def test_without_the_optimizer_only_weights_and_epoch_are_taken(tmp_path):
    trained(tmp_path / 'a', epochs=1)
    last = str(tmp_path / 'a/last.pth.tar')
    trained(tmp_path / 'with', epochs=2, resume=last)
    trained(tmp_path / 'without', epochs=2, resume=last, no_resume_opt=True)
    trained(tmp_path / 'other', epochs=2, resume=last, no_resume_opt=True, opt='sgd')
    found = [read_checkpoint(tmp_path / f / 'last.pth.tar') for f in ('with', 'without')]
    assert epochs(tmp_path / 'without') == epochs(tmp_path / 'other') == [1]
    assert not equal(found[0]['state_dict'], found[1]['state_dict'])
    steps = [c['optimizer']['state'][0]['step'] for c in found]
    assert int(steps[0]) == 2 * int(steps[1])


def test_an_interrupted_run_goes_on_from_its_own_checkpoint(tmp_path):
    trained(tmp_path / 'a', epochs=1)
    last = str(tmp_path / 'a/last.pth.tar')
    learn, *_ = trained(tmp_path / 'b', epochs=3, resume=last, pause=1)
    assert learn.paused and epochs(tmp_path / 'b') == [1]
    trained(tmp_path / 'b', epochs=3, resume=last)
    assert epochs(tmp_path / 'b') == [1, 2]


@pytest.mark.parametrize(
    'changes, done',
    [
        (dict(), 1),
        (dict(fdsl=None, version=2, epoch=0), 1),  # timm
        (dict(fdsl=None, version=None, epoch=1, lr_scheduler={}), 1),  # Hydra
        (dict(fdsl=None, version=None, epoch=2, scheduler={}), 1),  # FractalDB
    ],
)
def test_epochs_of_every_program(changes, done, tmp_path):
    trained(tmp_path / 'a', epochs=1)
    theirs = written(tmp_path / 'a/last.pth.tar', **changes)
    assert epochs_done(read_checkpoint(theirs)) == done
    trained(tmp_path / 'b', epochs=2, resume=str(theirs))
    assert epochs(tmp_path / 'b') == [1]


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(optimizer=None), 'has no state of an optimizer; without'),
        (dict(epoch=None), 'names no epoch'),
        (dict(args=argparse.Namespace(opt='sgd')), "trained with opt='sgd'; without its optimizer"),
        (dict(state_dict=dict(x=torch.zeros(1))), 'Missing key'),
        (dict(epoch=7, fdsl=None, version=2), '8 epochs are done, and epochs=2; give more'),
    ],
)
def test_what_does_not_fit_is_said(changes, message, tmp_path):
    trained(tmp_path / 'a', epochs=1)
    theirs = written(tmp_path / 'a/last.pth.tar', **changes)
    with pytest.raises(CheckpointError, match=message):
        trained(tmp_path / 'b', epochs=2, resume=str(theirs))


def test_an_optimizer_of_other_groups_is_refused(tmp_path):
    trained(tmp_path / 'a', epochs=1)
    last = str(tmp_path / 'a/last.pth.tar')
    with pytest.raises(CheckpointError, match=r'groups of .* tensors, .*no_resume_opt True'):
        trained(tmp_path / 'b', epochs=2, resume=last, filter_bias_and_bn=False)
    assert not Path(tmp_path / 'b/last.pth.tar').exists()

"""Evaluation beyond its chapters: processes, layouts, ReaL, refusals, damaged files, and
evaluate.ipynb as users start it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import environment, papermill
from PIL import Image

from fdsl_nb.models.checkpoints import CheckpointError, read_checkpoint, save_checkpoint
from fdsl_nb.app.compare import (
    compare_figure,
    compare_table,
    table_text,
    differences,
    find_runs,
    read_run,
    seconds_left,
)
from fdsl_nb.training.evaluate import (
    Predictions,
    Counter,
    best_classes,
    per_class,
    published_top1,
    real_labels,
    real_top1,
)
from fdsl_nb.core.folder import RunFolder, read_config
from fdsl_nb.models.models import create_model
from fdsl_nb.app.report import show_classes, show_result
from fdsl_nb.app.runs import configuration, start_run
from fdsl_nb.core.settings import Resolved
from fdsl_nb.training.training import run_training
from fdsl_nb.training.validation import read_predictions, run_evaluation

pytestmark = pytest.mark.long

TINY = dict(patch_size=4, embed_dim=48, depth=2, num_heads=2)


def train(folder, **given):
    asked = (
        dict(
            budget='demo',
            dataset='digits',
            epochs=8,
            batch_size=32,
            img_size=16,
            lr=3e-3,
            warmup_epochs=0,
            wandb_mode='disabled',
        )
        | given
    )
    config = configuration('finetune', asked, RunFolder(folder))
    return run_training(config | dict(model_kwargs=Resolved(TINY, 'test')))


def examine(folder, **given):
    return run_evaluation(configuration('evaluate', given, RunFolder(folder)))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    return folder, train(folder, options=dict(model_ema_decay=0.9, scale=[0.9, 1.0], crop_pct=1.0))


@pytest.fixture(scope='module')
def weights(trained):
    return str(trained[0] / 'last.pth.tar')


@pytest.fixture(scope='module')
def examined(trained, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp('examined')
    return folder, examine(folder, weights=weights, use_ema=True, metric='published', batch_size=48)


# Counting


def test_the_same_as_the_training_run_counted(trained, examined):
    # training measures the averaged weights where there are some
    assert {k: examined[1][k] for k in ('split', 'correct', 'images', 'correct_top5')} == {
        k: trained[1][k] for k in ('split', 'correct', 'images', 'correct_top5')
    }
    assert examined[1]['correct'] > 200, 'a network that learned nothing would make this test easy'
    assert examined[1]['top1'] == 100 * examined[1]['correct'] / 800


@pytest.mark.process
@pytest.mark.parametrize('processes', (2, pytest.param(3, marks=pytest.mark.slow)))
def test_any_number_of_processes_gives_the_same_answers(processes, weights, examined, tmp_path):
    result, alone = (
        examine(
            tmp_path,
            weights=weights,
            use_ema=True,
            metric='published',
            batch_size=48,
            processes=processes,
        ),
        examined[1],
    )
    one, many = read_predictions(RunFolder(examined[0])), read_predictions(RunFolder(tmp_path))
    assert (
        800 % 3 and np.array_equal(one.best, many.best) and np.array_equal(one.labels, many.labels)
    )
    assert np.allclose(one.losses, many.losses, atol=1e-5)
    assert {k: result[k] for k in ('correct', 'images', 'top1', 'top5')} == {
        k: alone[k] for k in ('correct', 'images', 'top1', 'top5')
    }
    assert result['published_top1'] == published_top1(one, 48, processes) and alone[
        'published_top1'
    ] == published_top1(one, 48, 1)


def test_the_published_number_by_hand():
    right = np.array([1, 1, 0, 1, 0], bool)
    a = Predictions(np.where(right, 0, 1)[:, None], np.zeros(5, np.int64), np.zeros(5))
    assert published_top1(a, 2) == pytest.approx(100 * (1 + 0.5 + 0) / 3)
    # two processes have images 0 2 4 and 1 3 0: the first one is repeated
    assert published_top1(a, 2, 2) == pytest.approx(100 * (0.5 + 0 + 1 + 1) / 4)
    # more processes than images repeat all of them
    assert published_top1(a, 64, 10) == pytest.approx(60)


def test_equal_outputs_go_to_the_lowest_class():
    logits = torch.zeros(3, 100, dtype=torch.bfloat16)
    logits[1, 97:] = 1
    assert best_classes(logits).tolist() == [[0, 1, 2, 3, 4], [97, 98, 99, 0, 1], [0, 1, 2, 3, 4]]
    counter = Counter(100)
    counter.add(logits, torch.tensor([0, 97, 5]))
    assert counter.result().correct == 2 and counter.result().correct_top5 == 2


def test_classes_without_images_come_last():
    a = Predictions(np.array([[0], [0], [1]]), np.array([0, 1, 1]), np.zeros(3))
    table = per_class(a, ['a', 'b', 'nan'])
    assert (
        list(table.index) == ['b', 'a', 'nan']
        and table.loc['nan', 'images'] == 0
        and np.isnan(table.loc['nan', 'accuracy'])
    )


# What is left


@pytest.mark.process
def test_the_folder_holds_answers_and_classes(examined):
    folder, result = examined
    assert {p.name for p in folder.iterdir()} == {
        'answers.npz',
        'classes.csv',
        'config.json',
        'environment.txt',
        'files.txt',
        'result.json',
        'status.json',
    }
    table = pd.read_csv(folder / 'classes.csv')
    assert (
        table.correct.sum() == result['correct']
        and table.images.sum() == 800
        and table.accuracy.is_monotonic_increasing
    )
    shown = show_result(result).value
    assert shown[
        'top-1, exact'
    ] == f"{result['top1']:.2f} % ({result['correct']} of 800)" and 'mean over batches' in ' '.join(
        shown.index
    )
    assert len(show_classes(dict(folder=Resolved(str(folder), 'test')), 3)) == 3


def test_asked_again_it_answers_from_the_folder(examined, weights):
    assert (
        examine(examined[0], weights=weights, use_ema=True, metric='published', batch_size=48)
        == examined[1]
    )
    with pytest.raises(ValueError, match='batch_size=48 there, batch_size=64 here'):
        examine(examined[0], weights=weights, use_ema=True, metric='published', batch_size=64)


def test_changed_weights_are_not_answered_from_yesterday(weights, tmp_path):
    saved = read_checkpoint(weights)
    torch.save(saved, tmp_path / 'mine.pth.tar')
    first = examine(tmp_path / 'run', weights=str(tmp_path / 'mine.pth.tar'))
    saved['state_dict']['head.bias'][3] += 100
    torch.save(saved, tmp_path / 'mine.pth.tar')
    with pytest.raises(ValueError, match='weights_hash=.* pass overwrite=True'):
        examine(tmp_path / 'run', weights=str(tmp_path / 'mine.pth.tar'))
    again = examine(tmp_path / 'run', weights=str(tmp_path / 'mine.pth.tar'), overwrite=True)
    assert again['correct'] == 81 != first['correct'], 'all answers are 3 now'


def test_a_training_run_is_never_cleared(trained, weights):
    with pytest.raises(ValueError, match='holds another run'):
        examine(trained[0], weights=weights, overwrite=True)
    assert (trained[0] / 'last.pth.tar').exists() and RunFolder(trained[0]).state == 'done'


def flips(data, n=60):
    for place in np.linspace(0, len(data) - 1, n).astype(int):
        yield bytes(data[:place]) + bytes([data[place] ^ 0x11]) + bytes(data[place + 1 :])


def test_damaged_answers_are_named(examined, tmp_path):
    whole, good = (
        (examined[0] / 'answers.npz').read_bytes(),
        read_predictions(RunFolder(examined[0])),
    )
    found = 0
    for data in (whole[:100], whole[:-1], b'', *flips(whole)):
        (tmp_path / 'answers.npz').write_bytes(data)
        try:
            read = read_predictions(RunFolder(tmp_path))
        except ValueError as e:
            assert 'answers.npz is damaged' in str(e)
            found += 1
        else:
            assert (
                np.array_equal(read.best, good.best)
                and np.array_equal(read.labels, good.labels)
                and np.array_equal(read.losses, good.losses)
            )
    assert found > 40
    with pytest.raises(FileNotFoundError, match='run evaluate.ipynb'):
        read_predictions(RunFolder(tmp_path / 'nowhere'))


# Which weights


def test_the_averaged_weights_are_others(weights, examined, tmp_path):
    plain = examine(tmp_path / 'plain', weights=weights)
    saved = read_checkpoint(weights)
    assert plain['correct'] != examined[1]['correct']
    torch.save(saved['state_dict_ema'], tmp_path / 'averaged.pth')
    by_hand = examine(
        tmp_path / 'by hand', weights=str(tmp_path / 'averaged.pth'), dataset='digits', **PLAIN
    )
    assert by_hand['correct'] == examined[1]['correct']


# a file of another program says nothing of its network
NETWORK = dict(model='deit_tiny_patch16_224', model_kwargs=TINY, img_size=16)
PLAIN = NETWORK | dict(transform=dict(crop_pct=1.0))


@pytest.mark.parametrize('layout', ('model', 'bare', 'module.'))
def test_other_layouts_by_naming_the_model(layout, weights, tmp_path):
    state = read_checkpoint(weights)['state_dict']
    torch.save(
        {
            'model': dict(model=state, epoch=3),
            'bare': state,
            'module.': {f'module.{k}': v for k, v in state.items()},
        }[layout],
        tmp_path / 'theirs.pth',
    )
    given = dict(weights=str(tmp_path / 'theirs.pth'), dataset='digits')
    with pytest.raises(ValueError, match='does not say its model; name it'):
        examine(tmp_path / 'run', **given)
    found = examine(tmp_path / 'run', **given, **PLAIN)
    assert found['correct'] == examine(tmp_path / 'ours', weights=weights)['correct']


def test_an_exported_model_knows_how_images_are_prepared(trained, tmp_path):
    address = f"local-dir:{trained[0] / 'model'}"
    with pytest.raises(ValueError, match='does not say its dataset'):
        examine(tmp_path, weights=address)
    assert examine(tmp_path, weights=address, dataset='digits')['correct'] == trained[1]['correct']
    assert read_config(RunFolder(tmp_path))['weights_hash']


def test_another_size_resizes_position_embeddings(weights, tmp_path):
    result = examine(tmp_path, weights=weights, img_size=32)
    assert 'position embedding: 4×4 → 8×8' in result['weights'] and result['images'] == 800


def test_how_images_are_prepared_by_hand(weights, tmp_path):
    dark = examine(tmp_path / 'dark', weights=weights, transform=dict(mean=[0.9, 0.9, 0.9]))
    assert dark['correct'] != examine(tmp_path / 'plain', weights=weights)['correct']
    assert read_config(RunFolder(tmp_path / 'dark'))['mean'] == [0.9, 0.9, 0.9]
    half = examine(tmp_path / 'half', weights=weights, precision='bfloat16')
    assert (
        half['images'] == 800
        and abs(half['top1'] - examine(tmp_path / 'plain', weights=weights)['top1']) < 5
    )


def test_a_machine_default_does_not_change_the_answers(weights, monkeypatch):
    monkeypatch.setenv('FDSL_PRECISION', 'bfloat16')
    monkeypatch.setenv('FDSL_WORKERS', '2')
    config = configuration('evaluate', dict(weights=weights), RunFolder('x'))
    assert config['precision'].value == 'float32' and config['workers'].value == 2


def test_a_formula_is_asked_about_what_it_trained_on(tmp_path):
    config = configuration(
        'pretrain',
        dict(
            budget='demo',
            dataset='rcdb',
            classes=4,
            instances=8,
            epochs=1,
            batch_size=16,
            img_size=16,
            warmup_epochs=0,
            seed=5,
            wandb_mode='disabled',
        ),
        RunFolder(tmp_path / 'train'),
    )
    run_training(config | dict(model_kwargs=Resolved(TINY, 'test')))
    result = examine(tmp_path / 'run', weights=str(tmp_path / 'train' / 'last.pth.tar'))
    assert result['split'] == 'train' and result['images'] == 32
    knobs = read_config(RunFolder(tmp_path / 'run'))['knobs']
    assert knobs['seed'] == 5 and knobs['classes'] == 4
    other = configuration(
        'evaluate',
        dict(weights=str(tmp_path / 'train' / 'last.pth.tar'), knobs=dict(instances=3)),
        RunFolder('x'),
    )
    assert other['knobs'].value == knobs | dict(instances=3)


# Refusals


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(path, 'PNG')


@pytest.mark.parametrize(
    'given, kind, words',
    [
        (dict(split='tset'), ValueError, "split='tset' is not known; did you mean 'test'"),
        (dict(metric='publised'), ValueError, "did you mean 'published'"),
        (dict(labels='reel'), ValueError, "did you mean 'real'"),
        (dict(precision='half'), ValueError, "precision='half' is not known"),
        (dict(transform=dict(crob=1.0)), ValueError, "did you mean 'crop_pct'"),
        (dict(dataset='digist'), ValueError, "did you mean 'digits'"),
        (dict(dataset='rcdb', split='val'), ValueError, "dataset='rcdb' has no split 'val'"),
        (
            dict(dataset='rcdb'),
            CheckpointError,
            (
                'no head for dataset=.rcdb.: classes: 10 classes in the file, 1000 in the data; '
                'examine it on the data set'
            ),
        ),
        (dict(labels='real'), CheckpointError, '10 classes in the file, 1000 in the data'),
        (dict(batch_size=0), ValueError, 'batch_size=0 is outside 1'),
        (dict(weights='nowhere.pth.tar'), FileNotFoundError, 'nowhere.pth.tar'),
        (dict(weights=None), ValueError, 'weights=None: name the checkpoint'),
    ],
)
def test_slips_are_named(given, kind, words, weights, tmp_path):
    with pytest.raises(kind, match=words):
        examine(tmp_path, **dict(weights=weights) | given)
    assert (
        RunFolder(tmp_path).state in ('new', 'failed') and not (tmp_path / 'result.json').exists()
    )


def test_a_missing_head_is_an_error(weights, tmp_path):
    state = {
        k: v for k, v in read_checkpoint(weights)['state_dict'].items() if not k.startswith('head')
    }
    torch.save(state, tmp_path / 'backbone.pth')
    with pytest.raises(
        CheckpointError, match='classes: none in the file, 10 in the data; fine-tune it first'
    ):
        examine(
            tmp_path / 'run', weights=str(tmp_path / 'backbone.pth'), dataset='digits', **NETWORK
        )


def test_a_network_that_diverged_is_an_error(weights, tmp_path):
    saved = read_checkpoint(weights)
    saved['state_dict']['head.bias'][0] = float('nan')
    torch.save(saved, tmp_path / 'diverged.pth.tar')
    with pytest.raises(FloatingPointError, match=r'no number \(800 of 800 images\)'):
        examine(tmp_path / 'run', weights=str(tmp_path / 'diverged.pth.tar'))


# Several labels an image


def test_images_with_several_labels_have_figures_of_their_own(tmp_path, monkeypatch):
    from fdsl_nb.training import validation

    class Stripes(torch.utils.data.Dataset):
        classes, multilabel = ['a', 'b', 'c'], True

        def __len__(self):
            return 5

        def __getitem__(self, i):
            return Image.fromarray(np.full((16, 16), 40 * i, np.uint8)), torch.tensor(
                [i % 2, 1, 0]
            ).float()

    model = create_model('deit_tiny_patch16_224', 3, 16, seed=0, **TINY)
    save_checkpoint(tmp_path / 'w.pth.tar', model, arch='deit_tiny_patch16_224', epoch=0)
    monkeypatch.setattr(validation, 'open_evaluation_data', lambda config: ('val', Stripes()))
    given = dict(weights=str(tmp_path / 'w.pth.tar'), dataset='digits', **NETWORK)
    result = examine(tmp_path / 'run', **given)
    assert (
        result['images'] == 5
        and 0 <= result['mean_ap'] <= 1
        and 'correct' not in result
        and not (tmp_path / 'run' / 'answers.npz').exists()
    )
    assert 'mean ap' in show_result(result).index
    with pytest.raises(ValueError, match="metric='published' is for images with one label"):
        examine(tmp_path / 'other', metric='published', **given)


# ImageNet-ReaL


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    """Twelve made-up pictures under names of validation images, in one folder; two have no labels.
    Weights of a network that answers one class for each brightness."""
    folder, sets = tmp_path_factory.mktemp('imagenet'), real_labels()
    numbers = [i for i, s in enumerate(sets) if not s][:2] + [i for i, s in enumerate(sets) if s][
        500:510
    ]
    for k, i in enumerate(numbers):
        picture(folder / 'data' / 'val' / 'all' / f'ILSVRC2012_val_{i + 1:08d}.JPEG', 20 * k)
    model = create_model('deit_tiny_patch16_224', 1000, 16, seed=1, **TINY)
    save_checkpoint(folder / 'w.pth.tar', model, arch='deit_tiny_patch16_224', epoch=0)
    return folder, model


def test_real_is_what_a_count_by_hand_gives(imagenet, tmp_path):
    folder, model = imagenet
    files = sorted((folder / 'data' / 'val' / 'all').iterdir())
    with torch.no_grad():
        seen = [
            int(
                model.eval()(
                    torch.full(
                        (1, 3, 16, 16),
                        2 * (np.array(Image.open(f))[0, 0, 0] / 255) - 1,
                        dtype=torch.float32,
                    )
                ).argmax()
            )
            for f in files
        ]
    # the labels are bundled with timm; here the even images are made right and the odd ones wrong
    sets = [list(s) for s in real_labels()]
    numbers = [int(f.stem[-8:]) - 1 for f in files]
    scored = [i for i in numbers if sets[i]]
    for k, i in enumerate(scored):
        sets[i] = (
            [999 - seen[numbers.index(i)], seen[numbers.index(i)]]
            if k % 2 == 0
            else [(seen[numbers.index(i)] + 1) % 1000]
        )
    a = Predictions(np.array(seen)[:, None], np.zeros(12, np.int64), np.zeros(12))
    assert real_top1(a, [str(f) for f in files], sets) == (5, 10)
    truth = real_labels()
    given = dict(weights=str(folder / 'w.pth.tar'), dataset=str(folder / 'data'), labels='real')
    transform = dict(crop_pct=1.0, mean=[0.5] * 3, std=[0.5] * 3)
    result = examine(tmp_path, **given, **NETWORK, transform=transform)
    assert (result['real_correct'], result['real_images'], result['images']) == (
        sum(c in truth[i] for c, i in zip(seen, numbers)),
        10,
        12,
    )
    assert 'top1' not in result and not (tmp_path / 'classes.csv').exists(), (
        'the folders are not the classes'
    )
    assert (read_predictions(RunFolder(tmp_path)).best[:, 0] == seen).all()
    assert (
        'top-1, ImageNet-ReaL' in show_result(result).index
        and show_classes(dict(folder=Resolved(str(tmp_path), 'test'))) is None
    )


def test_real_needs_the_names_of_the_images(imagenet, tmp_path):
    given = dict(weights=str(imagenet[0] / 'w.pth.tar'), labels='real', **NETWORK)
    picture(tmp_path / 'data' / 'val' / 'all' / 'cat.png')
    with pytest.raises(ValueError, match='cat.png. is no validation image of ImageNet'):
        examine(tmp_path / 'run', dataset=str(tmp_path / 'data'), **given)
    with pytest.raises(ValueError, match='labels=real needs images with file names'):
        examine(tmp_path / 'other', dataset='digits', **given)


# Side by side


def test_runs_side_by_side(trained, examined):
    folders = [trained[0], examined[0]]
    table = compare_table(folders, {'a paper': 97.0})
    assert list(table.state) == ['done', 'done', 'published'] and list(table.notebook)[:2] == [
        'finetune',
        'evaluate',
    ]
    assert (
        table.top1.iloc[1] == round(examined[1]['top1'], 2) and table.loc['a paper', 'top1'] == 97.0
    )
    assert {'stage', 'batch_size', 'weights'} <= set(
        differences(folders).index
    ) and 'workers' not in differences(folders).index
    figure = compare_figure(folders, {'a paper': 97.0})
    dotted = [line for ax in figure.axes for line in ax.lines if line.get_linestyle() == ':']
    assert len(figure.axes) == 3 and len(dotted) == 2, 'the published number is drawn into both'
    assert [t.get_text() for t in figure.axes[2].get_yticklabels()][-1] == 'a paper'
    assert set(find_runs(trained[0].parent)) >= {trained[0]}


def test_the_number_of_a_recipe_is_drawn_by_itself(trained, tmp_path):
    (tmp_path / 'run').mkdir()
    for p in trained[0].glob('*.*'):
        if p.suffix in ('.json', '.csv', '.jsonl'):
            (tmp_path / 'run' / p.name).write_bytes(p.read_bytes())
    config = json.loads((tmp_path / 'run' / 'config.json').read_text())
    config['reported']['value'] = dict(digits=99.5, cifar10=98.0)
    (tmp_path / 'run' / 'config.json').write_text(json.dumps(config))
    assert list(compare_table([tmp_path / 'run']).top1)[1:] == [99.5]
    assert len(compare_table([tmp_path / 'run'], {})) == 1


@pytest.mark.parametrize(
    'name', ('status.json', 'config.json', 'summary.csv', 'log.jsonl', 'result.json')
)
def test_a_damaged_record_is_named(name, trained, tmp_path):
    records = {
        p.name: p.read_bytes()
        for p in trained[0].iterdir()
        if p.is_file() and p.suffix in ('.json', '.csv', '.jsonl')
    }
    for n, data in records.items():
        (tmp_path / n).write_bytes(data)
    assert read_run(tmp_path).state == 'done'
    found = 0
    for data in (
        records[name][: len(records[name]) // 2],
        records[name][:-5],
        b'[1]' if name.endswith('json') else b'epoch\nx\n',
        b'\xff\xfe',
        *flips(records[name]),
    ):
        (tmp_path / name).write_bytes(data)
        try:
            read_run(tmp_path)
        except ValueError as e:
            assert f'{name} is damaged' in str(e), e
            found += 1
    assert found > 3


def test_half_a_line_of_the_log_waits_for_the_next_look(trained, tmp_path):
    for p in trained[0].glob('*.json*'):
        (tmp_path / p.name).write_bytes(p.read_bytes())
    whole = len(read_run(tmp_path).events)
    with open(tmp_path / 'log.jsonl', 'a') as f:
        f.write('{"time": 17, "eve')
    assert len(read_run(tmp_path).events) == whole == 9


def test_time_left_counts_from_the_latest_start(trained):
    run = read_run(trained[0])
    assert seconds_left(run) is None, 'it is done'


# As users start it


@pytest.mark.process
def test_the_run_notebook(weights, examined, tmp_path):
    done = papermill(
        'evaluate',
        tmp_path,
        weights=weights,
        use_ema=True,
        metric='published',
        batch_size=48,
        processes=2,
        workers=1,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / 'result.json').read_text())
    assert result['correct'] == examined[1]['correct'] and RunFolder(tmp_path).state == 'done'
    assert {p.name for p in tmp_path.iterdir()} == {
        'evaluate.ipynb',
        'answers.npz',
        'classes.csv',
        'config.json',
        'environment.txt',
        'files.txt',
        'result.json',
        'status.json',
        'confusion.png',
        'mistakes.png',
    }
    config = json.loads((tmp_path / 'config.json').read_text())
    assert (
        config['metric'] == dict(value='published', source='parameter')
        and config['model']['source'] == 'checkpoint'
    )


@pytest.mark.process
def test_a_slip_stops_the_run_notebook(tmp_path):
    done = papermill('evaluate', tmp_path, weigths='x')
    assert done.returncode == 1 and "did you mean 'weights'" in done.stderr
    assert (
        RunFolder(tmp_path).state == 'failed'
        and "did you mean 'weights'" in RunFolder(tmp_path).status['reason']
    )


@pytest.mark.parametrize(
    'given, words',
    [
        (dict(metric='publised'), "did you mean 'published'"),
        (dict(weights=None), 'weights=None: name the checkpoint'),
        (dict(split='val', dataset='rcdb'), "no split 'val'"),
        (dict(batch_size=1.5), 'batch_size=1.5 should be of type int'),
    ],
)
def test_slips_are_recorded_before_anything_is_asked(given, words, weights, tmp_path):
    with pytest.raises((ValueError, TypeError), match=words):
        start_run('evaluate', dict(weights=weights, run=str(tmp_path)) | given)
    assert words in RunFolder(tmp_path).status['reason'] and not (tmp_path / 'config.json').exists()


@pytest.mark.process
def test_the_command_compares(trained, examined, tmp_path):
    fdsl = str(Path(sys.executable).parent / 'fdsl')
    words = [
        fdsl,
        'compare',
        str(trained[0]),
        str(examined[0]),
        '--published',
        'a paper=97',
        '--figure',
        str(tmp_path / 'both.svg'),
    ]
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert (
        'a paper' in done.stdout
        and 'where they differ' in done.stdout
        and '<svg' in (tmp_path / 'both.svg').read_text()
    )
    wrong = subprocess.run(
        [fdsl, 'compare', str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
    )
    assert (
        wrong.returncode == 1
        and 'holds no run' in wrong.stderr
        and not (tmp_path / 'compare.png').exists()
    )


def test_tables_for_papers():
    table = pd.DataFrame(
        {'top1': [43.5, None], 'images/s': [700, 'a_b & 5 %']},
        index=pd.Index(['a|b', r'x_1\input{y}'], name='run'),
    )
    markdown = table_text(table, 'markdown').split('\n')
    assert markdown[0] == '| run | top1 | images/s |'
    assert markdown[2] == r'| a\|b | 43.5 | 700 |'
    latex = table_text(table, 'latex')
    assert r'x\_1\textbackslash input\{y\} &  & a\_b \& 5 \% \\' in latex
    assert table_text(table, 'csv').split('\n')[1] == 'a|b,43.5,700'
    with pytest.raises(ValueError, match="did you mean 'latex'"):
        table_text(table, 'latx')

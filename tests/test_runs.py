"""The run notebooks as users start them: papermill and `fdsl` in real processes, with mistakes,
kills and restarts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from helpers import NBS, command, environment, papermill, weights

from fdsl_nb.models.checkpoints import read_checkpoint
from fdsl_nb.core.folder import RunFolder, read_config, read_summary
from fdsl_nb.formulas.formula import formulas
from fdsl_nb.training.recipes import FINETUNE, PRETRAIN
from fdsl_nb.app.parameters import (
    check_parameters,
    check_values,
    find_notebook,
    folder_for,
    kit_folder,
    parameters_cell,
    parse_parameters,
    read_parameters,
    run_metadata,
    run_notebooks,
)
from fdsl_nb.app.runs import configuration, given_values, run_folder, start_run

SMALL = dict(
    dataset='rcdb',
    seed=3,
    classes=4,
    instances=160,
    samples_per_epoch=1280,
    batch_size=32,
    epochs=3,
    warmup_epochs=0,
    mixup=0.5,
    drop_path=0.1,
    reprob=0.25,
)  # seconds; every kind of chance on


@pytest.mark.slow
@pytest.mark.process
def test_what_is_given_counts_also_where_it_equals_the_default(tmp_path):
    small = dict(classes=2, instances=8, batch_size=8, epochs=1, warmup_epochs=0)
    done = papermill(
        'pretrain',
        tmp_path / 'run',
        recipe='visualatom1k_vit_tiny',
        dataset='rcdb',
        seed=0,
        **small,
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert (
        config['dataset'] == dict(value='rcdb', source='parameter')
        and config['name']['value'] == 'visualatom1k_vit_tiny'
    )
    assert config['seed'] == dict(value=0, source='parameter')
    assert config['knobs']['value'].get('start_range') == 100  # RCDB's demo


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pretrained')
    done = papermill('pretrain', folder, **SMALL)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_run_notebook_is_known():
    assert set(run_notebooks()) == {
        'pretrain',
        'finetune',
        'evaluate',
        'explore',
        'build',
        'browse',
        'reproduce',
    }


@pytest.mark.parametrize('notebook', run_notebooks())
def test_every_default_fits_and_has_its_help(notebook):
    declared = read_parameters(notebook)
    assert check_parameters(notebook, {p.name: p.default for p in declared.values()}) == {
        p.name: p.default for p in declared.values()
    }
    assert [p.name for p in declared.values() if not p.help] == []


@pytest.mark.parametrize('notebook', ('pretrain', 'finetune', 'evaluate'))
def test_a_form_that_nobody_filled_in_asks_for_nothing(notebook):
    form = {p.name: p.default for p in read_parameters(notebook).values()}
    assert given_values(notebook, form) == {}
    if notebook == 'evaluate':
        return
    assert 'parameter' not in {
        r.source
        for r in configuration(notebook, given_values(notebook, form), RunFolder('.')).values()
    }


def test_a_run_notebook_says_what_it_was_shipped_with():
    for name in run_notebooks():
        path = kit_folder() / f'{name}.ipynb'
        cell = parse_parameters(parameters_cell(path))
        defaults = {p.name: p.default for p in cell.values()}
        expected = dict(notebook=name, default_parameters=defaults)
        assert run_metadata(path) == expected, f'{path.name}: run `make prepare`'


# In JupyterLab, where nobody passes parameters: the cell is edited, and perhaps not yet saved


def jupyter(monkeypatch, notebook='pretrain', path=None, **lines):
    "The namespace of a kernel in which the edited parameters cell has just been run."
    monkeypatch.setenv('JPY_SESSION_NAME', str(path or kit_folder() / f'{notebook}.ipynb'))
    cell = parameters_cell(kit_folder() / f'{notebook}.ipynb')
    for old, new in lines.values():
        assert cell.count('\n' + old) == 1
        cell = cell.replace('\n' + old, '\n' + new)
    namespace = {'In': ['', '1 + 1', cell, 'import os']}
    exec(cell, namespace)
    return namespace


def test_a_slip_in_the_cell_of_jupyter_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv('FDSL_OUTPUT_ROOT', str(tmp_path))
    slips = (
        (
            'epochs: int = None',
            'epoch: int = 3',
            "epoch=3 is not a parameter; did you mean 'epochs'",
        ),
        ('epochs: int = None', 'epoch = 3', "'epoch = 3  # passes through the data' declares no"),
        ('epochs: int = None', "epochs: int = 'ten'", "epochs='ten' should be of type int"),
    )
    for old, new, words in slips:
        namespace = jupyter(monkeypatch, line=(old, new))
        with pytest.raises((TypeError, ValueError), match=re.escape(words)):
            start_run('pretrain', namespace)
    assert list(tmp_path.iterdir()) == []


def test_changed_values_have_their_own_folder_in_jupyter(monkeypatch, tmp_path):
    monkeypatch.setenv('FDSL_OUTPUT_ROOT', str(tmp_path))

    def folder(**lines):
        return run_folder('pretrain', jupyter(monkeypatch, **lines)).path

    plain, three = folder(), folder(line=('epochs: int = None', 'epochs: int = 3'))
    again = folder(line=('overwrite: bool = False', 'overwrite: bool = True'))
    assert plain == again != three and plain.parent == tmp_path
    pretrain = find_notebook('pretrain')
    assert three == folder_for('pretrain', check_values(pretrain, dict(epochs=3)))
    assert folder(line=('run: str = None', "run: str = 'mine'")) == tmp_path / 'mine'


def test_a_parameter_of_ones_own_is_one_that_a_cell_uses(monkeypatch, tmp_path):
    own = tmp_path / 'mine.ipynb'
    text = json.loads((NBS / 'pretrain.ipynb').read_text('utf-8'))
    text['cells'][-1]['source'] = 'print(colours)'
    own.write_text(json.dumps(text))
    edit = ('run: str = None', "colours: str = 'red'  # mine\nrun: str = None")
    namespace = jupyter(monkeypatch, path=own, line=edit)
    assert given_values('pretrain', namespace) == dict(colours='red')
    with pytest.raises(TypeError, match="colours='red' is not a parameter"):
        given_values('pretrain', jupyter(monkeypatch, line=edit))


def test_an_executed_notebook_that_is_run_again_stays_in_its_folder(monkeypatch, tmp_path):
    monkeypatch.setenv('FDSL_OUTPUT_ROOT', str(tmp_path / 'runs'))
    folder = tmp_path / 'of-a-run'
    folder.mkdir()
    text = json.loads((NBS / 'pretrain.ipynb').read_text('utf-8'))
    text['metadata']['papermill'] = dict(parameters={})
    (folder / 'pretrain.ipynb').write_text(json.dumps(text))
    namespace = jupyter(monkeypatch, path=folder / 'pretrain.ipynb')
    assert run_folder('pretrain', namespace).path.parent == tmp_path / 'runs'
    (folder / 'status.json').write_text(json.dumps(dict(state='done')))
    assert run_folder('pretrain', namespace).path == folder


def test_results_are_in_the_same_place_wherever_one_stands(monkeypatch, tmp_path):
    (tmp_path / 'settings.ini').write_text('[paths]\noutput_root = runs\n')
    (tmp_path / 'nbs').mkdir()
    folders = set()
    for place in (tmp_path, tmp_path / 'nbs'):
        monkeypatch.chdir(place)
        folders.add(run_folder('pretrain', jupyter(monkeypatch)).path.resolve())
    assert len(folders) == 1 and folders.pop().parent == tmp_path / 'runs'


def test_folders_are_named_after_what_runs():
    def name(notebook, **given):
        return folder_for(notebook, given).name.rsplit('-', 1)[0]

    assert name('pretrain') == name('pretrain', dataset='rcdb') == 'pretrain-rcdb'
    assert name('pretrain', recipe='visualatom1k_vit_tiny') == 'pretrain-visualatom'
    both = dict(recipe='visualatom1k_vit_tiny', dataset='rcdb')
    assert name('pretrain', **both) == 'pretrain-rcdb'
    assert folder_for('pretrain', both) != folder_for('pretrain', dict(dataset='rcdb'))
    assert name('evaluate', weights='runs/atoms/last.pth.tar') == 'evaluate-atoms'
    assert name('finetune', dataset='/data/photos') == 'finetune-photos'
    assert name('reproduce') == 'reproduce-digits'


@pytest.mark.process
def test_what_was_edited_in_a_notebook_and_saved_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / 'nbs').mkdir()
    text = (NBS / 'pretrain.ipynb').read_text('utf-8')
    for then, now in (
        ('"epochs: int = None', '"epochs: int = 3'),
        ("dataset: str = 'rcdb'", "dataset: str = 'visualatom'"),
        ('seed: int = 0', 'seed: int = 5'),
    ):
        assert text.count(then) == 1
        text = text.replace(then, now)
    (tmp_path / 'nbs' / 'pretrain.ipynb').write_text(text, 'utf-8')
    monkeypatch.chdir(tmp_path)
    form = {p.name: p.default for p in read_parameters('pretrain').values()}
    assert given_values('pretrain', form) == dict(dataset='visualatom', seed=5, epochs=3)


def test_words_for_yes_and_no_and_lists_with_commas_are_read():
    form = dict(scratch='false', In=["# Parameters\nscratch = 'false'\n"])
    assert given_values('finetune', form) == dict(scratch=False) and form['scratch'] is False
    for given, meant in (
        (dict(overwrite='True'), dict(overwrite=True)),
        (dict(overwrite=False), dict(overwrite=False)),
        (dict(wandb_group='true'), dict(wandb_group='true')),
    ):
        assert check_parameters('pretrain', given) == meant
    assert (
        check_parameters('reproduce', dict(recipe='a, b,c'))
        == check_parameters('reproduce', dict(recipe=['a', 'b', 'c']))
        == dict(recipe=['a', 'b', 'c'])
    )
    for name, slip in (
        ('pretrain', dict(overwrite='yes')),
        ('pretrain', dict(overwrite=1)),
        ('reproduce', dict(recipe=[1])),
        ('pretrain', dict(seed=None)),
    ):
        with pytest.raises(TypeError, match='should be of type'):
            check_parameters(name, slip)


@pytest.mark.process
@pytest.mark.parametrize('notebook', run_notebooks())
def test_papermill_prints_every_parameter_with_its_help(notebook):
    shown = subprocess.run(
        [sys.executable, '-m', 'papermill', '--help-notebook', str(NBS / f'{notebook}.ipynb')],
        check=False,
        capture_output=True,
        text=True,
    ).stdout
    flat = ' '.join(shown.split())
    for p in read_parameters(notebook).values():
        assert f'{p.name}: {p.type.__name__}' in flat and ' '.join(p.help.split()) in flat, p.name


@pytest.mark.process
def test_pretraining_leaves_everything(pretrained):
    files = {p.name for p in pretrained.iterdir()}
    assert files >= {
        'pretrain.ipynb',
        'config.json',
        'environment.txt',
        'status.json',
        'summary.csv',
        'log.jsonl',
        'last.pth.tar',
        'samples.png',
        'curves.png',
        'result.json',
    }
    assert RunFolder(pretrained).state == 'done'
    assert not [f for f in files if f.startswith('.')], 'a half-written file was left'


@pytest.mark.process
def test_parameters_other_than_the_defaults_take_effect(pretrained):
    config = json.loads((pretrained / 'config.json').read_text())
    assert config['epochs'] == dict(value=3, source='parameter') and config['seed'] == dict(
        value=3, source='parameter'
    )
    assert config['knobs']['value'] == dict(
        classes=4, instances=160, size=256, start_range=100, seed=3
    )
    assert [r['epoch'] for r in read_summary(RunFolder(pretrained))] == [0, 1, 2]
    assert weights(pretrained)['head.weight'].shape[0] == 4
    assert vars(read_checkpoint(pretrained / 'last.pth.tar')['args'])['dataset'] == 'rcdb'


@pytest.mark.process
def test_finetuning_takes_the_weights_and_reports_exact_counts(pretrained, tmp_path):
    done = papermill('finetune', tmp_path, weights=pretrained / 'last.pth.tar', epochs=1, seeds=2)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / 'result.json').read_text())
    assert result['images'] == 800 and result['top1'] == 100 * result['correct'] / 800
    assert sum(map(sum, result['confusion'])) == 800
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [
        'model',
        'pre-trained-seed1',
        'scratch-seed0',
        'scratch-seed1',
    ]
    start = json.loads((tmp_path / 'log.jsonl').read_text().split('\n')[0])
    assert 'tensors loaded' in start['weights']
    assert (
        json.loads((tmp_path / 'scratch-seed0' / 'log.jsonl').read_text().split('\n')[0])['weights']
        == ''
    )
    assert (tmp_path / 'report.png').exists()


SLIPS = [
    ('pretrain', dict(datset='rcdb'), "datset='rcdb' is not a parameter; did you mean 'dataset'?"),
    (
        'pretrain',
        dict(dataset='rcbd'),
        "dataset='rcbd' is not known and is not a folder; did you mean 'rcdb'?",
    ),
    ('pretrain', dict(epochs='ten'), "epochs='ten' should be of type int"),
    ('finetune', dict(weights='missing.pth.tar'), "missing.pth.tar"),
    ('finetune', dict(weights=str(Path(__file__))), 'is no checkpoint'),
]


@pytest.mark.process
@pytest.mark.parametrize(
    'notebook, slip, words',
    SLIPS,
    ids=[f'{n}-{next(iter(s))}-{i}' for i, (n, s, _) in enumerate(SLIPS)],
)
def test_slips_stop_the_run_by_name(notebook, slip, words, tmp_path):
    done = papermill(notebook, tmp_path, **slip)
    assert done.returncode == 1
    assert words in done.stderr
    status = RunFolder(tmp_path).status
    assert status['state'] == 'failed' and words in status['reason']
    left = {p.name for p in tmp_path.iterdir()} - {f'{notebook}.ipynb'}
    assert left == {'files.txt', 'status.json'}


@pytest.mark.process
def test_a_folder_without_classes_is_refused(tmp_path):
    (tmp_path / 'data' / 'train').mkdir(parents=True)
    done = papermill('finetune', tmp_path / 'run', dataset=tmp_path / 'data')
    assert (
        done.returncode == 1
        and 'has no class folders; arrange it as train/CLASS/picture.png' in done.stderr
    )
    assert 'has no class folders' in RunFolder(tmp_path / 'run').status['reason']


@pytest.mark.process
def test_a_slip_does_not_spoil_a_finished_run(pretrained):
    before = (pretrained / 'status.json').read_text()
    assert papermill('pretrain', pretrained, datset='rcdb').returncode == 1
    assert (pretrained / 'status.json').read_text() == before


@pytest.mark.process
def test_another_run_in_the_same_folder_is_refused(pretrained):
    done = papermill('pretrain', pretrained, **SMALL | dict(epochs=5))
    assert (
        done.returncode == 1
        and 'epochs=3 there, epochs=5 here; choose another folder, or pass overwrite=True'
        in done.stderr
    )
    assert (
        RunFolder(pretrained).state == 'done' and read_config(RunFolder(pretrained))['epochs'] == 3
    )


@pytest.mark.process
def test_the_command_checks_before_a_kernel_starts(tmp_path):
    fdsl = [str(Path(sys.executable).parent / 'fdsl'), 'run', 'pretrain']
    done = subprocess.run(
        [*fdsl, '-p', 'datset', 'rcdb'],
        check=False,
        capture_output=True,
        text=True,
        env=environment(FDSL_OUTPUT_ROOT=str(tmp_path)),
    )
    assert (
        done.returncode == 1
        and "did you mean 'dataset'" in done.stderr
        and not list(tmp_path.iterdir())
    )


@pytest.mark.process
def test_the_command_runs_and_chooses_the_folder(tmp_path):
    fdsl = [str(Path(sys.executable).parent / 'fdsl'), 'run', 'pretrain']
    words = [w for k, v in (SMALL | dict(epochs=1)).items() for w in ('-p', k, str(v))]
    done = subprocess.run(
        [*fdsl, *words],
        check=False,
        capture_output=True,
        text=True,
        env=environment(FDSL_OUTPUT_ROOT=str(tmp_path)),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    assert (
        folder.name.startswith('pretrain-rcdb-')
        and RunFolder(folder).state == 'done'
        and (folder / 'pretrain.ipynb').exists()
    )


# A background job of a shell ignores Ctrl-C, and so do its children, unless they set it anew.
HEARS = '''
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
'''


def kill_after_first_epoch(words, sent):
    folder = Path(words[4]).parent
    child = subprocess.Popen(
        [sys.executable, '-c', HEARS, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
    )
    waiting = time.time() + 200
    while not read_summary(RunFolder(folder)) and time.time() < waiting:
        time.sleep(0.1)
    family = [p for p in psutil.Process(child.pid).children(recursive=True)]
    # a terminal sends Ctrl-C to all that runs in it
    os.killpg(child.pid, sent) if sent == signal.SIGINT else child.send_signal(sent)
    child.wait(30)
    _, alive = psutil.wait_procs(family, timeout=15)
    return family, alive


@pytest.mark.slow
@pytest.mark.process
def test_sigterm_ends_every_process_and_the_run_goes_on(tmp_path):
    given = SMALL | dict(processes=2)
    (tmp_path / 'killed').mkdir()
    family, alive = kill_after_first_epoch(
        command('pretrain', tmp_path / 'killed', **given), signal.SIGTERM
    )
    assert len(family) >= 4, 'kernel, launcher and two ranks were expected'
    assert alive == [], 'processes were left behind'
    assert RunFolder(tmp_path / 'killed').state == 'interrupted'
    again = papermill('pretrain', tmp_path / 'killed', **given)
    assert again.returncode == 0, again.stderr
    assert [r['epoch'] for r in read_summary(RunFolder(tmp_path / 'killed'))] == [0, 1, 2]
    assert 'continuing after epoch' in (tmp_path / 'killed' / 'pretrain.ipynb').read_text()


@pytest.mark.slow
@pytest.mark.process
def test_a_run_stopped_by_ctrl_c_ends_with_the_same_weights(pretrained, tmp_path):
    _, alive = kill_after_first_epoch(command('pretrain', tmp_path, **SMALL), signal.SIGINT)
    assert alive == [] and RunFolder(tmp_path).state == 'interrupted'
    assert papermill('pretrain', tmp_path, **SMALL).returncode == 0
    assert 'continuing after epoch' in (tmp_path / 'pretrain.ipynb').read_text()
    assert_same_weights(tmp_path, pretrained)
    assert (tmp_path / 'summary.csv').read_text() == (pretrained / 'summary.csv').read_text()


@pytest.mark.slow
@pytest.mark.parametrize('name', formulas())
def test_papermill_pretrains_on_every_formula(name, tmp_path):
    done = papermill('pretrain', tmp_path, dataset=name, epochs=4)
    assert done.returncode == 0, done.stderr
    losses = [r['train_loss'] for r in read_summary(RunFolder(tmp_path))]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_a_number_is_a_fine_real_and_true_is_not_a_number():
    check_parameters('pretrain', dict(lr=1))
    with pytest.raises(TypeError, match='epochs=True should be of type int'):
        check_parameters('pretrain', dict(epochs=True))


@pytest.mark.process
def test_the_command_lists_recipes():
    def said(*words):
        return subprocess.run(
            [str(Path(sys.executable).parent / 'fdsl'), 'recipes', *words],
            check=False,
            capture_output=True,
            text=True,
        )

    every, one, slip = said(), said('onepfrac1k_vit_tiny'), said('onepfrac1k_vit_tny')
    assert every.returncode == one.returncode == 0
    assert 'cifar100 84.2' in every.stdout and all(
        r.name in every.stdout for r in [*PRETRAIN, *FINETUNE]
    )
    assert re.search(r'^batch_size +256$', one.stdout, re.MULTILINE)
    assert slip.returncode == 1 and "did you mean 'onepfrac1k_vit_tiny'" in slip.stderr

"""The run notebooks as users start them: papermill and `fdsl` in real processes, with slips, kills and restarts."""
import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import nbformat
import psutil
import pytest
import torch

from fdsl_nb.checkpoints import read_checkpoint
from fdsl_nb.folder import RunFolder, read_config, read_summary
from fdsl_nb.formula import formulas
from fdsl_nb.recipes import FINETUNE, PRETRAIN
from fdsl_nb.runs import NOTEBOOKS, check_parameters

NBS = Path(__file__).parent.parent/'nbs'
SMALL = dict(dataset='rcdb', seed=3, classes=4, instances=160, epoch_images=1280, batch=32, epochs=3, warmup_epochs=0, mixup=0.5, drop_path=0.1, erasing=0.25)   # seconds; every kind of chance on


def environment(**more):
    return {**os.environ, 'WANDB_MODE': 'disabled', 'OMP_NUM_THREADS': '1', **more}


def command(notebook, folder, **parameters):
    words = [w for k, v in parameters.items() for w in ('-p', k, str(v))]
    return [sys.executable, '-m', 'papermill', str(NBS/f'{notebook}.ipynb'), str(folder/f'{notebook}.ipynb'), '--no-progress-bar', *words]


def papermill(notebook, folder, **parameters):
    folder.mkdir(exist_ok=True)
    return subprocess.run(command(notebook, folder, **parameters), check=False, capture_output=True, text=True, env=environment(), timeout=300)


def weights(folder):
    return read_checkpoint(folder/'last.pth.tar')['state_dict']


def test_what_is_given_counts_also_where_it_equals_the_default(tmp_path):
    small = dict(classes=2, instances=8, batch=8, epochs=1, warmup_epochs=0)
    done = papermill('pretrain', tmp_path/'run', recipe='visualatom1k_vit_tiny', dataset='rcdb', seed=0, **small)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path/'run'/'config.json').read_text())
    assert config['dataset'] == dict(value='rcdb', source='parameter') and config['name']['value'] == 'visualatom1k_vit_tiny'
    assert config['seed'] == dict(value=0, source='parameter')
    assert config['knobs']['value'].get('start_range') == 100      # RCDB's demo


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


@pytest.mark.parametrize('notebook', NOTEBOOKS)
def test_parameters_cell_is_the_declaration(notebook):
    cells = [c for c in nbformat.read(NBS/f'{notebook}.ipynb', 4).cells if 'parameters' in c.metadata.get('tags', [])]
    lines = cells[0].source.split('\n')
    written = [(m[1], m[2], ast.literal_eval(m[3]), m[4]) for m in (re.match(r'(\w+): (\w+) = (.+?)  # (.*)', line) for line in lines)]
    declared = [(f.name, f.type.__name__, f.default, f.metadata['help']) for f in fields(NOTEBOOKS[notebook])]
    assert written == declared, f'the parameters cell of {notebook}.ipynb and NOTEBOOKS in 41_runs.ipynb differ'


@pytest.mark.parametrize('notebook', NOTEBOOKS)
def test_papermill_prints_every_parameter_with_its_help(notebook):
    shown = subprocess.run([sys.executable, '-m', 'papermill', '--help-notebook', str(NBS/f'{notebook}.ipynb')], check=False, capture_output=True, text=True).stdout
    flat = ' '.join(shown.split())
    for f in fields(NOTEBOOKS[notebook]):
        assert f'{f.name}: {f.type.__name__}' in flat and ' '.join(f.metadata['help'].split()) in flat, f.name


def test_pretraining_leaves_everything(pretrained):
    files = {p.name for p in pretrained.iterdir()}
    assert files >= {'pretrain.ipynb', 'config.json', 'environment.txt', 'status.json', 'summary.csv', 'log.jsonl', 'last.pth.tar', 'samples.png', 'curves.png', 'result.json'}
    assert RunFolder(pretrained).state == 'done'
    assert not [f for f in files if f.startswith('.')], 'a half-written file was left'


def test_parameters_other_than_the_defaults_take_effect(pretrained):
    config = json.loads((pretrained/'config.json').read_text())
    assert config['epochs'] == dict(value=3, source='parameter') and config['seed'] == dict(value=3, source='parameter')
    assert config['knobs']['value'] == dict(classes=4, instances=160, size=256, start_range=100, seed=3)
    assert [r['epoch'] for r in read_summary(RunFolder(pretrained))] == [0, 1, 2]
    assert weights(pretrained)['head.weight'].shape[0] == 4
    assert vars(read_checkpoint(pretrained/'last.pth.tar')['args'])['dataset'] == 'rcdb'


def test_finetuning_takes_the_weights_and_reports_exact_counts(pretrained, tmp_path):
    done = papermill('finetune', tmp_path, weights=pretrained/'last.pth.tar', epochs=1, seeds=2)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path/'result.json').read_text())
    assert result['images'] == 800 and result['top1'] == 100 * result['correct'] / 800
    assert sum(map(sum, result['confusion'])) == 800
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ['model', 'pre-trained-seed1', 'scratch-seed0', 'scratch-seed1']
    start = json.loads((tmp_path/'log.jsonl').read_text().split('\n')[0])
    assert 'tensors loaded' in start['weights']
    assert json.loads((tmp_path/'scratch-seed0'/'log.jsonl').read_text().split('\n')[0])['weights'] == ''
    assert (tmp_path/'report.png').exists()


SLIPS = [
    ('pretrain', dict(datset='rcdb'), "datset='rcdb' is not a parameter; did you mean 'dataset'?"),
    ('pretrain', dict(dataset='rcbd'), "dataset='rcbd' is not known and is not a folder; did you mean 'rcdb'?"),
    ('pretrain', dict(epochs='ten'), "epochs='ten' should be of type int"),
    ('finetune', dict(weights='missing.pth.tar'), "missing.pth.tar"),
    ('finetune', dict(weights=str(Path(__file__))), 'is no checkpoint'),
]


@pytest.mark.parametrize('notebook, slip, words', SLIPS, ids=[f'{n}-{next(iter(s))}-{i}' for i, (n, s, _) in enumerate(SLIPS)])
def test_slips_stop_the_run_by_name(notebook, slip, words, tmp_path):
    done = papermill(notebook, tmp_path, **slip)
    assert done.returncode == 1
    assert words in done.stderr
    status = RunFolder(tmp_path).status
    assert status['state'] == 'failed' and words in status['reason']
    assert {p.name for p in tmp_path.iterdir()} == {f'{notebook}.ipynb', 'files.txt', 'status.json'}


def test_a_folder_without_classes_is_refused(tmp_path):
    (tmp_path/'data'/'train').mkdir(parents=True)
    done = papermill('finetune', tmp_path/'run', dataset=tmp_path/'data')
    assert done.returncode == 1 and 'has no class folders; arrange it as train/CLASS/picture.png' in done.stderr
    assert 'has no class folders' in RunFolder(tmp_path/'run').status['reason']


def test_a_slip_does_not_spoil_a_finished_run(pretrained):
    before = (pretrained/'status.json').read_text()
    assert papermill('pretrain', pretrained, datset='rcdb').returncode == 1
    assert (pretrained/'status.json').read_text() == before


def test_another_run_in_the_same_folder_is_refused(pretrained):
    done = papermill('pretrain', pretrained, **SMALL | dict(epochs=5))
    assert done.returncode == 1 and 'epochs=3 there, epochs=5 here; choose another folder, or pass restart=True' in done.stderr
    assert RunFolder(pretrained).state == 'done' and read_config(RunFolder(pretrained))['epochs'] == 3


def test_the_command_checks_before_a_kernel_starts(tmp_path):
    fdsl = [str(Path(sys.executable).parent/'fdsl'), 'run', 'pretrain']
    done = subprocess.run([*fdsl, '-p', 'datset', 'rcdb'], check=False, capture_output=True, text=True, env=environment(FDSL_OUTPUT_ROOT=str(tmp_path)))
    assert done.returncode == 1 and "did you mean 'dataset'" in done.stderr and not list(tmp_path.iterdir())


def test_the_command_runs_and_chooses_the_folder(tmp_path):
    fdsl = [str(Path(sys.executable).parent/'fdsl'), 'run', 'pretrain']
    words = [w for k, v in (SMALL | dict(epochs=1)).items() for w in ('-p', k, str(v))]
    done = subprocess.run([*fdsl, *words], check=False, capture_output=True, text=True, env=environment(FDSL_OUTPUT_ROOT=str(tmp_path)), timeout=300)
    assert done.returncode == 0, done.stderr
    folder, = tmp_path.iterdir()
    assert folder.name.startswith('pretrain-rcdb-') and RunFolder(folder).state == 'done' and (folder/'pretrain.ipynb').exists()


# A background job of a shell is deaf to Ctrl-C, and so are its children, unless they are told otherwise.
HEARS = 'import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])'


def kill_after_first_epoch(words, sent):
    folder = Path(words[4]).parent
    child = subprocess.Popen([sys.executable, '-c', HEARS, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(), start_new_session=True)
    waiting = time.time() + 200
    while not read_summary(RunFolder(folder)) and time.time() < waiting: time.sleep(0.1)
    family = [p for p in psutil.Process(child.pid).children(recursive=True)]
    # a terminal sends Ctrl-C to all that runs in it
    os.killpg(child.pid, sent) if sent == signal.SIGINT else child.send_signal(sent)
    child.wait(30)
    _, alive = psutil.wait_procs(family, timeout=15)
    return family, alive


def test_sigterm_ends_every_process_and_the_run_goes_on(tmp_path):
    given = SMALL | dict(processes=2)
    (tmp_path/'killed').mkdir()
    family, alive = kill_after_first_epoch(command('pretrain', tmp_path/'killed', **given), signal.SIGTERM)
    assert len(family) >= 4, 'kernel, launcher and two ranks were expected'
    assert alive == [], 'processes were left behind'
    assert RunFolder(tmp_path/'killed').state == 'interrupted'
    again = papermill('pretrain', tmp_path/'killed', **given)
    assert again.returncode == 0, again.stderr
    assert [r['epoch'] for r in read_summary(RunFolder(tmp_path/'killed'))] == [0, 1, 2]
    assert 'continuing after epoch' in (tmp_path/'killed'/'pretrain.ipynb').read_text()


def test_a_run_stopped_by_ctrl_c_ends_with_the_same_weights(pretrained, tmp_path):
    _, alive = kill_after_first_epoch(command('pretrain', tmp_path, **SMALL), signal.SIGINT)
    assert alive == [] and RunFolder(tmp_path).state == 'interrupted'
    assert papermill('pretrain', tmp_path, **SMALL).returncode == 0
    assert 'continuing after epoch' in (tmp_path/'pretrain.ipynb').read_text()
    assert_same_weights(tmp_path, pretrained)
    assert (tmp_path/'summary.csv').read_text() == (pretrained/'summary.csv').read_text()


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


def test_the_command_lists_recipes():
    def said(*words): return subprocess.run([str(Path(sys.executable).parent/'fdsl'), 'recipes', *words], check=False, capture_output=True, text=True)
    every, one, slip = said(), said('onepfrac1k_vit_tiny'), said('onepfrac1k_vit_tny')
    assert every.returncode == one.returncode == 0
    assert 'cifar100 84.2' in every.stdout and all(r.name in every.stdout for r in [*PRETRAIN, *FINETUNE])
    assert re.search(r'^batch +256$', one.stdout, re.MULTILINE)
    assert slip.returncode == 1 and "did you mean 'onepfrac1k_vit_tiny'" in slip.stderr

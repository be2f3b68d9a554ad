"""papermill's own command line, as its manual teaches it: with a run notebook of the kit it needs
no output path, and everything else stays as papermill has it."""

import json
import os
import pty
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import NBS, environment

from fdsl_nb.app import cli
from fdsl_nb.app.parameters import METADATA, folder_for

PAPERMILL = [str(Path(sys.executable).with_name('papermill'))]
MODULE = [sys.executable, '-m', 'papermill']
# as the run notebooks look to the plug-in, but over in two seconds
FORM = """\
dataset: str = 'rcdb'  # a formula
epochs: int = None  # passes
overwrite: bool = False  # anew
"""
TOLD = """\
import os
from pathlib import Path
told = {k: os.environ.get(k) for k in ('PAPERMILL_INPUT_PATH', 'PAPERMILL_OUTPUT_PATH')}
print('told', told['PAPERMILL_INPUT_PATH'], told['PAPERMILL_OUTPUT_PATH'], 'in', Path.cwd())"""


def code(source, *tags):
    return dict(
        cell_type='code',
        id=f'c{abs(hash(source)) % 10**8}',
        execution_count=None,
        outputs=[],
        metadata=dict(tags=list(tags)),
        source=source,
    )


def notebook_of(path, **metadata):
    kernel = dict(display_name='python3', language='python', name='python3')
    cells = [code(FORM, 'parameters'), code(TOLD)]
    found = dict(
        cells=cells, metadata=dict(kernelspec=kernel, **metadata), nbformat=4, nbformat_minor=5
    )
    path.write_text(json.dumps(found))
    return path


@pytest.fixture
def sources(tmp_path):
    "A folder nbs/ with a notebook of the kit, and one of somebody else."
    (tmp_path / 'nbs').mkdir()
    defaults = dict(dataset='rcdb', epochs=None, overwrite=False)
    ours = dict(notebook='small', default_parameters=defaults)
    notebook_of(tmp_path / 'nbs' / 'small.ipynb', **{METADATA: ours})
    notebook_of(tmp_path / 'nbs' / 'other.ipynb')
    (tmp_path / 'settings.ini').write_text('[paths]\noutput_root = runs\n')
    return tmp_path


def typed(words, folder, stdin=subprocess.DEVNULL):
    return subprocess.run(
        words,
        check=False,
        capture_output=True,
        text=True,
        stdin=stdin,
        cwd=folder,
        env=environment(),
        timeout=120,
    )


def folders(sources):
    return (
        sorted(p.name for p in (sources / 'runs').iterdir()) if (sources / 'runs').exists() else []
    )


def test_the_options_are_those_of_the_installed_papermill():
    import click
    from papermill.cli import papermill

    theirs = {name: o for o in papermill.params for name in (*o.opts, *o.secondary_opts)}
    theirs = {n: 0 if o.is_flag or o.count else o.nargs for n, o in theirs.items() if n[0] == '-'}
    ours = {name: n for names, n in cli._VALUES.items() for name in names.split()}
    flags = ' '.join((*cli._FLAGS, *cli._ANSWERS)).replace('/', ' ').split()
    assert isinstance(papermill, click.Command)
    assert ours | dict.fromkeys(flags, 0) == theirs | {'-h': 0, '--help': 0}


def test_words_are_read_as_papermill_reads_them():
    from papermill.cli import _resolve_type

    for word in ('True', 'true', 'None', '3', '-3', '1e-3', '0x1', 'nan', '', 'rcdb', '1_000'):
        ours, theirs = cli.read_word(word), _resolve_type(word)
        assert repr(ours) == repr(theirs), word


@pytest.mark.process
@pytest.mark.parametrize('program', (PAPERMILL, MODULE), ids=('papermill', 'python -m papermill'))
def test_the_literal_line(program, sources):
    done = typed([*program, 'small.ipynb', '-p', 'dataset', 'rcdb'], sources / 'nbs')
    assert done.returncode == 0, done.stderr
    (folder,) = folders(sources)
    assert folder.startswith('small-rcdb-')
    path = sources / 'runs' / folder
    said = [line for line in done.stderr.splitlines() if line.startswith('run folder')]
    assert said == [f'run folder: {path} (no output path was given)'] and done.stdout == ''
    outputs = json.loads((path / 'small.ipynb').read_text())['cells'][-1]['outputs']
    text = ''.join(outputs[0]['text']).split()
    assert text[1:3] == [str(sources / 'nbs' / 'small.ipynb'), str(path / 'small.ipynb')]
    assert sorted(p.name for p in (sources / 'nbs').iterdir()) == ['other.ipynb', 'small.ipynb']


@pytest.mark.process
def test_the_literal_line_at_a_terminal(sources):
    screen, terminal = pty.openpty()
    child = subprocess.Popen(
        [*PAPERMILL, 'small.ipynb', '-p', 'epochs', '3'],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        cwd=sources / 'nbs',
        env=environment(),
        close_fds=True,
    )
    os.close(terminal)
    shown = b''
    while child.poll() is None or select.select([screen], [], [], 0)[0]:
        if not select.select([screen], [], [], 0.2)[0]:
            continue
        try:
            shown += os.read(screen, 1 << 16)
        except OSError:  # how Linux says that the terminal is closed
            break
    os.close(screen)
    assert child.wait(60) == 0, shown.decode()
    assert b'run folder' in shown and folders(sources)[0].startswith('small-rcdb-')


@pytest.mark.process
def test_the_literal_line_below_a_pipe(sources):
    "papermill takes a pipe for the notebook, and would take the notebook for the output."
    before = (sources / 'nbs' / 'small.ipynb').read_bytes()
    done = typed([*PAPERMILL, 'small.ipynb'], sources / 'nbs', stdin=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert len(folders(sources)) == 1
    assert (sources / 'nbs' / 'small.ipynb').read_bytes() == before


@pytest.mark.process
def test_the_folder_is_the_one_that_fdsl_run_chooses(sources):
    line = ['-p', 'epochs', '3', '-y', 'dataset: rcdb', '--log-output']
    done = typed([*PAPERMILL, *line, 'nbs/small.ipynb'], sources)
    assert done.returncode == 0, done.stderr
    there = folders(sources)
    fdsl = [str(Path(sys.executable).with_name('fdsl')), 'run', 'small']
    again = typed([*fdsl, *line], sources / 'nbs')
    assert again.returncode == 0, again.stderr
    assert folders(sources) == there and len(there) == 1


@pytest.mark.process
def test_what_has_an_output_path_or_is_of_others_stays_as_it_is(sources, monkeypatch):
    nbs = sources / 'nbs'
    lines = (
        ['small.ipynb', str(sources / 'out.ipynb'), '-p', 'epochs', '2'],
        ['small.ipynb', '-'],
        ['other.ipynb'],
        ['--help-notebook', 'small.ipynb'],
        ['--version'],
        ['missing.ipynb'],
        ['small.ipynb', '--no-such-option'],
    )
    monkeypatch.chdir(nbs)
    for line in lines:
        assert cli.completed_line(line) == line
    help_ = typed([*PAPERMILL, '--help-notebook', 'small.ipynb'], nbs)
    assert help_.returncode == 0 and 'epochs: int' in help_.stdout
    other = typed([*PAPERMILL, 'other.ipynb'], nbs)
    assert other.returncode == 0 and json.loads(other.stdout)['cells'][-1]['outputs']
    assert folders(sources) == []


@pytest.mark.process
def test_a_notebook_that_papermill_has_written_is_not_a_source(sources, monkeypatch):
    done = typed([*PAPERMILL, 'nbs/small.ipynb', 'out.ipynb'], sources)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(sources)
    assert cli.completed_line(['out.ipynb']) == ['out.ipynb']


@pytest.mark.process
@pytest.mark.parametrize(
    'slip, words',
    (
        (['-p', 'epoch', '3'], "small: epoch=3 is not a parameter; did you mean 'epochs'?"),
        (['-p', 'epochs', 'ten'], "small: epochs='ten' should be of type int"),
    ),
)
def test_a_slip_ends_before_a_kernel_starts(slip, words, sources):
    line = typed([*PAPERMILL, 'nbs/small.ipynb', *slip], sources)
    assert line.returncode == 1 and folders(sources) == []
    assert line.stderr.startswith('papermill: ') and words in line.stderr
    assert 'Traceback' not in line.stderr
    (sources / 'run').mkdir()
    with_path = typed([*PAPERMILL, 'nbs/small.ipynb', 'run/small.ipynb', *slip], sources)
    assert with_path.returncode == 1 and f'Error: {words}' in with_path.stderr
    assert 'Executing' not in with_path.stderr
    status = json.loads((sources / 'run' / 'status.json').read_text())
    assert status['state'] == 'failed' and words in status['reason']


@pytest.mark.process
def test_words_for_yes_are_read_and_a_default_that_is_given_counts(sources, monkeypatch):
    monkeypatch.chdir(sources)
    given = cli.check_values(Path('nbs/small.ipynb'), cli.asked_for(['-p', 'overwrite', 'true']))
    assert given == dict(overwrite=True)
    given = cli.check_values(Path('nbs/small.ipynb'), cli.asked_for(['-p', 'dataset', 'rcdb']))
    assert given == dict(dataset='rcdb')


@pytest.mark.process
def test_cells_may_work_elsewhere(sources):
    (sources / 'elsewhere').mkdir()
    line = [*PAPERMILL, 'nbs/small.ipynb', '--cwd', str(sources / 'elsewhere')]
    done = typed(line, sources)
    assert done.returncode == 0, done.stderr
    (folder,) = folders(sources)
    executed = json.loads((sources / 'runs' / folder / 'small.ipynb').read_text())
    text = ''.join(executed['cells'][-1]['outputs'][0]['text']).split()
    assert text[1] == str(sources / 'nbs' / 'small.ipynb')
    assert text[2] == str(sources / 'runs' / folder / 'small.ipynb')
    assert text[-1] == str(sources / 'elsewhere')


@pytest.mark.process
def test_from_python_the_kernel_is_told_too(sources, monkeypatch):
    import papermill

    monkeypatch.setenv('PAPERMILL_OUTPUT_PATH', '/of/another/kernel.ipynb')
    out = sources / 'out.ipynb'
    done = papermill.execute_notebook(
        sources / 'nbs' / 'small.ipynb', out, dict(epochs=2), progress_bar=False
    )
    assert done.cells[-1].outputs[0].text.split()[2] == str(out)
    assert os.environ['PAPERMILL_OUTPUT_PATH'] == '/of/another/kernel.ipynb'


@pytest.mark.process
def test_papermill_alone_loads_nothing_of_ours():
    text = (
        "import os, sys, papermill.cli; print([m for m in sys.modules if m.startswith('fdsl_nb')], "
        "'papermill_fdsl_nb' in sys.modules, 'NUMBA_CACHE_DIR' in os.environ)"
    )
    plain = {k: v for k, v in os.environ.items() if k != 'NUMBA_CACHE_DIR'}
    done = subprocess.run(
        [sys.executable, '-c', text], check=True, capture_output=True, text=True, env=plain
    )
    assert done.stdout.split() == ['[]', 'True', 'False']


# Where results go


@pytest.mark.process
def test_an_output_path_beside_the_sources_makes_no_run_folder_of_them(tmp_path):
    nbs = tmp_path / 'nbs'
    nbs.mkdir()
    shutil.copy(NBS / 'pretrain.ipynb', nbs)
    (tmp_path / 'settings.ini').write_text('[paths]\noutput_root = runs\n')
    small = 'dataset rcdb epochs 1 classes 2 instances 8 batch_size 8 warmup_epochs 0'.split()
    words = [w for pair in zip(small[::2], small[1::2]) for w in ('-p', *pair)]
    done = typed([*PAPERMILL, 'pretrain.ipynb', 'out.ipynb', *words], nbs)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in nbs.iterdir()) == ['out.ipynb', 'pretrain.ipynb']
    (folder,) = folders(tmp_path)
    given = {k: cli.read_word(v) for k, v in zip(small[::2], small[1::2])}
    assert folder == folder_for('pretrain', given).name
    assert 'holds sources' in (nbs / 'out.ipynb').read_text()
    assert json.loads((tmp_path / 'runs' / folder / 'status.json').read_text())['state'] == 'done'

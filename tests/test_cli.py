"""The command `fdsl` as somebody types it: its output, its exit codes, and that it answers without
loading what takes seconds."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fdsl_nb
from fdsl_nb.app.cli import planned_command
from fdsl_nb.app.parameters import read_parameters, run_notebooks
from fdsl_nb.training.recipes import FINETUNE, PRETRAIN

HEAVY = ('torch', 'papermill', 'pandas', 'numba', 'numpy', 'matplotlib')
# what the console script does, and at the end a line that says what was loaded
FDSL = f"""
import atexit, sys
atexit.register(lambda: print('LOADED', *[m for m in {HEAVY} if m in sys.modules], file=sys.stderr))
sys.argv[0] = 'fdsl'
from fdsl_nb.app.cli import main
main()
"""


def typed(*words, folder=None, **environment):
    "Exit code, stdout, stderr, and the heavy modules that were loaded."
    done = subprocess.run(
        [sys.executable, '-c', FDSL, *words],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **environment},
    )
    said, *loaded = done.stderr.split(
        'LOADED'
    )  # papermill, which the process becomes, does not tell
    return done.returncode, done.stdout, said, ' '.join(loaded).split()


@pytest.mark.process
@pytest.mark.parametrize(
    'words, expected',
    (
        (['--version'], [f'fdsl {fdsl_nb.__version__}']),
        (['--help'], ['usage: fdsl', 'run', 'notebooks', 'explore', 'recipes', 'compare']),
        (['notebooks', '--help'], ['usage: fdsl notebooks', 'FOLDER']),
        (['explore', '--help'], ['usage: fdsl explore', '--no-browser', 'OPTION']),
        (['run', '--help'], ['usage: fdsl run NAME', *run_notebooks(), *run_notebooks().values()]),
        (['recipes', '--help'], ['usage: fdsl recipes']),
        (
            ['compare', '--help'],
            ['usage: fdsl compare', '--published LABEL=NUMBER', '--figure FILE', '--latex'],
        ),
        (['recipes'], ['cifar100 84.2', *[r.name for r in (*PRETRAIN, *FINETUNE)]]),
        (['recipes', 'onepfrac1k_vit_tiny'], ['Nakamura et al., ECCV 2024']),
    ),
    ids=' '.join,
)
def test_descriptions_are_whole_and_light(words, expected):
    code, said, wrong, loaded = typed(*words)
    assert (code, wrong, loaded) == (0, '', [])
    assert [e for e in expected if e not in said] == []


@pytest.mark.process
@pytest.mark.parametrize('notebook', run_notebooks())
def test_a_notebook_describes_every_parameter(notebook):
    code, said, wrong, loaded = typed('run', notebook, '--help')
    assert (code, wrong, loaded) == (0, '', [])
    assert max(map(len, said.splitlines())) <= 80
    flat = ' '.join(said.split())
    for p in read_parameters(notebook).values():
        default = f' = {p.default!r}' if p.default is not None else ''
        assert f' {p.name}: {p.type.__name__}{default} {" ".join(p.help.split())} ' in flat, p.name
    assert "papermill's options" in flat


@pytest.mark.process
def test_help_is_help_wherever_it_stands():
    assert (
        typed('run', 'explore', '-p', 'seed', '3', '-h')[:2]
        == typed('run', 'explore', '--help')[:2]
    )


@pytest.mark.process
@pytest.mark.parametrize(
    'words, expected',
    (
        ([], 'the following arguments are required: COMMAND'),
        (['train'], "argument COMMAND: invalid choice: 'train'"),
        (['run'], 'the following arguments are required: NAME'),
        (['compare'], 'the following arguments are required: FOLDER'),
        (['recipes', 'a', 'b'], 'unrecognized arguments: b'),
        (['run', 'pretrain', '--epochs', '3'], 'No such option'),
        (['run', 'pretrain', '-p', 'epochs'], 'requires 2 arguments'),
        (['run', 'pretrain', 'out.ipynb'], "unexpected 'out.ipynb'; the output path is chosen"),
        (['notebooks'], 'the following arguments are required: FOLDER'),
    ),
    ids=lambda w: ' '.join(w) if isinstance(w, list) else '',
)
def test_what_is_not_understood_ends_with_2(words, expected, tmp_path):
    code, said, wrong, _ = typed(*words, FDSL_OUTPUT_ROOT=str(tmp_path))
    assert code == 2 and said == ''
    assert re.search('^usage: fdsl', wrong) and expected in wrong and 'Traceback' not in wrong


@pytest.mark.process
@pytest.mark.parametrize(
    'words, expected',
    (
        (['run', 'pretran'], "notebook='pretran' is not known; did you mean 'pretrain'?"),
        (
            ['run', 'pretrain', '-p', 'datset', 'rcdb'],
            "pretrain: datset='rcdb' is not a parameter; did you mean 'dataset'?",
        ),
        (
            ['run', 'pretrain', '-p', 'epochs', 'ten'],
            "epochs='ten' should be of type int, for example 10; passes through the data",
        ),
        (
            ['run', 'pretrain', '-p', 'overwrite', 'perhaps'],
            "overwrite='perhaps' should be of type bool",
        ),
        (['run', 'pretrain', '-p', 'dataset', 'rcbd'], "dataset='rcbd' is not known"),
        (['run', 'pretrain', '-p', 'budget', 'papr'], "did you mean 'paper'?"),
        (
            ['run', 'pretrain', '-p', 'recipe', 'rcdb1k_deit_tny'],
            "recipe='rcdb1k_deit_tny' is not a pretrain recipe; did you mean 'rcdb1k_deit_tiny'?",
        ),
        (['run', 'pretrain', '-y', 'options: {grad_acum_steps: 4}'], "'grad_accum_steps'?"),
        (['run', 'missing.ipynb'], "notebook='missing.ipynb' is not a file"),
        (['run', 'pretrain', '-y', 'epochs: [3'], '-y is no YAML'),
        (['run', 'pretrain', '-y', 'epochs'], "-y 'epochs' names no parameter"),
        (['run', 'pretrain', '-f', 'missing.yaml'], 'missing.yaml'),
        (
            ['recipes', 'onepfrac1k_vit_tny'],
            "recipe='onepfrac1k_vit_tny' is not known; did you mean 'onepfrac1k_vit_tiny'?",
        ),
        (['compare', 'nowhere'], 'nowhere holds no run'),
        (
            ['compare', 'nowhere', '--published', 'ninety'],
            "--published 'ninety' is no number with a name",
        ),
    ),
    ids=lambda w: ' '.join(w) if isinstance(w, list) else '',
)
def test_what_is_wrong_ends_with_1_and_a_line(words, expected, tmp_path):
    code, said, wrong, _ = typed(*words, FDSL_OUTPUT_ROOT=str(tmp_path))
    assert code == 1 and said == ''
    assert wrong.startswith('fdsl: ') and expected in wrong and 'Traceback' not in wrong
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_a_slip_in_the_name_of_a_notebook_needs_no_papermill():
    assert typed('run', 'pretran')[3] == []


# papermill itself, with a notebook that takes no time
FORM = '''\
dataset: str = 'rcdb'  # a formula
overwrite: bool = False  # anew
names: list = ['a']  # several
run: str = None  # its folder
'''


@pytest.fixture
def checkout(tmp_path):
    def cell(source, *tags):
        return dict(
            cell_type='code',
            id=f'c{len(source)}',
            execution_count=None,
            outputs=[],
            metadata=dict(tags=[*tags]),
            source=source,
        )

    cells = [
        dict(cell_type='markdown', id='title', metadata={}, source='# A small one'),
        cell(FORM, 'parameters'),
        cell('print(repr((dataset, overwrite, names)))'),
    ]
    kernel = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    (tmp_path / 'nbs').mkdir()
    (tmp_path / 'nbs' / 'small.ipynb').write_text(
        json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5))
    )
    return tmp_path


@pytest.mark.process
def test_a_notebook_of_ones_own_is_described_checked_and_run(checkout):
    where = dict(folder=checkout, FDSL_OUTPUT_ROOT=str(checkout / 'runs'))
    code, said, _, loaded = typed('run', 'small', '--help', **where)
    assert code == 0 and loaded == [] and 'A small one.' in said and 'names: list' in said
    assert 'should be of type bool' in typed('run', 'small', '-p', 'overwrite', '3', **where)[2]
    code, said, wrong, _ = typed(
        'run', 'small', '-p', 'overwrite', 'true', '-p', 'names', 'a,b', **where
    )
    assert code == 0, wrong
    (folder,) = (checkout / 'runs').iterdir()
    assert folder.name.startswith('small-rcdb-') and (folder / 'small.ipynb').exists()
    assert said.strip() == f'run folder: {folder}' and "('rcdb', 'true', 'a,b')" in wrong


@pytest.mark.process
def test_the_exit_code_is_papermills(checkout):
    where = dict(folder=checkout, FDSL_OUTPUT_ROOT=str(checkout / 'runs'))
    path = checkout / 'nbs' / 'small.ipynb'
    path.write_text(path.read_text().replace('repr(', 'missing('))
    code, _, wrong, _ = typed('run', 'small', '-p', 'run', 'named', **where)
    assert (
        code == 1
        and "name 'missing' is not defined" in wrong
        and (checkout / 'runs' / 'named' / 'small.ipynb').exists()
    )


# The package's own names


def in_python(text, **environment):
    done = subprocess.run(
        [sys.executable, '-c', text],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    return done.stdout.split()


@pytest.mark.process
def test_importing_the_package_is_light_and_its_names_are_there():
    assert (
        in_python(
            f"import sys, fdsl_nb; dir(fdsl_nb); print(*[m for m in {HEAVY} if m in sys.modules])"
        )
        == []
    )
    assert in_python(
        "import fdsl_nb, sys; fdsl_nb.formula('rcdb'); print('torch' in sys.modules)"
    ) == ['False']
    assert [name for name in fdsl_nb._MODULES if getattr(fdsl_nb, name).__name__ != name] == []
    assert set(fdsl_nb._MODULES) <= set(dir(fdsl_nb))
    with pytest.raises(AttributeError, match="module 'fdsl_nb' has no attribute 'nothing'"):
        _ = fdsl_nb.nothing
    with pytest.raises(ImportError):
        in_python_import('nothing')


@pytest.mark.process
def test_ranks_and_collections_are_those_of_the_modules_that_are_not_imported():
    from fdsl_nb.app.cli import _RANKS
    from fdsl_nb.app.parameters import _COLLECTIONS, known_datasets
    from fdsl_nb.data.datasets import COLLECTIONS, known_collections
    from fdsl_nb.formulas.formula import formulas
    from fdsl_nb.training.distributed import LAUNCHERS

    assert _RANKS == {rank for _, rank, _, _ in LAUNCHERS}
    assert set(_COLLECTIONS) == set(COLLECTIONS), 'correct _COLLECTIONS in app/00_parameters'
    assert set(known_datasets()) <= {*formulas(), *known_collections()}


# Notebooks to edit, and the explorer


def test_notebooks_are_copied_and_nothing_is_replaced(tmp_path, capsys):
    from fdsl_nb.app.cli import main

    main(['notebooks', str(tmp_path / 'my')])
    names = {p.name for p in (tmp_path / 'my').iterdir()}
    assert names == {f'{name}.ipynb' for name in run_notebooks()} | {'settings.ini'}
    assert 'papermill' in capsys.readouterr().out
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'settings.ini').write_text('mine')
    for folder in ('my', 'mine'):
        before = {p: p.read_bytes() for p in (tmp_path / folder).iterdir()}
        with pytest.raises(SystemExit, match='exists; choose a new folder'):
            main(['notebooks', str(tmp_path / folder)])
        assert {p: p.read_bytes() for p in (tmp_path / folder).iterdir()} == before


def test_the_explorer_is_a_copy_and_stays_as_it_was_edited(tmp_path, monkeypatch):
    from fdsl_nb.app import cli

    monkeypatch.setenv('FDSL_OUTPUT_ROOT', str(tmp_path))
    monkeypatch.setattr(cli, 'find_spec', lambda name: None)
    path = cli.explorer_copy()
    path.write_text('edited')
    command = cli.explorer_command(browser=False, arguments=['--port', '9000'])
    assert command[1:4] == ['-m', 'jupyterlab', str(path)]
    assert command[4].endswith(f'/lab/tree/{path.name}')
    assert command[5:] == ['--no-browser', '--port', '9000']
    assert path.read_text() == 'edited'
    monkeypatch.setattr(cli, 'find_spec', lambda name: name == 'voila')
    assert cli.explorer_command()[1:3] == ['-m', 'voila']


# The Tab key


@pytest.mark.process
@pytest.mark.parametrize(
    'line, offered',
    (
        ('fdsl ', ['run', 'notebooks', 'explore', 'recipes', 'compare']),
        ('fdsl run pre', ['pretrain']),
        ('fdsl run pretrain -p data', ['dataset', 'data_dir']),
        ('fdsl run pretrain -p dataset visual', ['visualatom']),
        ('fdsl run pretrain -p budget ', ['demo', 'paper']),
        ('fdsl run pretrain -p overwrite T', ['True']),
        ('fdsl recipes rcdb1k_deit_t', ['rcdb1k_deit_tiny']),
        ('fdsl run nothing -p ', []),
    ),
)
def test_words_are_completed(line, offered, tmp_path):
    pytest.importorskip('argcomplete')
    told = tmp_path / 'told'
    asked = dict(_ARGCOMPLETE='1', COMP_LINE=line, COMP_POINT=str(len(line)), IFS='\n')
    asked |= dict(_ARGCOMPLETE_STDOUT_FILENAME=str(told), _ARGCOMPLETE_IFS='\n')
    code, _, wrong, _ = typed(**asked)
    assert code == 0 and 'Traceback' not in wrong, wrong
    words = {w.strip() for w in told.read_text().split('\n')} - {''} if told.exists() else set()
    assert set(offered) <= words and (offered or not words)


def in_python_import(name):
    exec(f'from fdsl_nb import {name}', {})


@pytest.mark.process
@pytest.mark.parametrize('before', ('', 'import numba; '), ids=('first', 'after numba'))
def test_kernels_go_to_a_folder_of_this_state(before):
    ask = f"{before}import fdsl_nb, numba; print(numba.config.CACHE_DIR)"
    plain = {'NUMBA_CACHE_DIR': ''}
    (ours,) = in_python(ask, **plain)
    assert re.search(r'fdsl_nb/__pycache__/kernels-[0-9a-f]{12}$', ours)
    # one that an older state handed on is replaced, one that somebody chose is not
    assert in_python(ask, NUMBA_CACHE_DIR=ours[:-12] + '0' * 12) == [ours]
    assert in_python(ask, NUMBA_CACHE_DIR='elsewhere') == ['elsewhere']


def test_what_may_change_when_a_run_continues_does_not_change_its_folder(tmp_path, monkeypatch):
    from fdsl_nb.app.parameters import _FREE, folder_for
    from fdsl_nb.training.training import FREE

    parameters = {k: p for name in run_notebooks() for k, p in read_parameters(name).items()}
    assert set(_FREE) == set(FREE) & set(parameters)
    monkeypatch.setenv('FDSL_OUTPUT_ROOT', str(tmp_path))
    given = dict(dataset='rcdb', epochs=3)
    for name in _FREE:
        more = {name: parameters[name].type(1)}
        assert folder_for('pretrain', given | more) == folder_for('pretrain', given), name
    assert folder_for('pretrain', given | dict(seed=1)) != folder_for('pretrain', given)


@pytest.mark.parametrize('dataset', ['/data/x-{0..3}.tar', 'half{', '{run}'])
def test_braces_in_a_name_do_not_reach_papermills_formatting(dataset, tmp_path, monkeypatch):
    from papermill.parameterize import parameterize_path

    monkeypatch.chdir(tmp_path)
    *_, executed = planned_command('pretrain', ['-p', 'dataset', dataset])[:5]
    formatted = Path(parameterize_path(executed, dict(run='elsewhere')))
    assert Path(dataset).name in formatted.parent.name
    assert formatted.parent.is_dir() and formatted.parent.parent == Path('runs')

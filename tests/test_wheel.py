"""The package as somebody gets it who has no checkout: built, installed into an empty environment,
and used from a folder of theirs."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import fdsl_nb

ROOT = Path(__file__).resolve().parents[1]
SMALL = 'dataset rcdb epochs 1 classes 2 instances 8 batch_size 8 warmup_epochs 0'.split()
SMALL = [w for pair in zip(SMALL[::2], SMALL[1::2]) for w in ('-p', *pair)]
FILES = ('pyproject.toml', 'setup.py', 'MANIFEST.in', 'README.md', 'LICENSE', 'settings.ini')
FILES += ('papermill_fdsl_nb.py',)


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built from a copy, so that nothing is left in the checkout."
    copy, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('wheel')
    leave = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    for folder in ('fdsl_nb', 'nbs'):
        shutil.copytree(ROOT / folder, copy / folder, ignore=leave)
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    words = ['wheel', '-q', '--no-deps', '--no-build-isolation', '--no-index', '-w', str(out), '.']
    done = subprocess.run(
        [sys.executable, '-m', 'pip', *words], check=False, cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (found,) = out.glob('*.whl')
    return found


@pytest.mark.process
def test_the_wheel_holds_modules_kernels_notebooks_and_settings_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if '.dist-info/' not in n}
        settings = archive.read('fdsl_nb/notebooks/settings.template.ini')
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / 'fdsl_nb').rglob('*.py')}
    notebooks = {f'fdsl_nb/notebooks/{p.name}' for p in (ROOT / 'nbs').glob('*.ipynb')}
    ours = {'papermill_fdsl_nb.py', 'fdsl_nb/py.typed', 'fdsl_nb/notebooks/settings.template.ini'}
    ours.add('fdsl_nb/app/programs.yaml')
    kernels = {str(p.relative_to(ROOT)) for p in (ROOT / 'fdsl_nb').glob('*/cuda_src/*')}
    tables = {str(p.relative_to(ROOT)) for p in (ROOT / 'fdsl_nb').glob('formulas/searched/*.npz')}
    assert len(tables) == 3 and names == modules | notebooks | ours | kernels | tables
    assert settings == (ROOT / 'settings.ini').read_bytes()


@pytest.mark.process
def test_the_source_distribution_holds_what_the_wheel_is_built_from(tmp_path):
    for name in (*FILES, 'fdsl_nb/__init__.py', 'nbs/pretrain.ipynb'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    words = ['setup.py', '-q', 'sdist', '--formats', 'zip', '--dist-dir', 'dist']
    subprocess.run([sys.executable, *words], check=True, cwd=tmp_path, capture_output=True)
    (found,) = (tmp_path / 'dist').glob('*.zip')
    with zipfile.ZipFile(found) as archive:
        names = {name.split('/', 1)[1] for name in archive.namelist()}
    assert {'nbs/pretrain.ipynb', 'settings.ini', 'setup.py', 'papermill_fdsl_nb.py'} <= names


# An environment with the wheel in it; what the package needs is borrowed from this one


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    "Runs a command of the environment in a folder outside any checkout."
    venv, work = tmp_path_factory.mktemp('venv'), tmp_path_factory.mktemp('work')
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(venv)], check=True)
    (site,) = venv.glob('lib/python*/site-packages')
    # a path in a .pth file is searched, but the .pth files there are not read: no editable install
    (site / 'borrowed.pth').write_text(sysconfig.get_paths()['purelib'] + '\n')
    pip = [sys.executable, '-m', 'pip', '--python', str(venv / 'bin' / 'python')]
    words = ['install', '-q', '--no-deps', '--no-index', '--disable-pip-version-check', str(wheel)]
    done = subprocess.run([*pip, *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lab = Path(sys.prefix) / 'share' / 'jupyter' / 'lab'
    given = {**os.environ, 'WANDB_MODE': 'disabled', 'OMP_NUM_THREADS': '1'}
    given |= dict(JUPYTERLAB_DIR=str(lab), PATH=f'{venv / "bin"}:{os.environ["PATH"]}')
    given.pop('NUMBA_CACHE_DIR', None)

    def typed(*words, start=subprocess.run, **how):
        program = str(venv / 'bin' / words[0])
        how = dict(capture_output=True, timeout=500, check=False) | how
        return start([program, *words[1:]], text=True, cwd=work, env=given, **how)

    typed.work = work
    return typed


@pytest.mark.slow
def test_it_is_the_wheel_that_is_used(installed):
    where = installed('python', '-c', 'import fdsl_nb; print(fdsl_nb.__file__)').stdout
    assert str(ROOT / 'fdsl_nb') not in where and 'site-packages' in where
    assert installed('fdsl', '--version').stdout == f'fdsl {fdsl_nb.__version__}\n'


@pytest.mark.slow
def test_a_run_without_a_checkout(installed):
    done = installed('fdsl', 'run', 'pretrain', *SMALL)
    assert done.returncode == 0, done.stderr
    (folder,) = (installed.work / 'runs').glob('pretrain-rcdb-*')
    assert json.loads((folder / 'status.json').read_text())['state'] == 'done'
    assert (folder / 'last.pth.tar').exists() and (folder / 'pretrain.ipynb').exists()


@pytest.mark.slow
def test_notebooks_to_edit(installed):
    my = installed.work / 'my'
    done = installed('fdsl', 'notebooks', './my')
    assert done.returncode == 0, done.stderr
    shipped = {p.name for p in (ROOT / 'nbs').glob('*.ipynb')}
    assert {p.name for p in my.iterdir()} == shipped | {'settings.ini'}
    before = {p.name: p.read_bytes() for p in my.iterdir()}
    again = installed('fdsl', 'notebooks', './my')
    assert again.returncode == 1 and 'exists; choose a new folder' in again.stderr
    assert {p.name: p.read_bytes() for p in my.iterdir()} == before

    # one is edited and run; its results are in the same place wherever one stands
    mine = my / 'pretrain.ipynb'
    mine.rename(my / 'mine.ipynb')
    mine = my / 'mine.ipynb'
    text = mine.read_text().replace('seed: int = 0', 'seed: int = 5')
    mine.write_text(text)
    done = installed('python', '-m', 'papermill', 'my/mine.ipynb', *SMALL)
    assert done.returncode == 0, done.stderr
    (folder,) = (my / 'runs').glob('mine-rcdb-*')
    config = json.loads((folder / 'config.json').read_text())
    assert config['seed'] == dict(value=5, source='parameter')
    again = installed('python', '-m', 'papermill', 'mine.ipynb', *SMALL, '--cwd', 'my')
    assert again.returncode == 1  # there is no such notebook in the folder above
    folders = sorted((my / 'runs').iterdir())
    done = installed('fdsl', 'run', 'my/mine.ipynb', *SMALL)
    assert done.returncode == 0 and sorted((my / 'runs').iterdir()) == folders


@pytest.mark.slow
def test_the_explorer_opens(installed):
    words = ('explore', '--no-browser', '--', '--allow-root', '--port', '0')
    child = installed(
        'fdsl',
        *words,
        start=lambda *a, **k: subprocess.Popen(
            *a,
            **{n: v for n, v in k.items() if n in ('text', 'cwd', 'env')},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ),
    )
    try:
        said = []
        for line in child.stdout:
            said.append(line)
            if re.search(r'https?://\S+explore-\S+\.ipynb', line) or len(said) > 500:
                break
        assert 'explore-' in said[-1], ''.join(said)
    finally:
        child.terminate()
        child.wait(30)
    (copy,) = (installed.work / 'runs' / 'explore').glob('explore-*.ipynb')
    assert copy.read_bytes() == (ROOT / 'nbs' / 'explore.ipynb').read_bytes()

"""What every test may rely on.

No setting of this machine or user reaches it. Fixtures give it a data folder, the documentation
(built once), and a kernel.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

# Before any test module is collected: torch, wandb and matplotlib read them when first imported
for variable in list(os.environ):
    if variable.startswith(('FDSL_', 'WANDB_')):
        del os.environ[variable]
os.environ['MPLBACKEND'] = 'Agg'  # no window opens, on no machine


# A test that starts a process is marked `process`. `make quick` leaves those out, and refuses a
# process to any other.

STARTS = {'subprocess.Popen', 'os.fork', 'os.forkpty', 'os.posix_spawn'}
may_start = [True]


def refuse_process(event, arguments=()):
    named = arguments and arguments[0]
    if event in STARTS and named != 'uname' and not may_start[-1]:  # which `platform` asks once
        raise AssertionError('this test starts a process: mark it with pytest.mark.process')


def start_refused(process, start=BaseProcess.start):
    refuse_process('os.fork')  # one of multiprocessing may be spawned, which nothing reports
    return start(process)


sys.addaudithook(refuse_process)
BaseProcess.start = start_refused


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if {'kernel', 'documentation'} & set(item.fixturenames):
            item.add_marker('process')


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    may_start.append('not process' not in item.config.option.markexpr)
    try:
        return (yield)
    finally:
        may_start.pop()


# What tests ask for


@pytest.fixture
def own_data_root(tmp_path, monkeypatch):
    "A data folder of the test's own, where everything looks and writes; it begins empty."
    monkeypatch.setenv('FDSL_DATA_ROOT', str(tmp_path / 'data'))
    return tmp_path / 'data'


@pytest.fixture(scope='session')
def documentation(testrun_uid):
    "The folder of the documentation, built once a test run, however many processes run tests."
    if not shutil.which('npm'):
        pytest.skip(
            'npm is not here, and the pages need MathJax and the widgets from it '
            '(Debian: apt-get install nodejs npm)'
        )
    root = Path(__file__).resolve().parents[1]
    build = root / 'docs' / '_build'
    build.mkdir(exist_ok=True)
    with open(build / '.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = build / '.built-for'
        if not stamp.exists() or stamp.read_text() != testrun_uid:
            done = subprocess.run(
                [sys.executable, root / 'docs' / 'make.py'],
                check=False,
                capture_output=True,
                text=True,
            )
            if 'is there a network?' in done.stderr:
                pytest.skip(done.stderr.strip())
            assert done.returncode == 0, done.stderr
            stamp.write_text(testrun_uid)
    return build / 'html'


@pytest.fixture(scope='module')
def kernel():
    "A client of a fresh kernel that works in the checkout."
    manager, client = start_new_kernel(kernel_name='python3', cwd=str(Path(__file__).parent.parent))
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)

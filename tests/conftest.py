"""What every test may rely on: no setting of this machine or this user reaches it; the documentation is there, built once; a kernel."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

# Before any test module is collected, because torch, wandb and matplotlib read their variables when first imported.
for variable in list(os.environ):
    if variable.startswith(('FDSL_', 'WANDB_')): del os.environ[variable]
os.environ['MPLBACKEND'] = 'Agg'     # no window opens, on no machine


@pytest.fixture(scope='session')
def documentation(testrun_uid):
    "The folder of the built documentation; built once a test run, however many processes run tests."
    if not shutil.which('npm'): pytest.skip('npm is not here, and the pages need MathJax and the widgets from it (Debian: apt-get install nodejs npm)')
    root = Path(__file__).resolve().parents[1]
    build = root/'docs'/'_build'
    build.mkdir(exist_ok=True)
    with open(build/'.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = build/'.built-for'
        if not stamp.exists() or stamp.read_text() != testrun_uid:
            done = subprocess.run([sys.executable, root/'docs'/'make.py'], check=False, capture_output=True, text=True)
            if 'is there a network?' in done.stderr: pytest.skip(done.stderr.strip())
            assert done.returncode == 0, done.stderr
            stamp.write_text(testrun_uid)
    return build/'html'


@pytest.fixture(scope='module')
def kernel():
    "A client of a fresh kernel that works in the checkout."
    manager, client = start_new_kernel(kernel_name='python3', cwd=str(Path(__file__).parent.parent))
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)

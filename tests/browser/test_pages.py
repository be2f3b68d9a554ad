"""What people see, in a real browser with no network: Chromium, driven by playwright-core.

Screenshots stay in tests/browser/shots.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_runs import add_fake_epoch, fake_run

from fdsl_nb.formulas.formula import formulas

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHOTS = HERE / 'shots'
CHROMIUM = (
    shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
)
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(
        not CHROMIUM, reason='Chromium is not here (Debian: apt-get install chromium)'
    ),
    pytest.mark.skipif(
        not shutil.which('npm'), reason='Node.js is not here (Debian: apt-get install nodejs npm)'
    ),
]


@pytest.fixture(scope='module')
def drive():
    "Runs a script of this folder in Node and returns what it found."
    if not (HERE / 'node_modules' / 'playwright-core').exists():
        done = subprocess.run(
            ['npm', 'ci', '--no-audit', '--no-fund'],
            check=False,
            cwd=HERE,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f'npm could not fetch playwright-core: {done.stderr.strip()[-300:]}')
    SHOTS.mkdir(exist_ok=True)

    def run(script, *words):
        done = subprocess.run(
            ['node', HERE / script, *words],
            check=False,
            capture_output=True,
            text=True,
            timeout=600,
            env=os.environ | {'CHROMIUM': CHROMIUM},
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@contextmanager
def server(command, ready, log, **environment):
    "A server for the block, on a free port which replaces `PORT` in the command; then it is ended."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    address = f'http://127.0.0.1:{port}'
    with open(log, 'w') as out:
        child = subprocess.Popen(
            [w.replace('PORT', str(port)) for w in command],
            stdout=out,
            stderr=out,
            env=os.environ | environment,
            start_new_session=True,
        )
    try:
        until = time.time() + 90
        while not answers(address + ready):
            assert child.poll() is None and time.time() < until, (
                f'the server did not start:\n{Path(log).read_text()[-3000:]}'
            )
            time.sleep(0.2)
        yield address
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if child.poll() is None:
                os.killpg(child.pid, number)
                try:
                    child.wait(15)
                except subprocess.TimeoutExpired:
                    pass


def answers(address):
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except (OSError, urllib.error.URLError):
        return False


def test_every_page_of_the_documentation_opens_without_network(documentation, drive, tmp_path):
    pages = sorted(
        str(p.relative_to(documentation))
        for p in documentation.rglob('*.html')
        if '_static' not in p.parts
    )
    serve = [sys.executable, '-m', 'http.server', 'PORT', '--bind', '127.0.0.1']
    serve += ['--directory', str(documentation)]
    with server(serve, '/index.html', tmp_path / 'log') as address:
        found = drive('docs.mjs', address, SHOTS, *pages)
    assert found['faults'] == []
    assert found['pages'] == len(pages) > 50
    assert found['formulas'] > 10, 'formulas of the page of formulas are not drawn'
    assert len(found['sliders']) == 5 and all(found['sliders'].values())


@contextmanager
def lab(notebook, folder, **environment):
    "JupyterLab for the block, with one of our notebooks; its own files go to `folder`."
    work = folder / 'work'
    work.mkdir()
    shutil.copy(ROOT / 'nbs' / notebook, work)  # JupyterLab saves what it shows
    own = {f'JUPYTER_{k}_DIR': str(folder / k.lower()) for k in ('CONFIG', 'RUNTIME', 'DATA')}
    own |= {f'JUPYTERLAB_{k}_DIR': str(folder / k.lower()) for k in ('SETTINGS', 'WORKSPACES')}
    command = [
        sys.executable,
        '-m',
        'jupyterlab',
        '--no-browser',
        '--allow-root',
        '--ServerApp.ip=127.0.0.1',
        '--ServerApp.port=PORT',
        '--ServerApp.port_retries=0',
        '--IdentityProvider.token=',
        f'--ServerApp.root_dir={work}',
        '--LabApp.news_url=',
        '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate',
    ]
    own['FDSL_DATA_ROOT'] = str(folder / 'data')
    with server(command, '/api', folder / 'log', **own, **environment) as address:
        yield address


def test_the_explorer_in_jupyterlab_draws_every_family(drive, tmp_path):
    with lab('explore.ipynb', tmp_path) as address:
        found = drive('explore.mjs', address, SHOTS)
    assert found['faults'] == []
    assert found['families'] == {name: True for name in found['offered']}
    assert set(found['offered']) >= set(formulas()[:8])


def test_the_run_browser_in_jupyterlab_follows_a_run(drive, tmp_path):
    runs = tmp_path / 'runs'
    fake_run(runs, 'rcdb/first', lr=0.2)
    fake_run(runs, 'rcdb/second', 'failed', 1)
    atoms = fake_run(runs, 'atoms', 'running', 2, dataset='visualatom')
    ended = threading.Event()

    def train():
        for e in range(2, 100):
            if ended.wait(1):
                return
            add_fake_epoch(atoms, e)

    training = threading.Thread(target=train)
    with lab('browse.ipynb', tmp_path, FDSL_OUTPUT_ROOT=str(runs)) as address:
        training.start()
        try:
            found = drive('browse.mjs', address, SHOTS)
        finally:
            ended.set()
            training.join()
    assert found == dict(faults=[], rows=3, follows=True, redraws=True, differs=True)

"""What several test files use: run notebooks started, a free port, weights and images compared."""

import hashlib
import io
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import distributed
import numpy as np
import torch
from PIL import Image

from fdsl_nb.models.checkpoints import read_checkpoint

NBS = Path(__file__).resolve().parents[1] / 'nbs'


# Run notebooks


def environment(**more):
    return {**os.environ, 'WANDB_MODE': 'disabled', 'OMP_NUM_THREADS': '1', **more}


def command(notebook, folder, **parameters):
    words = [w for k, v in parameters.items() for w in ('-p', k, str(v))]
    paths = [str(NBS / f'{notebook}.ipynb'), str(folder / f'{notebook}.ipynb')]
    return [sys.executable, '-m', 'papermill', *paths, '--no-progress-bar', *words]


def papermill(notebook, folder, **parameters):
    folder.mkdir(exist_ok=True)
    words = command(notebook, folder, **parameters)
    return subprocess.run(
        words, check=False, capture_output=True, text=True, env=environment(), timeout=300
    )


# Processes


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@contextmanager
def dask_cluster(folder):
    "A client of a scheduler and two workers, as a cluster starts them, over tcp, in `folder`."
    folder.mkdir()
    port = free_port()
    address = f'tcp://127.0.0.1:{port}'
    scheduler = ['scheduler', '--host', '127.0.0.1', '--port', str(port), '--no-dashboard']
    worker = ['worker', address, '--nthreads', '1', '--no-dashboard', '--no-nanny']
    started = [
        subprocess.Popen([sys.executable, '-m', 'dask', *words], cwd=folder)
        for words in (scheduler, worker, worker)
    ]
    try:
        with distributed.Client(address, timeout='120s') as client:
            client.wait_for_workers(2, timeout=120)
            yield client
    finally:
        for process in started:
            process.kill()  # a scheduler that has seen torch may hang when it is asked to end
            process.wait(30)


# Weights and images


def weights(folder):
    "The weights that a run folder ended with."
    return read_checkpoint(folder / 'last.pth.tar')['state_dict']


def equal(a, b):
    "Whether two dictionaries of weights are the same, bit for bit."
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def sha(image):
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def pixels(png):
    return np.array(Image.open(io.BytesIO(png)))

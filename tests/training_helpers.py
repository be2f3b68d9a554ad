"""Runs small enough for tests, looked at from inside.

Steps, images and labels as the network got them, and power cuts. A test of several processes forks
its ranks from one process that has imported everything, because importing takes longer than such a
run.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing import forkserver
from pathlib import Path
from threading import Timer

import psutil
from fastai.callback.core import Callback
from helpers import free_port

from fdsl_nb.training import distributed, saving, training
from fdsl_nb.formulas.contours import VisualAtom
from fdsl_nb.training.distributed import get_rank, total
from fdsl_nb.core.settings import Resolved

TINY = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2)
STILL = dict(  # no chance but the order
    aa='',
    color_jitter=0.0,
    reprob=0.0,
    scale=(1.0, 1.0),
    ratio=(1.0, 1.0),
    mixup=0.0,
    cutmix=0.0,
    smoothing=0.0,
    drop_path=0.0,
)
# 32 images of VisualAtom
DRAWN = dict(classes=4, instances=8, size=96, start_range=10, lines_max=20)
SHORT = dict(
    dataset='visualatom',
    knobs=DRAWN,
    model='deit_tiny_patch16_224',
    model_kwargs=TINY,
    img_size=32,
    batch_size=16,
    epochs=2,
    lr=1e-3,
    warmup_epochs=0,
    eval_metric='last',
    export=False,
    wandb_mode='disabled',
)
BASE = training.RUN | STILL | SHORT


@dataclass(frozen=True)
class Stumbling(VisualAtom):
    "Cannot draw one of its images."

    name = 'stumbling'

    def draw(self, c, k):
        if (c, k) == (1, 1):
            print('stumbled at', time.time(), flush=True)
            raise ArithmeticError('no picture of class 1, instance 1')
        return super().draw(c, k)


class Watch(Callback):
    "Keeps what each step was given and what it gave; with `file`, a line a step there."

    order, run_valid = 45, False  # after mixing, counting and averaging

    def __init__(self, file=None):
        self.file, self.rates, self.losses, self.labels = file, [], [], []

    def before_batch(self):
        self.rates.append(self.learn.opt.opt.param_groups[0]['lr'])
        self.labels.append(self.learn.yb[0])

    def after_batch(self):
        loss, n = self.learn.loss.detach(), len(self.learn.xb[0])
        self.losses.append(float(loss))
        if self.file is None:
            return
        loss_sum, images = total(loss.new_tensor([float(loss) * n, n])).tolist()
        if get_rank() == 0:
            with open(self.file, 'a') as f:
                f.write(json.dumps(dict(step=self.learn.steps_done, loss=loss_sum / images)) + '\n')


class Seen(Callback):
    "Writes label and hash of every training image, augmented and unmixed, to `seen-RANK.jsonl`."

    order, run_valid = -60, False

    def __init__(self, folder):
        self.folder = Path(folder)

    def before_batch(self):
        with open(self.folder / f'seen-{get_rank()}.jsonl', 'a') as f:
            for x, y in zip(self.learn.xb[0], self.learn.yb[0]):
                pixels = sha256(x.numpy().tobytes()).hexdigest()
                f.write(json.dumps([self.learn.epoch, int(y), pixels]) + '\n')


class Slow(Callback):
    "Takes its time, so that there is some to kill in, and leaves a line a step in `file`."

    order, run_valid = 46, False

    def __init__(self, file):
        self.file = file

    def after_batch(self):
        time.sleep(0.05)
        if get_rank() == 0:
            with open(self.file, 'a') as f:
                f.write('step\n')


def kill_family():
    "Every process of the run, this one last."
    root = psutil.Process(int(os.environ.get('PROGRAM') or os.getppid()))
    for p in root.children(recursive=True) + [root] * ('PROGRAM' in os.environ):
        if p.pid != os.getpid():
            p.kill()
    os.kill(os.getpid(), signal.SIGKILL)


class PowerCut(Callback):
    "Kills every process of the run, this one last, when step `step` reaches the event `when`."

    order = 55  # after a recovery checkpoint of the same step

    def __init__(self, step, when):
        self.step, self.when = step, when

    def cut(self, event):
        if get_rank() or event != self.when or self.learn.steps_done != self.step:
            return
        kill_family()

    def before_batch(self):
        self.cut('before_batch')

    def after_backward(self):
        self.cut('after_backward')

    def after_batch(self):
        self.cut('after_batch')

    def before_validate(self):
        self.cut('before_validate')


class Lightning(Callback):
    "Kills every process of the run `after` seconds from step `step` on, whatever they do then."

    order, run_valid = 55, False

    def __init__(self, step, after):
        self.step, self.timer = step, Timer(after, kill_family)

    def before_batch(self):
        if get_rank() == 0 and self.learn.steps_done >= self.step and not self.timer.ident:
            self.timer.daemon = True
            self.timer.start()


class Lost(Callback):
    """Sends one rank a signal in some phase of a run; the time of that is in `file`.

    Ranks that live wait for it less long than usual. Given as a callback, but begins with the rank.
    """

    order = 70  # after everything that an epoch saves

    def __init__(self, victim, phase, number, file):
        distributed.MEETING, distributed.LOST = 15.0, 10.0
        self.mine = int(os.environ['RANK']) == victim
        self.phase, self.number, self.file = phase, number, Path(file)
        saved = saving.save_state

        def save_state(*args):
            self.end('saving')
            saved(*args)

        saving.save_state = save_state
        self.end('start')

    def end(self, phase):
        if self.mine and phase == self.phase:
            self.file.write_text(str(time.time()))
            os.kill(os.getpid(), self.number)

    def before_batch(self):
        if self.learn.training and not self.learn.steps_done:
            self.end('first batch')

    def after_batch(self):
        if self.learn.training and self.learn.steps_done == 3:
            self.end('training')

    def before_validate(self):
        self.end('evaluation')
        if self.phase == 'evaluation':
            time.sleep(60)  # images enough for a minute, and no exchange before its end


@contextmanager
def watching(*callbacks):
    "Inside the block `train` adds these callbacks; yields a dict where it leaves the `learn`er."
    made, built, left = training.make_callbacks, training.fdsl_learner, {}

    def learner(*args, **more):
        left['learn'] = built(*args, **more)
        return left['learn']

    def more_callbacks(*given):
        return [*made(*given), *callbacks]

    training.make_callbacks, training.fdsl_learner = more_callbacks, learner
    try:
        yield left
    finally:
        training.make_callbacks, training.fdsl_learner = made, built


def values(folder, **given):
    "A configuration of `train`: `BASE` and what is given."
    return BASE | dict(folder=str(folder)) | given


def resolved(config):
    return {k: Resolved(v, 'test') for k, v in config.items()}


def trained(folder, **given):
    "Trains here, watched; returns (`learn`er, `Watch`, result)."
    watch = Watch()
    Path(folder).mkdir(parents=True, exist_ok=True)
    with watching(watch) as left:
        result = training.train(values(folder, **given))
    return left['learn'], watch, result


# Several processes

CONTEXT = multiprocessing.get_context('forkserver')


def _python_path():
    "This folder, and what is in PYTHONPATH already."
    here, before = str(Path(__file__).parent), os.environ.get('PYTHONPATH')
    return os.pathsep.join([here, before] if before else [here])


def start_server():
    "The process that ranks are forked from: it has imported everything and loaded the kernels."
    before = {k: os.environ.get(k) for k in ('PYTHONPATH', 'OMP_NUM_THREADS', 'RANK_SERVER')}
    os.environ |= dict(PYTHONPATH=_python_path(), OMP_NUM_THREADS='1', RANK_SERVER='1')
    CONTEXT.set_forkserver_preload(['training_helpers'])
    try:
        forkserver.ensure_running()
    finally:
        for k, v in before.items():
            if v is None:
                del os.environ[k]
            else:
                os.environ[k] = v


if os.environ.pop('RANK_SERVER', ''):
    VisualAtom(**DRAWN).render(0, 0)


def _rank(number, processes, port, config, callbacks):
    # for what it starts itself, as anywhere else
    multiprocessing.set_start_method('fork', force=True)
    if processes > 1:
        os.environ |= dict(
            RANK=str(number),
            WORLD_SIZE=str(processes),
            LOCAL_RANK=str(number),
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=str(port),
        )
    folder = Path(config['folder'])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f'printed-{number}.txt', 'a') as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    with watching(*[make(*args) for make, args in callbacks]):
        training.run_training(resolved(config))


def start_ranks(config, processes, *callbacks):
    "Starts ranks that call `run_training`, as a launcher would; callbacks are (class, arguments)."
    start_server()
    port = free_port()
    ranks = []
    for n in range(processes):
        arguments = n, processes, port, config, callbacks
        ranks.append(CONTEXT.Process(target=_rank, args=arguments))
        ranks[-1].start()
    return ranks


def wait_ranks(ranks, seconds=120):
    "Waits for all, and returns their exit codes."
    for p in ranks:
        p.join(seconds)
    for p in ranks:
        if p.is_alive():
            p.kill()
    return [p.exitcode for p in ranks]


def printed(folder):
    return ''.join(p.read_text() for p in sorted(Path(folder).glob('printed-*.txt')))


def run_ranks(config, processes, *callbacks):
    "Runs the ranks to their end."
    codes = wait_ranks(start_ranks(config, processes, *callbacks))
    assert codes == [0] * processes, printed(config['folder'])


# The command that a test of whole programs starts: it calls `run_training` alone or on processes of
# its own, watched in none or all of them


def command(config, *callbacks):
    "Words and environment of a Python program that runs `config`; callbacks as (name, arguments)."
    code = 'import json, sys, training_helpers as t; t.program(*map(json.loads, sys.argv[1:]))'
    words = [sys.executable, '-c', code, json.dumps(config), json.dumps(callbacks)]
    return words, {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': _python_path()}


def program(config, callbacks):
    os.environ |= dict(WATCHED=json.dumps(callbacks), PROGRAM=str(os.getpid()))
    launched = training.launch

    def launch_watched(function, values, processes):
        return launched('training_helpers:train_watched', values, processes)

    training.launch = launch_watched
    training.run_training(resolved(config))


def train_watched(values):
    "`train` with the callbacks that `program` was given, in whatever process it is."
    with watching(*[globals()[name](*args) for name, args in json.loads(os.environ['WATCHED'])]):
        return training.train(values)

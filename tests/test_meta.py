"""A whole epoch of the learner, validation included, on torch's `meta` device.

Tensors there have a shape and no content: whoever moves the network elsewhere, or reads a number
while a step is computed, gets an error. So a GPU would not be waited for either.
"""

import importlib
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from training_helpers import TINY

from fdsl_nb.models.models import create_model
from fdsl_nb.training import evaluate, learner, multilabel, optimise
from fdsl_nb.training.multilabel import MultiLabelCounter, MultiLabelLoss
from fdsl_nb.training.plan import Recipe

META = torch.device('meta')
PLAIN = dict(mixup=0.0, cutmix=0.0, smoothing=0.0, reprob=0.0)
SETTINGS = dict(
    plain=dict(),
    mixed=dict(mixup=0.8, cutmix=1.0, smoothing=0.1, reprob=0.25),
    averaged=dict(model_ema_decay=0.99, clip_grad=1.0),
    repeated=dict(aug_repeats=3, mixup=0.8, loss='bce'),
    labels=dict(mixup=0.5, mixup_mode='reversed', loss='keras_bce', opt='keras_adamw'),
    parts=dict(grad_accum_steps=2, opt='keras_sgd', clip_grad=0.1, clip_mode='agc'),
    bfloat16=dict(precision='bfloat16', channels_last=True),
    float16=dict(precision='float16', clip_grad=1.0),
    views=dict(loss='jsd', aug_splits=3, opt='lamb'),
)
HALVED = F.linear, F.conv2d, torch.matmul, F.scaled_dot_product_attention


class Halved(TorchFunctionMode):
    "What autocast does, which torch does not have for `meta`."

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, f, types, args=(), kwargs=None):
        if f in HALVED:
            args = [a.to(self.dtype) if isinstance(a, torch.Tensor) else a for a in args]
        return f(*args, **(kwargs or {}))


class Batches:
    epoch, epochs, first, steps = 0, 1, 0, 2


class Loader(list):
    batch_sampler = Batches()


@pytest.fixture
def read(monkeypatch):
    "What was read from the device: the loss of the first step and of the epoch, and its sums."
    found = []

    def total(values):
        assert values.device == META
        found.append('sums')
        # a single number is a loss, or how many answers were not finite
        return torch.full(values.shape, float(values.numel() > 1), dtype=torch.float64)

    def look(self):
        assert self.learn.loss.device == META
        found.append('loss')

    for module in (learner, evaluate, multilabel):
        monkeypatch.setattr(module, 'total', total)
    monkeypatch.setattr(learner.StopOnNonFinite, 'look', look)
    # what torch has for GPUs, and not for `meta`
    generator, dtypes = torch.Generator, dict(bfloat16=torch.bfloat16, float16=torch.float16)
    monkeypatch.setattr(torch, 'Generator', lambda device='cpu': generator())
    monkeypatch.setattr(optimise, 'FUSED_ON', ('meta',))
    adam = importlib.import_module('torch.optim.adam')
    monkeypatch.setattr(adam, '_device_dtype_check_for_fused', id)
    monkeypatch.setattr(
        learner,
        'autocast_for',
        lambda device, p: partial(Halved, dtypes[p]) if p in dtypes else nullcontext,
    )
    return found


def batches(r, name):
    "Two batches for training, one for validation, on the CPU."
    images = torch.zeros(4, 3, 32, 32)
    labels = torch.zeros(4, 4) if name == 'labels' else torch.zeros(4, dtype=torch.int64)
    seen = images if name == 'labels' else images.to(torch.uint8)
    if r.aug_splits:
        seen = torch.zeros(4, r.aug_splits, 3, 32, 32)
    return Loader([(seen, labels)] * 2), [(images, labels)]


def meta_learner(name):
    r = Recipe(**PLAIN | dict(img_size=32, batch_size=4, epochs=1) | SETTINGS[name])
    judges = {}
    if name == 'labels':
        judges = dict(loss=MultiLabelLoss(0.1, 1e-7), counter=partial(MultiLabelCounter, 4))
    model = create_model(r.model, 4, 32, seed=0, drop_path_rate=0.1, **TINY)
    return learner.fdsl_learner(model, r, *batches(r, name), 4, 0, META, **judges)


@pytest.mark.parametrize('name', SETTINGS)
def test_an_epoch_reads_nothing_from_the_device(name, read):
    learn = meta_learner(name)
    learn.fit(1)
    assert learn.steps_done == 2 and learn.evaluation.images
    found = [
        *learn.model.parameters(),
        *learn.opt.opt.state[next(learn.model.parameters())].values(),
    ]
    assert {t.device.type for t in found if t.ndim} == {'meta'}
    assert read[:3] == ['loss', 'loss', 'sums'] and set(read[3:]) == {'sums'}
    if name == 'float16':
        assert learn.scaler._scale.device == META


@pytest.mark.parametrize(
    'slip',
    (
        lambda learn: learn.loss.item(),
        lambda learn: bool(learn.loss > 0),
        lambda learn: learn.pred.cpu(),
        lambda learn: learn.model.to('cpu'),
    ),
    ids=('item', 'bool', 'cpu', 'move'),
)
def test_a_slip_is_an_error(slip, read):
    learn = meta_learner('plain')
    learn.add_cb(learner.Callback(after_loss=lambda self: slip(self.learn)))
    with pytest.raises((RuntimeError, NotImplementedError), match='[Mm]eta'):
        learn.fit(1)

"Checkpoints are written beside the training, from a copy that later steps do not change."

import threading
import time
from contextlib import nullcontext


import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from fdsl_nb.models import serialization
from fdsl_nb.models.checkpoints import read_checkpoint
from fdsl_nb.models.serialization import save_checkpoint, snapshot
from fdsl_nb.training import saving
from fdsl_nb.training.saving import CheckpointWriter, all_written, writer_of


class Tied(nn.Module):
    "Two names of one weight, and a buffer."

    def __init__(self):
        super().__init__()
        self.near = nn.Linear(4, 4)
        self.far = nn.Linear(4, 4)
        self.far.weight = self.near.weight
        self.register_buffer('seen', torch.zeros(3, dtype=torch.int64))


def stepped():
    torch.manual_seed(0)
    model = Tied()
    opt = torch.optim.AdamW(model.parameters())
    model.far(model.near(torch.ones(2, 4))).sum().backward()
    opt.step()
    return model, opt


def change(model, opt):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    opt.state[model.near.weight]['exp_avg'].zero_()


def test_a_checkpoint_holds_what_was_when_it_was_asked_for(tmp_path):
    model, opt = stepped()
    given = dict(arch='tied', epoch=3, optimizer=opt, extra=dict(steps=[1, (2, 3)]))
    writer = CheckpointWriter()
    save_checkpoint(tmp_path / 'now' / 'w.pth.tar', model, **given)
    save_checkpoint(tmp_path / 'later' / 'w.pth.tar', model, **given, write=writer.write)
    change(model, opt)
    writer.wait()
    now, later = (tmp_path / f / 'w.pth.tar' for f in ('now', 'later'))
    assert now.stat().st_size == later.stat().st_size  # a weight of two names is there once
    (one, form), (other, other_form) = (tree_flatten(read_checkpoint(f)) for f in (now, later))
    assert form == other_form and len(one) > 20
    for ours, theirs in zip(one, other, strict=True):
        assert torch.equal(ours, theirs) if torch.is_tensor(ours) else ours == theirs


def test_a_copy_keeps_what_is_one():
    model, _ = stepped()
    states = model.state_dict()
    copied = snapshot(states)
    assert copied['far.weight'].data_ptr() == copied['near.weight'].data_ptr()
    assert copied['far.weight'].data_ptr() != states['far.weight'].data_ptr()
    assert type(copied) is type(states) and copied._metadata == states._metadata


def test_training_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    release, order = threading.Event(), []

    def slow(path, content):
        release.wait(20)
        order.append(content['epoch'])

    monkeypatch.setattr(saving, 'write_checkpoint', slow)
    writer = CheckpointWriter()
    writer.write(tmp_path / 'a', dict(epoch=1), lambda: order.append('named'))
    assert writer.busy and order == []
    threading.Timer(0.05, release.set).start()
    writer.write(tmp_path / 'a', dict(epoch=2))  # waits for the first
    assert order[:2] == [1, 'named']
    writer.wait()
    assert order == [1, 'named', 2] and not writer.busy


@pytest.mark.parametrize('asked', ['check', 'wait', 'write'])
def test_an_error_of_the_thread_is_raised_by_what_comes_next(tmp_path, monkeypatch, asked):
    def full(content, file):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(serialization, '_save', full)
    writer = CheckpointWriter()
    writer.write(tmp_path / 'last.pth.tar', dict(epoch=1))
    while writer.busy:
        time.sleep(0.001)
    with pytest.raises(OSError, match='last.pth.tar was not written.*free some space'):
        writer.write(tmp_path / 'b', dict()) if asked == 'write' else getattr(writer, asked)()
    assert not list(tmp_path.iterdir())
    writer.wait()  # said once


class Learner:
    "As much of one as the writer needs."


@pytest.mark.parametrize('ends', [None, KeyboardInterrupt, ValueError])
def test_nothing_is_under_way_when_a_fit_has_ended(tmp_path, monkeypatch, ends):
    written = []

    def slow(path, content):
        time.sleep(0.1)
        written.append(int(content['w'][0]))

    monkeypatch.setattr(saving, 'write_checkpoint', slow)
    learn, w = Learner(), torch.ones(1)
    with pytest.raises(ends) if ends else nullcontext():
        with all_written(learn):
            writer_of(learn).write(tmp_path / 'a', dict(w=w))
            w += 1
            if ends:
                raise ends
    assert written == [1]

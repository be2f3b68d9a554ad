"""What fastai's users do with a learner: every call of theirs, on the kit's `fdsl_learner`."""

import warnings
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.interpret import ClassificationInterpretation
from fastai.learner import load_learner
from fastai.metrics import accuracy
from training_helpers import TINY

from fdsl_nb.data.augment import train_transform
from fdsl_nb.data.datasets import open_dataset
from fdsl_nb.data.loading import EpochBatchSampler, hold_out, train_loader
from fdsl_nb.models.models import create_model
from fdsl_nb.training.interactive import fdsl_dls
from fdsl_nb.training.learner import fdsl_learner
from fdsl_nb.training.recipes import recipe

IMAGES = open_dataset('rcdb', classes=3, instances=20, size=256, start_range=20)
R = replace(recipe('rcdb1k_deit_tiny'), img_size=32, epochs=2, warmup_epochs=0, lr=1e-3)


@pytest.fixture
def learner(tmp_path, monkeypatch):
    "Makes learners; nothing is shown."
    monkeypatch.setattr(plt, 'show', lambda *_: None)

    def make(r=R, **more):
        model = create_model(r.model, 3, 32, seed=0, **TINY)
        dls = fdsl_dls(IMAGES, a=r, bs=16, device='cpu', path=tmp_path)
        learn = fdsl_learner(model, r, dls, metrics=accuracy, **more)
        learn.logger = lambda *_: None
        return learn

    yield make
    plt.close('all')


def test_what_a_loader_answers(learner):
    dls = learner().dls
    dls.show_batch(max_n=2)
    shapes = [tuple(x.shape) for x in dls.one_batch()]
    assert shapes == [(16, 3, 32, 32), (16,)]
    assert list(dls.vocab) == IMAGES.classes and dls.c == 3 and dls.device.type == 'cpu'
    assert len(dls.valid.new(bs=5)) == 3
    assert len(dls.test_dl([IMAGES[0][0]] * 3)) == 1


def test_batches_are_those_of_a_run():
    own = hold_out(IMAGES, 0.2)[0]
    dls = fdsl_dls(IMAGES, a=R, bs=16, seed=7, device='cpu')
    batches = EpochBatchSampler(48, 16, seed=7)
    loader = train_loader(own, train_transform(replace(R, prefetcher=False)), batches)
    passes = []
    for epoch in range(2):  # counted by the one, set in the other
        batches.epoch = epoch
        passes.append([x for x, _ in dls.train])
        for ours, (theirs, _) in zip(passes[-1], loader, strict=True):
            assert torch.equal(torch.Tensor(ours), theirs)
    assert not torch.equal(passes[0][0], passes[1][0])
    dls.train.one_batch()  # looking is no pass
    assert dls.train.batch_sampler.epoch == 2


def test_training_and_what_is_asked_afterwards(learner, tmp_path):
    learn = learner()
    assert {'recorder', 'progress'} <= set(vars(learn))
    assert 'total trainable params' in learn.summary().lower()
    learn.lr_find(num_it=6)
    learn.fit_one_cycle(1, 1e-3)
    assert len(learn.validate()) == 2
    probabilities, labels = learn.get_preds()
    assert probabilities.shape == (12, 3) and labels.shape == (12,)
    assert torch.allclose(probabilities.sum(1), torch.ones(12))
    picture = tmp_path / 'picture.png'
    IMAGES[7][0].save(picture)
    asked = [learn.predict(x) for x in (IMAGES[7][0], IMAGES.array(7)[0], picture)]
    assert len({name for name, _, _ in asked}) == 1 and asked[0][0] in IMAGES.classes
    assert learn.tta(n=2)[0].shape == (12, 3)
    learn.show_results(max_n=2)
    found = ClassificationInterpretation.from_learner(learn)
    assert found.confusion_matrix().sum() == 12
    found.plot_confusion_matrix()
    found.plot_top_losses(2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # fastai's, about pickle
        learn.export('learner.pkl')
        again = load_learner(tmp_path / 'learner.pkl')
    assert again.predict(picture)[0] == asked[0][0]


def test_looking_for_a_rate_leaves_no_trace(learner):
    one, other = learner(replace(R, model_ema_decay=0.9)), learner(replace(R, model_ema_decay=0.9))
    other.lr_find(num_it=6)
    other.validate()
    other.dls.show_batch()
    for learn in (one, other):
        learn.fit(2)
    assert one.recorder.values[-1][0] == other.recorder.values[-1][0]
    for a, b in zip(one.average.parameters(), other.average.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_second_fit_goes_on_with_the_recipes_rates(learner):
    one, other = learner(), learner()
    one.fit(2)
    other.fit(1)
    other.fit(1)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert other.recorder.lrs == one.recorder.lrs[-3:]


def test_a_rate_set_by_fastai_is_not_overruled(learner):
    learn = learner()
    learn.fit_one_cycle(1, 0.02)
    assert max(learn.recorder.lrs) > 0.01
    learn.fit(3, cbs=ReduceLROnPlateau(patience=1, min_delta=9.0, factor=4))
    assert learn.recorder.lrs[0] == 1e-3 and learn.recorder.lrs[-1] == 1e-3 / 4


def test_trackers(learner, tmp_path):
    learn = learner()
    learn.fit(3, cbs=[EarlyStoppingCallback(min_delta=9.0), SaveModelCallback(fname='best')])
    assert len(learn.recorder.values) == 2 and (tmp_path / 'models/best.pth').exists()


def test_freezing_leaves_the_head(learner):
    learn = learner()
    learn.freeze()
    head = {id(p) for p in learn.model.get_classifier().parameters()}
    assert {id(p) for p in learn.model.parameters() if p.requires_grad} == head
    before = learn.model.patch_embed.proj.weight.detach().clone()
    learn.fit_one_cycle(1)
    assert torch.equal(before, learn.model.patch_embed.proj.weight)
    learn.unfreeze()
    learn.fit_one_cycle(1, slice(1e-5, 1e-3))
    assert not torch.equal(before, learn.model.patch_embed.proj.weight)
    rates = {h['lr'] for h in learn.opt.hypers}
    assert len(rates) == 2 and max(rates) / min(rates) == pytest.approx(100)


def test_refusals():
    with pytest.raises(ValueError, match='bs=64 is larger than the 48 images'):
        fdsl_dls(IMAGES)
    with pytest.raises(ValueError, match='leaves one side empty'):
        fdsl_dls(open_dataset('rcdb', classes=2, instances=1, size=32), bs=1)

"""Runs on disk that nobody trained, for tests of what looks at runs."""

from fdsl_nb.core.folder import RunFolder, add_epoch, log_event, set_status, write_config
from fdsl_nb.core.settings import Resolved

DEFAULTS = dict(
    stage='pretrain', dataset='rcdb', name='rcdb1k_deit_tiny', epochs=10, seed=0, lr=0.1
)


def fake_run(root, name, state='done', epochs=3, **settings):
    folder = RunFolder(root / name)
    reason = {'reason': 'ValueError: <i>lr</i>'} if state == 'failed' else {}
    set_status(folder, state, **reason)
    config = DEFAULTS | settings
    write_config(folder, {k: Resolved(v, 'test') for k, v in config.items()})
    log_event(folder, 'start')
    for e in range(epochs):
        add_fake_epoch(folder, e)
    return folder


def add_fake_epoch(folder, e):
    add_epoch(folder, dict(epoch=e, train_loss=3 - e / 10, eval_top1=10.0 * e))
    log_event(folder, 'epoch', images_per_second=100.0 + e)

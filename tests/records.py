"""What a recipe does, read from the objects it builds, in the words of the published records."""

import csv
import fnmatch
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from timm.data.auto_augment import RandAugment

from fdsl_nb.data.augment import eval_transform, train_transform
from fdsl_nb.models.models import create_model
from fdsl_nb.training.learner import LRScheduler
from fdsl_nb.training.optimise import make_optimizer
from fdsl_nb.training.plan import in_epochs

HERE = Path(__file__).parent
RECORDS = {r['name']: r for r in json.loads((HERE / 'golden/recipes_published.json').read_text())}
# the published programs' names → timm's
MODELS = {
    'ViT-B_16': 'vit_base_patch16_224',
    'ViT-B_32': 'vit_base_patch32_224',
    'ViT-L_16': 'vit_large_patch16_224',
    'ViT-L_32': 'vit_large_patch32_224',
    'ViT-H_14': 'vit_huge_patch14_224',
    'R50-ViT-B_16': 'vit_base_r50_s16_224',
    'vit-l/16': 'coyo_vit_large_patch16_224',
    'vit-b/16': 'coyo_vit_base_patch16_224',
}


def deviations():
    "The table of deviations on purpose: (record pattern, field, reason) of each row."
    path = HERE.parent / 'docs' / 'deviations.csv'
    with path.open() as f:
        return [(row['record'], row['field'], row['reason']) for row in csv.DictReader(f)]


def on_purpose(record, field, rows):
    "The reason of a deviation, or None."
    for pattern, name, reason in rows:
        if name == field and fnmatch.fnmatch(record, pattern):
            return reason
    return None


def flat(transform):
    "The single operations of a composed transform, in order."
    for op in getattr(transform, 'transforms', [transform]):
        if hasattr(op, 'transforms') and not isinstance(op, RandAugment):
            yield from flat(op)
        else:
            yield op


def side(size):
    return size if isinstance(size, int) else size[0]


def filters(op):
    "random, or the name of the one filter that an operation resizes with."
    several = isinstance(op.interpolation, (list, tuple))
    return 'random' if several else str(op.interpolation).split('.')[-1].lower()


def rand_augment(op):
    "Of timm's `RandAugment`: how many operations, how strong, how often, over which colour."
    one = op.ops[0]
    return dict(
        layers=op.num_layers,
        magnitude=one.magnitude,
        magnitude_std=one.magnitude_std,
        prob=one.prob,
        fill=list(one.kwargs['fillcolor']),
    )


def described_train(r):
    "The operations on one image: [name, value] each."
    found, resized = [], 0
    for op in flat(train_transform(r)):
        name = type(op).__name__
        if name == 'RandomResizedCropAndInterpolation':
            ratio = [round(x, 4) for x in op.ratio]
            crop = dict(scale=list(op.scale), ratio=ratio, interpolation=filters(op))
            found.append(['crop', crop])
        elif name == 'InceptionView':
            found.append(['inception crop', dict(scale=list(op.area), ratio=list(op.ratio))])
            found.append(['hflip', op.hflip])
        elif name == 'Resize':
            resized = side(op.size)
        elif name == 'RandomCrop':
            found.append(['random crop', dict(resize=resized)])
        elif name == 'RandomHorizontalFlip':
            found.append(['hflip', op.p])
        elif name == 'RandomVerticalFlip':
            found.append(['vflip', op.p])
        elif name == 'RandAugment':
            found.append(['rand augment', rand_augment(op)])
        elif name == 'ColorJitter':
            found.append(['color jitter', round(op.brightness[1] - 1, 4)])
    return found


def described_eval(r):
    "The operations of evaluation: [name, pixels, filter] each."
    found = []
    for op in flat(eval_transform(r)):
        name = type(op).__name__
        if name == 'Resize':
            whole = not isinstance(op.size, int) and len(op.size) == 2
            found.append(['squash' if whole else 'resize', side(op.size), filters(op)])
        elif name == 'CenterCrop' and found[-1][:2] != ['squash', side(op.size)]:
            found.append(['center crop', side(op.size)])
        elif name == 'CentreView':
            found += [['resize area', op.small], ['center crop', op.img_size]]
        elif name == 'SquashView':
            found.append(['squash', op.img_size, 'bilinear'])
    return found


def described_batch(r):
    "Erasing and mixing, and where they happen."
    erasing = dict(prob=r.reprob, mode=r.remode, count=r.recount, after_mixing=r.prefetcher)
    mixing = dict(
        mixup=r.mixup,
        cutmix=r.cutmix,
        prob=r.mixup_prob,
        switch_prob=r.mixup_switch_prob,
        mode=r.mixup_mode,
        off_epoch=r.mixup_off_epoch,
        on_bytes=r.prefetcher,
    )
    return dict(
        erasing=erasing if r.reprob else None,
        mixing=mixing if r.mixup or r.cutmix else None,
        smoothing=r.smoothing,
        loss=r.loss.removeprefix('keras_'),
    )


def network(r, classes):
    "The recipe's model, its numbers left out."
    with torch.device('meta'):
        return create_model(
            r.model, classes, r.img_size, drop_path_rate=r.drop_path, **r.model_kwargs
        )


CLASSES = dict(
    SGD='SGD', AdamW='AdamW', KerasSGD='SGD', KerasAdamW='AdamWeightDecay', SGDW='SGD', LaProp=''
)


def described_optimizer(r, model):
    "Class and settings of the optimizer, and how many numbers decay by how much."
    made = make_optimizer(model, r)
    first = made.param_groups[0]
    kind = CLASSES[type(made).__name__]
    names = ('momentum', 'nesterov') if kind == 'SGD' else ('betas', 'eps')
    settings = {k: first.get(k, False) for k in names}
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    groups = {}
    for group in made.param_groups:
        decay = float(group['weight_decay'])
        groups[decay] = groups.get(decay, 0) + sum(p.numel() for p in group['params'])
    return {'class': kind, **settings}, sorted([k, v] for k, v in groups.items())


def described(r, record):
    "What a recipe does: the names and values of `record['values']`."
    published = record['values']
    model = network(r, published['num_classes'])
    optimizer, groups = described_optimizer(r, model)
    length = dict(max_steps=r.max_steps) if 'max_steps' in published else dict(epochs=r.epochs)
    clip = dict(value=r.clip_grad, mode=r.clip_mode)
    in_mlp = max(r.dropout_rate, r.model_kwargs.get('proj_drop_rate', 0.0))
    return dict(
        model=r.model,
        num_classes=published['num_classes'],
        parameters=sum(p.numel() for p in model.parameters()),
        drop_path=r.drop_path,
        drop=r.drop,
        dropout_rate=in_mlp,
        img_size=r.img_size,
        mean=list(r.mean),
        std=list(r.std),
        transform=described_train(r),
        eval=described_eval(r),
        **described_batch(r),
        aug_repeats=r.aug_repeats,
        shuffle=True,
        batch_size=r.batch_size,
        **length,
        optimizer=optimizer,
        groups=groups,
        precision=r.precision,
        channels_last=r.channels_last,
        sync_bn=r.sync_bn,
        ema=dict(decay=r.model_ema_decay) if r.model_ema_decay else None,
        clip=clip if r.clip_grad else None,
        best=None if r.eval_metric == 'last' else r.eval_metric,
    )


def rates(r, record):
    "The learning rate at each point of the record, from the callback that sets it in training."
    r, steps = in_epochs(r), record['steps_per_epoch']
    if record['values'].get('max_steps'):
        steps = r.samples_per_epoch // r.batch_size
    learn = SimpleNamespace(
        training=True,
        steps_done=0,
        epoch=0,
        n_epoch=r.epochs,
        first_epoch=0,
        first_batch=0,
        metric=None,
        xb=(torch.zeros(1),),
        dls=SimpleNamespace(train=SimpleNamespace(batch_sampler=SimpleNamespace(steps=steps))),
    )
    layer = torch.nn.Linear(1, 1)
    learn.opt = SimpleNamespace(opt=make_optimizer(layer, r))
    callback = LRScheduler(r, 0)
    callback.learn = learn
    callback.before_fit()
    found = []
    for place, _ in record['lr']['points']:
        step = place if record['lr']['unit'] == 'step' else place * steps
        learn.epoch, learn.steps_done = step // steps, step
        callback.before_epoch()
        callback.before_batch()
        found.append(learn.opt.opt.param_groups[0]['lr'])
    return found

"""COYO-ViT: its numbers from every kind of file, its initial weights, and its network by name."""

import json, subprocess, sys
from pathlib import Path
import numpy as np, pytest, safetensors.torch, timm, torch
from tensorflow_bundles import write_bundle
from helpers import equal
from fdsl_nb.models.bundle import SLOT, VALUE, open_bundle
from fdsl_nb.models.checkpoints import (
    CheckpointError,
    export_model,
    load_weights,
    read_weights,
    save_checkpoint,
)
from fdsl_nb.models.coyo_vit import CoyoViT
from fdsl_nb.models.coyo_weights import HUGGING_FACE_NAMES
from fdsl_nb.models.models import create_coyo_vit, create_model, resize_position_embedding

GOLDEN = Path(__file__).parent / 'golden'
TINY = dict(embed_dim=64, depth=2, num_heads=4, mlp_ratio=2)


def vit(classes=10, img_size=64, seed=0, **kwargs):
    return create_coyo_vit('vit-ti/16', classes, img_size, seed=seed, **TINY | kwargs)


@pytest.fixture(scope='module')
def published():
    return dict(np.load(GOLDEN / 'coyo_ft_io.npz'))


def answers(model, published):
    return model.eval()(torch.from_numpy(published['x']).permute(0, 3, 1, 2)).detach().numpy()


# The published program's numbers


def test_logits_and_features_of_the_published_program(published):
    model = vit()
    report = load_weights(model, GOLDEN / 'coyo_ft.index', head='keep')
    assert (report.layout, report.loaded, report.missing, report.unexpected) == (
        'COYO-ViT',
        len(model.state_dict()),
        (),
        (),
    )
    assert np.abs(answers(model, published) - published['y']).max() < 1e-5
    model.reset_classifier(0)
    assert np.abs(answers(model, published) - published['feat'][:, 0, 0]).max() < 1e-5


def test_timm_vit_with_tanh_does_as_well(published):
    model = create_model('vit_tiny_patch16_224', 10, 64, act_layer='gelu_tanh', **TINY)
    load_weights(model, GOLDEN / 'coyo_ft.index')
    assert np.abs(answers(model, published) - published['y']).max() < 1e-5


def test_exact_gelu_is_refused(published):
    model = create_model('vit_tiny_patch16_224', 10, 64, **TINY)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    message = (
        "coyo_ft.index' was trained with gelu_tanh, and this VisionTransformer has GELU; "
        'create coyo_vit_'
    )
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, GOLDEN / 'coyo_ft.index')
    assert equal(before, model.state_dict())


def test_larger_images_stretch_corner_on_corner():
    model, small = vit(img_size=96), vit()
    load_weights(small, GOLDEN / 'coyo_ft.index')
    report = load_weights(model, GOLDEN / 'coyo_ft.index', resize='bilinear_corners')
    assert report.resized == (('position embedding', (4, 4), (6, 6)),)
    assert torch.equal(
        model.pos_embed,
        resize_position_embedding(small.pos_embed, (4, 4), (6, 6), 'bilinear_corners'),
    )


# Our own bundles, in every published layout


def keras_paths(weights):
    "The published program's paths, written out once more, by hand."
    found = {}

    def put(path, value):
        found[path] = value.detach().clone()

    def put_kernel(path, value):
        found[path] = value.detach().permute(2, 3, 1, 0) if value.ndim == 4 else value.detach().T

    put('class_emb', weights['cls_token'])
    put('pos_emb', weights['pos_embed'])
    layers = {'embedding': 'patch_embed.proj', 'head': 'head', 'representation': 'pre_logits.fc'}
    for i in range(2):
        block, ours = f'enc_layers/{i}', f'blocks.{i}'
        layers |= {
            f'{block}/att/combine_heads': f'{ours}.attn.proj',
            f'{block}/mlp/layer_with_weights-0': f'{ours}.mlp.fc1',
            f'{block}/mlp/layer_with_weights-1': f'{ours}.mlp.fc2',
        }
        for j, part in enumerate(('query', 'key', 'value')):
            kernel = weights[f'{ours}.attn.qkv.weight'].chunk(3)[j]
            put_kernel(f'{block}/att/{part}_dense/kernel', kernel)
            put(f'{block}/att/{part}_dense/bias', weights[f'{ours}.attn.qkv.bias'].chunk(3)[j])
        for n in (1, 2):
            put(f'{block}/layernorm{n}/gamma', weights[f'{ours}.norm{n}.weight'])
            put(f'{block}/layernorm{n}/beta', weights[f'{ours}.norm{n}.bias'])
    put('norm/gamma', weights['norm.weight'])
    put('norm/beta', weights['norm.bias'])
    for path, name in layers.items():
        if f'{name}.weight' in weights:
            put_kernel(f'{path}/kernel', weights[f'{name}.weight'])
            put(f'{path}/bias', weights[f'{name}.bias'])
    return found


def noisy(model, seed=3):
    "Nothing at zero or one, so that no tensor can take another's place."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


LAYOUTS = {
    'checkpoint': ('backbone/', 'model/layer_with_weights-1'),
    'model-weights': ('layer_with_weights-0/', 'layer_with_weights-1'),
    'backbone-weights': ('', None),
}


def bundle_of(path, model, kind='checkpoint', average=None, **kwargs):
    start, head = LAYOUTS[kind]

    def named(weights):
        return {
            (head + key.removeprefix('head') if key.startswith('head') else start + key): value
            for key, value in keras_paths(weights).items()
            if head or not key.startswith('head')
        }

    tensors = {key + VALUE: value for key, value in named(model.state_dict()).items()}
    tensors |= {
        f'{key}{SLOT}optimizer/base_optimizer/momentum{VALUE}': torch.zeros_like(value)
        for key, value in named(model.state_dict()).items()
    }
    if average:
        tensors |= {
            f'{key}{SLOT}optimizer/average{VALUE}': value
            for key, value in named(average.state_dict()).items()
        }
    extra = {
        'optimizer/learning_rate' + VALUE: torch.tensor(0.1),
        'ckpt_saved_iterations' + VALUE: torch.tensor(7),
        'save_counter' + VALUE: torch.tensor(1),
        '_CHECKPOINTABLE_OBJECT_GRAPH': [b'graph'],
    }
    return write_bundle(path, tensors | extra, names=lambda key: key, **kwargs)


@pytest.mark.parametrize('snappy, shards', [(False, 1), (True, 3)])
@pytest.mark.parametrize('kind', LAYOUTS)
@pytest.mark.parametrize('representation', [0, 48])
def test_every_kind_of_file(tmp_path, kind, representation, snappy, shards):
    model = noisy(vit(representation=representation))
    target = vit(seed=1, representation=representation)
    path = tmp_path / 'last_checkpoint.index'
    bundle_of(path, model, kind, snappy=snappy, shards=shards)
    report = load_weights(target, path)
    head = () if kind != 'backbone-weights' else ('head.weight', 'head.bias')
    assert (report.layout, report.missing, report.unexpected) == ('COYO-ViT', head, ())
    assert equal(
        {k: v for k, v in model.state_dict().items() if k not in head},
        {k: v for k, v in target.state_dict().items() if k not in head},
    )


@pytest.mark.parametrize('kind', ['checkpoint', 'model-weights'])
def test_averaged_weights(tmp_path, kind):
    model, average = noisy(vit()), noisy(vit(), seed=4)
    path = bundle_of(tmp_path / 'x.index', model, kind, average, snappy=True)
    assert equal(read_weights(path)[1], dict(model.state_dict()))
    assert equal(read_weights(path, use_ema=True)[1], dict(average.state_dict()))
    with pytest.raises(
        CheckpointError, match="'y.index' has no averaged weights; leave use_ema out"
    ):
        read_weights(bundle_of(tmp_path / 'y.index', model), use_ema=True)


def test_half_precision(tmp_path):
    model, target = noisy(vit()), vit(seed=1)
    for name, dtype in (('h', torch.float16), ('b', torch.bfloat16)):
        path = bundle_of(tmp_path / f'{name}.index', noisy(vit()).to(dtype), snappy=True)
        load_weights(target, path)
        assert target.head.weight.dtype == torch.float32
        rounded = {k: v.to(dtype).float() for k, v in model.state_dict().items()}
        assert equal(dict(target.state_dict()), rounded)


def test_a_damaged_tensor_is_named_and_the_model_left_alone(tmp_path):
    path = bundle_of(tmp_path / 'x.index', noisy(vit()))
    entry = open_bundle(path).entries['backbone/norm/gamma' + VALUE]
    data = tmp_path / 'x.data-00000-of-00001'
    content = bytearray(data.read_bytes())
    content[entry.offset + 5] ^= 4
    data.write_bytes(content)
    target = vit(seed=1)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(CheckpointError, match="damaged at 'backbone/norm/gamma"):
        load_weights(target, path)
    assert equal(before, dict(target.state_dict()))


def test_incomplete_files_are_refused(tmp_path):
    model = noisy(vit())
    whole = dict(open_bundle(bundle_of(tmp_path / 'x.index', model)))
    for lost, answer in (
        ('att/key_dense/bias', 'no key or value'),
        ('layernorm2/gamma', 'blocks.1.norm2.weight: not in the file'),
        ('backbone/pos_emb', 'pos_embed: not in the file'),
    ):
        gone = {key for key in whole if key.endswith(lost + VALUE) and '/0/' not in key}
        left = {key: value for key, value in whole.items() if key not in gone}
        assert gone
        path = write_bundle(tmp_path / 'y.index', left, names=lambda key: key)
        with pytest.raises(CheckpointError, match=answer):
            load_weights(vit(seed=1), path)


def test_another_depth_is_refused():
    with pytest.raises(CheckpointError, match=r'blocks.2.norm1.weight: not in the file'):
        load_weights(vit(depth=3), GOLDEN / 'coyo_ft.index')


# Hugging Face's ports


def as_hugging_face(weights, start='vit.'):
    found = {}
    for name, value in weights.items():
        parts = (
            zip(('query', 'key', 'value'), value.chunk(3), strict=True)
            if 'qkv' in name
            else [('', value)]
        )
        for part, piece in parts:
            key = name.replace('qkv', part)
            for old, new in reversed(HUGGING_FACE_NAMES):
                key = key.replace(new, old)
            found[key if key.startswith('classifier') else start + key] = piece.contiguous()
    return found


EXPECTED = [
    'vit.embeddings.cls_token',
    'vit.embeddings.position_embeddings',
    'vit.embeddings.patch_embeddings.projection.weight',
    'vit.layernorm.bias',
    'classifier.bias',
    *(
        f'vit.encoder.layer.1.{name}.weight'
        for name in (
            'attention.attention.query',
            'attention.attention.key',
            'attention.attention.value',
            'attention.output.dense',
            'intermediate.dense',
            'output.dense',
            'layernorm_before',
            'layernorm_after',
        )
    ),
]


@pytest.mark.parametrize(
    'start, name',
    [('vit.', 'pytorch_model.bin'), ('vit.', 'model.safetensors'), ('', 'pytorch_model.bin')],
)
def test_hugging_face(tmp_path, start, name):
    model, target = noisy(vit()), vit(seed=1)
    content = as_hugging_face(model.state_dict(), start)
    if start:
        assert set(EXPECTED) < content.keys() and len(content) == 4 * 2 + len(model.state_dict())
    if name.endswith('safetensors'):
        safetensors.torch.save_file(content, tmp_path / name)
    else:
        torch.save(content, tmp_path / name)
    report = load_weights(target, tmp_path / name, head='keep')
    assert (report.layout, report.missing, report.unexpected) == ('Hugging Face ViT', (), ())
    assert "COYO-ViT's is gelu_tanh" in repr(report)
    assert equal(dict(model.state_dict()), dict(target.state_dict()))


def test_hugging_face_folder(tmp_path):
    model, target = noisy(vit()), vit(seed=1)
    safetensors.torch.save_file(as_hugging_face(model.state_dict()), tmp_path / 'model.safetensors')
    assert load_weights(target, f'local-dir:{tmp_path}').layout == 'Hugging Face ViT'
    assert equal(dict(model.state_dict()), dict(target.state_dict()))


# The representation layer


def test_a_head_without_its_representation_layer_is_left_out(tmp_path):
    pretrained, plain = noisy(vit(representation=64)), vit(seed=1)
    path = save_checkpoint(
        tmp_path / 'last.pth.tar', pretrained, arch='coyo_vit_tiny_patch16_224', epoch=0
    )
    by_timm = create_model('vit_tiny_patch16_224', 10, 64, act_layer='gelu_tanh', **TINY)
    fate = '10 classes in the file on another representation layer, 10 in the model, fresh'
    for target in (plain, by_timm):
        before = target.head.weight.clone()
        report = load_weights(target, path)
        assert (report.head, report.missing) == (fate, ('head.weight', 'head.bias'))
        assert torch.equal(target.head.weight, before)
        ours, stored = (model.blocks[1].mlp.fc2.weight for model in (target, pretrained))
        assert torch.equal(ours, stored)
    with pytest.raises(
        CheckpointError, match='on another representation layer and 10 in the model'
    ):
        load_weights(plain, path, head='keep')


def test_a_representation_layer_is_not_invented(tmp_path):
    path = save_checkpoint(
        tmp_path / 'last.pth.tar', vit(), arch='coyo_vit_tiny_patch16_224', epoch=0
    )
    with pytest.raises(CheckpointError, match='pre_logits.fc.weight: not in the file'):
        load_weights(vit(representation=64), path)
    report = load_weights(vit(representation=64), path, partial=True)
    assert report.head.endswith('fresh')


def test_representation_of_another_width_is_refused(tmp_path):
    path = save_checkpoint(
        tmp_path / 'last.pth.tar', vit(representation=32), arch='coyo_vit_tiny_patch16_224', epoch=0
    )
    with pytest.raises(
        CheckpointError,
        match=r'pre_logits.fc.weight: \(32, 64\) in the file, \(48, 64\) in the model',
    ):
        load_weights(vit(representation=48), path)


def test_logits_with_a_representation_layer():
    model, images = noisy(vit(representation=48)).eval(), torch.randn(2, 3, 64, 64)
    assert isinstance(model.norm, torch.nn.LayerNorm)  # it is in the features
    features, layer, head = model.forward_features(images)[:, 0], model.pre_logits.fc, model.head
    represented = torch.tanh(features @ layer.weight.T + layer.bias)
    expected = represented @ head.weight.T + head.bias
    assert torch.allclose(model(images), expected, atol=1e-5) and model.head_hidden_size == 48
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    assert not model.head.weight.any() and model.head.weight.requires_grad
    model.reset_classifier(0)
    assert model(images).shape == (2, 48)


# The network


def test_head_bias_is_zero_as_it_ran_and_minus_ten_where_asked_for():
    def bias(**kwargs):
        return set(vit(**kwargs).head.bias.tolist())

    assert [
        bias(),
        bias(representation=32),
        bias(representation=32, head_bias=-10),
        bias(head_bias=-3),
    ] == [{0.0}, {0.0}, {-10.0}, {-3.0}]
    assert not vit(representation=32).head.weight.any()


def test_first_weights():
    model = create_coyo_vit('vit-s/16', 10, 64, representation=256, depth=1, seed=0)
    width, hidden = 384, 1536
    block = model.blocks[0]
    normal = {
        block.attn.qkv.weight: 2 * width,
        block.attn.proj.weight: 2 * width,
        block.mlp.fc1.weight: width + hidden,
    }
    uniform = {
        block.mlp.fc2.weight: width + hidden,
        model.pre_logits.fc.weight: width + 256,
        model.patch_embed.proj.weight: 256 * (3 + width),
    }
    for weight, fans in normal.items():
        std = (2 / fans) ** 0.5
        assert (
            abs(weight.std().item() / std - 1) < 0.01
            and 2.2 < weight.abs().max().item() / std <= 2 / 0.8796 + 1e-6
        )
    for weight, fans in uniform.items():
        limit = (6 / fans) ** 0.5
        assert (
            abs(weight.std().item() * 3**0.5 / limit - 1) < 0.01
            and 0.99 * limit < weight.abs().max().item() <= limit
        )
    assert not model.cls_token.any() and abs(model.pos_embed.std().item() / 0.02 - 1) < 0.05
    assert not any(
        layer.bias.any()
        for layer in (block.attn.qkv, block.attn.proj, model.patch_embed.proj, model.pre_logits.fc)
    )
    assert all(0 < layer.bias.abs().max() < 6e-6 for layer in (block.mlp.fc1, block.mlp.fc2))
    assert all(m.eps == 1e-6 for m in model.modules() if isinstance(m, torch.nn.LayerNorm))


def test_seeds():
    assert equal(
        dict(vit(seed=5).state_dict()), dict(vit(seed=5).state_dict())
    ) and not torch.equal(vit(seed=5).pos_embed, vit(seed=6).pos_embed)


@pytest.mark.parametrize(
    'name, width, patch',
    [
        ('vit-l/16', 1024, 16),
        ('vit-ti/16', 192, 16),
        ('ViT-B/32', 768, 32),
        ('vit-l/14', 1024, 14),
        ('coyo_vit_small_patch16_224', 384, 16),
    ],
)
def test_names(name, width, patch):
    with torch.device('meta'):
        model = create_coyo_vit(name, classes=5)
    assert (
        isinstance(model, CoyoViT)
        and (model.embed_dim, model.patch_embed.patch_size) == (width, (patch, patch))
        and model.head.bias.numel() == 5
    )


def test_size_of_the_published_network():
    with torch.device('meta'):
        model = create_coyo_vit('vit-l/16', 0, 224)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 303.30


@pytest.mark.parametrize('name', ['vit-xl/16', 'vit_large_patch16_224', 'vit-l'])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=f'model={name!r} is no COYO-ViT'):
        create_coyo_vit(name)


def test_dropout():
    model = vit(dropout=0.1)
    rates = [
        model.pos_drop.p,
        model.head_drop.p,
        *(
            p
            for b in model.blocks
            for p in (b.attn.proj_drop.p, b.attn.attn_drop.p, b.mlp.drop1.p, b.mlp.drop2.p)
        ),
    ]
    assert rates == [0.1, 0.0] + [0.1, 0.0, 0.1, 0.1] * 2


def test_exported_and_rebuilt(tmp_path):
    model = noisy(vit(representation=48)).eval()
    folder = export_model(tmp_path / 'gift', model, 'coyo_vit_tiny_patch16_224')
    assert 'import fdsl_nb.models.coyo_vit' in (folder / 'README.md').read_text('utf-8')
    again, images = (
        timm.create_model(f'local-dir:{folder}', pretrained=True).eval(),
        torch.randn(2, 3, 64, 64),
    )
    assert isinstance(again, CoyoViT) and torch.equal(again(images), model(images))
    assert (
        json.loads((folder / 'config.json').read_text('utf-8'))['architecture']
        == 'coyo_vit_tiny_patch16_224'
    )


@pytest.mark.process
@pytest.mark.parametrize(
    'asked',
    [
        "'coyo_vit_tiny_patch16_224', 10, 64, depth=1",
        "f'local-dir:{sys.argv[1]}', 10, 64, pretrained=True",
    ],
    ids=['name', 'folder'],
)
def test_known_to_a_program_that_imports_models_alone(tmp_path, asked):
    folder = export_model(tmp_path / 'gift', vit(), 'coyo_vit_tiny_patch16_224')
    code = (
        'import sys; from fdsl_nb.models.models import create_model; '
        f'print(type(create_model({asked})).__name__)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, str(folder)], check=False, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == ('CoyoViT', 0), done.stderr

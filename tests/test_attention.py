"""Attention: the published program's rollout, a model left as it was, many kinds of transformer,
refusals, and the widget driven in Python."""

import io
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from helpers import pixels
from fdsl_nb.app import explore
from fdsl_nb.app.attention import (
    as_input,
    attend,
    explore_attention,
    layer_maps,
    over_image,
    patch_map,
    rollout,
    show_attention,
    top_labels,
    watched,
)
from fdsl_nb.models.checkpoints import load_weights
from fdsl_nb.data.loading import DigitsDataset
from fdsl_nb.models.models import create_model

GOLDEN = Path(__file__).parent / 'golden'


def vit(name='vit_tiny_patch16_224', classes=10, size=32, **changed):
    return create_model(
        name,
        classes,
        size,
        seed=0,
        **dict(patch_size=8, embed_dim=32, depth=3, num_heads=2) | changed,
    )


def picture(height=40, width=50, mode='RGB'):
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ).convert(mode)


@pytest.mark.parametrize('size', [64, 96])
def test_rollout_is_that_of_vit_pytorch(size):
    given = np.load(GOLDEN / 'google_vit_tiny_io.npz')
    model = create_model('ViT-B_16', 30, size, embed_dim=64, depth=2, num_heads=4, mlp_ratio=2)
    load_weights(model, GOLDEN / 'google_vit_tiny.npz', resize='bilinear_corners')
    attention = attend(model, Image.fromarray(given[f'x{size}'][0]))
    joint = rollout(attention.layers)
    assert np.abs(patch_map(joint[-1], attention).ravel() - given[f'rollout{size}']).max() < 1e-5
    assert torch.allclose(joint.sum(-1), torch.ones(joint.shape[:2]), atol=1e-5)
    assert np.abs(attention.logits.numpy() - given[f'logits{size}'][0]).max() < 1e-5


def test_the_formula_in_numpy():
    layers = torch.rand(4, 3, 10, 10).softmax(-1)
    joint = np.eye(10)
    for n, heads in enumerate(layers.double().numpy()):
        step = heads.mean(0) + np.eye(10)
        joint = step / step.sum(1, keepdims=True) @ joint
        assert np.abs(rollout(layers)[n].numpy() - joint).max() < 1e-6


# The model is left as it was


def state(model):
    return [
        (
            m.training,
            getattr(m, 'fused_attn', None),
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
        )
        for m in model.modules()
    ], [v.clone() for v in model.state_dict().values()]


def same(a, b):
    return a[0] == b[0] and all(map(torch.equal, a[1], b[1]))


def test_nothing_is_left_behind():
    model = vit(attn_drop_rate=0.5).train()
    model.blocks[1].eval()
    model.blocks[2].attn.fused_attn = False
    before = state(model)
    first, second = attend(model, picture()), attend(model, picture())
    assert same(before, state(model)) and torch.equal(first.layers, second.layers)
    with pytest.raises(KeyError):
        with watched(model):
            raise KeyError
    assert same(before, state(model))
    with torch.no_grad():
        assert torch.allclose(model.eval()(as_input(model, picture()))[0], first.logits, atol=1e-5)


def test_wrapped_and_low_precision_models():
    model = vit().eval()
    wrapped = torch.nn.Module()
    wrapped.module = model
    compiled = torch.compile(
        model
    )  # made, never run: attention is read from the plain model inside
    assert torch.equal(
        attend(wrapped, picture()).layers, attend(model, picture()).layers
    ) and torch.equal(attend(compiled, picture()).layers, attend(model, picture()).layers)
    low = attend(vit().bfloat16(), picture())
    assert (
        low.layers.dtype == low.logits.dtype == torch.float32
        and (low.layers - attend(model, picture()).layers).abs().max() < 0.02
    )


# Which networks


@pytest.mark.parametrize(
    'name, changed, tokens, averages',
    [
        ('vit_tiny_patch16_224', {}, 17, False),
        ('vit_tiny_patch16_224', dict(global_pool='avg'), 17, True),
        ('deit_tiny_distilled_patch16_224', {}, 18, False),
        ('vit_medium_patch16_reg4_gap_256', {}, 20, True),
        ('vit_tiny_patch16_224', dict(reg_tokens=4), 21, False),
        ('eva02_tiny_patch14_224', {}, 17, True),
        ('beit_base_patch16_224', {}, 17, True),
    ],
)
def test_kinds_of_transformer(name, changed, tokens, averages):
    attention = attend(vit(name, **changed), picture())
    assert (
        attention.layers.shape == (3, 2, tokens, tokens)
        and attention.averages == averages
        and attention.grid == (4, 4)
    )
    joint = rollout(attention.layers)[-1]
    expected = joint[-16:, -16:].mean(0) if averages else joint[0, -16:]
    assert np.allclose(patch_map(joint, attention).ravel(), expected) and layer_maps(attention)[
        0
    ].shape == (3, 4, 4)


def test_hybrid_and_oblong_images():
    hybrid = create_model('R50-ViT-B_16', 10, 64, embed_dim=32, depth=2, num_heads=2)
    assert attend(hybrid, picture()).grid == (4, 4)
    oblong = vit(size=(16, 40))
    attention = attend(oblong, picture())
    assert (
        attention.grid == (2, 5)
        and layer_maps(attention)[1].shape == (3, 2, 5)
        and over_image(picture(), layer_maps(attention)[1][0]).shape == (40, 50, 3)
    )


@pytest.mark.parametrize(
    'name',
    [
        'resnet18',
        'swin_tiny_patch4_window7_224',
        'mixer_s16_224',
        'xcit_nano_12_p16_224',
        'pvt_v2_b0',
        'efficientnet_b0',
    ],
)
def test_other_networks_are_refused(name):
    with pytest.raises(
        ValueError,
        match='is no vision transformer whose every block attends to all patches; choose a vit_',
    ):
        attend(create_model(name, 10, 224), picture())


def test_two_maps_a_head_are_refused():
    with pytest.raises(ValueError, match=r'by maps of \[\(4, 17, 17\)\], not \[\(2, 17, 17\)\]'):
        attend(vit(attn_layer='diff'), picture())


# Pictures


def test_images_of_any_kind_become_the_same_input():
    model, grey = vit(), picture(mode='L')
    assert torch.equal(as_input(model, grey), as_input(model, grey.convert('RGB'))) and as_input(
        model, grey
    ).shape == (1, 3, 32, 32)
    small = picture(32, 32)
    assert torch.allclose(
        as_input(model, small)[0].permute(1, 2, 0),
        torch.tensor(np.array(small)) / 127.5 - 1,
        atol=1e-6,
    )
    assert torch.allclose(
        as_input(model, small, (0, 0, 0), (1, 1, 1))[0].permute(1, 2, 0),
        torch.tensor(np.array(small)) / 255,
    )


def test_over_image():
    image = Image.new('RGB', (4, 4), (200, 100, 50))
    dark = over_image(image, np.array([[1, 0], [0, 0]], np.float32))
    assert (
        dark.dtype == np.uint8
        and dark[0, 0].tolist() == [200, 100, 50]
        and dark[3, 3].tolist() == [0, 0, 0]
        and dark[0, 1].tolist() == [150, 75, 37]
    )


def test_top_labels():
    names = [f'name {i}' for i in range(10)]
    labels = top_labels(torch.arange(10.0), names)
    assert [name for name, _ in labels] == [
        'name 9',
        'name 8',
        'name 7',
        'name 6',
        'name 5',
    ] and abs(sum(p for _, p in top_labels(torch.arange(10.0), k=10)) - 1) < 1e-6
    assert len(top_labels(torch.zeros(3))) == 3


def test_figure():
    for depth in (1, 3):
        png = io.BytesIO()
        figure = show_attention(vit(depth=depth), picture(), [str(i) for i in range(10)])
        figure.savefig(png)
        assert [ax.get_title() for ax in figure.axes if ax.get_title()] == [
            'image',
            'rollout',
            *(f'layer {n}' for n in range(1, depth + 1)),
        ]


# The widget


def test_widget_shows_what_the_functions_give():
    model, digits = vit(), DigitsDataset('test')
    explorer = explore_attention(model, digits, first=3)
    assert (explorer.number.value, explorer.layer.value, explorer.layer.max) == (3, 3, 3)
    explorer.number.value, explorer.layer.value, explorer.way.value = 7, 2, 'alone'
    image, label = digits[7]
    expected = over_image(image, layer_maps(attend(model, image))[0][1])
    drawn = pixels(explorer.picture.value)
    assert np.array_equal(
        drawn,
        pixels(
            explore.png_bytes(explore.tiled([[np.array(image.convert('RGB')), expected]], side=300))
        ),
    )
    assert (
        explorer.labels.value.startswith(f'class {label}, answered')
        and top_labels(explorer.attention.logits)[0][0] in explorer.labels.value
    )
    explorer.way.value = 'joined'
    assert not np.array_equal(drawn, pixels(explorer.picture.value))


def test_still_where_nobody_watches(monkeypatch):
    class Few:
        classes = ['<b>', 'y']

        def __len__(self):
            return 3

        def __getitem__(self, i):
            return picture(), i % 2

    explorer = explore_attention(vit(classes=2), Few())
    assert '&lt;b&gt;' in explorer.labels.value and '<b>' not in explorer.labels.value.replace(
        '<br>', ''
    )
    assert 'image/png' in explorer._repr_mimebundle_() and pixels(explorer.still()).ndim == 3
    monkeypatch.setattr(explore, 'someone_watches', lambda: True)
    assert 'application/vnd.jupyter.widget-view+json' in explorer._repr_mimebundle_()


def test_widget_refuses_other_networks():
    with pytest.raises(ValueError, match='ResNet is no vision transformer'):
        explore_attention(create_model('resnet18', 10), DigitsDataset())

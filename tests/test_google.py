"""Google's and ViT-pytorch's files: published numbers, timm's own reader, and bad files."""

import random
from pathlib import Path
import numpy as np, pytest, torch
from helpers import equal
from fdsl_nb.models.checkpoints import CheckpointError, load_weights, read_checkpoint, read_weights
from fdsl_nb.models.google import google_shapes, vit_pytorch_dropout
from fdsl_nb.models.models import VIT_PYTORCH_NAMES, create_model

GOLDEN = Path(__file__).parent / 'golden'
SIZES = dict(depth=2, width=32, heads=4, hidden=48, patch=8, tokens=17)


def vit(img_size=32, classes=5, name='ViT-B_16', **changed):
    return create_model(
        name,
        classes,
        img_size,
        seed=1,
        **dict(patch_size=8, embed_dim=32, depth=2, num_heads=4, mlp_ratio=1.5) | changed,
    )


def arrays(**changed):
    rng = np.random.default_rng(0)
    return {
        k: rng.normal(0, 0.1, shape).astype(np.float32)
        for k, shape in google_shapes(**SIZES | dict(classes=5) | changed).items()
    }


@pytest.fixture
def file(tmp_path):
    np.savez(tmp_path / 'small.npz', **arrays())
    return tmp_path / 'small.npz'


# The published program


@pytest.mark.parametrize('size', [64, 96])
def test_logits_and_positions_are_those_of_vit_pytorch(size):
    given = np.load(GOLDEN / 'google_vit_tiny_io.npz')
    model = create_model('ViT-B_16', 30, size, embed_dim=64, depth=2, num_heads=4, mlp_ratio=2)
    report = load_weights(
        model, GOLDEN / 'google_vit_tiny.npz', resize='bilinear_corners', head='keep'
    )
    assert (report.layout, report.missing, report.unexpected) == ('Google', (), ())
    assert np.abs(model.pos_embed.detach().numpy() - given[f'pos{size}']).max() < 1e-5
    images = (torch.from_numpy(given[f'x{size}']).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.no_grad():
        logits = model.eval()(images)
    assert np.abs(logits.numpy() - given[f'logits{size}']).max() < 1e-5


def test_other_ways_to_resize_give_other_positions():
    given = np.load(GOLDEN / 'google_vit_tiny_io.npz')['pos96']
    for resize in ('bilinear', 'bicubic'):
        model = create_model('ViT-B_16', 30, 96, embed_dim=64, depth=2, num_heads=4, mlp_ratio=2)
        load_weights(model, GOLDEN / 'google_vit_tiny.npz', resize=resize)
        assert np.abs(model.pos_embed.detach().numpy() - given).max() > 1e-3


@pytest.mark.parametrize(
    'name, published',
    [*zip(VIT_PYTORCH_NAMES, (85.8, 87.5, 303.4, 305.5, 630.8, 97.96), strict=True)],
)
def test_published_sizes(name, published):
    with torch.device('meta'):
        model = create_model(name, 0)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - published) < 0.12


# timm's own reader


@pytest.mark.parametrize('size', [32, 48])
def test_equal_to_timm(file, size):
    ours, theirs = vit(size), vit(size)
    load_weights(ours, file, resize='bilinear')
    theirs.load_pretrained(str(file))
    assert equal(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize('idle_axes', [False, True])
def test_hybrid_is_equal_to_timm(tmp_path, idle_axes):
    changed = dict(name='R50-ViT-B_16', patch_size=1, img_size=64)
    stored = arrays(hybrid=True, patch=1)
    if idle_axes:
        stored |= {k: v.reshape(1, 1, 1, 64) for k, v in stored.items() if k.startswith('gn_root')}
    np.savez(tmp_path / 'hybrid.npz', **stored)
    ours, theirs = vit(**changed), vit(**changed)
    assert load_weights(ours, tmp_path / 'hybrid.npz', head='keep').loaded == len(ours.state_dict())
    theirs.load_pretrained(str(tmp_path / 'hybrid.npz'))
    assert equal(ours.state_dict(), theirs.state_dict())
    larger = vit(**changed | dict(img_size=96))
    assert load_weights(larger, tmp_path / 'hybrid.npz', resize='bilinear').resized == (
        ('position embedding', (4, 4), (6, 6)),
    )


def test_optimizer_states_and_half_precision(tmp_path, file):
    stored = {f'opt/target/{k}': v.astype(np.float16) for k, v in arrays().items()}
    np.savez_compressed(tmp_path / 'opt.npz', **stored, **{'opt/state/step': np.array(7)})
    _, weights = read_weights(tmp_path / 'opt.npz')
    assert all(torch.equal(v, read_weights(file)[1][k].half().float()) for k, v in weights.items())


# Heads


def test_head_of_other_classes(file):
    kept, zeroed, fresh = vit(), vit(classes=7), vit(classes=7)
    assert load_weights(kept, file).head == 'kept, 5 classes'
    assert np.array_equal(kept.head.weight.detach().numpy(), arrays()['head/kernel'].T)
    assert (
        load_weights(zeroed, file, head='zero').head.endswith('zeroed')
        and not zeroed.head.weight.any()
        and not zeroed.head.bias.any()
    )
    before = fresh.head.weight.clone()
    assert load_weights(fresh, file).head.endswith('fresh') and torch.equal(
        fresh.head.weight, before
    )


def test_head_behind_pre_logits_is_left(tmp_path):
    np.savez(tmp_path / 'in21k.npz', **arrays(pre_logits=True))
    model = vit()
    before = model.head.weight.clone()
    assert (
        load_weights(model, tmp_path / 'in21k.npz').head
        == 'none in the file, 5 in the model, fresh'
    )
    assert torch.equal(model.head.weight, before)


# Refusals; the model stays as it was


def test_other_models_are_refused(file):
    for changed, said in [
        (dict(num_heads=2), 'has 4 attention heads'),
        (dict(depth=3), 'blocks.2.norm1.weight: not in the file'),
        (dict(depth=1), 'blocks.1.norm1.weight: not in the model'),
        (dict(embed_dim=64), '(1, 1, 32) in the file, (1, 1, 64) in the model'),
        (dict(mlp_ratio=2), '(64, 32) in the model'),
    ]:
        model = vit(**changed)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(CheckpointError) as e:
            load_weights(model, file)
        assert said in str(e.value) and equal(before, model.state_dict())
    with pytest.raises(CheckpointError, match='no name in common|not in the'):
        load_weights(create_model('resnet18', 5), file)


def bad_files():
    whole = arrays()

    def without(part):
        return {k: v for k, v in whole.items() if part not in k}

    def other(key, value):
        return whole | {key: value}

    yield (
        dict(a=np.zeros(3), b=np.ones(2)),
        "holds 'a', 'b': no file of Google's ViT, which has embedding/kernel",
    )
    yield {}, 'holds nothing'
    yield without('posembed'), 'which has Transformer/posembed_input/pos_embedding'
    yield (
        without('encoderblock_1/LayerNorm_2/bias'),
        'Transformer/encoderblock_1/LayerNorm_2/bias: not in the file',
    )
    yield without('encoderblock_0'), 'which has Transformer/encoderblock_0'
    yield without('head/kernel'), 'head/kernel: not in the file'
    yield other('cls', np.zeros((1, 1, 16), np.float32)), r'cls: (1, 1, 16), expected (1, 1, 32)'
    yield (
        other('Transformer/posembed_input/pos_embedding', np.zeros((1, 16, 32), np.float32)),
        '16 are no class token and a square grid',
    )
    yield other('embedding/bias', np.zeros(32, np.int64)), 'embedding/bias: of type int64'
    yield other('more', np.zeros(3, np.float32)), 'more: not known'
    yield other('embedding/kernel', np.array(None, object)), 'damaged or no archive'
    yield {f'params/{k}': v for k, v in whole.items()}, 'big_vision'


@pytest.mark.parametrize(
    'stored, said', [*bad_files()], ids=lambda value: value if isinstance(value, str) else ''
)
def test_what_is_no_such_file_is_refused(tmp_path, stored, said):
    np.savez(tmp_path / 'bad.npz', **stored)
    with pytest.raises(CheckpointError) as e:
        read_checkpoint(tmp_path / 'bad.npz')
    assert said in str(e.value) and "'bad.npz'" in str(e.value)


def test_truncated_anywhere(file):
    data = file.read_bytes()
    for length in random.Random(0).sample(range(1, len(data)), 60):
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="'small.npz'"):
            load_weights(vit(), file)
    file.write_bytes(b'')
    with pytest.raises(CheckpointError, match='is empty'):
        load_weights(vit(), file)


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed], ids=['stored', 'compressed'])
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, save):
    path, chance, refused = tmp_path / 'small.npz', random.Random(1), 0
    save(path, **arrays())
    data, whole = path.read_bytes(), read_checkpoint(path)
    # the table of contents at the end is small; flip there as often as among the numbers
    for place in [chance.randrange(len(data)) for _ in range(100)] + [
        len(data) - 1 - chance.randrange(4000) for _ in range(100)
    ]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        try:
            assert equal(read_checkpoint(path), whole)
        except CheckpointError as e:
            assert "'small.npz'" in str(e)
            refused += 1
    assert refused > 120


def test_a_text_under_that_name(tmp_path):
    (tmp_path / 'page.npz').write_text('<!DOCTYPE html>')
    with pytest.raises(CheckpointError, match="'page.npz' is damaged or no archive"):
        read_checkpoint(tmp_path / 'page.npz')


# ViT-pytorch's .bin


def vit_pytorch_bin(path, stored, **extra):
    "ViT-pytorch's dictionary, made from Google's arrays as that program does it."
    t, found = torch.from_numpy, {}
    for i in range(SIZES['depth']):
        google, theirs = f'Transformer/encoderblock_{i}/', f'transformer.encoder.layer.{i}.'
        for part in ('query', 'key', 'value', 'out'):
            kernel, bias = (
                t(stored[f'{google}MultiHeadDotProductAttention_1/{part}/{k}'])
                for k in ('kernel', 'bias')
            )
            found |= {
                f'{theirs}attn.{part}.weight': kernel.reshape(32, 32).T.contiguous(),
                f'{theirs}attn.{part}.bias': bias.reshape(-1),
            }
        for norm, n in (('attention_norm', 0), ('ffn_norm', 2)):
            found |= {
                f'{theirs}{norm}.weight': t(stored[f'{google}LayerNorm_{n}/scale']),
                f'{theirs}{norm}.bias': t(stored[f'{google}LayerNorm_{n}/bias']),
            }
        for n in (0, 1):
            found |= {
                f'{theirs}ffn.fc{n + 1}.weight': t(
                    stored[f'{google}MlpBlock_3/Dense_{n}/kernel']
                ).T.contiguous(),
                f'{theirs}ffn.fc{n + 1}.bias': t(stored[f'{google}MlpBlock_3/Dense_{n}/bias']),
            }
    top = 'transformer.embeddings.'
    found |= {
        f'{top}patch_embeddings.weight': t(stored['embedding/kernel'])
        .permute(3, 2, 0, 1)
        .contiguous(),
        f'{top}patch_embeddings.bias': t(stored['embedding/bias']),
        f'{top}position_embeddings': t(stored['Transformer/posembed_input/pos_embedding']),
        f'{top}cls_token': t(stored['cls']),
        'transformer.encoder.encoder_norm.weight': t(stored['Transformer/encoder_norm/scale']),
        'transformer.encoder.encoder_norm.bias': t(stored['Transformer/encoder_norm/bias']),
        'head.weight': t(stored['head/kernel']).T.contiguous(),
        'head.bias': t(stored['head/bias']),
    }
    torch.save(found | extra, path)


@pytest.mark.parametrize('wrapper', ['', 'module.'])
def test_vit_pytorchs_file_is_the_same_network(tmp_path, file, wrapper):
    vit_pytorch_bin(tmp_path / 'cifar10_checkpoint.bin', arrays())
    if wrapper:
        torch.save(
            {wrapper + k: v for k, v in torch.load(tmp_path / 'cifar10_checkpoint.bin').items()},
            tmp_path / 'cifar10_checkpoint.bin',
        )
    a, b = vit(), vit()
    assert load_weights(a, tmp_path / 'cifar10_checkpoint.bin', head='keep').layout == 'ViT-pytorch'
    load_weights(b, file)
    assert equal(a.state_dict(), b.state_dict())


def test_vit_pytorchs_hybrid_and_incomplete_files_are_refused(tmp_path):
    vit_pytorch_bin(
        tmp_path / 'hybrid.bin',
        arrays(),
        **{'transformer.embeddings.hybrid_model.root.conv.weight': torch.zeros(1)},
    )
    with pytest.raises(CheckpointError, match="hybrid of ViT-pytorch"):
        load_weights(vit(), tmp_path / 'hybrid.bin')
    vit_pytorch_bin(tmp_path / 'whole.bin', arrays())
    whole = torch.load(tmp_path / 'whole.bin')
    for lost, said in (
        ('transformer.encoder.layer.1.attn.key.weight', 'has no key or value'),
        ('transformer.encoder.layer.1.ffn.fc2.bias', 'blocks.1.mlp.fc2.bias: not in the file'),
    ):
        torch.save({k: v for k, v in whole.items() if k != lost}, tmp_path / 'part.bin')
        with pytest.raises(CheckpointError, match=said):
            load_weights(vit(), tmp_path / 'part.bin')


# Dropout


def test_dropout_is_where_vit_pytorch_has_it():
    model = vit_pytorch_dropout(vit(proj_drop_rate=0.3, attn_drop_rate=0.2))
    rates = {n: m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {n for n, p in rates.items() if p} == {
        'pos_drop',
        *(f'blocks.{i}.mlp.drop{d}' for i in (0, 1) for d in (1, 2)),
    }
    assert {p for p in rates.values() if p} == {0.1}
    images = torch.randn(2, 3, 32, 32)
    plain = vit().eval()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.eval()(images), plain(images)) and not torch.equal(
        model.train()(images), plain(images)
    )


def test_dropout_refusals():
    with pytest.raises(ValueError, match='ResNet is no ViT'):
        vit_pytorch_dropout(create_model('resnet18', 5))
    with pytest.raises(ValueError, match='dropout=1.0'):
        vit_pytorch_dropout(vit(), 1.0)

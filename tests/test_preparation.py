"""Weights of other programs are measured under those programs' own preparation of images."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_coyo_vit import as_hugging_face
from test_google import arrays, vit_pytorch_bin
from torch.nn import functional as F
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from fdsl_nb.app.runs import configuration
from fdsl_nb.core.folder import RunFolder
from fdsl_nb.models.checkpoints import load_weights, read_data_config
from fdsl_nb.models.models import create_model
from fdsl_nb.training.validation import evaluation_config, run_evaluation

GOLDEN = Path(__file__).parent / 'golden'
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = dict(patch_size=8, embed_dim=32, depth=2, num_heads=4, mlp_ratio=1.5)
HALF = T.Normalize((0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Folders of 5, 10 and 30 classes with two colour images each, none of them square."
    rng = np.random.default_rng(3)
    roots = {}
    for classes in (5, 10, 30):
        roots[classes] = tmp_path_factory.mktemp(f'classes{classes}')
        for c in range(classes):
            folder = roots[classes] / 'val' / f'{c:02d}'
            folder.mkdir(parents=True)
            for k in range(2):
                coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
                coarse.resize((90 + c, 70 - k), Image.BICUBIC).save(folder / f'{k}.png')
    return roots


def google(tmp_path):
    return GOLDEN / 'google_vit_tiny.npz'


def coyo(tmp_path):
    return GOLDEN / 'coyo_ft.index'


def vit_pytorch(tmp_path):
    vit_pytorch_bin(tmp_path / 'cifar10_checkpoint.bin', arrays())
    return tmp_path / 'cifar10_checkpoint.bin'


def small_weights():
    return create_model('deit_tiny_patch16_224', 5, 32, seed=4, **SMALL).state_dict()


def by_timm(tmp_path, **said):
    "What CVPR 2022's programs write: timm's layout, with the arguments of the run."
    args = Namespace(**dict(mean=None, std=None, crop_pct=None, interpolation='', lr=0.1) | said)
    stored = dict(state_dict=small_weights(), arch='deit_tiny_patch16_224', args=args)
    torch.save(stored, tmp_path / 'model_best.pth.tar')
    return tmp_path / 'model_best.pth.tar'


def told_otherwise(tmp_path):
    return by_timm(tmp_path, crop_pct=1.0, mean=[0.5] * 3, std=(0.5,) * 3, interpolation='bilinear')


def by_deit(tmp_path):
    torch.save(dict(model=small_weights()), tmp_path / 'deit.pth')
    return tmp_path / 'deit.pth'


def hugging_face(tmp_path):
    "COYO-ViT's port: the same network under transformers' names."
    model = create_model('coyo_vit_tiny_patch16_224', 10, 64, **OF_64)
    load_weights(model, GOLDEN / 'coyo_ft.index', head='keep')
    torch.save(as_hugging_face(model.state_dict()), tmp_path / 'pytorch_model.bin')
    return tmp_path / 'pytorch_model.bin'


def squashed(size):
    return T.Compose([T.Resize((size, size), InterpolationMode.BILINEAR), T.ToTensor(), HALF])


def resized_by_tensorflow(size):
    "tf.image.resize to a square: bilinear, no antialias."

    def prepare(image):
        pixels = torch.from_numpy(np.float32(image)).permute(2, 0, 1)[None]
        return (F.interpolate(pixels, (size, size), mode='bilinear')[0] - 127.5) / 127.5

    return prepare


def cropped(resized, size, kind, mean, std):
    shape = T.Compose([T.Resize(resized, kind), T.CenterCrop(size)])
    return T.Compose([shape, T.ToTensor(), T.Normalize(mean, std)])


BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
OF_64 = dict(embed_dim=64, depth=2, num_heads=4, mlp_ratio=2)
# file, classes, model, its options, preparation by hand, pixels
FILES = dict(
    google=(google, 30, 'ViT-B_16', OF_64, squashed(64), 64),
    vit_pytorch=(vit_pytorch, 5, 'ViT-B_16', SMALL, squashed(32), 32),
    hugging_face=(
        hugging_face,
        10,
        'coyo_vit_tiny_patch16_224',
        OF_64,
        resized_by_tensorflow(64),
        64,
    ),
    coyo=(coyo, 10, 'coyo_vit_tiny_patch16_224', OF_64, resized_by_tensorflow(64), 64),
    timm=(
        by_timm,
        5,
        'deit_tiny_patch16_224',
        SMALL,
        cropped(35, 32, BICUBIC, *IMAGENET),
        32,
    ),
    timm_told=(
        told_otherwise,
        5,
        'deit_tiny_patch16_224',
        SMALL,
        cropped(32, 32, BILINEAR, (0.5,) * 3, (0.5,) * 3),
        32,
    ),
    deit=(
        by_deit,
        5,
        'deit_tiny_patch16_224',
        SMALL,
        cropped(36, 32, BICUBIC, *IMAGENET),
        32,
    ),
)


def losses_by_hand(path, model, prepare, root):
    load_weights(model, path, head='keep')
    losses, right = [], 0
    for label, folder in enumerate(sorted((root / 'val').iterdir())):
        for file in sorted(folder.iterdir()):
            with torch.no_grad():
                logits = model.eval()(prepare(Image.open(file))[None])
            losses.append(F.cross_entropy(logits, torch.tensor([label])).item())
            right += logits.argmax().item() == label
    return losses, right


@pytest.mark.parametrize('name', FILES)
def test_the_documented_command_measures_as_the_program_does(name, pictures, tmp_path):
    write, classes, model, options, prepare, size = FILES[name]
    path, root = write(tmp_path), pictures[classes]
    given = dict(weights=str(path), model=model, model_kwargs=options, dataset=str(root))
    found = run_evaluation(configuration('evaluate', given, RunFolder(tmp_path / 'run')))
    with np.load(tmp_path / 'run' / 'answers.npz') as answers:
        measured = answers['losses']
    made = create_model(model, classes, size, **options)
    losses, right = losses_by_hand(path, made, prepare, root)
    assert found['images'] == 2 * classes and found['correct'] == right
    assert measured == pytest.approx(losses, abs=2e-5)


def values(path, **given):
    config = evaluation_config(dict(weights=str(path), dataset='digits') | given)
    return {k: (v.value, v.source) for k, v in config.items()}


def test_what_is_given_wins(tmp_path):
    path = vit_pytorch(tmp_path)
    found = values(path, model='ViT-B_16')
    assert found['img_size'] == (32, 'as ViT-pytorch')
    assert found['crop_mode'] == ('squash', 'as ViT-pytorch')
    transform = dict(mean=[0.1] * 3, crop_mode='center')
    found = values(path, model='ViT-B_16', img_size=64, transform=transform)
    assert found['img_size'] == (64, 'parameter')
    assert found['crop_mode'] == ('center', 'parameter')
    assert found['std'] == ((0.5,) * 3, 'as ViT-pytorch')


def test_arguments_that_are_none_are_passed_over(tmp_path):
    path = by_timm(tmp_path, mean='red', crop_pct='all', std=['a'] * 3, interpolation='linear')
    assert read_data_config(path, 'deit_tiny_patch16_224') == (
        'timm',
        dict(
            mean=IMAGENET[0],
            std=IMAGENET[1],
            interpolation='bicubic',
            crop_pct=0.9,
            crop_mode='center',
            img_size=32,
        ),
    )


def test_coyo_with_its_representation_layer_is_measured_on_the_centre(tmp_path):
    model = create_model('coyo_vit_tiny_patch16_224', 5, 32, representation=16, **SMALL)
    torch.save(model.state_dict(), tmp_path / 'coyo.pth')
    _, found = read_data_config(tmp_path / 'coyo.pth', 'coyo_vit_tiny_patch16_224')
    assert (found['train_crop_mode'], found['crop_mode']) == ('inception', 'center')
    assert (found['crop_pct'], found['img_size']) == (0.875, 32)


def test_networks_without_position_embeddings_have_timms_size(tmp_path):
    model = create_model('resnet18', 5, channels=(8, 16, 16, 32))
    torch.save(model.state_dict(), tmp_path / 'resnet.pth')
    found = values(tmp_path / 'resnet.pth', model='resnet18')
    assert found['img_size'] == (224, 'default')
    assert found['mean'] == (IMAGENET[0], 'as weights')

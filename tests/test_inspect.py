"""`fdsl inspect`: what it counts, on images where the answer is known."""

import numpy as np
import pandas as pd
import pytest

from fdsl_nb.app.cli import main
from fdsl_nb.app.inspect import (
    compactness,
    drawn_figures,
    ink_of,
    rank_correlations,
    sample_images,
)
from fdsl_nb.formulas.formula import formula


def test_ink_is_what_is_not_background():
    images = np.zeros((3, 10, 10), np.uint8)
    images[1, :2] = 200
    images[2] = 255
    images[2, 0, 0] = 0
    assert ink_of(images).tolist() == [0.0, 0.2, 0.01]


def test_blank_and_repeated():
    images = np.zeros((2, 2, 16, 16), np.uint8)
    images[0, 0, :8] = images[1, 0, :8] = 9
    images[1, 1, 0, :3] = 1
    found = drawn_figures(images)
    assert (found['images'], found['blank'], found['repeated']) == (4, 0.25, 0.25)


def test_compactness_is_zero_for_classes_of_one_image_and_one_without_classes():
    rng = np.random.default_rng(0)
    apart = np.repeat(rng.integers(0, 256, (20, 1, 16, 16), np.uint8), 5, 1)
    assert compactness(apart) == 0
    assert compactness(rng.integers(0, 256, (20, 5, 16, 16), np.uint8)) == pytest.approx(
        1, abs=0.02
    )
    assert compactness(apart[:, :1]) is None


def test_sample_is_spread_over_the_classes():
    f = formula('rcdb', classes=100, instances=3, size=32)
    images = sample_images(f, classes=5, instances=8)
    assert images.shape == (5, 3, 32, 32)
    assert np.array_equal(images[-1, 2], f.render(99, 2))


def test_the_command(capsys):
    main(['inspect', 'rcdb', '--no-training', '-p', 'classes', '4', '-p', 'vertices_max', '50'])
    text = capsys.readouterr().out
    assert 'images looked at' in text and 'learnt' not in text


@pytest.mark.parametrize(
    'words, said',
    [(['rcbd'], "did you mean 'rcdb'"), (['rcdb', '-p', 'clases', '4'], "did you mean 'classes'")],
)
def test_slips(words, said):
    with pytest.raises(SystemExit, match=said):
        main(['inspect', *words, '--no-training'])


def test_rank_correlations_leave_out_what_does_not_vary():
    table = pd.DataFrame(
        dict(
            images=[64] * 5,
            blank=[0.0] * 5,
            compactness=[None, None, 0.1, 0.2, 0.3],
            learnt=[0.1, 0.2, 0.3, 0.5, 0.4],
            top1=[10, 20, 30, 40, 50],
        )
    )
    found = rank_correlations(table)
    assert found.round(6).to_dict() == {'learnt': 0.9}

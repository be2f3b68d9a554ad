"The shipped tables of accepted candidates give what a search from the beginning gives."

import json
from pathlib import Path

import numpy as np
import pytest

from fdsl_nb.core.rng import NumpyRandom
from fdsl_nb.formulas import categories, ifs3d, ifs_search
from fdsl_nb.formulas.categories import category_cache, save_skips, words_to_skip

GOLDEN = json.loads((Path(__file__).parent / 'golden/fractaldb.json').read_text())
CACHES = dict(
    fractaldb=category_cache('fractaldb', seed=0, rate=0.2, points=100_000),
    fractals3d=category_cache('fractals3d', seed=0, variance=0.05, points=10_000, half_side=1.0),
)


def forget():
    ifs_search._found.clear()
    ifs_search.published_categories.cache_clear()
    ifs3d.canonical_system.cache_clear()


@pytest.fixture(autouse=True)
def nothing_found(own_data_root):
    forget()
    yield
    forget()


def found(family, classes):
    if family == 'fractaldb':
        return [ifs_search.canonical_category(0, int(c)) for c in classes]
    return [ifs3d.canonical_system(0, int(c)) for c in classes]


def compare(family, sample, monkeypatch):
    "Categories by the table, and by a search that begins at the beginning."
    known = categories._known_skips(family, CACHES[family].settings)
    classes = np.random.default_rng(14).choice(len(known), sample, replace=False)
    by_table = found(family, classes)
    forget()
    for module in (ifs_search, ifs3d):
        monkeypatch.setattr(module, 'words_to_skip', lambda *_: 0)
    for ours, theirs in zip(by_table, found(family, classes), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize('family', CACHES)
def test_a_sample_searched_anew(family, monkeypatch):
    compare(family, 20, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize('family', CACHES)
def test_a_larger_sample_searched_anew(family, monkeypatch):
    compare(family, 1000, monkeypatch)


def test_published_categories_are_found_at_once(monkeypatch):
    published = [np.array(maps) for _, maps in sorted(GOLDEN['categories'].items())]
    tried = []
    real = ifs_search.fill_share
    monkeypatch.setattr(ifs_search, 'fill_share', lambda *a: tried.append(1) or real(*a))
    for ours, theirs in zip(
        ifs_search.published_categories().upto(len(published)), published, strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert len(tried) == len(published)


@pytest.mark.slow
def test_published_categories_searched_anew(own_data_root):
    by_table = ifs_search.published_categories().upto(300)
    for ours, theirs in zip(by_table, ifs_search.search_categories(300), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_no_other_search_uses_a_table():
    assert words_to_skip(CACHES['fractaldb'], 7) > 0
    for other in (dict(seed=1), dict(rate=0.21), dict(points=99_999)):
        settings = dict(seed=0, rate=0.2, points=100_000) | other
        assert words_to_skip(category_cache('fractaldb', **settings), 7) == 0
    assert words_to_skip(CACHES['fractaldb'], 10**6) == 0


def test_a_table_is_small_and_whole():
    tables = list(categories.TABLES.glob('*.npz'))
    assert len(tables) == 3 and sum(t.stat().st_size for t in tables) < 200_000


def test_a_table_is_read_as_it_was_written(tmp_path, monkeypatch):
    cache = category_cache('toy', seed=3)
    save_skips(tmp_path / 'toy.npz', cache, np.arange(5) * 10**9 % 2**32)
    monkeypatch.setattr(categories, 'TABLES', tmp_path)
    assert words_to_skip(cache, 4) == 4 * 10**9
    stream = NumpyRandom(1)
    stream.skip(words_to_skip(cache, 0))
    assert stream.random_sample() == NumpyRandom(1).random_sample()

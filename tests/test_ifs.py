"""FractalDB, 2D-OFDB and 1p-frac: the published pixels, our own, and what must be refused."""

import json, os, subprocess, sys, tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
import pytest
from helpers import sha
from fdsl_nb.formulas import categories, ifs_search
from fdsl_nb.formulas.categories import (
    CategoryStream,
    category_cache,
    load_categories,
    save_categories,
    search_parallel,
)
from fdsl_nb.formulas.chaos import COLUMNS, play, render_ifs
from fdsl_nb.formulas.ifs import (
    FractalDB,
    OFDB2D,
    OnePFrac,
    flipped,
    sample_system,
    search_categories,
    weight_table,
    with_probabilities,
)
from fdsl_nb.core.rng import NumpyRandom, PythonRandom

GOLDEN = Path(__file__).parent / 'golden'
FRACTALDB, ONEPFRAC, CANONICAL = (
    json.loads((GOLDEN / f'{name}.json').read_text())
    for name in ('fractaldb', 'onepfrac', 'ifs_canonical')
)
PUBLISHED = [np.array(maps) for _, maps in sorted(FRACTALDB['categories'].items())]
SMALL = dict(size=64, points=4000)


@pytest.fixture(autouse=True)
def nothing_found(own_data_root, monkeypatch):
    "Each test searches for itself: nothing from disk, nothing from memory, nothing left behind."
    monkeypatch.setattr(ifs_search, '_found', {})
    ifs_search.published_categories.cache_clear()
    yield
    ifs_search.published_categories.cache_clear()


# The published programs


def test_search_finds_the_published_categories():
    for ours, theirs in zip(search_categories(4), PUBLISHED):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_search_finds_all_sixty():
    for ours, theirs in zip(search_categories(60), PUBLISHED, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    'item', FRACTALDB['items'], ids=lambda i: f'{i["cls"]}-{i["draw_type"]}-flip{i["flip"]}'
)
def test_fractaldb_pixels(item):
    image = render_ifs(
        PUBLISHED[item['cls']],
        item['weights'],
        item['image_size'],
        item['iteration'],
        item['draw_type'],
        PythonRandom(item['python_random_seed']),
    )
    assert sha(flipped(image, item['flip'])) == item['sha256']


def test_game_is_the_plain_loop_to_the_last_bit():
    "Pixels forgive a rounding; the next machine's pixels may not."
    maps, picks, point, points = (
        PUBLISHED[3],
        np.random.RandomState(100).random_sample(3000),
        (0.0, 0.0),
        [(0.0, 0.0)],
    )
    for pick in picks[:-1].tolist():
        a, b, c, d, e, f, _ = maps[np.searchsorted(np.cumsum(maps[:, 6]), pick)].tolist()
        point = point[0] * a + point[1] * b + e, point[0] * c + point[1] * d + f
        points.append(point)
    np.testing.assert_array_equal(np.array(play(maps, picks)[:2]).T, points)


def test_weight_tables():
    np.testing.assert_array_equal(weight_table(0.4), FRACTALDB['weights_0_4'])
    assert weight_table(0.5)[0, 0] == 0.01 and weight_table(0.0125)[24, 5] == 1.025


@pytest.mark.parametrize('item', ONEPFRAC['items'], ids=lambda i: str(i['python_random_seed']))
def test_onepfrac_systems_and_pixels(item):
    system, sigma = sample_system(
        item['affine_maps'], item['sigma'], np.random.default_rng(item['numpy_default_rng_seed'])
    )
    # the last bit of a sine or a product is the processor's
    np.testing.assert_allclose(system, item['base'], rtol=0, atol=1e-15)
    np.testing.assert_allclose(with_probabilities(system), item['params'], rtol=0, atol=1e-15)
    assert sigma == item['sigma_drawn']
    f = OnePFrac(
        classes=1,
        seed=item['numpy_default_rng_seed'],
        size=item['image_size'],
        points=item['iteration'],
        maps=item['affine_maps'],
        sigma=item['sigma'],
        delta=item['delta'],
        mask_mode=item['mask_mode'],
        pixel_threshold=item['pixel_threshold'],
    )
    first = next(f.reference(stream_seed=item['python_random_seed']))
    assert sha(first.image) == item['sha256'] and first.file == '00/00_00_count_0_flip0.png'


def test_reference_goes_through_weights_draws_and_flips():
    "Order, names and stream of the published loop, also where only some instances are asked for."
    rng, expected = PythonRandom(3), []
    for c in range(2):
        for row in range(25):
            for count in range(2):
                image = render_ifs(
                    PUBLISHED[c], weight_table(0.4)[row], 48, 1000, 'patch_gray', rng
                )
                expected += [
                    (
                        c,
                        f'{c:05d}/{c:05d}_{row:02d}_count_{count}_flip{flip}.png',
                        sha(flipped(image, flip)),
                    )
                    for flip in range(4)
                ]
    whole = FractalDB(classes=2, instances=200, size=48, points=1000, seed=3)
    assert [(s.cls, s.file, sha(s.image)) for s in whole.reference()] == expected
    part = FractalDB(classes=2, instances=130, size=48, points=1000, seed=3)
    assert [(s.cls, s.file, sha(s.image)) for s in part.reference()] == expected[:130] + expected[
        200:330
    ]
    assert [s.instance for s in part.reference()] == [*range(130)] * 2


def test_ofdb_reference_is_the_first_image():
    rng = PythonRandom(0)
    for c, s in enumerate(OFDB2D(classes=3, **SMALL).reference()):
        assert (s.cls, s.instance, s.file) == (c, 0, f'{c:05d}/{c:05d}_00_count_0_flip0.png')
        np.testing.assert_array_equal(
            s.image, render_ifs(PUBLISHED[c], weight_table(0.4)[0], 64, 4000, 'patch_gray', rng)
        )


def test_onepfrac_reference_runs_on():
    samples = list(OnePFrac(classes=3, **SMALL).reference())
    assert [s.file for s in samples] == [
        f'{c:02d}/{c:02d}_{c:02d}_count_0_flip0.png' for c in range(3)
    ]
    assert len({sha(s.image) for s in samples}) == 3


def test_from_flags():
    assert FractalDB.from_flags() == FractalDB(
        size=512, points=100_000, weight=0.1, categories='published'
    )
    assert (
        FractalDB.from_flags(
            instance=100, weight_csv='weights/weights_0.2.csv', save_root='out'
        ).instances
        == 10_000
    )
    assert FractalDB.from_flags(draw_type='point_color', pad_size_x=8).instances == 100
    assert OFDB2D.from_flags(category=21_000) == OFDB2D(
        classes=21_000, size=512, points=100_000, weight=0.1, categories='published'
    )
    assert OnePFrac.from_flags(N=3, sigma=4.5, sample=7, mask_mode='fill') == OnePFrac(
        maps=3, sigma=4.5, classes=7, mask_mode='fill'
    )


# Canonical images

FAMILIES = [
    FractalDB(classes=50, **SMALL),
    FractalDB(classes=50, seed=1, draw_type='patch_color', weight=0.1, **SMALL),
    OFDB2D(classes=50, **SMALL),
    OnePFrac(classes=50, **SMALL),
    OnePFrac(classes=50, maps=3, sigma=4.5, delta=0.3, mask_mode='fill', **SMALL),
    FractalDB(classes=50, draw_type='point_gray', **SMALL),
]


def pairs(f):
    return [(c, k % f.instances) for c, k in ((0, 0), (7, 26), (49, 999), (0, 80))]


def canonical(f):
    return {f'{c} {k}': sha(f.render(c, k)) for c, k in pairs(f)}


@pytest.mark.parametrize('f', FAMILIES, ids=lambda f: f'{f.name}-{f.fingerprint()}')
def test_canonical_pixels_stay(f):
    assert canonical(f) == CANONICAL[f'{f.name}-{f.fingerprint()}']


@pytest.mark.parametrize('f', FAMILIES[1:4], ids=lambda f: f.name)
def test_order_and_threads_change_nothing(f):
    wanted = pairs(f) * 3
    alone = [sha(f.render(c, k)) for c, k in wanted]
    ifs_search._found.clear()
    assert [sha(f.render(c, k)) for c, k in wanted[::-1]] == alone[::-1]
    ifs_search._found.clear()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda ck: sha(f.render(*ck)), wanted)) == alone


@pytest.mark.process
def test_another_process_draws_the_same():
    code = (
        'import hashlib; from fdsl_nb.formulas.formula import formula; '
        "f = formula('fractaldb', classes=50, size=64, points=4000); "
        'print(hashlib.sha256(f.render(49, 999).tobytes()).hexdigest())'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == CANONICAL[f'fractaldb-{FAMILIES[0].fingerprint()}']['49 999']


def test_instances_are_what_variant_says():
    f = FAMILIES[0]
    assert {f.variant(k) for k in range(1000)} == {
        (row, flip, draw) for row in range(25) for flip in range(4) for draw in range(10)
    }
    base = f.render(0, 2)
    for flip in range(4):
        np.testing.assert_array_equal(f.render(0, 2 + 25 * flip), flipped(base, flip))
    assert sha(f.render(0, 102)) != sha(base)
    assert sha(f.render(0, 3)) != sha(base)


def test_other_fields_leave_the_category_alone():
    np.testing.assert_array_equal(
        FractalDB(classes=1, size=64).category(0),
        FractalDB(classes=1000, points=999, draw_type='point_gray').category(0),
    )
    assert sha(FractalDB(seed=1).category(0)) != sha(FractalDB(seed=2).category(0))


def test_published_categories_in_a_canonical_data_set():
    f = FractalDB(classes=2, categories='published', **SMALL)
    np.testing.assert_array_equal(f.category(1), PUBLISHED[1])
    assert f.render(1, 0).shape == (64, 64)


def test_a_returned_image_is_the_callers():
    f = FAMILIES[3]
    image = f.render(0, 0)
    before = sha(image)
    image[:] = 0
    assert sha(f.render(0, 0)) == before


def test_memory_is_flat():
    f = FractalDB(classes=4, size=128, points=20_000)
    for i in range(8):
        f.render(i % 4, i)
    tracemalloc.start()
    for i in range(20):
        f.render(i % 4, i)
    first = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    for i in range(300):
        f.render(i % 4, i)
    last, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert last - first < 100_000 and peak < 5_000_000


# Searching, and being killed


def test_all_categories_go_to_disk_and_back(own_data_root, monkeypatch):
    f = FractalDB(classes=60, rate=0.02, search_points=20_000)
    found = f.all_categories(workers=2)
    assert len(list(own_data_root.rglob('*.json'))) == 2
    ifs_search._found.clear()
    monkeypatch.setattr(
        ifs_search, 'first_filling', lambda *a: pytest.fail('searched although it is on disk')
    )
    for c in (0, 59):
        np.testing.assert_array_equal(f.category(c), found[c])
    for ours, theirs in zip(f.all_categories(), found, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_one_image_searches_one_class(monkeypatch):
    calls, real = [], ifs_search.first_filling
    monkeypatch.setattr(ifs_search, 'first_filling', lambda *a: calls.append(a) or real(*a))
    FractalDB(**SMALL).render(731, 5)
    assert len(calls) == 1


class Killed(BaseException):
    pass


def test_killed_search_continues(own_data_root):
    cache, searched = category_cache('toy', own_data_root, seed=0), []

    def search(c, last=10**9):
        if c >= last:
            raise Killed
        searched.append(c)
        return np.array([[c + 0.1]])

    with pytest.raises(Killed):
        search_parallel(lambda c: search(c, 120), 200, cache)
    assert sorted(p.name for p in cache.folder.iterdir()) == ['00000.json', '00001.json']
    searched.clear()
    assert [m[0, 0] for m in search_parallel(search, 200, cache, workers=2)] == [
        c + 0.1 for c in range(200)
    ]
    assert min(searched) == 100


def test_killed_while_writing_leaves_no_block(monkeypatch):
    cache = category_cache('toy', seed=1)
    monkeypatch.setattr(categories.os, 'replace', lambda *a: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        search_parallel(lambda c: np.ones((1, 1)), 50, cache)
    monkeypatch.undo()
    assert not cache.path(0).exists() and categories.read_block(cache, 0) is None


def test_killed_stream_continues_in_the_middle():
    def draws(rng):
        return rng.random_sample((2, 7))

    whole = CategoryStream(draws, NumpyRandom(4), category_cache('whole', x=1)).upto(120)
    CategoryStream(draws, NumpyRandom(4), category_cache('cut', x=1)).upto(70)
    again = CategoryStream(draws, NumpyRandom(4), category_cache('cut', x=1))
    assert len(again.found) == 70
    for ours, theirs in zip(again.upto(120), whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_damaged_block_is_searched_again():
    cache = category_cache('toy', seed=2)

    def search(c):
        return np.array([[c / 7]])

    good = search_parallel(search, 50, cache)
    text = cache.path(0).read_text()
    for damaged in (
        text[:100],
        text.replace('0.14285714285714285', '0.14285714285714286'),
        '[]',
        '{}',
        '',
    ):
        assert damaged != text
        cache.path(0).write_text(damaged)
        with pytest.warns(UserWarning, match='damaged'):
            again = search_parallel(search, 50, cache)
        assert [m.tolist() for m in again] == [m.tolist() for m in good] and cache.path(
            0
        ).read_text() == text


def test_categories_survive_both_layouts(tmp_path):
    for path in (
        save_categories(tmp_path / 'folder', PUBLISHED, COLUMNS),
        save_categories(tmp_path / 'table.csv', PUBLISHED, COLUMNS),
    ):
        for ours, theirs in zip(load_categories(path, COLUMNS), PUBLISHED, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        f = FractalDB(classes=60, categories=str(path), **SMALL)
        np.testing.assert_array_equal(f.category(59), PUBLISHED[59])
        np.testing.assert_array_equal(
            next(f.reference()).image, next(FractalDB(classes=1, **SMALL).reference()).image
        )


def test_own_categories_are_in_the_fingerprint(tmp_path):
    prints = set()
    for first in (0, 1):
        save_categories(tmp_path / 'mine.csv', PUBLISHED[first : first + 2], COLUMNS)
        os.utime(
            tmp_path / 'mine.csv', (first, first)
        )  # a file system may not tell two quick writes apart
        prints.add(FractalDB(classes=2, categories=str(tmp_path / 'mine.csv')).fingerprint())
    assert len(prints) == 2


# Refusals


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: OnePFrac(sigma=6.5), 'sigma=6.5 is impossible with maps=2'),
        (lambda: OnePFrac(sigma=0.05), 'sigma=0.05 is impossible'),
        (lambda: OnePFrac(classes=0), 'classes=0 is outside'),
        (lambda: OnePFrac(mask_mode='full'), "did you mean 'fill'"),
        (lambda: OnePFrac(size=12), 'padding=6 leaves nothing of size=12'),
        (lambda: OnePFrac(delta=-0.1), 'delta=-0.1 is outside'),
        (lambda: FractalDB(classes=0), 'classes=0 is outside'),
        (lambda: FractalDB(weight=0.6), 'weight=0.6 is outside'),
        (lambda: FractalDB(draw_type='patch_grey'), "did you mean 'patch_gray'"),
        (lambda: FractalDB(padding=181), 'padding=181 leaves nothing of size=362'),
        (lambda: FractalDB(rate=0.9), 'rate=0.9 is out of reach'),
        (lambda: FractalDB(search_points=5000), 'rate=0.2 is out of reach'),
        (lambda: search_categories(1, rate=0.5), 'rate=0.5 is out of reach'),
        (
            lambda: sample_system(2, 6.0, np.random.default_rng(0)),
            'sigma=6.0 with maps=2 is impossible',
        ),
        (lambda: render_ifs(np.zeros((2, 13))), 'columns: a b c d e f p'),
        (lambda: render_ifs(PUBLISHED[0] * 2), 'column p sums to 2'),
        (lambda: render_ifs(PUBLISHED[0] * np.nan), 'not finite'),
        (lambda: render_ifs(PUBLISHED[0], weights=[1, 1]), 'six finite factors'),
        (lambda: render_ifs(PUBLISHED[0], draw='patch'), "draw='patch' is not known"),
        (lambda: list(FractalDB().reference(1, 2)), 'thread=1 of threads=2'),
        (
            lambda: FractalDB.from_flags(weight_csv='mine.csv'),
            "weight_csv='mine.csv' is not a published table",
        ),
        (
            lambda: OnePFrac.from_flags(image_size_x=4, image_size_y=5),
            'image_size_x=4 and image_size_y=5 differ',
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else 'make',
)
def test_refused_by_name(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)


def test_hopeless_searches_end(monkeypatch):
    monkeypatch.setattr(ifs_search, 'TRIES', 5)
    with pytest.raises(ValueError, match='rate=0.38: none of 5'):
        search_categories(1, rate=0.38)
    monkeypatch.setattr('fdsl_nb.formulas.ifs.TRIES', 5)
    with pytest.raises(ValueError, match='seed=0 lights 0.9'):
        OnePFrac(pixel_threshold=0.9, **SMALL).category(0)


@pytest.mark.parametrize(
    'maps, message',
    [
        (np.array([[9, 0, 0, 9, 0, 0, 0.5], [9, 0, 0, 9, 0.5, 1, 0.5]]), 'class 0 diverges'),
        (PUBLISHED[0] * [1, 1, 1, 1, 1, 1, 0.5], 'class 0: column p sums to 0.5'),
    ],
)
def test_own_categories_that_cannot_be_drawn(tmp_path, maps, message):
    save_categories(tmp_path / 'mine.csv', [maps], COLUMNS)
    with pytest.raises(ValueError, match=message):
        FractalDB(classes=1, categories=str(tmp_path / 'mine.csv'))


def test_own_categories_with_wrong_columns(tmp_path):
    path = tmp_path / 'mine.csv'
    save_categories(path, PUBLISHED[:2], COLUMNS)
    path.write_text(path.read_text().replace('class,a,b', 'class,a,B'))
    with pytest.raises(
        ValueError, match="column 'B' is missing or not known; needed: class a b c d e f p"
    ):
        load_categories(path, COLUMNS)
    save_categories(tmp_path / 'wide', [np.ones((2, 13))], range(13))
    with pytest.raises(ValueError, match='7 columns'):
        FractalDB(classes=1, categories=str(tmp_path / 'wide'))
    with pytest.raises(ValueError, match='classes=3, but'):
        FractalDB(
            classes=3, categories=str(save_categories(tmp_path / 'two', PUBLISHED[:2], COLUMNS))
        )

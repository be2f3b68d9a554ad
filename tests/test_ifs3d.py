"""The 3-D fractals against the published outputs, and in any order, thread and with any fault."""

import itertools, json, math, tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest
from helpers import sha
from fdsl_nb.formulas import ifs3d
from fdsl_nb.formulas.categories import save_categories
from fdsl_nb.formulas.formula import formula
from fdsl_nb.formulas.ifs3d import (
    COLUMNS,
    ExFractalDB,
    MVFractalDB,
    OFDB3D,
    points_3d,
    project_views,
    render_views,
    ring_camera,
    search_categories_3d,
    sphere_camera,
    weight_table,
)
from fdsl_nb.core.rng import CATEGORY, CounterRandom, NumpyRandom, PythonRandom

GOLDEN = Path(__file__).parent / 'golden'
FAMILIES = dict(mvfractaldb=MVFractalDB, exfractaldb=ExFractalDB, ofdb3d=OFDB3D)
each_family = pytest.mark.parametrize('name', FAMILIES)


@pytest.fixture(scope='module')
def published():
    return json.loads((GOLDEN / 'exfractaldb.json').read_text())


@pytest.fixture(scope='module')
def found():
    return search_categories_3d(4, variance=0.05, points=10_000, rng=NumpyRandom(7))


# What the published programs gave


def test_search_finds_the_published_systems(published, found):
    for ours, theirs in zip(found, published['categories'], strict=True):
        assert ours.dtype == np.float64
        # coefficients are random numbers alone; p goes through the machine's linear algebra library
        assert np.array_equal(ours[:, :12], np.array(theirs)[:, :12])
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_default_generators_are_fresh_and_the_documented_ones(found):
    for _ in range(2):
        assert np.array_equal(search_categories_3d(1)[0], found[0])
        assert np.array_equal(points_3d(found[0]), points_3d(found[0], rng=NumpyRandom(1000)))
        cloud = points_3d(found[0])
        assert np.array_equal(render_views(cloud), render_views(cloud, 12, 224, PythonRandom(3)))


def test_clouds_are_the_published_ones(published):
    for item in published['items']:
        maps = np.array(published['categories'][item['cls']])
        cloud = points_3d(
            maps,
            weight_table()[item['weight_row']],
            item['points'],
            NumpyRandom(item['numpy_seed']),
        )
        assert cloud.shape == (3, item['points'] - 1) and cloud.dtype == np.float64
        assert np.array_equal(cloud[:, :3].T, item['first_points'])
        assert np.array_equal(cloud[:, -1], item['last_point'])
        np.testing.assert_allclose(cloud.sum(1), item['point_sum'], rtol=0, atol=1e-9)
        np.testing.assert_allclose(abs(cloud).sum(), item['abs_sum'], rtol=0, atol=1e-8)


def test_views_are_those_of_opengl(published):
    rng = PythonRandom(published['render']['python_random_seed'])  # one stream through all items
    seen = {}
    for item in published['items']:
        cloud = points_3d(
            published['categories'][item['cls']],
            weight_table()[item['weight_row']],
            rng=NumpyRandom(item['numpy_seed']),
        )
        for view, image in enumerate(render_views(cloud, 12, 224, rng)):
            assert image.dtype == np.uint8 and set(np.unique(image)) <= {0, 255}
            seen[f'{item["cls"]:06d}_00000_{view:03d}.png'] = dict(
                sha256=sha(image), lit=int((image > 0).sum())
            )
    assert seen == published['images']


# Reference mode


def test_reference_names_orders_and_streams(found):
    samples = list(MVFractalDB(classes=2, instances=30, rows=25, seed=7, size=96).reference())
    assert [(s.cls, s.instance) for s in samples] == [(c, k) for c in range(2) for k in range(30)]
    assert (
        samples[0].file == '000000/000000_00000_000.png'
        and samples[59].file == '000001/000001_00002_005.png'
    )
    points_rng, view_rng = NumpyRandom(7), PythonRandom(7)
    for c in range(2):
        for row in range(25):  # the pictures left out still use the streams
            images = render_views(
                points_3d(found[c], weight_table(25)[row], rng=points_rng), 12, 96, view_rng
            )
            for view, image in enumerate(images):
                if row * 12 + view < 30:
                    assert np.array_equal(samples[c * 30 + row * 12 + view].image, image), (
                        c,
                        row,
                        view,
                    )


def test_reference_leaves_out_a_cloud_that_runs_off(tmp_path):
    # one map at the edge: times 1.1 or more in any of the three diagonal places it grows for ever
    edge = np.array(
        [
            [0.99, 0, 0, 0, 0.98, 0, 0, 0, 0.97, 0.1, 0.2, 0.3, 0.5],
            [0.98, 0, 0, 0, 0.99, 0, 0, 0, 0.97, -0.1, 0.2, -0.3, 0.5],
        ]
    )
    save_categories(tmp_path / 'edge.csv', [edge], COLUMNS)
    data = MVFractalDB(classes=1, rows=25, views=2, size=32, categories=str(tmp_path / 'edge.csv'))
    samples = list(data.reference())
    rows = sorted({s.instance // 2 for s in samples})
    assert 2 not in rows and {0, 1, 3, 4} <= set(rows)  # b is 0 here: scaling it changes nothing
    assert [s.file for s in samples] == [
        data.file_name(0, i, v) for i in range(len(rows)) for v in range(2)
    ]
    # the canonical picture exists for every row: its own picks, all weights one
    picks = ifs3d.unit(CounterRandom(0, CATEGORY, 0, 2 + 1).words(10_000))
    assert np.array_equal(data.cloud(0, 2), ifs3d._cloud(edge, picks).astype(np.float32))


@pytest.mark.parametrize(
    'axes, first, last, count',
    [
        (1, '_000', '_011', 12),
        (2, '_000_000', '_011_011', 144),
        (3, '_000_000_000', '_011_011_011', 1728),
    ],
)
def test_one_instance_data_sets(found, axes, first, last, count):
    data = OFDB3D(classes=1, axes=axes, size=32, seed=7)
    assert data.instances == len(data) == count
    assert (
        data.file_name(0, 0, 0) == f'000000/000000_00000{first}.png'
        and data.file_name(0, 0, count - 1) == f'000000/000000_00000{last}.png'
    )
    samples = list(itertools.islice(data.reference(), 15))
    rng, cloud = PythonRandom(7), points_3d(found[0], weight_table()[0], rng=NumpyRandom(7))
    for k, sample in enumerate(samples):
        camera = ring_camera(k, 12, rng, axes)
        assert np.array_equal(sample.image, project_views(cloud, camera[None], 32)[0])


def test_more_axes_multiply_rotations_to_the_right():
    class Still:
        def uniform(self, low, high):
            return 0.0

    def y(a):
        return np.array([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])

    def z(a):
        return np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])

    f, m, o = 5, 2, 7

    def step(i):
        return i * math.pi / 6 + math.pi / 6

    rotation = y(step(f)) @ z(step(m)) @ y(step(o))
    right, up, forward = ring_camera(f + 12 * m + 144 * o, 12, Still(), 3)
    np.testing.assert_allclose([forward, up, right], rotation.T, atol=1e-6)
    np.testing.assert_allclose(np.cross(forward, up), right, atol=1e-6)


def test_reference_holds_one_picture_at_a_time():
    data = OFDB3D(classes=1, axes=3, size=224)
    for _ in itertools.islice(data.reference(), 3):
        pass
    tracemalloc.start()
    for _ in itertools.islice(data.reference(), 200):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000, f'{peak:,} bytes at once for pictures of 50,176 bytes'


# Canonical pictures

CANONICAL = [
    ('mvfractaldb', {}, 0, 0),
    ('mvfractaldb', {}, 3, 77),
    ('mvfractaldb', dict(seed=1, size=128, point_size=3, views=7, rows=49), 2, 300),
    ('exfractaldb', {}, 0, 0),
    ('exfractaldb', {}, 999, 1739),
    ('exfractaldb', dict(seed=2**63, points=2000), 11, 5),
    ('ofdb3d', {}, 0, 11),
    ('ofdb3d', dict(axes=2), 1, 143),
    ('ofdb3d', dict(axes=3, size=256), 20, 1727),
]


def canonical_now():
    return {
        f'{name} {json.dumps(knobs)} {c} {k}': sha(formula(name, **knobs).render(c, k))
        for name, knobs, c, k in CANONICAL
    }


def test_canonical_pictures_stay_what_they_are():
    assert canonical_now() == json.loads((GOLDEN / 'exfractaldb_canonical.json').read_text())


def test_canonical_systems_stay_what_they_are():
    maps = formula('exfractaldb').category(20)
    assert sha(maps) == 'bb82f27f9af8deea1b35928868f88ea7171faed77b3f949ff949100e0fb92dfc'
    assert not maps.flags.writeable and abs(maps[:, 12].sum() - 1) < 1e-12


@each_family
def test_order_does_not_matter(name):
    data = FAMILIES[name](classes=4, size=64)
    places = [(c, k) for c in range(4) for k in (0, 1, 7, data.instances - 1)]
    forward = {p: sha(data.render(*p)) for p in places}
    ifs3d.canonical_system.cache_clear(), ifs3d._kept_cloud.cache_clear()
    assert {p: sha(replace(data).render(*p)) for p in reversed(places)} == forward
    assert len(set(forward.values())) == len(places)


@each_family
def test_threads_draw_what_one_draws(name):
    data = FAMILIES[name](classes=6, size=64)
    places = [(c, k) for k in range(0, 12, 3) for c in range(6)]
    one = [sha(data.render(*p)) for p in places]
    ifs3d.canonical_system.cache_clear(), ifs3d._kept_cloud.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda p: sha(data.render(*p)), places)) == one


def test_more_classes_leave_the_first_alone():
    assert np.array_equal(
        ExFractalDB(classes=2).render(1, 13), ExFractalDB(classes=21_000).render(1, 13)
    )


def test_families_differ_in_what_they_say():
    ring, sphere, one = MVFractalDB(size=64), ExFractalDB(size=64), OFDB3D(size=64)
    assert (
        np.array_equal(ring.cloud(5, 0), sphere.cloud(5, 0))
        and ring.instances == 1740
        and one.instances == 12
    )
    assert np.array_equal(ring.render(5, 3), one.render(5, 3)) and not np.array_equal(
        ring.render(5, 3), sphere.render(5, 3)
    )


@pytest.mark.parametrize(
    'knob, value',
    [
        ('views', 6),
        ('rows', 121),
        ('points', 5000),
        pytest.param('half_side', 0.5, marks=pytest.mark.long),
        ('point_size', 2),
        ('near', 3.9),
        ('far', 4.0),
        ('jitter', 90.0),
        ('seed', 1),
        ('variance', 0.08),
    ],
)
def test_every_knob_turns_something(knob, value):
    plain = MVFractalDB(classes=2, size=64)
    assert any(
        not np.array_equal(
            plain.render(1, k), replace(plain, instances=0, **{knob: value}).render(1, k)
        )
        for k in (0, 1, 5, 130)
    )


def test_directions_are_uniform_on_the_sphere():
    forward = np.array([sphere_camera(CounterRandom(0, 1, 0, k))[2] for k in range(4000)])
    assert abs(forward.mean(0)).max() < 0.04
    # by Archimedes each coordinate is uniform between -1 and 1
    for axis in range(3):
        np.testing.assert_allclose(
            np.quantile(forward[:, axis], [0.1, 0.25, 0.5, 0.75, 0.9]),
            [-0.8, -0.5, 0, 0.5, 0.8],
            atol=0.05,
        )


def test_random_view_is_one_of_the_views():
    data = OFDB3D(classes=2, size=48)
    known = {sha(data.render(1, k)) for k in range(12)}
    seen = {sha(data.random_view(1, PythonRandom(s))) for s in range(60)}
    assert seen <= known and len(seen) > 8


def test_points_are_squares_around_their_place():
    camera = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    for size in (1, 2, 3, 4):
        assert (
            int((project_views(np.zeros((3, 1)), camera[None], 32, size)[0] > 0).sum())
            == size * size
        )
    odd = project_views(np.zeros((3, 1)), camera[None], 33, 3)[0]
    assert np.array_equal(np.argwhere(odd), [(r, c) for r in (15, 16, 17) for c in (15, 16, 17)])
    assert not project_views(np.array([[0], [0], [-3.5]]), camera[None])[
        0
    ].any()  # nearer than near
    assert not project_views(np.array([[9], [0], [0]]), camera[None])[0].any()  # beside the picture
    up = project_views(np.array([[0], [0.5], [0]]), camera[None])[0]
    assert np.argwhere(up)[0][0] > 112  # bottom row first


# Categories of one's own, and on disk


def test_own_categories_in_both_layouts(tmp_path, found):
    for where in ('params', 'params.csv'):
        save_categories(tmp_path / where, found, COLUMNS, digits=6)
        data = ExFractalDB(classes=4, size=48, categories=str(tmp_path / where))
        assert all(np.array_equal(data.category(c), found[c]) for c in range(4))
        assert data.render(3, 100).any()
    samples = itertools.islice(replace(data, seed=5).reference(), 2)
    cloud = points_3d(found[0], weight_table()[0], rng=NumpyRandom(5))
    rng = PythonRandom(5)
    for sample in samples:
        assert np.array_equal(sample.image, project_views(cloud, sphere_camera(rng)[None], 48)[0])


def test_changed_files_are_read_again(tmp_path, found):
    path = save_categories(tmp_path / 'one.csv', found[:1], COLUMNS)
    assert np.array_equal(OFDB3D(classes=1, categories=str(path)).category(0), found[0])
    save_categories(path, found[1:2], COLUMNS)
    assert np.array_equal(OFDB3D(classes=1, categories=str(path)).category(0), found[1])


def test_search_on_disk_equals_search_one_by_one(tmp_path):
    data = MVFractalDB(classes=7)
    alone = [data.category(c) for c in range(7)]
    ifs3d.canonical_system.cache_clear()
    for workers in (3, 1):
        assert all(
            np.array_equal(a, b)
            for a, b in zip(data.all_categories(workers, tmp_path), alone, strict=True)
        )
    assert len(list(tmp_path.rglob('*.json'))) == 1


# From a command line


def test_flags_of_the_published_programs():
    assert MVFractalDB.from_flags() == MVFractalDB(variance=0.15)
    given = ExFractalDB.from_flags(
        numof_classes=10,
        variance=0.05,
        point_num=5000,
        normalize=0.5,
        view_point=6,
        img_size=128,
        point_size=2,
        zNear=0.5,
        zFar=50.0,
        seed=3,
    )
    assert given == ExFractalDB(
        classes=10,
        variance=0.05,
        points=5000,
        half_side=0.5,
        views=6,
        size=128,
        point_size=2,
        near=0.5,
        far=50.0,
        seed=3,
    )
    assert given.instances == 145 * 6


# Refusals


@pytest.mark.parametrize(
    'knobs, message',
    [
        (dict(classes=0), 'classes=0 is outside'),
        (dict(rows=144), 'rows=144 is not known'),
        (dict(variance=-1.0), 'variance=-1.0 is outside'),
        (dict(instances=1741), 'instances=1741 but 145 × 12'),
        (dict(near=5.0, far=4.0), 'near=5.0 is not before far=4.0'),
        (dict(point_size=0), 'point_size=0 is outside'),
        (dict(views=0), 'views=0 is outside'),
        (dict(points=2), 'points=2 is outside'),
    ],
)
def test_bad_settings_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        MVFractalDB(**knobs)


def test_bad_types_names_and_flags_are_refused():
    with pytest.raises(TypeError, match="did you mean 'views'"):
        formula('exfractaldb', veiws=12)
    with pytest.raises(TypeError, match='should be of type int'):
        OFDB3D(axes=1.5)
    with pytest.raises(ValueError, match='axes=4 is outside 1'):
        OFDB3D(axes=4)
    with pytest.raises(TypeError, match="did you mean 'img_size'"):
        MVFractalDB.from_flags(image_size=3)
    with pytest.raises(ValueError, match='thread=1 of threads=2'):
        MVFractalDB().reference(1, 2)
    with pytest.raises(IndexError, match='class 1000 is not in 0'):
        MVFractalDB().render(1000, 0)
    with pytest.raises(IndexError, match='cloud 145 is not in 0'):
        MVFractalDB().cloud(0, 145)


def test_bad_systems_are_refused(tmp_path, found):
    with pytest.raises(ValueError, match='13 columns'):
        points_3d(found[0][:, :7])
    with pytest.raises(ValueError, match='12 factors'):
        points_3d(found[0], np.ones(13))
    with pytest.raises(ValueError, match='run off'):
        points_3d(found[0], np.full(12, 3.0))
    with pytest.raises(ValueError, match='never move'):
        points_3d(np.eye(13)[12:])
    with pytest.raises(ValueError, match='not finite'):
        points_3d(np.where(found[0] == found[0][0, 0], np.nan, found[0]))
    with pytest.raises(ValueError, match='points=2 is too few'):
        points_3d(found[0], points=2)
    with pytest.raises(ValueError, match='n=0'):
        search_categories_3d(0)
    with pytest.raises(FileNotFoundError, match='is not there'):
        MVFractalDB(categories='nowhere')
    np.savetxt(tmp_path / '000000.csv', np.full((2, 7), 0.5), delimiter=',')
    with pytest.raises(ValueError, match='13 columns'):
        MVFractalDB(classes=1, categories=str(tmp_path))
    np.savetxt(
        tmp_path / '000000.csv', np.column_stack([np.full((2, 12), 3.0), [0.5, 0.5]]), delimiter=','
    )
    with pytest.raises(ValueError, match='points of class 0 run off'):
        MVFractalDB(classes=1, categories=str(tmp_path)).render(0, 0)
    with pytest.raises(ValueError, match='has 1 classes; classes=2'):
        MVFractalDB(classes=2, categories=str(tmp_path))


def test_bad_views_are_refused(found):
    cloud = points_3d(found[0], points=100)
    with pytest.raises(ValueError, match='views=0'):
        render_views(cloud, 0)
    with pytest.raises(ValueError, match=r'shape \[99, 3\]'):
        render_views(cloud.T)
    cloud[0, 0] = np.inf
    with pytest.raises(ValueError, match='finite'):
        render_views(cloud)

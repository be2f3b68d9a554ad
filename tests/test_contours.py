"""RCDB and VisualAtom: the published pixels, our own, and what is refused.

tests/golden/{rcdb,visualatom}_{script,thread,defaults}.json hold the SHA-256 of what the published
programs drew for given flags, with file names and parameter files; *_canonical.json hold ours, so
that no later change of a kernel moves a pixel unseen.
"""

import itertools, json, multiprocessing, pickle, tracemalloc
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
import numpy as np
import pytest
from helpers import sha
from fdsl_nb.formulas.contours import RCDB, VisualAtom, AtomCategory, ContourCategory, corner_table
from fdsl_nb.formulas.formula import formula

GOLDEN = Path(__file__).parent / 'golden'
FAMILIES = (RCDB, VisualAtom)
SMALL = dict(classes=5, instances=4, size=256, start_range=40)
each_family = pytest.mark.parametrize('family', FAMILIES, ids=lambda f: f.name)


def golden(name):
    return json.loads((GOLDEN / f'{name}.json').read_text('utf-8'))


def drawn(name, c, k, **knobs):
    return sha(formula(name, **knobs).render(c, k))


# The published programs


def published(name):
    "A golden file, the formula its flags describe and its thread numbers."
    g = golden(name)
    flags = dict(g['flags'])
    thread, threads = flags.pop('thread_num'), flags.pop('numof_thread')
    return g, (RCDB if name.startswith('rcdb') else VisualAtom).from_flags(**flags), thread, threads


@pytest.mark.parametrize(
    'name', ['rcdb_script', 'rcdb_thread', 'visualatom_script', 'visualatom_defaults']
)
def test_reference_draws_the_published_pixels(name):
    g, f, thread, threads = published(name)
    found = {s.file: [s.cls, s.instance, sha(s.image)] for s in f.reference(thread, threads)}
    assert list(found) == list(g['images'])  # file names, in order
    assert found == g['images']


@pytest.mark.parametrize('name', ['rcdb_script', 'rcdb_thread'])
def test_reference_categories_write_the_published_files(name):
    g, f, thread, threads = published(name)
    assert {
        f'{c:05d}.csv': category.csv() for c, category in f.reference_categories(thread, threads)
    } == g['parameters']


@each_family
def test_reference_categories_are_those_of_the_images(family):
    f = family(**SMALL)
    names = {f.file(c, 0, category) for c, category in f.reference_categories()}
    assert names == {s.file for s in f.reference() if s.instance == 0}


@each_family
def test_published_threads_lose_the_remainder(family):
    f = family(classes=7, instances=1, size=32)
    assert [s.cls for t in range(3) for s in f.reference(t, 3)] == [0, 1, 2, 3, 4, 5]


def test_published_start_class_renames():
    plain, moved = VisualAtom(**SMALL), VisualAtom(**SMALL, start_class=100)
    for a, b in itertools.islice(zip(plain.reference(), moved.reference()), 6):
        assert b.cls == a.cls + 100 and b.file == a.file.replace(f'{a.cls:05d}/', f'{b.cls:05d}/')
        assert np.array_equal(a.image, b.image)


@each_family
@pytest.mark.parametrize('thread, threads', [(1, 1), (-1, 2), (0, 0)])
def test_threads_that_do_not_exist_are_refused(family, thread, threads):
    for walk in (family().reference, family().reference_categories):
        with pytest.raises(
            ValueError, match=f'thread={thread} of threads={threads} does not exist'
        ):
            walk(thread, threads)


# Flags


def test_program_defaults_are_not_the_papers():
    program, paper = VisualAtom.from_flags(), VisualAtom()
    assert {
        f.name: getattr(program, f.name)
        for f in fields(paper)
        if getattr(program, f.name) != getattr(paper, f.name)
    } == {'noise_min': 2.0, 'drift': 0.01, 'radius_min': 0}
    assert RCDB.from_flags() == RCDB()


@each_family
def test_every_flag_takes_effect(family):
    base = family.from_flags()
    for flag, name in family.flags.items():
        value = getattr(base, name) + 1
        assert family.from_flags(**{flag: value}) == replace(base, **{name: value}) != base, flag


def test_flags_may_be_whole_numbers():
    paper = VisualAtom.from_flags(perlin_min=0, line_width=0.1, radius_min=10, oval_rate=2)
    assert paper == VisualAtom() and paper.fingerprint() == VisualAtom().fingerprint()


def test_unknown_flags_are_refused():
    with pytest.raises(TypeError, match="did you mean 'vertex_num'"):
        RCDB.from_flags(vertex_nun=5)
    with pytest.raises(TypeError, match='not a flag'):
        RCDB.from_flags(nami_1_min=5)


def test_flags_that_change_no_picture_are_taken():
    given = dict(save_root='out', numof_thread=20, thread_num=3, display=True)
    assert VisualAtom.from_flags(**given) == VisualAtom.from_flags()
    assert RCDB.from_flags(**given) == RCDB()


# Our own pixels


@pytest.mark.parametrize(
    'case',
    [case for f in FAMILIES for case in golden(f'{f.name}_canonical')],
    ids=lambda c: f"{c['formula']}-{c['knobs'].get('size', 512)}",
)
def test_canonical_pixels_stay(case):
    for address, expected in case['images'].items():
        c, k = map(int, address.split(','))
        assert drawn(case['formula'], c, k, **case['knobs']) == expected, address


@each_family
def test_order_does_not_matter(family):
    f = family(**SMALL)
    addresses = [(c, k) for c in range(f.classes) for k in range(f.instances)]
    forward = {a: sha(f.render(*a)) for a in addresses}
    again = family(**SMALL)
    assert {a: sha(again.render(*a)) for a in reversed(addresses)} == forward
    assert len(set(forward.values())) == len(addresses)


@pytest.mark.process
@each_family
@pytest.mark.parametrize('kind', ['threads', pytest.param('processes', marks=pytest.mark.slow)])
def test_workers_draw_the_same(family, kind):
    addresses = [(c, k) for c in range(SMALL['classes']) for k in range(SMALL['instances'])]
    # spawned, as on a machine where a fork is not safe
    pool = (
        ThreadPoolExecutor(2)
        if kind == 'threads'
        else ProcessPoolExecutor(2, multiprocessing.get_context('spawn'))
    )
    with pool:
        found = [pool.submit(drawn, family.name, c, k, **SMALL) for c, k in addresses]
        assert [job.result() for job in found] == [
            drawn(family.name, c, k, **SMALL) for c, k in addresses
        ]


@each_family
def test_more_classes_or_instances_change_no_image(family):
    more = family(**{**SMALL, 'classes': 50, 'instances': 90})
    assert sha(more.render(3, 2)) == sha(family(**SMALL).render(3, 2))


@each_family
def test_seed_changes_every_image(family):
    a, b = family(**SMALL), family(**SMALL, seed=1)
    assert all(a.category(c) != b.category(c) for c in range(5)) and sha(a.render(0, 0)) != sha(
        b.render(0, 0)
    )


def test_start_class_continues_a_data_set():
    more = VisualAtom(**SMALL, start_class=3)
    assert more.category(1) == VisualAtom(**SMALL).category(4)
    assert sha(more.render(1, 2)) == sha(VisualAtom(**SMALL).render(4, 2))


def test_what_an_instance_keeps():
    for f, kept in (
        (RCDB(), 'vertices lines noise drift'),
        (VisualAtom(), 'vertices lines noise drift wave_1 wave_2 radius oval_x oval_y'),
    ):
        category = f.category(5)
        moved = f.new_instance(category, f.instance_stream(5, 1))
        assert type(moved) is type(category)
        changed = {
            x.name for x in fields(category) if getattr(category, x.name) != getattr(moved, x.name)
        }
        assert changed == {x.name for x in fields(category)} - set(kept.split())


@each_family
def test_descriptions_travel(family):
    f = family(**SMALL, seed=3)
    assert pickle.loads(pickle.dumps(f)) == f and pickle.loads(
        pickle.dumps(f.category(1))
    ) == f.category(1)
    spec = json.loads(json.dumps(f.spec()))
    assert formula(spec.pop('formula'), **spec) == f


# Categories stay within their ranges


def test_categories_are_within_their_ranges():
    atoms = VisualAtom(
        vertices_min=5,
        vertices_max=9,
        lines_min=2,
        lines_max=3,
        noise_min=1,
        radius_min=7,
        oval_max=1.5,
        wave_1_min=0,
        wave_1_max=2,
        wave_2_min=1,
        wave_2_max=2,
    )
    for c in range(300):
        card = atoms.category(c)
        assert (
            5 <= card.vertices <= 9
            and 2 <= card.lines <= 3
            and 1 <= card.noise < 5
            and 7 <= card.radius <= 57
        )
        assert (
            1 <= card.oval_x < 1.5
            and card.wave_1 <= 2
            and 1 <= card.wave_2 <= 2
            and card.wave_1 != card.wave_2
        )
        assert 0 <= card.drift < 0.1 and 0 <= card.start_h <= 512 and 0 <= card.start_w <= 512
    rings = RCDB(vertices_max=9, lines_min=10)
    assert all(
        3 <= rings.category(c).vertices <= 9 and 10 <= rings.category(c).lines <= 209
        for c in range(300)
    )


def test_csv_text():
    assert ContourCategory(3, 7, 0.5, 0.25, 9, 1.0, 2.0, 163.0, 104.5).csv() == (
        'Vertex,3\nPerlin_noise,0.5\nline_width,0.25\nCenter_rad,7\n'
        'Line_num,9\nOval_rate_x,1.0\nOval_rate_y,2.0\nstart_pos_h,163.0\nstart_pos_w,104.5\n'
    )
    assert AtomCategory(3, 7, wave_2=4).csv().endswith('nami_1,0\nnami_2,4\n')


# What is refused


@pytest.mark.parametrize(
    'family, knobs, words',
    [
        (
            VisualAtom,
            dict(vertices_min=300, vertices_max=200),
            'vertices_min=300 is above vertices_max=200',
        ),
        (VisualAtom, dict(lines_min=9, lines_max=2), 'lines_min=9 is above lines_max=2'),
        (VisualAtom, dict(wave_1_min=9, wave_1_max=2), 'wave_1_min=9 is above wave_1_max=2'),
        (VisualAtom, dict(wave_2_min=9, wave_2_max=2), 'wave_2_min=9 is above wave_2_max=2'),
        (VisualAtom, dict(vertices_min=2), 'vertices_min=2 is outside 3'),
        (RCDB, dict(vertices_max=2), 'vertices_max=2 is outside 3'),
        (RCDB, dict(lines_min=0), 'lines_min=0 is outside 1'),
        (RCDB, dict(oval_max=0.5), 'oval_max=0.5 is outside 1'),
        (RCDB, dict(drift=-0.1), 'drift=-0.1 is outside 0'),
        (RCDB, dict(start_range=-1), 'start_range=-1 is outside 0'),
    ],
)
def test_impossible_knobs_are_refused(family, knobs, words):
    with pytest.raises(ValueError, match=f'{family.__name__}: {words}'):
        family(**knobs)


def test_waves_that_cannot_differ_are_refused():
    stuck = VisualAtom(**SMALL, wave_1_min=4, wave_1_max=4, wave_2_min=4, wave_2_max=4)
    with pytest.raises(ValueError, match='wave_2_min=wave_2_max=4 cannot differ'):
        stuck.render(0, 0)
    assert (
        VisualAtom(**SMALL, wave_1_max=0, wave_2_max=0).category(0).wave_2 == 0
    )  # two zeros are allowed, as published


def test_a_polygon_has_three_corners():
    with pytest.raises(ValueError, match='vertices=2 makes no polygon'):
        RCDB(**SMALL).paint(ContourCategory(2, 5), 0, 0)
    with pytest.raises(ValueError):
        corner_table(3)[0, 0] = 1  # shared between images, so read-only


@each_family
@pytest.mark.parametrize('c, k', [(5, 0), (-1, 0), (0, 4), (0, -1)])
def test_addresses_outside_are_refused(family, c, k):
    f = family(**SMALL)
    with pytest.raises(IndexError, match=f.name):
        f.render(c, k)
    with pytest.raises(IndexError, match=f.name):
        f.paint(f.category(0), c, k)
    if k == 0:
        with pytest.raises(IndexError, match=f.name):
            f.category(c)


# Memory


@pytest.mark.long
@each_family
def test_memory_is_flat(family):
    f = family(size=128)

    def peak(images):
        tracemalloc.start()
        for _ in itertools.islice(images, 300):
            pass
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    stream = (f.render(c, 0) for c in range(301))
    next(stream)
    # 300 images of 16 kB would be 4.9 MB and 300 tables 5.8;
    # the 64 tables that are kept are 2 MB at most
    assert peak(stream) < 2.5e6
    one = replace(f, classes=1, instances=1000)
    assert peak(s.image for s in one.reference()) < 5e5

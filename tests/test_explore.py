"""The explorer: what its sliders say is what is drawn, written down and run; and who gets a picture
instead of sliders."""

import math
import base64, io, json, shlex, subprocess, sys
from dataclasses import dataclass
from pathlib import Path
import ipywidgets, numpy as np, papermill, pytest
from PIL import Image
from helpers import pixels
from fdsl_nb.app.explore import (
    MEASURES,
    TYPED,
    Explorer,
    as_command,
    as_python,
    changed,
    contact_sheet,
    control,
    cut_into_patches,
    explore,
    explore_pair,
    knob_samples,
    knob_values,
    network_views,
    png_bytes,
    presets,
    save_image,
    show_knob,
    slider_range,
    tiled,
    window,
)
from fdsl_nb.core.folder import RunFolder
from fdsl_nb.formulas.formula import Formula, formula, formula_class, formulas, knob, knobs
from fdsl_nb.training.recipes import recipe
from fdsl_nb.app.cli import asked_for
from fdsl_nb.app.parameters import check_parameters, read_parameters
from fdsl_nb.app.runs import configuration

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = (
    'rcdb',
    'visualatom',
    'fractaldb',
    'ofdb2d',
    'onepfrac',
    'exfractaldb',
    'mvfractaldb',
    'ofdb3d',
)
SEARCHED = 'rate', 'search_points', 'variance'  # a new value of these searches categories anew

each_family = pytest.mark.parametrize('name', FAMILIES)


@pytest.fixture(autouse=True)
def own_folders(own_data_root, tmp_path, monkeypatch):
    monkeypatch.setenv('FDSL_OUTPUT_ROOT', str(tmp_path / 'runs'))


def shown(explorer):
    "What the explorer ought to show: its family, settings, class and instance, drawn without it."
    return formula(explorer.family.value, **explorer.settings).render(
        explorer.cls.value, explorer.instance.value
    )


# The pure parts


@each_family
def test_bytes_keep_every_pixel_and_the_comment(name):
    image = formula(name, size=64).render(0, 0)
    png = png_bytes(image, 'Δ = 0.1')
    assert (
        np.array_equal(pixels(png), image)
        and Image.open(io.BytesIO(png)).text['Comment'] == 'Δ = 0.1'
    )


@each_family
def test_sliders_reach_the_default_and_stay_allowed(name):
    for row in knobs(formula_class(name)):
        if row['choices'] or isinstance(row['default'], str):
            continue
        low, high, step = slider_range(row)
        assert (
            row['low'] <= low <= row['default'] <= high <= row['high'] and step > 0 and low < high
        ), row['name']
        if row['name'] in TYPED:
            continue
        assert (high - low) / step <= 10**6, row['name']
        assert slider_range(row, row['high'])[1] == row['high'], (
            'a value given by hand stretches its slider'
        )


def test_a_knob_without_a_range_still_has_a_slider():
    @dataclass(frozen=True)
    class Loose(Formula):
        level: float = knob(0.0, help='no range')
        count: int = knob(3, help='no range')
        on: bool = knob(True, help='a switch')

    rows = {r['name']: r for r in knobs(Loose)}
    assert slider_range(rows['level'])[:2] == (0, 10**6) and slider_range(rows['count']) == (
        0,
        12,
        1,
    )
    assert (
        isinstance(control(rows['on']), ipywidgets.Checkbox) and control(rows['on']).value is True
    )


@each_family
def test_presets_are_formulas_and_the_first_is_the_default(name):
    found = presets(name)
    assert next(iter(found.values())) == {}
    for settings in found.values():
        assert changed(name, settings) == settings
        formula(name, **settings)


SETTINGS = dict(
    rcdb=dict(oval_max=3.0, seed=7),
    visualatom=dict(classes=7, wave_1_max=4),
    fractaldb=dict(weight=1e-05, draw_type='patch_color'),
    ofdb2d=dict(instances=3, size=64),
    onepfrac=dict(delta=0.05, points=5000),
    exfractaldb=dict(rows=25, instances=40),
    mvfractaldb=dict(views=6),
    ofdb3d=dict(axes=2, seed=2**40),
)


@each_family
def test_the_command_trains_on_what_is_shown(name, tmp_path):
    text = as_command(name, SETTINGS[name], 'paper')
    make, run = (shlex.split(part) for part in text.split(' && '))
    assert (
        make[:2] == ['mkdir', '-p']
        and run[:2] == ['papermill', 'nbs/pretrain.ipynb']
        and run[2] == f'{make[2]}/pretrain.ipynb'
    )
    given = check_parameters('pretrain', asked_for(run[3:]))
    values = configuration('pretrain', dict(seed=0, budget='demo') | given, RunFolder(tmp_path))
    assert values['dataset'].value == name and formula(name, **values['knobs'].value) == formula(
        name, **SETTINGS[name]
    )


def test_the_command_says_only_what_differs():
    assert as_command('rcdb', dict(drift=0.1, seed=0)).endswith('-p dataset rcdb')
    assert as_command('rcdb', dict(seed=7)).endswith('-p dataset rcdb -p seed 7'), (
        'the seed is also that of the training'
    )
    assert (
        as_command('rcdb', dict(drift=0.2)).split(' && ')[0]
        != as_command('rcdb', dict(drift=0.3)).split(' && ')[0]
    ), 'one folder for two formulas'


@each_family
def test_the_python_draws_what_is_shown(name):
    place = {}
    exec(as_python(name, SETTINGS[name], 2, 0), place)
    assert np.array_equal(place['image'], formula(name, **SETTINGS[name]).render(2, 0))


def test_a_saved_image_can_be_drawn_again(tmp_path):
    path, place = save_image('visualatom', dict(size=64), 2, 5, tmp_path), {}
    exec(Image.open(path).text['Comment'], place)
    assert np.array_equal(place['image'], np.array(Image.open(path)))
    assert save_image('visualatom', dict(size=64)).parent == tmp_path / 'runs' / 'explore', (
        'the output root is where saved images go'
    )


def test_tiles_keep_their_places_and_colours():
    images = [[np.full((8, 8), 10 * (2 * r + i + 1), np.uint8) for i in range(2)] for r in range(2)]
    sheet = tiled(images, side=8)
    assert sheet.shape == (24, 24) and [
        sheet[6 + 12 * r, 6 + 12 * i] for r in range(2) for i in range(2)
    ] == [10, 20, 30, 40]
    red = np.zeros((8, 8, 3), np.uint8)
    red[:, :, 0] = 255
    assert tiled([[images[0][0], red]], ['row'], 8).shape == (26, 24, 3)


@pytest.mark.parametrize(
    'first, n, end, expected',
    [(0, 3, 9, [0, 1, 2]), (8, 3, 9, [6, 7, 8]), (0, 5, 2, [0, 1]), (1, 5, 2, [0, 1])],
)
def test_windows_stay_inside(first, n, end, expected):
    assert list(window(first, n, end)) == expected


@each_family
def test_contact_sheets_show_the_class_first(name):
    f = formula(name, size=32, classes=30)
    assert np.array_equal(
        contact_sheet(f, 3, 0, side=32)[16:48, 2:34],
        np.dstack([f.render(3, 0)] * 3) if f.render(3, 0).ndim == 3 else f.render(3, 0),
    )
    assert contact_sheet(f, 29, f.instances - 1, side=32).size > 0


def test_views_depend_on_the_seed_alone():
    image, augmentation = (
        formula('fractaldb', draw_type='patch_color').render(0, 0),
        recipe(dataset='fractaldb'),
    )
    first, again = network_views(image, augmentation, 3), network_views(image, augmentation, 3)
    assert (
        all(np.array_equal(a, b) for a, b in zip(first, again))
        and not np.array_equal(first[0], first[1])
        and first[0].shape == (224, 224, 3)
    )


def test_patches_lose_no_pixel():
    image = np.arange(32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(32, 32, 3)
    cut = cut_into_patches(image)
    assert (
        cut.shape == (34, 34, 3)
        and np.array_equal(cut[:16, :16], image[:16, :16])
        and np.array_equal(cut[17:33, 17:33], image[16:, 16:])
        and (cut[16] == 255).all()
    )


def test_measures():
    blank, full = np.zeros((10, 10), np.uint8), np.full((10, 10), 5, np.uint8)
    assert [float(f(blank, 0)) for f in MEASURES.values()] == [0, 0, 0]
    assert (
        MEASURES['ink'](full, 0) == 1
        and MEASURES['ink'](full, 5) == 0
        and MEASURES['detail'](full, 0) == 0
    )
    corner = blank.copy()
    corner[0, 0] = 1
    assert MEASURES['spread'](corner, 0) == pytest.approx(0.5**0.5)


@each_family
def test_every_knob_can_be_tried(name):
    for row in knobs(formula_class(name)):
        if isinstance(row['default'], str) and not row['choices']:
            with pytest.raises(ValueError, match='choose a number'):
                knob_values(name, {}, row['name'])
            continue
        tried = knob_values(name, {}, row['name'])
        assert row['default'] in [v for v, _ in tried], row['name']
        if row['default']:
            assert all(getattr(f, row['name']) == v for v, f in tried), row['name']


def test_the_same_draws_for_each_value():
    same = formula('rcdb', size=64)
    first, second = knob_samples([(1, same), (2, same)], 'ink', 5)
    assert np.array_equal(first, second) and len(set(first)) > 1
    assert (
        len(show_knob('fractaldb', dict(size=64, points=2000), 'draw_type', 'detail', 2).axes) == 10
    )


# The widgets, driven as a hand would


@each_family
def test_every_control_reaches_the_picture(name):
    explorer = Explorer(name, pages=False, size=48)
    assert np.array_equal(pixels(explorer.picture.value), shown(explorer))
    for label, widget in explorer.controls.items():
        if label in (*SEARCHED, *TYPED):
            continue
        if isinstance(widget, ipywidgets.Dropdown):
            other = widget.options[-1] if widget.value != widget.options[-1] else widget.options[0]
        elif isinstance(widget, (ipywidgets.IntSlider, ipywidgets.FloatSlider)):
            other = type(widget.value)(widget.value + (widget.max - widget.value) / 4) or widget.max
        else:
            continue
        before, widget.value = widget.value, other
        if explorer.formula is None:
            assert explorer.message.value.startswith('<b>'), label
        else:
            assert (
                explorer.settings.get(label, before) == pytest.approx(widget.value)
                if isinstance(other, float)
                else explorer.settings.get(label, before) == widget.value
            ), label
            assert np.array_equal(pixels(explorer.picture.value), shown(explorer)), label
        widget.value = before
    explorer.cls.value = 5
    explorer.controls['seed'].value = 1
    assert explorer.settings == dict(size=48, seed=1) and np.array_equal(
        pixels(explorer.picture.value), shown(explorer)
    )


@each_family
def test_drawing_a_slider_changes_nothing(name):
    explorer = Explorer(name, pages=False, size=48)
    before = explorer.formula
    for label, widget in explorer.controls.items():
        if not isinstance(widget, ipywidgets.FloatSlider):
            continue
        exact = widget.value
        snapped = (
            widget.min + round((exact - widget.min) / widget.step) * widget.step
        )  # as a browser does when it draws the slider
        widget.value = snapped
        assert explorer.formula == before and label not in explorer.settings
        widget.value = (
            snapped + widget.step if snapped + widget.step <= widget.max else snapped - widget.step
        )
        assert label in explorer.settings
        widget.value = snapped


def test_pi_stays_pi():
    explorer = Explorer('mvfractaldb', pages=False)
    assert explorer.controls['jitter'].value == math.pi
    explorer.controls['jitter'].value = 3.1
    assert explorer.formula.jitter == math.pi and explorer.settings == {}
    explorer.take('mvfractaldb', jitter=1.23456789)
    explorer.controls['jitter'].value = 1.2
    assert explorer.settings == dict(jitter=1.23456789)


def test_every_family_can_be_picked_and_its_presets():
    explorer = Explorer('rcdb')
    explorer.cls.value = 999
    for name in FAMILIES:
        explorer.family.value = name
        assert explorer.settings == {} and explorer.preset.value == "the paper's best"
        assert set(explorer.controls) == {r['name'] for r in knobs(formula_class(name))}
        assert explorer.cls.max == 999 and explorer.instance.max == formula(name).instances - 1
        assert np.array_equal(pixels(explorer.picture.value), shown(explorer))
    explorer.preset.value = 'three axes, 1,728 views (ICCV 2023)'
    assert explorer.settings == dict(axes=3) and explorer.instance.max == 1727
    explorer.controls['point_size'].value = 2
    assert explorer.settings == dict(axes=3, point_size=2) and explorer.preset.value == 'own'
    explorer.controls['point_size'].value = 1
    assert explorer.preset.value == 'three axes, 1,728 views (ICCV 2023)'


def test_own_settings_are_shown_and_stretch_their_slider():
    explorer = explore('visualatom', vertices_max=9000, size=32)
    assert (
        explorer.controls['vertices_max'].value == explorer.controls['vertices_max'].max == 9000
        and explorer.preset.value == 'own'
    )
    assert explorer.settings == dict(vertices_max=9000, size=32)


def test_numbers_read_as_they_were_meant():
    explorer = Explorer('rcdb', pages=False, size=32)
    explorer.controls['drift'].value = 0.1 + 0.2
    assert explorer.settings == dict(drift=0.3, size=32)


def test_the_player_runs_there_and_back():
    explorer = Explorer('rcdb', pages=False, size=32, classes=3)
    seen = []
    explorer.cls.observe(lambda change: seen.append(change.new), 'value')
    for tick in range(1, 5):
        explorer.play.value = tick
    assert seen == [1, 2, 0, 1]
    explorer.moves.value, seen = 'drift', []
    explorer.controls['drift'].observe(
        lambda change: seen.append(explorer.settings.get('drift', 0.1)), 'value'
    )
    for tick in (40, 41, 60, 80):
        explorer.play.value = tick
    assert seen == [0.4, 0.39, 0.2, 0.0], 'up, down, and numbers that read well'


def test_a_refusal_is_said_and_healed():
    explorer = Explorer('visualatom', size=32)
    picture = explorer.picture.value
    explorer.controls['wave_1_min'].value = explorer.controls['wave_1_max'].value + 1
    assert (
        'exchange them' in explorer.message.value
        and explorer.picture.value == picture
        and explorer.picture.layout.opacity != '1'
    )
    for page in range(4):
        explorer.pages.selected_index = page  # nothing to bring up to date, and nothing raises
    explorer.count.click()
    explorer.save.click()
    explorer.controls['wave_1_min'].value = 2
    assert (
        'instance' in explorer.message.value
        and explorer.picture.layout.opacity == '1'
        and np.array_equal(pixels(explorer.picture.value), shown(explorer))
    )


def test_what_is_said_is_escaped():
    explorer = Explorer('fractaldb', pages=False, size=32)
    explorer.controls['categories'].value = '<i>nowhere</i>'
    assert '<i>' not in explorer.message.value and 'nowhere' in explorer.message.value


def test_the_picture_is_sent_before_the_page():
    explorer, order = Explorer('rcdb', size=32), []
    explorer.picture.observe(lambda _: order.append('picture'), 'value')
    explorer.sheet.observe(lambda _: order.append('sheet'), 'value')
    explorer.cls.value = 3
    assert order == ['picture', 'sheet']


def test_only_the_open_page_is_drawn():
    explorer = Explorer('rcdb', size=64)
    assert explorer.sheet.value and not explorer.views.value and not explorer.command.value
    explorer.pages.selected_index = 1
    sheet, views = explorer.sheet.value, explorer.views.value
    explorer.cls.value = 4
    assert explorer.sheet.value == sheet and explorer.views.value != views
    explorer.pages.selected_index = 2
    explorer.varied.value, explorer.what.value = 'lines_min', 'detail'
    explorer.count.click()
    assert pixels(explorer.histogram.value).ndim == 3
    explorer.pages.selected_index = 3
    assert explorer.python.value == as_python(
        'rcdb', dict(size=64), 4, 0
    ) and explorer.command.value == as_command('rcdb', dict(size=64))
    explorer.budget.value = 'paper'
    assert explorer.command.value == as_command('rcdb', dict(size=64), 'paper')
    explorer.save.click()
    assert Path(explorer.saved.value).exists()


def test_a_pair_shares_its_class():
    pair = explore_pair('rcdb', 'fractaldb', size=32)
    pair.right.cls.value = 7
    assert pair.left.cls.value == 7 and np.array_equal(
        pixels(pair.left.picture.value), shown(pair.left)
    )
    coloured = explore_pair('fractaldb', 'ofdb2d', size=32, draw_type='patch_color')
    assert pixels(coloured.still()).ndim == 3 and pixels(pair.still()).ndim == 2


def test_slips_are_named():
    with pytest.raises(ValueError, match="did you mean 'rcdb'"):
        explore('rcbd')
    with pytest.raises(TypeError, match="did you mean 'drift'"):
        explore('rcdb', drfit=0.2)
    with pytest.raises(ValueError, match='outside'):
        explore_pair('rcdb', 'visualatom', size=1)


# Who watches


@pytest.mark.parametrize(
    'person, kind', [(True, 'application/vnd.jupyter.widget-view+json'), (False, 'image/png')]
)
@pytest.mark.parametrize('what', ["explore('rcdb', size=32)", "explore_pair(size=32)"])
def test_sliders_for_a_person_and_a_picture_for_a_program(kernel, person, kind, what):
    results = []
    kernel.execute_interactive(
        f'from fdsl_nb.app.explore import explore, explore_pair; {what}',
        allow_stdin=person,
        stdin_hook=lambda message: None,
        timeout=120,
        output_hook=lambda message: results.append(message['content']),
    )
    found = [r['data'] for r in results if 'data' in r and 'text/plain' in r.get('data', ())]
    assert len(found) == 1 and kind in found[0], results
    if not person:
        assert pixels(base64.b64decode(found[0]['image/png'])).size


@pytest.mark.process
def test_the_run_notebook_pictures_what_was_asked(tmp_path):
    out = tmp_path / 'explore.ipynb'
    papermill.execute_notebook(
        str(ROOT / 'nbs' / 'explore.ipynb'),
        str(out),
        dict(dataset='onepfrac', beside='rcdb', seed=3, knobs=dict(delta=0.2, size=64)),
        progress_bar=False,
        cwd=str(tmp_path),
    )
    outputs = [o for c in json.loads(out.read_text('utf-8'))['cells'] for o in c.get('outputs', ())]
    assert sum('image/png' in o.get('data', {}) for o in outputs) == 2
    first = next(o['data']['image/png'] for o in outputs if 'image/png' in o.get('data', {}))
    assert (
        pixels(base64.b64decode(''.join(first))).tolist()
        == pixels(explore('onepfrac', seed=3, delta=0.2, size=64).still()).tolist()
    )
    assert "formula('onepfrac', size=64, seed=3, delta=0.2).render(0, 0)" in ''.join(
        ''.join(o.get('text', '')) for o in outputs
    )


def test_the_run_notebook_refuses_slips():
    with pytest.raises(TypeError, match="did you mean 'dataset'"):
        check_parameters('explore', dict(datset='rcdb'))
    assert list(read_parameters('explore')) == list(
        papermill.inspect_notebook(str(ROOT / 'nbs' / 'explore.ipynb'))
    )


@pytest.mark.process
def test_the_benchmark_runs():
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / 'benchmarks' / 'explore.py'),
            'rcdb',
            '--size',
            '64',
            '--moves',
            '3',
        ],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0 and 'rcdb' in done.stdout, done.stderr
    assert set(FAMILIES) == set(formulas()[:8])

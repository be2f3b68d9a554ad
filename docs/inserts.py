"""What only the package can say, for `<!-- insert NAME … -->` in a page.

Tables of knobs, recipes and parameters, contents of the book, and sliders that need no kernel.
"""

import base64
import csv
import importlib
import json
import re
from dataclasses import MISSING, fields, replace
from functools import cache
from pathlib import Path

import ipywidgets as widgets
import numpy as np
from ipywidgets.embed import dependency_state, embed_data
from PIL import Image

from fdsl_nb.app.explore import png_bytes, tiled
from fdsl_nb.formulas.formula import formula, formula_class, knobs as knobs_of
from fdsl_nb.training.recipes import FINETUNE, PRETRAIN, Recipe
from fdsl_nb.app.parameters import parameter_limits, read_parameters, run_notebooks
from fdsl_nb.core.settings import DEFAULTS
from house import range_of

HERE = Path(__file__).resolve().parent
NBS = HERE.parent / 'nbs'


def table(head, rows):
    "A Markdown table; every value as it reads in Python, in code, unless it is text to read."
    lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
    return '\n'.join(
        lines
        + [
            '| ' + ' | '.join(str(v).replace('|', '\\|').replace('\n', ' ') for v in row) + ' |'
            for row in rows
        ]
    )


def code(value):
    "A value as Python writes it, a number to six digits; nothing for None."
    value = float(f'{value:.6g}') if isinstance(value, float) else value
    return f'`{value!r}`' if value is not None else ''


# Formulas


def knobs(name):
    "A family's knobs: default, range, help."
    rows = [
        (f'`{r["name"]}`', code(r['default']), range_of(r), r['help'])
        for r in knobs_of(formula_class(name))
    ]
    return table(('knob', 'default', 'range', 'what it is'), rows)


def contour(name, knob, values, **others):
    "Class 1, one parameter after another given by hand, in the middle of the picture."
    f = formula(name, radius_min=60, lines_min=60, **others)
    middle = replace(f.category(1), oval_x=1.3, oval_y=1.0, start_h=f.size / 2, start_w=f.size / 2)
    return knob, values, [f.paint(replace(middle, **{knob: v}), 1, 0) for v in values]


def member(name, knob, values, **others):
    return knob, values, [formula(name, **{knob: v}, **others).render(2, 0) for v in values]


def turned(name):
    "What `slider` turns: the name of the knob, its values, the image of each."
    if name == 'rcdb':
        return contour(name, 'vertices', [3, 4, 5, 7, 10, 15, 25, 50, 100, 200])
    if name == 'visualatom':
        return contour(
            name, 'wave_1', [0, 1, 2, 4, 5, 7, 9, 12, 16, 20], wave_2_min=3, wave_2_max=3
        )
    if name == 'fractaldb':
        return member(
            name, 'points', [200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000]
        )
    if name == 'onepfrac':
        return member(name, 'delta', [0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5])
    return 'view', list(range(12)), [formula(name).render(2, view) for view in range(12)]


def slider(name):
    "A slider over stored pictures, linked in the browser."
    knob, values, images = turned(name)
    side = 240
    small = [
        np.array(Image.fromarray(i).convert('L').resize((side, side), Image.LANCZOS))
        for i in images
    ]
    pictures = widgets.Stack(
        [widgets.Image(value=png_bytes(i), width=side, height=side) for i in small],
        selected_index=len(values) // 2,
    )
    picker = widgets.SelectionSlider(
        options=[(f'{v:,}', n) for n, v in enumerate(values)],
        index=len(values) // 2,
        description=knob,
    )
    link = widgets.jslink((picker, 'index'), (pictures, 'selected_index'))
    shown = widgets.VBox([picker, pictures])
    data = embed_data([shown], state=dependency_state([shown, link]))
    return '\n'.join(
        [
            '```{raw} html',
            '<script defer src="_static/html-manager/embed.js"></script>',
            f'<div class="turned" id="turn-{name}">',
            embedded('state', data['manager_state']),
            *(embedded('view', v) for v in data['view_specs']),
            '</div>',
            '```',
        ]
    )


def embedded(kind, value):
    "A script that holds a value for the widgets; no end of a script may stand inside it."
    text = json.dumps(value).replace('</', r'<\/')
    return f'<script type="application/vnd.jupyter.widget-{kind}+json">{text}</script>'


# Recipes

DATA = dict(
    cifar10='CIFAR-10',
    cifar100='CIFAR-100',
    cars='Cars',
    flowers='Flowers',
    voc12='VOC 12',
    places30='Places-30',
    imagenet100='ImageNet-100',
    imagenet1k='ImageNet-1k',
)


def published(r):
    "What was reported for a recipe."
    return ', '.join(f'{DATA.get(k, k)} {v}' for k, v in r.reported.items())


def recipes(stage):
    "The published recipes of a stage in a table, then each with its command and its values."
    known = dict(pretrain=PRETRAIN, finetune=FINETUNE)[stage]
    rows = [
        (f'[`{r.name}`](#{anchor(r)})', f'`{r.dataset}`', f'`{r.model}`', published(r))
        for r in known
    ]
    return '\n\n'.join(
        [
            table(('recipe', 'data set', 'model', 'published top-1, %'), rows),
            *(one_recipe(r, stage) for r in known),
        ]
    )


def anchor(r):
    return r.name.replace('_', '-')


def one_recipe(r, stage):
    plain = {
        f.name: f.default if f.default is not MISSING else f.default_factory()
        for f in fields(Recipe)
    }
    values = {
        f.name: getattr(r, f.name)
        for f in fields(r)
        if f.name not in ('name', 'paper', 'cost', 'reported', 'source')
    }
    own = [
        (f'`{k}`', code(v))
        for k, v in values.items()
        if v != plain[k] or k in ('dataset', 'model', 'epochs', 'batch_size', 'lr')
    ]
    reported = f'Published: {published(r)} % ({r.source})' if published(r) else ''
    about = '. '.join(w for w in (r.paper, r.cost, reported) if w)
    command = f'fdsl run {stage} -p recipe {r.name} -p dataset {r.dataset} -p budget paper'
    title = f'({anchor(r)})=\n### `{r.name}`'
    return '\n\n'.join([title, f'{about}.', f'```\n{command}\n```', table(('value', ''), own)])


def deviations():
    "Where a recipe does something else than its record."
    with (HERE / 'deviations.csv').open() as f:
        head, *rows = csv.reader(f)
    return table(head, [(code(r[0]), code(r[1]), *r[2:]) for r in rows])


def records():
    "Every record: its recipe, its program and the lines of its command."
    by_record = {r.record: r.name for r in [*PRETRAIN, *FINETUNE]}
    found = json.loads((HERE.parent / 'tests/golden/recipes_published.json').read_text())
    rows = [
        (
            code(r['name']),
            f'[`{by_record[r["name"]]}`](recipes.md#{by_record[r["name"]].replace("_", "-")})',
            f'{r["repository"]}, {r["file"]}: {r["source"]}'.replace('|', '/'),
        )
        for r in found
    ]
    return table(('record', 'recipe', 'program and command'), rows)


# Runs and machines


def allowed(limits):
    "What a value may be, for a cell of a table."
    if limits is None:
        return ''
    return ' '.join(map(code, limits.choices)) or str(limits)


def parameters(notebook):
    "What a run notebook may be asked."
    limits = parameter_limits(notebook)
    rows = [
        (f'`{p.name}`', p.type.__name__, code(p.default), allowed(limits.get(p.name)), p.help)
        for p in read_parameters(notebook).values()
    ]
    return table(('parameter', 'type', 'default', 'range or choices', 'what it is'), rows)


def notebooks():
    "All run notebooks with their parameters."
    parts = []
    for name in run_notebooks():
        if (NBS / f'{name}.ipynb').exists():
            link = f'[The notebook](chapters/{name}.ipynb).'
            parts += [f'## `{name}`', link, parameters(name)]
    return '\n\n'.join(parts)


def settings():
    "Machine settings: where each is written."
    return table(
        ('`settings.ini`', 'environment', 'default', 'range or choices'),
        [
            (
                f'`[{d.section}] {d.key}`',
                f'`{d.variable}`',
                code(d.value),
                allowed(d.limits),
            )
            for d in DEFAULTS
        ],
    )


# The book

# Packages from the lowest to the highest; one that is not here comes last, by its name alone.
PACKAGES = {
    'core': 'What everything uses: settings, addressed random numbers, drawing, runs as folders.',
    'formulas': 'Pictures from numbers: what a formula data set is, and all published families.',
    'models': "timm's networks and published weights: checkpoints read, converted and written.",
    'data': 'From a name or a folder to batches: data sets, augmentation, shards, streams.',
    'build': 'Data sets on disk: written in parallel, resumed after a kill, verified, repaired.',
    'training': 'From a configuration to weights, and what the weights are worth.',
    'app': 'What people touch: the explorer, run notebooks, reports, the command `fdsl`.',
}


@cache
def modules_of_notebooks():
    "The notebooks of the library, each with the module it exports, as `package.name`."
    texts = {p: p.read_text('utf-8') for p in NBS.glob('*/*.ipynb')}
    exported = {p: re.search(r'#\| *default_exp:? +([\w.]+)', text) for p, text in texts.items()}
    return {p: found[1] for p, found in exported.items() if found}


def chapters_by_package():
    "The notebooks of each package by their numbers, packages from the lowest to the highest."
    known = {name: [] for name in PACKAGES}
    for path in sorted(modules_of_notebooks()):
        known.setdefault(path.parent.name, []).append(path)
    return {name: paths for name, paths in known.items() if paths}


def run_chapters():
    return sorted(NBS.glob('*.ipynb'))


def toctree(pages, *options):
    return '\n'.join(['```{toctree}', ':maxdepth: 1', *options, '', *pages, '```'])


def chapters():
    "Contents of all chapters by package, then the run notebooks."
    parts = []
    for name, paths in chapters_by_package().items():
        pages = [f'chapters/{name}/{p.stem}' for p in paths]
        parts += [f'## {name}', PACKAGES.get(name, ''), toctree(pages)]
    about = 'Notebooks for papermill: a cell of parameters, and calls of the library.'
    pages = [f'chapters/{p.stem}' for p in run_chapters()]
    return '\n\n'.join([*parts, '## Run notebooks', about, toctree(pages)])


def one_sentence(module):
    "What a module says of itself, which is the subtitle of its notebook."
    return ' '.join((importlib.import_module(f'fdsl_nb.{module}').__doc__ or '').split()).strip('*')


def modules():
    "The reference by package: every module with its sentence."
    parts = []
    for name, paths in chapters_by_package().items():
        known = [modules_of_notebooks()[p] for p in paths]
        rows = [(f'[`{m}`](api/{m.replace(".", "/")}.rst)', one_sentence(m)) for m in known]
        pages = [f'api/{m.replace(".", "/")}' for m in known]
        contents = table(('module', 'what it is for'), rows)
        parts += [f'## {name}', PACKAGES.get(name, ''), contents, toctree(pages, ':hidden:')]
    return '\n\n'.join(parts)


# Contents

CONTENTS = {
    'Start here': ('tutorial', 'explorer', 'formulas'),
    'How to': (
        'own-formula',
        'own-data',
        'build-data',
        'many-gpus',
        'cluster',
        'resume',
        'evaluate',
        'ablations',
        'google',
        'coyo',
        'translate',
        'reproduced',
        'publish',
    ),
    'Look up': ('recipes', 'records', 'parameters', 'book', 'reference'),
    'Contribute': ('contributing', 'house', 'changelog'),
}


def contents():
    "The tables of contents of the start page, shown beside every page."
    return '\n\n'.join(
        f'```{{toctree}}\n:caption: {title}\n:hidden:\n\n' + '\n'.join(pages) + '\n```'
        for title, pages in CONTENTS.items()
    )


# The formula of the how-to


def first_code(page):
    "The first Python block of a page in this folder."
    return re.search(r'```python\n(.*?)```', (HERE / page).read_text('utf-8'), re.DOTALL)[1]


def julia():
    "Pictures drawn by the code on the page above: four classes in rows, six instances each."
    space = {'__name__': 'julia'}
    exec(compile(first_code('own-formula.md'), 'own-formula.md', 'exec'), space)
    f = space['Julia'](size=128)
    picture = png_bytes(tiled([[f.render(c, k) for k in range(6)] for c in range(4)], side=110))
    data = base64.b64encode(picture).decode()
    return f'![Julia sets: four classes in rows, six instances each](data:image/png;base64,{data})'

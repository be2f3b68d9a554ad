"""The rules of this repository. Each failure says what to do; CONTRIBUTING.md says why."""

import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import papermill
import pytest
from imports import arrows, circles, upward
from notebook_reading import (
    LIBRARY,
    NOTEBOOKS,
    PACKAGES,
    ROOT,
    RUNS,
    code_cells,
    directives,
    exported_cells,
    first_line,
    images_of,
    lines_of,
    module_of,
    name_of,
    prose_cells,
)

from fdsl_nb.core.settings import DEFAULTS

pytestmark = pytest.mark.process  # nbdev, ruff and git

# Modules written by hand, which no notebook exports. A new one needs a reason beside it.
PLAIN_MODULES = {
    '__init__.py',  # the version, read by setuptools, and the names most used
    'training/worker.py',  # started with `python -m`, so importing it must do no more than that
    'data/fast_augment.py',  # compiled twins of timm and Pillow, which are its specification
    'data/cuda_augment.py',  # what starts the CUDA twin of fast_augment.py, its specification
}


def text_of(path):
    "A file's text, a notebook's without its figures; '' for a binary file."
    if path.suffix != '.ipynb':
        try:
            return path.read_text('utf-8')
        except UnicodeDecodeError:
            return ''
    notebook = json.loads(path.read_text('utf-8'))
    for cell in notebook['cells']:
        for output in cell.get('outputs', ()):
            for kind in [k for k in output.get('data', {}) if k.startswith('image/')]:
                del output['data'][kind]
    # one value a line and no escapes, so that a match is found and shown as it reads
    strings = []

    def collect(value):
        if isinstance(value, str):
            strings.append(value)
        elif isinstance(value, list) and all(isinstance(v, str) for v in value):
            strings.append(''.join(value))
        elif isinstance(value, (list, dict)):
            for v in value.values() if isinstance(value, dict) else value:
                collect(v)

    collect(notebook)
    return '\n'.join(strings)


def refuse(faults, remedy):
    "Fail with all faults and what to do about them."
    faults = list(faults)
    if faults:
        pytest.fail('\n  '.join([f'{remedy}:', *faults]), pytrace=False)


def require(holds, message):
    "Fail with `message` unless the rule holds."
    if not holds:
        pytest.fail(message, pytrace=False)


def each(paths):
    return pytest.mark.parametrize('path', paths, ids=name_of)


# Notebooks and modules say the same


@pytest.fixture(scope='module')
def fresh(tmp_path_factory):
    "A copy of the repository without its modules, exported and cleaned anew."
    copy = tmp_path_factory.mktemp('repository')
    plain = [ROOT / 'fdsl_nb' / name for name in PLAIN_MODULES]
    for path in [ROOT / 'pyproject.toml', *NOTEBOOKS, *plain]:
        to = copy / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    for command in ('nbdev-export', 'nbdev-clean'):
        program = Path(sys.executable).with_name(command)
        done = subprocess.run([program], check=False, cwd=copy, capture_output=True, text=True)
        words = f'{done.stdout}{done.stderr}'
        require(done.returncode == 0, f'{command} stopped on the notebooks:\n{words}')
    return copy


def modules_in(top):
    paths = sorted((top / 'fdsl_nb').rglob('*.py'))
    return {p.relative_to(top).as_posix(): p.read_text('utf-8') for p in paths}


def test_modules_are_what_the_notebooks_export(fresh):
    ours, new = modules_in(ROOT), modules_in(fresh)
    # the index lists every module, so a leftover entry of a renamed notebook shows here too
    refuse(
        (name for name in new if ours.get(name) != new[name]),
        'differs from what the notebooks export; edit the notebook, then run `make prepare`',
    )


def test_no_module_without_a_notebook(fresh):
    refuse(
        sorted(modules_in(ROOT).keys() - modules_in(fresh).keys()),
        'no notebook exports this module; delete it, or add it to PLAIN_MODULES in '
        'tests/test_house.py with its reason',
    )


def test_notebooks_are_clean(fresh):
    changed = [p for p in NOTEBOOKS if p.read_bytes() != (fresh / p.relative_to(ROOT)).read_bytes()]
    refuse(map(name_of, changed), 'nbdev-clean would change this notebook; run `make prepare`')


def test_every_notebook_has_its_place():
    known = set(NOTEBOOKS)
    found = [p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]
    refuse(
        (name_of(p) for p in sorted(found) if p not in known),
        f'notebooks of the library stand in nbs/PACKAGE, one of {", ".join(PACKAGES)}; runs in nbs',
    )


@each(LIBRARY)
def test_a_notebook_is_named_like_its_module(path):
    name = f'{path.parent.name}.{path.stem[3:]}'
    require(
        re.fullmatch(r'\d\d_[a-z]\w*', path.stem) and module_of(path) == name,
        f'{name_of(path)} exports {module_of(path)!r}; NN_name.ipynb in the folder of a package '
        f'says `#| default_exp package.name`, here {name!r}',
    )


@pytest.mark.parametrize('package', PACKAGES)
def test_numbers_of_a_package_have_no_gap(package):
    names = [p.name for p in LIBRARY if p.parent.name == package]
    refuse(
        (name for n, name in enumerate(names) if not name.startswith(f'{n:02}_')),
        f'notebooks in nbs/{package} are numbered 00, 01, 02, … in the order of their imports; '
        'renumber from here on',
    )


# Imports


@pytest.fixture(scope='module')
def found_arrows():
    "Imports among our modules, without fdsl_nb/__init__.py, which is above all of them."
    found = arrows(modules_in(ROOT))
    return [a for a in found if 'fdsl_nb' not in (a.source, a.target)]


def test_imports_go_downward_between_packages(found_arrows):
    refuse(
        map(str, upward(found_arrows, PACKAGES)),
        f'packages import downward only, in the order {" < ".join(PACKAGES)}; move what both need '
        'down, or the caller up',
    )


def test_imports_make_no_circle(found_arrows):
    refuse(
        (' → '.join([*ring, ring[0]]) for ring in circles(found_arrows)),
        'modules import one another; put what they share below both',
    )


def test_no_module_is_imported_by_string(found_arrows):
    refuse(
        (str(a) for a in found_arrows if a.kind == 'string'),
        'our own modules are imported, not named; move the dispatcher above what it dispatches to, '
        'or let it find families by entry points',
    )


def test_numbers_ascend_within_a_package(found_arrows):
    numbers = {f'fdsl_nb.{module_of(p)}': (p.parent.name, p.name) for p in LIBRARY}
    faults = []
    for a in found_arrows:
        ours, theirs = numbers.get(a.source), numbers.get(a.target)
        if ours and theirs and ours[0] == theirs[0] and ours[1] <= theirs[1] and a.kind == 'import':
            faults.append(f'{a}: nbs/{"/".join(theirs)} does not come before nbs/{"/".join(ours)}')
    refuse(faults, 'within a package a notebook imports only from lower numbers; renumber')


MADE_UP = {
    'up/__init__.py': '',
    'up/low/__init__.py': '',
    'up/high/__init__.py': '',
    'up/low/a.py': 'from up.high.b import thing',
    'up/low/c.py': 'def late():\n    from . import d',
    'up/low/d.py': 'import up.low.c',
    'up/low/e.py': "import_module(f'up.high.{name}')\nimportlib.import_module('up.high.b')",
    'up/low/f.py': "run([python, '-m', 'up.high.b'])\nimport_module('uproar.low')",
    'up/high/b.py': 'from ..low.f import g\nfrom up.low import f',
}


def test_the_reader_of_imports_finds_what_is_wrong():
    found = arrows(MADE_UP, 'up')
    assert [str(a) for a in upward(found, ('low', 'high'), 'up')] == [
        'up.low.a, line 1, imports up.high.b',
        'up.low.e, line 1, imports by string up.high',
        'up.low.e, line 2, imports by string up.high.b',
    ]
    assert circles(found) == [['up.low.c', 'up.low.d']]
    assert [str(a) for a in found if a.kind == 'command'] == ['up.low.f, line 1, starts up.high.b']
    assert [a.target for a in found if a.source == 'up.high.b'] == ['up.low.f', 'up.low.f']


# Library notebooks


@each(LIBRARY)
def test_title_and_subtitle(path):
    top = '\n'.join(lines_of(prose_cells(path)[0])[:2])
    require(
        re.match(r'# \S.*\n> \S', top),
        f'{name_of(path)} opens with {top!r}; write `# Title` and below it a one-line '
        '`> subtitle` in the first markdown cell',
    )


@each(LIBRARY)
def test_imports_stand_alone(path):
    faults = []
    for cell in exported_cells(path):
        body = ast.parse(cell['source']).body
        kinds = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in body]
        if any(kinds) and not all(kinds):
            faults.append(first_line(cell))
    refuse(
        faults,
        f'{name_of(path)} mixes imports with other exported code; move them to a cell of their own',
    )


@each(LIBRARY)
def test_imports_name_what_they_use(path):
    made = {f'fdsl_nb.{module_of(p)}' for p in LIBRARY} | {
        f'fdsl_nb.{name[:-3]}'.replace('/', '.') for name in PLAIN_MODULES
    }
    faults = []
    nodes = [n for c in exported_cells(path) for n in ast.walk(ast.parse(c['source']))]
    for node in nodes:
        if isinstance(node, ast.Import):
            ours = [a.name for a in node.names if a.name.split('.')[0] == 'fdsl_nb']
            faults += [f'import {name}: write `from {name} import …`' for name in ours]
        if not isinstance(node, ast.ImportFrom):
            continue
        written = f'from {"." * node.level}{node.module or ""} import'
        if any(a.name == '*' for a in node.names):
            faults.append(f'{written} *: name what is used')
        ours = node.level or node.module.split('.')[0] == 'fdsl_nb'
        version = node.module == 'fdsl_nb' and [a.name for a in node.names] == ['__version__']
        if ours and not version and node.module not in made:
            faults.append(f'{written} …: write `from fdsl_nb.package.module import name`')
    refuse(faults, f'{name_of(path)} should import from modules of the package, name by name')


@each(NOTEBOOKS)
def test_files_are_small(path):
    size = path.stat().st_size
    require(
        size < 300_000,
        f'{name_of(path)} has {size:,} bytes; keep it below 300,000: fewer or smaller figures',
    )
    sizes = [(len(png), first_line(c)) for c in code_cells(path) for png in images_of(c)]
    refuse(
        (f'{size:,} bytes: {first}' for size, first in sizes if size >= 80_000),
        f'{name_of(path)} stores a figure of 80,000 bytes or more; draw it smaller or with fewer '
        'images',
    )


# Run notebooks


@each(RUNS)
def test_runs_export_nothing(path):
    exports = {'default_exp', 'export', 'exports', 'exporti'}
    refuse(
        (first_line(c) for c in code_cells(path) if directives(c) & exports),
        f'{name_of(path)} is a run and exports nothing; move the code to a notebook of a package',
    )


@each(RUNS)
def test_runs_have_typed_parameters_with_help(path):
    tagged = [c for c in code_cells(path) if 'parameters' in c['metadata'].get('tags', ())]
    require(
        len(tagged) == 1,
        f'{name_of(path)} has {len(tagged)} cells tagged `parameters`; papermill needs exactly one '
        '(View › Cell tags)',
    )
    lines = lines_of(tagged[0])
    # papermill is the judge: what it cannot read, `--help-notebook` and a reader do not see
    read = papermill.inspect_notebook(str(path))
    written = [line.split(':')[0].strip() for line in lines if not line.startswith('#')]
    pattern = re.compile(r'[a-z]\w*: [A-Za-z][\w\[\], ]* = [^=]+?  # \S[^=]*')
    faults = [f'another syntax: {line}' for line in lines if not pattern.fullmatch(line)]
    for name in written:
        known = read.get(name)
        if known is None or known['inferred_type_name'] in ('', 'None') or not known['help']:
            faults.append(f'papermill does not see its type or help: {name}')
    refuse(
        faults,
        f'{name_of(path)}: write every parameter as `name: type = default  # help`, one '
        'a line, with no second `=`',
    )


@each(RUNS)
def test_runs_only_call_the_library(path):
    faults = []
    for cell in code_cells(path):
        try:
            tree = ast.parse(cell['source'])
        except SyntaxError as e:
            faults.append(f'is not plain Python ({e.msg}): {first_line(cell)}')
            continue
        defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        faults += [f'defines {n.name}' for n in ast.walk(tree) if isinstance(n, defined)]
    if len(code_cells(path)) > 15:
        faults.append(f'has {len(code_cells(path))} code cells of at most 15')
    refuse(
        faults,
        f'{name_of(path)} should only call the library; move code to a notebook of a package',
    )


@each(RUNS)
def test_runs_are_stored_without_outputs(path):
    refuse(
        (first_line(c) for c in code_cells(path) if c['outputs'] or c['execution_count']),
        f'{name_of(path)} holds parameters, not results; clear all outputs '
        '(Jupyter: Edit › Clear Outputs of All Cells) and save',
    )


@each(RUNS)
def test_runs_name_their_kernel(path):
    metadata = json.loads(path.read_text('utf-8'))['metadata']
    kernel = metadata.get('kernelspec', {}).get('name')
    require(
        kernel == 'python3',
        f'{name_of(path)} asks for the kernel {kernel!r}; papermill needs '
        '"kernelspec": {"name": "python3"} in its metadata',
    )


# All files


def test_the_readme_leads_to_every_chapter():
    linked = re.findall(r'\((nbs/\w+/\w+\.ipynb)\)', (ROOT / 'README.md').read_text('utf-8'))
    assert sorted(set(linked)) == sorted(map(name_of, LIBRARY))


def test_the_linter_has_nothing_to_say():
    words = [sys.executable, '-m', 'ruff', 'check', '--output-format', 'concise', '--no-cache']
    done = subprocess.run(words, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope='module')
def tracked():
    "Every file that git tracks or would offer to track."
    # safe.directory: a checkout owned by another user, as in a container, is read all the same
    words = ['git', '-c', f'safe.directory={ROOT}', 'ls-files', '-z', '--cached', '--others']
    words.append('--exclude-standard')
    done = subprocess.run(words, check=False, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip('this is no git checkout, so there are no tracked files to read')
    names = sorted(set(done.stdout.split('\0')) - {''})
    return [ROOT / name for name in names if (ROOT / name).is_file()]


# Both patterns are written so that they do not find themselves.
PLACES = 'home|root|Users|work|tmp|mnt|opt|scratch'
ABSOLUTE = re.compile(rf'(?<![\w.~)}}\]$*-])(/(?:{PLACES})/[\w.]|[A-Z]:\\\\?Users)')
HOSTS = '|'.join(['py' + 'pi', 'python' + 'hosted', 'npm' + 'js', 'conda'])
OPTIONS = r'index[-_]url\b|find[-_]links\b|trusted[-_]host\b'
INDEX = re.compile(
    rf'\b({HOSTS})\.(org|com|io)|download\.pytorch\.org|\bconda\.anaconda\.|{OPTIONS}',
    re.IGNORECASE,
)
REMEDIES = [
    (ABSOLUTE, 'holds an absolute path, which no other machine has; write it from the checkout'),
    (
        INDEX,
        'names a package index; which one to use is the business of the machine (`pip config`)',
    ),
]


@pytest.mark.parametrize('pattern, remedy', REMEDIES, ids=['absolute paths', 'package indexes'])
def test_no_file_names(tracked, pattern, remedy):
    lines = [(p, line) for p in tracked for line in text_of(p).splitlines()]
    refuse(
        (f'{name_of(p)}: {line.strip()[:120]}' for p, line in lines if pattern.search(line)),
        f'a tracked file {remedy}',
    )


def test_settings_file_has_the_known_keys():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / 'settings.ini')
    ours = {(s, k) for s in parser.sections() for k in parser[s]}
    known = {(d.section, d.key) for d in DEFAULTS}
    faults = [
        f'[{s}] {k} is {"not known" if (s, k) in ours else "missing"}'
        for s, k in sorted(ours ^ known)
    ]
    refuse(
        faults,
        'settings.ini shows every key of fdsl_nb.core.settings.DEFAULTS and no other; '
        'change one or the other',
    )


def plain(requirement):
    "A requirement's name as pip compares it."
    return re.sub(r'[-_.]+', '-', re.match(r'[\w.-]+', requirement)[0]).lower()


def test_constraints_cover_the_dependencies():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text('utf-8'))['project']
    extras = project['optional-dependencies'].values()
    asked = [*project['dependencies'], *(r for extra in extras for r in extra)]
    lines = (ROOT / 'constraints.txt').read_text('utf-8').splitlines()
    pinned = {plain(line) for line in lines if '==' in line and not line.startswith('#')}
    pinned |= {'fdsl-nb'}  # an extra may be made of others
    refuse(
        (r for r in asked if plain(r) not in pinned),
        'constraints.txt does not pin a dependency; add the version that CI runs',
    )


def test_the_formula_of_the_guide_draws():
    guide = (ROOT / 'CONTRIBUTING.md').read_text('utf-8')
    example = re.search(r'```python\n(.*?)```', guide, re.DOTALL)[1]
    require(
        len(example.splitlines()) <= 30,
        'the formula in CONTRIBUTING.md is longer than the 30 lines it promises',
    )
    check = '''
image = stripes.render(9, 99)
assert image.shape == (64, 64) and image.dtype == "uint8" and set(image.flat) == {0, 255}
'''
    # its own process: it registers a name
    words = [sys.executable, '-c', f'{example}\n{check}']
    done = subprocess.run(words, check=False, capture_output=True, text=True, cwd=ROOT)
    require(
        done.returncode == 0,
        f'the formula in CONTRIBUTING.md draws no stripes; mend it there:\n{done.stderr}',
    )

"""The rules of the house: dull, and they must hold. Each failure says what to do about it; CONTRIBUTING.md says why."""

import ast, base64, configparser, functools, importlib.metadata, json, re, shutil, subprocess, sys
from pathlib import Path
import papermill, pytest
from fdsl_nb.core.settings import DEFAULTS

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
NUMBERED = [p for p in NOTEBOOKS if p.name[0].isdigit()]
RUNS = [p for p in NOTEBOOKS if not p.name[0].isdigit()]

# Modules written by hand, which no notebook exports. A new one needs a reason beside it.
PLAIN_MODULES = {
    '__init__.py',      # the version, read by setuptools
    'worker.py'}        # started with `python -m`, so importing it must do no more than that


# Reading notebooks

@functools.lru_cache(None)
def cells(path): return [{**c, 'source': ''.join(c['source'])} for c in json.loads(path.read_text('utf-8'))['cells']]

def code_cells(path): return [c for c in cells(path) if c['cell_type'] == 'code']
def prose_cells(path): return [c for c in cells(path) if c['cell_type'] == 'markdown']
def directives(cell): return {line[2:].split()[0].rstrip(':') for line in cell['source'].splitlines() if re.match(r'#\|\s*\w', line)}
def is_exported(cell): return cell['cell_type'] == 'code' and bool(directives(cell) & {'export', 'exports', 'exporti'})
def exported_cells(path): return [c for c in cells(path) if is_exported(c)]
def lines_of(cell): return [line for line in cell['source'].splitlines() if line.strip() and not line.startswith('#|')]
def first_line(cell): return (lines_of(cell) or [''])[0]

def words_of(markdown, skip='(?!)'):
    "How many words a reader reads: without code blocks, signs, and the lines that begin with `skip`."
    text = re.sub(r'```.*?(```|\Z)', '', markdown, flags=re.DOTALL)
    return sum(bool(re.search(r'\w', word)) for line in text.splitlines() if not re.match(skip, line) for word in line.split())

def images_of(cell):
    "The stored PNG figures of a cell, bytes each."
    for output in cell.get('outputs', ()):
        png = output.get('data', {}).get('image/png')
        if png: yield base64.b64decode(''.join(png))

def text_of(path):
    "A file's text, a notebook's without its figures; '' for a binary file."
    if path.suffix != '.ipynb':
        try: return path.read_text('utf-8')
        except UnicodeDecodeError: return ''
    notebook = json.loads(path.read_text('utf-8'))
    for cell in notebook['cells']:
        for output in cell.get('outputs', ()):
            for kind in [k for k in output.get('data', {}) if k.startswith('image/')]: del output['data'][kind]
    # one value a line and no escapes, so that a match is found and shown as it reads
    strings = []
    def collect(value):
        if isinstance(value, str): strings.append(value)
        elif isinstance(value, list) and all(isinstance(v, str) for v in value): strings.append(''.join(value))
        elif isinstance(value, (list, dict)):
            for v in value.values() if isinstance(value, dict) else value: collect(v)
    collect(notebook)
    return '\n'.join(strings)

def refuse(faults, remedy):
    "Fail with all faults and what to do about them."
    faults = list(faults)
    if faults: pytest.fail('\n  '.join([f'{remedy}:', *faults]), pytrace=False)

def require(holds, message):
    "Fail with `message` unless the rule holds."
    if not holds: pytest.fail(message, pytrace=False)

each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
each_numbered = pytest.mark.parametrize('path', NUMBERED, ids=lambda p: p.stem)
each_run = pytest.mark.parametrize('path', RUNS, ids=lambda p: p.stem)


# Notebooks and modules say the same

@pytest.fixture(scope='module')
def fresh(tmp_path_factory):
    "A copy of the house without its modules, exported and cleaned anew."
    copy = tmp_path_factory.mktemp('house')
    (copy/'nbs').mkdir(); (copy/'fdsl_nb').mkdir()
    shutil.copy(ROOT/'pyproject.toml', copy)
    for path in NOTEBOOKS: shutil.copy(path, copy/'nbs')
    for name in PLAIN_MODULES: shutil.copy(ROOT/'fdsl_nb'/name, copy/'fdsl_nb')
    for command in ('nbdev-export', 'nbdev-clean'):
        done = subprocess.run([Path(sys.executable).with_name(command)], check=False, cwd=copy, capture_output=True, text=True)
        require(done.returncode == 0, f'{command} stopped on the notebooks:\n{done.stdout}{done.stderr}')
    return copy

def test_modules_are_what_the_notebooks_export(fresh):
    ours, new = ({p.name: p.read_text('utf-8') for p in (top/'fdsl_nb').glob('*.py')} for top in (ROOT, fresh))
    # the index lists every module, so a leftover entry of a renamed notebook shows here too
    refuse((f'fdsl_nb/{name}' for name in new if ours.get(name) != new[name]),
        'differs from what the notebooks export; edit the notebook, never the module, then run `make prepare`')

def test_no_module_without_a_notebook(fresh):
    known = {p.relative_to(fresh) for p in (fresh/'fdsl_nb').rglob('*.py')}
    refuse((str(p.relative_to(ROOT)) for p in sorted((ROOT/'fdsl_nb').rglob('*.py')) if p.relative_to(ROOT) not in known),
        'no notebook exports this module; delete it, or add it to PLAIN_MODULES in tests/test_house.py with its reason')

def test_notebooks_are_clean(fresh):
    refuse((f'nbs/{p.name}' for p in NOTEBOOKS if p.read_bytes() != (fresh/'nbs'/p.name).read_bytes()),
        'nbdev-clean would change this notebook; run `make prepare`')


# Library notebooks

@each_numbered
def test_title_and_subtitle(path):
    top = '\n'.join(lines_of(prose_cells(path)[0])[:2])
    require(re.match(r'# \S.*\n> \S', top), f'nbs/{path.name} opens with {top!r}; write `# Title` and below it a one-line `> subtitle` in the first markdown cell')

@each_numbered
def test_imports_stand_alone(path):
    faults = []
    for cell in exported_cells(path):
        kinds = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(cell['source']).body]
        if any(kinds) and not all(kinds): faults.append(first_line(cell))
    refuse(faults, f'nbs/{path.name} mixes imports with other exported code; move them to a cell of their own')

@each_numbered
def test_imports_go_downward(path):
    floor = {d: p.name for p in NUMBERED for c in code_cells(p) for d in re.findall(r'^#\|\s*default_exp:?\s+(\S+)', c['source'], re.MULTILINE)}
    faults = []
    for node in (n for c in exported_cells(path) for n in ast.walk(ast.parse(c['source']))):
        if isinstance(node, ast.Import): faults += [f'import {a.name}: name what is used, `from {a.name} import …`' for a in node.names if a.name.startswith('fdsl_nb')]
        if not isinstance(node, ast.ImportFrom): continue
        if any(a.name == '*' for a in node.names): faults.append(f'from {node.module} import *: name what is used')
        if node.level or node.module == 'fdsl_nb': faults.append(f'from {"." * node.level}{node.module or ""} import …: write `from fdsl_nb.module import name`')
        elif node.module.startswith('fdsl_nb.'):
            lower = floor.get(node.module.split('.')[1])
            if lower is None: faults.append(f'from {node.module}: no numbered notebook exports it')
            elif lower >= path.name: faults.append(f'from {node.module}: it is made by {lower}, which does not come before {path.name}')
    refuse(faults, f'nbs/{path.name} may import only from notebooks with a lower number, name by name')

@each_numbered
def test_exported_cells_are_short(path):
    faults = []
    for cell in exported_cells(path):
        most = 40 if re.search(r'^@(numba\.)?njit\b', cell['source'], re.MULTILINE) else 20
        if len(lines_of(cell)) > most: faults.append(f'{len(lines_of(cell))} lines of {most}: {first_line(cell)}')
    refuse(faults, f'nbs/{path.name} has an exported cell that is too long; split it where an idea ends (fastcore @patch splits a class)')

@each_numbered
def test_prose_is_short(path):
    count = {first_line(c): words_of(c['source'], skip=r'\s*\||#+ |> ') for c in prose_cells(path)}     # tables, headings, subtitle
    refuse((f'{n} words: {first}' for first, n in count.items() if n > 80),
        f'nbs/{path.name} has a markdown cell of more than 80 words; cut it, or show something in between')

@each_numbered
def test_exported_cells_are_explained(path):
    faults, row = [], 0
    for cell in cells(path):
        if is_exported(cell): row += 1
        elif 'hide' not in directives(cell): row = 0         # what the reader does not see explains nothing
        if row == 3: faults.append(first_line(cell))
    refuse(faults, f'nbs/{path.name} has more than two exported cells in a row; put prose or a demonstration before this one')

@each_numbered
def test_more_words_than_code(path):
    words, lines = sum(words_of(c['source']) for c in prose_cells(path)), sum(len(lines_of(c)) for c in exported_cells(path))
    require(words >= 3 * lines,
        f'nbs/{path.name}: {words} words of prose for {lines} exported lines; three words a line are the least: say why, or write less code')

@each_numbered
def test_results_are_shown(path):
    shown, exported = sum(bool(c['outputs']) for c in code_cells(path)), len(exported_cells(path))
    require(3 * shown >= exported,
        f'nbs/{path.name}: {shown} displayed results for {exported} exported cells; end a demonstration in the value worth seeing')

@each_notebook
def test_files_are_small(path):
    size = path.stat().st_size
    require(size < 300_000,
        f'nbs/{path.name} has {size:,} bytes; keep it below 300,000: fewer or smaller figures')
    refuse((f'{len(png):,} bytes: {first_line(c)}' for c in code_cells(path) for png in images_of(c) if len(png) >= 80_000),
        f'nbs/{path.name} stores a figure of 80,000 bytes or more; draw it smaller or with fewer images')


# Run notebooks

@each_run
def test_runs_export_nothing(path):
    refuse((first_line(c) for c in code_cells(path) if directives(c) & {'default_exp', 'export', 'exports', 'exporti'}),
        f'nbs/{path.name} has no number, so it is a run and exports nothing; move the code to a numbered notebook')

@each_run
def test_runs_have_typed_parameters_with_help(path):
    tagged = [c for c in code_cells(path) if 'parameters' in c['metadata'].get('tags', ())]
    require(len(tagged) == 1,
        f'nbs/{path.name} has {len(tagged)} cells tagged `parameters`; papermill needs exactly one (View › Cell tags)')
    lines, rule = lines_of(tagged[0]), 'write every parameter as `name: type = default  # help`, one a line, with no second `=`'
    # papermill is the judge: what it cannot read, `--help-notebook` and a reader do not see
    read = papermill.inspect_notebook(str(path))
    written = [line.split(':')[0].strip() for line in lines if not line.startswith('#')]
    faults = [f'no such form: {line}' for line in lines if not re.fullmatch(r'[a-z]\w*: [A-Za-z][\w\[\], ]* = [^=]+?  # \S[^=]*', line)]
    faults += [f'papermill does not see its type or help: {name}' for name in written
               if name not in read or read[name]['inferred_type_name'] in ('', 'None') or not read[name]['help']]
    refuse(faults, f'nbs/{path.name}: {rule}')

@each_run
def test_runs_only_call_the_library(path):
    faults = []
    for cell in code_cells(path):
        try: tree = ast.parse(cell['source'])
        except SyntaxError as e: faults.append(f'is not plain Python ({e.msg}): {first_line(cell)}'); continue
        faults += [f'defines {node.name}' for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    if len(code_cells(path)) > 15: faults.append(f'has {len(code_cells(path))} code cells of at most 15')
    refuse(faults, f'nbs/{path.name} should only call the library; move code to a numbered notebook')

@each_run
def test_runs_are_stored_without_outputs(path):
    refuse((first_line(c) for c in code_cells(path) if c['outputs'] or c['execution_count']),
        f'nbs/{path.name} is a form, not a result; clear all outputs (Jupyter: Edit › Clear Outputs of All Cells) and save')

@each_run
def test_runs_name_their_kernel(path):
    kernel = json.loads(path.read_text('utf-8'))['metadata'].get('kernelspec', {}).get('name')
    require(kernel == 'python3',
        f'nbs/{path.name} asks for the kernel {kernel!r}; papermill needs "kernelspec": {{"name": "python3"}} in its metadata')


# All files

def test_the_readme_leads_to_every_chapter():
    linked = re.findall(r'\(nbs/(\d\w*\.ipynb)\)', (ROOT/'README.md').read_text('utf-8'))
    assert sorted(set(linked)) == sorted(p.name for p in (ROOT/'nbs').glob('[0-9]*.ipynb'))

def test_the_linter_has_nothing_to_say():
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--output-format', 'concise', '--no-cache'], check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

@pytest.fixture(scope='module')
def tracked():
    "Every file that git tracks or would offer to track."
    # safe.directory: a checkout owned by another user, as in a container, is read all the same
    done = subprocess.run(['git', '-c', f'safe.directory={ROOT}', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
        check=False, cwd=ROOT, capture_output=True, text=True)
    if done.returncode: pytest.skip('this is no git checkout, so there are no tracked files to read')
    return [p for p in (ROOT/name for name in sorted(set(done.stdout.split('\0')) - {''})) if p.is_file()]

# Both patterns are written so that they do not find themselves.
ABSOLUTE = re.compile(r'(?<![\w.~)}\]$*-])(/(?:home|root|Users|work|tmp|mnt|opt|scratch)/[\w.]|[A-Z]:\\\\?Users)')
HOSTS = '|'.join(['py' + 'pi', 'python' + 'hosted', 'npm' + 'js', 'conda'])    # in pieces, or this file would name them itself
INDEX = re.compile(rf'\b({HOSTS})\.(org|com|io)|download\.pytorch\.org|\bconda\.anaconda\.|index[-_]url\b|find[-_]links\b|trusted[-_]host\b', re.IGNORECASE)

@pytest.mark.parametrize('pattern, remedy', [(ABSOLUTE, 'holds an absolute path, which exists on one machine only; write it relative to the checkout'),
    (INDEX, 'names a package index; which one to use is the business of the machine (`pip config`)')], ids=['absolute paths', 'package indexes'])
def test_no_file_names(tracked, pattern, remedy):
    refuse((f'{p.relative_to(ROOT)}: {line.strip()[:120]}' for p in tracked for line in text_of(p).splitlines() if pattern.search(line)), f'a tracked file {remedy}')

def test_settings_file_has_the_known_keys():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT/'settings.ini')
    ours, known = {(s, k) for s in parser.sections() for k in parser[s]}, {(d.section, d.key) for d in DEFAULTS}
    refuse((f'[{s}] {k} is {"not known" if (s, k) in ours else "missing"}' for s, k in sorted(ours ^ known)),
        'settings.ini shows every key of fdsl_nb.core.settings.DEFAULTS and no other; change one or the other')

def test_constraints_cover_the_dependencies():
    plain = lambda requirement: re.sub(r'[-_.]+', '-', re.match(r'[\w.-]+', requirement)[0]).lower()
    pinned = {plain(line) for line in (ROOT/'constraints.txt').read_text('utf-8').splitlines() if '==' in line and not line.startswith('#')}
    pinned |= {'fdsl-nb'}           # an extra may be made of others
    refuse((r for r in importlib.metadata.requires('fdsl_nb') if plain(r) not in pinned),
        'constraints.txt does not pin a dependency; add the version that CI runs')

def test_the_formula_of_the_guide_draws():
    example = re.search(r'```python\n(.*?)```', (ROOT/'CONTRIBUTING.md').read_text('utf-8'), re.DOTALL)[1]
    require(len(example.splitlines()) <= 30, 'the formula in CONTRIBUTING.md is longer than the 30 lines it promises')
    check = 'image = stripes.render(9, 99)\nassert image.shape == (64, 64) and image.dtype == "uint8" and set(image.flat) == {0, 255}'
    done = subprocess.run([sys.executable, '-c', f'{example}\n{check}'], check=False, capture_output=True, text=True, cwd=ROOT)    # its own process: it registers a name
    require(done.returncode == 0, f'the formula in CONTRIBUTING.md draws no stripes; mend it there:\n{done.stderr}')

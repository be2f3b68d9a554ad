"""Builds the documentation into docs/_build/html: python docs/make.py

Pages are gathered in docs/_build/source: what is written here, the notebooks with their stored
outputs, and what only the package can say (recipes, knobs, parameters, the reference). Nothing is
executed but the sliders' pictures. With all of it there, Sphinx needs no network, and neither does
a reader.
"""

import ast
import hashlib
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import fields, is_dataclass
from pathlib import Path

import inserts
from house import imports_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SOURCE, HTML, BUNDLES = (HERE / '_build' / name for name in ('source', 'html', 'bundles'))

# What pages need in a browser, from npm: package, then file in it → its SHA-256
FROM_NPM = {
    'mathjax@3.2.2': {
        'es5/tex-svg.js': 'd4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882'
    },
    '@jupyter-widgets/html-manager@1.0.15': {
        'dist/embed.js': '8f6d2d3f856d8595d1841dec3019d99bbe74d331f2a5178c2a33bfec729e3d6a'
    },
}


# Bundles


def fetch_bundles():
    "Fetches from npm what is not there yet; `SystemExit` where a file is not ours, or npm missing."
    for package, files in FROM_NPM.items():
        name = re.sub(r'@[\d.]+$', '', package)
        if all((BUNDLES / name / file).exists() for file in files):
            continue
        if not shutil.which('npm'):
            sys.exit(
                'docs/make.py: npm is not here, and it brings MathJax and the widgets; '
                'install Node.js (Debian: apt-get install npm)'
            )
        BUNDLES.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ['npm', 'pack', '--silent', package],
            cwd=BUNDLES,
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(
                f'docs/make.py: npm cannot fetch {package}; is there a network?\n{done.stderr}'
            )
        archive = BUNDLES / done.stdout.split()[-1]
        with tarfile.open(archive) as tar:
            for file, expected in files.items():
                content = tar.extractfile(f'package/{file}').read()
                found = hashlib.sha256(content).hexdigest()
                if found != expected:
                    sys.exit(
                        f'docs/make.py: {file} of {package} has SHA-256 {found}, '
                        f'not {expected}; do not use it'
                    )
                (BUNDLES / name / file).parent.mkdir(parents=True, exist_ok=True)
                (BUNDLES / name / file).write_bytes(content)
        archive.unlink()


def place_bundles():
    shutil.copytree(HERE / '_static', SOURCE / '_static')
    for package, files in FROM_NPM.items():
        name = re.sub(r'@[\d.]+$', '', package)
        for file in files:
            to = SOURCE / '_static' / name.split('/')[-1] / Path(file).name
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(BUNDLES / name / file, to)


# Written pages


def page_of(path):
    "Where a file of the repository is among the pages; files that are no pages go to `files/`."
    path = Path(path)
    if path.suffix == '.ipynb':
        return Path('chapters') / path.relative_to('nbs')
    if path.parts[0] == 'docs':
        return path.relative_to('docs')
    special = {
        'README.md': 'index.md',
        'CONTRIBUTING.md': 'contributing.md',
        'CHANGELOG.md': 'changelog.md',
    }
    return Path(special.get(str(path), Path('files') / path))


def redirected(text, origin):
    "A page's text, its links leading through the pages; files that are no pages come along."
    here = page_of(origin).parent

    def redirect(m):
        target, _, anchor = m[1].partition('#')
        if not target or re.match(r'\w+:', target):
            return m[0]
        path = os.path.relpath((ROOT / origin).parent / target, ROOT)
        if not (ROOT / path).is_file():
            sys.exit(
                f'docs/make.py: {origin} links to {m[1]}, which is not there; correct the link'
            )
        if page_of(path).suffix not in ('.md', '.ipynb'):
            (SOURCE / page_of(path)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, SOURCE / page_of(path))
        return f']({os.path.relpath(page_of(path), here)}{"#" * bool(anchor)}{anchor})'

    parts = re.split(r'(```.*?```|`[^`\n]*`)', text, flags=re.DOTALL)  # links in code are none
    parts[::2] = [re.sub(r'\]\(([^)\s]+)\)', redirect, part) for part in parts[::2]]
    return ''.join(parts)


def write_page(origin):
    "A Markdown file of the repository, with what `inserts` makes of `<!-- insert NAME … -->`."

    def insert(m):
        return getattr(inserts, m[1])(*m[2].split())

    text = redirected((ROOT / origin).read_text('utf-8'), origin)
    text = re.sub(r'<!-- insert (\w+) ?(.*?) -->', insert, text)
    (SOURCE / page_of(origin)).write_text(text, 'utf-8')


# Chapters


def directives(cell):
    return (
        re.findall(r'^#\| *(\w+)[: ]*(.*)$', cell['source'], re.MULTILINE)
        if cell['cell_type'] == 'code'
        else []
    )


def patched_methods(cell):
    "Methods that a cell's `@patch` adds: their names, and `Class.name`."
    for node in ast.parse(cell['source']).body:
        if isinstance(node, ast.FunctionDef) and any(
            getattr(d, 'id', getattr(getattr(d, 'func', None), 'id', '')) == 'patch'
            for d in node.decorator_list
        ):
            yield node.name, f'{ast.unparse(node.args.args[0].annotation)}.{node.name}'


def prose(text):
    return dict(cell_type='markdown', metadata={}, source=text)


def module_of(path):
    "The module that a notebook exports, as `package.name`; None for a run notebook."
    return inserts.modules_of_notebooks().get(path)


def chapter(path):
    "Makes a page of a notebook, without hidden cells; name → full name of what its code uses."
    notebook = json.loads(path.read_text('utf-8'))
    module = module_of(path)
    origin = path.relative_to(ROOT).as_posix()
    page = page_of(origin)
    names, cells = {}, []
    for cell in notebook['cells']:
        cell['source'] = ''.join(cell['source'])
        found = dict(directives(cell))
        names |= imports_of(cell['source'])
        if 'hide' in found or 'default_exp' in found:
            continue
        if 'export' in found:
            cell['metadata']['tags'] = ['exported']
            names |= {name: f'fdsl_nb.{module}.{full}' for name, full in patched_methods(cell)}
        if cell['cell_type'] == 'markdown':
            cell['source'] = redirected(cell['source'], origin)
        else:
            cell['source'] = re.sub(r'^#\|.*\n?', '', cell['source'], flags=re.MULTILINE)
        cells.append(cell)
    if module:
        python = importlib.import_module(f'fdsl_nb.{module}')
        names |= {name: f'fdsl_nb.{module}.{name}' for name in python.__all__}
        link = os.path.relpath(api_page_of(module), page.parent)
        about = f'Module [`fdsl_nb.{module}`]({link}), written as the notebook `{origin}`.'
        cells.insert(1, prose(f'{about} Cells with a coloured edge are the package.'))
    notebook['cells'] = [dict(c, id=f'cell-{n}') for n, c in enumerate(cells)]
    notebook['metadata']['language_info'] = dict(name='python', pygments_lexer='python')
    (SOURCE / page).parent.mkdir(parents=True, exist_ok=True)
    (SOURCE / page).write_text(json.dumps(notebook), 'utf-8')
    return names


# Reference


def api_page_of(module):
    "Where the reference of `package.name` is among the pages."
    return Path('api', *module.split('.')).with_suffix('.rst')


def api_page(module, chapter):
    "A page that lists a module's public names in the order of the source."
    python = importlib.import_module(f'fdsl_nb.{module}')
    words = ' '.join((python.__doc__ or '').split()).strip('*').replace('`', '``')
    title = f'fdsl_nb.{module}'
    lines = [title, '=' * len(title), '', words, '', f'.. module:: {title}', '']
    lines += [f'The chapter that explains it: :doc:`/{chapter.with_suffix("")}`', '']
    for name in getattr(python, '__all__', ()):
        thing = getattr(python, name)
        if inspect.isclass(thing):
            ours = [f.name for f in fields(thing)] if is_dataclass(thing) else []
            lines.append(f'.. autoclass:: {name}')
            if ours:
                lines.append(f'   :exclude-members: {", ".join(ours)}')
        else:
            kind = 'autofunction' if inspect.isroutine(thing) else 'autodata'
            lines.append(f'.. {kind}:: {name}')
        lines.append('')
    page = SOURCE / api_page_of(module)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text('\n'.join(lines), 'utf-8')


def gather():
    "All pages into SOURCE."
    shutil.rmtree(SOURCE, ignore_errors=True)
    place_bundles()
    for folder in ('images', 'cluster', 'experiments'):
        shutil.copytree(HERE / folder, SOURCE / folder)
    for path in (*HERE.glob('*.md'), ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md'):
        write_page(str(path.relative_to(ROOT)))
    notebooks = [path for paths in inserts.chapters_by_package().values() for path in paths]
    pages = {
        path: page_of(path.relative_to(ROOT)) for path in [*notebooks, *inserts.run_chapters()]
    }
    names = {page.with_suffix('').as_posix(): chapter(path) for path, page in pages.items()}
    (SOURCE / 'names.json').write_text(json.dumps(names), 'utf-8')
    for path in notebooks:
        api_page(module_of(path), pages[path])


def main():
    fetch_bundles()
    gather()
    shutil.rmtree(HTML, ignore_errors=True)
    words = ['-b', 'html', '-j', '2', '-q', '-W', '--keep-going', '-c', HERE]
    words += ['-d', HERE / '_build' / 'doctrees', SOURCE, HTML]
    done = subprocess.run([sys.executable, '-m', 'sphinx', *map(str, words)], check=False)
    if done.returncode == 0:
        print('documentation:', os.path.relpath(HTML / 'index.html'))
    return done.returncode


if __name__ == '__main__':
    sys.exit(main())

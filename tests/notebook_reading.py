"""Reading notebooks, for the rules in test_house.py and the report in style.py."""

import base64
import functools
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# from the lowest to the highest; imports go downward only
PACKAGES = ('core', 'formulas', 'models', 'data', 'build', 'training', 'app')
LIBRARY = [p for name in PACKAGES for p in sorted((ROOT / 'nbs' / name).glob('*.ipynb'))]
RUNS = sorted((ROOT / 'nbs').glob('*.ipynb'))
NOTEBOOKS = [*LIBRARY, *RUNS]


def name_of(path):
    "A notebook's path from the checkout, as one reads it in a message."
    return path.relative_to(ROOT).as_posix()


@functools.lru_cache(None)
def cells(path):
    found = json.loads(path.read_text('utf-8'))['cells']
    return [{**c, 'source': ''.join(c['source'])} for c in found]


def code_cells(path):
    return [c for c in cells(path) if c['cell_type'] == 'code']


def prose_cells(path):
    return [c for c in cells(path) if c['cell_type'] == 'markdown']


def directives(cell):
    "The names of a cell's directives, such as `export` or `hide`."
    lines = cell['source'].splitlines()
    return {line[2:].split()[0].rstrip(':') for line in lines if re.match(r'#\|\s*\w', line)}


def is_exported(cell):
    return cell['cell_type'] == 'code' and bool(directives(cell) & {'export', 'exports', 'exporti'})


def exported_cells(path):
    return [c for c in cells(path) if is_exported(c)]


def module_of(path):
    "The module that a notebook exports, as `package.name`; None where it exports none."
    named = [
        re.findall(r'^#\|\s*default_exp:?\s+(\S+)', c['source'], re.MULTILINE)
        for c in code_cells(path)
    ]
    return next((names[0] for names in named if names), None)


def lines_of(cell):
    return [
        line for line in cell['source'].splitlines() if line.strip() and not line.startswith('#|')
    ]


def first_line(cell):
    return (lines_of(cell) or [''])[0]


def words_of(markdown):
    "How many words a reader reads: without code blocks and signs."
    text = re.sub(r'```.*?(```|\Z)', '', markdown, flags=re.DOTALL)
    return sum(bool(re.search(r'\w', word)) for word in text.split())


def images_of(cell):
    "The stored PNG figures of a cell, bytes each."
    for output in cell.get('outputs', ()):
        png = output.get('data', {}).get('image/png')
        if png:
            yield base64.b64decode(''.join(png))

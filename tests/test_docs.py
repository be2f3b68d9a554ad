"""The documentation is built without a warning, its links lead somewhere, its commands work."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from notebook_reading import LIBRARY, NOTEBOOKS, ROOT, module_of

PAGES = sorted((ROOT / 'docs').glob('*.md'))


class Links(HTMLParser):
    "Where a page leads to (`links`), and where one can arrive in it (`names`)."

    def __init__(self, text):
        super().__init__()
        self.links, self.names = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [
            found[k]
            for k in ('href', 'src')
            if found.get(k) and not (tag == 'link' and found.get('rel') == 'canonical')
        ]
        self.names |= {found[k] for k in ('id', 'name') if found.get(k)}


def test_every_link_of_the_documentation_leads_somewhere(documentation):
    pages = {
        p.resolve(): Links(p.read_text('utf-8'))
        for p in documentation.rglob('*.html')
        if '_static' not in p.parts
    }
    faults = []
    for page, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if not target.is_file():
                faults.append(f'{page.name}: {link} is not there')
            elif (
                parts.fragment
                and target in pages
                and unquote(parts.fragment) not in pages[target].names
            ):
                faults.append(f'{page.name}: {link} has no such place')
    assert faults == []
    assert len(pages) > 50


def test_nothing_a_page_needs_is_elsewhere(documentation):
    "Scripts, styles and pictures are files of the site; only links that are clicked may lead out."
    away = [
        f'{p.name}: {src}'
        for p in documentation.rglob('*.html')
        if '_static' not in p.parts
        for src in re.findall(
            r'<(?:script|img|iframe|link)\b[^>]*?(?:src|href)="(https?:[^"]+)"',
            p.read_text('utf-8'),
        )
    ]
    assert away == []


def test_code_leads_to_the_reference(documentation):
    (chapter,) = (documentation / 'chapters' / 'formulas').glob('*_formula.html')
    text = chapter.read_text('utf-8')
    for module, name in (('formulas.formula', 'Formula'), ('core.rng', 'CounterRandom')):
        assert f'href="../../api/{module.replace(".", "/")}.html#fdsl_nb.{module}.{name}"' in text
    assert '#|' not in re.sub(r'<[^>]+>', '', text), 'a directive of nbdev shows'


def test_the_reference_explains_parameters(documentation):
    text = re.sub(
        r'<[^>]+>', '', (documentation / 'api' / 'formulas' / 'formula.html').read_text('utf-8')
    )
    assert 'c – class, 0 … classes - 1' in text and 'uint8 [size, size] or [size, size, 3]' in text
    assert 'seed – of the canonical random streams; 0 … 2⁶⁴ − 1' in text


def code_blocks(page, language='python'):
    return re.findall(rf'```{language}\n(.*?)```', page.read_text('utf-8'), re.DOTALL)


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_python_of_the_pages_compiles_and_imports(page):
    for block in code_blocks(page):
        compile(block, page.name, 'exec')
        for line in re.findall(r'^from fdsl_nb.*', block, re.MULTILINE):
            exec(line, {})


@pytest.mark.process
def test_the_formula_of_the_how_to_is_short_draws_and_is_a_data_set(tmp_path):
    code = code_blocks(ROOT / 'docs' / 'own-formula.md')[0]
    assert len(code.splitlines()) <= 33, 'thirty lines, and three imports'
    (tmp_path / 'julia.py').write_text(code)
    check = '''
from fdsl_nb.formulas.formula import formula
f = formula('julia:Julia')
images = [f.render(c, k) for c in range(3) for k in range(2)]
assert all(i.shape == (64, 64) and i.dtype == 'uint8' for i in images)
assert len({i.tobytes() for i in images}) == 6 and all(i.std() > 10 for i in images)
from fdsl_nb.data.datasets import open_dataset
assert len(open_dataset('julia:Julia', classes=4, instances=5)) == 20
'''
    done = subprocess.run(
        [sys.executable, '-c', check], check=False, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_map_of_the_house_names_every_chapter():
    rows = re.findall(
        r'^\| `(\w+)/(\w+)` \| `(\w+)` \|',
        (ROOT / 'docs' / 'house.md').read_text('utf-8'),
        re.MULTILINE,
    )
    assert rows == [(p.parent.name, p.stem, module_of(p).split('.')[1]) for p in LIBRARY]


def test_commands_of_the_pages_name_parameters_that_exist():
    from fdsl_nb.app.cli import asked_for
    from fdsl_nb.app.parameters import check_parameters
    import shlex

    commands = [
        c
        for page in [*PAGES, ROOT / 'README.md']
        for c in re.findall(
            r'^fdsl run .*', page.read_text('utf-8').replace('\\\n', ' '), re.MULTILINE
        )
    ]
    for command in commands:
        _, _, notebook, *words = shlex.split(
            command.split('  #')[0].replace(' …', ' x'), comments=True
        )
        check_parameters(notebook, asked_for(words))
    assert len(commands) > 15


@pytest.mark.parametrize('path', [*PAGES, ROOT / 'README.md', *NOTEBOOKS], ids=lambda p: p.stem)
def test_an_exported_network_is_opened_with_its_weights(path):
    calls = re.findall(r"create_model\('local-dir:[^)]*\)", path.read_text('utf-8'))
    assert [call for call in calls if 'pretrained=True' not in call] == [], (
        'without pretrained=True timm makes random weights'
    )

"""Names of classes, files, runs and data sets stay texts: in HTML, in Markdown and in figures."""

import io
import json
import shutil
import subprocess
from html.parser import HTMLParser

import ipywidgets as widgets
import numpy as np
import pandas as pd
import pytest
from fake_runs import fake_run
from markdown_it import MarkdownIt
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from fdsl_nb.app.attention import AttentionExplorer
from fdsl_nb.app.browser import RunBrowser, head_line, report_links, run_line
from fdsl_nb.app.compare import (
    compare_figure,
    compare_table,
    differences,
    png_of,
    read_run,
    run_row,
)
from fdsl_nb.build.build import build
from fdsl_nb.build.parquet import export_parquet
from fdsl_nb.core.settings import markdown_text
from fdsl_nb.formulas.layout import metadata_folder
from fdsl_nb.formulas.formula import show_grid
from fdsl_nb.models.checkpoints import export_model
from fdsl_nb.models.models import create_model
from fdsl_nb.training.evaluate import Predictions, per_class, show_confusion, show_mistakes
from fdsl_nb.training.training import _description
from fdsl_nb.training.plan import run_config

EVIL = '<img src=x onerror=alert(1)>'
TRICKS = [
    EVIL,
    '"><script>alert(1)<',
    '[a](javascript:alert(1))',
    '![a](x.png)',
    '`| a |`',
    '<!-- ',
    '&lt;b&gt;',
    '$\\bad$',
    "'onmouseover='alert(1)",
]


class Tags(HTMLParser):
    "The tags of a page, and its attributes that could run something."

    def __init__(self, page):
        super().__init__()
        self.tags, self.running = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name.startswith('on') or (name in ('href', 'src') and 'javascript:' in value):
                self.running.append((tag, name, value))

    def handle_comment(self, data):
        self.tags.append('comment')


def is_harmless(page, allowed=()):
    "No tag that a name brought along, and nothing that runs."
    found = Tags(page)
    return not found.running and not {'img', 'script', 'comment', 'a'} - set(allowed) & set(
        found.tags
    )


def evil_run(root, name, **more):
    "A run of that name, whose configuration says that name wherever a name stands."
    folder = fake_run(root, name.replace('/', ' ')).path
    config = json.loads((folder / 'config.json').read_text())
    values = dict(dataset=f'/data/{name}', name=name) | more
    config |= {k: dict(value=v, source='test') for k, v in values.items()}
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize('name', TRICKS)
def test_runs_in_html(name, tmp_path):
    folder = evil_run(tmp_path, name)
    for file in ('.csv', '.html', '.json', '#?.ipynb'):
        (folder / f'{name.replace("/", " ")}{file}').write_text('{}')
    status = json.loads((folder / 'status.json').read_text())
    (folder / 'status.json').write_text(json.dumps(status | dict(state=name, reason=name)))
    run = read_run(folder)
    assert is_harmless(run_line(run_row(run), run.reason) + head_line())
    assert is_harmless(report_links(run), allowed=['a'])
    assert run.reason == name


def test_a_run_of_strange_values_is_damaged_and_others_are_shown(tmp_path):
    good = evil_run(tmp_path, 'good')
    for n, epochs in enumerate((EVIL, [1], {}, -1, 10**30, '1/2/3')):
        evil_run(tmp_path, f'run {n}', epochs=epochs)
    browser = RunBrowser(tmp_path)
    try:
        pages = [line.value for line in browser.lines.values()]
        assert len(pages) == 7 and all(map(is_harmless, pages))
        assert sum('good' in page for page in pages) == 1 and good.is_dir()
    finally:
        browser.close()


def values_of(widget):
    "All HTML in a widget and those in it."
    found = [widget.value] if isinstance(widget, widgets.HTML) else []
    for child in getattr(widget, 'children', ()):
        found += values_of(child)
    return found


def test_the_browser_of_runs_shows_texts(tmp_path):
    for n, name in enumerate(TRICKS):
        evil_run(tmp_path, f'{n} {name}')
    browser = RunBrowser(tmp_path)
    try:
        browser.tick([str(p.relative_to(tmp_path)) for p in browser.seen])
        browser.pages.selected_index = 1
        pages = [browser.message.value, browser.differ.value, browser.head.value]
        pages += [line.value for line in browser.lines.values()]
        assert len(pages) == 3 + len(TRICKS) and all(map(is_harmless, pages))
        browser.pages.selected_index = 2
        links = [output['data']['text/html'] for output in browser.links.outputs]
        assert links and all(is_harmless(page, allowed=['a']) for page in links)
    finally:
        browser.close()


def test_tables_show_texts(tmp_path):
    folders = [evil_run(tmp_path, f'{n} {name}') for n, name in enumerate(TRICKS)]
    answers = Predictions(np.zeros((4, 5), np.int64), np.arange(4), np.ones(4))
    tables = [compare_table(folders), differences(folders), per_class(answers, TRICKS[:4])]
    for table in tables:
        assert isinstance(table, pd.DataFrame)
        assert is_harmless(table._repr_html_()) and is_harmless(table.to_html())


def rendered(markdown):
    return MarkdownIt('gfm-like', dict(html=True, linkify=False)).render(markdown)


@pytest.mark.parametrize('name', TRICKS)
def test_a_name_in_markdown_is_a_text(name):
    page = rendered(
        f'# {markdown_text(name)}\n\n| a | b |\n|---|---|\n| {markdown_text(name)} | c |'
    )
    assert is_harmless(page)
    assert page.count('<td>') == 2
    texts = []
    reader = HTMLParser(convert_charrefs=True)
    reader.handle_data = texts.append
    reader.feed(page)
    assert ''.join(texts).count(name.strip()) == 2


@pytest.mark.parametrize('name', [EVIL, '[a](javascript:1) ![b](c) | d', '`| a |`'])
def test_data_cards_show_texts(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for c in ('a', name):
        (tmp_path / name / 'train' / c).mkdir(parents=True)
        Image.new('L', (8, 8)).save(tmp_path / name / 'train' / c / '1.png')
    build(name, 'out', workers=0, progress=print)
    export_parquet(name, 'parquet', workers=0, progress=print)
    for card in (metadata_folder('out') / 'README.md', tmp_path / 'parquet' / 'README.md'):
        text = card.read_text('utf-8')
        page = rendered(text.split('---\n', 2)[2] if text.startswith('---') else text)
        assert Tags(page).tags.count('img') == 1  # the contact sheet
        assert is_harmless(page, allowed=['img'])


def network(classes=3):
    small = dict(patch_size=8, depth=1, embed_dim=24, num_heads=2)
    return create_model('vit_tiny_patch16_224', classes, 32, seed=0, **small)


def model_card(folder, name):
    "The page of a model that was trained on a data set of that name."
    c = run_config(dict(dataset=name, folder=str(folder), stage='finetune'))
    export_model(folder / 'model', network(), description=_description(c))
    return rendered((folder / 'model' / 'README.md').read_text('utf-8'))


def test_model_cards_show_texts(tmp_path):
    assert is_harmless(model_card(tmp_path, EVIL + '[a](javascript:1)'))


class Pictures:
    "Grey pictures of classes with these names."

    def __init__(self, names):
        self.classes = names

    def __len__(self):
        return len(self.classes)

    def __getitem__(self, i):
        return Image.new('L', (32, 32), 20 * i), i


def attention_page(names):
    "What the attention widget says of a picture of each class."
    explorer = AttentionExplorer(network(len(names)), Pictures(names))
    pages = []
    for i in range(len(names)):
        explorer.number.value = i
        pages += values_of(explorer.widget)
    return '\n'.join(pages)


def test_the_attention_widget_shows_texts():
    page = attention_page(TRICKS)
    assert page.count('answered') == len(TRICKS) and is_harmless(page)


def report_page(name):
    "An executed notebook of a run with that name in its values and its tables, as HTML."
    answers = Predictions(np.zeros((4, 5), np.int64), np.arange(4), np.ones(4))
    table = per_class(answers, [name, 'b', 'c', 'd'])
    shown = {'text/html': table._repr_html_(), 'text/plain': str(table)}
    outputs = [
        new_output('execute_result', shown),
        new_output('stream', name='stdout', text=f'class {name}'),
        new_output('error', ename='ValueError', evalue=name, traceback=[f'ValueError: {name}']),
    ]
    notebook = new_notebook(cells=[new_code_cell(f'dataset = {name!r}', outputs=outputs)])
    return HTMLExporter(template_name='basic').from_notebook_node(notebook)[0]


CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')


def runs_in_chromium(page, folder):
    "Does opening the page run `ran()`?"
    head = '<script>function ran() { document.documentElement.id = "it-ran" }</script>'
    file = folder / 'page.html'
    file.write_text(f'<!doctype html><html><head>{head}</head><body>{page}</body></html>', 'utf-8')
    words = [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={folder}']
    more = ['--virtual-time-budget=3000', '--dump-dom', file.as_uri()]
    done = subprocess.run(words + more, check=True, capture_output=True, text=True, timeout=180)
    assert '</html>' in done.stdout, done.stderr
    return 'id="it-ran"' in done.stdout


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(not CHROMIUM, reason='Chromium is not here (Debian: apt-get install chromium)')
def test_no_name_runs_in_chromium(tmp_path):
    "Pages of runs, cards, tables, a report and the attention widget, opened at once."
    names = ['<img src=x onerror=ran()>', '"><svg onload=ran()>', "' onmouseover='ran()"]
    names.append('"><script>ran()<')
    pages = [attention_page(names)]
    for n, name in enumerate(names):
        folder = evil_run(tmp_path / 'runs', f'{n} {name}')
        (folder / f'{name}.ipynb').write_text('{}')
        run = read_run(folder)
        pages += [run_line(run_row(run), name) + report_links(run), report_page(name)]
        pages += [model_card(tmp_path / str(n), name), rendered(markdown_text(name))]
    pages.append(differences(sorted((tmp_path / 'runs').iterdir()))._repr_html_())
    assert all(page.count('ran()') for page in pages)
    assert not runs_in_chromium('\n'.join(pages), tmp_path)
    assert runs_in_chromium('\n'.join([*pages, names[0]]), tmp_path), 'what is not escaped would'


def test_figures_take_no_name_for_a_formula(tmp_path):
    names = ['$\\bad$', '$x$', '$', 'a']
    grey = np.zeros((8, 8), np.uint8)
    answers = Predictions(np.zeros((4, 5), np.int64), np.arange(4), np.ones(4))
    images = [(Image.fromarray(grey), n) for n in range(4)]
    folders = [evil_run(tmp_path, name) for name in names]
    figures = [
        show_grid([[grey]] * 4, names),
        show_mistakes(answers, images, names),
        show_confusion(answers.counts(4), names),
        compare_figure(folders),
    ]
    for figure in figures:
        figure.savefig(io.BytesIO())
    assert png_of(figures[-1]).startswith(b'\x89PNG')

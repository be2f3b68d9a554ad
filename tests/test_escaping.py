"""Names of classes, files, runs and data sets stay texts: in HTML, in Markdown and in figures."""

import io
import json
from html.parser import HTMLParser

import ipywidgets as widgets
import numpy as np
import pandas as pd
import pytest
from fake_runs import fake_run
from markdown_it import MarkdownIt
from PIL import Image

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
from fdsl_nb.data.shards import metadata_folder
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


def test_model_cards_show_texts(tmp_path):
    c = run_config(dict(dataset=EVIL + '[a](javascript:1)', folder=str(tmp_path), stage='finetune'))
    small = dict(patch_size=8, depth=1, embed_dim=24, num_heads=2)
    model = create_model('vit_tiny_patch16_224', 3, 32, seed=0, **small)
    export_model(tmp_path / 'model', model, description=_description(c))
    assert is_harmless(rendered((tmp_path / 'model' / 'README.md').read_text('utf-8')))


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

"""The browser of runs, driven without a page: looking, ticking, living and dying runs, its thread,
and browse.ipynb."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import papermill
import pytest
from click import ClickException
from fake_runs import add_fake_epoch, fake_run
from PIL import Image

from fdsl_nb.app.browser import RunBrowser, browse, look, report_links
from fdsl_nb.app.compare import read_run
from fdsl_nb.core.folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def root(tmp_path):
    fake_run(tmp_path, 'rcdb/first', lr=0.2)
    fake_run(tmp_path, 'rcdb/second', 'failed', 1)
    fake_run(tmp_path, 'atoms', 'running', 2, dataset='visualatom')
    return tmp_path


@pytest.fixture
def opened(root):
    browser = RunBrowser(root, every=0.02)
    yield browser
    browser.close()


def line(browser, name):
    return browser.lines[browser.root / name].value


def ticked(browser):
    return sorted(str(p.relative_to(browser.root)) for p in browser.chosen)


def size(png):
    return Image.open(io.BytesIO(png)).size


def wait_for(what, seconds=20):
    end = time.time() + seconds
    while not what() and time.time() < end:
        time.sleep(0.02)
    return what()


# Looking


def test_only_what_changed_is_read_again(root, monkeypatch):
    first, reads = look(root), []
    monkeypatch.setattr(
        'fdsl_nb.app.browser.read_run', lambda path: reads.append(path.name) or read_run(path)
    )
    assert look(root, first) == first and reads == []
    add_fake_epoch(RunFolder(root / 'atoms'), 2)
    assert len(look(root, first)[root / 'atoms'][1].epochs) == 3 and reads == ['atoms']


def test_a_damaged_run_is_shown_beside_the_others(root, opened):
    (root / 'rcdb' / 'first' / 'summary.csv').write_text('epoch,train_loss\n0,<b>\n')
    opened.look()
    assert (
        'damaged' in line(opened, 'rcdb/first')
        and 'summary.csv is damaged' in line(opened, 'rcdb/first')
        and '<b>' not in line(opened, 'rcdb/first')
    )
    assert 'running' in line(opened, 'atoms') and '1 damaged' in opened.message.value
    assert size(opened.still()) and 'rcdb/first' not in repr(opened)
    for page in range(3):
        opened.pages.selected_index = page
    (root / 'rcdb' / 'first' / 'summary.csv').write_text('epoch,train_loss\n0,2.5\n')
    opened.look()
    assert 'damaged' not in opened.message.value and '2.5' in line(opened, 'rcdb/first')


@pytest.mark.long
def test_status_of_any_damage_does_not_stop_a_look(root, opened):
    whole = (root / 'atoms' / 'status.json').read_bytes()
    for data in (
        b'',
        whole[:20],
        b'[]',
        b'{"state": "running"}',
        *(whole[:i] + bytes([whole[i] ^ 0x11]) + whole[i + 1 :] for i in range(0, len(whole), 3)),
    ):
        (root / 'atoms' / 'status.json').write_bytes(data)
        opened.look()
        assert 'rcdb/first' in line(opened, 'rcdb/first')


@pytest.mark.process
def test_a_run_whose_process_died_is_interrupted(root, opened):
    code = f'''
import time
from fdsl_nb.core.folder import RunFolder, set_status
set_status(RunFolder({str(root / "atoms")!r}), "running")
print("up", flush=True)
time.sleep(100)
'''
    child = subprocess.Popen(
        [sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert child.stdout.readline() == 'up\n'
    opened.look()
    assert 'running' in line(opened, 'atoms') and '<progress' in line(opened, 'atoms')
    child.send_signal(signal.SIGKILL)
    child.wait()
    opened.look()
    assert 'interrupted' in line(opened, 'atoms') and '<progress' not in line(opened, 'atoms')


def test_a_folder_that_goes_away(root, opened):
    (root / 'atoms' / 'status.json').unlink()
    opened.look()
    assert root / 'atoms' not in opened.seen and len(opened.table.children) == 3
    opened.root = root / 'nowhere'
    opened.look()
    assert 'nowhere is no folder' in opened.message.value


# The widgets, driven as a hand would


def test_narrowing_down_and_ticking(opened):
    assert sorted(opened.message.value.split(', ')) == ['1 done', '1 failed', '1 running']
    assert len(opened.table.children) == 4 and ticked(opened) == [
        'atoms',
        'rcdb/first',
        'rcdb/second',
    ]
    opened.words.value = 'rcdb'
    assert len(opened.table.children) == 3 and ticked(opened) == [
        'atoms',
        'rcdb/first',
        'rcdb/second',
    ], 'a tick survives a search'
    opened.state.value = 'failed'
    assert (
        len(opened.table.children) == 2
        and '&lt;i&gt;lr' in opened.table.children[1].children[1].value
    )
    opened.words.value, opened.state.value = '', 'all states'
    opened.tick(['rcdb/first'])
    assert ticked(opened) == ['rcdb/first']
    with pytest.raises(ValueError, match="did you mean 'rcdb/first'"):
        opened.tick(['rcdb/frist'])


def test_only_so_many_are_listed(root):
    browser = RunBrowser(root, most=2)
    assert len(browser.table.children) == 3 and '2 of 3 shown' in browser.message.value
    browser.close()


def test_the_pages(root, opened):
    Image.fromarray(np.zeros((5, 9), np.uint8)).save(root / 'rcdb' / 'first' / 'curves.png')
    (root / 'rcdb' / 'first' / 'pretrain.ipynb').write_text('{}')
    opened.tick(['rcdb/first', 'atoms'])
    before = opened.curves.value
    assert size(before)[0] > 600
    opened.boxes[root / 'rcdb' / 'second'].value = True
    assert opened.curves.value != before
    opened.pages.selected_index = 1
    assert 'visualatom' in opened.differ.value and '<td>0.2</td>' in opened.differ.value
    opened.tick(['rcdb/first'])
    assert opened.differ.value == 'tick two runs or more'
    opened.pages.selected_index = 2
    text = opened.links.outputs[0]['data']['text/html']
    assert (
        'pretrain.ipynb</a>' in text
        and len(opened.pictures.children) == 1
        and size(opened.pictures.children[0].value) == (9, 5)
    )
    opened.tick(['rcdb/first', 'rcdb/second'])
    opened.which.value = next(n for n in opened.which.options if 'second' in n)
    assert (
        '&lt;i&gt;lr&lt;/i&gt;' in opened.links.outputs[0]['data']['text/html']
        and not opened.pictures.children
    )
    opened.tick([])
    assert opened.links.outputs[0]['data']['text/html'] == 'tick a run'


def test_links_lead_to_files(root, monkeypatch):
    monkeypatch.chdir(root / 'rcdb')
    text = report_links(read_run(root / 'atoms'))
    targets = [part.split('"')[0] for part in text.split('href="')[1:]]
    assert '../atoms/summary.csv' in targets and all(Path(t).is_file() for t in targets)


# Live


def test_it_follows_a_run_and_stops_with_the_widget(root, opened):
    opened.live.value = True
    thread = opened.thread
    assert thread.daemon and '2/10' in line(opened, 'atoms')
    add_fake_epoch(RunFolder(root / 'atoms'), 2)
    assert wait_for(lambda: '3/10' in line(opened, 'atoms')) and '20' in line(opened, 'atoms')
    before = opened.curves.value
    add_fake_epoch(RunFolder(root / 'atoms'), 3)
    assert wait_for(lambda: opened.curves.value != before), 'the open page follows'
    fake_run(root, 'new one')
    assert wait_for(lambda: root / 'new one' in opened.lines)
    opened.widget.close()
    thread.join(10)
    assert not thread.is_alive()


def test_the_button_stops_and_starts_it(opened):
    opened.live.value = True
    first = opened.thread
    opened.live.value = False
    first.join(10)
    assert not first.is_alive()
    opened.live.value = True
    assert opened.thread is not first and opened.thread.is_alive()


def test_no_thread_is_left(root):
    browser = browse(root)
    browser.live.value = True
    browser.close()
    browser.thread.join(10)
    assert 'fdsl browser' not in [
        t.name for t in threading.enumerate() if t is browser.thread and t.is_alive()
    ]


# Who watches


@pytest.mark.parametrize(
    'person, kind', [(True, 'application/vnd.jupyter.widget-view+json'), (False, 'image/png')]
)
def test_a_table_for_a_person_and_a_picture_for_a_program(kernel, root, person, kind):
    results = []
    code = f'from fdsl_nb.app.browser import browse; b = browse({str(root)!r}); b'
    kernel.execute_interactive(
        code,
        allow_stdin=person,
        stdin_hook=lambda message: None,
        timeout=120,
        output_hook=lambda message: results.append(message['content']),
    )
    found = [r['data'] for r in results if 'text/plain' in r.get('data', ())]
    assert len(found) == 1 and kind in found[0], results
    if not person:
        assert size(base64.b64decode(found[0]['image/png']))[0] > 600
    state = kernel.execute_interactive(
        'b.close(); assert (b.thread is not None) == ' + str(person),
        timeout=60,
        output_hook=lambda message: None,
    )
    assert state['content']['status'] == 'ok', state


@pytest.mark.process
def test_the_run_notebook_is_a_report(root, tmp_path):
    out = tmp_path / 'browse.ipynb'
    papermill.execute_notebook(
        str(ROOT / 'nbs' / 'browse.ipynb'),
        str(out),
        dict(root=str(root), runs='atoms,rcdb/first', published={'a paper': 97.0}),
        progress_bar=False,
        cwd=str(tmp_path),
    )
    outputs = [
        o.get('data', {})
        for c in json.loads(out.read_text('utf-8'))['cells']
        for o in c.get('outputs', ())
    ]
    tables = ''.join(''.join(d.get('text/html', '')) for d in outputs)
    assert (
        sum('image/png' in d for d in outputs) == 1
        and 'a paper' in tables
        and 'visualatom' in tables
        and 'rcdb/second' not in tables
    )
    with pytest.raises(ClickException, match="did you mean 'root'"):
        papermill.execute_notebook(
            str(ROOT / 'nbs' / 'browse.ipynb'),
            None,
            dict(rot=str(root)),
            progress_bar=False,
            cwd=str(tmp_path),
        )


def test_the_output_root_is_the_default(root, monkeypatch):
    monkeypatch.setenv('FDSL_OUTPUT_ROOT', str(root))
    browser = browse()
    assert os.path.samefile(root, browser.root)
    browser.close()


def test_runs_beside_the_notebooks_are_found(root, monkeypatch):
    (root / 'nbs').mkdir()
    monkeypatch.chdir(root / 'nbs')
    monkeypatch.setenv('FDSL_OUTPUT_ROOT', 'rcdb')
    browser = browse()
    assert len(browser.seen) == 2 and os.path.samefile(browser.root, root / 'rcdb')
    browser.close()

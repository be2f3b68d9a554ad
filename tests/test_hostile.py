"""Files from others are data: they delete nothing, run nothing, and stay within their folder.

Every deletion and renaming is guarded: a test that would touch anything outside its own folder
stops before it does.
"""

import argparse
import csv
import io
import json
import os
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from fdsl_nb.build.build import build
from fdsl_nb.formulas.formula import formula
from fdsl_nb.build.parquet import export_parquet
from fdsl_nb.formulas.layout import encode, metadata_folder
from fdsl_nb.data.shards import ArchiveDataset, BuiltDataset
from fdsl_nb.training.training import architecture_of
from fdsl_nb.training.validation import evaluation_config
from fdsl_nb.build.source import source_of
from fdsl_nb.build.verify import repair, verify

PICTURE = encode(formula('rcdb', classes=1, instances=1, size=16, start_range=4).render(0, 0))


class Outside(BaseException):
    "Something outside the test's folder would have been touched."


@pytest.fixture(autouse=True)
def guard(tmp_path, monkeypatch):
    "Nothing outside the test's folder is deleted, renamed or replaced."

    def guarded(real):
        def call(*paths, **more):
            for path in paths if more.get('dir_fd') is None else ():
                if not isinstance(path, (str, os.PathLike)) or '__pycache__' in str(path):
                    continue  # compiled kernels
                if not Path(os.path.abspath(path)).is_relative_to(tmp_path):
                    raise Outside(f'{real.__name__}({path})')
            return real(*paths, **more)

        return call

    for module, name in (
        (shutil, 'rmtree'),
        (os, 'rename'),
        (os, 'replace'),
        (os, 'unlink'),
        (os, 'remove'),
        (os, 'rmdir'),
    ):
        monkeypatch.setattr(module, name, guarded(getattr(module, name)))


@pytest.fixture
def victim(tmp_path):
    "A folder that nobody asked to be touched."
    folder = tmp_path / 'victim'
    folder.mkdir()
    (folder / 'thesis.txt').write_text('years of work')
    return folder


def untouched(victim):
    return (
        sorted(p.name for p in victim.iterdir()) == ['thesis.txt']
        and (victim / 'thesis.txt').read_text() == 'years of work'
    )


def tiny():
    return formula('rcdb', classes=3, instances=2, size=16, start_range=4)


def edited(path, change):
    "Rewrites a JSON file."
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))


# Names

MEMBERS = ['/x.png', '../y.png', 'cat/../../y.png', '/cat/x.png', 'cat\\..\\dog/x.png']


def packed(path, members):
    if path.suffix == '.zip':
        with zipfile.ZipFile(path, 'w') as z:
            for name in members:
                z.writestr(name, PICTURE)
        return path
    with tarfile.open(path, 'w', format=tarfile.PAX_FORMAT) as tar:
        for name in members:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(PICTURE), {'path': name} if '\0' in name else {}
            tar.addfile(info, io.BytesIO(PICTURE))
    return path


@pytest.mark.parametrize('kind', ['tar', 'zip'])
@pytest.mark.parametrize('member', MEMBERS)
def test_an_archive_does_not_lead_outside(kind, member, tmp_path, victim):
    archive = packed(tmp_path / f'a.{kind}', ['cat/1.png', member])
    with pytest.raises(ValueError, match='leads out of'):
        ArchiveDataset(archive)
    with pytest.raises(ValueError, match='leads out of'):
        build(str(archive), tmp_path / 'out', workers=0)
    assert untouched(victim) and not (tmp_path / 'out').exists()


def test_a_class_name_with_a_nul_is_refused(tmp_path):
    with pytest.raises(ValueError, match='leads out of'):
        ArchiveDataset(packed(tmp_path / 'a.tar', ['c\0at/1.png']))


@pytest.mark.parametrize(
    'names',
    [
        ['../../victim', 'b', 'c'],
        ['/', 'b', 'c'],
        ['', 'b', 'c'],
        ['.', 'b', 'c'],
        ['a/b', 'b', 'c'],
        ['a\0', 'b', 'c'],
        [5, 'b', 'c'],
        ['a', 'a', 'b'],
        ['a'],
    ],
)
def test_a_manifest_names_class_folders_and_nothing_else(names, tmp_path, victim):
    out = tmp_path / 'deep' / 'out'
    build(tiny(), out, workers=0, progress=print)
    edited(metadata_folder(out) / 'manifest.json', lambda m: m['plan'].update(names=names))
    for use in (
        BuiltDataset,
        verify,
        repair,
        lambda root: build(str(root), tmp_path / 'copy', workers=0),
    ):
        with pytest.raises(ValueError, match='manifest.json'):
            use(out)
    (metadata_folder(out) / 'manifest.csv').unlink()
    with pytest.raises(ValueError, match='holds another build|manifest.json'):
        build(tiny(), out, workers=0)
    assert untouched(victim)


@pytest.mark.parametrize(
    'change',
    [
        dict(layout='../x'),
        dict(format='exe'),
        dict(classes='3'),
        dict(classes=-3),
        dict(instances=[1, 2]),
        dict(instances=-1),
        dict(shard_images=-5),
        dict(seed=-1),
        dict(extra=1),
        dict(spec=5),
    ],
    ids=str,
)
def test_a_plan_of_another_kind_is_refused(change, tmp_path):
    build(tiny(), tmp_path / 'out', workers=0, progress=print)
    edited(metadata_folder(tmp_path / 'out') / 'manifest.json', lambda m: m['plan'].update(change))
    with pytest.raises(ValueError, match='manifest.json'):
        BuiltDataset(tmp_path / 'out')


@pytest.mark.parametrize('text', ['[]', '{}', '{"plan": []}', '{"plan": {"layout": "plain"}}', '3'])
def test_a_manifest_of_another_kind_is_refused(text, tmp_path):
    build(tiny(), tmp_path / 'out', workers=0, progress=print)
    (metadata_folder(tmp_path / 'out') / 'manifest.json').write_text(text)
    with pytest.raises(ValueError, match='manifest.json'):
        BuiltDataset(tmp_path / 'out')


@pytest.mark.parametrize('layout', ['plain', 'shards'])
def test_a_part_is_the_one_that_the_plan_names(layout, tmp_path, victim):
    out = tmp_path / 'deep' / 'out'
    build(tiny(), out, workers=0, progress=print, layout=layout)
    with open(metadata_folder(out) / 'manifest.csv', newline='') as f:
        rows = list(csv.reader(f))
    rows[1][0] = '../../victim'
    with open(metadata_folder(out) / 'manifest.csv', 'w', newline='') as f:
        csv.writer(f).writerows(rows)
    for use in (verify, repair):
        with pytest.raises(ValueError, match='manifest.csv'):
            use(out)
    assert untouched(victim)


@pytest.mark.parametrize(
    'line',
    ['[0, "../../victim", 2, 3, "ab"]', '[99, "00099", 2, 3, "ab"]', '{}', 'nonsense', '[0]'],
)
def test_a_journal_that_is_not_ours_counts_for_nothing(line, tmp_path, victim):
    out = tmp_path / 'deep' / 'out'
    build(tiny(), out, workers=0, progress=print)
    expected = (metadata_folder(out) / 'manifest.csv').read_text()
    (metadata_folder(out) / 'manifest.csv').unlink()
    (metadata_folder(out) / '.done.jsonl').write_text(line + '\n')
    build(tiny(), out, workers=0, progress=print)
    assert (metadata_folder(out) / 'manifest.csv').read_text() == expected and untouched(victim)


# Links


def unfinished(out, **arrangement):
    "A build that was killed before it wrote its manifest of parts, and after it had written none."
    build(tiny(), out, workers=0, progress=print, **arrangement)
    (metadata_folder(out) / 'manifest.csv').unlink()


@pytest.mark.parametrize('name', ['00001', '.lock', 'parameters.csv', 'manifest.csv'])
def test_links_out_of_a_build_are_not_followed(name, tmp_path, victim):
    out = tmp_path / 'out'
    unfinished(out)
    path = (out if name == '00001' else metadata_folder(out)) / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(victim if name == '00001' else victim / 'thesis.txt')
    try:
        build(tiny(), out, workers=0, progress=print)
    except ValueError as e:
        assert 'link' in str(e)
    assert untouched(victim)


def test_a_linked_index_is_not_followed(tmp_path, victim):
    out = tmp_path / 'out'
    unfinished(out, layout='shards')
    index = metadata_folder(out) / 'index'
    shutil.rmtree(index)
    index.symlink_to(victim)
    with pytest.raises(ValueError, match='link'):
        build(tiny(), out, workers=0, progress=print, layout='shards')
    assert untouched(victim)


def test_linked_metadata_are_not_followed(tmp_path, victim):
    out = tmp_path / 'out'
    (tmp_path / '.out.fdsl_nb').symlink_to(victim)
    with pytest.raises(ValueError, match='link'):
        build(tiny(), out, workers=0, progress=print)
    assert untouched(victim)


def test_repair_does_not_write_through_a_link(tmp_path, victim):
    out = tmp_path / 'out'
    build(tiny(), out, workers=0, progress=print)
    shutil.rmtree(out / '00001')
    (out / '00001').symlink_to(victim)
    with pytest.raises(ValueError, match='link'):
        repair(out)
    assert untouched(victim)


# A build removes what it made, and nothing else


def test_a_build_leaves_hidden_files_of_others(tmp_path):
    out = tmp_path / 'out'
    unfinished(out)
    (out / '.git').mkdir()
    (out / '.git' / 'HEAD').write_text('ref')
    (out / '.keep').write_text('')
    (out / '.00000.abcdefgh').mkdir()  # what a killed worker leaves
    draft = metadata_folder(out) / '.README.md.abcd_123'
    draft.write_text('half')
    build(tiny(), out, workers=0, progress=print)
    assert (out / '.git' / 'HEAD').read_text() == 'ref' and (out / '.keep').exists()
    assert not (out / '.00000.abcdefgh').exists() and not draft.exists()


def test_a_build_removes_no_folder_that_somebody_filled(tmp_path):
    out = tmp_path / 'out'
    unfinished(out)
    (out / '00001' / 'notes.txt').write_text('mine')
    with pytest.raises(ValueError, match='notes.txt'):
        build(tiny(), out, workers=0, progress=print)
    assert (out / '00001' / 'notes.txt').read_text() == 'mine'
    (out / '00001' / 'notes.txt').unlink()
    build(tiny(), out, workers=0, progress=print)
    assert verify(out) == []


def test_a_class_folder_cut_short_is_mended(tmp_path):
    out = tmp_path / 'out'
    unfinished(out)
    (out / '00001' / '00001_0000.png').write_bytes(b'half')
    (out / '00001' / '00001_0001.png').unlink()
    build(tiny(), out, workers=0, progress=print)
    assert verify(out) == []


def test_an_export_leaves_hidden_files_of_others(tmp_path):
    pytest.importorskip('pyarrow')
    (tmp_path / 'out' / 'data').mkdir(parents=True)
    (tmp_path / 'out' / 'data' / '.keep').write_text('')
    (tmp_path / 'out' / 'data' / '.train-00000-of-00001.parquet.abcdefgh').write_text('half')
    export_parquet(tiny(), tmp_path / 'out', workers=0, progress=print)
    assert sorted(p.name for p in (tmp_path / 'out' / 'data').iterdir()) == [
        '.keep',
        'train-00000-of-00001.parquet',
    ]


# Code


@pytest.fixture
def bomb(tmp_path, monkeypatch):
    "A module beside the data that leaves `exploded` when it is imported."
    (tmp_path / 'bomb_beside.py').write_text(
        f'open({str(tmp_path / "exploded")!r}, "w")\nclass Bomb: pass\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / 'exploded'
    assert not (tmp_path / 'exploded').exists() and 'bomb_beside' not in sys.modules


@pytest.mark.parametrize(
    'source',
    [
        dict(formula='bomb_beside:Bomb'),
        dict(family='bomb_beside:Bomb'),
        dict(family='bomb_beside:Bomb', formula='bomb'),
        dict(formula=['rcdb']),
        dict(formula=None),
    ],
    ids=str,
)
def test_a_manifest_imports_no_module(source, tmp_path, bomb):
    out = tmp_path / 'out'
    build(tiny(), out, workers=0, progress=print)
    edited(metadata_folder(out) / 'manifest.json', lambda m: m['source'].update(source))
    (out / '00001' / '00001_0000.png').unlink()
    with pytest.raises(ValueError, match='manifest.json'):
        source_of(out)
    with pytest.raises(ValueError, match='manifest.json'):
        repair(out)
    assert len(verify(out)) == 1


def test_published_names_import_no_module(tmp_path, bomb):
    out = tmp_path / 'out'
    build(tiny(), out, workers=0, progress=print, layout='published')
    edited(
        metadata_folder(out) / 'manifest.json',
        lambda m: m['plan'].update(spec=m['plan']['spec'].replace('"rcdb"', '"bomb_beside:Bomb"')),
    )
    with pytest.raises(ValueError, match='manifest.json'):
        BuiltDataset(out)[0]


@pytest.mark.parametrize(
    'address',
    [
        'pipe:touch exploded',
        'pipe:touch exploded #.tar',
        'http://127.0.0.1:9/x.tar',
        'file:///x/{0..1}.tar',
        'bomb_beside:Bomb',
        'a.tar::pipe:touch exploded',
        5,
        None,
    ],
)
def test_a_manifest_names_no_address(address, tmp_path, bomb):
    # a file of that name makes no difference
    (tmp_path / 'pipe:touch exploded').write_bytes(bytes(10240))
    archive = packed(tmp_path / 'a.tar', ['cat/1.png', 'dog/2.png'])
    out = tmp_path / 'out'
    build(str(archive), out, workers=0, progress=print)
    assert source_of(out) == (str(archive), 'train')
    edited(metadata_folder(out) / 'manifest.json', lambda m: m['source'].update(dataset=address))
    (out / 'cat' / 'cat_0000.png').unlink()
    with pytest.raises(ValueError, match='manifest.json'):
        repair(out)


@pytest.mark.parametrize('split', [5, None, ['train'], dict(train=1)], ids=str)
def test_a_manifest_names_a_split_by_a_string(split, tmp_path):
    archive = packed(tmp_path / 'a.tar', ['cat/1.png', 'dog/2.png'])
    out = tmp_path / 'out'
    build(str(archive), out, workers=0, progress=print)
    edited(metadata_folder(out) / 'manifest.json', lambda m: m['source'].update(split=split))
    (out / 'cat' / 'cat_0000.png').unlink()
    with pytest.raises(ValueError, match='manifest.json: split=.* is no name of a split'):
        source_of(out)
    with pytest.raises(ValueError, match='manifest.json: split=.* is no name of a split'):
        repair(out)


def checkpoint(path, **args):
    from timm import create_model

    model = create_model(
        'deit_tiny_patch16_224',
        num_classes=10,
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=1,
        num_heads=2,
    )
    known = (
        dict(
            model='deit_tiny_patch16_224',
            img_size=32,
            model_kwargs=dict(patch_size=8, embed_dim=32, depth=1, num_heads=2),
            dataset='digits',
            data_dir='',
            knobs={},
        )
        | args
    )
    torch.save(
        dict(
            arch=known['model'],
            epoch=0,
            state_dict=model.state_dict(),
            args=argparse.Namespace(**known),
        ),
        path,
    )
    return str(path)


@pytest.mark.parametrize(
    'args',
    [
        dict(dataset='pipe:touch exploded'),
        dict(dataset='bomb_beside:Bomb'),
        dict(dataset='http://127.0.0.1:9/x.tar'),
        dict(dataset=['digits']),
        dict(dataset='coyo', data_dir='pipe:touch exploded'),
        dict(dataset='coyo', knobs=dict(shards='pipe:touch exploded')),
        dict(model='hf-hub:nobody/nothing'),
        dict(model='local-dir:x'),
        dict(model_kwargs=dict(checkpoint_path='evil.pth')),
        dict(model_kwargs=dict(pretrained=True, pretrained_cfg=dict(file='evil.pth'))),
        dict(model_kwargs='x'),
        dict(knobs='x'),
    ],
    ids=str,
)
def test_a_checkpoint_names_plain_things_only(args, tmp_path, bomb):
    path = checkpoint(tmp_path / 'last.pth.tar', **args)
    with pytest.raises(ValueError, match='last.pth.tar'):
        evaluation_config(dict(weights=path))
    if {'model', 'model_kwargs'} & set(args):
        with pytest.raises(ValueError, match='last.pth.tar'):
            architecture_of(path)


def test_what_somebody_types_counts(tmp_path, bomb):
    path = checkpoint(tmp_path / 'last.pth.tar', dataset='bomb_beside:Bomb')
    assert evaluation_config(dict(weights=path, dataset='digits'))['dataset'].value == 'digits'


@pytest.mark.parametrize(
    'name',
    [
        'os:getcwd',
        'argparse:Namespace',
        'fdsl_nb.formulas.formula:formulas',
        'fdsl_nb.formulas.formula:nothing',
    ],
)
def test_a_class_that_somebody_types_must_be_a_formula(name):
    with pytest.raises((TypeError, ValueError), match=f"{name}.*Formula"):
        formula(name)


# Beginning anew deletes nothing


def run_values(folder, **given):
    from training_helpers import values

    return values(folder, **dict(epochs=1, overwrite=False) | given)


def go(folder, **given):
    from fdsl_nb.training.training import run_training
    from training_helpers import resolved

    return run_training(resolved(run_values(folder, **given)))


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob('*') if p.is_file())


def test_overwrite_sets_aside_what_the_run_wrote(tmp_path):
    go(tmp_path / 'run', lr=1e-3)
    before = {name: (tmp_path / 'run' / name).read_bytes() for name in names(tmp_path / 'run')}
    assert 'last.pth.tar' in before
    (tmp_path / 'run' / 'notes.txt').write_text('mine')
    (tmp_path / 'run' / 'checkpoint-best.pth.tar.bak').write_text('mine')
    go(tmp_path / 'run', lr=2e-3, overwrite=True)
    assert {
        name: (tmp_path / 'run' / 'replaced-1' / name).read_bytes() for name in before
    } == before
    assert (tmp_path / 'run' / 'notes.txt').exists() and (
        tmp_path / 'run' / 'checkpoint-best.pth.tar.bak'
    ).exists()
    go(tmp_path / 'run', lr=3e-3, overwrite=True)
    assert (tmp_path / 'run' / 'replaced-2' / 'last.pth.tar').exists() and (
        tmp_path / 'run' / 'replaced-1' / 'last.pth.tar'
    ).exists()


def test_a_run_does_not_replace_what_it_reads(tmp_path):
    go(tmp_path / 'run', lr=1e-3, eval_metric='loss')
    before = {name: (tmp_path / 'run' / name).read_bytes() for name in names(tmp_path / 'run')}
    for weights in ('last.pth.tar', 'model_best.pth.tar'):
        given = dict(weights=str(tmp_path / 'run' / weights), stage='finetune', lr=2e-3)
        with pytest.raises(ValueError, match='holds another run') as refused:
            go(tmp_path / 'run', **given)
        assert 'overwrite' not in str(refused.value)
        with pytest.raises(ValueError, match='which this one would replace'):
            go(tmp_path / 'run', overwrite=True, **given)
    assert {
        name: (tmp_path / 'run' / name).read_bytes() for name in names(tmp_path / 'run')
    } == before


@pytest.mark.parametrize('overwrite', [False, True])
@pytest.mark.parametrize(
    'name',
    [
        'last.pth.tar',
        'model_best.pth.tar',
        'checkpoint-7.pth.tar',
        'checkpoint-mine.pth.tar',
        'model/model.safetensors',
    ],
)
def test_weights_that_somebody_put_there_are_not_written_over(name, overwrite, tmp_path):
    path = tmp_path / 'run' / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b'from the authors')
    with pytest.raises(ValueError, match='which no run wrote'):
        go(tmp_path / 'run', overwrite=overwrite)
    assert path.read_bytes() == b'from the authors'


def test_a_list_of_files_leads_nowhere_else(tmp_path, victim):
    go(tmp_path / 'run', lr=1e-3)
    with open(tmp_path / 'run' / 'files.txt', 'a') as f:
        f.write('../victim\n../victim/thesis.txt\n')
    with pytest.raises(ValueError, match='leads out of'):
        go(tmp_path / 'run', lr=2e-3, overwrite=True)
    assert untouched(victim) and (tmp_path / 'run' / 'last.pth.tar').exists()


def test_history_removes_the_runs_own_checkpoints_only(tmp_path):
    go(tmp_path / 'run', epochs=3, checkpoint_hist=1, pause=1)
    (tmp_path / 'run' / 'checkpoint-9.pth.tar').write_text('mine')
    from fdsl_nb.core.folder import RunFolder, noted_files
    from fdsl_nb.training.saving import trim

    trim(RunFolder(tmp_path / 'run'), 1, 'last')
    assert (
        tmp_path / 'run' / 'checkpoint-9.pth.tar'
    ).read_text() == 'mine' and 'checkpoint-0.pth.tar' in noted_files(RunFolder(tmp_path / 'run'))

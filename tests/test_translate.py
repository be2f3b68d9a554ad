"""Old commands and what they become: every command and script that the published repositories show,
and what is refused."""

import json
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from fdsl_nb.app.cli import asked_for, main
from fdsl_nb.app.parameters import check_values, find_notebook
from fdsl_nb.app.programs import PROGRAMS, find_program, flags_of, read_call
from fdsl_nb.app.translate import (
    RECIPE,
    differences,
    idle_settings,
    read_script,
    same,
    translated,
    translation,
)
from fdsl_nb.formulas.formula import formula, formula_class
from fdsl_nb.training.recipes import FINETUNE, PRETRAIN, recipe, resolve

SHOWN = json.loads((Path(__file__).parent / 'golden/published_commands.json').read_text('utf-8'))


def called(shown):
    return f'{shown["repository"].split("/")[-1]} {shown["file"]} {shown["lines"]}'


TRANSLATED = [s for s in SHOWN['commands'] if 'refused' not in s]
REFUSED = [s for s in SHOWN['commands'] if 'refused' in s]
every_command = pytest.mark.parametrize('shown', TRANSLATED, ids=called)


def lines_of(text):
    return [line for line in translation(text).splitlines() if line and line[0] != '#']


# All that the repositories show


@every_command
def test_every_published_command_is_translated(shown):
    "The line is what `fdsl run` takes: its own checks of names, types and choices pass."
    lines = lines_of(shown['text'])
    assert lines
    for line in lines:
        words = shlex.split(line)
        at = words.index('fdsl')
        command, stage, *rest = words[at + 1 :]
        assert command == 'run' and (at == 0 or words[0] in ('mpirun', 'mpiexec'))
        given = asked_for(rest)
        check_values(find_notebook(stage), given)
        if stage == 'build':
            knobs = {k: given[k] for k in ('classes', 'instances', 'size', 'seed') if k in given}
            formula(given['dataset'], **knobs, **given.get('knobs', {}))


@every_command
def test_the_run_has_what_was_wanted(shown):
    "Recipe, budget and parameters together give each setting that the program would have had."
    for found, values in translated(shown['text']):
        if found.stage not in ('pretrain', 'finetune'):
            continue
        own = {k: v for k, v in values.items() if k in RECIPE} | values.get('options', {})
        config = resolve(found.stage, own, values['recipe'], values['budget'])
        has = {k: v.value for k, v in config.items()}
        idle = idle_settings(has)
        wrong = {k: (has[k], v) for k, v in found.wanted.items() if not same(has[k], v)}
        assert {k: v for k, v in wrong.items() if k not in idle} == {}


@pytest.mark.parametrize('shown', REFUSED, ids=called)
def test_what_a_shell_could_not_run_either_is_refused(shown):
    with pytest.raises(ValueError, match=shown['refused'].replace('$', r'\$')):
        translation(shown['text'])


def test_all_repositories_are_there():
    assert len({s['repository'] for s in SHOWN['commands']}) == 9
    assert len(TRANSLATED) == 59


# Single settings

CVPR = 'mpirun -npernode 4 -np 4 python pretrain.py ./images --opt adamw --sched cosine_iter'


def wanted(text):
    return translated(text)[-1][0].wanted


def notes(text):
    return '\n'.join(translated(text)[-1][0].notes)


@pytest.mark.parametrize(
    'text, expected',
    [
        (CVPR + ' --batch-size 64', dict(batch_size=256, lr=0.01, warmup_lr=1e-4)),
        (CVPR + ' --repeated-aug', dict(aug_repeats=3)),
        ('python pretrain.py ./images --repeated-aug', dict(aug_repeats=1)),
        (CVPR + ' -w --trainshards a/{0..9}.tar --repeated-aug', dict(aug_repeats=1)),
        (CVPR, dict(prefetcher=True, train_interpolation='random', precision='float32')),
        (CVPR + ' --no-prefetcher --amp', dict(prefetcher=False, precision='float16')),
        (CVPR + ' --interpolation bilinear', dict(train_interpolation='random')),
        (CVPR + ' --warmup-iter 5000', dict(warmup_steps=5000)),
        (CVPR + ' --sched cosine --warmup-iter 5000', dict(warmup_steps=0)),
        (CVPR + ' --model vit_tiny_patch16_224', dict(mean=(0.5, 0.5, 0.5))),
        (CVPR + ' --model swin_tiny_patch4_window7_224', dict(mean=(0.485, 0.456, 0.406))),
        (CVPR + ' --input-size 3 384 384', dict(img_size=384)),
        ('python finetune.py ./images --lr 0.1', dict(crop_pct=0.9, head='new', remode='const')),
        ('python pretrain.py', dict(lr=6.25e-5, warmup_epochs=5, no_weight_decay=False)),
        ('python main.py data=grayimagefolder model=swin mode=x', dict(clip_grad=5.0)),
        ('python main.py data=grayimagefolder mode=x', dict(lr=5e-4 * 3 / 512)),
        ('python pretraining/main.py', dict(train_crop_mode='random', mean=(0.2, 0.2, 0.2))),
        ('python train.py --name x --num_steps 500', dict(max_steps=500, head='zero')),
        ('python -m trainer trainer=vit_l16_i1k_downstream_ema', dict(model_ema_decay=0.9999)),
        ('python3 -m trainer trainer=vit_l16_i1k_downstream', dict(model_ema_decay=0.0)),
    ],
)  # fmt: skip
def test_settings(text, expected):
    found = wanted(text.replace('mode=x', 'mode=x data.trainset.root=./images'))
    assert [(k, found[k], v) for k, v in expected.items() if not same(found[k], v)] == []


@pytest.mark.parametrize(
    'text, said',
    [
        (CVPR + ' --batch-size 64', '64 × 4 = 256'),
        (CVPR + ' --interpolation bicubic', 'reaches evaluation only'),
        ('python pretrain.py ./images --repeated-aug', 'does nothing with one process'),
        (CVPR + ' --val-split test', 'nothing reads it (pretrain.py:85)'),
        ('mpirun -np ${N} python pretrain.py ./x --lr 1', 'the number of processes is set nowhere'),
        ('python main.py data.trainset.root=./x mode=pretrain freeze=True', 'nothing reads it'),
        ('python main.py data.trainset.root=./x mode=pretrain ckpt=a.pth', 'neither ckpt nor'),
        ('python train.py --name x --loss_scale 8', 'nothing reads it (train.py:167)'),
    ],
)
def test_flags_that_mean_something_else_are_named(text, said):
    assert said in notes(text)


def test_nothing_is_said_about_flags_that_were_not_given():
    assert notes('python pretrain.py ./images --lr 0.1') == ''


def test_a_folder_is_never_taken_for_a_formula():
    assert wanted('python pretrain.py rcdb --lr 1')['dataset'] == './rcdb'
    assert wanted('python train.py --name x')['dataset'] == 'cifar10'


def test_rates_that_scale_are_compared_at_the_batch_that_is_wanted():
    r = next(r for r in PRETRAIN if getattr(r, 'scaled_rates', ()))
    wanted = dict(batch_size=2 * r.batch_size, lr=2 * r.lr)
    assert differences(r, wanted) == dict(batch_size=2 * r.batch_size)


def test_weights_and_resume():
    text = 'python finetune.py ./x --pretrained-path a.pth.tar --resume b.pth.tar --no-resume-opt'
    found, values = translated(text)[0]
    assert found.stage == 'finetune' and values['scratch'] is False
    assert (values['weights'], values['resume']) == ('a.pth.tar', 'b.pth.tar')
    assert values['no_resume_opt'] is True
    found, values = translated('python train.py --name x -v true --load_model_dir a.bin')[0]
    assert found.stage == 'evaluate' and values['weights'] == 'a.bin'


# Programs that draw


@pytest.mark.parametrize('program', [p for p in PROGRAMS if p.formula], ids=lambda p: p.title)
def test_a_formula_takes_every_flag_of_its_programs(program):
    "`from_flags` knows each name; a wrong value is another error."
    searches = {'parallel_dir.py': 'fractaldb', 'ifs_search.py': 'fractaldb'}
    name = searches.get(program.title, program.formula)
    family = formula_class('mvfractaldb' if name == 'search' else name)
    known = {*family.flags, *family.elsewhere}
    assert {f.name for f in program.flags if f.setting == '*'} - known == set()
    with pytest.raises(TypeError, match='is not a flag of the published program'):
        family.from_flags(no_such_flag=1)


def test_threads_and_pixels_of_the_program():
    text = 'python make_rcdb.py --numof_thread=40 --thread_num=3 --save_root=./rcdb --perlin_min=1'
    found, values = translated(text)[0]
    assert values == dict(
        dataset='rcdb', budget='paper', mode='reference', threads=40, out='./rcdb',
        knobs=dict(noise_min=1.0),
    )  # fmt: skip
    assert 'leaves 1000 classes out' in notes('python make_rcdb.py --numof_thread=3000')


def test_a_search_and_what_draws_are_one_build(tmp_path):
    text = """
        python category_search.py --variance 0.05 --numof_classes 20 --seed 3 --save_root p
        python instance.py --load_root p --save_root m --classes 20
        python image_render/render2view.py --load_root m --save_root i --view_point 6
    """
    ((found, values),) = translated(text)
    assert {k: values[k] for k in ('dataset', 'classes', 'seed', 'out', 'knobs')} == dict(
        dataset='ofdb3d', classes=20, seed=3, out='i', knobs=dict(views=6, axes=2)
    )


def test_own_categories_are_used_where_they_are(tmp_path):
    line = 'python make_fractaldb.py --load_root={}'
    _, values = translated(line.format('./csv_rate0.2_category300'))[0]
    assert values['classes'] == 300 and values['knobs']['categories'] == 'published'
    rows = '0.1,0,0,0.1,0,0,0.5\n0.1,0,0,0.1,0.5,0,0.5\n'
    for n in range(1000):
        (tmp_path / f'{n:05d}.csv').write_text(rows)
    _, values = translated(line.format(tmp_path))[0]
    assert values['knobs']['categories'] == str(tmp_path)


# Scripts


def test_a_script_is_read_as_a_shell_reads_it():
    text = r"""
        A=2 # two
        export B=$(($A*8))
        # python commented.py
        for ((i=0 ; i<4 ; i++))
        do
          mpirun -np ${B} python \
            train.py --name 'run '${i}_$B $UNSET &
        done
    """
    (command,) = read_script(text)
    assert (command.processes, command.line) == (16, 7)
    assert command.words == ['--name', 'run 0_16', '$UNSET']


def test_nothing_in_a_script_is_run(tmp_path):
    here = tmp_path / 'here'
    ran = f'`touch {here}`$(touch {here})'
    text = f'A=$(touch {here})\npython train.py --name "$A" --output_dir "{ran}"'
    translation(text)
    assert not here.exists()


def test_prose_is_no_command():
    assert read_script('Run the python script to train.') == []


def test_launchers():
    (a,) = read_script('torchrun --nproc_per_node=4 train.py --name x')
    (b,) = read_script('python -m torch.distributed.launch --nproc_per_node=4 train.py --name x')
    (c,) = read_script('FOO=1 python3.8 -B train.py --name x')
    assert [k.processes for k in (a, b, c)] == [4, 4, 1]
    assert {(k.script, *k.words) for k in (a, b, c)} == {('train.py', '--name', 'x')}


# What is refused


@pytest.mark.parametrize(
    'text, message',
    [
        ('python train_net.py --lr 1', "'train_net.py' is no published program"),
        ('python pretrian.py --lr 1', "did you mean 'pretrain.py'"),
        (
            CVPR + ' --weight-decai 1',
            "'--weight-decai' is no flag .* did you mean '--weight-decay'",
        ),
        (CVPR + ' another', "'another' is no flag"),
        (CVPR + ' --lr fast', "argument --lr: invalid float value: 'fast'"),
        ('python main.py model.optim.lr=1', "'model.optim.lr=1' is no key"),
        ('python main.py model=vitt mode=x', "did you mean 'vit'"),
        ('python -m trainer trainer=vit_l17', "trainer='vit_l17' is no file of it"),
        ('python train.py --name x --model_type ViT-B_17', "did you mean 'ViT-B_16'"),
        ('python pretraining/main.py --usenet=resnet51', "did you mean 'resnet50'"),
        ('python make_rcdb.py --vertex_nun=3', "did you mean '--vertex_num'"),
        ('echo "no command"', 'calls no Python program'),
        ("python train.py --name 'x", 'mend its quotes'),
    ],
)
def test_refusals_name_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        translation(text)


def test_a_table_says_what_becomes_of_each_flag():
    "Each flag has a setting, a note, or is one that changes nothing by itself."
    silent = {'data', 'model', 'scheduler', 'trainer', 'data.transform.is_training'}
    for program in PROGRAMS:
        names = [name for f in program.flags for name in f.names]
        assert len(names) == len(set(names)), program.title
        empty = {f.names[0] for f in program.flags if not (f.setting or f.note)}
        assert empty <= silent, program.title
        run = {'stage', 'weights', 'resume', 'no_resume_opt', 'seed', 'workers', 'run', 'pause'}
        run |= {'checkpoint_hist', 'interval_saved_epochs', 'recovery_interval', 'wandb_group'}
        named = {f.setting for f in program.flags} - {'', '*'}
        assert named <= RECIPE.keys() | run, program.title


def test_every_program_has_its_function():
    "A title that the file of tables does not know would leave a program with that of a renderer."
    drawing = {p.title for p in PROGRAMS if p.convert.__name__ == '_drawing'}
    assert drawing == {p.title for p in PROGRAMS if p.formula}


def test_the_command(capsys, tmp_path):
    script = tmp_path / 'train.sh'
    script.write_text('NAME=x\npython train.py --name $NAME --num_steps 500 --warmup_steps 100\n')
    main(['translate', str(script)])
    from_file = capsys.readouterr().out
    words = 'python train.py --name x --num_steps 500 --warmup_steps 100'
    main(['translate', *words.split()])
    assert capsys.readouterr().out == from_file
    main(['translate', words])
    assert capsys.readouterr().out == from_file and from_file.startswith('fdsl run finetune ')
    with pytest.raises(SystemExit, match='no published program'):
        main(['translate', 'python other.py'])


def test_defaults_are_those_of_the_table():
    call = read_call(find_program('train.py', []), ['--name', 'x'])
    assert call.given == {'name': 'x'} and call['learning_rate'] == 0.03
    (row,) = flags_of('--a -b | float+ | [1, 2] | scale | said\n    in two lines')
    assert (row.names, row.default, row.note) == (('--a', '-b'), [1, 2], 'said in two lines')


def test_recipes_are_compared_by_all_their_fields():
    names = {f.name for f in fields(type(recipe()))}
    assert names == set(RECIPE)


@pytest.mark.parametrize(
    'text',
    [
        'python main.py data.trainset.root=./x data.loader.batch_size=96 mode=finetune epochs=7',
        'python main.py data.trainset.root=./x data=grayimagefolder model=mixer mode=pretrain',
        'python pretrain.py data.loader.batch_size=512 optim=momentum optim.args.lr=0.3',
        'python pretrain.py ./x --sched step --decay-rate 0.3 --mixup 0.2 --opt momentum',
        'python pretrain.py ./x --jsd --aug-splits 3 --aa rand-m9-mstd0.5-inc1',
        'python train.py --name x --decay_type linear --gradient_accumulation_steps 4',
        'python -m trainer trainer=vit_b16_i1k trainer.optimizer.config.beta_1=0.8',
    ],
)
def test_any_settings_arrive(text):
    test_the_run_has_what_was_wanted(dict(text=text))


def test_weights_of_the_same_script_are_in_its_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('FDSL_OUTPUT_ROOT', str(tmp_path / 'runs'))
    text = """
        python pretrain.py ./x --experiment first --output ./out --lr 0.1
        python finetune.py ./y --pretrained-path ./out/first/model_best.pth.tar --lr 0.1
        python finetune.py ./y --pretrained-path ./out/other/model_best.pth.tar --lr 0.1
    """
    weights = [values.get('weights') for _, values in translated(text)]
    assert weights == [None, 'runs/first/model_best.pth.tar', './out/other/model_best.pth.tar']


def test_paths_after_a_change_of_folder_are_said():
    assert 'cd there/again: paths start there' in notes('cd ./there\ncd again\npython make_rcdb.py')
    assert notes('cd ./there\ncd ../\npython make_rcdb.py') == ''


# The command of a recipe's record, against the recipe

RECORDS = json.loads((Path(__file__).parent / 'golden/recipes_published.json').read_text('utf-8'))
COMMANDS = {r['name']: r['command'] for r in RECORDS if '…' not in (r['command'] or '…')}
# what a script sets before the command that its record shows
BEFORE = 'NGPUS=8\nNPERNODE=4\nDATA=cifar10\nnumof_category=1000\narch=resnet50\n'
PLACES = {'dataset', 'val_dir', 'train_split', 'val_split'}
# where a recipe leaves its record on purpose
ON_PURPOSE = dict(
    visualatom1k_vit_tiny={'epochs'},  # the paper's 300; the record is that of 21,000 classes
    visualatom1k_vit_base={'epochs'},
)


@pytest.mark.parametrize(
    'r', [r for r in (*PRETRAIN, *FINETUNE) if r.record in COMMANDS], ids=lambda r: r.name
)
def test_a_recipe_is_what_its_records_command_says(r):
    text = BEFORE + COMMANDS[r.record].replace('=PATH ', '=./PATH ')
    found, _ = translated(text)[-1]
    differs = differences(r, found.wanted).keys() - PLACES - {'head'}
    assert differs == ON_PURPOSE.get(r.name, set())

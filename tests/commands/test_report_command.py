"""`vit_jax report`: runs and experiments, whatever state they are in."""

import json
import re
import shutil

import filelock
import jax
import numpy as np
import pytest
from PIL import Image

import vit_jax.report.attention
from vit_jax.build import build
from vit_jax.config import from_dict
from vit_jax.maps import attention_maps
from vit_jax.pretrained import load_variables
from vit_jax.sequence_maps import sequence_maps
from vit_jax.tasks.translate import shift_right

pytest_plugins = ['command_fixtures']


@pytest.fixture
def out(tmp_path):
    return tmp_path / 'new' / 'out'


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of every contact sheet."""
    calls = []
    draw = vit_jax.report.attention.draw_sheet

    def record(*args):
        calls.append(args)
        return draw(*args)

    monkeypatch.setattr(vit_jax.report.attention, 'draw_sheet', record)
    return calls


def open_library(workdir):
    """(run, variables), by way of the library."""
    run = build(from_dict(json.loads((workdir / 'config.json').read_text())))
    return run, load_variables(workdir, run.model, run.inputs)[0]


def pictures(out):
    """The PNG files, and those that each page shows."""
    files = {str(path.relative_to(out)) for path in out.rglob('*.png')}
    text = (out / 'report.md').read_text()
    page = (out / 'report.html').read_text()
    assert page.count('<img ') == page.count('src="data:image/') == len(files)
    return files, set(re.findall(r'!\[[^\]]*\]\(([^)]*)\)', text))


def test_runs_of_all_kinds(run, digits, colour, dates, out):
    code, text, err = run('report', digits, colour, dates, f'--out={out}')
    assert code == 0
    assert text.splitlines() == [f'{out}/report.html', f'{out}/report.md']
    label = '/'.join(colour.parts[-2:])
    assert err.splitlines() == [
        f'vit_jax: {label}: no attention shown: CNN has no attention to map: none of '
        'its modules sows attention_weights'
    ]
    files, shown = pictures(out)
    assert files == shown
    page = (out / 'report.md').read_text()
    for title in ('Results', 'Attention', 'Configs', 'Environment'):
        assert f'\n## {title}\n' in page
    for path in files:
        with Image.open(out / path) as picture:
            assert picture.getextrema()[0] != (255, 255)  # not blank


def test_a_run_that_is_training_is_left_alone(run, digits, out, snapshot):
    before = snapshot(digits)
    with filelock.FileLock(digits / '.lock'):
        assert run('report', digits, f'--out={out}').code == 0
    assert snapshot(digits) == before
    first = snapshot(out)
    assert run('report', digits, f'--out={out}').code == 0
    assert snapshot(out) == first


def test_maps_are_those_of_the_evaluation_split(run, digits, out, drawn):
    assert run('report', digits, f'--out={out}', '--images=3').code == 0
    ours, variables = open_library(digits)
    batch = next(iter(ours.eval_data()))
    labels, chosen = set(), []
    for i, label in enumerate(batch['label'].tolist()):
        if label not in labels and len(chosen) < 3:
            labels.add(label)
            chosen.append(i)
    images = batch['image'][np.array(chosen)].astype(np.float32) / 127.5 - 1
    look = jax.jit(attention_maps, static_argnums=0)
    maps = look(ours.model, variables, images)
    assert len(drawn) == 9  # two layers and the rollout, of three images
    local, last = maps.layers
    for n, calls in enumerate(zip(*[iter(drawn)] * 3)):
        for pixels, *_ in calls:
            assert (pixels == batch['image'][chosen[n]]).all()
        expected = [
            local.weights[n, :, 2 * 4 + 2].reshape(-1, 4, 4),  # the centre patch
            last.weights[n, :, 0, 1:].reshape(-1, 4, 4),  # the class token
            maps.rollout.weights[n, :, 0, 1:].reshape(-1, 4, 4),
        ]
        for (_, heat, *_), weights in zip(calls, expected):
            np.testing.assert_allclose(heat, weights, atol=2e-6)
    gating = np.float64(variables['params']['block00']['attention']['gating'])
    gates = 1 / (1 + np.exp(-gating))
    row = ' | '.join(f'{x:.3f}' for x in (gates.mean(), *gates))
    page = (out / 'report.md').read_text()
    assert f'| block00 | {row} |' in page
    assert page.count('<summary>Image ') == 2
    assert {f'image{i}' for i in chosen} == {
        path.name
        for path in (out / 'attention' / digits.name).iterdir()
        if path.is_dir()
    }


def test_sentences_are_those_of_the_evaluation_split(run, dates, out, monkeypatch):
    calls = []
    draw = vit_jax.report.attention.draw_sequence_layers

    def record(layers, *args):
        calls.append((layers, *args))
        return draw(layers, *args)

    monkeypatch.setattr(vit_jax.report.attention, 'draw_sequence_layers', record)
    assert run('report', dates, f'--out={out}').code == 0
    ours, variables = open_library(dates)
    ours.vocabulary.load(dates)
    batch = next(iter(ours.eval_data()))
    source, target = batch['source'][:1], batch['target'][:1]
    maps = sequence_maps(ours.model, variables, source, shift_right(target))
    ((layers, tokens, _),) = calls
    length = len(tokens['source'])
    assert tokens['source'] == ours.vocabulary.tokenizer.pieces(source[0][:length])
    for layer, expected in zip(layers, maps.layers):
        rows, columns = layer.weights.shape[2:]
        weights = expected.weights[:, :, :rows, :columns]
        np.testing.assert_allclose(layer.weights, weights, atol=2e-6)
    assert pictures(out)[0] >= {f'attention/{dates.name}/cross_attention.png'}


def test_without_attention(run, digits, out):
    assert run('report', digits, f'--out={out}', '--images=0').err == ''
    assert not (out / 'attention').exists()
    page = (out / 'report.md').read_text()
    assert '## Attention' not in page
    params = sum(x.size for x in jax.tree.leaves(open_library(digits)[1]['params']))
    assert f'| {params:,} |' in page


def test_curves_of_a_run_that_goes_on(run, digits, colour, tmp_path, out):
    workdir = tmp_path / 'longer'
    shutil.copytree(digits, workdir)
    with (workdir / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 5, "train/loss": 2.0, "train/step_seconds": 0.5}\n{"step')
    assert run('report', workdir, colour, f'--out={out}', '--images=0').code == 0
    files, shown = pictures(out)
    assert files == shown == {'curves/loss.png', 'curves/step_seconds.png'}
    page = (out / 'report.md').read_text()
    assert page.index('curves/loss') < page.index('<details>\n<summary>Rates by step')
    assert '| 5 of 3 |' in page


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        ('data', 'no such folder'),
        ('checkpoint', 'no checkpoints/ in it'),
        ('model', "unknown model 'ConVT-Ti/2'"),
        ('fork', 'KeyError: '),
    ],
)
def test_what_cannot_be_shown_is_told_in_a_line(
    run, digits, tmp_path, out, monkeypatch, damage, message
):
    workdir = tmp_path / 'damaged'
    shutil.copytree(digits, workdir)
    config = json.loads((workdir / 'config.json').read_text())
    if damage == 'checkpoint':
        shutil.rmtree(workdir / 'checkpoints')
    elif damage == 'data':
        config['dataset']['name'] = f'folder:{tmp_path}/gone'
    elif damage == 'model':
        config['model']['name'] = 'ConVT-Ti/2'
    else:  # a model that is no longer what it was

        def raises(*args):
            raise KeyError('head')

        monkeypatch.setattr(vit_jax.report.attention, 'attention_maps', raises)
    (workdir / 'config.json').write_text(json.dumps(config))
    code, _, err = run('report', workdir, f'--out={out}')
    assert code == 0
    (line,) = err.splitlines()
    assert line.startswith('vit_jax: damaged: no attention shown: ')
    assert message in line
    page = (out / 'report.md').read_text()
    (told,) = re.findall(r'^Not shown: (.*)\.$', page, re.MULTILINE)
    assert message in told.replace('\\', '')
    assert '| damaged |' in page


def test_an_experiment_beside_a_run(run, digits, tmp_path, out):
    folder = tmp_path / 'e'
    folder.mkdir()
    (folder / 'sweep.py').write_text(
        '"""Two."""\n'
        'from vit_jax.experiment import Cell, Experiment\n'
        'EXPERIMENT = Experiment(lambda: [Cell("a", None, {})], '
        'lambda lines: f"{len(lines)} of one\\n")\n'
    )
    line = {'cell': 'a', 'config': None, 'overrides': {}, 'seed': 0}
    (folder / 'results.jsonl').write_text(f'{json.dumps(line)}\n')
    assert run('report', folder, digits, f'--out={out}', '--images=0').code == 0
    assert (folder / 'table.md').read_text() == '1 of one\n'
    page = (out / 'report.md').read_text()
    assert page.startswith(f'# {digits.name}, e\n')
    assert '## e\n\nTwo.\n\n1 of one\n' in page


def test_paths_that_are_neither(fails, digits, tmp_path, out):
    assert fails('report', tmp_path / 'gone') == f'no such folder: {tmp_path}/gone'
    told = fails('report', digits, tmp_path)
    assert told.startswith(f'{tmp_path} is neither the workdir of a run, ')
    told = fails('report', digits.parent)
    assert told.endswith(f'; those of run are in it: {digits.parent}/*')
    told = fails('report', digits, f'--out={digits}')
    assert told == f'{digits} is the workdir of a run; choose another --out'
    (tmp_path / 'file').write_text('mine')
    told = fails('report', digits, f'--out={tmp_path}/file')
    assert told == f'cannot write to {tmp_path}/file: File exists'
    (tmp_path / 'results.jsonl').write_text('')
    told = fails('report', tmp_path, f'--experiments={tmp_path}/none')
    assert told.endswith('name the folder of experiments by --experiments')


def test_images_that_are_no_number(run, digits):
    code, _, err = run('report', digits, '--images=-1')
    assert code == 2
    assert err.endswith("--images: a whole number from 0, not '-1'\n")

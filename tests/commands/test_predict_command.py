import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from vit_jax.build import build
from vit_jax.checkpoint import Checkpoints, shapes_on
from vit_jax.config import from_dict
from vit_jax.data.datasets import load_dataset

pytest_plugins = ['command_fixtures']


def read_json(out):
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope='module')
def held_out(data_dir, digits, tmp_path_factory):
    """The digits held out, one PNG file each, and their labels."""
    folder = tmp_path_factory.mktemp('test')
    source = load_dataset('digits', str(data_dir)).open('test')
    paths, labels = [], []
    for i in range(len(source)):
        paths.append(folder / f'{i}.png')
        paths[-1].write_bytes(source[i]['image'])
        labels.append(str(source[i]['label']))
    return paths, labels


@pytest.fixture(scope='module')
def predictions(held_out, digits):
    """What the model says of the digits held out, by way of the library."""
    metadata = json.loads((digits / 'config.json').read_text())
    run = build(from_dict(metadata))
    with Checkpoints(digits, read_only=True) as checkpoints:
        like = shapes_on(run.parallel.replicated, run.state_shape)
        variables = checkpoints.restore_latest(like).state.variables
    pixels = np.stack([np.asarray(Image.open(path)) for path in held_out[0]])
    images = pixels[..., None] / 127.5 - 1
    logits = jax.jit(run.model.apply)(variables, images)
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_predictions_are_those_of_the_model(run, digits, held_out, predictions):
    """Of more images than go into a batch, in their order."""
    paths, _ = held_out
    code, out, err = run('predict', f'--weights={digits}', '--json', *paths)
    assert (code, err) == (0, '')
    results = read_json(out)
    assert [result['image'] for result in results] == [str(path) for path in paths]
    for result, expected in zip(results, predictions):
        named = [(c['class'], c['probability']) for c in result['classes']]
        best = np.argsort(-expected)[:5]
        assert [p for _, p in named] == pytest.approx(expected[best], rel=1e-4)
        for name, p in named:
            assert p == pytest.approx(expected[int(name)], rel=1e-4)
        values = [p for _, p in named]
        assert values == sorted(values, reverse=True)
        assert sum(values) < 1


def test_a_file_without_metadata_is_like_its_workdir(
    run, fails, digits, held_out, tmp_path
):
    """Model, classes and preprocessing are those of --like, weights the file's."""
    image, bare = held_out[0][0], tmp_path / 'bare'
    assert run('convert', digits, tmp_path / 'x.safetensors').code == 0
    save_file(load_file(tmp_path / 'x.safetensors'), bare)
    expected = run('predict', f'--weights={digits}', image)
    found = run('predict', f'--weights={bare}', f'--like={digits}', image)
    assert found == expected
    message = fails('predict', f'--weights={bare}', image)
    assert message.startswith(f'{bare} does not say which model it is of')
    message = fails('predict', f'--weights={bare}', f'--like={bare}', image)
    assert message.startswith(f'--like={bare} does not say which model it is of')


def test_accuracy_is_that_of_evaluate(run, digits, held_out):
    """The same model by two ways: image files here, the dataset there."""
    paths, labels = held_out
    _, out, _ = run('predict', f'--weights={digits}', '--json', *paths)
    hits = [r['classes'][0]['class'] == k for r, k in zip(read_json(out), labels)]
    hits5 = [
        k in [c['class'] for c in r['classes']] for r, k in zip(read_json(out), labels)
    ]
    _, out, _ = run('evaluate', f'--workdir={digits}')
    metrics = json.loads(out)
    assert metrics['accuracy'] == pytest.approx(np.mean(hits))
    assert metrics['accuracy_top5'] == pytest.approx(np.mean(hits5))


def test_text(run, digits, make_image):
    image = make_image('grey.png', 8, 8)
    argv = ['predict', f'--weights={digits}', image]
    (result,) = read_json(run(*argv, '--json').out)
    classes = [f'{c["class"]} {100 * c["probability"]:.2f}%' for c in result['classes']]
    assert len(classes) == 5
    assert run(*argv) == (0, f'{image}  {"  ".join(classes)}\n', '')


def test_all_classes_where_there_are_fewer_than_five(run, colour, make_image):
    image = make_image('colour.png', 10, 10, 3)
    _, out, _ = run('predict', f'--weights={colour}', '--json', image)
    (result,) = read_json(out)
    names = {c['class'] for c in result['classes']}
    assert names == {'class_0', 'class_1', 'class_2'}
    assert sum(c['probability'] for c in result['classes']) == pytest.approx(1)


def held_out_are_cropped_and_resized_as_in_evaluation(run, colour, make_image):
    """The middle of a wide image; a file's format does not matter."""
    wide = make_image('wide.png', 10, 16, 3)
    middle = wide.with_name('middle.webp')
    pixels = np.asarray(Image.open(wide))[:, 3:13]
    Image.fromarray(pixels).save(middle, lossless=True)
    _, out, _ = run('predict', f'--weights={colour}', '--json', wide, middle)
    first, second = read_json(out)
    assert first['classes'] == second['classes']


def test_the_workdir_is_left_as_it_is(run, digits, make_image, snapshot):
    before = snapshot(digits)
    image = make_image('grey.png', 8, 8)
    assert run('predict', f'--weights={digits}', image).code == 0
    assert snapshot(digits) == before

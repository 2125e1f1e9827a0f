"""Curves: what is drawn of long, noisy and broken ones."""

import numpy as np
import pytest

from vit_jax.report.curves import Curve, colours, draw_curves, find_curves, thin


def drawn(figure):
    """The lines of the data, as (x, y)."""
    (axes,) = figure.axes
    return [line.get_data() for line in axes.lines]


@pytest.mark.parametrize('count', [4, 10, 31])
def test_thin_keeps_what_is_seen(count):
    """Against loops: the extremes of each stretch, and both ends."""
    values = np.random.default_rng(0).normal(size=997)
    kept = thin(values, count)
    stretches = np.array_split(np.arange(997), count // 2)
    expected = {0, 996}
    for stretch in stretches:
        for better in (np.less, np.greater):
            found = stretch[0]
            for i in stretch:
                found = i if better(values[i], values[found]) else found
            expected.add(found)
    assert kept.tolist() == sorted(expected)


def test_short_curves_stay_whole_without_what_is_not_finite():
    values = np.array([1.0, np.nan, 2.0, np.inf, -np.inf, 3.0])
    assert thin(values, 3).tolist() == [0, 2, 5]
    assert thin(values * np.nan).tolist() == []


def test_a_long_run_is_drawn_by_few_points():
    values = np.zeros(100_003)
    values[70_001] = 5.0  # a spike
    curve = Curve('a', 'train', np.arange(100_003), values)
    ((x, y),) = drawn(draw_curves('loss', [curve], {'a': 'red'}))
    assert len(x) < 2_000
    assert (x[0], x[-1], y.max()) == (0, 100_002, 5.0)


def test_metrics_are_found_and_ordered():
    a = [
        {'step': 5, 'train/loss': 3, 'train/learning_rate': 0.1, 'train/epoch': 1.0},
        {'step': 5, 'train/step_seconds': 0.5, 'train/odd': 'text'},
        {'step': 7, 'train/loss': 2.0, 'train/learning_rate': 0.2, 'train/epoch': 2.0},
        {'step': 7, 'train/step_seconds': 0.25},
        {'step': 7, 'eval/accuracy': 0.5, 'eval/examples': 11, 'eval/loss': 2.5},
    ]
    b = [
        {'step': 6, 'eval/accuracy': 0.25, 'eval/fid': 9.0, 'eval/loss': float('nan')},
        {'step': 8, 'eval/accuracy': 0.75, 'eval/fid': 8.0},
    ]
    found = find_curves({'a': a, 'b': b})
    assert list(found) == ['loss', 'accuracy', 'fid', 'learning_rate', 'step_seconds']
    loss = [(c.run, c.kind, c.steps.tolist(), c.values.tolist()) for c in found['loss']]
    assert loss[:2] == [('a', 'train', [5, 7], [3, 2]), ('a', 'eval', [7], [2.5])]
    assert [len(curve.steps) for curve in found['accuracy']] == [1, 2]


def test_one_evaluation_is_no_curve():
    assert find_curves({'a': [{'step': 3, 'eval/loss': 1.0}]}) == {}
    assert find_curves({}) == {}


def test_a_picture_shows_every_run():
    curves = [
        Curve('a', 'train', np.array([1, 2, 3]), np.array([3.0, np.nan, 1.0])),
        Curve('a', 'eval', np.array([3]), np.array([2.0])),
        Curve('b', 'eval', np.array([2, 4]), np.array([0.5, 0.25])),
    ]
    figure = draw_curves('loss', curves, colours(['a', 'b', '_c']))
    shown = [(x.tolist(), y.tolist()) for x, y in drawn(figure)]
    assert shown == [([1, 3], [3, 1]), ([3], [2]), ([2, 4], [0.5, 0.25])]
    (axes,) = figure.axes
    of_a, eval_a, of_b = (line.get_color() for line in axes.lines)
    assert of_a == eval_a != of_b
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ['a', 'b']


def test_scales():
    def scale(name, *values):
        steps = np.arange(len(values))
        curve = Curve('a', 'train', steps, np.array(values, float))
        (axes,) = draw_curves(name, [curve], {'a': 'k'}).axes
        return axes.get_yscale()

    assert scale('loss', 100, 0.5) == scale('grad_norm', 1e5, 1) == 'log'
    assert scale('loss', 100, 0) == scale('loss', 10, 5) == 'linear'
    assert scale('accuracy', 0.9, 0.001) == scale('learning_rate', 1, 1e-6) == 'linear'
    assert scale('loss', float('nan'), float('inf')) == 'linear'


@pytest.mark.parametrize('count', [1, 7, 8, 40])
def test_each_run_has_its_colour(count):
    found = colours(map(str, range(count)))
    assert len({tuple(np.atleast_1d(colour)) for colour in found.values()}) == count


@pytest.mark.parametrize('name', [r'$\x{$', '_hidden', 'a' * 300, 'r$'])
def test_names_of_runs_are_text(name):
    curve = Curve(name, 'train', np.array([1, 2]), np.array([1.0, 2.0]))
    figure = draw_curves(r'$\x{$', [curve], colours([name, 'b']))
    figure.canvas.draw()  # raises where a formula is wrong
    (text,) = figure.legends[0].get_texts()
    assert text.get_text().lstrip('…') == name[-59:]

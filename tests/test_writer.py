import io
import json
import shutil
import sys
import types

import pytest

from vit_jax.writer import MetricWriter, Progress, format_metrics, read_metrics


def lines(folder):
    return (folder / 'metrics.jsonl').read_text().splitlines()


def write(folder, start_step, steps, tensorboard=False):
    with MetricWriter(folder, start_step, tensorboard) as writer:
        for step in steps:
            writer.write(step, {'train/loss': 1 / step, 'start': start_step})


def test_metrics_are_one_json_object_a_line(tmp_path):
    write(tmp_path, 0, [2, 5])
    assert [json.loads(line) for line in lines(tmp_path)] == [
        {'step': 2, 'train/loss': 0.5, 'start': 0},
        {'step': 5, 'train/loss': 0.2, 'start': 0},
    ]
    assert read_metrics(tmp_path) == [json.loads(line) for line in lines(tmp_path)]


def test_metrics_are_on_disk_as_soon_as_they_are_written(tmp_path):
    with MetricWriter(tmp_path, 0, False) as writer:
        for step in (1, 2, 3):
            writer.write(step, {})
            assert len(read_metrics(tmp_path)) == step


@pytest.mark.parametrize('line', [b'{"step": 3', b'5', b'{"\xff": 1}'])
def test_metrics_are_read_up_to_a_damaged_line(tmp_path, line):
    write(tmp_path, 0, [2])
    with (tmp_path / 'metrics.jsonl').open('ab') as file:
        file.write(line + b'\n{"step": 4}\n')
    assert [line['step'] for line in read_metrics(tmp_path)] == [2]


@pytest.mark.parametrize(('start_step', 'kept'), [(0, 0), (3, 2), (4, 3), (9, 5)])
def test_lines_past_the_restored_step_are_dropped(tmp_path, start_step, kept):
    write(tmp_path, 0, [1, 2, 4, 6, 9])
    write(tmp_path, start_step, [10])
    metrics = read_metrics(tmp_path)
    assert [line['step'] for line in metrics] == [*[1, 2, 4, 6, 9][:kept], 10]
    assert [line['start'] for line in metrics] == [0] * kept + [start_step]


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    write(tmp_path, 0, [1, 2])
    path = tmp_path / 'metrics.jsonl'
    whole = path.read_text()
    for cut in range(1, len('{"step": 2')):
        path.write_text(whole + '{"step": 2, "train/loss": 0.5}'[:cut])
        assert [line['step'] for line in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, 2, [3])
    assert [json.loads(line)['step'] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_run_of_weights_and_biases_is_this_run_not_its_path(tmp_path, monkeypatch):
    started = []
    tracker = types.SimpleNamespace(log=lambda *args, **kwargs: None, finish=lambda: 0)
    errors = types.SimpleNamespace(Error=RuntimeError)

    def init(**kwargs):
        started.append(kwargs['id'])
        return tracker

    module = types.SimpleNamespace(init=init, errors=errors)
    monkeypatch.setitem(sys.modules, 'wandb', module)
    for _ in range(2):  # gone on with, then begun anew at the same path
        for _ in range(2):
            tmp_path.mkdir(exist_ok=True)
            (tmp_path / 'config.json').write_text('{}')
            with MetricWriter(tmp_path, 0, False, 'project'):
                pass
        shutil.rmtree(tmp_path)
    first, same, other, again = started
    assert first == same != other == again


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == []
    with MetricWriter(tmp_path, 0, False):
        assert read_metrics(tmp_path) == []


@pytest.mark.parametrize('tensorboard', [True, False])
def test_tensorboard_events(tmp_path, tensorboard):
    write(tmp_path, 0, [1, 2], tensorboard)
    events = list(tmp_path.glob('events.out.tfevents.*'))
    assert len(events) == tensorboard
    for file in events:
        assert b'train/loss' in file.read_bytes()


def test_tensorboard_forgets_what_is_computed_again(tmp_path, monkeypatch):
    """Points from the first step of the new run on are purged."""
    import tensorboardX

    made = []
    original = tensorboardX.SummaryWriter

    def record(*args, **kwargs):
        made.append(kwargs['purge_step'])
        return original(*args, **kwargs)

    monkeypatch.setattr(tensorboardX, 'SummaryWriter', record)
    write(tmp_path, 6, [7], tensorboard=True)
    assert made == [7]


# --- On the terminal ----------------------------------------------------------


def show(stream, monkeypatch):
    monkeypatch.setattr(sys, 'stderr', stream)
    with Progress(3, 7) as progress:
        progress.say('hello')
        progress.advance()
        progress.train(4, {'loss': 0.5}, {'images_per_second': 123.456})
        progress.say('bye')
    return stream.getvalue()


def test_progress_prints_lines_where_there_is_no_terminal(monkeypatch, capsys):
    shown = show(io.StringIO(), monkeypatch)
    assert shown == 'hello\nstep 4/7  loss 0.5  images_per_second 123.5\nbye\n'
    assert capsys.readouterr().out == ''


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    stream = io.StringIO()
    stream.isatty = lambda: True
    shown = show(stream, monkeypatch)
    assert '4/7' in shown
    assert 'loss 0.5' in shown
    assert 'hello\n' in shown
    assert 'bye\n' in shown
    assert 'images_per_second' not in shown
    assert capsys.readouterr().out == ''


def test_accuracies_are_shown_in_per_cent():
    metrics = {'accuracy_top5': 0.12345, 'loss': 1e-7, 'examples': 359}
    expected = 'accuracy_top5 12.35%  loss 1e-07  examples 359'
    assert format_metrics(metrics) == expected

"""Operations of cells: those of their steps, as often as they are made."""

import vit_jax.costs
from vit_jax.costs import cell_flops
from vit_jax.experiment import Cell, Experiment
from vit_jax.summary import step_flops

B, P, H, V = 16, 5 * 5 * 3, 11, 7  # batch, pixels, hidden units, classes


def test_cells_that_share_a_step(monkeypatch):
    """Longer ones, and parts of the data, take no further trace."""
    traced = []

    def counting(run):
        traced.append(run)
        return step_flops(run)

    monkeypatch.setattr(vit_jax.costs, 'step_flops', counting)

    def make_cell(name, steps, fraction=1.0, hidden=H):
        overrides = {
            'model.name': 'MLP',
            'model.kwargs': {'widths': (hidden,)},
            'dataset.name': 'synthetic:size=5,channels=3,num_examples=37,num_classes=7',
            'batch_size': B,
            'num_steps': steps,
            'optim.warmup_steps': 1,
            'dataset.train_fraction': fraction,
        }
        return Cell(name, 'configs/digits_cnn.py', overrides)

    cells = [
        make_cell('a', 3),
        make_cell('b', 3, fraction=0.5),
        Cell('counted', None, {'x': 5}),
        make_cell('c', 1000),
        make_cell('d', 3, hidden=17),
    ]
    experiment = Experiment(list, str, flops=lambda cell: cell.overrides['x'])
    step, wider = (2 * B * (2 * P * h + 3 * h * V) for h in (H, 17))
    found = list(cell_flops(experiment, cells))
    assert found == [3 * step, 3 * step, 5, 1000 * step, 3 * wider]
    assert len(traced) == 2

"""The largest batch that fits, on the CPU's own devices with a limit of ours."""

import pytest
from test_topology import PARAMS, cpus, make_report, make_run

from vit_jax.errors import UserError
from vit_jax.largest_batch import largest_batch, solve_line
from vit_jax.topology import compile_for


def test_largest_batch():
    run = make_run(batch_size=4096)
    report = compile_for(run, cpus(2), quick=True)
    limit = 3 * report.memory.total
    report = report._replace(memory=report.memory._replace(limit=limit))
    largest = largest_batch(run, cpus(2), report, quick=True)
    assert largest.batch_size % 2 == 0
    assert largest.batch_size > 4096
    assert largest.memory.fits
    assert largest.memory.limit == limit
    assert largest.memory.total > 0.9 * limit  # there is no room for many more


def test_the_largest_batch_of_mixed_images_has_whole_pairs():
    run = make_run(batch_size=64, **{'augment.mixup': 0.8})
    report = compile_for(run, cpus(1), quick=True)
    # 0.6 x 64 x 1.5 is 57 images: the second size, were they not mixed.
    limit = int(1.5 * report.memory.total)
    report = report._replace(memory=report.memory._replace(limit=limit))
    largest = largest_batch(run, cpus(1), report, quick=True)
    assert largest.batch_size % 2 == 0
    assert largest.batch_size > 64


def test_no_batch_fits_without_room_for_the_state():
    report = make_report()
    tight = report._replace(memory=report.memory._replace(limit=4 * PARAMS))
    assert not tight.memory.fits
    assert largest_batch(make_run(), cpus(), tight, quick=True) is None
    with pytest.raises(UserError, match=r"memory of 'cpu' devices is not known"):
        largest_batch(make_run(), cpus(), report)


@pytest.mark.parametrize(
    ('points', 'answer'),
    [
        ({10: 120, 30: 320}, 98),  # 20 + 10 x
        ({10: 120, 200: 2020}, 98),
        ({10: 120, 98: 1001}, 97),  # the line says 97.9
        ({10: 100, 50: 1020, 90: 2000}, 49),
        ({10: 900, 20: 950, 25: 1200}, 24),  # the line says 30
        ({10: 120, 20: 120}, 20),  # no slope: as far as is known
        ({10: 1200, 20: 1200}, 9),
    ],
)
def test_line(points, answer):
    assert solve_line(points, 1000) == answer

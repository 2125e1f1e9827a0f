"""What the lines of an experiment say, as text: means over seeds, verdicts, tables.

A measured number is compared with a published one by `status`: 'reproduced', 'differs'
or 'not run'. A claim that is tried on other data than the paper's is never reproduced;
by the 95% interval over seeds `verdict` says 'supports', 'contradicts' or
'inconclusive'.
"""

import functools
import operator
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from vit_jax.errors import UserError
from vit_jax.experiment import Cell, Expected, Line

NOT_RUN = 'not run'


def values_of(lines: Iterable[Line], name: str, *path: str) -> list[Any]:
    """What was measured of each seed of a cell.

    Args:
      lines: of the experiment.
      name: of the cell.
      path: keys, one in the other; none is what is compared with a published value:
        'value', or where nothing is so called 'accuracy', in per cent.

    Raises:
      UserError: for a line without it.

    >>> lines = [{'cell': 'digits/ViT', 'seed': 0, 'accuracy': 0.5, 'test': {'f1': 3}}]
    >>> values_of(lines, 'digits/ViT'), values_of(lines, 'digits/ViT', 'test', 'f1')
    ([50.0], [3])
    >>> values_of([{'cell': 'macs/ViT', 'seed': 0, 'value': 1.3}], 'macs/ViT')
    [1.3]
    """
    return list(by_seed(lines, name, *path).values())


def by_seed(lines: Iterable[Line], name: str, *path: str) -> dict[int, Any]:
    """The same with the seeds, to be compared with what else these have in common.

    >>> by_seed([{'cell': 'ViT', 'seed': 4, 'accuracy': 0.5}], 'ViT')
    {4: 50.0}
    """
    found = [line for line in lines if line['cell'] == name]
    found.sort(key=lambda line: line['seed'])

    def read(line: Line) -> Any:
        try:
            if path:
                return functools.reduce(operator.getitem, path, line)
            return line['value'] if 'value' in line else 100 * line['accuracy']
        except (KeyError, TypeError) as error:
            what = '.'.join(path) or 'accuracy'
            raise UserError(
                f'the line of {name}, seed {line["seed"]}, has no {what}, as one of an '
                'older sweep; delete it, or the folder of the cell, which runs again'
            ) from error

    return {line['seed']: read(line) for line in found}


def mean_sd(values: Sequence[float], form: str = '.1f') -> str:
    """The mean, and the standard deviation over seeds.

    >>> mean_sd([50, 60]), mean_sd([50.04]), mean_sd([])
    ('55.0 ± 7.1 (2 seeds)', '50.0 (1 seed)', 'not run')
    """
    if not values:
        return NOT_RUN
    mean = format(statistics.mean(values), form)
    if len(values) == 1:
        return f'{mean} (1 seed)'
    return f'{mean} ± {statistics.stdev(values):{form}} ({len(values)} seeds)'


class Difference(NamedTuple):
    """How much larger one mean is than another, and the interval that holds it.

    Attributes:
      mean: of the first less that of the second.
      low, high: ends of the 95% interval.
      seeds: of the first, and of the second.
    """

    mean: float
    low: float
    high: float
    seeds: tuple[int, int]

    @property
    def verdict(self) -> str:
        """Of the claim that the first is larger."""
        if self.low > 0:
            return 'supports'
        return 'contradicts' if self.high < 0 else 'inconclusive'

    def __str__(self) -> str:
        return f'{self:.1f}'

    def __format__(self, form: str) -> str:
        """In so many digits, such as '.1f'."""
        seeds = '/'.join(map(str, sorted({*self.seeds})))
        mean, low, high = (f'{x:+{form}}' for x in (self.mean, self.low, self.high))
        return f'{self.verdict}: {mean} (95% interval {low} to {high}, {seeds} seeds)'


def difference(first: Sequence[float], second: Sequence[float]) -> Difference | None:
    """The difference of two means, with Welch's interval; None without two seeds each.

    B. L. Welch, "The generalization of 'Student's' problem when several different
    population variances are involved", Biometrika 34, 1947.

    Seeds that all say the same have an interval of length 0.

    >>> print(difference([91, 90, 92], [80, 82, 81]))
    supports: +10.0 (95% interval +7.7 to +12.3, 3 seeds)
    >>> print(difference([81, 80, 82], [80, 82, 81]))
    inconclusive: +0.0 (95% interval -2.3 to +2.3, 3 seeds)
    """
    from scipy.stats import t

    if min(len(first), len(second)) < 2:
        return None
    parts = [statistics.variance(x) / len(x) for x in (first, second)]
    mean = statistics.mean(first) - statistics.mean(second)
    variance = sum(parts)
    if variance == 0.0:
        return Difference(mean, mean, mean, (len(first), len(second)))
    freedom = variance**2 / sum(
        part**2 / (len(x) - 1) for part, x in zip(parts, (first, second))
    )
    half = float(t.ppf(0.975, freedom)) * variance**0.5
    return Difference(mean, mean - half, mean + half, (len(first), len(second)))


def verdict(first: Sequence[float], second: Sequence[float], form: str = '.1f') -> str:
    """Whether seeds support the claim that the first is larger than the second.

    Differences of pairs are compared with as many zeros.

    >>> verdict([91, 90, 92], [])
    'not run'
    >>> verdict([91], [80])
    'inconclusive: +11.0 (one seed)'
    >>> verdict([0.31, 0.32, 0.33], [0.0, 0.0, 0.0], form='.2f')
    'supports: +0.32 (95% interval +0.30 to +0.34, 3 seeds)'
    """
    if not (first and second):
        return NOT_RUN
    found = difference(first, second)
    if found is None:
        mean = statistics.mean(first) - statistics.mean(second)
        return f'inconclusive: {mean:+{form}} (one seed)'
    return format(found, form)


def verdict_of_pairs(differences: Sequence[float], form: str = '.1f') -> str:
    """Whether seeds support the claim that a difference is above 0.

    Each is of what a seed alone tells: two layers of one run, or the same run before
    and after, which are not independent, as `verdict` takes them to be. The interval is
    Student's, of their mean.

    >>> verdict_of_pairs([3, 4, 5])
    'supports: +4.0 (95% interval +1.5 to +6.5, 3 seeds)'
    >>> verdict_of_pairs([4], '.2f'), verdict_of_pairs([])
    ('inconclusive: +4.00 (one seed)', 'not run')
    """
    from scipy.stats import t

    count = len(differences)
    if count == 0:
        return NOT_RUN
    mean = statistics.mean(differences)
    if count == 1:
        return f'inconclusive: {mean:+{form}} (one seed)'
    half = float(t.ppf(0.975, count - 1)) * statistics.stdev(differences) / count**0.5
    return format(Difference(mean, mean - half, mean + half, (count, count)), form)


def status(values: Sequence[float], expected: Expected) -> str:
    """What has become of a published value.

    >>> expected = Expected(73.1, 'arXiv 2103.10697, table 1')
    >>> status([73.3], expected), status([70.0, 71.0], expected), status([], expected)
    ('reproduced', 'differs', 'not run')
    """
    if not values:
        return NOT_RUN
    # 9.95 is not within 0.05 of 10 to the last bit.
    near = abs(statistics.mean(values) - expected.value) <= expected.tolerance + 1e-9
    return 'reproduced' if near else 'differs'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown.

    >>> print(table(['model', 'accuracy'], [['ViT', '50.0']]), end='')
    | model | accuracy |
    | --- | --- |
    | ViT | 50.0 |
    """
    return ''.join(map(table_row, [header, ['---'] * len(header), *rows]))


def table_row(cells: Sequence[str]) -> str:
    """A line of it; a cell may hold '|'.

    >>> table_row(['p(a|b)', '0.5'])
    '| p(a\\\\|b) | 0.5 |\\n'
    """
    return '| ' + ' | '.join(cell.replace('|', r'\|') for cell in cells) + ' |\n'


def published_table(cells: Iterable[Cell], lines: Sequence[Line]) -> str:
    """Every cell that has a published value, what was measured, and its status."""
    rows = {}
    for cell in cells:
        if cell.expected:
            values = values_of(lines, cell.name, *cell.expected.path)
            published = f'{cell.expected.value:g} ({cell.expected.source})'
            rows[cell.name] = [
                cell.name,
                published,
                mean_sd(values),
                status(values, cell.expected),
            ]
    return table(['cell', 'published', 'measured', 'status'], rows.values())

"""Dates as people write them, to be translated to ISO: a task without files or network.

'Tuesday the 3rd of March 1998', '3.3.98' and 'MAR 3, 1998' all become '1998-03-03'.

No text has two meanings:
  - figures between slashes are month/day/year, as in the US, and between dots
    day.month.year; a year of four figures that comes first is followed by its month;
  - a year of two figures lies in 1950 to 2049, as all dates do;
  - the name of a weekday is that of the date.
"""

import datetime

import numpy as np

from vit_jax.data.order import Order
from vit_jax.errors import unknown

FIRST = datetime.date(1950, 1, 1)
NUM_DAYS = (datetime.date(2050, 1, 1) - FIRST).days
EVAL_EXAMPLES = 1_000

FORMS = (
    '{month} {d}, {y}',
    '{month} {d} {y}',
    '{month} {nth}, {y}',
    'the {nth} of {month}, {y}',
    '{nth} of {month} {y}',
    '{nth} {month} {y}',
    '{d} {month} {y}',
    '{d} {mon} {y}',
    '{mon} {d}, {y}',
    '{mon}. {nth}, {y}',
    '{mon} {d} {yy}',
    '{d} {mon} {yy}',
    "{month} {d}, '{yy}",
    "{d} {month} '{yy}",
    '{dd}-{mon}-{y}',
    '{dd}-{mon}-{yy}',
    '{month} {y}, the {nth}',
    '{y} {month} {d}',
    '{y}, {nth} of {month}',
    '{weekday}, {month} {d}, {y}',
    '{weekday}, {d} {month} {y}',
    '{weekday} the {nth} of {month} {y}',
    '{day} {d} {mon} {y}',
    '{day}, {mon} {nth}, {y}',
    '{m}/{d}/{y}',
    '{mm}/{dd}/{y}',
    '{m}/{d}/{yy}',
    '{d}.{m}.{y}',
    '{dd}.{mm}.{y}',
    '{d}.{m}.{yy}',
    '{y}.{mm}.{dd}',
    '{y}/{mm}/{dd}',
    '{y}{mm}{dd}',
)

_MONTHS = (
    'January',
    'February',
    'March',
    'April',
    'May',
    'June',
    'July',
    'August',
    'September',
    'October',
    'November',
    'December',
)
_WEEKDAYS = (
    'Monday',
    'Tuesday',
    'Wednesday',
    'Thursday',
    'Friday',
    'Saturday',
    'Sunday',
)
_CASES = (str, str, str.lower, str.upper)  # as it is: half of the time

# Of 20 successive days, one is for each split that training does not see; 20 has no
# common divisor with the 7 days of a week, so each gets all weekdays.
_PERIOD = 20
_HELD_OUT = {'validation': 0, 'test': 1}
SPLITS = ('train', *_HELD_OUT)


def write_date(date: datetime.date, form: str) -> str:
    """A date in one of the `FORMS`.

    >>> write_date(datetime.date(1998, 3, 3), "{weekday} the {nth} of {month} '{yy}")
    "Tuesday the 3rd of March '98"
    """
    month, weekday = _MONTHS[date.month - 1], _WEEKDAYS[date.weekday()]
    suffix = {1: 'st', 2: 'nd', 3: 'rd'}.get(date.day % 10, 'th')
    if date.day in (11, 12, 13):
        suffix = 'th'
    return form.format(
        d=date.day,
        dd=f'{date.day:02}',
        nth=f'{date.day}{suffix}',
        m=date.month,
        mm=f'{date.month:02}',
        mon=month[:3],
        month=month,
        day=weekday[:3],
        weekday=weekday,
        y=date.year,
        yy=f'{date.year % 100:02}',
    )


def make_dates(split: str, num_examples: int) -> tuple[list[str], list[str]]:
    """The first examples of a split; example i is a function of (split, i).

    The splits have no day in common, hence no text either.

    Args:
      split: 'train', 'validation' or 'test'.
      num_examples: in [1, 2**53).

    Returns:
      What was written, and the dates in ISO 8601.

    Raises:
      UserError: for another split.

    >>> make_dates('train', 2)
    (['4TH OF MAY 2008', '12/24/1997'], ['2008-05-04', '1997-12-24'])
    """
    if split not in SPLITS:
        raise unknown('split of dates', split, SPLITS)
    days = np.arange(NUM_DAYS)
    if split in _HELD_OUT:
        days = days[days % _PERIOD == _HELD_OUT[split]]
    else:
        days = days[~np.isin(days % _PERIOD, list(_HELD_OUT.values()))]
    words = Order(1, seed=SPLITS.index(split)).words_at(np.arange(num_examples))
    written, iso = [], []
    choices = words % np.array([len(days), len(FORMS), len(_CASES)], np.uint32)
    for day, form, case in choices.tolist():
        date = FIRST + datetime.timedelta(days=int(days[day]))
        written.append(_CASES[case](write_date(date, FORMS[form])))
        iso.append(date.isoformat())
    return written, iso

import datetime

import pytest

from vit_jax.data.dates import (
    FIRST,
    FORMS,
    NUM_DAYS,
    SPLITS,
    make_dates,
    write_date,
)
from vit_jax.errors import UserError

COUNTS = {'train': 20_000, 'validation': 1_000, 'test': 1_000}


@pytest.fixture(scope='module')
def splits():
    return {split: make_dates(split, count) for split, count in COUNTS.items()}


def test_there_are_many_forms_and_each_shows_the_whole_date():
    assert len(set(FORMS)) == len(FORMS) >= 20
    for form in FORMS:
        year = {'y', 'yy'} & fields(form)
        month = {'m', 'mm', 'mon', 'month'} & fields(form)
        day = {'d', 'dd', 'nth'} & fields(form)
        assert (len(year), len(month), len(day)) == (1, 1, 1), form


def fields(form):
    return {part.partition('}')[0] for part in form.split('{')[1:]}


@pytest.mark.parametrize(
    ('date', 'form', 'written'),
    [
        ((1998, 3, 3), '{nth} of {month} {y}', '3rd of March 1998'),
        ((2001, 11, 21), '{mon} {d} {yy}', 'Nov 21 01'),
        ((2024, 2, 29), '{weekday}, {d} {month} {y}', 'Thursday, 29 February 2024'),
        ((1969, 7, 20), '{day} {m}/{d}/{yy} {dd}.{mm}', 'Sun 7/20/69 20.07'),
    ],
)
def test_dates_are_written_as_people_do(date, form, written):
    assert write_date(datetime.date(*date), form) == written


def test_ordinals():
    ends = {1: 'st', 2: 'nd', 3: 'rd', 21: 'st', 22: 'nd', 23: 'rd', 31: 'st'}
    for day in range(1, 32):
        written = write_date(datetime.date(2000, 1, day), '{nth}')
        assert written == f'{day}{ends.get(day, "th")}'


def test_no_text_has_two_meanings():
    """Of all forms of all dates: what is the same, even in lower case, is one date."""
    meaning = {}
    for day in range(NUM_DAYS):
        date = FIRST + datetime.timedelta(days=day)
        for form in FORMS:
            written = write_date(date, form).lower()
            assert meaning.setdefault(written, day) == day, written


def test_sources_of_the_splits_are_disjoint(splits):
    sources = {split: {s.lower() for s in pair[0]} for split, pair in splits.items()}
    days = {split: set(pair[1]) for split, pair in splits.items()}
    for one, other in (('train', 'validation'), ('train', 'test'), SPLITS[1:]):
        assert not sources[one] & sources[other]
        assert not days[one] & days[other]


def test_all_forms_cases_and_decades_are_seen(splits):
    source, target = splits['train']
    by_form = dict.fromkeys(FORMS, 0)
    for written, iso in zip(source, target):
        date = datetime.date.fromisoformat(iso)
        found = [f for f in FORMS if write_date(date, f).lower() == written.lower()]
        assert found
        for form in found:  # those of May with its name in full and cut are the same
            by_form[form] += 1
    assert min(by_form.values()) > 400
    letters = [s for s in source if any(c.isalpha() for c in s)]
    for change in (str.lower, str.upper):
        assert 0.2 < sum(s == change(s) for s in letters) / len(letters) < 0.3
    assert {iso[:3] for iso in target} == {str(x) for x in range(195, 205)}


def test_example_is_a_function_of_split_and_index(splits):
    source, target = splits['train']
    assert make_dates('train', 50) == (source[:50], target[:50])
    assert len(set(source)) > 19_000
    # Forms and cases are drawn anew in each split.
    shouted = {tuple(s.isupper() for s in pair[0][:40]) for pair in splits.values()}
    assert len(shouted) == 3


def test_splits_that_there_are_not():
    with pytest.raises(UserError, match=r"unknown split of dates 'val.*'validation'"):
        make_dates('valid', 3)

"""An English-German corpus from CLDR, the human translations in Babel: make_corpus.py FOLDER.

The sides of a pair are the two locales' wordings of one date, time, number, sum of money, quantity, time
span, name or list of names. The training set has every name by itself. A held-out sentence is not in the
training set, but its words, numbers and patterns are.
"""

import random
import sys
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Callable, Dict, List, Tuple

from babel import Locale, dates, lists, numbers, units

Pair = Tuple[str, str]
Render = Callable[[Locale], str]
LOCALES = ENGLISH, GERMAN = Locale("en"), Locale("de")
SKELETONS = ("yMMMEd", "yMMMd", "yMMMM", "MMMEd", "MMMd", "GyMMMd", "yQQQQ", "MMMMW", "yw")


def pair(render: Render) -> Pair:
    """Return the results of ``render`` for the English and the German locale, with ordinary spaces."""
    english, german = (" ".join(render(locale).split()) for locale in LOCALES)
    return english, german


def measure(value: float, unit: str, locale: Locale) -> str:
    """Return the quantity with the unit's long name, or with its code if CLDR has no name."""
    return units.format_unit(value, unit, length="long", locale=locale)


NAMES = {
    kind: sorted(
        code for code in getattr(GERMAN, kind) if code in getattr(ENGLISH, kind) and len(code) == length
    )
    for kind, length in (("territories", 2), ("languages", 2))
}
UNITS = sorted(
    unit
    for unit in {*ENGLISH.unit_display_names} & {*GERMAN.unit_display_names}
    if not any(unit in measure(3, unit, locale) for locale in LOCALES)
)
TODAY = date(2025, 1, 1)
CURRENCIES = sorted(
    {c for place in NAMES["territories"] for c in numbers.get_territory_currencies(place, TODAY, TODAY)}
)


def names() -> List[Pair]:
    """Return every name by itself: of a territory, language, currency or unit."""
    return (
        [pair(lambda locale, k=kind, c=code: getattr(locale, k)[c]) for kind in NAMES for code in NAMES[kind]]
        + [pair(lambda locale, c=code: numbers.get_currency_name(c, locale=locale)) for code in CURRENCIES]
        + [pair(lambda locale, u=unit: measure(1, u, locale)) for unit in UNITS]
    )


def moment(rng: random.Random) -> datetime:
    """Return a random second of 1950 to 2049."""
    return datetime(1950, 1, 1) + timedelta(seconds=rng.randrange(36525 * 86400))


def calendar_date(rng: random.Random) -> Render:
    day, width = moment(rng), rng.choice(("full", "long", "short"))
    return lambda locale: dates.format_date(day, width, locale)


def partial_date(rng: random.Random) -> Render:
    day, skeleton = moment(rng), rng.choice(SKELETONS)
    return lambda locale: dates.format_skeleton(skeleton, day, locale=locale)


def interval(rng: random.Random) -> Render:
    start, days = moment(rng), rng.randrange(1, 100)
    return lambda locale: dates.format_interval(start, start + timedelta(days), "yMMMd", locale=locale)


def clock(rng: random.Random) -> Render:
    at, width = moment(rng), rng.choice(("short", "medium"))
    form = rng.choice((dates.format_time, dates.format_datetime))
    return lambda locale: form(at, width, locale=locale)


def span(rng: random.Random) -> Render:
    (unit, seconds), count = rng.choice(dates.TIMEDELTA_UNITS), rng.choice((-1, 1)) * rng.randrange(1, 100)
    delta = timedelta(seconds=count * seconds)
    return lambda locale: dates.format_timedelta(delta, unit, 1000, add_direction=True, locale=locale)


def number(rng: random.Random) -> Render:
    value = rng.choice((rng.randrange(10**7), rng.randrange(10**6) / 100))
    return lambda locale: numbers.format_decimal(value, locale=locale)


def rounded(rng: random.Random) -> Render:
    value = rng.randrange(10, 1000) * 10 ** rng.randrange(3, 11)
    return lambda locale: numbers.format_compact_decimal(
        value, format_type="long", locale=locale, fraction_digits=1
    )


def percentage(rng: random.Random) -> Render:
    value = rng.randrange(10**4) / 10**4
    return lambda locale: numbers.format_percent(value, locale=locale, decimal_quantization=False)


def money(rng: random.Random) -> Render:
    currency, value = rng.choice(CURRENCIES), rng.choice((1, 100)) * rng.randrange(1, 10**5) / 100
    return lambda locale: numbers.format_currency(value, currency, locale=locale, format_type="name")


def quantity(rng: random.Random) -> Render:
    unit, value = (
        rng.choice(UNITS),
        rng.choice((rng.randrange(2, 100), rng.randrange(10**4), rng.randrange(100) / 10)),
    )
    return lambda locale: measure(value, unit, locale)


def quantities(rng: random.Random) -> Render:
    parts = [(rng.randrange(2, 1000), unit) for unit in rng.sample(UNITS, 2)]
    return lambda locale: lists.format_list([measure(*part, locale) for part in parts], locale=locale)


def listing(rng: random.Random) -> Render:
    kind, style = rng.choice(list(NAMES)), rng.choice(("standard", "or"))
    codes = rng.sample(NAMES[kind], rng.choice((2, 3)))
    return lambda locale: lists.format_list([getattr(locale, kind)[code] for code in codes], style, locale)


FORMS = (calendar_date, partial_date, interval, clock, span, number, rounded, percentage, money, quantity)
FORMS += (quantities, listing, listing, clock)


def build(train: int = 24000, test: int = 1000, seed: int = 1) -> Dict[str, List[Pair]]:
    """Return different (English, German) pairs, no English sentence twice. The quickstart has seed 1."""
    rng = random.Random(seed)
    fixed = dict(names())
    drawn: Dict[str, str] = {}
    while len(drawn) < train + test - len(fixed):
        english, german = pair(rng.choice(FORMS)(rng))
        if english not in fixed:
            drawn.setdefault(english, german)
    pairs = list(drawn.items())
    return {"test": pairs[:test], "train": [*fixed.items(), *pairs[test:]]}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_corpus.py FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in build().items():
        for side, language in enumerate(("en", "de")):
            text = "".join(sentences[side] + "\n" for sentences in pairs)
            (folder / f"{name}.{language}").write_text(text, encoding="utf-8")

"""Draw predicted shortfall against training time, with the Pareto front, as an SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import product

from rayfin.advisor.answer import Choice, Recommendation, TradeOffPoint
from rayfin.advisor.chart_marks import LIGHT, MARKS, mark_number
from rayfin.language import answering_in, localized

Scale = Callable[[float], float]
"""Maps a value to pixels."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 760, 460, 64, 56, 48, 150
_APART = 8.0
"""The pixels between the centres of two marks that don't cover each other."""
_ASIDE = tuple(n * _APART * side for n in range(6) for side in ((1, -1) if n else (1,)))
"""How far a mark may be moved along the axis of time, nearest first."""
_RADIUS = 8.0
_AROUND = tuple(
    (reach * math.cos(turn * math.pi / 6), reach * math.sin(turn * math.pi / 6))
    for reach, turn in product((22, 34, 46, 60, 75, 90), (-2, -1, -3, 0, -4, 1, -5, 2, 6, 4, 3, 5))
)
"""Where the number of a choice may go, in pixels from its mark, the first free place."""


@dataclass(frozen=True)
class _Placed:
    """A candidate, and where its mark is."""

    point: TradeOffPoint
    x: float
    y: float

    def hides(self, other: _Placed) -> bool:
        """Whether the mark covers another that looks otherwise, or covers a part of one."""
        apart = math.dist((self.x, self.y), (other.x, other.y))
        return apart < _APART and (self.point.method != other.point.method or apart > 1.0)


def picture(answer: Recommendation) -> str:
    """Return the chart of all candidates as an SVG, in the answer's language.

    The Pareto front is a line; recommended candidates have their rank and their interval. Marks
    that would cover each other are moved aside, along the axis of time.
    """
    with answering_in(answer.lang):
        return _picture(answer)


def _picture(answer: Recommendation) -> str:
    seconds = [point.train_seconds for point in answer.points]
    seconds += [choice.predictions.train_seconds.expected for choice in answer.choices]
    first, last = math.log10(min(seconds) / 1.2), math.log10(max(seconds) * 1.2)

    def x(value: float) -> float:
        share = (math.log10(value) - first) / (last - first)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(shortfall: float) -> float:
        return _TOP + shortfall * (_HEIGHT - _TOP - _BOTTOM)

    placed = _placed(answer, x, y)
    methods = list(dict.fromkeys(point.method for point in answer.points))
    front = sorted((p for p in answer.points if p.front), key=lambda p: p.train_seconds)
    line = " ".join(f"{x(p.train_seconds):.1f},{y(p.shortfall):.1f}" for p in front)
    source = localized("learned") if answer.source == "learned" else localized("rules")
    title = localized(
        "What is expected of each candidate ({source}, relevance {relevance:.0%})",
        source=source,
        relevance=answer.relevance,
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            'font-family="sans-serif" font-size="12" role="img" aria-labelledby="name text">',
            f'<title id="name">{escape(title)}</title>',
            f'<desc id="text">{escape(_described(answer))}</desc>',
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
            f'<text x="{_LEFT}" y="22" font-size="15">{escape(title)}</text>',
            *_axes(first, last, x, y),
            f'<polyline points="{line}" fill="none" stroke="#444444" stroke-dasharray="4 3"/>',
            *_chosen(answer.choices, placed, x, y),
            *_legend(methods),
            "</svg>\n",
        ]
    )


def _described(answer: Recommendation) -> str:
    """Return a description of the chart for readers who can't see it."""
    chosen = "; ".join(
        localized(
            "{rank}: {method}, shortfall {shortfall:.2f} in {seconds:.3g} seconds",
            rank=choice.rank,
            method=choice.method,
            shortfall=choice.predictions.shortfall.expected,
            seconds=choice.predictions.train_seconds.expected,
        )
        for choice in answer.choices
    )
    told = localized("Chosen: {chosen}.", chosen=chosen) if chosen else answer.nothing_fits or ""
    counted = localized(
        "{count} candidates by training time and shortfall.", count=len(answer.points)
    )
    return f"{counted} {told}".rstrip()


def _placed(answer: Recommendation, x: Scale, y: Scale) -> list[_Placed]:
    """Return where each candidate's mark is, those of the choices and the front first."""
    chosen = [_settings(choice) for choice in answer.choices]
    found: list[_Placed] = []
    for point in sorted(answer.points, key=lambda p: (p.settings not in chosen, not p.front)):
        at, height = x(point.train_seconds), y(point.shortfall)
        near = [one for one in found if abs(one.y - height) < _APART]
        places = (
            _Placed(point, at + aside, height)
            for aside in _ASIDE
            if _LEFT + _APART / 2 < at + aside < _WIDTH - _RIGHT - _APART / 2
        )
        free = (place for place in places if not any(map(place.hides, near)))
        found.append(next(free, _Placed(point, at, height)))
    return found


def _settings(choice: Choice) -> dict[str, object]:
    """Return the settings by which a choice is found among the candidates."""
    return {
        name: value
        for name, value in choice.settings.items()
        if name == "train.learning_rate" or name.startswith("method.")
    }


def _time_ticks(first: float, last: float) -> list[float]:
    """Return round numbers of seconds between two powers of ten, given as exponents."""
    low, high = 10**first, 10**last
    if last - first > 1:
        factors = (1,) if last - first > 4 else (1, 3) if last - first > 2 else (1, 2, 5)
        powers = range(math.floor(first), math.ceil(last) + 1)
        ticks = [factor * 10.0**power for power in powers for factor in factors]
    else:
        rough = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough)
        ticks = [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [tick for tick in ticks if low <= tick <= high]


def _axes(first: float, last: float, x: Scale, y: Scale) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tenth in range(0, 11, 2):
        at = y(tenth / 10)
        parts.append(
            f'<line x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e5e5e5"/>'
            f'<line x1="{_LEFT - 5}" x2="{_LEFT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#777777"/>'
            f'<text class="y-tick" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">'
            f"{tenth / 10:g}</text>"
        )
    for seconds in _time_ticks(first, last):
        at = x(seconds)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 5}" stroke="#777777"/>'
            f'<text class="x-tick" x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">'
            f"{seconds:,.10g}</text>"
        )
    middle = (_LEFT + right) / 2
    time = localized("training time, seconds (log scale; marks that would overlap are moved aside)")
    shortfall = localized("shortfall: 0 is the best known, 1 the worst")
    return [
        *parts,
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#777777"/>',
        f'<text x="{middle}" y="{_HEIGHT - 12}" text-anchor="middle">{time}</text>',
        f'<text transform="translate(16 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{shortfall}</text>",
    ]


def _mark(method: str, x: float, y: float, more: str = "") -> str:
    look = mark_number(method) or 0
    return (
        f'<path class="mark" d="{MARKS[look]}" transform="translate({x:.1f} {y:.1f}) scale(4)" '
        f'fill="{LIGHT[look % len(LIGHT)]}"{more}'
    )


def _dot(placed: _Placed) -> str:
    point = placed.point
    settings = ", ".join(f"{name}={value}" for name, value in point.settings.items())
    opacity = f' fill-opacity="{0.9 if point.front else 0.55}"'
    return (
        f"{_mark(point.method, placed.x, placed.y, opacity)}>"
        f"<title>{escape(settings)}: {point.shortfall:.2f}</title></path>"
    )


def _chosen(choices: Sequence[Choice], placed: Sequence[_Placed], x: Scale, y: Scale) -> list[str]:
    """Return the candidates' marks, over the intervals of the choices and below their ranks."""
    lines: list[str] = []
    ranks: list[str] = []
    taken = [(one.x, one.y) for one in placed]
    numbers: list[tuple[float, float]] = []
    for choice in choices:
        shortfall, settings = choice.predictions.shortfall, _settings(choice)
        at, middle = next(
            ((one.x, one.y) for one in placed if one.point.settings == settings),
            (x(choice.predictions.train_seconds.expected), y(shortfall.expected)),
        )
        place = _free_place(at, middle, taken, numbers)
        numbers.append(place)
        lines.append(
            f'<path d="M{at:.1f} {y(shortfall.low):.1f}V{y(shortfall.high):.1f}" fill="none" '
            'stroke="#999999"/>'
        )
        ranks += [
            f'<line x1="{at:.1f}" x2="{place[0]:.1f}" y1="{middle:.1f}" y2="{place[1]:.1f}" '
            'stroke="black"/>',
            f'<circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="{_RADIUS:g}" fill="white" '
            'stroke="black"/>',
            f'<text class="rank" x="{place[0]:.1f}" y="{place[1] + 4:.1f}" text-anchor="middle">'
            f"{choice.rank}</text>",
        ]
    return [*lines, *map(_dot, reversed(placed)), *ranks]


def _free_place(
    x: float,
    y: float,
    marks: Sequence[tuple[float, float]],
    numbers: Sequence[tuple[float, float]],
) -> tuple[float, float]:
    """Return where a choice's number goes: near its mark, clear of other numbers, and of marks
    where there is room."""
    places = [
        (x + right, y + down)
        for right, down in _AROUND
        if _LEFT + _RADIUS < x + right < _WIDTH - _RIGHT - _RADIUS
        and _TOP - _RADIUS < y + down < _HEIGHT - _BOTTOM - _RADIUS
    ]
    clear = [p for p in places if all(math.dist(p, n) > 2 * _RADIUS + 3 for n in numbers)]

    def covered(place: tuple[float, float]) -> int:
        return sum(math.dist(place, mark) < _RADIUS + _APART / 2 for mark in marks)

    return min(clear or places, key=covered)


def _legend(methods: Sequence[str]) -> list[str]:
    parts = []
    for at, name in enumerate(methods):
        y, x = _TOP + 18 * at, _WIDTH - _RIGHT + 20
        parts.append(f'{_mark(name, x, y)}/><text x="{x + 12}" y="{y + 4}">{escape(name)}</text>')
    return parts

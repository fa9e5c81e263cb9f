"""Draw predicted shortfall against training time, with the Pareto front, as an SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from rayfin.advisor.answer import Choice, Recommendation, TradeOffPoint
from rayfin.advisor.chart_marks import LIGHT, MARKS, mark_number

Scale = Callable[[float], float]
"""Maps a value to pixels."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 760, 460, 64, 56, 48, 150
# Where the number of a choice goes, in pixels from its point, if its place is taken.
_ASIDE = ((0, 0), (22, 0), (-22, 0), (0, -22), (0, 22), (22, -22), (-22, -22), (44, 0), (-44, 0))
_NUMBER_APART = 19.0


def picture(answer: Recommendation) -> str:
    """Return the chart of all candidates as an SVG.

    The Pareto front is a line; recommended candidates have their rank and their interval.
    """
    seconds = [point.train_seconds for point in answer.points]
    seconds += [choice.predictions.train_seconds.expected for choice in answer.choices]
    first, last = math.log10(min(seconds) / 1.2), math.log10(max(seconds) * 1.2)

    def x(value: float) -> float:
        share = (math.log10(value) - first) / (last - first)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(shortfall: float) -> float:
        return _TOP + shortfall * (_HEIGHT - _TOP - _BOTTOM)

    methods = list(dict.fromkeys(point.method for point in answer.points))
    front = sorted((p for p in answer.points if p.front), key=lambda p: p.train_seconds)
    line = " ".join(f"{x(p.train_seconds):.1f},{y(p.shortfall):.1f}" for p in front)
    title = (
        f"What is expected of each candidate ({answer.source}, relevance {answer.relevance:.0%})"
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
            *(_dot(point, x, y) for point in answer.points),
            *_chosen(answer.choices, x, y),
            *_legend(methods),
            "</svg>\n",
        ]
    )


def _described(answer: Recommendation) -> str:
    """Return a description of the chart for readers who can't see it."""
    chosen = "; ".join(
        f"{choice.rank}: {choice.method}, shortfall {choice.predictions.shortfall.expected:.2f} "
        f"in {choice.predictions.train_seconds.expected:.3g} seconds"
        for choice in answer.choices
    )
    told = f"Chosen: {chosen}." if chosen else answer.nothing_fits or ""
    return f"{len(answer.points)} candidates by training time and shortfall. {told}".rstrip()


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
    return [
        *parts,
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#777777"/>',
        f'<text x="{middle}" y="{_HEIGHT - 12}" text-anchor="middle">'
        "training time, seconds (log scale)</text>",
        f'<text transform="translate(16 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        "shortfall: 0 is the best known, 1 the worst</text>",
    ]


def _mark(method: str, x: float, y: float, more: str = "") -> str:
    look = mark_number(method) or 0
    return (
        f'<path class="mark" d="{MARKS[look]}" transform="translate({x:.1f} {y:.1f}) scale(4.5)" '
        f'fill="{LIGHT[look % len(LIGHT)]}"{more}'
    )


def _dot(point: TradeOffPoint, x: Scale, y: Scale) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in point.settings.items())
    opacity = f' fill-opacity="{0.9 if point.front else 0.45}"'
    return (
        f"{_mark(point.method, x(point.train_seconds), y(point.shortfall), opacity)}>"
        f"<title>{escape(settings)}: {point.shortfall:.2f}</title></path>"
    )


def _chosen(choices: Sequence[Choice], x: Scale, y: Scale) -> list[str]:
    """Return the intervals and ranks of the choices; ranks that would overlap are moved aside."""
    parts: list[str] = []
    taken: list[tuple[float, float]] = []
    for choice in choices:
        shortfall = choice.predictions.shortfall
        at, middle = x(choice.predictions.train_seconds.expected), y(shortfall.expected)
        places = [(at + right, middle + down) for right, down in _ASIDE]
        free = [
            known
            for known in places
            if all(math.dist(known, other) >= _NUMBER_APART for other in taken)
            and _LEFT + 9 <= known[0] <= _WIDTH - _RIGHT
            and _TOP <= known[1] <= _HEIGHT - _BOTTOM - 9
        ]
        cx, cy = (free or places)[0]
        taken.append((cx, cy))
        parts += [
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y(shortfall.low):.1f}" '
            f'y2="{y(shortfall.high):.1f}" stroke="black"/>',
            f'<line x1="{at:.1f}" x2="{cx:.1f}" y1="{middle:.1f}" y2="{cy:.1f}" stroke="black"/>',
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="8" fill="white" stroke="black"/>',
            f'<text class="rank" x="{cx:.1f}" y="{cy + 4:.1f}" text-anchor="middle">'
            f"{choice.rank}</text>",
        ]
    return parts


def _legend(methods: Sequence[str]) -> list[str]:
    parts = []
    for at, name in enumerate(methods):
        y, x = _TOP + 18 * at, _WIDTH - _RIGHT + 20
        parts.append(f'{_mark(name, x, y)}/><text x="{x + 12}" y="{y + 4}">{escape(name)}</text>')
    return parts

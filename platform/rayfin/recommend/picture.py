"""Predicted quality against training time, and the Pareto front, as one SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from rayfin.recommend.answer import Choice, Point, Recommendation

Scale = Callable[[float], float]
"""A value -> pixels."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 760, 460, 64, 52, 40, 150
_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")


def picture(answer: Recommendation) -> str:
    """All candidates; the front is a line, what is recommended has a number and its interval."""
    seconds = [point.train_seconds for point in answer.points]
    first, last = math.log10(min(seconds) / 1.2), math.log10(max(seconds) * 1.2)

    def x(value: float) -> float:
        share = (math.log10(value) - first) / (last - first)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(shortfall: float) -> float:
        return _TOP + shortfall * (_HEIGHT - _TOP - _BOTTOM)

    methods = list(dict.fromkeys(point.method for point in answer.points))
    colours = {name: _COLOURS[at % len(_COLOURS)] for at, name in enumerate(methods)}
    front = sorted((p for p in answer.points if p.front), key=lambda p: p.train_seconds)
    line = " ".join(f"{x(p.train_seconds):.1f},{y(p.shortfall):.1f}" for p in front)
    title = f"{answer.source}, relevance {answer.relevance:.0%}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
            f'<text x="{_LEFT}" y="22" font-size="15">What is expected of each candidate '
            f"({escape(title)})</text>",
            *_axes(first, last, x, y),
            f'<polyline points="{line}" fill="none" stroke="#444444" stroke-dasharray="4 3"/>',
            *(_dot(point, x, y, colours[point.method]) for point in answer.points),
            *(part for choice in answer.choices for part in _chosen(choice, x, y)),
            *_legend(methods, colours),
            "</svg>\n",
        ]
    )


def _axes(first: float, last: float, x: Scale, y: Scale) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tenth in range(0, 11, 2):
        at = y(tenth / 10)
        parts.append(
            f'<line x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e5e5e5"/>'
            f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{tenth / 10:g}</text>'
        )
    for power in range(math.ceil(first), math.floor(last) + 1):
        parts.append(
            f'<text x="{x(10.0**power):.1f}" y="{bottom + 18}" text-anchor="middle">'
            f"{10.0**power:g}</text>"
        )
    middle = (_LEFT + right) / 2
    return [
        *parts,
        f'<text x="{middle}" y="{_HEIGHT - 12}" text-anchor="middle">training time, seconds</text>',
        f'<text transform="translate(16 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        "shortfall: 0 is the best known, 1 the worst</text>",
    ]


def _dot(point: Point, x: Scale, y: Scale, colour: str) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in point.settings.items())
    return (
        f'<circle cx="{x(point.train_seconds):.1f}" cy="{y(point.shortfall):.1f}" r="4" '
        f'fill="{colour}" fill-opacity="{0.9 if point.front else 0.45}">'
        f"<title>{escape(settings)}: {point.shortfall:.2f}</title></circle>"
    )


def _chosen(choice: Choice, x: Scale, y: Scale) -> list[str]:
    predicted = choice.predictions
    at = x(predicted.train_seconds.expected)
    low, middle, high = (
        y(value)
        for value in (
            predicted.shortfall.low,
            predicted.shortfall.expected,
            predicted.shortfall.high,
        )
    )
    return [
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="black"/>',
        f'<circle cx="{at:.1f}" cy="{middle:.1f}" r="8" fill="white" stroke="black"/>',
        f'<text x="{at:.1f}" y="{middle + 4:.1f}" text-anchor="middle">{choice.rank}</text>',
    ]


def _legend(methods: Sequence[str], colours: dict[str, str]) -> list[str]:
    parts = []
    for at, name in enumerate(methods):
        y, x = _TOP + 18 * at, _WIDTH - _RIGHT + 16
        parts.append(
            f'<circle cx="{x}" cy="{y}" r="5" fill="{colours[name]}"/>'
            f'<text x="{x + 12}" y="{y + 4}">{escape(name)}</text>'
        )
    return parts

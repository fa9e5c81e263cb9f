"""Decode step times as a small SVG: one line a number of adapters, rows along the axis."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 400, 60, 50, 20, 130
_COLOURS = ("#444444", "#1f77b4", "#2ca02c", "#ff7f0e", "#d62728", "#9467bd")


def write_plot(path: Path, table: Mapping[int, Mapping[int, float]]) -> None:
    """`table`: adapters -> rows -> milliseconds."""
    rows = sorted({row for times in table.values() for row in times})
    top = max(time for times in table.values() for time in times.values()) * 1.05

    def x(row: int) -> float:
        return _LEFT + rows.index(row) * (_WIDTH - _LEFT - _RIGHT) / max(1, len(rows) - 1)

    def y(time: float) -> float:
        return _HEIGHT - _BOTTOM - time / top * (_HEIGHT - _BOTTOM - _TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for fifth in range(6):
        time = top * fifth / 5
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(time):.1f}" y2="{y(time):.1f}" '
            f'stroke="#dddddd"/><text x="{_LEFT - 6}" y="{y(time) + 4:.1f}" '
            f'text-anchor="end">{time:.0f}</text>'
        )
    parts += [
        f'<text x="{x(row):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{row}</text>'
        for row in rows
    ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 12}" text-anchor="middle">rows</text>')
    parts.append(f'<text x="8" y="{_TOP - 6}">milliseconds of a decode step</text>')
    for number, (adapters, times) in enumerate(table.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        points = " ".join(f"{x(row):.1f},{y(time):.1f}" for row, time in sorted(times.items()))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        label = "bare base" if adapters == 0 else f"{adapters} adapters"
        parts.append(
            f'<text x="{_WIDTH - _RIGHT + 12}" y="{_TOP + 20 + 18 * number}" '
            f'fill="{colour}">{label}</text>'
        )
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")

"""The colours and marks by which every chart shows the methods."""

from __future__ import annotations

import math

from rayfin.methods import METHODS

# Found by search: any two of a row differ by more than 0.09 in Oklab, to normal eyes and, after
# Machado, Oliveira and Fernandes (2009), to eyes that lack one kind of cone; and each has a
# contrast of 3 or more to the page.
LIGHT = (
    "#1ba1c5", "#b10e60", "#c68900", "#2614f3", "#395115",
    "#f5538f", "#8e6dff", "#a16615", "#79079e", "#8656b5",
)  # fmt: skip
DARK = (
    "#97fde1", "#c47d00", "#83c6d8", "#8f15f1", "#f9ef07",
    "#089e99", "#ac7fff", "#965226", "#036b90", "#e3b463",
)  # fmt: skip

_STAR = "L".join(
    f"{radius * math.sin(math.pi * i / 5):.2f} {-radius * math.cos(math.pi * i / 5):.2f}"
    for i, radius in enumerate((1.4, 0.6) * 5)
)
MARKS = (
    "M-1 0A1 1 0 1 0 1 0A1 1 0 1 0 -1 0Z",  # circle
    "M-.9 -.9H.9V.9H-.9Z",  # square
    "M0 -1.2L1.15 .8H-1.15Z",  # triangle
    "M0 -1.3L1.3 0L0 1.3L-1.3 0Z",  # diamond
    "M0 1.2L1.15 -.8H-1.15Z",  # triangle on its tip
    "M-.4 -1.2H.4V-.4H1.2V.4H.4V1.2H-.4V.4H-1.2V-.4H-.4Z",  # plus
    f"M{_STAR}Z",
    "M-1.4 -.5H1.4V.5H-1.4Z",  # lying bar
    "M-.5 -1.4H.5V1.4H-.5Z",  # standing bar
    "M-1 -1.1H1L-1 1.1H1Z",  # hourglass
    "M-1.2 -.7L-.7 -1.2L0 -.5L.7 -1.2L1.2 -.7L.5 0L1.2 .7L.7 1.2L0 .5L-.7 1.2L-1.2 .7L-.5 0Z",  # x
    "M-1.2 .6A1.2 1.2 0 0 1 1.2 .6Z",  # half disc
    "M-1.2 0A1.2 1.2 0 1 0 1.2 0A1.2 1.2 0 1 0 -1.2 0Z"
    "M-.6 0A.6 .6 0 1 1 .6 0A.6 .6 0 1 1 -.6 0Z",  # ring
    "M-1.2 .2L0 -1L1.2 .2V1.1L0 -.1L-1.2 1.1Z",  # chevron
    "M-1.2 0L.8 -1.15V1.15Z",  # triangle to the left
    "M1.2 0L-.8 -1.15V1.15Z",  # triangle to the right
    "M-1.1 -1V1L1.1 -1V1Z",  # lying hourglass
    "M-1.1 -1H1.1V-.3H.35V1H-.35V-.3H-1.1Z",  # T
    "M-1 -1H-.2V.3H1V1H-1Z",  # L
    "M-1 1V-1A2 2 0 0 1 1 1Z",  # quarter disc
)
"""SVG paths around the origin, about one unit in radius; colours repeat after the tenth."""


def mark_number(method: object) -> int | None:
    """Return the index of a method's mark in MARKS, or None for anything but a known method.

    Its colour has the same index, modulo the number of colours.
    """
    found = METHODS.get(method) if isinstance(method, str) else None
    return None if found is None else found.order % len(MARKS)

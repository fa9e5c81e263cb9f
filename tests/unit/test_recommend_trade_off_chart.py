"""The picture of a recommendation, whatever it shows; and the colours that charts share."""

import itertools
import math
import re
from xml.etree import ElementTree

import pytest

from rayfin.advisor.answer import (
    Choice,
    Feasibility,
    PredictionInterval,
    Predictions,
    Recommendation,
    TradeOffPoint,
)
from rayfin.advisor.chart_marks import DARK, LIGHT, MARKS, mark_number
from rayfin.advisor.trade_off_chart import picture
from rayfin.methods import METHODS

SVG = "{http://www.w3.org/2000/svg}"


def answer(seconds, choices=3, methods=tuple(METHODS)):
    """Candidates that take `seconds`, and choices that all lie on one spot."""
    points = [
        TradeOffPoint(method=methods[n % len(methods)], settings={"method.r": n}, shortfall=n / 50,
              train_seconds=taken, memory_bytes=1e9, front=n == 0)
        for n, taken in enumerate(seconds)
    ]  # fmt: skip
    spot = PredictionInterval(low=0.1, expected=0.2, high=0.4)
    time = PredictionInterval(low=1, expected=seconds[0], high=1e9)
    predictions = Predictions(
        shortfall=spot,
        divergence=0,
        memory_bytes=time,
        steps=60,
        train_seconds=time,
        first_token_ms=time,
    )
    feasible = Feasibility(memory=None, budget=None, latency=None)
    return Recommendation(
        lang="en", source="rules", relevance=0.5, explanation="", notes=[], doubted=[],
        rule="", scenario={},
        trials=0, nothing_fits=None if choices else "None fits 1 GiB.",
        points=points, alternatives=[],
        choices=[
            Choice(rank=rank, method="lora", settings={}, config={}, command="",
                   predictions=predictions, feasibility=feasible, trials=[], reasons=[],
                   risks=[], deployment="")
            for rank in range(1, choices + 1)
        ],
    )  # fmt: skip


def texts(drawn, name):
    return [e for e in ElementTree.fromstring(drawn).iter(f"{SVG}text") if e.get("class") == name]


@pytest.mark.parametrize(
    "seconds",
    [[100.0], [100, 101], [31, 79], [300, 900], [20, 4000], [3, 3e5], [0.001, 1e6], [1e-3, 1.1e-3]],
    ids=str,
)
def test_both_axes_have_ticks_that_keep_clear_of_each_other(seconds) -> None:
    drawn = picture(answer([float(s) for s in seconds]))
    across = [float(tick.get("x")) for tick in texts(drawn, "x-tick")]
    widths = [7 * len(tick.text) for tick in texts(drawn, "x-tick")]
    assert 2 <= len(across) <= 12
    for (x, width), (other, next_width) in itertools.pairwise(zip(across, widths, strict=True)):
        assert other - x > (width + next_width) / 2
    assert len({tick.text for tick in texts(drawn, "x-tick")}) == len(across)
    assert len(texts(drawn, "y-tick")) == 6
    assert "training time, seconds (log scale; " in drawn


def boxes(drawn):
    """The boxes of all texts and numbers, each with its text, as wide as a wide font makes them."""
    found = []
    for text in ElementTree.fromstring(drawn).iter(f"{SVG}text"):
        size = float(text.get("font-size", 12))
        wide = size * sum(1.0 if ord(each) > 0x2E7F else 0.62 for each in text.text)
        if text.get("transform"):  # the label of the shortfall, from below
            x, y = map(float, re.findall(r"[\d.]+", text.get("transform"))[:2])
            found.append((text.text, x - size, y - wide / 2, x + size / 3, y + wide / 2))
            continue
        x, y = float(text.get("x")), float(text.get("y"))
        left = {"middle": x - wide / 2, "end": x - wide}.get(text.get("text-anchor"), x)
        if text.get("class") == "rank":  # with its circle
            found.append((text.text, x - 8, y - 12, x + 8, y + 4))
        else:
            found.append((text.text, left, y - size, left + wide, y + size / 3))
    return found


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("choices", [1, 3, 8])
def test_no_label_overlaps_another_or_leaves_the_picture(choices, lang) -> None:
    """With as many candidates as there may be, of which many lie on one spot."""
    crowd = [10.0 ** (1 + n % 7 / 100) for n in range(400)] + [2e3, 5e4]
    drawn = picture(answer(crowd, choices).model_copy(update={"lang": lang}))
    found = boxes(drawn)
    for (text, *one), (other_text, *other) in itertools.combinations(found, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, (text, other_text)
    for text, left, top, right, bottom in found:
        assert min(left, top) >= 0 and right <= 760 and bottom <= 460, text


def test_marks_of_two_methods_do_not_cover_each_other() -> None:
    """A whole column of candidates that take as long and fall as short."""
    crowd = answer([100.0] * 30 + [300.0], methods=tuple(METHODS)[:11])
    points = [point.model_copy(update={"shortfall": 0.3}) for point in crowd.points]
    drawn = picture(crowd.model_copy(update={"points": points}))
    placed = {}
    for mark in ElementTree.fromstring(drawn).iter(f"{SVG}path"):
        if mark.find(f"{SVG}title") is not None:
            placed.setdefault(mark.get("d"), set()).add(mark.get("transform"))
    assert len(placed) == 11
    spots = [
        tuple(map(float, re.findall(r"[\d.]+", place)[:2]))
        for places in placed.values()
        for place in places
    ]
    assert all(math.dist(a, b) >= 7.9 for a, b in itertools.combinations(spots, 2))


def test_numbers_of_choices_on_one_spot_lie_beside_each_other() -> None:
    ranks = texts(picture(answer([50.0, 500.0], choices=5)), "rank")
    places = [(float(rank.get("x")), float(rank.get("y"))) for rank in ranks]
    assert [rank.text for rank in ranks] == ["1", "2", "3", "4", "5"]
    assert all(math.dist(a, b) > 17 for a, b in itertools.combinations(places, 2))


def test_it_is_described_for_those_who_do_not_see_it() -> None:
    root = ElementTree.fromstring(picture(answer([50.0, 500.0])))
    assert root.get("role") == "img"
    assert root.find(f"{SVG}desc").text == (
        "2 candidates by training time and shortfall. Chosen: 1: lora, shortfall 0.20 in 50 "
        "seconds; 2: lora, shortfall 0.20 in 50 seconds; 3: lora, shortfall 0.20 in 50 seconds."
    )


def test_where_nothing_fits_the_candidates_are_still_shown() -> None:
    drawn = picture(answer([50.0, 500.0], choices=0))
    assert "2 candidates by training time and shortfall. None fits 1 GiB." in drawn
    assert texts(drawn, "rank") == []


# --- the colours --------------------------------------------------------------------------

# Machado, Oliveira and Fernandes (2009), table 1, severity 1: what eyes without one cone see.
SEEN_BY = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216),
               (-0.003882, -0.048116, 1.051998)),
    "no green": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413),
                 (-0.01182, 0.04294, 0.968881)),
    "no blue": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602),
                (0.004733, 0.691367, 0.3039)),
}  # fmt: skip


def linear(colour):
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def times(matrix, vector):
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def oklab(rgb):
    """Ottosson (2020)."""
    cones = times(
        ((0.4122214708, 0.5363325363, 0.0514459929), (0.2119034982, 0.6806995451, 0.1073969566),
         (0.0883024619, 0.2817188376, 0.6299787005)), [min(1, max(0, c)) for c in rgb],
    )  # fmt: skip
    return times(
        ((0.2104542553, 0.793617785, -0.0040720468), (1.9779984951, -2.428592205, 0.4505937099),
         (0.0259040371, 0.7827717662, -0.808675766)), [c ** (1 / 3) for c in cones],
    )  # fmt: skip


def luminance(colour):
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear(colour), strict=True))


@pytest.mark.parametrize(("colours", "page"), [(LIGHT, "#ffffff"), (DARK, "#14171a")])
def test_colours_are_told_apart_by_all_eyes_and_from_the_page(colours, page) -> None:
    for eyes in SEEN_BY.values():
        seen = [oklab(times(eyes, linear(colour))) for colour in colours]
        assert min(math.dist(a, b) for a, b in itertools.combinations(seen, 2)) > 0.09
    for colour in colours:
        low, high = sorted((luminance(colour), luminance(page)))
        assert (high + 0.05) / (low + 0.05) >= 3


def test_every_method_has_a_look_of_its_own() -> None:
    looks = [mark_number(method) for method in METHODS]
    assert len(set(looks)) == len(METHODS) <= len(MARKS)
    assert len(set(MARKS)) == len(MARKS) == 2 * len(LIGHT)
    assert len(set(LIGHT)) == len(set(DARK)) == len(LIGHT)
    assert mark_number("another tool's") is mark_number(None) is None

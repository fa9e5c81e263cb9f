"""How numbers are shown to people, each with its unit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rayfin.history.record import finite
from rayfin.metrics import METRICS, Score

MISSING = "–"

# Least largest value for which an axis uses the unit, unit, and what values are divided by.
_UNITS: dict[str, tuple[tuple[float, str, float], ...]] = {
    "seconds": ((7200, "h", 3600), (600, "min", 60), (0, "s", 1)),
    "bytes": ((2 * 2**30, "GiB", 2**30), (0, "MiB", 2**20)),
    "count": ((1e9, "billions", 1e9), (1e6, "millions", 1e6), (1e4, "thousands", 1e3), (0, "", 1)),
    "share": ((0, "%", 0.01),),
    "number": ((0, "", 1),),
}


def unit_for(name: str, values: Iterable[float]) -> tuple[str, float]:
    """Unit of an axis that shows `values` of the quantity, and what to divide them by."""
    largest = max((abs(value) for value in values), default=0.0)
    for least, unit, divisor in _UNITS[METRICS[name].kind]:
        if largest >= least:
            return unit, divisor
    return "", 1.0


def show_quantity(name: str, value: Any) -> str:
    """A metric with its unit: `0.25` of exact_match is `25.0 %`, `150.0` train_seconds `150 s`."""
    number = finite(value)
    if number is None:
        return MISSING
    if METRICS[name].kind == "count" and number < 1e6:
        return f"{number:,.0f}"
    if METRICS[name].kind == "share":
        return f"{number * 100:.1f} %"
    unit, divisor = unit_for(name, [number])
    short = {"millions": "M", "billions": "B"}.get(unit, unit)
    return f"{show_number(number / divisor)} {short}".rstrip()


def show_number(value: float) -> str:
    """Four significant digits without trailing zeros; powers of ten below 0.01."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 0.01:
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    decimals = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def show_gain(name: str, gain: float, low: float | None, high: float | None) -> str:
    """How much better or worse: `63 points better`, `2.31 better`, `10 times lower`.

    It has the digits that its interval from `low` to `high` allows. The gain of an exponential,
    such as perplexity, is the logarithm of a factor, as are its ends.
    """
    if not gain or (is_factor(name) and _factor(abs(gain)) == "1"):
        return "no difference"
    if is_factor(name):
        return f"{_factor(abs(gain))} times {'lower' if gain > 0 else 'higher'}"
    unit = " points" if METRICS[name].kind == "share" else ""
    amount = _rounded(abs(gain) * _scale(name), *_ends(name, low, high))
    return f"{amount}{unit} {'better' if gain > 0 else 'worse'}"


def show_between(name: str, low: float, high: float) -> str:
    """Return the gain's interval: `50 to 75`, or `÷ 8.33 to ÷ 13.5` for perplexity."""
    if is_factor(name):
        first, last = (f"÷ {_factor(end)}" for end in (low, high))
    else:
        ends = _ends(name, low, high)
        first, last = (_rounded(end, *ends).replace("-", "−") for end in ends)
    return f"{first} to {last}"


def is_factor(name: str) -> bool:
    """Whether changes of the metric are factors: it is the exponential of another score."""
    metric = METRICS[name]
    return isinstance(metric, Score) and metric.exponential_of is not None


def _factor(logarithm: float) -> str:
    factor = math.exp(max(-700.0, min(logarithm, 700.0)))
    return f"{factor:.3g}" if 0.01 <= factor < 1000 else show_number(factor)


def _scale(name: str) -> float:
    return 100.0 if METRICS[name].kind == "share" else 1.0


def _ends(name: str, *ends: float | None) -> list[float]:
    return [end * _scale(name) for end in ends if end is not None]


def _rounded(value: float, *ends: float) -> str:
    """`value` with two digits of the interval's width, or with four of its own."""
    width = max(ends) - min(ends) if ends else 0.0
    if width <= 0:
        return show_number(value)
    decimals = max(0, 1 - math.floor(math.log10(width)))
    return f"{value:,.{decimals}f}" if decimals <= 6 else show_number(value)


def show_seconds(seconds: float) -> str:
    """`48 s`, `12 min 5 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def show_setting(value: Any) -> str:
    """A swept value as its YAML would read."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return show_number(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show_setting, value))
    return str(value)


def setting(spec: Mapping[str, Any], name: str) -> tuple[bool, Any]:
    """Whether the trial specification has the dotted `name`, and its value."""
    node: Any = spec
    for part in name.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False, None
        node = node[part]
    return True, node

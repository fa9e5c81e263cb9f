"""The options of `recommend` and `estimate` that describe what is not here."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, get_args

from rayfin.language import Language

_HARDWARE = ("cpu", "single_gpu", "multi_gpu")
_OPTIONS = {
    "hardware": (str, "cpu, single_gpu or multi_gpu; default: this machine's"),
    "gpu-memory-gb": (float, "GiB of one GPU"),
    "num-gpus": (int, "GPUs that train together"),
    "model-size-b": (float, "billions of parameters, in place of model.name"),
    "rows": (int, "number of training samples, in place of data.path"),
    "tokens-per-sample": (float, "mean length of these samples"),
}


def add_described(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe hardware, model and data; `described` returns their values."""
    for name, (kind, meaning) in _OPTIONS.items():
        choices = _HARDWARE if name == "hardware" else None
        parser.add_argument(f"--{name}", type=kind, choices=choices, metavar="X", help=meaning)


def add_language(parser: argparse.ArgumentParser) -> None:
    """Add --lang, the language of the answer."""
    parser.add_argument(
        "--lang",
        choices=get_args(Language),
        metavar="X",
        help="zh or en, the language of the answer; default: the locale's",
    )


def described(args: argparse.Namespace) -> dict[str, Any]:
    """Return what is told of a scenario, by the names of `rayfin.recommend`'s arguments."""
    return values_of(args, _OPTIONS)


def values_of(args: argparse.Namespace, options: Iterable[str]) -> dict[str, Any]:
    """Return the values of options by the names of their fields."""
    return {field: getattr(args, field) for field in (name.replace("-", "_") for name in options)}

"""The part that `serve` and `chat` share: a deployment's settings, checked before any load."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rayfin.cli.settings import split_settings

if TYPE_CHECKING:
    from rayfin.config import ServeConfig


def load_settings(
    args: argparse.Namespace, *, elsewhere: bool = False, use: str | None = None, own: bool = True
) -> ServeConfig:
    """The configuration, its paths absolute; raises UsageErrors for what can't be served.

    Without model.name the base is the one of adapter `use`, or with `own` of all adapters that are
    there. `elsewhere`: the engine runs on other machines, of whose packages nothing is known here.
    """
    from rayfin.config import load_serve_config
    from rayfin.history.connect import parse_url
    from rayfin.models import check_model
    from rayfin.paths import Storage
    from rayfin.serving.bases import with_own_base
    from rayfin.serving.engine.limits import check_length, require_vllm

    config = load_serve_config(*split_settings(args.settings)).anchored(Path.cwd())
    _ = Storage.at(config.storage).adapters  # refuses a bucket before anything is asked of it
    Storage.open(config.storage)
    if use is not None or own:
        config = with_own_base(config, use)
    if config.history is not None:
        parse_url(config.history)
    if config.engine.type == "vllm" and not elsewhere:
        require_vllm()
    check_model(config.model, config.engine.quantization_bit)
    if "max_length" in config.engine.model_fields_set:  # else it is no more than fits
        check_length(config.model, config.engine)
    return config

"""What `serve` and `chat` share: a deployment's settings, checked before anything is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rayfin.cli.settings import ShowServeSettings

if TYPE_CHECKING:
    from rayfin.config import ServeConfig


def add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="config.yaml | section.key=value",
        help="a configuration file first, if any, and settings that win over it",
    )
    parser.add_argument(
        "--settings",
        dest="show_settings",
        nargs=0,
        action=ShowServeSettings,
        help="list every setting with its default and meaning",
    )


def load_settings(args: argparse.Namespace, *, elsewhere: bool = False) -> ServeConfig:
    """The configuration, with an absolute `storage`; raises UsageErrors for what can't be served.

    `elsewhere`: the engine runs on other machines, of whose packages nothing is known here.
    """
    from rayfin.config import load_serve_config
    from rayfin.models import check_model
    from rayfin.paths import Storage
    from rayfin.serving.engine.limits import check_length, require_vllm

    settings = list(args.settings)
    source = Path(settings.pop(0)) if settings and "=" not in settings[0] else None
    config = load_serve_config(source, settings)
    # Replicas have working directories of their own.
    config = config.model_copy(update={"storage": str(Storage.open(config.storage).root)})
    if config.engine.type == "vllm" and not elsewhere:
        require_vllm()
    check_model(config.model, config.engine.quantization_bit)
    check_length(config.model, config.engine)
    return config

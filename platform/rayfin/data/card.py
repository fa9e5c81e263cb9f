"""Read the card of a hub repository (README.md), which lists the files of each configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from rayfin.errors import DataError, did_you_mean

_CARD = re.compile(r"---[ ]*\n(?P<metadata>.*?)\n---[ ]*(\n|$)", re.DOTALL)


def card_configuration(root: Path, name: str | None) -> dict[str, Any] | None:
    """Return what a directory's card says of a configuration, None where it lists none with files.

    `name` is the configuration's; None takes the default or the only one. Raises DataError where
    that leaves the choice open, or where there is no such configuration.
    """
    try:
        card = _CARD.match((root / "README.md").read_text(encoding="utf-8"))
        metadata = yaml.safe_load(card["metadata"]) if card else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    configs = metadata.get("configs") if isinstance(metadata, dict) else None
    if not isinstance(configs, list):
        return None
    subsets = [
        each
        for each in configs
        if isinstance(each, dict) and ("data_files" in each or each.get("data_dir"))
    ]
    return _chosen(root, subsets, name)


def _chosen(
    root: Path, subsets: Sequence[dict[str, Any]], name: str | None
) -> dict[str, Any] | None:
    """Return the configuration of this name, or else the default or the only one, if any."""
    names = [str(each.get("config_name", "default")) for each in subsets]
    if name is not None and subsets:
        if name not in names:
            raise DataError(
                f"data.name: '{root}/README.md' lists no configuration '{name}'"
                f"{did_you_mean(name, names)}; it lists {', '.join(names)}"
            )
        return subsets[names.index(name)]
    default = [
        each for each in subsets if each.get("default") or each.get("config_name") == "default"
    ]
    if len(subsets) > 1 and not default:
        raise DataError(
            f"data.path: '{root}/README.md' lists several subsets ({', '.join(names)}), which are "
            f"data sets of their own; choose one with data.name={names[0]}, or give the directory "
            "or the files of one as data.path"
        )
    return next(iter(default or subsets), None)


def card_patterns(data_files: Any) -> Iterator[tuple[str, list[Any]]]:
    """Yield (split, patterns of its files) of a card's `data_files`, in any of its forms."""

    def all_in(value: Any) -> list[Any]:
        return value if isinstance(value, list) else [value]

    if isinstance(data_files, dict):
        yield from ((str(split), all_in(value)) for split, value in data_files.items())
    elif isinstance(data_files, list) and all(isinstance(each, dict) for each in data_files):
        yield from ((str(each.get("split")), all_in(each.get("path"))) for each in data_files)
    else:
        yield "train", all_in(data_files)


def matching_files(root: Path, folder: str, patterns: Sequence[Any]) -> set[Path]:
    """Return the files that a card's patterns match; raises DataError for an unusable pattern."""
    found: set[Path] = set()
    for pattern in patterns:
        try:
            path = PurePosixPath(folder, pattern)
            if path.is_absolute():
                continue
            # A last ** is of directories only in Python's patterns, and of files in a card's.
            found.update(root.glob(str(path / "*" if path.name == "**" else path)))
        except (TypeError, ValueError, IndexError) as error:
            raise DataError(
                f"data.path: '{root}/README.md' gives {pattern!r:.80} as data_files, which is no "
                "pattern of files (such as data/train/*.jsonl); mend it there, or give the files "
                "as data.path"
            ) from error
    return found

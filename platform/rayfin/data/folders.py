"""Find the splits of a directory: by names, by a hub repository's card, or as it was saved."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from rayfin.data.readers import allowed_names, is_readable
from rayfin.data.splits import KEYWORDS, Split, kinds_in
from rayfin.errors import DataError, listed

# `split-00000-of-00012.parquet`: what the hub and the datasets library write.
_SHARD = re.compile(r"(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}\b.*")
_CARD = re.compile(r"---[ ]*\n(?P<metadata>.*?)\n---[ ]*(\n|$)", re.DOTALL)
_MOST_NAMED = 3
_OTHER_FORMATS = re.compile(
    r"(?!(readme|license|licence|requirements)\.).*\.(txt|xlsx?|ods|feather|orc|avro|tfrecord|np[yz]|"
    r"pkl|pickle|db|sqlite|zip|tar|tgz|gz|bz2|xz|zst|7z)",
    re.IGNORECASE,
)
"""Names of files that probably hold rows, but in a format that is not read."""


def directory_splits(
    root: Path, *, together: bool = False
) -> tuple[list[Split], list[Split], list[str]]:
    """Return (the splits with names, the files without a split's name, notes).

    Raises DataError where the directory lists missing files, and, unless all splits are joined
    (`together`), where a name stands for more than one split.
    """
    files = data_below(root)
    saved = _object_of(root / "dataset_dict.json").get("splits")
    if isinstance(saved, list):  # what DatasetDict.save_to_disk writes
        folders = {str(name): root / str(name) for name in saved}
        named = {name: data_below(each) if each.is_dir() else [] for name, each in folders.items()}
        _check_there(root / "dataset_dict.json", named)
    else:
        named = _by_card(root, files, together) or _by_names(root, files, together)
    taken = {file for some in named.values() for file in some}
    others = [file for file in files if file not in taken]
    splits = [Split(name, _shown(root, some), tuple(some)) for name, some in named.items()]
    return (
        sorted(splits, key=_rank),
        [Split("", _shown(root, others), tuple(others))] if others else [],
        _unread_settings(root) + _unread_formats(root),
    )


def _rank(split: Split) -> int:
    kinds = list(KEYWORDS)
    return kinds.index(split.kind) if split.kind is not None else len(kinds)


def data_below(root: Path) -> list[Path]:
    """Return the data files below a directory, sorted, without metadata and hidden files."""
    found: list[Path] = []
    seen = set[str]()  # a link may lead back
    for folder, names, files in os.walk(root, onerror=_cannot_list, followlinks=True):
        here = Path(folder)
        if (real := os.path.realpath(folder)) in seen:
            names.clear()
            continue
        seen.add(real)
        saved = _saved_files(here, set(files))
        if saved is not None:
            found += saved
            names.clear()
            continue
        names[:] = sorted(name for name in names if not name.startswith((".", "__")))
        found += [
            here / name
            for name in files
            if not name.startswith(".")
            and is_readable(here / name)
            and not _is_metadata(here / name)
        ]
    return sorted(found)


def _cannot_list(error: OSError) -> None:
    raise DataError(
        f"data.path: '{error.filename}' can't be read ({error.strerror}); check that you may read "
        "the directory"
    ) from error


def _saved_files(folder: Path, names: set[str]) -> list[Path] | None:
    """Return the files of a directory that Dataset.save_to_disk wrote, or None for any other."""
    if "state.json" not in names:
        return None
    state = _object_of(folder / "state.json")
    listed = state.get("_data_files")
    if not isinstance(listed, list):
        return None
    if state.get("_indices_data_files"):
        raise DataError(
            f"data.path: '{folder}' was saved with its rows selected or shuffled by a list of "
            "indices, which is not read; save it again with "
            "dataset.flatten_indices().save_to_disk(...)"
        )
    files = [folder / str(entry["filename"]) for entry in listed]
    _check_there(folder / "state.json", {str(file.name): [file] for file in files})
    return files


def _check_there(source: Path, listed: dict[str, list[Path]]) -> None:
    """Raise DataError where a split has no file, or a missing one."""
    for name, files in listed.items():
        if not files or not all(file.is_file() for file in files):
            raise DataError(
                f"data.path: '{source}' lists '{name}', which is not there; fetch or save the "
                "whole directory again, or give its files as data.path"
            )


def _is_metadata(file: Path) -> bool:
    """Whether a file describes the data rather than holding it, judged by its content."""
    name = file.name
    if name.startswith("cache-") and name.endswith(".arrow"):
        return True  # what the datasets library made of the data
    if name == "dataset_dict.json":
        return "splits" in _object_of(file)
    if name == "state.json":
        return "_data_files" in _object_of(file)
    return name in ("dataset_info.json", "dataset_infos.json", "config.json") and bool(
        _object_of(file)
    )


def _object_of(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one where it has none."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _by_names(root: Path, files: Sequence[Path], together: bool) -> dict[str, list[Path]]:
    """Return the splits by the names of directories, or of files where those name no split.

    Where that finds no train split, only the names of files count.
    """
    found: dict[str, list[Path]] = {}
    for with_directories in (True, False):
        found = defaultdict(list)
        for file in files:
            name = _split_of(file.relative_to(root), with_directories, together)
            if name is not None:
                found[name].append(file)
        if any(kinds_in(name) == ["train"] for name in found):
            break
    return dict(found)


def _split_of(file: Path, with_directories: bool, together: bool) -> str | None:
    """Return the one split that the nearest directory, or else the file's own name, stands for."""
    shard = _SHARD.fullmatch(file.name)
    own = shard["split"] if shard else file.name
    folders = reversed(file.parts[:-1]) if with_directories else ()
    doubtful: list[str] = []
    for name in (*folders, own):
        kinds = kinds_in(name)
        if len(kinds) == 1:
            return own if shard and name is own else kinds[0]
        doubtful = doubtful or kinds
    if doubtful and not together:
        raise DataError(
            f"data.path: the name '{file}' tells more than one split ({', '.join(doubtful)}); "
            "rename it, give the files to train on as data.path, or take all files together with "
            "data.split=all"
        )
    return None


def _by_card(root: Path, files: Sequence[Path], together: bool) -> dict[str, list[Path]]:
    """Return the splits that a hub repository's README.md lists, if any."""
    try:
        card = _CARD.match((root / "README.md").read_text(encoding="utf-8"))
        metadata = yaml.safe_load(card["metadata"]) if card else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    configs = metadata.get("configs") if isinstance(metadata, dict) else None
    if not isinstance(configs, list):
        return {}
    subsets = [
        each
        for each in configs
        if isinstance(each, dict) and ("data_files" in each or each.get("data_dir"))
    ]
    default = [
        each for each in subsets if each.get("default") or each.get("config_name") == "default"
    ]
    if len(subsets) > 1 and not default:
        names = ", ".join(str(each.get("config_name")) for each in subsets)
        raise DataError(
            f"data.path: '{root}/README.md' lists several subsets ({names}), which are data sets "
            "of their own; give the directory or the files of one as data.path"
        )
    named: dict[str, list[Path]] = {}
    for config in (default or subsets)[:1]:
        folder = str(config.get("data_dir") or "")
        if "data_files" not in config:
            below = [file for file in files if file.is_relative_to(root / folder)]
            named = _by_names(root / folder, below, together) or {
                "train" if below else folder: below
            }
            continue
        for split, patterns in _patterns(config["data_files"]):
            matching = _matching(root, folder, patterns)
            named[split] = [file for file in files if file in matching]
    _check_there(root / "README.md", named)
    return named


def _patterns(data_files: Any) -> Iterator[tuple[str, list[Any]]]:
    """Yield (split, patterns of its files) of a card's `data_files`, in any of its forms."""

    def all_in(value: Any) -> list[Any]:
        return value if isinstance(value, list) else [value]

    if isinstance(data_files, dict):
        yield from ((str(split), all_in(value)) for split, value in data_files.items())
    elif isinstance(data_files, list) and all(isinstance(each, dict) for each in data_files):
        yield from ((str(each.get("split")), all_in(each.get("path"))) for each in data_files)
    else:
        yield "train", all_in(data_files)


def _matching(root: Path, folder: str, patterns: Sequence[Any]) -> set[Path]:
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


def _unread_settings(root: Path) -> list[str]:
    """Return a note on LLaMA-Factory's list of data sets, which is not read, if there is one."""
    sets = _object_of(root / "dataset_info.json")
    entries = [each for each in sets.values() if isinstance(each, dict)]
    if not any({"file_name", "hf_hub_url", "script_url"} & each.keys() for each in entries):
        return []
    given = sorted({key for each in entries for key in each} & {"columns", "tags", "formatting"})
    what = f" ({', '.join(given)})" if given else ""
    return [
        f"data: not read: dataset_info.json of LLaMA-Factory{what}; rows are read as they stand"
    ]


def _unread_formats(root: Path) -> list[str]:
    """Return a note on files that look like data in a format that is not read, if there are any."""
    files = [
        file
        for file in sorted(root.rglob("*"))
        if _OTHER_FORMATS.fullmatch(file.name)
        and not is_readable(file)
        and not any(part.startswith((".", "__")) for part in file.relative_to(root).parts)
    ]
    if not files:
        return []
    return [f"data: not read: {_shown(root, files)}; what is read is {allowed_names()}"]


def _shown(root: Path, files: Sequence[Path]) -> str:
    """Return a short description of some files of a directory."""
    names = [_printable(file.relative_to(root).as_posix()) for file in files]
    if len(names) <= _MOST_NAMED:
        return listed(names)
    return f"{names[0]} and {len(names) - 1} more files"


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)

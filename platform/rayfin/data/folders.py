"""Find the splits of a directory: by names, by a hub repository's card, or as it was saved."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rayfin.data.card import card_configuration, card_patterns, matching_files
from rayfin.data.readers import allowed_names, is_readable
from rayfin.data.splits import KEYWORDS, Split, kinds_in
from rayfin.errors import DataError, listed

# `split-00000-of-00012.parquet`: what the hub and the datasets library write.
_SHARD = re.compile(r"(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}\b.*")
_MOST_NAMED = 3
_REPORT = b'{"made_by": "rayfin data '

LEFT_OUT = ".left_out.jsonl"
"""How the name of a file ends that holds the rows which `rayfin data clean` left out of another."""

_OTHER_FORMATS = re.compile(
    r"(?!(readme|license|licence|requirements)\.).*\.(txt|xls[bm]?|ods|feather|orc|avro|tfrecord|np[yz]|"
    r"pkl|pickle|db|sqlite|zip|tar|tgz|gz|bz2|xz|zst|7z)",
    re.IGNORECASE,
)
"""Names of files that probably hold rows, but in a format that is not read."""


def directory_splits(
    root: Path,
    *,
    together: bool = False,
    name: str | None = None,
    without: Collection[str] = frozenset(),
) -> tuple[list[Split], list[Split], list[str]]:
    """Return (the splits with names, the files without a split's name, notes).

    `name` is the configuration to take of those that the directory's card lists. Files whose
    resolved paths are in `without` are left out, and noted, where a split has others. Raises
    DataError where the directory lists missing files or has no such configuration, and, unless all
    splits are joined (`together`), where a file's name stands for more than one split.
    """
    files = data_below(root)
    saved = _object_of(root / "dataset_dict.json").get("splits")
    if isinstance(saved, list):  # what DatasetDict.save_to_disk writes
        _check_saved_name(root, files, name)
        folders = {str(name): root / str(name) for name in saved}
        named = {name: data_below(each) if each.is_dir() else [] for name, each in folders.items()}
        _check_there(root / "dataset_dict.json", named)
    else:
        named = _by_card(root, files, together, name)
        if not named:
            _check_saved_name(root, files, name)
            named = _by_names(root, files, together)
    taken = {file for some in named.values() for file in some}
    # The files of other configurations are other data sets.
    others = [file for file in files if file not in taken] if name is None else []
    left_out: list[Path] = []

    def split(name: str, files: Sequence[Path]) -> Split:
        kept = [file for file in files if not without or str(file.resolve()) not in without]
        if kept and len(kept) < len(files):
            left_out.extend(file for file in files if file not in kept)
            files = kept
        return Split(name, _shown(root, files), tuple(files))

    splits = [split(name, some) for name, some in named.items()]
    unnamed = [split("", others)] if others else []
    notes: list[str] = []
    if left_out:
        notes.append(f"data: not trained on: {_shown(root, left_out)} (data.eval_path)")
    return (
        sorted(splits, key=_rank),
        unnamed,
        [*notes, *_unread_settings(root), *_unread_left_out(root), *_unread_formats(root)],
    )


def _check_saved_name(root: Path, files: Sequence[Path], name: str | None) -> None:
    """Raise DataError for a configuration that a directory without a card's list is not of."""
    if name is None:
        return
    infos = {root / "dataset_info.json", *(file.parent / "dataset_info.json" for file in files)}
    saved = {str(found) for info in infos if (found := _object_of(info).get("config_name"))}
    if name in saved:
        return
    has = (
        f"it was saved of configuration {listed(sorted(saved))}"
        if saved
        else ("it has no README.md that lists configurations")
    )
    raise DataError(
        f"data.name: '{name}' can't be had of directory '{root}': {has}; leave data.name out, or "
        "give the directory of that configuration as data.path"
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
    if name.endswith("report.json"):
        return _is_report(file)
    if name.endswith(LEFT_OUT):
        return _is_report(file.with_name(name.removesuffix(LEFT_OUT) + ".report.json"))
    return name in ("dataset_info.json", "dataset_infos.json", "config.json") and bool(
        _object_of(file)
    )


def _is_report(file: Path) -> bool:
    """Whether a file is what `rayfin data` says of another file that it wrote; it may be long."""
    try:
        with file.open("rb") as opened:
            return opened.read(64).startswith(_REPORT)
    except OSError:
        return False


def _unread_left_out(root: Path) -> list[str]:
    """Return a note on files of rows that were left out of others, if there are any."""
    files = [file for file in sorted(root.rglob(f"*{LEFT_OUT}")) if _is_metadata(file)]
    if not files:
        return []
    return [
        f"data: not read: {_shown(root, files)}: rows that rayfin data clean left out; to be used, "
        "they are mended and cleaned again"
    ]


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


def _by_card(
    root: Path, files: Sequence[Path], together: bool, name: str | None
) -> dict[str, list[Path]]:
    """Return the splits that a hub repository's README.md lists, if any.

    `name` is the configuration to take of several.
    """
    config = card_configuration(root, name)
    if config is None:
        return {}
    folder = str(config.get("data_dir") or "")
    if "data_files" not in config:
        below = [file for file in files if file.is_relative_to(root / folder)]
        named = _by_names(root / folder, below, together) or {"train" if below else folder: below}
    else:
        named = {}
        for split, patterns in card_patterns(config["data_files"]):
            matching = matching_files(root, folder, patterns)
            named[split] = [file for file in files if file in matching]
    _check_there(root / "README.md", named)
    return named


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

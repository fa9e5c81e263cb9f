"""Find the splits behind `data.path`, `data.sources` and `data.eval_path`: files and hub data."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rayfin.config.data import DataConfig
from rayfin.data.conversion import RowStatistics, detect_shape
from rayfin.data.folders import directory_splits
from rayfin.data.pydocs import PydocsRows
from rayfin.data.readers import allowed_names, is_plainly_utf8, is_readable, read_file
from rayfin.data.row_settings import NO_SETTINGS, WORKBOOK, RowSettings
from rayfin.data.rows import Row
from rayfin.data.splits import ALL, Split, SplitSelection, select_evaluated, select_splits
from rayfin.data.tool_calls import without_nulls_of_calls
from rayfin.errors import DataError, DependencyError
from rayfin.hub import REMEDY, HubUnreachable, dataset_access
from rayfin.samples import Example

EVAL_PATH = "data.eval_path"
_ROWS_LOOKED_AT = 1000

_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<split>[\w.-]+))?")
_OWN_SETTING = re.compile(r"\bdata\.(path|split|name|format|columns|encoding)\b")
_CHOICE_OF_NAME = re.compile(r"choose one with data\.name=\S+, or ")

_Choose = Callable[[str, Sequence[Split], Sequence[Split], str | None], SplitSelection]


@dataclass(frozen=True)
class Source:
    """One of the places that rows come from, and which of its splits are used."""

    setting: str
    """`data`, `data.sources.0` or `data.eval_path`: where the user wrote it."""
    config: DataConfig
    """The configuration with this source as its data.path."""
    selection: SplitSelection
    """What is trained and evaluated on; for data.eval_path, `train` is what is evaluated on."""
    weight: float | None = None

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Name this source's settings in DataErrors of the block as the user wrote them."""
        with _errors_of(self.setting):
            yield

    def shape(self, rows: Sequence[Row]) -> str:
        """Return the format of its first rows; raises DataError where they have none.

        What data.eval_path names may be of another format than data.format.
        """
        written = self.config.format
        if self.setting == EVAL_PATH and written != "auto":
            statistics = RowStatistics(RowSettings.of(self.config))
            if not any(isinstance(statistics.convert(row, written), Example) for row in rows):
                return detect_shape(rows, self.config.model_copy(update={"format": "auto"}))
        return detect_shape(rows, self.config)


@dataclass(frozen=True)
class Sources:
    """All places that rows come from."""

    train: tuple[Source, ...]
    evaluation: Source | None = None
    """The source that data.eval_path names; without one, `train` brings what is evaluated on."""

    def titles(self) -> list[str]:
        """Return a short name for each source of `train`, by which messages tell them apart."""
        parts = [Path(source.config.path).parts for source in self.train]
        depths = range(1, max(map(len, parts)))
        depth = next((n for n in depths if len({p[-n:] for p in parts}) == len(parts)), None)
        return [
            str(Path(*path[-depth:])) if depth else _described(source.config)
            for path, source in zip(parts, self.train, strict=True)
        ]


def find_sources(config: DataConfig) -> Sources:
    """Return where training and evaluation take their rows from, without reading rows of files.

    Raises DataError where there is nothing to read, where names leave the choice ambiguous, and
    where data.eval_path is what is trained on.
    """
    evaluation = _evaluation(config) if config.eval_path is not None else None
    without = evaluation.selection.train.identity if evaluation else frozenset()
    found: list[Source] = []
    for setting, own, weight in _training(config):
        with _errors_of(setting):
            selection = find_splits(own, without=without)
        if evaluation is not None:
            if selection.train.identity & without:
                raise DataError(
                    f"data.eval_path: '{config.eval_path}' is what {setting}.path='{own.path}' "
                    "trains on, and its scores would say nothing of new data; give other rows, or "
                    "leave data.eval_path out to hold rows out of training (data.val_size)"
                )
            selection = _without_evaluation(selection, without)
        found.append(Source(setting, own, selection, weight))
    if evaluation is not None:
        trained = frozenset[str]().union(*(source.selection.train.identity for source in found))
        chosen = evaluation.selection
        unread = tuple(split for split in chosen.unread if not split.identity & trained)
        evaluation = replace(evaluation, selection=replace(chosen, unread=unread))
    if evaluation is not None and not config.sources:  # as where the data brings its own split
        only, chosen = found[0], evaluation.selection
        train = only.selection.train
        selection = replace(
            only.selection,
            train=replace(train, description=train.description or Path(only.config.path).name),
            eval=chosen.train,
            unread=(*only.selection.unread, *chosen.unread),
            extra_notes=(*only.selection.extra_notes, *chosen.extra_notes),
        )
        found = [replace(only, selection=selection)]
    return Sources(tuple(found), evaluation)


def _training(config: DataConfig) -> Iterator[tuple[str, DataConfig, float | None]]:
    """Yield (setting, configuration, weight) of each source to train on."""
    if not config.sources:
        yield "data", config, None
    for number, source in enumerate(config.sources):
        encoding = source.encoding or config.encoding
        settings = source.model_dump(exclude={"weight"}) | {"sources": (), "encoding": encoding}
        yield f"data.sources.{number}", config.model_copy(update=settings), source.weight


def _evaluation(config: DataConfig) -> Source:
    """Return the source that data.eval_path names."""
    path = str(config.eval_path)
    same = not config.sources and _HUB_ID.sub(r"\g<name>", config.path) == _HUB_ID.sub(
        r"\g<name>", path
    )
    settings = {"path": path, "sources": (), "split": None}
    own = config.model_copy(update=settings | ({} if same else {"name": None}))
    with _errors_of(EVAL_PATH):
        selection = find_splits(own, select_evaluated)
    chosen = selection.train
    named = replace(chosen, name="", description=chosen.description or Path(path).name or path)
    if own.encoding and chosen.files and all(map(is_plainly_utf8, chosen.files)):
        own = own.model_copy(update={"encoding": "utf-8"})
        note = "data: data.encoding is not used for the rows evaluated on, which are UTF-8"
        selection = replace(selection, extra_notes=(*selection.extra_notes, note))
    with _errors_of(EVAL_PATH):
        has_columns = not own.columns or _has_any(chosen, own)
    if not has_columns:
        own = own.model_copy(update={"columns": {}})
        note = "data: data.columns is not used for the rows evaluated on, which have none of them"
        selection = replace(selection, extra_notes=(*selection.extra_notes, note))
    return Source(EVAL_PATH, own, replace(selection, train=named))


def _has_any(split: Split, config: DataConfig) -> bool:
    """Whether one of the first rows of a split has one of the columns in data.columns."""
    columns = set(config.columns.values())
    rows = islice(read_rows(split, RowSettings.of(config)), _ROWS_LOOKED_AT)
    return any(isinstance(row.value, Mapping) and not columns.isdisjoint(row.value) for row in rows)


def _without_evaluation(selection: SplitSelection, without: Collection[str]) -> SplitSelection:
    """Return a selection whose own evaluation split is not read."""
    left = (*filter(None, [selection.eval]), *selection.unread)
    unread = tuple(split for split in left if not split.identity & frozenset(without))
    return replace(selection, eval=None, unread=unread)


@contextmanager
def _errors_of(setting: str) -> Iterator[None]:
    """Name the settings in DataErrors of the block as those of the source at `setting`."""
    try:
        yield
    except DataError as error:
        if setting == "data":
            raise
        if setting == EVAL_PATH:
            said = re.sub(r"\bdata\.(path|split)\b", setting, _CHOICE_OF_NAME.sub("", str(error)))
        else:
            said = _OWN_SETTING.sub(rf"{setting}.\1", str(error))
        raise DataError(said) from error


def _described(config: DataConfig) -> str:
    more = (f" ({config.name})" if config.name else "", f":{config.split}" if config.split else "")
    return f"{config.path}{''.join(more)}"


def find_splits(
    config: DataConfig, choose: _Choose = select_splits, *, without: Collection[str] = frozenset()
) -> SplitSelection:
    """Return which splits of `config.path` to use, without reading any rows of files.

    `choose` takes them out of all there are; the files in `without` are left out where others
    remain. Raises DataError where there is nothing to read, or where names leave the choice
    ambiguous.
    """
    path, wanted = config.path, config.split
    if path == "pydocs":
        _check_plain(config)
        return SplitSelection(Split("", "", tables=(("pydocs", PydocsRows()),)))
    local = _existing(path)
    hub = _HUB_ID.fullmatch(path)
    if local is None and hub is not None and not is_readable(Path(path)):
        if hub["split"] and wanted not in (None, hub["split"]):
            raise DataError(
                f"data.split: '{wanted}' and data.path: '{path}' name two splits; leave one out"
            )
        return _hub_splits(config, hub["name"], wanted or hub["split"], choose)
    if local is None:
        raise DataError(
            f"data.path: '{path}' does not exist; give pydocs, a hub id (owner/name), "
            f"a directory, or a file ending in {allowed_names()}"
        )
    if not local.is_dir():
        return _one_file(config, local)
    if (local / "blobs").is_dir() and (local / "snapshots").is_dir():
        found = sorted(str(each) for each in (local / "snapshots").iterdir())
        raise DataError(
            f"data.path: '{path}' is a repository in the hub's cache, whose snapshots are data "
            f"sets of their own; give one of them: {', '.join(found[:3]) or 'there is none'}"
        )
    splits, others, notes = directory_splits(
        local,
        together=wanted == ALL or choose is select_evaluated,
        name=config.name,
        without=without,
    )
    if not splits and not others:
        raise DataError(
            f"data.path: directory '{path}' has no data file; give files ending in "
            f"{allowed_names()}"
        )
    chosen = choose(path, splits, others, wanted)
    return replace(chosen, extra_notes=tuple(notes))


def read_rows(split: Split, settings: RowSettings = NO_SETTINGS) -> Iterator[Row]:
    """Yield all rows of a split in order; a row that can't be read holds the reason.

    The columns that `settings` ignores are not read where that saves work.
    """
    for file in split.files:
        yield from read_file(file, settings)
    for name, rows in split.tables:
        for number, value in enumerate(rows, 1):
            yield Row(name, number, without_nulls_of_calls(value, settings))


def _one_file(config: DataConfig, file: Path) -> SplitSelection:
    if file.suffix.lower() in (".xls", ".xlsm", ".xlsb", ".ods"):
        raise DataError(
            f"data.path: '{config.path}' is a workbook of a kind that is not read; save it as "
            '.xlsx, or the sheet with the rows as "CSV UTF-8", and give that file'
        )
    if file.suffix.lower() in (".md", ".markdown"):
        raise DataError(
            f"data.path: '{config.path}' is markdown; rayfin data convert {shlex.quote(str(file))} "
            "--output NAME.jsonl makes rows of its questions and answers"
        )
    if not is_readable(file):
        raise DataError(
            f"data.path: '{config.path}' has an unsupported extension '{file.suffix}'; "
            f"give a file ending in {allowed_names()}"
        )
    _check_plain(config)
    return SplitSelection(Split("", "", (file,)))


def _check_plain(config: DataConfig) -> None:
    """Raise DataError for a split or a configuration of what has none."""
    if config.split not in (None, ALL):
        raise DataError(
            f"data.split: '{config.split}' can't be had of data.path='{config.path}', which has no "
            "splits, as directories and hub data sets do; leave data.split out"
        )
    if config.name is not None and not config.path.lower().endswith(WORKBOOK):
        raise DataError(
            f"data.name: '{config.name}' can't be had of data.path='{config.path}', which has no "
            "configurations, as hub data sets do; leave data.name out"
        )


def _existing(path: str) -> Path | None:
    """Return the file or directory if there is one; a name that no file system takes is not."""
    try:
        local = Path(path).expanduser()
        return local if local.exists() else None
    except (OSError, RuntimeError):
        return None


def _hub_splits(
    config: DataConfig, name: str, wanted: str | None, choose: _Choose
) -> SplitSelection:
    try:
        import datasets
    except ImportError as error:
        raise DependencyError(
            f"data.path: '{config.path}' is no local path, and a hub data set needs the package "
            f"datasets, which can't be imported ({error!s:.100}); run: pip install datasets, or "
            "give a local file or directory"
        ) from error

    one = None if wanted == ALL else wanted
    chosen = {} if config.name is None else {"name": config.name}
    try:
        with dataset_access(name):
            loaded: Any = datasets.load_dataset(name, split=one, **chosen)
    except Exception as error:  # the hub's client raises dozens of unrelated kinds
        first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [
            type(error).__name__
        ]
        # Which configurations there are stands in a later line.
        reason = " ".join([first, *(line for line in more if "vailable" in line)])
        remedy = "give an existing file or directory, or owner/name[:split]"
        if isinstance(error, HubUnreachable):
            remedy = REMEDY
        elif "OfflineModeIsEnabled" in reason:
            remedy = f"unset HF_HUB_OFFLINE, or {REMEDY}"
        elif "vailable" in reason:
            remedy = "name one of its configurations with data.name"
        elif first.startswith("Unknown split"):
            remedy = "name one of its splits with data.split"
        raise DataError(
            f"data.path: '{config.path}' is no local path, and as a hub data set it can't be "
            f"loaded ({reason:.400}); {remedy}"
        ) from error
    title = f"{name}/{config.name}" if config.name else name
    if one is not None:
        return SplitSelection(_hub_split(title, one, loaded))
    splits = [_hub_split(title, str(split), table) for split, table in loaded.items()]
    return choose(config.path, splits, (), wanted)


def _hub_split(name: str, split: str, table: Any) -> Split:
    return Split(split, f"split {split}", tables=((f"{name}:{split}", table),))

"""The section `data` of a configuration: which samples there are, and how they become tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from rayfin.config.sources import DataFormat, SourceConfig
from rayfin.section import Section


class DataConfig(Section):
    path: str = Field("pydocs", min_length=1)
    """`pydocs`, a file (JSONL, JSON, CSV, Parquet), a directory of such files, or a hub id."""
    split: str | None = Field(None, min_length=1)
    """The one split of a directory or hub data set to use, or `all` taken as one; null trains on
    train and evaluates on validation or test, where they are there."""
    name: str | None = Field(None, min_length=1)
    """The configuration of a hub data set, as its page lists them."""
    eval_path: str | None = Field(None, min_length=1)
    """What to evaluate on, in any layout: a file, a directory or a hub id, as data.path."""
    sources: tuple[SourceConfig, ...] = ()
    """Several sources in the place of data.path: a list of {path, weight, split, name, format,
    columns}."""
    format: DataFormat = "auto"
    """Shape of the rows; auto looks at the first valid row."""
    columns: dict[str, str] = {}  # noqa: RUF012
    """Names of a format's columns (prompt, completion, messages, …) -> those of the table's."""
    encoding: str | None = Field(None, min_length=1)
    """Encoding of text files without a byte order mark; null is UTF-8, or what the bytes say."""
    max_length: int = Field(256, ge=8)
    """Tokens kept of one sample."""
    truncation: Literal["right", "left", "drop"] = "right"
    """Where a longer sample is cut: right, at its end; left, earlier turns and the question's
    beginning; drop leaves it out."""
    chat_template: str | None = Field(None, min_length=1)
    """A chat template in place of the model's own: a name (chatml, llama3, …) or a Jinja file."""
    system: str | None = Field(None, min_length=1)
    """The system message of conversations that have none."""
    val_size: float = Field(0.1, gt=0, lt=1)
    """Share of the samples held out for evaluation, where the data has no split for it."""
    max_samples: int | None = Field(None, ge=2)
    """Use a deterministic sample of this many rows; of each split, where there are several."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a row that can't be used, or leave it out and count it."""
    ignore_columns: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Columns, and keys of turns (messages.name), to be left out of account without a word."""
    streaming: bool = False
    """Read and tokenise while training, through Ray Data: JSON Lines and Parquet of any size."""

    def __hash__(self) -> int:
        """Hash the settings by their JSON, as mappings have no hash of their own."""
        return hash(self.model_dump_json())

    @model_validator(mode="after")
    def _sources_alone(self) -> DataConfig:
        """Refuse what contradicts the sources, or would have no effect beside them."""
        if not self.sources:
            return self
        if "path" in self.model_fields_set:
            raise ValueError(
                f"path '{self.path}' and sources can't both be given; list it among the sources, "
                "or leave one of the two out"
            )
        own = SourceConfig.model_fields.keys() - {"path", "weight", "encoding"}  # a default for all
        for name in (n for n in SourceConfig.model_fields if n in own):
            if (value := getattr(self, name)) != DataConfig.model_fields[name].default:
                raise ValueError(
                    f"{name} '{value}' has no effect beside sources, each of which has its own; "
                    f"write {name} there"
                )
        weighted = [source.path for source in self.sources if source.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            other = next(source.path for source in self.sources if source.weight is None)
            raise ValueError(
                f"sources: '{weighted[0]}' has a weight and '{other}' has none; give every source "
                "a weight, or none to take all rows of each"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_unused_path(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the default of `path` where sources stand in its place."""
        written: dict[str, Any] = serialize(self)
        if self.sources:
            written.pop("path", None)
        return written

    @property
    def title(self) -> str:
        """What the data is called: its path, or those of its sources."""
        return ", ".join(source.path for source in self.sources) or self.path

    @property
    def first_path(self) -> str:
        """The path that names of trials are made of: of several sources, the first one's."""
        return self.sources[0].path if self.sources else self.path

    def with_paths(self, change: Callable[[str], str]) -> DataConfig:
        """Return the section with each path of data changed by a function."""
        update: dict[str, Any] = {"path": change(self.path)}
        if self.sources:
            changed = (s.model_copy(update={"path": change(s.path)}) for s in self.sources)
            update = {"sources": tuple(changed)}
        if self.eval_path is not None:
            update["eval_path"] = change(self.eval_path)
        return self.model_copy(update=update)

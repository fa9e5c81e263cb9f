"""The settings of one of several sources of data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayfin.section import Section

DataFormat = Literal[
    "auto",
    "messages",
    "instruction",
    "conversations",
    "prompt_completion",
    "text",
    "preference",
]


class SourceConfig(Section):
    """One of several sources that are mixed."""

    path: str = Field(min_length=1)
    """What data.path may be: a file, a directory of files, a hub id, or `pydocs`."""
    weight: float | None = Field(None, gt=0)
    """Its share of each epoch's samples, relative to the other weights; null takes all its rows."""
    split: str | None = Field(None, min_length=1)
    """The one split of a directory or hub data set to use, or `all` taken as one."""
    name: str | None = Field(None, min_length=1)
    """The configuration of a hub data set."""
    format: DataFormat = "auto"
    """Shape of the rows; auto looks at the first valid row."""
    columns: dict[str, str] = {}  # noqa: RUF012
    """Names of a format's columns (prompt, completion, messages, …) -> those of the table's."""
    encoding: str | None = Field(None, min_length=1)
    """Encoding of its text files without a byte order mark; null is that of data.encoding."""

    def __hash__(self) -> int:
        """Hash the settings by their JSON, as mappings have no hash of their own."""
        return hash(self.model_dump_json())

"""The section `data` of a configuration: which samples there are, and how they become tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayfin.section import Section


class DataConfig(Section):
    path: str = Field("pydocs", min_length=1)
    """`pydocs`, a file (JSONL, JSON, CSV, Parquet), a directory of such files, or a hub id."""
    split: str | None = Field(None, min_length=1)
    """The one split of a directory or hub data set to use, or `all` taken as one; null trains on
    train and evaluates on validation or test, where they are there."""
    format: Literal[
        "auto",
        "messages",
        "instruction",
        "conversations",
        "prompt_completion",
        "text",
        "preference",
    ] = "auto"
    """Shape of the rows; auto looks at the first valid row."""
    max_length: int = Field(256, ge=8)
    """Tokens kept of one sample."""
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

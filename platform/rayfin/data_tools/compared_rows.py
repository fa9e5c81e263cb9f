"""The rows of one or two data sets as they are compared, of which memory holds only hashes."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayfin.data.rows import Row
from rayfin.data_tools.embedding_model import OPTION, EmbeddingModel
from rayfin.data_tools.embeddings import DEFAULT_THRESHOLD, Embeddings, match_embeddings
from rayfin.data_tools.row_files import RowStream, RowWriter, as_report, json_line, left_out
from rayfin.data_tools.signing import Signer
from rayfin.data_tools.similar import Matches, match_equal, match_similar
from rayfin.data_tools.spill import Spill
from rayfin.errors import ConfigError
from rayfin.hardware import cpu_count
from rayfin.samples import ChatTurn, Example

PARTS = ("whole", "prompt", "answer")
LEAST_THRESHOLD = 0.5
DEFAULT_JACCARD = 0.8


class ComparedRows:
    """All rows in their order, on disk, with the hashes by which equal and similar ones are found.

    A row takes about 550 bytes of memory at a threshold of 0.8, whatever its length, and 1.3 KB at
    0.5; with embeddings it takes fewer.
    """

    def __init__(
        self,
        directory: Path,
        part: str,
        threshold: float | None = None,
        embedding_model: str | None = None,
    ) -> None:
        """Prepare to compare `part` of each row, for equality alone where the threshold is 1.

        Similarity is that of embeddings where a model for them is named, and else Jaccard's. The
        disk of `directory` needs room for the rows twice over, and for embeddings. Raises
        ConfigError for a threshold that is not from 0.5 to 1, or 1 with a model, and ModelError for
        a model that can't be used.
        """
        if threshold is None:
            threshold = DEFAULT_JACCARD if embedding_model is None else DEFAULT_THRESHOLD
        if not LEAST_THRESHOLD <= threshold <= 1:
            raise ConfigError(
                f"--threshold: {threshold:g} is not from {LEAST_THRESHOLD:g} to 1, where 1 finds "
                "equal rows alone; give 0.8, say"
            )
        if threshold == 1 and embedding_model is not None:
            raise ConfigError(
                f"{OPTION}: with --threshold 1 equal rows alone are found, without any model; "
                "leave one of them out"
            )
        self.part, self.threshold = part, threshold
        self._model = model = None if embedding_model is None else EmbeddingModel(embedding_model)
        self._lines, self._texts = Spill(directory), Spill(directory)
        self._embeddings = None if model is None else Embeddings(model, self._texts, directory)
        use_signatures = threshold < 1 and model is None
        self._signer = Signer(threshold, cpu_count()) if use_signatures else None
        self._usable, self._has_text = bytearray(), bytearray()
        self._digests = bytearray()
        self._files: list[str] = []
        self._file_numbers, self._line_numbers = array("i"), array("q")
        self._writers: list[RowWriter] = []

    def __enter__(self) -> ComparedRows:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._signer is not None:
            self._signer.close()
        self._lines.close()
        self._texts.close()

    def __len__(self) -> int:
        return len(self._usable)

    def read(self, stream: RowStream) -> None:
        """Read the rows of a data set.

        Raises what the stream's `check` does, and ConfigError where the rows lack the part.
        """
        if stream.shape == "text" and self.part != "whole":
            raise ConfigError(
                f"--part: rows of format text have no {self.part}; leave it out, or give whole"
            )
        writer = RowWriter(stream.settings.ignore)
        self._writers.append(writer)
        for row, example in stream:
            self._add_position(row)
            if isinstance(example, str):
                self._lines.append(json_line(as_report(left_out(row, example))))
                self._add(None, "")
            else:
                self._lines.append(writer.line(row.value))
                text = "" if self.threshold == 1 else compared_text(example, self.part)
                self._add(exact_form(example, self.part), text)
        stream.check()

    def notes(self) -> list[str]:
        """Return lines on what of the rows is not written, or not compared, if anything."""
        notes = [note for writer in self._writers for note in writer.notes()]
        if self._model is not None and self._model.truncated:
            notes.append(
                f"rows with more than the {self._model.max_tokens} tokens that are embedded of "
                f"each: {self._model.truncated}; only their beginnings were compared"
            )
        return notes

    def comparison(self) -> dict[str, Any]:
        """Return what a report says of how rows are compared."""
        told: dict[str, Any] = {"part": self.part, "threshold": self.threshold}
        if self._model is not None:
            told |= {"embedding_model": self._model.name, "pooling": self._model.pooling}
        return told

    def _add_position(self, row: Row) -> None:
        if not self._files or self._files[-1] != row.file:
            self._files.append(row.file)
        self._file_numbers.append(len(self._files) - 1)
        self._line_numbers.append(row.line)

    def _add(self, form: str | None, text: str) -> None:
        self._usable.append(form is not None)
        self._has_text.append(bool(text.strip()))
        self._digests += hashlib.blake2b((form or "").encode(), digest_size=16).digest()
        self._texts.append(text.encode("utf-8", "surrogatepass"))
        if self._signer is not None:
            self._signer.add(text)

    def matches(self, order: NDArray[np.int64], references: int | None = None) -> Matches:
        """Return for each row an earlier one, in this order, that it is equal or similar to.

        Rows that have a match themselves are nobody's match. With `references`, rows are compared
        with the first `references` rows alone, and these with none.
        """
        matches = Matches.none(len(self))
        is_reference = np.zeros(len(self), bool)
        is_reference[order[:references]] = True

        def compare(find: Any, among: NDArray[np.int64], *more: Any) -> None:
            own = None if references is None else int(is_reference[among].sum())
            find(matches, among, own, *more)

        usable = order[np.frombuffer(self._usable, bool)[order]]
        digests = np.frombuffer(self._digests, np.uint64).reshape(-1, 2)
        compare(match_equal, usable, digests)
        compared = usable[np.frombuffer(self._has_text, bool)[usable]]
        compared = compared[matches.other[compared] < 0]
        if self._embeddings is not None:
            compare(match_embeddings, compared, self._embeddings, self.threshold)
        elif self._signer is not None:
            more = self._signer.signatures(), self._texts, self.threshold
            compare(match_similar, compared, *more)
        matches.pass_on()
        return matches

    def is_usable(self, row: int) -> bool:
        """Whether a row can be used."""
        return bool(self._usable[row])

    def line(self, row: int) -> bytes:
        """Return a row as a line of JSON."""
        return self._lines[row]

    def position(self, row: int) -> dict[str, Any]:
        """Return the file and the line of a row."""
        return {"file": self._files[self._file_numbers[row]], "line": self._line_numbers[row]}

    def reported(self, row: int, matches: Matches, name: str) -> dict[str, Any]:
        """Return what a report says of a row that can't be used or that has a match.

        `name` is the key of the row that it matches.
        """
        if not self.is_usable(row):
            entry: dict[str, Any] = json.loads(self.line(row))
            return entry
        number = int(matches.other[row])
        other, similarity = self.position(number), float(matches.similarity[row])
        where = f"{other['file']}:{other['line']}"
        equal = bool(matches.equal[row])
        return {
            **self.position(row),
            "reason": f"equal to {where}" if equal else f"{similarity:.3f} similar to {where}",
            name: other,
            "equal": equal,
            "similarity": round(similarity, 6),
            "row": json.loads(self.line(row)),
        }


def exact_form(example: Example, part: str) -> str:
    """Return the JSON that rows have in common which are equal in a part."""
    if part == "prompt":
        return example.canonical_prompt()
    if part == "answer":
        return Example(example.messages[-1:], rejected=example.rejected[-1:]).canonical()
    return example.canonical()


def compared_text(example: Example, part: str) -> str:
    """Return the text of a part of a row, by which similar rows are found.

    System turns and tools are not in it: what many rows share would make them all similar.
    """
    if example.text is not None:
        return example.text
    turns = example.messages
    if part == "prompt":
        turns = turns[:-1]
    elif part == "answer":
        turns = turns[-1:]
    if part != "prompt":
        turns += example.rejected[-1:]
    return "\n".join(text for turn in turns if turn["role"] != "system" for text in _texts(turn))


def _texts(turn: ChatTurn) -> Iterator[str]:
    yield turn["content"]
    for call in turn.get("tool_calls", ()):
        yield json.dumps(call["function"], ensure_ascii=False)

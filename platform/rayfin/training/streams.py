"""Large data through Ray: surveyed by the cluster's CPUs, tokenised by Ray Data beside training."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import ray
import ray.exceptions

from rayfin.config import DataConfig, ModelConfig
from rayfin.data import Corpus, TokenizedSample, survey_corpus
from rayfin.data.chunks import FileRange
from rayfin.data.stream import Reader, SampleRange, Stream, tokenized_piece
from rayfin.data.survey import Part
from rayfin.models import load_tokenizer

# Of tokens that are made and not yet trained on; a task gives some hundred samples.
_OBJECT_STORE_BYTES = 2**28
_PIECES_A_TASK = 4
# Each task is an object that waits from the beginning.
_PIECES_AT_A_TIME = 4096
_PARTS_AT_A_TIME = 32


def survey_on_ray(config: DataConfig) -> Corpus:
    """`survey_corpus`, its parts on all CPUs of the connected cluster."""
    return survey_corpus(config, _each)


def _each(look: Callable[[list[int]], Part], parts: Sequence[list[int]]) -> Iterable[Part]:
    task: Any = ray.remote(_call)
    function = ray.put(look)
    begun: list[Any] = []
    for part in parts:
        begun.append(task.remote(function, part))
        if len(begun) >= _PARTS_AT_A_TIME:
            yield _result(begun.pop(0))
    yield from map(_result, begun)


def _result(task: Any) -> Part:
    """Of a task; what it raised comes without Ray's words around it."""
    try:
        part: Part = ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return part


def _call(look: Callable[[list[int]], Part], part: list[int]) -> Part:
    return look(part)


def read_on_ray(model: ModelConfig) -> Reader:
    """A reader whose pieces are read and tokenised by Ray Data, some ahead of the training.

    Its one process takes none of the cluster's CPUs: the training may hold all of them.
    """

    def read(
        stream: Stream, pieces: Sequence[SampleRange], seed: int, max_length: int
    ) -> Iterator[tuple[int, TokenizedSample]]:
        import ray.data  # here, as few trials stream

        _prepare()
        rules = replace(stream, chunks=(), rows=())
        for first in range(0, len(pieces), _PIECES_AT_A_TIME):
            some = [asdict(piece) for piece in pieces[first : first + _PIECES_AT_A_TIME]]
            waiting = ray.data.from_items(some, override_num_blocks=-(-len(some) // _PIECES_A_TASK))
            samples = waiting.map_batches(
                lambda batch: _tokenize(batch, rules, model, seed, max_length),
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=0,
                concurrency=1,
            )
            batch: Any
            for batch in samples.iter_batches(batch_size=None, batch_format="pyarrow"):
                for row in batch.to_pylist():
                    yield row["lane"], {"input_ids": row["input_ids"], "labels": row["labels"]}

    return read


# A process of Ray's runs one such task after another.
_tokenizer = functools.lru_cache(maxsize=1)(load_tokenizer)


def _tokenize(batch: Any, stream: Stream, model: ModelConfig, seed: int, max_length: int) -> Any:
    """Pieces -> their samples."""
    import pyarrow as pa

    lanes: list[int] = []
    samples: list[TokenizedSample] = []
    for row in batch.to_pylist():
        piece = SampleRange(**row | {"chunk": FileRange(**row["chunk"])})
        samples += tokenized_piece(
            stream, piece, _tokenizer(model), seed=seed, max_length=max_length
        )
        lanes += [piece.lane] * (len(samples) - len(lanes))
    tokens = pa.list_(pa.int32())
    return pa.table(
        {
            "lane": lanes,
            "input_ids": pa.array([sample["input_ids"] for sample in samples], tokens),
            "labels": pa.array([sample["labels"] for sample in samples], tokens),
        }
    )


def _prepare() -> None:
    from ray.data import DataContext, ExecutionResources

    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(
        object_store_memory=_OBJECT_STORE_BYTES
    )
    # rayfin shows its own progress, and an error that is raised.
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)

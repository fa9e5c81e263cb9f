"""Large data through Ray: surveyed by the cluster's CPUs, tokenised by Ray Data beside training."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import ray
import ray.exceptions

from rayfin.config import DataConfig
from rayfin.data import Corpus, TokenizedSample, survey_corpus
from rayfin.data.range_survey import RangeSurvey
from rayfin.data.split_survey import SurveyBatch
from rayfin.data.stream import FileRange, SampleRange, Stream
from rayfin.data.stream_reader import StreamReader, tokenize_range
from rayfin.data.token_settings import TokenSettings
from rayfin.models import load_tokenizer
from rayfin.objectives import SFT, Objective, objective_of
from rayfin.training.spec import TrialSpec

# Tokens that are made and not yet trained on; a task yields some hundred samples.
_OBJECT_STORE_BYTES = 2**28
_RANGES_PER_TASK = 4
# Each task is an object that waits from the start.
_MAX_RANGES_QUEUED = 4096
_MAX_BATCHES_QUEUED = 32


def survey_on_ray(config: DataConfig, objective: Objective = SFT) -> Corpus:
    """Survey a streamed data set as `survey_corpus` does, on all CPUs of the connected cluster."""
    return survey_corpus(config, _map_batches, objective)


def _map_batches(survey: SurveyBatch, batches: Sequence[list[int]]) -> Iterable[RangeSurvey]:
    task: Any = ray.remote(_call)
    function = ray.put(survey)
    queued: list[Any] = []
    for batch in batches:
        queued.append(task.remote(function, batch))
        if len(queued) >= _MAX_BATCHES_QUEUED:
            yield _result(queued.pop(0))
    yield from map(_result, queued)


def _result(task: Any) -> RangeSurvey:
    """Return a task's result, or raise its error without what Ray wraps around it."""
    try:
        survey: RangeSurvey = ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return survey


def _call(survey: SurveyBatch, batch: list[int]) -> RangeSurvey:
    return survey(batch)


def read_on_ray(spec: TrialSpec) -> StreamReader:
    """Return a trial's reader, whose ranges are read and tokenised by Ray Data ahead of training.

    Its one process takes none of the cluster's CPUs, as the training may hold all of them.
    """

    def read(
        stream: Stream, ranges: Sequence[SampleRange], seed: int, max_length: int
    ) -> Iterator[tuple[int, TokenizedSample | None]]:
        import ray.data  # here, as few trials stream

        _prepare()
        rules, objective = replace(stream, ranges=(), rows=()), objective_of(spec.train)
        for first in range(0, len(ranges), _MAX_RANGES_QUEUED):
            some = [asdict(each) for each in ranges[first : first + _MAX_RANGES_QUEUED]]
            waiting = ray.data.from_items(
                some, override_num_blocks=-(-len(some) // _RANGES_PER_TASK)
            )
            samples = waiting.map_batches(
                lambda batch: _tokenize(batch, rules, spec, objective, seed, max_length),
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=0,
                concurrency=1,
            )
            batch: Any
            for batch in samples.iter_batches(batch_size=None, batch_format="pyarrow"):
                for row in batch.to_pylist():
                    yield row.pop("lane"), row if row["input_ids"] is not None else None

    return read


# A process of Ray's runs one such task after another.
_tokenizer = functools.lru_cache(maxsize=1)(load_tokenizer)


def _tokenize(
    batch: Any,
    stream: Stream,
    spec: TrialSpec,
    objective: Objective,
    seed: int,
    max_length: int,
) -> Any:
    """Turn a table of sample ranges into a table of their tokenised samples.

    A sample that the chat template refuses is null in all columns but its lane.
    """
    import pyarrow as pa

    tokenizer = _tokenizer(spec.model, spec.data.chat_template)
    settings = TokenSettings.of(spec.data, spec.train)

    lanes: list[int] = []
    samples: list[Any] = []
    for row in batch.to_pylist():
        each = SampleRange(**row | {"file_range": FileRange(**row["file_range"])})
        samples += tokenize_range(
            stream, each, tokenizer, objective, settings, seed=seed, max_length=max_length
        )
        lanes += [each.lane] * (len(samples) - len(lanes))
    tokens = pa.list_(pa.int32())
    names = next((sample for sample in samples if sample is not None), ("input_ids", "labels"))
    columns = {
        name: pa.array([sample and sample[name] for sample in samples], tokens) for name in names
    }
    return pa.table({"lane": lanes, **columns})


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

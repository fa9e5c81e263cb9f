"""Which samples make up which step of a trial, and in what order."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence

import torch

from rayfin.data import TokenizedCorpus, TokenizedSample
from rayfin.data.stream import plan_sample_ranges
from rayfin.data.stream_reader import StreamReader
from rayfin.errors import DataError
from rayfin.heartbeat import beat
from rayfin.objectives import Objective
from rayfin.objectives.base import Batch
from rayfin.samples import NO_LOSS
from rayfin.training.spec import TrialSpec
from rayfin.training.strategies import Share

# Samples are sorted by length inside windows of this many batches: enough to leave little padding,
# little enough that every step still sees a random mix.
_WINDOW = 16


def plan_samples(
    lengths: Sequence[int],
    *,
    batch_size: int,
    max_steps: int,
    seed: int,
    group_by_length: bool,
    steps_before: int = 0,
) -> list[int]:
    """Return the indices of `max_steps * batch_size` samples in the order of training.

    They are those that come after the first `steps_before` steps, which a training has taken that
    this one continues. Every epoch is a new shuffle; the plan depends on its arguments alone, so
    that a resumed or moved trial goes on with the very samples it would have seen.
    """
    rng = random.Random(seed)
    plan: list[int] = []
    seen, needed = steps_before * batch_size, max_steps * batch_size
    while len(plan) < seen + needed:
        epoch = list(range(len(lengths)))
        rng.shuffle(epoch)
        plan += epoch
    plan = plan[seen : seen + needed]
    if not group_by_length:
        return plan
    grouped: list[int] = []
    for start in range(0, needed, _WINDOW * batch_size):
        window = sorted(plan[start : start + _WINDOW * batch_size], key=lambda i: lengths[i])
        batches = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        rng.shuffle(batches)
        grouped += [index for batch in batches for index in batch]
    return grouped


def samples_of(
    spec: TrialSpec,
    objective: Objective,
    data: TokenizedCorpus,
    share: Share,
    reader: StreamReader,
    steps_before: int = 0,
) -> PlannedSamples | StreamedSamples:
    """The training samples of a trial, position by position; `reader` reads what is streamed.

    `steps_before` are the steps of the training that this one continues.
    """
    train, stream = spec.train, data.stream
    samples_per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    if stream is None:
        plan = plan_samples(
            [objective.length(sample) for sample in data.train],
            batch_size=samples_per_step,
            max_steps=train.max_steps,
            seed=train.seed,
            group_by_length=train.group_by_length,
            steps_before=steps_before,
        )
        return PlannedSamples(data.train, plan, objective.length)

    def read(lanes: Sequence[int], first: int) -> Iterator[tuple[int, TokenizedSample]]:
        ranges = plan_sample_ranges(
            stream,
            lanes=lanes,
            of=samples_per_step,
            seed=train.seed,
            first=steps_before + first,
            last=steps_before + train.max_steps,
        )
        return reader(stream, ranges, train.seed, spec.data.max_length)

    return StreamedSamples(
        read,
        samples_per_step=samples_per_step,
        max_steps=train.max_steps,
        batch_size=share.batch_size,
        workers=samples_per_step // (share.batch_size * share.accumulation),
        length=objective.length,
    )


class PlannedSamples(torch.utils.data.Dataset[TokenizedSample]):
    """The samples of a trial in the order of its plan; read in sequence, one epoch is the trial."""

    def __init__(
        self,
        samples: Sequence[TokenizedSample],
        plan: Sequence[int],
        length: Callable[[TokenizedSample], int],
    ) -> None:
        """Take `length`, which counts the tokens that the model computes for a sample."""
        self.samples, self.plan, self.length = samples, plan, length

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, position: int) -> TokenizedSample:
        return self.samples[self.plan[position]]

    def tokens(self, start: int, stop: int) -> int:
        """Return the number of tokens in the samples from `start` to `stop` of the plan."""
        return sum(self.length(self.samples[i]) for i in self.plan[start:stop])

    def close(self) -> None:
        """Do nothing: nothing is open."""


class StreamedSamples(torch.utils.data.Dataset[TokenizedSample]):
    """The samples of a trial on large data, read as they are asked for, once and in order.

    A position is a step and a lane (`rayfin.data.stream`): what a worker asks for first says where
    it goes on, and with its rank and the number of `workers` which lanes are its own.
    """

    def __init__(
        self,
        read: Callable[[Sequence[int], int], Iterator[tuple[int, TokenizedSample]]],
        *,
        samples_per_step: int,
        max_steps: int,
        batch_size: int,
        workers: int,
        length: Callable[[TokenizedSample], int],
    ) -> None:
        """Take `read`, which maps (lanes, first step) to pairs (lane, sample).

        `batch_size` is that of one worker; `length` counts the tokens that the model computes for
        a sample.
        """
        self.length = length
        self.read, self.samples_per_step, self.max_steps = read, samples_per_step, max_steps
        self.batch_size, self.workers = batch_size, workers
        self._source: Iterator[tuple[int, TokenizedSample]] | None = None
        self._waiting: dict[int, deque[TokenizedSample]] = defaultdict(deque)
        self._tokens: dict[int, int] = defaultdict(int)

    def __len__(self) -> int:
        return self.max_steps * self.samples_per_step

    def __getitem__(self, position: int) -> TokenizedSample:
        step, lane = divmod(position, self.samples_per_step)
        if self._source is None:
            rank = lane // self.batch_size % self.workers
            own = [
                n
                for n in range(self.samples_per_step)
                if n // self.batch_size % self.workers == rank
            ]
            self._source = self.read(own, step)
        while not self._waiting[lane]:
            beat("reading the data")
            other, sample = next(self._source)
            self._waiting[other].append(sample)
        sample = self._waiting[lane].popleft()
        self._tokens[step] += self.length(sample)
        return sample

    def tokens(self, start: int, stop: int) -> int:
        """Estimate the tokens from position `start` to `stop` by this worker's share of them."""
        steps = range(start // self.samples_per_step, stop // self.samples_per_step)
        return sum(self._tokens[step] for step in steps) * self.workers

    def close(self) -> None:
        """End what reads ahead."""
        if isinstance(self._source, Generator):
            self._source.close()
        self._source = None
        self._waiting.clear()


def batches_from_start(
    samples: PlannedSamples | StreamedSamples,
    objective: Objective,
    pad_token_id: int,
    labelled: int,
) -> Iterator[Batch]:
    """Yield padded batches of `samples` in their order, over and over, until nobody asks.

    Each has as few samples as have `labelled` tokens with a loss; where all have fewer, some of
    them again. Raise DataError where none of the samples has a token with a loss.
    """
    batch: list[TokenizedSample] = []
    waiting = 0  # tokens with a loss in `batch`
    while True:
        found = False
        for position in range(len(samples)):
            sample = samples[position]
            batch.append(sample)
            learned = sum(label != NO_LOSS for label in sample["labels"])
            waiting, found = waiting + learned, found or learned > 0
            if waiting >= labelled:
                beat("initializing the method")
                yield objective.collate(batch, pad_token_id)
                batch, waiting = [], 0
        samples.close()
        if not found:
            raise DataError(
                f"data.max_length: no answer begins within it in the {len(samples)} samples that "
                "the method takes its first weights from; raise data.max_length, or "
                "train.max_steps for more samples"
            )


class Collator:
    """Makes the batches of an objective; a collate function for a data loader."""

    def __init__(self, objective: Objective, pad_token_id: int, packing: bool) -> None:
        self.objective, self.pad_token_id, self.packing = objective, pad_token_id, packing

    def __call__(self, samples: Sequence[TokenizedSample]) -> Batch:
        return self.objective.collate(samples, self.pad_token_id, packing=self.packing)

"""Which samples make up which step of a trial, and in what order."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence

import torch

from rayfin.data import TokenizedCorpus, TokenizedSample
from rayfin.data.stream import has_sample, plan_epoch_ranges, plan_sample_ranges
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
    return [index for batch in _grouped(plan, lengths, batch_size, rng) for index in batch]


def plan_epochs(
    lengths: Sequence[int],
    *,
    batch_size: int,
    max_steps: int,
    seed: int,
    group_by_length: bool,
    steps_before: int = 0,
) -> list[int | None]:
    """Return `plan_samples`, with each pass over the samples in steps of its own.

    One step of each pass may have fewer samples than the others: None stands for those it lacks.
    """
    rng = random.Random(seed)
    plan: list[int | None] = []
    seen, needed = steps_before * batch_size, max_steps * batch_size
    while len(plan) < seen + needed:
        epoch = list(range(len(lengths)))
        rng.shuffle(epoch)
        if group_by_length:
            batches = _grouped(epoch, lengths, batch_size, rng)
        else:
            batches = [epoch[i : i + batch_size] for i in range(0, len(epoch), batch_size)]
        for batch in batches:
            plan += [*batch, *[None] * (batch_size - len(batch))]
    return plan[seen : seen + needed]


def _grouped(
    plan: Sequence[int], lengths: Sequence[int], batch_size: int, rng: random.Random
) -> list[list[int]]:
    """Return the batches of a plan with samples of like length together, window by window."""
    grouped: list[list[int]] = []
    for start in range(0, len(plan), _WINDOW * batch_size):
        window = sorted(plan[start : start + _WINDOW * batch_size], key=lambda i: lengths[i])
        batches = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        rng.shuffle(batches)
        grouped += batches
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
    in_epochs = train.num_train_epochs is not None
    filler = objective.without_loss(data.train[0])
    if stream is None:
        plan = (plan_epochs if in_epochs else plan_samples)(
            [objective.length(sample) for sample in data.train],
            batch_size=samples_per_step,
            max_steps=train.max_steps,
            seed=train.seed,
            group_by_length=train.group_by_length,
            steps_before=steps_before,
        )
        return PlannedSamples(data.train, plan, objective.length, filler)

    def read(lanes: Sequence[int], first: int) -> Iterator[tuple[int, TokenizedSample | None]]:
        ranges = (plan_epoch_ranges if in_epochs else plan_sample_ranges)(
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
        filler=filler,
        rows=sum(stream.rows) if in_epochs else None,
        steps_before=steps_before,
    )


class PlannedSamples(torch.utils.data.Dataset[TokenizedSample]):
    """The samples of a trial in the order of its plan; read in sequence, one epoch is the trial."""

    def __init__(
        self,
        samples: Sequence[TokenizedSample],
        plan: Sequence[int | None],
        length: Callable[[TokenizedSample], int],
        filler: TokenizedSample,
    ) -> None:
        """Take `length`, which counts the tokens that the model computes for a sample.

        `filler` has no loss, and fills a step that has fewer samples: so all workers have equally
        many batches of equally many rows, however many samples there are.
        """
        self.samples, self.plan, self.length, self.filler = samples, plan, length, filler

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, position: int) -> TokenizedSample:
        index = self.plan[position]
        return self.filler if index is None else self.samples[index]

    def tokens(self, start: int, stop: int) -> int:
        """Return the number of tokens in the samples from `start` to `stop` of the plan."""
        return sum(self.length(self.samples[i]) for i in self.plan[start:stop] if i is not None)

    def close(self) -> None:
        """Do nothing: nothing is open."""


class StreamedSamples(torch.utils.data.Dataset[TokenizedSample]):
    """The samples of a trial on large data, read as they are asked for, once and in order.

    A position is a step and a lane (`rayfin.data.stream`): what a worker asks for first says where
    it goes on, and with its rank and the number of `workers` which lanes are its own.
    """

    def __init__(
        self,
        read: Callable[[Sequence[int], int], Iterator[tuple[int, TokenizedSample | None]]],
        *,
        samples_per_step: int,
        max_steps: int,
        batch_size: int,
        workers: int,
        length: Callable[[TokenizedSample], int],
        filler: TokenizedSample,
        rows: int | None = None,
        steps_before: int = 0,
    ) -> None:
        """Take `read`, which maps (lanes, first step) to pairs (lane, sample).

        `batch_size` is that of one worker; `length` counts the tokens that the model computes for
        a sample; `filler` is that of `PlannedSamples`, where each pass over `rows` samples has
        steps of its own. It also takes the place of a sample that is None: a refused one.
        """
        self.length, self.filler = length, filler
        self.rows, self.steps_before = rows, steps_before
        self.read, self.samples_per_step, self.max_steps = read, samples_per_step, max_steps
        self.batch_size, self.workers = batch_size, workers
        self._source: Iterator[tuple[int, TokenizedSample | None]] | None = None
        self._waiting: dict[int, deque[TokenizedSample | None]] = defaultdict(deque)
        self._tokens: dict[int, int] = defaultdict(int)
        self._refused: dict[int, int] = defaultdict(int)

    def __len__(self) -> int:
        return self.max_steps * self.samples_per_step

    def __getitem__(self, position: int) -> TokenizedSample:
        step, lane = divmod(position, self.samples_per_step)
        if self.rows is not None:
            pass_step = self.steps_before + step
            if not has_sample(self.rows, pass_step, lane, self.samples_per_step):
                return self.filler
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
        if sample is None:
            self._refused[step] += 1
            return self.filler
        self._tokens[step] += self.length(sample)
        return sample

    def tokens(self, start: int, stop: int) -> int:
        """Estimate the tokens from position `start` to `stop` by this worker's share of them."""
        steps = range(start // self.samples_per_step, stop // self.samples_per_step)
        return sum(self._tokens[step] for step in steps) * self.workers

    def refused(self, first: int, last: int) -> int:
        """Return how many of this worker's samples of those steps the chat template refuses."""
        return sum(self._refused[step] for step in range(first, last))

    def count(self, steps: int) -> int:
        """Return how many samples the first steps have, over all workers."""

        def before(step: int) -> int:
            if self.rows is None:
                return step * self.samples_per_step
            passes, inside = divmod(step, -(-self.rows // self.samples_per_step))
            return passes * self.rows + inside * self.samples_per_step

        return before(self.steps_before + steps) - before(self.steps_before)

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
            if sample is samples.filler:
                continue
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

"""What is taken of each source of streamed data, and what of it is held out for evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rayfin.config.data import DataConfig
from rayfin.data.range_survey import HashedExample
from rayfin.data.row_settings import RowSettings
from rayfin.data.split_survey import MapBatches, SurveyedSplit, survey_chosen
from rayfin.data.stream import StreamSource
from rayfin.errors import DataError


@dataclass(frozen=True)
class StreamPart:
    """What is taken of one source."""

    source: StreamSource
    rows: list[int]
    """The number of training samples of each of its ranges."""
    held_out: Sequence[HashedExample] = ()
    shared: int = 0
    """The number of samples that are neither trained nor evaluated on, as another source's held-out
    samples have their prompts."""


def most_to_hold_out(config: DataConfig, count: int, most: int) -> int:
    """Return how many of `count` samples may be held out, `most` at most."""
    return min(max(round(config.val_size * count), 1), count - 1, max(most, 1))


def take(split: SurveyedSplit, to_hold_out: int, first_range: int) -> StreamPart:
    """Return what is taken of a source: all samples that its survey counts.

    Where samples can't be told apart, none is held out. `first_range` is the number of its first
    range in the stream.
    """
    settings, survey = RowSettings.of(split.source.config), split.survey
    held_out: Sequence[HashedExample] = ()
    hashes_prompt = False
    if to_hold_out > 0 and len({each.content for each in survey.by_content}) > 1:
        held_out = _first_groups(survey.by_prompt, to_hold_out)
        hashes_prompt = bool(held_out)
        # Where not even one prompt's samples fit, only equal samples are kept together instead.
        held_out = held_out or _first_groups(survey.by_content, to_hold_out)
        first = survey.by_content[0].hash
        held_out = held_out or [each for each in survey.by_content if each.hash == first]
        if len(held_out) == len(survey.by_content):
            raise DataError(
                f"{split.source.setting}.path: '{split.source.config.path}': almost all of its "
                f"{split.rows} rows are the same; give different ones"
            )
    held = Counter(each.number for each in held_out)
    rows = [survey.counts[n] - held[n] for n in range(len(split.ranges))]
    limit = held_out[-1].hash if held_out else ""  # an empty one is less than every hash
    source = StreamSource(
        split.shape, settings, limit, hashes_prompt, taken=split.taken, first_range=first_range
    )
    return StreamPart(source, rows, held_out)


def without_shared(
    train: Sequence[SurveyedSplit],
    parts: Sequence[StreamPart],
    map_batches: MapBatches,
    *,
    most: int,
    own: frozenset[int],
) -> list[StreamPart]:
    """Return the parts without what another one holds out, for which all rows are read once more.

    Such samples are evaluated on there, too, `most` with the others; but for the sources with these
    numbers, which have a split of their `own`. Raises DataError where nothing is left to train on.
    """
    held = [frozenset(each.hash for each in part.held_out) for part in parts]
    room = most - sum(len(part.held_out) for part in parts)
    found: list[StreamPart] = []
    for number, (split, part) in enumerate(zip(train, parts, strict=True)):
        elsewhere = frozenset[str]().union(*held[:number], *held[number + 1 :])
        if not elsewhere:
            found.append(part)
            continue
        source = replace(part.source, held_elsewhere=elsewhere)
        survey = survey_chosen(split, map_batches, chosen=source.shared_of_range)
        shared = sum(survey.counts.values())
        evaluated = [] if number in own else survey.by_content[: max(room, 0)]
        room -= len(evaluated)
        found.append(
            StreamPart(
                source if shared else part.source,
                [count - survey.counts[n] for n, count in enumerate(part.rows)],
                [*part.held_out, *evaluated],
                shared - len(evaluated),
            )
        )
    if not any(sum(part.rows) for part in found):
        raise all_held_out()
    return found


def all_held_out() -> DataError:
    """Return the error for sources of which every row is held out of one of them."""
    return DataError(
        "data.sources: every row is held out of one of them; give more rows, or rows to "
        "evaluate on as data.eval_path"
    )


def _first_groups(ordered: Sequence[HashedExample], most: int) -> Sequence[HashedExample]:
    """Return the first examples, at most `most`; of those with the same hash, all or none."""
    count = min(most, len(ordered))
    while 0 < count < len(ordered) and ordered[count - 1].hash == ordered[count].hash:
        count -= 1
    return ordered[:count]

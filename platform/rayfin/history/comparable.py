"""Which trials' scores compare: those of one objective on the same held-out samples.

A loss, a perplexity and a share of tokens compare where the same tokens were scored. A share of
samples that fulfil a condition (`exact_match`) also compares where other tokens stand for the same
answers, of which none was cut: with another chat template or tokenizer, for example.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

from rayfin.config import DataConfig, ModelConfig, Section
from rayfin.history.record import finite
from rayfin.metrics import METRICS, score_of
from rayfin.objectives import OBJECTIVES, stage_of
from rayfin.statuses import SCORED

R = TypeVar("R", bound=Any)

_SAME_SAMPLES = frozenset({"data.streaming", "data.ignore_columns"})
_OF_TRAINING = frozenset({"path", "sources", "split", "name", "val_size"})
_SAME_ANSWERS = ("data.chat_template", "data.system", "model.name", "model.revision")


def decides_scored_tokens(setting: str, data: DataConfig) -> bool:
    """Return whether trials may be scored on other tokens where they differ in a setting.

    `setting` is its dotted name, and `data` the section that the trials share otherwise.
    """
    section, _, name = setting.partition(".")
    if section == "data":
        own_file = data.eval_path is not None and name in _OF_TRAINING
        return setting not in _SAME_SAMPLES and not own_file
    own = {f"train.{one}" for it in OBJECTIVES.values() for one in it.settings_class.model_fields}
    return setting in {"model.name", "model.revision", "train.stage", "train.train_on"} | own


def keeps_scored_answers(setting: str) -> bool:
    """Return whether the held-out answers are the same ones, in whatever tokens, at its values."""
    return setting in _SAME_ANSWERS


def comparison_group(stage: str, profile: Mapping[str, Any], metric: str) -> str:
    """Return a text that a trial shares with the trials whose scores compare with its own.

    `profile` is that of its data, as a row's scenario holds it.
    """
    whole = profile.get("eval_answers") if _of_answers(metric) else None
    return json.dumps([stage, whole or profile.get("eval_digest")])


def comparison_groups(rows: Sequence[Any], metric: str) -> list[str]:
    """Return for each row its `comparison_group`.

    A row of an earlier version or another program does not tell what it was scored on: see
    `eval_digests`.
    """
    digests = eval_digests(rows)
    profiles = [_profile(row) for row in rows]
    answers = {
        digest: profile["eval_answers"]
        for digest, profile in zip(digests, profiles, strict=True)
        if profile.get("eval_answers")
    }
    return [
        comparison_group(
            stage_of(_mapping(row.spec)),
            {"eval_digest": digest, "eval_answers": answers.get(digest)},
            metric,
        )
        for row, digest in zip(rows, digests, strict=True)
    ]


def eval_digests(rows: Sequence[Any]) -> list[Any]:
    """Return for each row the hash of its held-out tokens, as far as the rows tell.

    A row that does not tell is given the hash of a row of its objective with the same model and
    data settings or, where there is none, the hash that most rows of its objective have. None
    stands where no row of its objective tells.
    """
    stages = [stage_of(_mapping(row.spec)) for row in rows]
    digests = [_profile(row).get("eval_digest") for row in rows]
    told: dict[str, Counter[Any]] = {}
    alike: dict[str, Any] = {}
    settings = [""] * len(rows)
    if None in digests and len({*digests}) > 1:
        settings = [_settings(stage, row) for stage, row in zip(stages, rows, strict=True)]
    for stage, setting, digest in zip(stages, settings, digests, strict=True):
        if digest is not None:
            told.setdefault(stage, Counter())[digest] += 1
            alike.setdefault(setting, digest)
    usual = {stage: counts.most_common(1)[0][0] for stage, counts in told.items()}
    return [
        alike.get(setting, usual.get(stage)) if digest is None else digest
        for stage, setting, digest in zip(stages, settings, digests, strict=True)
    ]


def _settings(stage: str, row: Any) -> str:
    """Return the settings by which rows are held for scored alike, as a text."""
    spec = _mapping(row.spec)
    sections = [
        written_settings(spec.get("model"), ModelConfig),
        written_settings(spec.get("data"), DataConfig),
    ]
    return json.dumps([stage, *sections], sort_keys=True)


def written_settings(section: Any, kind: type[Section]) -> Any:
    """Return a section without the settings at their defaults, which older records may lack."""
    defaults = _defaults(kind)
    if not isinstance(section, dict):
        return section
    return {k: v for k, v in section.items() if k not in defaults or v != defaults[k]}


@cache
def _defaults(kind: type[Section]) -> dict[str, Any]:
    return kind().model_dump(mode="json")


def comparable(rows: Sequence[R], metric: str, statuses: Sequence[str] = ("finished",)) -> list[R]:
    """Return the rows with a score whose scores compare, in order: the largest such group.

    Of groups of one size it is that with the larger data.max_length, which has more to predict.
    """
    groups: dict[str, list[R]] = {}
    for row, group in zip(rows, comparison_groups(rows, metric), strict=True):
        if row.status in statuses and finite(row.metrics.get(metric)) is not None:
            groups.setdefault(group, []).append(row)
    return max(groups.values(), key=lambda group: (len(group), _length(group[0])), default=[])


def not_comparable(rows: Sequence[Any], metric: str, best: Any = None) -> list[bool]:
    """Return for each row whether its score, if it has one, does not compare with the best trial's.

    Without `best` it is the group of `comparable` that counts, of trials that ran to their end
    where any did.
    """
    chosen = [best] if best is not None else comparable(rows, metric)
    chosen = chosen or comparable(rows, metric, SCORED)
    if not chosen:
        return [False] * len(rows)
    *groups, here = comparison_groups([*rows, chosen[0]], metric)
    return [
        group != here and finite(row.metrics.get(metric)) is not None
        for row, group in zip(rows, groups, strict=True)
    ]


def centred(values: Sequence[float], groups: Sequence[str]) -> list[float]:
    """Return the values as if each group had the median and the spread of the largest one.

    Which of two groups is better nothing tells, and the scores of one may differ by far more than
    those of another; so a trial counts by how it stands within its own. The only one of a group is
    taken to be as good as most. The largest is that of those whose scores differ, if there is any.
    """
    if len({*groups}) < 2:
        return [*values]
    members: dict[str, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(value)
    medians = {group: statistics.median(some) for group, some in members.items()}
    spreads = {group: _spread(some, medians[group]) for group, some in members.items()}
    largest = max(members, key=lambda group: (spreads[group] > 0, len(members[group])))
    scales = {group: spreads[largest] / (spread or 1.0) for group, spread in spreads.items()}
    return [
        (value - medians[group]) * scales[group] + medians[largest] if group != largest else value
        for value, group in zip(values, groups, strict=True)
    ]


def _spread(values: Sequence[float], median: float) -> float:
    """Return the median absolute deviation, or the mean one where most values are the same."""
    deviations = [abs(value - median) for value in values]
    return statistics.median(deviations) or statistics.fmean(deviations)


def _of_answers(metric: str) -> bool:
    return metric in METRICS and score_of(metric).of_samples


def _length(row: Any) -> float:
    return finite(_mapping(_mapping(row.spec).get("data")).get("max_length")) or 0.0


def _profile(row: Any) -> dict[str, Any]:
    return _mapping(_mapping(row.scenario).get("data"))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}

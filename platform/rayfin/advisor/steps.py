"""How long to train: epochs from the number of samples, or the steps that a budget of time allows.

Published trainings of 7 to 70 billion parameters make about three passes over up to some tens of
thousands of samples, and mostly fewer over more:

| samples | epochs | source |
|---|---|---|
| 1,000 | 15 | LIMA, https://arxiv.org/abs/2305.11206 |
| 9,209 | 3.3 | QLoRA on OASST1, 1,875 steps of 16, https://arxiv.org/abs/2305.14314 |
| 27,540 | 2 | Llama 2-Chat, https://arxiv.org/abs/2307.09288 |
| 52,002 | 3 | Stanford Alpaca, https://github.com/tatsu-lab/stanford_alpaca |
| 170,000 | 3 | DoRA on commonsense reasoning, https://arxiv.org/abs/2402.09353 |
| 200,000 | 1 | Zephyr's first stage, https://arxiv.org/abs/2310.16944 |
| 326,154 | 2 | Tulu 2, https://arxiv.org/abs/2311.10702 |

The size of the model decides none of them: each names one number for all of its models, or has
models of one size alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rayfin.advisor.practice import STEP_SAMPLES
from rayfin.language import localized

EPOCHS = "train.num_train_epochs"
STEPS = "train.max_steps"

_USUAL, _MOST = 3, 15
"""Epochs of most of the sources, and LIMA's, the most."""
_MANY_ROWS, _VERY_MANY_ROWS = 60_000, 150_000
"""Samples from which two epochs are enough, and one: a convention within what the sources do, whose
epochs differ there."""
_FEWEST_STEPS = 100
"""Steps below which a small data set is passed more often: a convention, nothing measured."""
SHORTEST = 30
"""The steps that a budget has to leave: fewer are the rise of the learning rate and little else."""


def advised_epochs(rows: int) -> int:
    """Return the passes over so many training samples to start from; `rows` is 1 or more.

    3 to 60,000 samples, 2 to 150,000, then 1; more, up to 15, where that is fewer than 100 steps.
    """
    if rows > _MANY_ROWS:
        return 2 if rows <= _VERY_MANY_ROWS else 1
    each = math.ceil(rows / STEP_SAMPLES)
    return min(_MOST, max(_USUAL, math.ceil(_FEWEST_STEPS / each)))


def is_given(fixed: Mapping[str, Any]) -> bool:
    """Return whether the given settings, by their dotted names, say how long to train."""
    return EPOCHS in fixed or STEPS in fixed


def advised_length(rows: int | None, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the setting that says how long to train.

    It is empty where the given settings `fixed` say it, or nobody knows the number of samples.
    """
    return {} if rows is None or is_given(fixed) else {EPOCHS: advised_epochs(rows)}


def within_budget(steps: int, expected: float, longest: float, budget: float) -> tuple[int, bool]:
    """Return how many of `steps` to train within `budget` seconds, and whether that is possible.

    `expected` and `longest` are the seconds of all steps, as estimated and at most. The steps end
    in time at the longest; where that would be fewer than 30, which are no training, it is 30 if
    they are expected to end in time, and otherwise not possible.
    """
    least = min(SHORTEST, steps)
    left = min(steps, math.floor(steps * budget / longest))
    if left >= least:
        return left, True
    possible = math.floor(steps * budget / expected) >= least
    return (least if possible else steps), possible


def length_notes(rows: int | None, fixed: Mapping[str, Any]) -> list[str]:
    """Return the line that says how long to train and why, or why that is not advised."""
    if is_given(fixed):
        return []
    if rows is None:
        return [
            localized(
                "how long to train isn't advised, as the number of samples isn't known; rows or "
                "data.path says it"
            )
        ]
    epochs = advised_epochs(rows)
    return [
        localized(
            "{epochs} epoch{plural} over {rows} samples: published trainings pass 3 times over up "
            "to some {many} samples, fewer times over more, and up to {most} times over few; "
            "train.num_train_epochs says otherwise",
            epochs=epochs,
            plural="" if epochs == 1 else "s",
            rows=rows,
            many=_MANY_ROWS,
            most=_MOST,
        )
    ]


def cut_risk(train: Mapping[str, Any], rows: int | None, fixed: Mapping[str, Any]) -> str | None:
    """Return the line that says that a budget left fewer steps than advised, where it did.

    `train` is the section of what is recommended.
    """
    if rows is None or is_given(fixed) or train["num_train_epochs"] is not None:
        return None
    samples = train["per_device_train_batch_size"] * train["gradient_accumulation_steps"]
    steps, epochs = train["max_steps"], advised_epochs(rows)
    each = math.ceil(rows / samples)
    return localized(
        "budget_hours leaves {steps} steps, {share:.2g} epochs, of the advised {epochs} "
        "({all} steps): allow {times:.2g} times as long for them",
        steps=steps,
        share=steps / each,
        epochs=epochs,
        all=epochs * each,
        times=epochs * each / steps,
    )

"""Find the trials of a sweep that can't fit the memory of this machine, before they start."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from rayfin.advisor.estimate import Estimate, estimate
from rayfin.advisor.knowledge import measured_trials
from rayfin.advisor.lengths import SAMPLED
from rayfin.advisor.measurements import MeasuredTrial
from rayfin.config import Config, with_values
from rayfin.data.token_settings import TokenSettings
from rayfin.hardware import Hardware, describe_hardware
from rayfin.history import History
from rayfin.models import describe_model
from rayfin.objectives import objective_of
from rayfin.tuning.plan import PlannedTrial, SweepPlan

if TYPE_CHECKING:
    from rayfin.data import Corpus, DataProfile


class MemoryCheck:
    """Says why a sweep's trial can't run on this machine (see `rayfin.tuning.sweep.Refuse`).

    Most trials fit even if every sample is as long as possible, which takes a millisecond to tell.
    Only for the others are the history's trials read and the data tokenised.
    """

    def __init__(self, history: History, hardware: Hardware | None = None) -> None:
        """Check trials that run on `hardware`, or on this machine if it is not given."""
        self._history, self._hardware = history, hardware
        self._profiles: dict[tuple[object, ...], DataProfile] = {}
        # Every trial needs them, and those of a model on the hub come over the network.
        self._facts = functools.cache(describe_model)

    def __call__(self, plan: SweepPlan, trial: PlannedTrial) -> str | None:
        config = plan.space.config_of(trial.values)
        corpus = plan.corpus(config.data, objective_of(config.train))
        # No batch is larger than the data; of a step's samples each worker has as many.
        workers = config.scaling.num_workers
        batches = {
            "train.per_device_train_batch_size": max(1, len(corpus.train) // workers) * workers,
            "train.per_device_eval_batch_size": len(corpus.eval),
        }
        sizes = config.train.model_dump()
        config = with_values(
            config,
            {name: min(sizes[name.partition(".")[2]], most) for name, most in batches.items()},
        )
        counted = config.train.with_steps(trial.spec.train.max_steps)
        config = config.model_copy(update={"train": counted})
        self._hardware = self._hardware or describe_hardware(plan.config.scaling.use_gpu)
        hardware = _share(self._hardware, config)
        facts = self._facts(config.model)
        if estimate(config, facts, hardware).fits is True:
            return None
        found = estimate(
            config,
            facts,
            hardware,
            measured=self._measured,
            profile=self._profile(config, corpus),
        )
        return _refusal(found, hardware, config) if found.fits is False else None

    @cached_property
    def _measured(self) -> list[MeasuredTrial]:
        return measured_trials(self._history)

    def _profile(self, config: Config, corpus: Corpus) -> DataProfile:
        settings = TokenSettings.of(config.data, config.train)
        key = (config.data, config.model, objective_of(config.train).identity, settings)
        if key not in self._profiles:
            self._profiles[key] = sampled_profile(config, corpus)
        return self._profiles[key]


def sampled_profile(config: Config, corpus: Corpus) -> DataProfile:
    """Return the profile of the first samples of both splits, whose order is random."""
    from rayfin.data import tokenize_corpus
    from rayfin.models import load_tokenizer

    some = replace(corpus, train=corpus.train[:SAMPLED], eval=corpus.eval[: SAMPLED // 4])
    length, objective = config.data.max_length, objective_of(config.train)
    tokenizer = load_tokenizer(config.model, config.data.chat_template)
    settings = TokenSettings.of(config.data, config.train)
    return tokenize_corpus(some, tokenizer, length, objective, settings).profile


def _share(hardware: Hardware, config: Config) -> Hardware:
    """Return one trial's share of the hardware beside the trials that run at the same time.

    Their number is that which `rayfin.tuning.tune.trial_resources` lets run on one machine.
    """
    concurrent, workers = config.sweep.max_concurrent_trials, config.scaling.num_workers
    # One a device; and the workers of a group never share one.
    if concurrent == "auto" or (hardware.device == "cuda" and workers > 1):
        return hardware
    places = max(1, hardware.cpu_count // workers) if hardware.device == "cpu" else concurrent
    running = min(concurrent, config.sweep.num_samples, places)
    sharing = math.ceil(running / max(1, hardware.device_count))
    return replace(hardware, device_memory=hardware.device_memory // sharing)


def _refusal(found: Estimate, hardware: Hardware, config: Config) -> str:
    low, high, room = (
        f"{value / 2**30:.1f}" for value in (found.memory.low, found.memory.high, found.room)
    )
    workers = config.scaling.num_workers
    who = f"each of its {workers} workers ({found.strategy})" if workers > 1 else "it"
    return (
        f"not started: by the estimate {who} needs {low} to {high} GiB, and has {room} GiB on "
        f"{hardware.device_name}; rayfin estimate tells what for"
    )

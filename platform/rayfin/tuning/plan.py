"""What a sweep is going to run: its identity, its directory, and each of its trials."""

from __future__ import annotations

import functools
import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from rayfin.config import Config, DataConfig, MethodConfig, ModelConfig, dump_yaml, load_config
from rayfin.data import Corpus, load_corpus
from rayfin.data.conversion import check_shape
from rayfin.errors import RayfinError
from rayfin.models import identity
from rayfin.objectives import SFT, Objective, objective_of
from rayfin.paths import Storage, StoragePath, write_text
from rayfin.training import TrialSpec
from rayfin.training.companions import of_companions
from rayfin.training.spec import absolute
from rayfin.training.starting_adapter import StartingAdapter, read_starting_adapter, version_of
from rayfin.tuning.space import SearchSpace, Values

_CONFIG = "config.yaml"

TRIAL = "trial"
"""The one key of a Tune trial's configuration, which holds the PlannedTrial."""

RESULT = "trial_result"
"""The key of what a Tune trial reports that holds the TrialResult; the others are for Tune."""


@dataclass(frozen=True)
class PlannedTrial:
    """One point of the space, ready to run: what the search proposes, Tune carries and a worker
    trains."""

    trial_id: str
    fingerprint: str
    values: Values
    spec: TrialSpec
    location: StoragePath

    def __str__(self) -> str:
        """Return its id, by which Tune names the trial."""
        return self.trial_id


@dataclass(frozen=True)
class SweepPlan:
    """A sweep's name, configuration and storage, and the data that its trials read."""

    sweep_id: str
    config: Config
    storage: Storage
    corpora: dict[DataConfig, Corpus] = field(default_factory=dict)
    starts: dict[str, StartingAdapter] = field(default_factory=dict)
    """The adapters that its trials continue, by their directories."""

    @cached_property
    def space(self) -> SearchSpace:
        """The points that its trials may be, read from the configuration once."""
        return SearchSpace(self.config)

    @property
    def location(self) -> StoragePath:
        return self.storage.sweep(self.sweep_id)

    def save(self) -> None:
        """Write the resolved configuration, by which `find_resumable` knows the sweep again.

        It names the version of the adapter from which trials start: an alias may move.
        """
        file = self.location / _CONFIG
        start = self.start(self.space.pinned(self.config))
        config = self.config if start is None else _starting_from(self.config, start.name)
        write_text(file.path, dump_yaml(config))
        file.upload_file()

    def trial(self, values: Values) -> PlannedTrial:
        """Return the trial at one point: the same one for the same point, in any process."""
        spec = self.space.spec_of(values)
        corpus = self.corpus(spec.data, objective_of(spec.train))
        spec = spec.with_rows(corpus.rows)
        fingerprint = spec.fingerprint(
            model_identity=self.identity(spec.model),
            data_digest=corpus.digest,
            companions=of_companions(spec.train, spec.model, self.identity),
            start=None if (start := self.start(spec.method)) is None else start.identity,
        )
        trial_id = f"{self.sweep_id}-{fingerprint[:8]}"
        location = self.storage.trial(self.sweep_id, fingerprint[:8])
        return PlannedTrial(trial_id, fingerprint, values, spec, location)

    def start(self, method: MethodConfig) -> StartingAdapter | None:
        """Return the adapter that trials of a method continue; None where they start anew.

        The method is a specification's, which has the adapter's directory. Raises AdapterError.
        """
        if (directory := method.init_from) is None:
            return None
        if directory not in self.starts:
            self.starts[directory] = read_starting_adapter(Path(directory))
        return self.starts[directory]

    def corpus(self, data: DataConfig, objective: Objective = SFT) -> Corpus:
        """Return the samples of a data set, for trials of an objective.

        Raises DataError for rows of a format that the objective can't train on.
        """
        if data not in self.corpora:
            # Samples are the same at any length, and by any path: the data is read once.
            read = (c for d, c in self.corpora.items() if _samples(d) == _samples(data))
            self.corpora[data] = next(read, None) or load_corpus(data, objective)
        # It may have been read for another objective.
        check_shape(data, self.corpora[data].shape, objective)
        return self.corpora[data]

    @property
    def notes(self) -> list[str]:
        """Return what the data read so far asks to be told, each line once."""
        return list(dict.fromkeys(note for c in self.corpora.values() for note in c.notes))

    def identity(self, model: ModelConfig) -> str:
        return _identity(model)


def new_plan(config: Config, storage: Storage) -> SweepPlan:
    """Return a plan with a name of its own: what it tunes, on what, and when."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    # Two sweeps may start in the same second.
    return SweepPlan(f"{_subject(config)}-{stamp}-{secrets.token_hex(3)}", config, storage)


def _subject(config: Config) -> str:
    """Return what a sweep's name begins with."""
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(config.data.first_path).stem).strip("-") or "sweep"
    return f"{stem}-{config.method.type}".replace("_", "-")


def find_resumable(config: Config, storage: Storage) -> SweepPlan | None:
    """Return the newest sweep in `storage` that the same command started; None if there is none.

    Where it runs, how many trials it runs and what is done with the result may differ.
    """
    sweeps = storage.location / "sweeps"
    # The names of one command's sweeps differ in the time at which they began.
    names = (name for name in sweeps.names() if name.startswith(f"{_subject(config)}-"))
    for name in sorted(names, reverse=True):
        file = sweeps / name / _CONFIG
        try:
            if not file.download_file():
                continue
            saved = load_config(file.path)
            same = _starting_from(config, saved.method.init_from)
            if _what(saved) == _what(same):
                return SweepPlan(name, same, storage)
        except RayfinError:
            continue  # another version's sweep: not this command's
    return None


def _starting_from(config: Config, adapter: str | None) -> Config:
    """Return `config` with this version of its adapter, where it names one without a version."""
    if (version := version_of(config.method.init_from, adapter)) is None:
        return config
    method = config.method.model_copy(update={"init_from": version})
    return config.model_copy(update={"method": method})


def _what(config: Config) -> dict[str, Any]:
    sweep = config.sweep.model_dump(mode="json")
    for name in ("num_samples", "max_concurrent_trials", "max_failures", "report_samples"):
        del sweep[name]
    sweep["mode"] = config.sweep.direction
    # A swept method's defaults are each trial's own: what was written of it is what counts.
    swept = "method.type" in config.sweep.parameters
    written = config.method.model_dump(mode="json", exclude_unset=swept)
    method = {"type": config.method.type} | written
    spec = TrialSpec.of(config).model_dump(mode="json")
    del spec["train"]["sample_generations"]
    return spec | {"method": method, "sweep": sweep}


def _samples(data: DataConfig) -> DataConfig:
    tokens = {"max_length": 0, "truncation": "right", "chat_template": None, "system": None}
    return data.with_paths(absolute).model_copy(update=tokens)


# Hashing a large local model's headers takes a moment, and every trial asks.
_identity = functools.lru_cache(maxsize=64)(identity)

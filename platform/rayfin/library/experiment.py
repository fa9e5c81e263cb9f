"""What a sweep and a training share: storage, history and registry, and publishing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfin.config import Config, load_config
from rayfin.errors import RayfinError
from rayfin.library.messages import Say
from rayfin.library.stores import history_url
from rayfin.trackers import check_installed

if TYPE_CHECKING:
    from rayfin.adapters import AdapterVersion, Registry
    from rayfin.data import Corpus
    from rayfin.history import History, TrialRecord
    from rayfin.paths import Storage

ConfigSource = Config | Mapping[str, Any] | str | Path | None
"""A configuration, the settings of one by section, or the path of a YAML file that has them."""


def configuration(source: ConfigSource) -> Config:
    """Return the configuration that `source` is or describes; all defaults for None.

    Raises ConfigError, which names the setting, its value, what is allowed and the nearest name.
    """
    return source if isinstance(source, Config) else load_config(source)


class Failures:
    """The steps after the training that failed; none of them keeps the others from being done."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        """One for each step: what is missing, why, and the remedy."""

    @contextmanager
    def noting(self, what: str, remedy: str) -> Iterator[None]:
        """Turn whatever the block raises into a line; only an interruption goes on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # a library's too: no traceback helps the user
            why = str(error) if isinstance(error, RayfinError) else _named(error)
            self.lines.append(f"{what}: {' '.join(why.split())}; {remedy}")


def _named(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@dataclass(frozen=True)
class Experiment:
    """A configuration with its storage, history and registry, opened before any work is done."""

    config: Config
    storage: Storage
    history: History
    registry: Registry | None
    """Where the result is published; None where publish is null."""

    @classmethod
    def open(cls, config: Config) -> Experiment:
        """Open all of them; raises UsageErrors for what can't be used, before any work is done."""
        from rayfin.adapters import Registry, check_alias, check_name
        from rayfin.history import History
        from rayfin.paths import Storage

        check_installed(config.report_to)
        registry = None
        if (publish := config.publish) is not None:
            check_name(publish.name)
            if publish.alias is not None:
                check_alias(publish.alias)
            registry = Registry(Storage.at(config.registry_storage).adapters)
        url = history_url(config)  # refuses a bucket's before anything is asked of it
        storage = Storage.open(config.storage)
        return cls(config, storage, History.open(url), registry)

    def publish(self, row: TrialRecord, note: Say) -> AdapterVersion | None:
        """Make a trial's adapter a version of `publish.name`, or return the one that it is.

        Returns None where nothing is to be published. `note` is told where the name's versions
        have different base models. Raises StorageError where the adapter isn't there, and what
        `Registry.publish` raises.
        """
        from rayfin.adapters.metadata import trusted_metadata
        from rayfin.errors import StorageError
        from rayfin.models.bases import BASE_IDENTITY
        from rayfin.tuning.rows import adapter_place

        publish = self.config.publish
        if publish is None or self.registry is None or row.directory is None:
            return None
        for version in self.registry.list():
            # Not by the fingerprint alone: --rerun trains the same trial to other weights.
            same = [version.metadata.get(key) for key in ("fingerprint", "metrics")] == [
                row.fingerprint,
                row.trained_metrics,
            ]
            if version.name == publish.name and same:
                if publish.alias is not None and publish.alias not in version.aliases:
                    return self.registry.promote(publish.name, version.version, publish.alias)
                return version
        metadata = {
            "trial_id": row.trial_id,
            "sweep_id": row.sweep_id,
            "fingerprint": row.fingerprint,
            "base_model": row.spec["model"]["name"],
            "spec": row.spec,
            "metrics": row.trained_metrics,
            "versions": row.versions,
        }
        if (start := row.scenario.get("init_from")) is not None:
            metadata["init_from"] = start
        source = adapter_place(row)
        with source.reading_copy() as files:
            if files is None:
                raise StorageError(
                    f"'{source}' is not there, or not whole; --rerun trains it again"
                )
            known = row.scenario.get("model", {}).get("identity")
            # The trial's own rayfin.json knows more; in earlier versions it had none.
            if isinstance(known, str) and BASE_IDENTITY not in trusted_metadata(files):
                metadata[BASE_IDENTITY] = [known]
            published = self.registry.publish(publish.name, files, metadata, alias=publish.alias)
        if (other := self.registry.base_change_warning(published)) is not None:
            note(other)
        return published

    def unpublished(self, row: TrialRecord, again: str) -> tuple[str, str]:
        """Return what is missing, and the remedy, where a trial's adapter can't be published.

        `again` is the option with which the same command publishes it, if it needs one.
        """
        name = self.config.publish.name if self.config.publish is not None else ""
        return (
            f"trial {row.trial_id} is not published as '{name}'",
            f"its adapter stays in {row.directory}: mend that, and the same command{again} "
            "publishes it and trains nothing",
        )


def read_data(config: Config, note: Say) -> Corpus:
    """Return the configuration's data; `note` is told what there is to know of them.

    Raises DataError where the data can't be used.
    """
    from rayfin.data import load_corpus
    from rayfin.objectives import objective_of

    corpus = load_corpus(config.data, objective_of(config.train))
    for line in corpus.notes:
        note(line)
    return corpus


def adapter_name(config: Config) -> str:
    """Return the name to publish under: the one given, else that of the data."""
    if config.publish is not None:
        return config.publish.name
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", Path(config.data.first_path).stem)
    return stem.lstrip("._-")[:64] or "adapter"

"""What `sweep` and `train` share: their arguments, and publishing what they made."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rayfin.cli.places import history_url
from rayfin.cli.settings import add_settings, split_settings
from rayfin.errors import RayfinError
from rayfin.metrics import BASE, score_names
from rayfin.redaction import printable

if TYPE_CHECKING:
    from rayfin.adapters import AdapterVersion, Registry
    from rayfin.config import Config
    from rayfin.data import Corpus
    from rayfin.history import History, TrialRecord
    from rayfin.paths import Storage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument(
        "--rerun", action="store_true", help="train also what the history holds as finished"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(defaults=None)
    if parser.epilog is None:
        parser.epilog = (
            f"Example: {parser.prog} data.path=my.jsonl method.r=16 publish.name=mine. "
            f"All settings: {parser.prog} --settings. "
            "Exit codes: 0 done; 1 nothing was trained to its end; 2 a setting or place is wrong; "
            "3 trained, and publishing it or the report's sample answers failed; 130 interrupted."
        )


INCOMPLETE = 3
"""Exit code: what was trained is whole and recorded, and a step that follows it failed."""


class Failures:
    """Steps after the training that failed; none keeps the others from being done."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        """One for each: what is missing, why, and the remedy."""

    @contextmanager
    def noting(self, what: str, remedy: str) -> Iterator[None]:
        """Whatever the block raises becomes a line; only an interruption goes on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # a library's too: no traceback helps the user
            why = str(error) if isinstance(error, RayfinError) else _named(error)
            self.lines.append(f"{what}: {' '.join(why.split())}; {remedy}")


def _named(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def unpublished(config: Config, row: TrialRecord, again: str) -> tuple[str, str]:
    """What `Failures.noting` says where a trial's adapter can't be published."""
    name = config.publish.name if config.publish is not None else ""
    return (
        f"trial {row.trial_id} is not published as '{name}'",
        f"its adapter stays in {row.directory}: mend that, and the same command{again} publishes "
        "it and trains nothing",
    )


@dataclass(frozen=True)
class Workplace:
    """An experiment's configuration, and the places that it reads and writes."""

    config: Config
    storage: Storage
    history: History
    registry: Registry | None
    """Where results are published, if they are."""

    @classmethod
    def open(cls, args: argparse.Namespace) -> Workplace:
        """Opens all places before any work is done; raises UsageErrors for those it can't use."""
        from rayfin.adapters import Registry, check_alias, check_name
        from rayfin.config import load_config, parse_yaml
        from rayfin.history import History
        from rayfin.paths import Storage

        file, settings = split_settings(args.settings)
        defaults = parse_yaml(args.defaults, "defaults") if args.defaults else None
        config = load_config(file or defaults, settings)
        registry = None
        if (publish := config.publish) is not None:
            check_name(publish.name)
            if publish.alias is not None:
                check_alias(publish.alias)
            registry = Registry(Storage.at(config.registry_storage).adapters)
        url = history_url(config)  # refuses a bucket's before anything is asked of it
        storage = Storage.open(config.storage)
        return cls(config, storage, History.open(url), registry)

    def publish(self, row: TrialRecord) -> AdapterVersion | None:
        """Makes a trial's adapter a version of `publish.name`; the same result only once."""
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
        source = adapter_place(row)
        with source.borrowed() as files:
            if files is None:
                raise StorageError(
                    f"'{source}' is not there, or not whole; --rerun trains it again"
                )
            known = row.scenario.get("model", {}).get("identity")
            # The trial's own rayfin.json knows more; in earlier versions it had none.
            if isinstance(known, str) and BASE_IDENTITY not in trusted_metadata(files):
                metadata[BASE_IDENTITY] = [known]
            published = self.registry.publish(publish.name, files, metadata, alias=publish.alias)
        if (note := self.registry.other_base(published)) is not None:
            print(printable(note), file=sys.stderr, flush=True)
        return published


def read_data(config: Config) -> Corpus:
    """Returns the configuration's data; what is to be told of it goes to standard error.

    Raises DataError where the data can't be used.
    """
    from rayfin.data import load_corpus

    corpus = load_corpus(config.data)
    for note in corpus.notes:
        print(printable(note), file=sys.stderr, flush=True)
    return corpus


def adapter_name(config: Config) -> str:
    """The name to publish under: the one given, else that of the data."""
    if config.publish is not None:
        return config.publish.name
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", Path(config.data.path).stem)
    return stem.lstrip("._-")[:64] or "adapter"


def comparison(row: TrialRecord) -> list[tuple[str, float, float]]:
    """(metric, base model's, trained model's) for every metric that both have."""
    return [
        (name, row.metrics[BASE + name], row.metrics[name])
        for name in score_names()
        if name in row.metrics and BASE + name in row.metrics
    ]


def comparison_lines(row: TrialRecord) -> list[str]:
    """Aligned lines for people."""
    return [f"  {name:15} {base:9.4f} -> {ours:9.4f}" for name, base, ours in comparison(row)]

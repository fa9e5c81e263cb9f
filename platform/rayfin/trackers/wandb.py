"""Weights & Biases: a run for each trial, in the group of its sweep."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayfin.errors import ConfigError
from rayfin.redaction import redact_url
from rayfin.statuses import SCORED
from rayfin.trackers.base import PROJECT, Answers, Point, Run, Tracker, register

_PATIENCE = 20.0
"""Seconds in which a run must have started, or have been sent when it ends."""
_COLUMNS = ["prompt", "answer", "ended", "reference"]


@register
class WeightsAndBiases(Tracker):
    """Writes to the project $WANDB_PROJECT or `rayfin`, as $WANDB_MODE says: online or offline.

    W&B's own process keeps what it is given in files under $WANDB_DIR, by default the storage, and
    sends it from there. Nothing is recorded but what rayfin gives it: no output of the terminal,
    no command line, no code and no facts about the machine.
    """

    name = "wandb"
    package = "wandb"

    def __init__(self, storage: Path | None) -> None:
        super().__init__(storage)
        import wandb

        self._wandb = wandb
        settings = wandb.setup().settings  # of the environment and W&B's own files
        self._disabled = settings.mode == "disabled"
        self._offline = settings.mode in ("offline", "dryrun")
        local = self._disabled or self._offline
        if not local and not settings.api_key and not _logged_in(settings.base_url):
            raise ConfigError(
                "report_to=wandb: there is no API key; run `wandb login`, set WANDB_API_KEY, or "
                "keep the runs on this machine by WANDB_MODE=offline"
            )
        self._server = redact_url(settings.base_url)
        self._project = os.environ.get("WANDB_PROJECT") or PROJECT
        self._directory = os.environ.get("WANDB_DIR") or os.fspath(storage or Path.cwd())
        self._settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            finish_timeout=_PATIENCE,  # also where W&B ends its runs as the process exits
            finish_timeout_raises=True,
            init_timeout=_PATIENCE,
            save_code=False,
            silent=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
        )
        self._runs: dict[str, Any] = {}
        self._tries: dict[str, int] = {}
        self._unsent: list[str] = []

    @property
    def location(self) -> str:
        if self._disabled:
            return "nothing is kept or sent, as its mode is disabled (WANDB_MODE)"
        if self._offline:
            return f"{self._directory}/wandb (offline; `wandb sync` sends it)"
        return f"project {self._project}"

    @property
    def address(self) -> str:
        if self._disabled:
            return "disabled"
        if self._offline:  # the storage's own directory may move with the storage
            return f"offline {os.environ.get('WANDB_DIR') or 'storage'} {self._project}"
        return f"{self._server} {self._project}"

    def start(self, run: Run, key: str, native: str | None, parent: str | None) -> str:
        if native is None:
            # W&B takes an id whose start has failed for one in use.
            self._tries[key] = self._tries.get(key, 0) + 1
            native = key if self._tries[key] == 1 else f"{key}-{self._tries[key]}"
        if native in self._runs:
            return native
        self._runs[native] = self._wandb.init(
            project=self._project,
            id=native,
            name=run.title,
            group=run.sweep.run_id if run.sweep is not None else run.run_id,
            job_type="sweep" if run.is_sweep else "trial",
            resume="allow",
            reinit="create_new",
            dir=self._directory,
            settings=self._settings,
        )
        return native

    def configure(self, native: str, settings: Mapping[str, Any]) -> None:
        self._runs[native].config.update(dict(settings))

    def log(self, native: str, points: Sequence[Point]) -> None:
        for step, values in points:
            self._runs[native].log(values, step=step)

    def show(self, native: str, answers: Sequence[Answers]) -> None:
        for step, some in answers:
            rows = [[one[column] for column in _COLUMNS] for one in some]
            table = self._wandb.Table(columns=[*_COLUMNS], data=rows)
            # Without a step of its own: a later point of a lower one would be dropped.
            self._runs[native].log({f"answers/step_{step}": table}, commit=False)

    def tag(self, native: str, tags: Mapping[str, str]) -> None:
        self._runs[native].config.update(dict(tags), allow_val_change=True)

    def attach(self, native: str, file: Path) -> None:
        self._runs[native].save(os.fspath(file), base_path=os.fspath(file.parent), policy="now")

    def end(self, native: str, run: Run) -> None:
        self._runs[native].summary.update(dict(run.figures))
        self._finish(self._runs.pop(native), exit_code=0 if run.status in SCORED else 1)

    def close(self) -> None:
        """Finish what still runs; raises RuntimeError, with the remedy, for what W&B holds back."""
        for found in self._runs.values():
            self._finish(found)
        if self._unsent:
            raise RuntimeError(
                f"what it took of {len(self._unsent)} run(s) is not sent; "
                f"`wandb sync {' '.join(self._unsent)}` sends it"
            )

    def _finish(self, run: Any, exit_code: int = 0) -> None:
        directory = os.fspath(Path(run.dir).parent)
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError:  # what it was given stays there
            self._unsent.append(directory)


def _logged_in(url: str) -> bool:
    """Whether `wandb login` has left a key for the server."""
    import netrc
    from urllib.parse import urlsplit

    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(url).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False

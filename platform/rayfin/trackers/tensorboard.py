"""TensorBoard: a directory of event files for each run, which its own reader shows."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayfin.errors import ConfigError
from rayfin.statuses import FAILED
from rayfin.trackers.base import Answers, Point, Run, Tracker, answers_table, register

_DIRECTORY = "TENSORBOARD_LOGGING_DIR"


@register
class TensorBoard(Tracker):
    """Writes event files under $TENSORBOARD_LOGGING_DIR, by default `<storage>/tensorboard`.

    Each event is written by the thread that calls, so that a full disk is noticed: the writers that
    TensorBoard offers beside write in threads of their own, which end silently.
    """

    name = "tensorboard"
    package = "tensorboard"

    def __init__(self, storage: Path | None) -> None:
        super().__init__(storage)
        given = os.environ.get(_DIRECTORY)
        if not given and storage is None:
            raise ConfigError(
                "report_to=tensorboard: event files can't be in a bucket; name a directory on this "
                f"machine by {_DIRECTORY}=DIR"
            )
        self._directory = Path(given).resolve() if given else Path(storage or "") / "tensorboard"
        self._files: dict[str, Any] = {}

    @property
    def location(self) -> str:
        return f"tensorboard --logdir {self._directory}"

    @property
    def address(self) -> str:
        """The directory that was named; the storage's own may move with the storage."""
        return os.fspath(self._directory) if os.environ.get(_DIRECTORY) else "storage"

    def start(self, run: Run, key: str, native: str | None, parent: str | None) -> str:
        if native is None:
            own = run.run_id.removeprefix(f"{run.sweep.run_id}-") if run.sweep else key
            native = f"{parent}/{own}" if parent else own
        return native

    def configure(self, native: str, settings: Mapping[str, Any]) -> None:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        values = {key: "null" if it is None else it for key, it in settings.items()}
        rows = "".join(f"| {key} | {value} |\n" for key, value in values.items())
        text = _text("settings", f"| setting | value |\n| --- | --- |\n{rows}")
        self._write(native, [hparams_pb(values), text])

    def log(self, native: str, points: Sequence[Point]) -> None:
        for step, values in points:
            self._write(native, _scalars(values), step)

    def show(self, native: str, answers: Sequence[Answers]) -> None:
        for step, some in answers:
            self._write(native, [_text("answers", answers_table(some))], step)

    def tag(self, native: str, tags: Mapping[str, str]) -> None:
        self._write(native, [_text(key, value) for key, value in tags.items()])

    def attach(self, native: str, file: Path) -> None:
        """Name the file: event files hold none."""
        self._write(native, [_text(file.name, os.fspath(file))])

    def end(self, native: str, run: Run) -> None:
        step = run.points[-1][0] if run.points else 0
        final = _scalars({f"final/{name}": value for name, value in run.figures.items()})
        self._write(native, [*final, _session_end(run)], step)
        self._files.pop(native).close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _write(self, native: str, summaries: Iterable[Any], step: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        if native not in self._files:
            directory = self._directory / native
            directory.mkdir(parents=True, exist_ok=True)
            # The last part of the name, or two files of one second would be the same.
            name = f"events.out.tfevents.{time.time():.0f}.rayfin.{secrets.token_hex(4)}"
            self._files[native] = (directory / name).open("xb")
            summaries = [None, *summaries]
        try:
            for summary in summaries:
                what = (
                    {"file_version": "brain.Event:2"} if summary is None else {"summary": summary}
                )
                _record(self._files[native], Event(wall_time=time.time(), step=step, **what))
            self._files[native].flush()
        except OSError:  # a torn event hides all that follow it: the next try begins a file
            del self._files[native]
            raise


def _record(file: Any, event: Any) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    RecordWriter(file).write(event.SerializeToString())


def _scalars(values: Mapping[str, float]) -> list[Any]:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return [Summary(value=[Summary.Value(tag=k, simple_value=it)]) for k, it in values.items()]


def _text(tag: str, text: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.text.metadata import create_summary_metadata

    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
    metadata = create_summary_metadata(display_name=tag, description="")
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])


def _session_end(run: Run) -> Any:
    """Return the end of a run for the table of hyperparameters."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    status = api_pb2.STATUS_FAILURE if run.status in FAILED else api_pb2.STATUS_SUCCESS
    end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=run.changed.timestamp())
    data = plugin_data_pb2.HParamsPluginData(session_end_info=end)
    value = Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG, metadata=metadata.create_summary_metadata(data)
    )
    return Summary(value=[value])

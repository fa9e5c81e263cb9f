"""A laboratory for sweeps runs real drivers in their own processes, on a tiny model and file."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import secrets
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

from rayfin.cli import main
from rayfin.history import History, TrialRecord
from rayfin.paths import StoragePath, cache_dir

ROOT = Path(__file__).parents[2]
COLOURS = ("red", "blue", "green", "pink", "gold", "teal", "grey", "lime")
PATIENCE = 540.0
"""Seconds in which a running command does the next thing that a test waits for."""
END = 560.0
"""Seconds in which one that a test waits for has ended; below pytest's own bound of 600."""


def load(path: Path) -> Any:
    """Import a module by its path: pytest imports test files only."""
    spec = importlib.util.spec_from_file_location(f"rayfin_tests_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


processes = load(ROOT / "tests" / "processes.py")


def until(true: Callable[[], Any], runs: Callable[[], None]) -> Any:
    """Ask again and again, and return the first true answer.

    `runs` raises when none can come any more. Raises AssertionError after `PATIENCE` seconds.
    """
    give_up = time.monotonic() + PATIENCE
    while not (answer := true()):
        runs()
        assert time.monotonic() < give_up, "nothing happened"
        time.sleep(0.15)  # each question costs about a fifteenth of that of a core
    return answer


class Meanwhile(threading.Thread):
    """A thread that acts on a command which this process runs in the block.

    Its errors are raised when the block ends.
    """

    def __init__(self, act: Callable[[Meanwhile], None]) -> None:
        super().__init__(daemon=True)
        self._act, self._over = act, threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._act(self)
        except BaseException as error:
            self._error = error

    def until(self, true: Callable[[], Any]) -> Any:
        """Ask again and again while the block lasts, and return the first true answer."""

        def runs() -> None:
            assert not self._over.is_set(), "ended too early"

        return until(true, runs)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
        if self._error is not None:
            raise self._error


class Driver:
    """A running rayfin command, whose output is read when it has ended."""

    def __init__(self, lab: Lab, arguments: list[str]) -> None:
        self.lab = lab
        self.process = subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=lab.root,
            env=lab.environment,
            start_new_session=True,  # so that Ctrl-C reaches what a terminal's would, and no more
        )
        self.out = self.err = ""

    def end(self, bound: float = END) -> int:
        """Wait until it ends of itself, and return its exit code.

        The bound is there for what hangs: how long training takes, a busy machine decides. Raises
        AssertionError with the errors so far when it has not ended after `bound` seconds.
        """
        try:
            self.out, self.err = self.process.communicate(timeout=bound)
        except subprocess.TimeoutExpired as error:
            said = (error.stderr or b"").decode(errors="replace")
            raise AssertionError(f"not ended after {bound:g} seconds:\n{said}") from None
        return self.process.returncode

    def close(self) -> None:
        """End it with all that descends from it, Ray's processes too."""
        processes.end_family(self.process)

    def until(self, true: Callable[[], Any]) -> Any:
        """Ask again and again while the driver runs, and return the first true answer."""

        def runs() -> None:
            assert self.process.poll() is None, f"ended too early:\n{self._errors()}"

        return until(true, runs)

    def _errors(self) -> str:
        """Return its errors, or those so far when a process that it started still has the pipe."""
        try:
            return self.process.communicate(timeout=PATIENCE)[1]
        except subprocess.TimeoutExpired as error:
            return (error.stderr or b"").decode(errors="replace")

    def amid(self, *, finished: int, step: int = 1) -> TrialRecord:
        """Wait for so many finished trials and a running one that has saved `step`; return it."""

        def running() -> TrialRecord | None:
            rows = self.lab.rows()
            if sum(row.status == "finished" for row in rows) < finished:
                return None
            found = [row for row in rows if row.status == "running" and self.lab.saved(row) >= step]
            return found[-1] if found and "worker" in found[-1].scenario else None

        row: TrialRecord = self.until(running)
        return row

    def kill(self) -> None:
        """Send SIGKILL, and wait until all of Ray's processes have noticed and ended."""
        assert not self.lab.enter, "it would be `nsenter` that is killed, and not the driver"
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.out, self.err = self.process.communicate(timeout=PATIENCE)
        left = psutil.wait_procs(family, timeout=PATIENCE)[1]
        assert left == [], "processes outlive their driver"

    def interrupt(self) -> int:
        """Interrupt all processes of its session, as Ctrl-C in a terminal does; return its code."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.end()


class Lab:
    """A directory with data, and the commands that run in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.storage = root / "runs"
        self.data = root / "colours.jsonl"
        rows = [
            {"prompt": f"say {name}{' please' * (i % 4)} {i}", "completion": name[::-1]}
            for name in COLOURS
            for i in range(5)
        ]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT / "platform"),
            # Threads that spin while they wait make a busy machine several times slower.
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
        }
        self.environment.pop("RAY_ADDRESS", None)
        self.enter: list[str] = []  # what a command begins with that runs elsewhere, as on a node
        self._drivers: list[Driver] = []
        self._read: tuple[list[tuple[int, int]], list[TrialRecord]] = [], []

    @property
    def settings(self) -> list[str]:
        """Return a LoRA trial on the tiny model; no report loads the model again."""
        return [
            "model.name=tiny",
            "method.type=lora",
            "method.quantization_bit=null",  # the scripts' own is 4, and stays
            f"data.path={self.data}",
            "data.max_length=128",  # so much that no driver loads a tokenizer to check it
            "sweep.report_samples=0",
            f"storage={self.storage}",
        ]

    def script(self, name: str, *arguments: str) -> Driver:
        """Start experiments/`name`."""
        return self._start([str(ROOT / "experiments" / name), *self.settings, *arguments])

    def rayfin(self, verb: str, *arguments: str) -> Driver:
        """Start `rayfin verb`."""
        return self._start(["-m", "rayfin", verb, *self.settings, *arguments])

    def program(self, text: str, *arguments: str) -> Driver:
        """Start Python with this program."""
        return self._start(["-c", text, *arguments])

    @staticmethod
    def here(command: Callable[[], int]) -> int:
        """Run a command in this process, on the Ray that it has, and return the exit code.

        Ctrl-C finds Python's own handler, whatever another test's library has left.
        """
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            code = command()
            left = signal.getsignal(signal.SIGINT)
            assert left is signal.default_int_handler, "it takes Ctrl-C from what follows it"
            return code
        finally:
            if before is not None:  # it can be put back
                signal.signal(signal.SIGINT, before)

    def rayfin_here(self, *words: str) -> int:
        """Run `rayfin` with these words alone in this process, and return the exit code."""
        return self.here(lambda: main(words))

    def script_here(self, name: str, *arguments: str) -> int:
        """Run experiments/`name` in this process, and return the exit code."""

        def command() -> int:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [name, *self.settings, *arguments])
                try:
                    runpy.run_path(str(ROOT / "experiments" / name), run_name="__main__")
                except SystemExit as ended:
                    return int(ended.code or 0)
                else:
                    return 0

        return self.here(command)

    @staticmethod
    def lines(process: subprocess.Popen[str]) -> Any:
        """The lines that a process writes, each waited for within a bound: see processes.py."""
        return processes.Lines(process)

    @staticmethod
    def end_family(process: subprocess.Popen[str]) -> None:
        """Kill a process with all that descends from it: see processes.py."""
        processes.end_family(process)

    @staticmethod
    def runs(process: psutil.Process) -> bool:
        """Whether a process has not ended."""
        answer: bool = processes.runs(process)
        return answer

    @staticmethod
    def meanwhile(act: Callable[[Meanwhile], None]) -> Meanwhile:
        """Return a block during which a thread does `act`."""
        return Meanwhile(act)

    def typed(self, *words: str) -> Driver:
        """Start `rayfin` with these words alone."""
        return self._start(["-m", "rayfin", *words])

    def disk(self, name: str) -> dict[str, str]:
        """Return the environment of a machine whose disk no other machine sees."""
        own = self.root / name
        own.mkdir(exist_ok=True)
        for shared in ("models", "kernels"):
            if not (own / shared).exists():
                (own / shared).symlink_to((cache_dir() / shared).resolve())
        return {"RAYFIN_CACHE": str(own)}

    def in_bucket(self, place: str) -> list[str]:
        """Return settings that put runs into a bucket, and the history where `rows` reads it."""
        self.storage.mkdir(exist_ok=True)
        return [f"storage={place}", f"history=sqlite:///{self.storage / 'history.sqlite'}"]

    def rows(self) -> list[TrialRecord]:
        """Return the history's rows, which are read again only when they have changed."""
        file = self.storage / "history.sqlite"
        state: list[tuple[int, int]] = []
        for at in (file, file.with_name(f"{file.name}-wal")):
            with suppress(FileNotFoundError):
                found = at.stat()
                state.append((found.st_mtime_ns, found.st_size))
        if file.exists() and state != self._read[0]:
            with History.open(f"sqlite:///{file}") as history:
                self._read = state, history.trials()
        return list(self._read[1])

    def _start(self, arguments: list[str]) -> Driver:
        self._drivers.append(Driver(self, [*self.enter, sys.executable, *arguments]))
        return self._drivers[-1]

    @staticmethod
    def checkpoints(row: TrialRecord) -> list[StoragePath]:
        """Return the trial's whole checkpoints, the newest last."""
        assert row.directory is not None
        place = StoragePath.at(row.directory) / "checkpoints"
        found = [place / name for name in place.names()]
        return sorted((at for at in found if at.exists()), key=Lab._step)

    @staticmethod
    def _step(checkpoint: StoragePath) -> int:
        return int(checkpoint.path.name.removeprefix("checkpoint-"))

    @staticmethod
    def saved(row: TrialRecord) -> int:
        """Return the step of the trial's newest checkpoint, or 0 when it has none."""
        return max(map(Lab._step, Lab.checkpoints(row)), default=0)

    @staticmethod
    def processes(title: str) -> list[psutil.Process]:
        """Return descendants of this process by title: Ray names a process for what it runs."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # it has just ended
                if title in " ".join(process.cmdline()[:1]):
                    found.append(process)
        return found

    @staticmethod
    def mark(row: TrialRecord) -> float:
        """Write a loss into the checkpoint that no training gives, and return it.

        A trial that resumes from there reports it.
        """
        checkpoint = Lab.checkpoints(row)[-1]
        assert checkpoint.download()
        path = checkpoint.path / "trainer_state.json"
        state = json.loads(path.read_text())
        state["log_history"][0]["loss"] = 123.25
        path.write_text(json.dumps(state))
        sums = json.loads((path.parent / "sums.json").read_text())
        sums[path.name] = [path.stat().st_size, zlib.crc32(path.read_bytes())]
        (path.parent / "sums.json").write_text(json.dumps(sums))
        checkpoint.upload()
        return 123.25

    @staticmethod
    def losses(row: TrialRecord) -> list[float]:
        """Return the training losses of the trial's curve."""
        return [point["loss"] for point in row.curve if "loss" in point]

    def close(self) -> None:
        """End what a failed test left running."""
        for driver in self._drivers:
            driver.close()  # one that has ended, too: its pipes may be open


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A network to plug machines into; Ray on them asks for a token."""
    nodes = load(Path(__file__).with_name("nodes.py"))
    if (lacking := nodes.missing()) is not None:
        pytest.skip(f"machines can't be played here, for want of {lacking}")
    lab = Lab(tmp_path_factory.mktemp("network"))
    lab.environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "OPENBLAS_NUM_THREADS": "1",
    }
    network = nodes.Network(lab)
    yield network
    network.end()


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Start a Ray cluster of two CPUs in this process; the value is its address."""
    import ray

    from rayfin.tuning.cluster import ray_cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        patch.setenv("PYTHONPATH", str(ROOT / "platform"))
        with ray_cluster(None, num_cpus=2):
            yield ray.get_runtime_context().gcs_address

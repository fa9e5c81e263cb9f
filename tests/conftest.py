"""What all tests share."""

import gc
import importlib.util
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes, a busy machine decides.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

# Before any test loads torch: see rayfin.cli, which does the same for the command line.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Several processes test at a time: more threads in each than it needs only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Ray's workers give way to all else, and would starve beside another test.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Answers are compared in English, whatever the language of the machine.
os.environ.setdefault("LC_MESSAGES", "C")
# A shell starts what it runs in the background with Ctrl-C ignored, and all commands that tests
# start, and interrupt, would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# And nohup has the end of the terminal ignored.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class BitsandbytesFirst(MetaPathFinder):
    """Imports bitsandbytes without its compiler before PEFT, as rayfin does: 2 s of a processor."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name == "peft":
            from rayfin.models import import_bitsandbytes

            sys.meta_path.remove(self)
            import_bitsandbytes()


sys.meta_path.insert(0, BitsandbytesFirst())


def helper(name: str) -> ModuleType:
    """A module beside this file: pytest imports test files only."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"rayfin_tests_{name}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def rounding() -> ModuleType:
    """How far results may lie apart: rounding.py."""
    return helper("rounding")


@pytest.fixture(scope="session")
def processes() -> ModuleType:
    """Ending what a test has started, and reading from it, within bounds: processes.py."""
    return helper("processes")


@pytest.fixture
def popen(processes: ModuleType) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`subprocess.Popen` of text; what it started has ended after the test, its pipes are closed.

    Also when the test fails, or else what it leaves would be the next test's error.
    """
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(subprocess.Popen(*arguments, text=True, **options))
        return started[-1]

    yield start
    for process in started:
        processes.end_family(process)


@pytest.fixture(scope="session")
def chatml() -> ModuleType:
    """A base whose template ends turns with a token of its own: chatml.py."""
    return helper("chatml")


@pytest.fixture(scope="session", autouse=True)
def advisor_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the advisor learns of the tests' histories is no part of the user's cache.

    The rest of it is shared: converted models and compiled kernels take long to make.
    """
    from rayfin.paths import cache_dir

    own, shared = tmp_path_factory.mktemp("cache"), cache_dir()
    for name in ("models", "kernels"):
        (shared / name).mkdir(parents=True, exist_ok=True)
        (own / name).symlink_to(shared / name)
    from rayfin.hardware import remember_bfloat16_gain

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYFIN_CACHE", str(own))
        remember_bfloat16_gain(1.0)  # results are those of float32 on every processor
        yield own


def pytest_report_header(config: pytest.Config) -> list[str]:
    """What decides how numbers are rounded."""
    return helper("numerics").arithmetic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=1, help="moments at which tests kill (default 1)")
    parser.addoption("--long", action="store_true", help="run the tests marked `long` too")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("patient") and item.config.getoption("--kills") < 2:
        pytest.skip("it takes two minutes of a quiet machine: with --kills 2 or more")
    if item.get_closest_marker("long") and not item.config.getoption("--long"):
        pytest.skip("it runs with --long, as in .ci/run")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported stays: the collector need not look at it, neither now nor in every test."""
    from rayfin.collector import collector_paused

    with collector_paused():
        result = yield
    gc.freeze()
    return result


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start Ray come first, then those with other slow tests.

    They wait more than they compute: beside each other, and beside the many short ones, they
    keep the processors busy, where a long file that came last would have them to itself.
    """
    marks: dict[Path, set[str]] = {}
    for item in items:
        marks.setdefault(item.path, set()).update(mark.name for mark in item.iter_markers())

    def rank(item: pytest.Item) -> int:
        found = marks[item.path]
        return 0 if "ray" in found else 1 if "slow" in found else 2

    items.sort(key=rank)


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    """At how many random moments a test kills."""
    return int(request.config.getoption("--kills"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "moment" in metafunc.fixturenames:
        times = metafunc.config.getoption("--kills")
        metafunc.parametrize("moment", range(times), indirect=True)


@pytest.fixture
def moment() -> random.Random:
    """Chooses when a test kills, which runs `--kills` times."""
    seed = time.time_ns()
    print(f"the moments are those of random.Random({seed})")
    return random.Random(seed)


GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture
def storage_v1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What commit fd5c07d left in a directory, which is the current one: see golden/README.md.

    The history's rows say where it was made; they are changed to say where it lies now.
    """
    directory = tmp_path / "storage_v1"
    with tarfile.open(GOLDEN / "storage_v1.tar.xz") as archive:
        archive.extractall(directory, filter="data")
    with closing(sqlite3.connect(directory / "runs" / "history.sqlite")) as history, history:
        names = "SELECT t.name, c.name FROM sqlite_master t, pragma_table_info(t.name) c"
        for table, column in history.execute(f"{names} WHERE t.type = 'table'").fetchall():
            history.execute(
                f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) '
                f"WHERE typeof(\"{column}\") = 'text'",
                ("/golden/", f"{directory}/"),
            )
    monkeypatch.chdir(directory)
    return directory


BUCKET = "s3://rayfin-test"


@pytest.fixture(scope="session")
def s3_elsewhere() -> Callable[..., AbstractContextManager[dict[str, str]]]:
    """`s3_server`, for servers beside the common one."""
    return s3_server


@pytest.fixture(scope="session")
def s3() -> Iterator[dict[str, str]]:
    """An S3 server: the environment from which it is reached."""
    with s3_server() as environment:
        yield environment


@pytest.fixture
def bucket(s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place in a bucket, which processes started from here reach too."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    return f"{BUCKET}/{tmp_path.name}"


@contextmanager
def s3_server(*enter: str, address: str = "127.0.0.1") -> Iterator[dict[str, str]]:
    """The environment from which the server, and the bucket in it, is reached.

    `enter`: what a command begins with that runs elsewhere, as on a node.
    """
    command = [*enter, sys.executable, str(Path(__file__).with_name("s3.py")), address]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    processes = helper("processes")
    try:
        port = int(processes.Lines(server).next())
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        place = {"AWS_ENDPOINT_URL": f"http://{address}:{port}", "AWS_REGION": "us-east-1"}
        yield keys | place
    finally:
        processes.end_family(server)

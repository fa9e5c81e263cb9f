"""cluster/spot_notice.py against a metadata service of our own, beside a process that looks like
Ray's; the command that drains is kept, not run. tests/ray/ has it on a real node.
"""

import os
import pty
import re
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "cluster" / "spot_notice.py"
NODE = "5" * 56
PATIENCE = 540.0

# In the place of Ray's: writes down how it was called; fails as often as the file says.
DRAIN = """
import pathlib, sys
here = pathlib.Path(__file__).parents[2]
with (here / "drained").open("a") as file:
    print(*sys.argv[1:], sep="|", file=file)
failures = here / "failures"
if failures.exists() and (left := int(failures.read_text())):
    failures.write_text(str(left - 1))
    sys.exit("the head does not answer")
"""


class Service(ThreadingHTTPServer):
    """A cloud's metadata service: gives the answers in turn, and the last one for ever.

    An answer is a status, or a body, or None for a connection that ends without one.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[int | str | None] = []
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def next(self) -> int | str | None:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_PUT(self) -> None:
        lasting = int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"])
        if self.path != "/latest/api/token" or not 1 <= lasting <= 21600:
            return self.answer(400)
        self.server.tokens.add(token := secrets.token_hex(8))
        return self.answer(token)

    def do_GET(self) -> None:
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers["X-aws-ec2-metadata-token"] not in self.server.tokens:
                return self.answer(401)
        elif self.path.startswith("/computeMetadata/v1/instance/preempted"):
            if self.headers["Metadata-Flavor"] != "Google":
                return self.answer(403)
        else:
            return self.answer(400)
        self.server.asked.append(self.path)
        return self.answer(self.server.next())

    def answer(self, answer: int | str | None) -> None:
        if answer is None:
            self.close_connection = True
            return
        body = answer.encode() if isinstance(answer, str) else b"<html>an error</html>"
        self.send_response(200 if isinstance(answer, str) else answer)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f"a/b{len(self.server.asked)}")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as made:
        thread = Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


class Machine:
    """A machine with a Ray node, and the watcher beside it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # A cluster that no other process of this machine is a node of.
        self.address = f"192.0.2.1:{os.getpid()}-{secrets.token_hex(4)}"
        package = directory / "ray" / "scripts"
        package.mkdir(parents=True)
        for each in (package, package.parent):
            (each / "__init__.py").touch()
        (package / "scripts.py").write_text(DRAIN)
        self.processes: list[subprocess.Popen[str]] = []
        options = ("-c", "read line", f"--node_id={NODE}", f"--gcs-address={self.address}")
        self.ray = subprocess.Popen(
            ["/opt/ray/raylet", *options], executable="/bin/sh", stdin=subprocess.PIPE, text=True
        )
        self.processes.append(self.ray)

    def watch(self, cloud: str, service: str) -> subprocess.Popen[str]:
        options = ("--address", self.address, "--service", service, "--pause", "0.02")
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), cloud, *options],
            # The metadata service is asked directly, whatever the proxy.
            env=os.environ
            | {"PYTHONPATH": str(self.directory), "http_proxy": "http://192.0.2.9:1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes.append(process)
        return process

    def end_ray(self) -> None:
        self.ray.communicate("\n", timeout=PATIENCE)

    @property
    def drained(self) -> list[str]:
        """How Ray was called to drain."""
        file = self.directory / "drained"
        return file.read_text().splitlines() if file.exists() else []

    def seconds(self) -> int:
        """Of the one call, which must be as Ray wants it."""
        (call,) = self.drained
        expected = rf"drain-node\|--address={re.escape(self.address)}\|--node-id={NODE}\|"
        expected += r"--reason=DRAIN_NODE_REASON_PREEMPTION\|--reason-message=[^|]+\|"
        found = re.fullmatch(expected + r"--deadline-remaining-seconds=(\d+)", call)
        assert found is not None, call
        return int(found[1])


@pytest.fixture
def machine(tmp_path: Path, processes: ModuleType) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    for process in made.processes:
        processes.end_family(process)


def notice(seconds: float) -> str:
    """AWS's, of a machine that goes in so many seconds."""
    time = datetime.now(UTC) + timedelta(seconds=seconds)
    return f'{{"action": "terminate", "time": "{time:%Y-%m-%dT%H:%M:%SZ}"}}'


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, said


def until(true: Callable[[], Any]) -> None:
    give_up = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < give_up, "nothing happened"
        time.sleep(0.01)


def let_go(terminal: int) -> bool:
    """Whether no process has the other end any more: reading is an error on Linux then."""
    while select.select([terminal], [], [], PATIENCE / 6)[0]:
        try:
            os.read(terminal, 4096)
        except OSError:
            return True
    return False


def test_awss_notice_drains_the_node_once(service: Service, machine: Machine) -> None:
    service.answers = [404, 404, notice(3000)]
    code, said = ended(machine.watch("aws", service.url))
    assert code == 0, said
    assert len(service.asked) == 3
    assert 3000 - PATIENCE <= machine.seconds() <= 3000


def test_a_notice_whose_time_is_past_leaves_a_second(service: Service, machine: Machine) -> None:
    service.answers = [notice(-10)]
    assert ended(machine.watch("aws", service.url))[0] == 0
    assert machine.seconds() == 1


def test_googles_notice_drains_the_node_once(service: Service, machine: Machine) -> None:
    service.answers = ["FALSE", "FALSE\n", "TRUE"]
    began = time.monotonic()
    code, said = ended(machine.watch("gcp", service.url))
    assert code == 0, said
    assert 29 - (time.monotonic() - began) <= machine.seconds() <= 30
    # The first is answered at once; those after it wait, and know from which state on.
    waits = [re.search(r"wait_for_change=true&last_etag=([^&]*)&", path) for path in service.asked]
    assert [wait and wait[1] for wait in waits] == [None, "a%2Fb1", "a%2Fb2"]


@pytest.mark.parametrize(
    ("cloud", "answers"),
    [
        ("aws", [404, 500, None, "no JSON", "{}", '"a text"', 503, notice(3000)]),
        ("gcp", ["FALSE", 503, None, "MAYBE", 404, "TRUE"]),
    ],
)
def test_a_service_that_fails_is_asked_on(
    service: Service, machine: Machine, cloud: str, answers: list[Any]
) -> None:
    service.answers = list(answers)
    began = time.monotonic()
    code, said = ended(machine.watch(cloud, service.url))
    assert code == 0, said
    assert len(service.asked) == len(answers)
    assert machine.seconds() >= 29 - (time.monotonic() - began)
    assert said.count("asking on") == 1, "one line, however long it lasts"


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
@pytest.mark.parametrize("answer", ["nobody", 403])
def test_without_the_service_it_says_so_and_ends(
    service: Service, machine: Machine, cloud: str, answer: str | int
) -> None:
    if isinstance(answer, int):  # that of something else
        service.answers = [answer]
    else:
        service.shutdown()
        service.server_close()
    code, said = ended(machine.watch(cloud, service.url))
    assert code == 1
    assert f"no metadata service of {cloud} at {service.url}" in said.splitlines()[-1]
    assert "Traceback" not in said and machine.drained == []


def test_without_ray_it_says_so_and_ends(service: Service, machine: Machine) -> None:
    machine.end_ray()
    service.answers = [notice(100)]
    code, said = ended(machine.watch("aws", service.url))
    assert code == 1 and f"no Ray node of {machine.address}" in said
    assert service.asked == []


@pytest.mark.parametrize(("cloud", "answer"), [("aws", 404), ("gcp", "FALSE"), ("aws", 500)])
def test_it_ends_when_ray_does(
    service: Service, machine: Machine, cloud: str, answer: int | str
) -> None:
    service.answers = [404 if cloud == "aws" else "FALSE", answer]
    watcher = machine.watch(cloud, service.url)
    until(lambda: len(service.asked) > 5)
    assert watcher.poll() is None
    machine.end_ray()
    code, said = ended(watcher)
    assert code == 0 and "Ray has ended here" in said
    assert machine.drained == []


def test_a_head_that_does_not_answer_is_asked_again(service: Service, machine: Machine) -> None:
    (machine.directory / "failures").write_text("1")
    service.answers = [notice(3000)]
    code, said = ended(machine.watch("aws", service.url))
    assert code == 0 and "Ray did not take it: the head does not answer" in said
    assert len(machine.drained) == 2 and len(service.asked) == 1


def test_when_there_is_no_more_time_it_gives_up(service: Service, machine: Machine) -> None:
    (machine.directory / "failures").write_text("1000")
    service.answers = [notice(-10)]
    assert ended(machine.watch("aws", service.url))[0] == 1
    assert len(machine.drained) == 1


@pytest.mark.parametrize(("name", "cloud"), [("gpu", "aws"), ("cpu", "aws"), ("gcp-gpu", "gcp")])
def test_ray_up_leaves_it_running(name: str, cloud: str, tmp_path: Path) -> None:
    """The launcher's shell has a terminal, which hangs up when the command has returned."""
    python = tmp_path / "rayfin-venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\necho "$RAY_AUTH_MODE $*" > ~/called\nread line < ~/pipe\n'
        "kill -HUP $$\necho $line > ~/lived\n"
    )
    python.chmod(0o755)
    os.mkfifo(tmp_path / "pipe")
    config = yaml.safe_load((ROOT / "cluster" / f"{name}.yaml").read_text("utf-8"))
    (line,) = (line for line in config["worker_start_ray_commands"] if "spot_notice" in line)
    assert config["worker_start_ray_commands"].index(line) == 2, "Ray must be started first"
    assert not any("spot_notice" in line for line in config["head_start_ray_commands"])

    ours, theirs = pty.openpty()
    shell = subprocess.Popen(
        # As ray.autoscaler._private.command_runner has it.
        ["bash", "--login", "-c", "-i", f"true && (export RAY_HEAD_IP=192.0.2.1; {line})"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    assert shell.wait(PATIENCE) == 0
    assert let_go(ours), "the launcher's ssh would not return"
    os.close(ours)
    until((tmp_path / "called").exists)
    called = (tmp_path / "called").read_text().split()
    script = f"{tmp_path}/rayfin/cluster/spot_notice.py"
    assert called == ["token", script, cloud, "--address", "192.0.2.1:6379"]
    (tmp_path / "pipe").write_text("on\n")
    until((tmp_path / "lived").exists)

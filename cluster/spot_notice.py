"""Tells Ray that this spot machine is about to be taken away, as soon as the cloud says so.

    python cluster/spot_notice.py aws --address HEAD:6379

Runs on a spot worker from `ray start` on. It asks the cloud's metadata service over and over; when
the notice is there, it has Ray drain this machine's node, with the notice's deadline: Ray starts
nothing new on it, and rayfin's trials save a checkpoint. Then it ends, as it does when this
machine's Ray does. Exit code 1: there is no such service or no Ray here, or Ray did not take it.

It needs Linux. Ray is loaded by the command that drains alone: while it waits it takes some 20 MB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from http.client import HTTPException, HTTPMessage
from pathlib import Path, PurePath
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import ProxyHandler, Request, build_opener

TRIES = 3  # until the service has answered once; from then on it is asked for ever
COMMAND_SECONDS = 20.0

# Link-local: where the environment names a proxy, it is not for this.
_opener = build_opener(ProxyHandler({}))


class NoService(Exception):
    """The metadata service of that cloud is not here."""


class Aws:
    """Two minutes' notice; AWS recommends to look every 5 seconds.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
    """

    service = "http://169.254.169.254"
    pause = 5.0

    def __init__(self, service: str) -> None:
        self._service = service

    def notice(self) -> float | None:
        """When the machine goes, in seconds since 1970; None: there is no notice."""
        # IMDSv2, the only one that our files leave open: a token first, and a new one each time.
        lasting = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
        token, _ = _ask(f"{self._service}/latest/api/token", lasting, "PUT")
        url = f"{self._service}/latest/meta-data/spot/instance-action"
        try:
            text, _ = _ask(url, {"X-aws-ec2-metadata-token": token})
        except HTTPError as error:
            if error.code == 404:
                return None
            raise
        return datetime.fromisoformat(json.loads(text)["time"]).timestamp()


class Google:
    """30 seconds' notice; the service answers when something changes.

    https://cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption
    https://cloud.google.com/compute/docs/metadata/querying-metadata#waitforchange
    """

    service = "http://metadata.google.internal"
    pause = 1.0
    notice_seconds = 30.0
    patience = 10  # seconds that one request waits for a change; then Ray is looked after

    def __init__(self, service: str) -> None:
        self._url = f"{service}/computeMetadata/v1/instance/preempted"
        self._etag = ""

    def notice(self) -> float | None:
        """When the machine goes, in seconds since 1970; None: there is no notice."""
        url = self._url
        if self._etag:  # so that a change between two requests is not missed
            etag = quote(self._etag, safe="")
            url += f"?wait_for_change=true&last_etag={etag}&timeout_sec={self.patience}"
        text, headers = _ask(url, {"Metadata-Flavor": "Google"}, seconds=self.patience + 5.0)
        if (answer := text.strip()) not in ("TRUE", "FALSE"):
            raise ValueError(f"{answer[:40]!r} is neither TRUE nor FALSE")
        self._etag = headers.get("ETag", "")
        return time.time() + self.notice_seconds if answer == "TRUE" else None


CLOUDS: dict[str, type[Aws] | type[Google]] = {"aws": Aws, "gcp": Google}


class Raylet(NamedTuple):
    """Ray's process on this machine that stands for the node."""

    process: Path  # its directory in /proc
    node: str  # the node's id, in hex

    @classmethod
    def find(cls, address: str) -> Raylet | None:
        """That of the cluster at `address`. No driver is started to ask for the node's id: the
        command line has it."""
        for process in Path("/proc").glob("[0-9]*"):
            program, *options = _command_line(process)
            if PurePath(program).name == "raylet" and f"--gcs-address={address}" in options:
                for option in options:
                    if option.startswith("--node_id="):
                        return cls(process, option.removeprefix("--node_id="))
        return None

    def runs(self) -> bool:
        """Another process may have its number by now, but not its node's id."""
        return f"--node_id={self.node}" in _command_line(self.process)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cloud", choices=sorted(CLOUDS))
    parser.add_argument("--address", required=True, help="the cluster's, as for `ray start`")
    parser.add_argument("--service", help="another metadata service, http://HOST:PORT")
    parser.add_argument("--pause", type=float, help="seconds between requests (aws 5, gcp 1)")
    args = parser.parse_args()
    kind = CLOUDS[args.cloud]
    service, pause = args.service or kind.service, args.pause or kind.pause
    raylet = Raylet.find(args.address)
    if raylet is None:
        _say(f"no Ray node of {args.address} runs on this machine: start it first")
        return 1
    try:
        deadline = wait_for_notice(kind(service), raylet, pause)
    except NoService as error:
        _say(f"no metadata service of {args.cloud} at {service}: {error}")
        return 1
    if deadline is None:
        _say("Ray has ended here")
        return 0
    return 0 if drain(raylet, args.address, deadline) else 1


def wait_for_notice(cloud: Aws | Google, raylet: Raylet, pause: float) -> float | None:
    """When the machine goes, in seconds since 1970; None: Ray has ended.

    Raises NoService when the service has not answered once in so many tries as it should.
    """
    heard, failures = False, 0
    while raylet.runs():
        try:
            deadline = cloud.notice()
        except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
            failures += 1
            if not heard and failures == TRIES:
                raise NoService(f"{error!r}") from error
            if failures == 1:
                _say(f"the metadata service: {error!r}; asking on")
        else:
            if deadline is not None:
                return deadline
            if failures:
                _say("the metadata service answers again")
            heard, failures = True, 0
        time.sleep(pause)
    return None


def drain(raylet: Raylet, address: str, deadline: float) -> bool:
    """Has Ray drain the node; again while it doesn't take it and there is time. Whether it did."""
    while raylet.runs():
        # Ray counts from when its command has started, which takes it a second or two.
        seconds = max(1, int(deadline - time.time()))
        _say(f"this machine goes in {seconds} s: draining node {raylet.node}")
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "drain-node"),
            f"--address={address}",
            f"--node-id={raylet.node}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=the cloud takes this spot machine away",
            f"--deadline-remaining-seconds={seconds}",
        ]
        try:
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=COMMAND_SECONDS,
                check=True,
            )
        except subprocess.SubprocessError as error:
            said = f"{getattr(error, 'output', None) or error}".strip()
            _say(f"Ray did not take it: {said.splitlines()[-1]}")
            if time.time() > deadline:
                return False
            time.sleep(1)
        else:
            _say("Ray knows")
            return True
    return False


def _ask(
    url: str, headers: dict[str, str], method: str = "GET", seconds: float = 5.0
) -> tuple[str, HTTPMessage]:
    with _opener.open(Request(url, headers=headers, method=method), timeout=seconds) as answer:
        return answer.read().decode(), answer.headers


def _command_line(process: Path) -> list[str]:
    """A process's words, the program first; one empty word where it has ended."""
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return [""]


def _say(text: str) -> None:
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} spot_notice.py: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

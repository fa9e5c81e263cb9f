"""Namespaces play machines: each has its own address, host name, processes and /tmp/ray.

A network is a switch and the nodes that are plugged into it. No interface, namespace or file has a
name outside of it, so that any number of networks can be there at once. Every node is the
descendants of one process that waits for its end of a pipe: whatever becomes of who started it,
what it runs ends, and the interfaces with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

_NEEDED = ("ip", "unshare", "nsenter", "mount", "hostname")
_SUBNET = "10.77.0"  # every network has it for itself
_PATIENCE = 540.0
_MACHINES = 4  # in a row, before a node's start is given up

# `ray` without two processes that a head starts for its users: the dashboard's, which is there with
# --include-dashboard=false, too, and the one that answers ray://.
_RAY = """
from ray._private.node import Node
from ray.scripts.scripts import cli
Node.start_api_server = lambda node, **_: setattr(node, "_webui_url", "")
Node.start_ray_client_server = lambda node: None
cli()
"""


def missing() -> str | None:
    """Return what this machine lacks for playing others, or None."""
    if sys.platform != "linux":
        return "Linux"
    if lacking := [name for name in _NEEDED if not _tool(name)]:
        return ", ".join(lacking)
    attempt = "ip link add switch type bridge && ip link add port1 type veth peer name eth0"
    made = subprocess.run(
        [*_apart("net", "uts"), "sh", "-c", attempt], capture_output=True, text=True, check=False
    )
    return f"namespaces ({made.stderr.strip()})" if made.returncode else None


class Space:
    """Namespaces that last until `end`, and everything that was started in them."""

    def __init__(self, kinds: Sequence[str], script: str, directory: Path) -> None:
        """Create namespaces of these kinds; `script`, in sh, sets them up."""
        # The shell, and not cat in its place: the first process of a namespace inherits orphans.
        script = f"set -e; {script}; echo ready; cat; :"
        self._holder = subprocess.Popen(
            [*_apart(*kinds), "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=directory,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            raise RuntimeError(self._holder.communicate(timeout=_PATIENCE)[1])
        (first,) = psutil.Process(self._holder.pid).children()
        self._first = first
        self._started: list[subprocess.Popen[str]] = []
        names = [f"--{kind}" for kind in (*kinds, "pid", "mount")]
        self.enter = [_tool("nsenter"), f"--target={first.pid}", *names, "--wd"]

    def ip(self, words: str) -> None:
        """Run `ip` on this network; process ids in `words` are those of the caller."""
        _run([_tool("nsenter"), f"--target={self.first}", "--net", _tool("ip"), *words.split()])

    @property
    def first(self) -> int:
        """The id of the process from which all others of these namespaces descend."""
        return self._first.pid

    def processes(self, title: str) -> list[psutil.Process]:
        """Return the processes whose name begins so: Ray names a process for what it runs."""
        found = []
        for process in self._first.children(recursive=True):
            try:
                if " ".join(process.cmdline()[:1]).startswith(title):
                    found.append(process)
            except psutil.Error:  # it has just ended
                continue
        return found

    @property
    def lives(self) -> bool:
        """Whether it has not been ended."""
        return self._holder.poll() is None

    def end(self) -> None:
        """Send SIGKILL to all processes in here, as when a machine loses its power, and wait."""
        if self.lives:
            self._first.kill()
        for process in (*self._started, self._holder):
            process.wait(_PATIENCE)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with suppress(OSError):  # of a line that nobody reads any more
                        pipe.close()


class Node(Space):
    """A machine, which has no network before `plug_in`."""

    def __init__(
        self,
        name: str,
        number: int,
        switch: Space,
        directory: Path,
        environment: Mapping[str, str],
    ) -> None:
        """Set up a machine; what is started in here has this environment."""
        self.name, self.number, self.address = name, number, f"{_SUBNET}.{number}"
        self.environment = dict(environment)
        self._switch = switch
        # As Debian has it: the machine's own name is not its address on the network.
        (directory / f"{name}-hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        script = (
            f"hostname {name}; mount -t tmpfs tmpfs /tmp/ray; "
            f"mount --bind {directory / f'{name}-hosts'} /etc/hosts; ip link set lo up"
        )
        Path("/tmp/ray").mkdir(mode=0o777, exist_ok=True)
        super().__init__(("net", "uts"), script, directory)
        # Not by its number: the port of a machine that has ended is gone a moment later only.
        self._port = f"port{self.first}"

    def plug_in(self) -> None:
        """Connect it to the switch, under its address."""
        self._switch.ip(f"link add {self._port} type veth peer name eth0 netns {self.first}")
        self._switch.ip(f"link set {self._port} master switch up")
        self.ip(f"address add {self.address}/24 dev eth0")
        self.ip("link set eth0 up")
        # Ray asks which of its addresses leads to the world.
        self.ip(f"route add default via {_SUBNET}.254")

    def python(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a Python in here, whose input and output are the caller's."""
        return self.run(sys.executable, "-u", *arguments)

    def run(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in here, whose input and output are the caller's."""
        process = subprocess.Popen(
            [*self.enter, *command],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._started.append(process)
        return process

    def hide(self, directory: Path) -> None:
        """Let this machine see an empty directory there from now on."""
        _run([*self.enter, _tool("mount"), "-t", "tmpfs", "tmpfs", str(directory)])

    @property
    def ray_address(self) -> str:
        """The address of the Ray cluster whose head this machine is."""
        return f"{self.address}:6379"

    def start_ray(self, head: Node | None = None, **settings: str) -> None:
        """Start Ray with one CPU, as the head or as a node of `head`'s cluster.

        `settings` are Ray's own, by the names that they have in the environment. Raises
        RuntimeError when it does not start; `Network.start_ray` tries again on another machine.
        """
        role = ["--head", "--port=6379", "--no-monitor"]
        command = [
            *(*self.enter, sys.executable, "-c", _RAY, "start"),
            *(role if head is None else [f"--address={head.ray_address}"]),
            f"--node-ip-address={self.address}",
            "--num-cpus=1",
            "--object-store-memory=100000000",
            "--include-log-monitor=false",
            "--disable-usage-stats",
        ]
        _run(command, self.environment | settings)

    def cut(self) -> None:
        """Pull the cable: what is sent from now on is lost, and no one is told."""
        self._switch.ip(f"link set {self._port} down")


class Network:
    """A switch and its nodes."""

    def __init__(self, lab: Any) -> None:
        """`lab` has a directory, and the environment that all machines have in common."""
        self.lab = lab
        self.nodes: list[Node] = []
        script = "ip link set lo up; ip link add switch type bridge; ip link set switch up"
        self._switch = Space(("net",), script, lab.root)

    def add(self, name: str) -> Node:
        """Plug in a machine with its own disk, beside the directories that all see; return it."""
        environment = self.lab.environment | self.lab.disk(name)
        return self._plug_in(name, self._next_number, environment)

    def start_again(self, node: Node) -> Node:
        """Return another machine with the name, the address and the disk of one that has ended."""
        return self._plug_in(node.name, node.number, node.environment)

    def start_ray(self, node: Node, head: Node | None = None, **settings: str) -> Node:
        """Start Ray on a machine; return it, or the one that has taken its place and name.

        A node of Ray gives its own agents 15 s to start, which nothing can set (its log then says
        "Timed out waiting for file .../metrics_agent_port_..."), and `ray start` waits another 15 s
        for the node that has ended. On a busy machine that happens. Such a machine is ended, lest
        it join the cluster later, and another is plugged in, at an address of its own unless it is
        to be the head. Raises RuntimeError when that has failed as often as it may.
        """
        failed = []
        while True:
            try:
                node.start_ray(head, **settings)
                return node
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                node.end()
                failed.append(f"{error}")
                if len(failed) == _MACHINES:
                    raise RuntimeError("\n".join(failed)) from None
            number = node.number if head is None else self._next_number
            node = self._plug_in(node.name, number, node.environment)

    def _plug_in(self, name: str, number: int, environment: Mapping[str, str]) -> Node:
        node = Node(name, number, self._switch, self.lab.root, environment)
        for other in self.living:
            other.hide(self.lab.root / name)
            node.hide(self.lab.root / other.name)
        self.nodes.append(node)
        node.plug_in()
        return node

    @property
    def _next_number(self) -> int:
        return len(self.nodes) + 1

    @property
    def living(self) -> list[Node]:
        """The machines that have not been ended."""
        return [node for node in self.nodes if node.lives]

    def end(self) -> None:
        """End all machines and the switch."""
        for space in (*reversed(self.nodes), self._switch):
            space.end()


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> None:
    """Run a command; raises RuntimeError with what it wrote when it fails."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
        timeout=_PATIENCE,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")


def _apart(*kinds: str) -> list[str]:
    asked = [f"--{kind}" for kind in (*kinds, "pid", "fork", "mount-proc", "kill-child=KILL")]
    return [_tool("unshare"), *asked]


def _tool(name: str) -> str:
    """Where a program is; those of administrators are not on everybody's PATH."""
    path = os.environ.get("PATH", os.defpath) + os.pathsep + "/usr/sbin"
    return shutil.which(name, path=path) or ""

"""Machines that are played by SSH servers on loopback, each in namespaces of its own.

All of it is in a network, mount and process namespace of its own: no port is taken, no file of this
machine changes, `ray stop` finds no other Ray, and what was started ends with the first process.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Not 127.0.0.1, which Ray takes for "find out your own address".
MACHINES = {"head": "127.0.0.2", "worker": "127.0.0.3"}
SSH_PORT = 2222
NEEDED = ("sshd", "ssh", "ssh-keygen", "rsync", "git", "unshare", "mount", "hostname")
_SIOCSIFFLAGS = 0x8914
_IFF_UP_AND_RUNNING = 0x1 | 0x40


class Failed(Exception):
    """One line that tells what went wrong."""


@dataclass(frozen=True)
class Place:
    """The trial's own directory; its path is short, for those of sockets must be."""

    root: Path

    @property
    def name(self) -> str:
        """The cluster's, too."""
        return self.root.name

    @property
    def home(self) -> Path:
        """The home of whoever types `ray up`."""
        return self.root / "home"

    @property
    def key(self) -> Path:
        return self.root / "key"

    @property
    def config(self) -> Path:
        return self.root / "cluster.yaml"

    @property
    def ray(self) -> Path:
        """Ray's temporary directory, which has one name on all nodes: each has its own there."""
        return self.root / "ray"

    @property
    def storage(self) -> Path:
        """What the machines share, as NFS would be."""
        return self.root / "storage"

    @property
    def environment(self) -> dict[str, str]:
        """Of whoever types `ray up`: nothing is left in this machine's home or /tmp/ray."""
        kept = {name: v for name, v in os.environ.items() if not name.startswith("RAY_")}
        programs = str(Path(sys.executable).parent)
        return kept | {
            "PATH": os.pathsep.join([programs, os.environ.get("PATH", os.defpath)]),
            "HOME": str(self.home),
            "TMPDIR": str(self.root),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_UP_enable_autoscaler_v2": "1",  # the default, without a notice of it
            "PYTHONWARNINGS": "ignore",
        }

    def remove(self) -> None:
        # The launcher keeps its SSH sockets here, whatever TMPDIR says.
        sockets = hashlib.sha256(self.name.encode()).hexdigest()[:10]
        for left in (self.root, *Path("/tmp").glob(f"ray_ssh_*/{sockets}")):
            shutil.rmtree(left, ignore_errors=True)


def tool(name: str) -> str | None:
    """Where a program is; sshd is not on everybody's PATH."""
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + os.pathsep + "/usr/sbin")


def missing() -> list[str]:
    """What this machine lacks for any of this."""
    wanting = [name for name in NEEDED if not tool(name)]
    if sys.platform != "linux":
        wanting.append("Linux")
    elif os.geteuid() != 0:
        wanting.append("root")
    return wanting


def apart(*kinds: str, kill: str = "KILL") -> list[str]:
    """The start of a command that runs in new namespaces, and ends when its parent does."""
    asked = [f"--{kind}" for kind in (*kinds, "pid", "fork", "mount-proc")]
    return [str(tool("unshare")), *asked, f"--kill-child={kill}"]


def settle(place: Place) -> None:
    """For the first process of new namespaces, before all else."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", _IFF_UP_AND_RUNNING)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, request)
    _mount("-t", "tmpfs", "tmpfs", "/run")
    Path("/run/sshd").mkdir()  # sshd wants it, and empty
    # The launcher has no setting for a port, and the head's autoscaler no settings of a user's.
    settings = place.root / "ssh_config"
    hosts = " ".join(MACHINES.values())
    settings.write_text(f"Host {hosts}\n    Port {SSH_PORT}\n", "utf-8")
    _mount("--bind", str(settings), "/etc/ssh/ssh_config")


def make_key(path: Path) -> None:
    keygen = [str(tool("ssh-keygen")), "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(keygen, check=True)


def start_machine(place: Place, name: str) -> subprocess.Popen[bytes]:
    """An SSH server that sees its own processes alone, with a home directory of its own.

    It takes connections with the key of `place` when this returns. Raises Failed.
    """
    home, address = place.root / name, MACHINES[name]
    (home / "tmp").mkdir(parents=True)
    make_key(home / "host_key")
    variables = {
        "RAY_TMPDIR": place.ray,
        "RAY_gcs_rpc_server_reconnect_timeout_s": 10,  # a node ends so long after the head; else 60
        "OMP_WAIT_POLICY": "PASSIVE",
        "OPENBLAS_NUM_THREADS": 1,
    }
    settings = home / "sshd_config"
    settings.write_text(
        f"""\
Port {SSH_PORT}
ListenAddress {address}
HostKey {home / "host_key"}
PidFile none
AuthorizedKeysFile {place.key}.pub
AuthenticationMethods publickey
PermitRootLogin prohibit-password
UsePAM no
# The key lies below /tmp, which anyone may write to.
StrictModes no
SetEnv {" ".join(f"{name}={value}" for name, value in variables.items())}
""",
        "utf-8",
    )
    # bash would believe HOME; ssh asks the list of users.
    users = home / "passwd"
    listed = Path("/etc/passwd").read_text("utf-8")
    users.write_text(re.sub(r"(?m)^(root:(?:[^:]*:){4})[^:]*", rf"\1{home}", listed), "utf-8")
    script = (
        f"hostname {name} && mount --bind {users} /etc/passwd && "
        f"mount --bind {home / 'tmp'} {place.ray} && exec {tool('sshd')} -D -e -f {settings}"
    )
    with (home / "sshd.log").open("wb") as log:
        process = subprocess.Popen(
            [*apart("uts"), "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    deadline = time.monotonic() + 10
    while not listens(address, SSH_PORT):
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failed(f"sshd on {address} does not answer")
        time.sleep(0.05)
    return process


def listens(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=1):
            return True
    except OSError:
        return False


def _mount(*arguments: str) -> None:
    subprocess.run([str(tool("mount")), *arguments], check=True)

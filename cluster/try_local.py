"""`ray up cluster/local.yaml` for real, on this machine alone: up, a sweep, its results, down.

    python cluster/try_local.py

Two machines are played by two SSH servers on loopback (loopback.py). The configuration is
cluster/local.yaml with their addresses, a key made for the occasion, one CPU a node, a worker that
comes when it is asked for, and this Python's environment in place of one that is installed anew.
Needs Linux, root, and sshd, rsync, git and unshare. What it starts and writes is gone at its end.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from loopback import (
    MACHINES,
    SSH_PORT,
    Failed,
    Place,
    apart,
    listens,
    make_key,
    missing,
    settle,
    start_machine,
)

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "cluster" / "local.yaml"
DASHBOARD_PORT = 18265  # the near end of the tunnel
PATIENCE = 120.0
TRIALS = 2
# Trials that outlast the start of another process, or the first one would do both of them; all else
# as the script has it.
SETTINGS = (
    "model.name=tiny",
    "data.max_samples=24",
    "data.max_length=192",
    "train.max_steps=300",
    "train.eval_steps=150",
    "train.per_device_train_batch_size=2",
    "sweep.scheduler=none",
    "sweep.report_samples=0",
    "publish.name=try-local",
)
# Of what Ray's commands print: copied files, and the whole of each SSH command.
NOISE = re.compile(
    r"packaging\.py|working_dir\.py|V?VINFO|^(objects|refs|info)/|Shared connection|^\./$"
)
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        sys.exit(inside(Place(Path(sys.argv[2]))))
    if wanting := missing():
        print(f"try_local.py can't run here, for want of {', '.join(wanting)}", file=sys.stderr)
        sys.exit(2)
    root = tempfile.mkdtemp(prefix="rayfin-", dir="/tmp")
    # In place of this process: whoever ends it ends all of it.
    command = [*apart("net", "mount", kill="TERM"), sys.executable, __file__, "--inside", root]
    os.execv(command[0], command)


def inside(place: Place) -> int:
    """The first process of the namespaces."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    try:
        run(place)
    except Failed as error:
        print(f"\nFAILED: {error}")
        show_logs(place)
        return 1
    finally:
        place.remove()
    print(f"\nAll of it worked, in {time.monotonic() - began:.0f} s.")
    return 0


def run(place: Place) -> None:
    settle(place)
    with step("a key, a token, and the configuration"):
        prepare(place)
    with step(f"SSH servers on port {SSH_PORT} of {', '.join(MACHINES.values())}"):
        machines = {name: start_machine(place, name) for name in MACHINES}
    with step("ray up"):
        ray(place, "up", "--yes", "--no-config-cache", str(place.config))
    with tunnel(place) as dashboard:
        with step("only localhost and the token lead to the dashboard"):
            check_access(place, dashboard)
        with step("ray job submit: the autoscaler brings the second node up, then a sweep"):
            two = [*SETTINGS, f"sweep.num_samples={TRIALS}", f"storage={place.storage}"]
            script = ["python", "experiments/sweep_qlora.py", *two]
            workers = ["python", "cluster/with_workers.py", str(len(MACHINES)), "CPU", "--"]
            where = ["--address", dashboard, "--working-dir", str(ROOT)]
            ray(place, "job", "submit", *where, "--", *workers, *script)
    with step("ray exec: a sweep that is started on the head, by --address"):
        short = ["train.max_steps=8", "train.eval_steps=4"]
        more = [*SETTINGS, *short, "sweep.num_samples=1", f"storage={place.storage}"]
        command = "TERM=dumb python ~/rayfin/experiments/sweep_qlora.py --address auto"
        ray(place, "exec", str(place.config), " ".join([command, *more]))
    with step("the results"):
        read_results(place)
    with step("ray down"):
        ray(place, "down", "--yes", str(place.config))
        wait_until_gone(machines)


def prepare(place: Place) -> None:
    for directory in (place.home, place.ray):
        directory.mkdir()
    make_key(place.key)
    ray(place, "get-auth-token", "--generate", show=False)
    place.config.write_text(yaml.safe_dump(configuration(place)), "utf-8")


def configuration(place: Place) -> dict[str, Any]:
    """cluster/local.yaml for this machine; raises Failed where it isn't as expected."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text("utf-8"))
    config["cluster_name"] = place.name
    config["provider"] |= {"head_ip": MACHINES["head"], "worker_ips": [MACHINES["worker"]]}
    config["min_workers"] = 0  # the second machine is brought up when work asks for it
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(place.key)}
    environment = (
        f"ln -sfn {sys.prefix} ~/rayfin-venv && "
        "echo 'export PYTHONPATH=\"$HOME/rayfin/platform\"' >> ~/.bashrc"
    )
    setup = config["setup_commands"]
    setup[place_of("pip install", setup)] = environment
    for name, address in MACHINES.items():
        start = config[f"{name}_start_ray_commands"]
        index = place_of("ray start", start)
        own = f"ray start --node-ip-address={address} --num-cpus=1"
        start[index] = start[index].replace("ray start", own)
    return config


def place_of(marked: str, commands: list[str]) -> int:
    found = [index for index, command in enumerate(commands) if marked in command]
    if len(found) != 1:
        raise Failed(f"{CONFIG}: one command with '{marked}' was expected, not {len(found)}")
    return found[0]


@contextmanager
def tunnel(place: Place) -> Iterator[str]:
    """`ray dashboard`, as a user would; yields where the head's dashboard then is."""
    command = ["ray", "dashboard", "--port", str(DASHBOARD_PORT), str(place.config)]
    with (place.root / "tunnel.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=place.environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield f"http://127.0.0.1:{DASHBOARD_PORT}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(10)


def check_access(place: Place, dashboard: str) -> None:
    """Raises Failed where others than the token's holder get an answer."""
    for _ in waiting("the dashboard does not answer"):
        with suppress(OSError):
            get(dashboard, "/api/version", token(place))
            break
    for wrong in (None, "0" * 64):
        try:
            get(dashboard, "/api/jobs/", wrong)
        except urllib.error.HTTPError as error:
            if error.code not in (401, 403):
                raise Failed(f"without the token the dashboard answers {error.code}") from None
        else:
            raise Failed("the dashboard answers without the token")
    for what, port in (("the dashboard", 8265), ("Ray Client", 10001)):
        if listens(MACHINES["head"], port):
            raise Failed(f"{what} listens on the head's own address")


def read_results(place: Place) -> None:
    command = ["rayfin", "history", "list", "--json", f"storage={place.storage}"]
    listing = subprocess.run(command, env=place.environment, capture_output=True, check=True)
    trials = json.loads(listing.stdout)
    for trial in trials:
        host, loss = trial["scenario"]["worker"]["host"], trial["metrics"]["eval_loss"]
        say(f"{trial['trial_id']}  {trial['status']} on {host}, eval_loss {loss:.4f}")
    if [trial["status"] for trial in trials] != ["finished"] * (TRIALS + 1):
        raise Failed(f"{TRIALS + 1} finished trials were expected")
    for pattern in ("sweeps/*/report.html", "adapters/try-local/1/adapter_model.safetensors"):
        found = list(place.storage.glob(pattern))
        if not found:
            raise Failed(f"{pattern} was not written")
        say(str(found[0].relative_to(place.storage)))


def wait_until_gone(machines: dict[str, subprocess.Popen[bytes]]) -> None:
    """`ray down` stops the head; the other nodes end when they have missed it for a minute."""
    for name, machine in machines.items():
        began = time.monotonic()
        for _ in waiting(f"after `ray down` Ray still runs on the {name}"):
            if not {"raylet", "gcs_server"} & set(names_below(machine.pid)):
                say(f"{name}: no Ray is left after {time.monotonic() - began:.0f} s")
                break


def names_below(pid: int) -> Iterator[str]:
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            yield process.name()


def ray(place: Place, *arguments: str, show: bool = True) -> None:
    """One of Ray's own commands, what it prints indented below ours; raises Failed."""
    process = subprocess.Popen(
        ["ray", *arguments],
        cwd=ROOT,
        env=place.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        text = COLOUR.sub("", line).strip()
        if show and text and not NOISE.search(text):
            say(text)
    if process.wait():
        raise Failed(f"`ray {' '.join(arguments[:2])}` ended with {process.returncode}")


def get(dashboard: str, path: str, token: str | None) -> Any:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(dashboard + path, headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def token(place: Place) -> str:
    return (place.home / ".ray" / "auth_token").read_text("utf-8").strip()


def waiting(failure: str) -> Iterator[None]:
    """Turns of a loop that asks again and again; raises Failed when there were enough."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        yield
        time.sleep(0.2)
    raise Failed(f"{failure} after {PATIENCE:.0f} s")


@contextmanager
def step(what: str) -> Iterator[None]:
    print(f"\n== {what}", flush=True)
    began = time.monotonic()
    yield
    print(f"   ({time.monotonic() - began:.1f} s)", flush=True)


def say(line: str) -> None:
    print(f"   {line}", flush=True)


def show_logs(place: Place) -> None:
    """The end of what the servers, the tunnel and Ray's autoscaler wrote."""
    for pattern in ("*/sshd.log", "tunnel.log", "*/tmp/ray/session_latest/logs/monitor*"):
        for path in sorted(place.root.glob(pattern)):
            end = path.read_text("utf-8", errors="replace").splitlines()[-20:]
            print(f"\n-- {path.relative_to(place.root)}", *end, sep="\n")


if __name__ == "__main__":
    main()

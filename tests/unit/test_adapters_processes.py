"""Several processes, some of them killed: whole versions only, and no number twice."""

import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rayfin.adapters import Registry

PUBLISH = """
import sys
from rayfin.adapters import Registry
root, source, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
for _ in range(count):
    print(Registry(root).publish("support", source, {"from": "child"}, alias="prod").version,
          flush=True)
"""

# One child for every place where the writer waits for the disk: it dies there.
DIE = """
import os, signal, sys
from rayfin.adapters import Registry
from safetensors import safe_open  # before the forks, so that each is quick
root, source, action = sys.argv[1:]
for place in range(1, 100):
    child = os.fork()
    if child == 0:
        left, sync = place, os.fsync
        def fsync(descriptor):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(descriptor)
        os.fsync = fsync
        registry = Registry(root)
        if action == "publish":
            registry.publish("support", source, {}, alias="prod")
        else:
            registry.remove(f"support@{registry.versions('support')[0]}")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    registry = Registry(root)
    for version in registry.versions("support"):
        registry.verify(f"support@{version}")
    print(os.WTERMSIG(status), registry.versions("support")[-1], flush=True)
    if status == 0:
        break
"""


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(popen: Callable[..., subprocess.Popen[str]]) -> Start:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def start(script: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        return popen(command, stdout=subprocess.PIPE, env=environment)

    return start


def published(child: subprocess.Popen[str]) -> list[int]:
    output, _ = child.communicate(timeout=540)
    return [int(line) for line in output.split() if line != "ready"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    header = json.dumps({"w": {"dtype": "U8", "shape": [4096], "data_offsets": [0, 4096]}})
    weights = struct.pack("<Q", len(header)) + header.encode() + bytes(4096)
    (trained / "adapter_model.safetensors").write_bytes(weights)
    return trained


def test_publishers_at_once_get_different_versions(
    tmp_path: Path, source: Path, start: Start
) -> None:
    children = [start(PUBLISH, tmp_path / "adapters", source, 8) for _ in range(3)]
    # A reader beside them never meets anything half done.
    registry, seen = Registry(tmp_path / "adapters"), 0
    while any(child.poll() is None for child in children):
        versions, problems = registry.scan()
        assert not problems
        assert len(versions) >= seen
        seen = len(versions)
    numbers = [number for child in children for number in published(child)]
    assert sorted(numbers) == list(range(1, 25))
    assert registry.aliases("support") == {"latest": 24, "prod": 24}
    for version in registry.list():
        registry.verify(version.ref)


def test_killed_publishers_leave_whole_versions_only(
    tmp_path: Path, source: Path, start: Start
) -> None:
    registry, dice, reported = Registry(tmp_path / "adapters"), random.Random(0), []
    for _ in range(4):
        child = start(PUBLISH, registry.root, source, 10_000)
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(dice.randint(1, 40))]
        child.kill()
        reported += [int(line) for line in lines[1:]] + published(child)
        versions, problems = registry.scan()
        assert not problems
        # What was reported is there; the one that was being reported may be there as well.
        assert {*reported} <= {version.version for version in versions}
        for version in versions[-3:]:
            registry.verify(version.ref)
    assert sorted(reported) == reported
    version = registry.publish("support", source, {})
    assert version.version == registry.versions("support")[-1] > reported[-1]
    home = registry.root / "support"
    assert not list(home.glob(".*"))


@pytest.mark.parametrize("action", ["publish", "remove"])
def test_death_at_every_write(tmp_path: Path, source: Path, action: str, start: Start) -> None:
    registry = Registry(tmp_path / "adapters")
    for _ in range(12):
        registry.publish("support", source, {})
    output, _ = start(DIE, registry.root, source, action).communicate(timeout=540)
    signals, newest = zip(*(map(int, line.split()) for line in output.splitlines()), strict=True)

    assert len(signals) >= 3
    assert set(signals[:-1]) == {9}
    assert signals[-1] == 0
    assert list(newest) == sorted(newest)
    following = registry.publish("support", source, {}).version
    assert following == newest[-1] + 1
    assert registry.resolve("support").version == following

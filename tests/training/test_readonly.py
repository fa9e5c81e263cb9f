"""Storage that turns read-only in the middle of a trial, as a disk does that has had an error."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayfin.paths import StoragePath
from rayfin.training import TrialResult
from rayfin.training.checkpoint import latest_checkpoint


def mount(place: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "rayfin-test", str(place)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    if not mount(place, "size=64m"):
        pytest.skip("a file system of its own needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_trial_says_that_its_storage_is_read_only_and_goes_on_when_it_is_not(
    lab: Any, disk: Path
) -> None:
    spec = lab.spec(max_steps=8, eval_steps=2, save_steps=2)
    whole = lab.run(spec)

    def freeze(result: TrialResult) -> None:
        if (
            result.metrics["steps"] == 4
        ):  # the checkpoint of step 2 is whole, that of 4 is not begun
            assert mount(disk, "remount,ro")

    directory = disk / "trial"
    frozen = lab.run(spec, report=freeze, directory=directory)
    assert frozen.status == "failed" and frozen.storage_failed
    assert "Read-only file system" in (frozen.error or "") and "goes on" in (frozen.error or "")
    assert latest_checkpoint(StoragePath(directory / "checkpoints")) == (
        directory / "checkpoints" / "checkpoint-2"
    )

    assert mount(disk, "remount,rw")
    steps: list[int] = []
    resumed = lab.run(
        spec, report=lambda result: steps.append(result.metrics["steps"]), directory=directory
    )
    assert resumed.status == "finished", resumed.error
    assert steps == [4, 6], "it began anew, and not from its checkpoint"
    assert lab.losses(resumed) == lab.losses(whole)
    assert resumed.adapter is not None and resumed.adapter.path.is_dir()

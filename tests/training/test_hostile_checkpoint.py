"""A checkpoint that somebody else could write to: whatever is pickled there is never run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from rayfin.objects import checksums_of
from rayfin.paths import StoragePath
from rayfin.training.checkpoint import latest_checkpoint

OTHERS = (
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "training_args.bin", "pytorch_model.bin"),
    *("adapter_model.bin", "optimizer.bin", "random_states_0.pkl"),
)


class Touch:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


def stopped_early(lab: Any, spec: Any) -> Path:
    directory: Path = lab.directory()

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.run(spec, report=interrupt, directory=directory)
    newest = latest_checkpoint(StoragePath(directory / "checkpoints"))
    assert newest is not None
    return newest


def write(path: Path, trace: Path, kind: str) -> None:
    """A pickle that leaves `trace`; that it does so is tried first."""
    if kind == "plain":
        path.write_bytes(pickle.dumps(Touch(trace), protocol=2))
        pickle.loads(path.read_bytes())
    else:
        torch.save(Touch(trace), path)
        torch.load(path, weights_only=False)
    trace.unlink()


def sign(checkpoint: Path) -> None:
    """Whoever writes the files writes their sums, too."""
    (checkpoint / "sums.json").unlink()
    (checkpoint / "sums.json").write_text(json.dumps(checksums_of(checkpoint)))


def test_no_pickle_beside_a_checkpoints_own_files_is_run(lab: Any, tmp_path: Path) -> None:
    spec = lab.spec(save_steps=2, eval_steps=3)
    newest, trace = stopped_early(lab, spec), tmp_path / "unpickled"
    for number, name in enumerate(OTHERS):
        write(newest / name, trace, ("plain", "torch")[number % 2])
    sign(newest)
    resumed = lab.run(spec, directory=newest.parents[1])
    assert not trace.exists()
    assert resumed.status == "finished", resumed.error
    assert lab.losses(resumed) == lab.losses(lab.finish(spec).result)


@pytest.mark.parametrize("kind", ["plain", "torch"])
def test_random_states_that_would_run_code_are_not_read(
    lab: Any, tmp_path: Path, kind: str
) -> None:
    spec = lab.spec(save_steps=2, eval_steps=3)
    newest, trace = stopped_early(lab, spec), tmp_path / "unpickled"
    write(newest / "rng_state.pth", trace, kind)
    sign(newest)
    resumed = lab.run(spec, directory=newest.parents[1])
    assert not trace.exists()
    assert resumed.status == "failed" and resumed.error is not None
    assert str(newest) in resumed.error and "remove this directory" in resumed.error
    assert "\n" not in resumed.error

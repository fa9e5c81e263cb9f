"""Finding, reading and ending a trial's checkpoints; each directory is whole or absent.

A checkpoint is of no strategy and no number of workers: safetensors hold what is trained and
AdamW's moments, whole and by name, and JSON the rest, a sum of every file included. Only the random
states are pickled, by Transformers, and read as plain values (`weights_only`).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfin.models.quiet import no_progress_bars
from rayfin.paths import write_json

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_STAGING = ".staging"
_PROGRESS = "progress.json"
_SUMS = "sums.json"
_KEPT = 2
"""Checkpoints of a running trial: where the newest turns out to be torn, the one before it is."""


@dataclass(frozen=True)
class Progress:
    """What a checkpoint holds beside tensors and Transformers' own state."""

    train_seconds: float
    base_scores: dict[str, float]
    schedule_steps: int
    learning_rate: float


def staging(directory: Path) -> Path:
    """Where a checkpoint is written before it is renamed; never read."""
    return directory / _STAGING


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint under `directory`; leftovers of a killed write don't count.

    One whose files are not as they were written (a torn disk, a lost block) is passed over.
    """
    for path in reversed(_checkpoints(directory)):
        if (damaged := _damaged(path)) is None:
            return path
        log.warning("checkpoint %s is damaged (%s); going back to the one before", path, damaged)
    return None


def _checkpoints(directory: Path) -> list[Path]:
    found = [
        (int(step), path)
        for path in directory.glob("checkpoint-*")
        if (step := path.name.removeprefix("checkpoint-")).isdigit()
    ]
    return [path for _, path in sorted(found)]


def _damaged(checkpoint: Path) -> str | None:
    """What is not as it was written, or None."""
    try:
        sums: dict[str, list[int]] = json.loads((checkpoint / _SUMS).read_text(encoding="utf-8"))
        changed = (name for name, wanted in sums.items() if _sum(checkpoint / name) != wanted)
        return next(changed, None)
    except (OSError, ValueError, AttributeError) as error:
        return str(error) or type(error).__name__


def _sum(path: Path) -> list[int]:
    """Bytes and CRC-32."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def publish_checkpoint(directory: Path, name: str) -> None:
    """Makes a staged checkpoint the newest one, and drops those before the one before it."""
    staged = staging(directory) / name
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    write_json(staged / _SUMS, {str(path.relative_to(staged)): _sum(path) for path in files})
    for path in files:
        with path.open("rb") as written:
            os.fsync(written.fileno())
    shutil.rmtree(directory / name, ignore_errors=True)
    staged.rename(directory / name)
    for path in _checkpoints(directory)[:-_KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def clear_checkpoints(directory: Path) -> None:
    """Removes them all; renamed first, so that a killed removal leaves none that looks whole."""
    doomed = directory.with_name(f".{directory.name}-done")
    shutil.rmtree(doomed, ignore_errors=True)
    if directory.exists():
        directory.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def save_tensors(tensors: dict[str, torch.Tensor], directory: Path, name: str) -> None:
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, os.fspath(directory / f"{name}.safetensors"))


def load_tensors(directory: Path, name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(os.fspath(directory / f"{name}.safetensors"))


def save_progress(progress: Progress, directory: Path) -> None:
    write_json(directory / _PROGRESS, asdict(progress))


def load_progress(directory: Path) -> Progress:
    return Progress(**json.loads((directory / _PROGRESS).read_text(encoding="utf-8")))


def save_adapter(
    model: torch.nn.Module,
    tokenizer: object,
    directory: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """A plain PEFT adapter (or, for full fine-tuning, a plain model) with its tokenizer.

    `weights`: the whole model's, where `model` itself has a part of them only.
    """
    from peft import PeftModel, PeftType
    from peft.utils.warning import PeftWarning

    # `auto` would ask a model hub whether the vocabulary has grown.
    options: dict[str, Any] = {}
    if isinstance(model, PeftModel):
        options["save_embedding_layers"] = False
    elif weights is not None:
        options["state_dict"] = weights
    # P-Tuning saves what its encoder puts out now: dropout would be saved with it.
    model.eval()
    with no_progress_bars(), warnings.catch_warnings():
        if isinstance(model, PeftModel) and model.peft_type == PeftType.ADALORA:
            # A matrix that was left no rank is empty on purpose; peft takes it for a lost shard.
            warnings.filterwarnings("ignore", ".*tensor\\(s\\) have invalid shape", PeftWarning)
        model.save_pretrained(os.fspath(directory), **options)  # type: ignore[operator]
    tokenizer.save_pretrained(os.fspath(directory))  # type: ignore[attr-defined]

"""Finding, reading and ending a trial's checkpoints; each directory is whole or absent."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from rayfin.methods import load_training_state, training_state
from rayfin.models.quiet import no_progress_bars

if TYPE_CHECKING:
    import torch

STATE_FILE = "training_state.safetensors"
_STAGING = ".staging"


def staging(directory: Path) -> Path:
    """Where a checkpoint is written before it is renamed; never read."""
    return directory / _STAGING


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint under `directory`; leftovers of a killed write don't count."""
    found = [
        (int(step), path)
        for path in directory.glob("checkpoint-*")
        if (step := path.name.removeprefix("checkpoint-")).isdigit()
    ]
    return max(found)[1] if found else None


def publish_checkpoint(directory: Path, name: str) -> None:
    """Makes a staged checkpoint the newest one, and drops those before it."""
    before = [path for path in directory.glob("checkpoint-*") if path.name != name]
    shutil.rmtree(directory / name, ignore_errors=True)
    (staging(directory) / name).rename(directory / name)
    for path in before:
        shutil.rmtree(path, ignore_errors=True)


def clear_checkpoints(directory: Path) -> None:
    """Removes them all; renamed first, so that a killed removal leaves none that looks whole."""
    doomed = directory.with_name(f".{directory.name}-done")
    shutil.rmtree(doomed, ignore_errors=True)
    if directory.exists():
        directory.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def save_state(model: torch.nn.Module, directory: Path) -> None:
    """Writes all that the method trains, and what it needs to go on."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    save_file(training_state(model), os.fspath(directory / STATE_FILE))


def load_state(model: torch.nn.Module, directory: Path) -> None:
    from safetensors.torch import load_file

    load_training_state(model, load_file(os.fspath(directory / STATE_FILE)))


def save_adapter(model: torch.nn.Module, tokenizer: object, directory: Path) -> None:
    """A plain PEFT adapter (or, for full fine-tuning, a plain model) with its tokenizer."""
    from peft import PeftModel, PeftType
    from peft.utils.warning import PeftWarning

    # `auto` would ask a model hub whether the vocabulary has grown.
    options = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
    # P-Tuning saves what its encoder puts out now: dropout would be saved with it.
    model.eval()
    with no_progress_bars(), warnings.catch_warnings():
        if isinstance(model, PeftModel) and model.peft_type == PeftType.ADALORA:
            # A matrix that was left no rank is empty on purpose; peft takes it for a lost shard.
            warnings.filterwarnings("ignore", ".*tensor\\(s\\) have invalid shape", PeftWarning)
        model.save_pretrained(os.fspath(directory), **options)  # type: ignore[operator]
    tokenizer.save_pretrained(os.fspath(directory))  # type: ignore[attr-defined]

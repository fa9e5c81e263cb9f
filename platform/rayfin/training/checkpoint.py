"""Finding, reading and ending a trial's checkpoints; each directory is whole or absent.

A checkpoint is of no strategy and no number of workers: safetensors hold what is trained and the
optimizer's state, whole and by name, and JSON the rest, a sum of every file included. Only the
random states are pickled, by Transformers, and read as plain values (`weights_only`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfin.errors import StorageError
from rayfin.models import BASE_BITS, BASE_IDENTITY, Base
from rayfin.models.chat_templates import CHAT_TEMPLATE, template_label
from rayfin.models.ends import END_OF_TURN, Ends
from rayfin.models.quiet import no_progress_bars
from rayfin.objects import checksum_of, checksums_of
from rayfin.paths import METADATA, StoragePath, digest_files, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

_STAGING = ".staging"
_PROGRESS = "progress.json"
_SUMS = "sums.json"


@dataclass(frozen=True)
class TrainingProgress:
    """The part of a checkpoint that is neither tensors nor Transformers' own state."""

    train_seconds: float
    schedule_steps: int
    learning_rate: float
    schedule: dict[str, Any] | None = None
    """The state of a schedule that follows the evaluations, and no function of the steps is."""
    refused: int | None = None
    """The number of streamed samples so far that the chat template refuses, if any."""


def staging(location: StoragePath) -> Path:
    """Where a checkpoint is written before it is renamed; never read."""
    return location.path / _STAGING


def latest_checkpoint(
    location: StoragePath, needs: Callable[[Path], str | None] = lambda _: None
) -> Path | None:
    """Return the newest whole checkpoint at `location`; leftovers of a killed write don't count.

    One whose files are not as they were written (a torn disk, a lost block) is passed over, and so
    is one that `needs` another (it returns its name) that is not whole.
    """
    for checkpoint in reversed(_checkpoints(location)):
        damaged = _harm(checkpoint)
        if damaged is None and (other := needs(checkpoint.path)) is not None:
            harm = _harm(location / other) if other != checkpoint.path.name else None
            damaged = f"{other}, which it needs: {harm}" if harm is not None else None
        if damaged is None:
            return checkpoint.path
        log.warning(
            "checkpoint %s is damaged (%s); going back to the one before", checkpoint, damaged
        )
    return None


def _checkpoints(location: StoragePath) -> list[StoragePath]:
    named = (name for name in location.names() if name.removeprefix("checkpoint-").isdigit())
    return [location / name for name in sorted(named, key=_step)]


def resume_line(location: StoragePath) -> str | None:
    """Return where a trial with these checkpoints goes on; None where it has none."""
    with contextlib.suppress(OSError, StorageError):  # the training says what is wrong with it
        for one in reversed(_checkpoints(location)):
            if one.exists():
                return f"goes on from step {_step(one.path.name)}, its newest checkpoint"
    return None


def _step(name: str) -> int:
    return int(name.removeprefix("checkpoint-"))


def _harm(checkpoint: StoragePath) -> str | None:
    return _damaged(checkpoint.path) if checkpoint.download() else "it is not whole"


def _damaged(checkpoint: Path) -> str | None:
    """Return what is not as it was written, or None."""
    try:
        sums: dict[str, list[int]] = json.loads((checkpoint / _SUMS).read_text(encoding="utf-8"))
        changed = (
            name for name, wanted in sums.items() if checksum_of(checkpoint / name) != wanted
        )
        return next(changed, None)
    except (OSError, ValueError, AttributeError) as error:
        return str(error) or type(error).__name__


def publish_checkpoint(
    location: StoragePath, name: str, needs: Callable[[Path], str | None] = lambda _: None
) -> None:
    """Make a staged checkpoint the newest one; drop all others but the one before it.

    Where the newest turns out to be torn, the one before it is there. What either of the two
    `needs` (it returns the name of another one) stays, too.
    """
    staged, checkpoint = staging(location) / name, location / name
    sums = checksums_of(staged)
    write_json(staged / _SUMS, sums)
    for path in sums:
        with (staged / path).open("rb") as written:
            os.fsync(written.fileno())
    shutil.rmtree(checkpoint.path, ignore_errors=True)
    staged.rename(checkpoint.path)
    checkpoint.upload()
    # Of a later step there may be what a killed worker did not write to its end.
    others = [other for other in _checkpoints(location) if other != checkpoint]
    before = [other for other in others if _step(other.path.name) < _step(name) and other.exists()]
    kept = {one.path.name for one in before[-1:]}
    for one in (*before[-1:], checkpoint):
        with contextlib.suppress(OSError, ValueError, LookupError):  # a torn one can't be used
            if one.path.is_dir() or one.download():
                kept |= {needs(one.path) or ""}
    for other in others:
        if other.path.name not in kept:
            other.remove()


def gather_random_states(checkpoint: Path, accelerator: Any) -> None:
    """Give the first worker the random states that each has written on its own machine.

    It publishes them all.
    """
    if (workers := accelerator.num_processes) == 1:
        return
    import torch

    name = "rng_state_{}.pth"
    states = [b""] * workers
    own = (checkpoint / name.format(accelerator.process_index)).read_bytes()
    torch.distributed.all_gather_object(states, own)
    if accelerator.is_main_process:
        for rank, state in enumerate(states):
            (checkpoint / name.format(rank)).write_bytes(state)


def clear_checkpoints(location: StoragePath) -> None:
    """Remove all checkpoints.

    Each is renamed first, so that a killed removal leaves none that looks whole.
    """
    if location.objects is not None:
        for checkpoint in _checkpoints(location):
            checkpoint.remove()
        location.remove()
        return
    doomed = location.path.with_name(f".{location.path.name}-done")
    shutil.rmtree(doomed, ignore_errors=True)
    if location.path.exists():
        location.path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def save_tensors(tensors: dict[str, torch.Tensor], directory: Path, name: str) -> None:
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, os.fspath(directory / f"{name}.safetensors"))


def load_tensors(directory: Path, name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(os.fspath(directory / f"{name}.safetensors"))


def save_progress(progress: TrainingProgress, directory: Path) -> None:
    told = {name: value for name, value in asdict(progress).items() if value is not None}
    write_json(directory / _PROGRESS, told)


def load_progress(directory: Path) -> TrainingProgress:
    """Return the progress in a checkpoint; what other versions wrote there is passed over."""
    values = json.loads((directory / _PROGRESS).read_text(encoding="utf-8"))
    known = {field.name for field in fields(TrainingProgress)}
    return TrainingProgress(**{name: values[name] for name in values if name in known})


def save_adapter(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    ends: Ends,
    weights: dict[str, torch.Tensor] | None = None,
    chat_template: str | None = None,
) -> None:
    """Write a plain PEFT adapter (or, for full fine-tuning, a plain model) with its tokenizer.

    `ends`, which it was taught, are in rayfin.json, as is the name of a `chat_template` that is not
    the base's own; a plain model's tokens are also in its
    generation_config.json, where whoever runs it looks. `weights`: the whole model's, where
    `model` itself has a part of them only.
    """
    from peft import PeftModel, PeftType
    from peft.utils.warning import PeftWarning

    # `auto` would ask a model hub whether the vocabulary has grown.
    options: dict[str, Any] = {}
    if isinstance(model, PeftModel):
        options["save_embedding_layers"] = False
    elif weights is not None:
        options["state_dict"] = weights
    if not isinstance(model, PeftModel):
        _add_ends(model.generation_config, ends)
    # P-Tuning saves what its encoder puts out now: dropout would be saved with it.
    model.eval()
    with no_progress_bars(), warnings.catch_warnings():
        if isinstance(model, PeftModel) and model.peft_type == PeftType.ADALORA:
            # A matrix that was left no rank is empty on purpose; peft takes it for a lost shard.
            warnings.filterwarnings("ignore", ".*tensor\\(s\\) have invalid shape", PeftWarning)
        model.save_pretrained(os.fspath(directory), **options)  # type: ignore[operator]
    tokenizer.save_pretrained(os.fspath(directory))
    told: dict[str, Any] = {END_OF_TURN: ends.as_json(tokenizer)}
    if chat_template is not None:
        told[CHAT_TEMPLATE] = template_label(chat_template)
    write_json(directory / METADATA, told)


def _add_ends(generation: Any, ends: Ends) -> None:
    """Add those of `ends` to the tokens, one or a list, that end what a model generates."""
    known = generation.eos_token_id
    listed = known if isinstance(known, list) else [] if known is None else [known]
    if added := [token for token in ends.token_ids if token not in listed]:
        generation.eos_token_id = [*listed, *added]


def vouch(directory: Path, base: Base, bits: int | None = None) -> None:
    """Add to an adapter's rayfin.json which base it was trained on, and digests of its files.

    `bits` are those of the base's weights without which the adapter is not exact, where there are
    such. Without digests anybody could have written it, and nobody believes it
    (`adapters.metadata`).
    """
    path = directory / METADATA
    told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    files = {file.name: file for file in sorted(directory.iterdir()) if file.name != METADATA}
    told |= {"base_model": base.name, BASE_IDENTITY: list(base.identities)}
    if bits is not None:
        told[BASE_BITS] = bits
    write_json(path, told | {"files": digest_files(files)})

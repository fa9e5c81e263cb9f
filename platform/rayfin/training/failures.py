"""The errors of a trial as ones that a person can act on."""

from __future__ import annotations

import errno

from rayfin.errors import RayfinError, StorageError, TrialError, TrialOutOfMemory

# As the system, safetensors (in Rust) and torch.save say it.
_DISK_FULL = ("No space left on device", "os error 28", "PytorchStreamWriter failed writing")
# As torch's CPU allocator, CUDA outside torch's own allocator, and cuBLAS say it.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def _is_full(error: BaseException) -> bool:
    """Return whether a disk is full or can't be written, in the words of whoever tried."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    if full or any(words in str(error) for words in _DISK_FULL):
        return True
    before = error.__cause__ or error.__context__
    return before is not None and _is_full(before)


def classified(error: Exception) -> RayfinError:
    """Return the error as one line that a person can act on."""
    import torch

    text = " ".join(str(error).split()) or type(error).__name__
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)
    )
    if memory:
        return TrialOutOfMemory(
            f"out of memory ({text[:200]}); lower train.per_device_train_batch_size or "
            "data.max_length, or set train.gradient_checkpointing=true"
        )
    if isinstance(error, RayfinError):
        return error
    if _is_full(error):
        return StorageError(
            f"storage: it can't be written ({text[:200]}); make room there, or give another one "
            "with storage=DIR. No finished trial is lost, and the same command goes on (a sweep "
            "with --resume)"
        )
    return TrialError(f"{type(error).__name__}: {text[:500]}")

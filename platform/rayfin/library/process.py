"""How a process is prepared before it loads torch: threads that don't spin, and quiet libraries."""

from __future__ import annotations

import logging
import os
import warnings

_ENVIRONMENT = {
    # Threads that spin while they wait slow each other down several times over when something else
    # runs on the machine; here or in a Ray worker, which inherits it.
    "OMP_WAIT_POLICY": "PASSIVE",
    # numpy's own threads spin whatever that says, and the advisor's matrices are small.
    "OPENBLAS_NUM_THREADS": "1",
}
_WARNINGS = (
    # PEFT still asks Transformers by the old name.
    "`is_gradient_checkpointing` is deprecated",
    # PEFT says so on every `generate` of a virtual-token method, and counts positions itself.
    "Position ids are not supported for parameter efficient tuning",
)
_DEEPSPEED = "Setting accelerator to CPU"
"""DeepSpeed says this on standard output when it is imported, as Accelerate does where it can."""


def prepare_process() -> None:
    """Set variables that libraries read when they load, and leave out what users can't act on.

    Variables that are set already stay; all other warnings are shown. Every command and every
    function of the library calls this first. It imports none of the libraries.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for words in _WARNINGS:
        warnings.filterwarnings("ignore", message=words)
    deepspeed = logging.getLogger("DeepSpeed")
    if _is_news not in deepspeed.filters:
        deepspeed.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_DEEPSPEED)

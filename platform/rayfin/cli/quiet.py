"""What libraries say on the terminal that a user can do nothing about: left out, each by its words.

All else that they say is shown.
"""

from __future__ import annotations

import logging
import warnings

_WARNINGS = (
    # PEFT still asks Transformers by the old name.
    "`is_gradient_checkpointing` is deprecated",
    # PEFT says so on every `generate` of a virtual-token method, and counts positions itself.
    "Position ids are not supported for parameter efficient tuning",
)
_DEEPSPEED = "Setting accelerator to CPU"
"""Said on standard output, by importing DeepSpeed, as Accelerate does where it can."""


def quiet_libraries() -> None:
    """To be called before any of them is imported; it imports none."""
    for words in _WARNINGS:
        warnings.filterwarnings("ignore", message=words)
    logging.getLogger("DeepSpeed").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_DEEPSPEED)

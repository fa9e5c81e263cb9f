"""What of a configuration decides how examples become tokens, beside the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rayfin.config.data import DataConfig
from rayfin.config.schema import TrainConfig
from rayfin.samples import ChatTurn, Example


@dataclass(frozen=True)
class TokenSettings:
    """The settings on which a sample's tokens and labels depend; the defaults change nothing."""

    chat_template: str | None = None
    """The template in place of the model's own, which the tokenizer was loaded with."""
    system: str | None = None
    """The system message of conversations that have none."""
    train_on: Literal["all", "last"] = "all"
    """The assistant's turns that have loss."""
    truncation: Literal["right", "left", "drop"] = "right"
    """What becomes of a sample that is too long."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What becomes of a conversation that the chat template refuses."""

    @classmethod
    def of(cls, data: DataConfig, train: TrainConfig) -> TokenSettings:
        """Return the settings of two sections of a configuration."""
        return cls(
            data.chat_template, data.system, train.train_on, data.truncation, data.on_bad_row
        )

    def of_conversations(self) -> list[str]:
        """Return the names of those that were set and mean nothing to plain texts."""
        chosen = {
            "data.chat_template": self.chat_template is not None,
            "data.system": self.system is not None,
            "train.train_on": self.train_on != "all",
        }
        return [name for name, is_set in chosen.items() if is_set]

    def with_system(self, example: Example) -> Example:
        """Return the example with the default system message, where it lacks one."""
        if self.system is None or example.text is not None or has_system(example.messages):
            return example
        first: ChatTurn = {"role": "system", "content": self.system}
        return replace(
            example,
            messages=(first, *example.messages),
            unlearned=tuple(turn + 1 for turn in example.unlearned),
            rejected=(first, *example.rejected) if example.rejected else (),
        )


def has_system(messages: Sequence[ChatTurn]) -> bool:
    """Whether a conversation begins with a system message."""
    return bool(messages) and messages[0]["role"] == "system"


DEFAULTS = TokenSettings()

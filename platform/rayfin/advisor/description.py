"""What is told of a model and of data in place of their files: a size, a number of rows, a length.

A configuration that is described so has names in the place of a model and of data that nothing can
be trained with by mistake: `a model of 8B`, `5000 rows`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayfin.advisor.candidates import given_settings
from rayfin.advisor.measurements import LengthFacts
from rayfin.advisor.published_models import published_model, size_note, usual_model
from rayfin.config import Config
from rayfin.errors import ConfigError
from rayfin.language import localized
from rayfin.models import ModelFacts, describe_model, is_hub, is_in_hub_cache, is_path

_P95, _LONGEST, _KEPT = 2.0, 4.0, 3.0
"""The length that 95 % of samples keep to, the longest one's, and that at which they are cut, as
multiples of the mean. These are assumptions, on the safe side for GSM8K (1.6 and 2.2 with
SmolLM2's tokenizer) and for intents of CLINC150 (1.2 and 1.6)."""
_MULTIPLE = 64
_MOST_ROWS, _MOST_TOKENS = 10**12, 10**7


@dataclass(frozen=True)
class Description:
    """What is told; None stands for what a model's or a data set's files say."""

    model_size_b: float | None = None
    """Billions of parameters."""
    rows: int | None = None
    """The number of training samples."""
    tokens_per_sample: float | None = None
    """The mean number of tokens of a sample."""

    def check(self, config: Config) -> None:
        """Raise ConfigError for what can't be, and for what `config` says otherwise."""
        for name, most in (("rows", _MOST_ROWS), ("tokens_per_sample", _MOST_TOKENS)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ConfigError(f"{name}={value:g} must be from 1 to {most:,}, or left out")
        if self.rows is None and self.tokens_per_sample is not None:
            raise ConfigError(
                f"tokens_per_sample={self.tokens_per_sample:g} needs rows, the number of samples; "
                "data.path=FILE says both"
            )
        written = given_settings(config)
        for name, settings in (
            ("model_size_b", ("model.name",)),
            ("rows", ("data.path", "data.sources", "data.eval_path")),
        ):
            twice = next((each for each in settings if each in written), None)
            if getattr(self, name) is not None and twice is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name):g} stands in the place of {twice}, which is "
                    "given too; leave one of them out"
                )

    def model(self, config: Config) -> tuple[ModelFacts, str | None]:
        """Return the facts of the model, and a line on what was guessed of it.

        A model of the hub that is not on this machine is the published one of its name; the hub is
        asked only where a name says no size. Raises ModelError where nothing is known of the model.
        """
        if self.model_size_b is not None:
            facts, like = usual_model(self.model_size_b)
            return facts, size_note(facts, like)
        named = config.model
        away = is_hub(named) and not is_path(named.name) and not is_in_hub_cache(named)
        if away and named.revision is None and (found := published_model(named.name)) is not None:
            return found
        return describe_model(named, weights=False), None

    def applied(self, config: Config) -> Config:
        """Return `config` with names that say what was told in the place of model and data."""
        changes: dict[str, Any] = {}
        if self.model_size_b is not None:
            name = f"a model of {self.model_size_b:g}B"
            changes["model"] = config.model.model_copy(update={"name": name})
        if self.rows is not None:
            changes["data"] = config.data.model_copy(update={"path": f"{self.rows} rows"})
        return config.model_copy(update=changes)

    @property
    def profile(self) -> Mapping[str, Any]:
        """What is told of the data, under the names of its profile."""
        told = {"rows_train": self.rows, "tokens_per_sample_mean": self.tokens_per_sample}
        return {name: value for name, value in told.items() if value is not None}

    @property
    def lengths(self) -> LengthFacts | None:
        """The lengths of samples by their mean; None where that was not told."""
        if (mean := self.tokens_per_sample) is None:
            return None
        return LengthFacts(mean, math.ceil(_P95 * mean), math.ceil(_LONGEST * mean), 1.0)

    @property
    def max_length(self) -> int | None:
        """The length at which samples are cut; None where their mean was not told."""
        if self.tokens_per_sample is None:
            return None
        return _MULTIPLE * math.ceil(_KEPT * self.tokens_per_sample / _MULTIPLE)

    @property
    def note(self) -> str | None:
        """The line that says what is assumed of the lengths; None where their mean was not told."""
        if self.tokens_per_sample is None:
            return None
        return localized(
            "95 % of the samples are taken to have at most {most:g} tokens, the longest "
            "{longest:g}; data.path=FILE counts them",
            most=_P95 * self.tokens_per_sample,
            longest=_LONGEST * self.tokens_per_sample,
        )


def is_described_model(config: Config) -> bool:
    """Return whether a configuration names a model of which only the size was told."""
    return re.fullmatch(r"a model of \S+B", config.model.name) is not None


def is_described_data(config: Config) -> bool:
    """Return whether a configuration names data of which only the number of rows was told."""
    return re.fullmatch(r"\d+ rows", config.data.path or "") is not None

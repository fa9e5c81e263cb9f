"""The sizes of published models, to answer for a model whose files are not here.

The settings are those of each model's config.json on the Hugging Face hub; a test compares the
numbers of parameters that they give with those that the models' pages name.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

from rayfin.advisor.model_names import facts_from_name
from rayfin.advisor.model_sizes import format_size
from rayfin.errors import ConfigError
from rayfin.language import localized
from rayfin.models.facts import ModelFacts
from rayfin.models.sizes import sizes_of
from rayfin.sizes import Sizes

_NAMES = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
    *("vocab_size", "max_position_embeddings", "tie_word_embeddings"),
)
_TIED, _UNTIED = True, False
_PUBLISHED: dict[tuple[str, float], tuple[Any, ...]] = {
    ("gemma2", 2): ("gemma2", 2304, 9216, 26, 8, 4, 256, 256000, 8192, _TIED),
    ("gemma2", 9): ("gemma2", 3584, 14336, 42, 16, 8, 256, 256000, 8192, _TIED),
    ("gemma2", 27): ("gemma2", 4608, 36864, 46, 32, 16, 128, 256000, 8192, _TIED),
    ("gemma3", 1): ("gemma3_text", 1152, 6912, 26, 4, 1, 256, 262144, 32768, _TIED),
    ("gemma3", 4): ("gemma3_text", 2560, 10240, 34, 8, 4, 256, 262208, 131072, _TIED),
    ("gemma3", 12): ("gemma3_text", 3840, 15360, 48, 16, 8, 256, 262208, 131072, _TIED),
    ("gemma3", 27): ("gemma3_text", 5376, 21504, 62, 32, 16, 128, 262208, 131072, _TIED),
    ("llama2", 7): ("llama", 4096, 11008, 32, 32, 32, 128, 32000, 4096, _UNTIED),
    ("llama2", 13): ("llama", 5120, 13824, 40, 40, 40, 128, 32000, 4096, _UNTIED),
    ("llama2", 70): ("llama", 8192, 28672, 80, 64, 8, 128, 32000, 4096, _UNTIED),
    ("llama3", 8): ("llama", 4096, 14336, 32, 32, 8, 128, 128256, 8192, _UNTIED),
    ("llama3", 70): ("llama", 8192, 28672, 80, 64, 8, 128, 128256, 8192, _UNTIED),
    ("llama3.1", 8): ("llama", 4096, 14336, 32, 32, 8, 128, 128256, 131072, _UNTIED),
    ("llama3.1", 70): ("llama", 8192, 28672, 80, 64, 8, 128, 128256, 131072, _UNTIED),
    ("llama3.1", 405): ("llama", 16384, 53248, 126, 128, 8, 128, 128256, 131072, _UNTIED),
    ("llama3.2", 1): ("llama", 2048, 8192, 16, 32, 8, 64, 128256, 131072, _TIED),
    ("llama3.2", 3): ("llama", 3072, 8192, 28, 24, 8, 128, 128256, 131072, _TIED),
    ("llama3.3", 70): ("llama", 8192, 28672, 80, 64, 8, 128, 128256, 131072, _UNTIED),
    ("mistral", 7): ("mistral", 4096, 14336, 32, 32, 8, 128, 32768, 32768, _UNTIED),
    ("olmo2", 7): ("olmo2", 4096, 11008, 32, 32, 32, 128, 100352, 4096, _UNTIED),
    ("olmo2", 13): ("olmo2", 5120, 13824, 40, 40, 40, 128, 100352, 4096, _UNTIED),
    ("phi3", 3.8): ("phi3", 3072, 8192, 32, 32, 32, 96, 32064, 4096, _UNTIED),
    ("phi4", 14): ("phi3", 5120, 17920, 40, 40, 10, 128, 100352, 16384, _UNTIED),
    ("qwen2.5", 0.5): ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, 32768, _TIED),
    ("qwen2.5", 1.5): ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, 131072, _TIED),
    ("qwen2.5", 3): ("qwen2", 2048, 11008, 36, 16, 2, 128, 151936, 32768, _TIED),
    ("qwen2.5", 7): ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, 131072, _UNTIED),
    ("qwen2.5", 14): ("qwen2", 5120, 13824, 48, 40, 8, 128, 152064, 131072, _UNTIED),
    ("qwen2.5", 32): ("qwen2", 5120, 27648, 64, 40, 8, 128, 152064, 131072, _UNTIED),
    ("qwen2.5", 72): ("qwen2", 8192, 29568, 80, 64, 8, 128, 152064, 131072, _UNTIED),
    ("qwen3", 0.6): ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, 40960, _TIED),
    ("qwen3", 1.7): ("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, 40960, _TIED),
    ("qwen3", 4): ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, 40960, _TIED),
    ("qwen3", 8): ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, 40960, _UNTIED),
    ("qwen3", 14): ("qwen3", 5120, 17408, 40, 40, 8, 128, 151936, 40960, _UNTIED),
    ("qwen3", 32): ("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, 40960, _UNTIED),
    ("smollm2", 0.135): ("llama", 576, 1536, 30, 9, 3, 64, 49152, 8192, _TIED),
    ("smollm2", 0.36): ("llama", 960, 2560, 32, 15, 5, 64, 49152, 8192, _TIED),
    ("smollm2", 1.7): ("llama", 2048, 8192, 24, 32, 32, 64, 49152, 8192, _TIED),
    ("smollm3", 3): ("smollm3", 2048, 11008, 36, 16, 4, 128, 128256, 65536, _TIED),
}
_USUAL = (
    *(("smollm2", 0.135), ("smollm2", 0.36), ("qwen2.5", 0.5), ("llama3.2", 1), ("qwen2.5", 1.5)),
    *(("llama3.2", 3), ("qwen2.5", 7), ("llama3.1", 8), ("qwen2.5", 14), ("qwen2.5", 32)),
    *(("llama3.1", 70), ("llama3.1", 405)),
)
"""The models whose shapes stand in for others of about their size."""
_SAME_SIZE = 1.06
"""The largest factor between the size in a name and that of the table for one and the same model:
names round (`phi-4` has 14.7 billion parameters)."""
_MORE_THAN_TEXT = re.compile(r"(?<![a-z])(vl|omni|vision|audio|multimodal)(?![a-z])")
"""What is in the names of models that have an encoder of images or sound beside the shapes here."""
LEAST_B, _MOST_B = 0.01, 10_000.0


def published_model(name: str) -> tuple[ModelFacts, str] | None:
    """Return a model's facts by its name alone, with a line that says where they come from.

    They are those of its family and size in the table, or else of a usual model of the size that
    the name says. Returns None for a name without a size.
    """
    said = facts_from_name(name)
    if said.size_b is None or not LEAST_B <= said.size_b <= _MOST_B:
        return None
    if (facts := known_model(name)) is not None:
        return facts, localized(
            "the sizes of {model} are those published for {family} of {size}; its files are "
            "not here",
            model=name,
            family=said.generation,
            size=format_size(facts.parameters),
        )
    facts, like = usual_model(said.size_b, name)
    guess = _guess(facts, like)
    if said.active_b == said.size_b:
        return facts, localized(
            "by its name {model} has {guess}; its files are not here", model=name, guess=guess
        )
    return facts, localized(
        "by its name {model} has {guess}, and it is taken to be dense, which says too much of its "
        "time; its files are not here",
        model=name,
        guess=guess,
    )


def known_model(name: str) -> ModelFacts | None:
    """Return the facts of a model whose family and size are in the table, or None."""
    said = facts_from_name(name)
    dense, text_alone = said.active_b == said.size_b, not _MORE_THAN_TEXT.search(name.lower())
    if said.size_b is None or not dense or not text_alone:
        return None
    for (generation, billions), shape in _PUBLISHED.items():
        same = abs(math.log(said.size_b / billions)) <= math.log(_SAME_SIZE)
        if same and generation == said.generation:
            return _facts(name, _sizes(shape))
    return None


def usual_model(size_b: float, name: str | None = None) -> tuple[ModelFacts, str]:
    """Return the facts of a usual model of `size_b` billion parameters, and which one it is like.

    It is the published model of the nearest size with more or fewer layers. Raises ConfigError for
    a size that no language model has.
    """
    if not LEAST_B <= size_b <= _MOST_B:
        raise ConfigError(
            f"model_size_b={size_b:g} must be from {LEAST_B:g} to {_MOST_B:g}: it is in billions "
            "of parameters, so that 8 stands for a model of 8B"
        )
    every = {key: _sizes(_PUBLISHED[key]) for key in _USUAL}
    total = size_b * 1e9
    near = min(every, key=lambda key: abs(math.log(every[key].parameters / total)))
    like = every[near]
    rest = like.parameters - like.linear_parameters
    layers = max(1, round(like.num_layers * max(0.0, total - rest) / like.linear_parameters))
    linear = like.linear_parameters // like.num_layers * layers
    sizes = replace(
        like, num_layers=layers, linear_parameters=linear, parameters=max(round(total), linear)
    )
    return _facts(name or f"a model of {size_b:g}B", sizes), f"{near[0]}-{near[1]:g}B"


def shown_model(name: str) -> str:
    """Return a model's name as people are shown it."""
    size = re.fullmatch(r"a model of (\S+)B", name)
    return localized("a model of {size}B", size=size[1]) if size else name


def size_note(facts: ModelFacts, like: str) -> str:
    """Return the line that says what was guessed of a model of which only the size is known."""
    return localized("the model is taken to have {guess}", guess=_guess(facts, like))


def _guess(facts: ModelFacts, like: str) -> str:
    size = format_size(facts.parameters)
    return localized("{size}, and its shapes are guessed from {like}", size=size, like=like)


def _sizes(shape: tuple[Any, ...]) -> Sizes:
    settings = dict(zip(_NAMES, shape, strict=True)) | {"dtype": "bfloat16"}
    found = sizes_of(settings)
    assert found is not None, "every row of the table has a formula"
    return found


def _facts(name: str, sizes: Sizes) -> ModelFacts:
    return ModelFacts(name=name, identity=name, **vars(sizes))

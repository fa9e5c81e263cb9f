"""Find a model's identity and sizes without loading its weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rayfin.config.schema import ModelConfig
from rayfin.errors import ModelError
from rayfin.models.bundled import BUNDLED
from rayfin.models.checkpoint import check_causal, has_weights, read_config, weight_files
from rayfin.models.sizes import sizes_of
from rayfin.models.source import is_hub, model_directory
from rayfin.sizes import Sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLE = 4096
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


@dataclass(frozen=True, kw_only=True)
class ModelFacts(Sizes):
    """The name, identity and sizes of a base model."""

    name: str
    identity: str

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as JSON stores them."""
        return asdict(self)


def identity(config: ModelConfig) -> str:
    """Return a stable identity of weights and tokenizer, the same on every machine.

    It is `name@version` for a bundled model, `id@commit` for a hub model, and `local@` with 16
    hexadecimal digits for a directory. Raises ModelError.
    """
    if config.name in BUNDLED:
        return f"{config.name}@{BUNDLED[config.name].version}"
    directory = model_directory(config, weights=False)
    if is_hub(config):
        return f"{config.name}@{directory.name}"
    return content_identity(directory)


def content_identity(directory: Path, *, weights: bool = True) -> str:
    """Return `local@` and 16 hexadecimal digits, a digest of a model's files; raises ModelError.

    The headers and both ends of every tensor are hashed, by which a trained copy differs. Whole
    files would take minutes, and their first bytes are the embedding, which merged adapters keep.
    Without `weights`, only the configuration and the tokenizer are.
    """
    read_config(directory)
    digest = hashlib.sha256()
    for name in ("config.json", *_TOKENIZER_FILES):
        if (path := directory / name).is_file():
            digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    for part in weight_files(directory) if weights else ():
        digest.update(part.path.name.encode() + part.header)
        with part.path.open("rb") as file:
            for first, last in part.spans:
                file.seek(first)
                digest.update(file.read(min(_SAMPLE, last - first)))
                file.seek(max(first, last - _SAMPLE))
                digest.update(file.read(min(_SAMPLE, last - first)))
    return f"local@{digest.hexdigest()[:16]}"


def max_positions(config: ModelConfig) -> int | None:
    """Return the longest sequence of the model in tokens, or None where config.json doesn't say.

    Raises ModelError.
    """
    settings = read_config(model_directory(config, weights=False))
    parts = (settings, settings.get("text_config"))
    found = (part.get(name) for part in parts if isinstance(part, dict) for name in _POSITIONS)
    return next((value for value in found if isinstance(value, int)), None)


def weight_names(config: ModelConfig) -> list[str]:
    """Return the names of the modules with a weight matrix, as the files have them.

    The list is empty for a hub model, whose weights may not be here yet. Raises ModelError.
    """
    if is_hub(config):
        return []
    matrices = (
        name
        for file in weight_files(model_directory(config))
        for name, tensor in json.loads(file.header).items()
        if name != "__metadata__" and len(tensor["shape"]) > 1
    )
    return [name.removesuffix(".weight") for name in matrices]


def meta_model(config: ModelConfig) -> PreTrainedModel:
    """Return the model on torch's meta device: all modules without weights; raises ModelError."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = model_directory(config, weights=False)
    check_causal(directory)
    try:
        settings = AutoConfig.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
        with torch.device("meta"):
            return cast(
                "PreTrainedModel",
                AutoModelForCausalLM.from_config(settings, trust_remote_code=False),
            )
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"model.name: no model can be built from '{directory / 'config.json'}' ({reason}); "
            "check the file"
        ) from error


def lacks_weights(config: ModelConfig) -> bool:
    """Whether the model is a local directory without weights."""
    if config.name in BUNDLED or is_hub(config):
        return False
    return not has_weights(model_directory(config, weights=False))


def describe_model(config: ModelConfig, *, weights: bool = True) -> ModelFacts:
    """Return the facts of a model, read from its configuration; raises ModelError.

    For common architectures that takes milliseconds and neither torch nor transformers (`sizes`).
    Without `weights`, a directory that has none will do; its identity is that of its other files.
    """
    directory = model_directory(config, weights=False)
    sizes = sizes_of(read_config(directory)) or _sizes_of_meta_model(meta_model(config))
    bare = not weights and lacks_weights(config)
    known_by = content_identity(directory, weights=False) if bare else identity(config)
    return ModelFacts(name=config.name, identity=known_by, **vars(sizes))


def _sizes_of_meta_model(model: PreTrainedModel) -> Sizes:
    import torch
    from transformers.pytorch_utils import Conv1D

    settings = model.config
    head = model.get_output_embeddings()
    text = settings.get_text_config()
    heads = text.num_attention_heads
    return Sizes(
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear_parameters=sum(
            module.weight.numel()
            for module in model.modules()
            if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
        ),
        hidden_size=text.hidden_size,
        # GPT-2 and OPT have names of their own, and GPT-2 leaves its default unsaid.
        intermediate_size=_first(text, "intermediate_size", "n_inner", "ffn_dim")
        or 4 * text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=_first(text, "num_key_value_heads") or heads,
        head_dim=_first(text, "head_dim") or text.hidden_size // heads,
        vocab_size=text.vocab_size,
        max_position_embeddings=_first(text, "max_position_embeddings"),
        dtype=str(settings.dtype or torch.float32).removeprefix("torch."),
    )


def _first(settings: Any, *names: str) -> int | None:
    """Return the first of these settings that has a value."""
    values = (getattr(settings, name, None) for name in names)
    return next((value for value in values if value is not None), None)

"""A language model that makes a vector of each text, close ones of texts with a similar meaning."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from rayfin import hub
from rayfin.config.schema import ModelConfig
from rayfin.errors import ConfigError, ModelError
from rayfin.models.checkpoint import REPLACE, read_config, weight_files
from rayfin.models.load import load_tokenizer
from rayfin.models.quiet import no_progress_bars
from rayfin.models.source import is_hub, model_directory

OPTION = "--embedding-model"
MAX_TOKENS = 512
"""The most tokens of a text that are read; models for sentence embeddings were made for few."""

Pooling = Literal["mean", "cls"]
_POOLINGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "mean": "mean",
    "cls": "cls",
}
_MODULES = {"Transformer", "Pooling", "Normalize"}
_POOLING_FILE = "1_Pooling/config.json"


class EmbeddingModel:
    """Makes a vector of length 1 from each text by the last hidden state of a language model.

    It is the mean over the text's tokens, or the state of the first one where the model's
    `1_Pooling/config.json`, as sentence-transformers writes it, says so.
    """

    def __init__(self, name: str) -> None:
        """Load a bundled model, a directory or a hub id, on a GPU if there is one.

        Raises ModelError where it can't be loaded, is no encoder or decoder alone, or needs layers
        or a pooling that are not supported.
        """
        import torch

        if not name:
            raise ConfigError(f"{OPTION}: '' is no model; give a directory or a hub id")
        self.name = name
        """The name as the user gave it."""
        self.truncated = 0
        """The number of texts so far that were longer than what is read of them."""
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        """Where the model computes, in float32."""
        config = ModelConfig(name=name)
        with _errors_of_option():
            directory = model_directory(config)
            weight_files(directory)
            self.pooling = _pooling(directory, config)
            self._tokenizer: Any = load_tokenizer(config)
            self._model = _load(directory, name).to(self.device)
            sentences = _read(directory / "sentence_bert_config.json")
        limits = (
            MAX_TOKENS,
            self._tokenizer.model_max_length,
            getattr(self._model.config, "max_position_embeddings", None),
            sentences.get("max_seq_length") if isinstance(sentences, dict) else None,
        )
        self.max_tokens = min(int(limit) for limit in limits if limit)
        """The number of tokens that are read of a text."""
        self.size = 0
        """The number of elements of a vector."""
        try:
            self.size = self.encode(["a " * self.max_tokens]).shape[1]
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{OPTION}: '{name}' can't embed a text of {self.max_tokens} tokens "
                f"({_first_line(error)}); choose a model for sentence embeddings"
            ) from error
        self.truncated = 0

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the vectors of some texts, one a row, which fit into memory together.

        The vector of a text without any token is zero. Raises ModelError where the model computes
        what is no number.
        """
        import torch

        batch = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        self.truncated += sum(bool(each.overflowing) for each in batch.encodings or ())
        mask = batch["attention_mask"].to(self.device)
        if not mask.shape[1]:
            return np.zeros((len(texts), self.size), np.float32)
        with torch.inference_mode():
            ids = batch["input_ids"].to(self.device)
            states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
            read = mask.bool().unsqueeze(2)
            if self.pooling == "mean":
                pooled = states.where(read, 0).sum(1) / read.sum(1).clamp(min=1)
            else:
                pooled = states[:, 0].where(read[:, 0], 0)
            vectors = torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()
        if not np.isfinite(vectors).all():
            raise ModelError(
                f"{OPTION}: '{self.name}' computes numbers that are infinite or none at all; "
                "choose another model"
            )
        return cast("NDArray[np.float32]", vectors)


@contextmanager
def _errors_of_option() -> Iterator[None]:
    """Name the option in errors that name the setting of a training's model."""
    try:
        yield
    except ModelError as error:
        raise ModelError(str(error).replace("model.name:", f"{OPTION}:", 1)) from error


def _load(directory: Path, name: str) -> Any:
    """Return the model without a head, in float32 and frozen, from safetensors."""
    import transformers

    # Transformers warns of weights of a head, which is not used here, and of sharding.
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with no_progress_bars():
            model, report = transformers.AutoModel.from_pretrained(
                directory,
                dtype="float32",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if "allocate memory" in str(error):  # which is no fault of the files
            raise
        raise ModelError(
            f"model.name: '{name}' can't be loaded from '{directory}' ({_first_line(error)}); "
            f"{REPLACE}"
        ) from error
    finally:
        logger.setLevel(level)
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"model.name: '{name}' is an encoder with a decoder; give a model that is one of them"
        )
    # BERT's pooler is made for its next-sentence task, and is not used here.
    if missing := sorted(k for k in report["missing_keys"] if not k.startswith("pooler.")):
        raise ModelError(
            f"model.name: the weights in '{directory}' lack {len(missing)} of the model's tensors "
            f"('{missing[0]}', …); {REPLACE}"
        )
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def _pooling(directory: Path, config: ModelConfig) -> Pooling:
    """Return how the model's files say that its states become one vector; mean if they don't."""
    read_config(directory)
    modules = _read(directory / "modules.json") or []
    kinds = {str(module["type"]).rpartition(".")[2] for module in modules}
    if other := sorted(kinds - _MODULES):
        raise ModelError(
            f"model.name: '{config.name}' has a module {other[0]}, which is not supported; choose "
            f"a model with {', '.join(sorted(_MODULES))} alone"
        )
    file = directory / _POOLING_FILE
    if "Pooling" in kinds and not file.exists():
        # Only files of the top directory are downloaded with a model.
        failure = _download_pooling(directory, config.name) if is_hub(config) else None
        if not file.exists():
            raise ModelError(
                f"model.name: '{file}' is missing, which says how '{config.name}' pools"
                f"{f' ({failure})' if failure else ''}; {REPLACE}"
            )
    pooling = _read(file)
    if pooling is None:
        return "mean"
    named = pooling.get("pooling_mode")
    modes = [k for k, v in pooling.items() if k.startswith("pooling_mode_") and v is True]
    modes += [named] if named else []
    if len(found := {_POOLINGS.get(mode) for mode in modes}) != 1 or None in found:
        raise ModelError(
            f"model.name: '{file}' asks for the pooling {', '.join(modes) or 'none'}; choose a "
            "model that pools by mean_tokens or by cls_token"
        )
    return cast("Pooling", found.pop())


def _download_pooling(directory: Path, name: str) -> Exception | None:
    from huggingface_hub import hf_hub_download

    # The directory in the hub's cache has the name of the commit.
    return hub.ask(lambda: hf_hub_download(name, _POOLING_FILE, revision=directory.name))


def _read(path: Path) -> Any:
    """Return what a JSON file holds, or None where there is none."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.name: '{path}' is no readable JSON ({error}); {REPLACE}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]

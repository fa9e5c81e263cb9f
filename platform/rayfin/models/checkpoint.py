"""Read a checkpoint directory without torch: config.json and the headers of safetensors files."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayfin.errors import ModelError

REPLACE = (
    "replace it by a whole copy (a bundled model's directory can be deleted: it is made again)"
)
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file: its raw header, and each tensor's (start, end) in bytes of the file."""

    path: Path
    header: bytes
    spans: tuple[tuple[int, int], ...]


def read_config(directory: Path) -> dict[str, Any]:
    """Return config.json of a checkpoint; raises ModelError where it is missing or unreadable."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(
            f"model.name: '{directory}' has no config.json; give a directory that "
            "save_pretrained wrote or that was fetched from the hub"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.name: '{path}' is no readable JSON ({error}); {REPLACE}"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"model.name: '{path}' holds no JSON object; {REPLACE}")
    return config


def has_weights(directory: Path) -> bool:
    """Whether a directory has weights in any format, or the index of some."""
    names = ("model.safetensors", "model.safetensors.index.json", *_PICKLES)
    return any(next(directory.glob(name), None) for name in names)


def weight_files(directory: Path) -> list[WeightFile]:
    """Return the safetensors files of a checkpoint.

    Raises ModelError for missing, truncated or pickled weights.
    """
    index = directory / "model.safetensors.index.json"
    if (single := directory / "model.safetensors").is_file():
        paths = [single]
    elif index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"model.name: '{index}' can't be read; {REPLACE}") from error
        paths = [directory / name for name in names]
    elif any(next(directory.glob(pattern), None) for pattern in _PICKLES):
        raise ModelError(
            f"model.name: '{directory}' has pickled weights only, which can run code when opened; "
            "save it as safetensors, save_pretrained(directory)"
        )
    else:
        raise ModelError(f"model.name: '{directory}' has no model.safetensors; {REPLACE}")
    return [_read_header(path) for path in paths]


def _read_header(path: Path) -> WeightFile:
    """Read the header of a safetensors file: 8 bytes of length, then JSON, then the tensors.

    The format is documented at https://huggingface.co/docs/safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("its header is cut short")
            header = file.read(length)
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        spans = sorted(tuple(tensor["data_offsets"]) for tensor in tensors.values())
        if spans and 8 + length + spans[-1][1] != size:
            raise ValueError(f"it has {size} bytes and should have {8 + length + spans[-1][1]}")
    except FileNotFoundError as error:
        raise ModelError(f"model.name: the weights '{path}' are missing; {REPLACE}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(
            f"model.name: the weights '{path}' are damaged ({error}); {REPLACE}"
        ) from error
    start = 8 + length
    return WeightFile(path, header, tuple((start + first, start + last) for first, last in spans))


def check_causal(directory: Path) -> None:
    """Raise ModelError unless this is a causal language model of a known architecture."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    config = read_config(directory)
    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f"model.name: '{directory}' has model_type '{kind}', which transformers doesn't know; "
            "code that comes with a model is never run, so choose one of a known architecture"
        )
    classes = config.get("architectures") or [CAUSAL.get(kind)]
    known = {name for value in CAUSAL.values() for name in _names(value)}
    if not known.intersection(classes):
        raise ModelError(
            f"model.name: '{directory}' is a {classes[0] or kind}, no causal language model; "
            "give one that generates text, such as a …ForCausalLM"
        )


def check_loadable(directory: Path, quantization_bit: int | None) -> None:
    """Raise ModelError for a checkpoint that can't be loaded so, before its tensors are read."""
    check_causal(directory)
    weight_files(directory)
    if quantization_bit is not None and "quantization_config" in read_config(directory):
        raise ModelError(
            f"method.quantization_bit: {quantization_bit}, but '{directory}' is quantised already; "
            "give the original model, or set method.quantization_bit=null"
        )


def _names(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)

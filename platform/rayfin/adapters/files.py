"""The files of one adapter: select, check and copy them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rayfin.errors import AdapterError, StorageError
from rayfin.paths import METADATA, TRAINING_STATE

_MAX_HEADER_BYTES = 100_000_000
"""safetensors refuses longer headers."""

MAX_JSON_BYTES = 16 * 2**20
"""The largest JSON file that is read; the index of a model of 671 billion weights has 9 MB."""
READ_AS_JSON = (
    "adapter_config.json",
    "config.json",
    "model.safetensors.index.json",
    METADATA,
)
"""The files of an adapter or full fine-tune that are parsed when it is published."""

FULL = "FULL"
"""The `peft_type` of a full fine-tune, which is a whole model rather than an adapter."""

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_MODEL = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
)
CONFIGS = (_ADAPTER[0], _MODEL[0])
"""The file that an adapter has, and the one that a full fine-tune has in its place."""
# Suffixes are spelled out so that no pickle is ever taken along.
_TOKENIZER = (
    "tokenizer*.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*.jinja",
    "chat_template*.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter's own files say about it; `base_model` is None where they don't say."""

    peft_type: str
    base_model: str | None


def select_files(source: Path) -> dict[str, Path]:
    """Return the real paths of the files that belong to the adapter in `source`, by name.

    Links are followed inside `source` only. Raises AdapterError for an adapter that is not whole.
    """
    if not source.is_dir():
        raise AdapterError(
            f"'{source}' is no directory; give one written by save_pretrained(), with "
            f"{' and '.join(_ADAPTER)}"
        )
    source = source.resolve()
    with storage_errors(f"'{source}'"):
        chosen = adapter_files(sorted(entry.name for entry in source.iterdir()))
        files = {name: _inside(source, name) for name in chosen}
        _refuse_outer_names(source, files)
        inspect_files(source, files)
    return files


def adapter_files(names: list[str]) -> list[str]:
    """Return the file names that belong to a directory's adapter or full fine-tune."""
    own = (*_ADAPTER, TRAINING_STATE) if _ADAPTER[0] in names else _MODEL
    patterns = (*own, *_TOKENIZER)
    return [name for name in names if any(fnmatchcase(name, one) for one in patterns)]


def _refuse_outer_names(source: Path, files: Mapping[str, Path]) -> None:
    """Raise AdapterError for a file that has another name outside `source` (a hard link).

    Like a link out of `source`, it may be somebody else's file.
    """
    inside = Counter((one.st_dev, one.st_ino) for one in (p.lstat() for p in source.iterdir()))
    for name, path in files.items():
        found = path.stat()
        if found.st_nlink > max(1, inside[found.st_dev, found.st_ino]):
            raise AdapterError(
                f"'{source / name}' is a hard link: the same file has a name outside '{source}', "
                "and might be another's; put a copy of the file there (cp -r makes one)"
            )


def list_files(directory: Path) -> dict[str, Path]:
    """Return the paths of all files in a published version; raises AdapterError for links."""
    files = {entry.name: entry for entry in sorted(directory.iterdir())}
    for path in files.values():
        if path.is_symlink() or not path.is_file():
            raise AdapterError(f"'{path}' is no regular file; remove it from the adapter")
    return files


def inspect_files(directory: Path, files: Mapping[str, Path]) -> AdapterFacts:
    """Inspect an adapter's files; raises AdapterError unless configuration and weights are whole.

    Weights are checked by safetensors' own reader: the header parses, every tensor's bytes match
    its dtype and shape, and the tensors cover the file exactly. No tensor is read.
    """
    if "adapter_config.json" in files:
        config = read_json(files["adapter_config.json"])
        peft_type = config.get("peft_type")
        if not isinstance(peft_type, str) or not peft_type:
            raise AdapterError(
                f"'{files['adapter_config.json']}' has no peft_type; save the adapter again "
                "with PEFT's save_pretrained()"
            )
        weights = {"adapter_model.safetensors", *({TRAINING_STATE} & files.keys())}
        facts = AdapterFacts(peft_type, _text(config.get("base_model_name_or_path")))
    else:
        weights = _model_weights(directory, files)
        facts = AdapterFacts(FULL, _text(read_json(files["config.json"]).get("_name_or_path")))
    for name in sorted(weights):
        if name not in files:
            raise AdapterError(
                f"'{directory}' has no {name}; save the adapter again with save_pretrained() "
                "(only safetensors are read: a pickle, such as adapter_model.bin, can run code)"
            )
        check_safetensors(files[name])
    return facts


def _model_weights(directory: Path, files: Mapping[str, Path]) -> set[str]:
    """Return the names of the weight files of a full fine-tune."""
    if "config.json" not in files:
        raise AdapterError(
            f"'{directory}' holds neither adapter_config.json (an adapter) nor config.json "
            "(a full fine-tune); give a directory written by save_pretrained()"
        )
    index = files.get("model.safetensors.index.json")
    if index is None:
        return {"model.safetensors"}
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise AdapterError(f"'{index}' has no weight_map; save the model again")
    # Loaders open whatever the index names, so it may name nothing but shards beside it.
    for shard in map(str, shards.values()):
        if not fnmatchcase(shard, "model-*.safetensors") or "/" in shard or "\\" in shard:
            raise AdapterError(
                f"'{index}' names '{shard}', not a model-*.safetensors beside it; "
                "save the model again"
            )
    return {str(shard) for shard in shards.values()}


def check_safetensors(path: Path) -> None:
    """Raise AdapterError unless `path` is a whole safetensors file with at least one tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        with _header_of(path) as copy, safe_open(str(copy), framework="numpy") as weights:
            empty = not weights.keys()
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise AdapterError(
            f"'{path}' is not a whole safetensors file ({reason}); save or copy the adapter again"
        ) from error
    if empty:
        raise AdapterError(f"'{path}' holds no tensor; save the adapter again")


@contextmanager
def _header_of(path: Path) -> Iterator[Path]:
    """Yield a file of the same size on this machine's own disk, with the header only.

    safetensors holds Python's global lock while it reads: where a network disk stalls, all threads
    of the process would wait.
    """
    with path.open("rb") as file, tempfile.NamedTemporaryFile(suffix=".safetensors") as copy:
        start = file.read(8)
        copy.write(start + file.read(min(int.from_bytes(start, "little"), _MAX_HEADER_BYTES)))
        copy.flush()
        copy.truncate(path.stat().st_size)
        yield Path(copy.name)


def copy_files(files: Mapping[str, Path], target: Path) -> None:
    """Copy files into a directory, synced to disk and read-only, as a version never changes."""
    for name, path in files.items():
        copy = target / name
        shutil.copyfile(path, copy)
        with copy.open("rb") as written:
            os.fsync(written.fileno())
        make_read_only(copy)


def make_read_only(path: Path) -> None:
    """Remove the permissions to write a file."""
    path.chmod(path.stat().st_mode & ~0o222)


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn the system's errors on reading or writing into one StorageError about `what`."""
    try:
        yield
    except TimeoutError:
        raise
    except OSError as error:
        where = f", {error.filename}" if error.filename else ""
        raise StorageError(
            f"{what} can't be used ({error.strerror or error}{where}); "
            "check that it is there, that you may use it, and that the disk has room"
        ) from error


def sync_directory(directory: Path) -> None:
    """Sync the names in a directory to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a regular file; raises AdapterError, or FileNotFoundError."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise AdapterError(f"'{path}' is no regular file; put the file itself there")
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise AdapterError(
                f"'{path}' has {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read: "
                "restore the file"
            )
        value = json.loads(text.decode("utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise AdapterError(
            f"'{path}' can't be read ({error.strerror or error}); check its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        # The decoder's own message may run over several lines or quote the file: keep the gist.
        reason = str(error).partition("\n")[0][:120] or "nested too deeply"
        raise AdapterError(
            f"'{path}' is not valid JSON ({reason}); publish the adapter again or restore the file"
        ) from error
    if not isinstance(value, dict):
        raise AdapterError(f"'{path}' holds no JSON object; restore the file")
    return value


def _inside(source: Path, name: str) -> Path:
    path = (source / name).resolve()
    # The hub's client keeps a snapshot's files beside it, in the same model's folder.
    cached = source.parent.name == "snapshots" and source.parents[1].name.startswith("models--")
    allowed = (source, source.parents[1] / "blobs") if cached else (source,)
    if not any(path.is_relative_to(place) for place in allowed):
        raise AdapterError(
            f"'{source / name}' is a link out of '{source}'; "
            "put the file itself there (cp -L follows links)"
        )
    if not path.is_file():
        raise AdapterError(f"'{source / name}' is no regular file; put the file itself there")
    return path


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None

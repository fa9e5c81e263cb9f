"""Read a PEFT directory that nobody vouches for, checking settings and tensors before use."""

from __future__ import annotations

import json
import math
import re
import stat
import struct
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rayfin.adapters.files import check_safetensors, read_json
from rayfin.adapters.metadata import trusted_metadata
from rayfin.errors import AdapterError
from rayfin.paths import METADATA
from rayfin.serving.engine.request import AdapterSource

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

MAX_JSON_BYTES = 4 * 2**20
MAX_HEADER_BYTES = 8 * 2**20
"""Of safetensors' own header: some 50,000 tensors."""
MAX_WEIGHTS_BYTES = 8 * 2**30
_MAX_NUMBER = 1e6
_MAX_PATTERNS = 1024

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PREFIX = "base_model.model."
# PEFT takes a pattern's keys for regular expressions. Without repetition and choice they are
# matched in linear time, whoever wrote them.
_HARMLESS_PATTERN = re.compile(r"(?:[\w.^$-]|\\[.dw]){1,256}")


def words(*lines: str) -> frozenset[str]:
    """Return the words of all lines."""
    return frozenset(word for line in lines for word in line.split())


# What a saved adapter computes doesn't depend on these: they are about training, or say what the
# tensors' own names and shapes say; or readers look at them.
COMMON = words(
    "auto_mapping base_model_name_or_path inference_mode peft_type peft_version revision task_type",
    "target_modules exclude_modules",
)


@dataclass(frozen=True)
class AdapterSettings:
    """The settings in adapter_config.json; each getter raises AdapterError for a wrong value."""

    ref: str
    values: Mapping[str, Any]

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or not value:
            raise self.wrong(key, "a text")
        return value

    def integer(self, key: str, least: int, most: int) -> int:
        return self.checked_integer(key, self.values.get(key), least, most)

    def checked_integer(self, key: str, value: Any, least: int, most: int) -> int:
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, f"a whole number from {least} to {most}", value)
        return value

    def number(self, key: str) -> float:
        return self.checked_number(key, self.values.get(key))

    def checked_number(self, key: str, value: Any) -> float:
        # NaN fits no interval.
        if type(value) not in (int, float) or not -_MAX_NUMBER <= value <= _MAX_NUMBER:
            raise self.wrong(key, f"a number from {-_MAX_NUMBER:g} to {_MAX_NUMBER:g}", value)
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        """Return an object; an empty one where the value is null or missing."""
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return value

    def pattern(self, key: str, check: Callable[[str, Any], float]) -> Callable[[str], Any]:
        """Return PEFT's rank_pattern or alpha_pattern as a function: module name -> its value, or
        None.

        The first key that matches the end of a name decides (peft.utils.other.get_pattern_key).
        """
        entries = self.mapping(key)
        if len(entries) > _MAX_PATTERNS:
            raise self.error(f"{key} has {len(entries)} entries; at most {_MAX_PATTERNS} are read")
        compiled = []
        for name, value in entries.items():
            if not _HARMLESS_PATTERN.fullmatch(name):
                raise self.error(
                    f"{key} has the key {shown(name)}; write names of modules there, "
                    "such as q_proj or layers.0.self_attn.q_proj"
                )
            checked = check(f"{key}[{shown(name)}]", value)
            compiled.append((re.compile(rf"(.*\.)?({name})$"), checked))
        return lambda module: next((value for at, value in compiled if at.match(module)), None)

    def expect(self, key: str, *allowed: Any, remedy: str = "train it again so") -> None:
        """Check that the value is one of `allowed`, or missing where None is."""
        value = self.values.get(key)
        # 1 == True in Python, and not in JSON.
        if not any(type(value) is type(one) and value == one for one in allowed):
            choices = " or ".join(shown(one) for one in allowed)
            raise self.error(
                f"{CONFIG} has {key}={shown(value)}, and the engine serves {choices}; {remedy}"
            )

    def expect_nothing_else(self, known: frozenset[str]) -> None:
        """Refuse any setting that isn't `known` and is on: it could change what the adapter
        computes.
        """
        for key, value in self.values.items():
            if key not in known and value not in (None, False, "", [], {}):
                raise self.error(
                    f"{CONFIG} sets {shown(key)} to {shown(value)}, which the engine does not "
                    "serve; train again without it, or merge the adapter into its base and serve "
                    "the merged model (model.name=DIRECTORY)"
                )

    def wrong(self, key: str, allowed: str, *value: Any) -> AdapterError:
        found = value[0] if value else self.values.get(key)
        return self.error(f"{CONFIG} has {key}={shown(found)}; it must be {allowed}")

    def error(self, what: str) -> AdapterError:
        return AdapterError(f"adapter '{self.ref}': {what}")


def read_settings(source: AdapterSource) -> tuple[AdapterSettings, Mapping[str, Any]]:
    """Read adapter_config.json, and rayfin.json where its digests are of these files; raises
    AdapterError.
    """
    path = source.path
    if path.is_symlink() or not path.is_dir():
        raise AdapterError(
            f"adapter '{source.ref}': '{path}' is no directory of its own; give the one that holds "
            f"{CONFIG} and {WEIGHTS}"
        )
    config = _small_json(source, CONFIG)
    if config is None:
        full = (path / "config.json").is_file()
        raise AdapterError(
            f"adapter '{source.ref}': "
            + (
                "it is a full fine-tune, a whole model; serve it as the base: "
                f"rayfin serve model.name={path}"
                if full
                else f"'{path}' has no {CONFIG}; save the adapter with PEFT's save_pretrained()"
            )
        )
    _small_json(source, METADATA)  # refuses one that is damaged or of no sane size
    return AdapterSettings(source.ref, config), trusted_metadata(path)


class AdapterWeights:
    """The tensors of a safetensors file that was checked as a whole; a context manager.

    Shapes are known from its header: `check` them all before the first `read`. The file is read and
    not mapped: one that is overwritten meanwhile is an error, where a mapped one ends the process.
    """

    def __init__(self, source: AdapterSource) -> None:
        """Raises AdapterError unless the file is there, whole, and of a sane size."""
        self.ref, self._path = source.ref, source.path / WEIGHTS
        size = _size(source, WEIGHTS)
        if size is None:
            raise self.error(
                f"'{source.path}' has no {WEIGHTS}; only safetensors are read: save the adapter "
                "again with a current PEFT's save_pretrained()"
            )
        if size > MAX_WEIGHTS_BYTES:
            raise self.error(
                f"'{self._path}' has {size} bytes; at most {MAX_WEIGHTS_BYTES} are read"
            )
        with self._path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if length > MAX_HEADER_BYTES:
                raise self.error(
                    f"'{self._path}' is no adapter's safetensors file: it announces a header of "
                    f"{length} bytes, and at most {MAX_HEADER_BYTES} are read; save it again"
                )
            check_safetensors(self._path)
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self._tensors: Mapping[str, Mapping[str, Any]] = header
        self._data = 8 + length
        self.aside: set[str] = set()
        """Tensors that are of no single adapted layer."""

    def __enter__(self) -> AdapterWeights:
        self._file = self._path.open("rb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def names(self) -> Set[str]:
        return self._tensors.keys()

    def by_module(self, suffixes: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """Return module name -> part -> tensor name, by `suffixes`: end of the name -> part.

        Every module has all parts. Raises AdapterError for any other tensor but those `aside`.
        """
        modules: dict[str, dict[str, str]] = {}
        for name in sorted(self.names - self.aside):
            end = next((end for end in suffixes if name.endswith(end)), None)
            if end is None or not name.startswith(PREFIX):
                raise self.error(
                    f"the engine does not serve the tensor {shown(name)}; adapt linear layers only "
                    "(target_modules=all-linear), or merge the adapter into its base and serve the "
                    "merged model (model.name=DIRECTORY)"
                )
            module = name.removeprefix(PREFIX).removesuffix(end)
            modules.setdefault(module, {})[suffixes[end]] = name
        for module, parts in modules.items():
            for end, part in suffixes.items():
                if part not in parts:
                    raise self.error(
                        f"the tensor {shown(PREFIX + module + end)} is missing; "
                        "save or copy the adapter again"
                    )
        return modules

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name]["shape"])

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises AdapterError unless these tensors are there, with these shapes."""
        for name, shape in shapes.items():
            if name not in self.names:
                raise self.error(
                    f"the tensor {shown(name)} is missing; save or copy the adapter again"
                )
            if self.shape(name) != shape:
                raise self.error(
                    f"the tensor {shown(name)} has shape {shown(list(self.shape(name)))}, and "
                    f"{CONFIG} and the served base ask for {list(shape)}; "
                    "use the adapter with the base that it was trained on"
                )
            if self._tensors[name]["dtype"] not in _DTYPES:
                raise self.error(
                    f"the tensor {shown(name)} is of type {self._tensors[name]['dtype']}; "
                    f"save it as {', '.join(_DTYPES)}"
                )

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor that was checked, as float32; raises AdapterError unless it is finite."""
        shape, dtype = self.shape(name), _DTYPES[self._tensors[name]["dtype"]]
        if not math.prod(shape):
            return torch.empty(shape)
        data = bytearray(math.prod(shape) * dtype.itemsize)
        self._file.seek(self._data + self._tensors[name]["data_offsets"][0])
        if self._file.readinto(data) != len(data):
            raise self.error(f"'{self._path}' changed while it was read; load the adapter again")
        tensor = torch.frombuffer(data, dtype=dtype).view(shape).to(torch.float32)
        if not is_finite(tensor):
            raise self.error(f"the tensor {shown(name)} holds NaN or infinity; train it again")
        return tensor

    def error(self, what: str) -> AdapterError:
        return AdapterError(f"adapter '{self.ref}': {what}")


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether there is no NaN and no infinity; one pass, and no copy as `torch.isfinite`
    makes.
    """
    if not tensor.numel():
        return True
    least, most = torch.aminmax(tensor)  # NaN if any element is
    return math.isfinite(least.item()) and math.isfinite(most.item())


def shown(value: Any) -> str:
    """Return `value` in one short line, whatever it is."""
    if isinstance(value, str):
        return repr(value if len(value) <= 120 else value[:120] + "…")
    if value is None or isinstance(value, (bool, int, float)):
        text = json.dumps(value)
        return text if len(text) <= 40 else text[:40] + "…"
    if isinstance(value, list) and len(value) <= 4 and all(type(one) is int for one in value):
        return str(value)
    return "an object" if isinstance(value, dict) else "a list"


def _small_json(source: AdapterSource, name: str) -> dict[str, Any] | None:
    """Return the object in a file of the adapter; None where there is no such file."""
    size = _size(source, name)
    if size is None:
        return None
    if size > MAX_JSON_BYTES:
        raise AdapterError(
            f"adapter '{source.ref}': '{source.path / name}' has {size} bytes; "
            f"at most {MAX_JSON_BYTES} are read"
        )
    return read_json(source.path / name)


def _size(source: AdapterSource, name: str) -> int | None:
    """Return a regular file's bytes, None if it is missing; raises AdapterError for links."""
    path: Path = source.path / name
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise AdapterError(
            f"adapter '{source.ref}': '{path}' can't be read ({error.strerror}); "
            "check its permissions"
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise AdapterError(
            f"adapter '{source.ref}': '{path}' is no regular file; put the file itself there "
            "(cp -L follows links)"
        )
    return found.st_size

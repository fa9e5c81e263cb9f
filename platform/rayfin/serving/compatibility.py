"""Check that an adapter can be served over a base model, without loading the base's weights."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from rayfin.adapters import AdapterVersion, Catalog
from rayfin.adapters.files import read_json, storage_errors
from rayfin.adapters.metadata import claimed_base, trusted_metadata
from rayfin.config.schema import ModelConfig
from rayfin.config.serving import EngineConfig, ServeConfig
from rayfin.errors import AdapterError, ModelError, UsageError
from rayfin.hardware import describe_hardware
from rayfin.models import (
    BASE_BITS,
    BASE_IDENTITY,
    Base,
    base_of,
    check_model,
    dtype_on,
    hub_id,
    load_tokenizer,
    meta_model,
)
from rayfin.serving.base_model import find_base
from rayfin.serving.engine.adapter import check_type, read_adapter
from rayfin.serving.engine.checks import BASE_IS_RIGHT, check_base, check_rank
from rayfin.serving.engine.layout import MAX_VIRTUAL_TOKENS, BaseLayout, linears_of
from rayfin.serving.engine.peft_files import AdapterSettings, read_settings
from rayfin.serving.engine.request import AdapterSource
from rayfin.serving.engine.vllm_backend import check_lora, check_lora_type
from rayfin.serving.engine.vocabulary import Vocabulary
from rayfin.serving.model_names import ModelNames, Refusal

log = logging.getLogger(__name__)

_MOST = 2**16
"""Versions of which it is remembered that they fit."""


def base_to_record(
    directory: Path, config: ServeConfig, *, is_right: bool
) -> tuple[ServeConfig, dict[str, Any]]:
    """Returns a deployment that could serve the adapter in `directory`, and what rayfin.json is to
    say of its base.

    The base is model.name where it was given, else the one that the adapter names. With `is_right`
    the user answers for it, whatever the adapter says. Raises AdapterError where the base can't be
    told or isn't here, before anything of the weights is read.
    """
    peft, metadata = (
        read_json(directory / "adapter_config.json"),
        trusted_metadata(directory, whole=True),
    )
    claim = claimed_base(peft, metadata)
    given = "name" in config.model.model_fields_set
    if not given:
        if claim is None:
            raise AdapterError(
                f"'{directory}' names no base model; if you know it: model.name=BASE "
                f"{BASE_IS_RIGHT}"
            )
        config = config.model_copy(
            update={
                "model": find_base(claim, config.model, "the adapter", more=f" {BASE_IS_RIGHT}")
            }
        )
    try:
        check_model(config.model, config.engine.quantization_bit)
        base = base_of(config.model)
    except ModelError as error:
        if given or claim is None:  # the user's own words
            raise
        raise AdapterError(
            f"its base '{claim.name[:200]}' is not here, and the adapter is held against it "
            f"({_why(error)}); give that model with model.name=DIRECTORY {BASE_IS_RIGHT}"
        ) from error
    name = base.name if is_right else claim.name if claim is not None else None
    told: dict[str, Any] = {} if name is None else {"base_model": name}
    # A hub id alone stays the name of other files, too, when the model is uploaded anew.
    known = claim is not None and (claim.identities or hub_id(claim.name) is None)
    if is_right or (known and claim is not None and claim.is_same(base)):
        told[BASE_IDENTITY] = list(base.identities)
    if BASE_BITS in metadata:
        told[BASE_BITS] = metadata[BASE_BITS]
    return config, told


def check_adapter(name: str, directory: Path, config: ServeConfig, told: Mapping[str, Any]) -> None:
    """Raises AdapterError where the engine of `config` could not serve the adapter exactly.

    `told` is what its rayfin.json is going to say.
    """
    source = AdapterSource(name, directory)
    base, model, engine = base_of(config.model), _meta_model(config.model), config.engine
    if engine.type == "vllm":
        check_lora(source, base, linears_of(model), engine.max_rank, told)
    else:
        dtype = dtype_on(config.model, describe_hardware("auto").device)
        layout = replace(
            BaseLayout.of(model, base),
            max_rank=engine.max_rank,
            max_virtual_tokens=min(MAX_VIRTUAL_TOKENS, engine.max_length - 2),
            max_table_bytes=engine.tables_mb * 2**20,
            itemsize=dtype.itemsize,
            quantization_bit=engine.quantization_bit,
        )
        read_adapter(source, layout.unloaded(), told).check_range(dtype)
    _vocabulary(config.model).check(source)


def served_names(config: ServeConfig, catalog: Catalog) -> ModelNames:
    """Return the names that a deployment of `config` answers to; looks at no file of `catalog` yet.

    Versions that its engine would refuse, as far as their settings tell, are refused there.
    """
    base = Path(config.model.name).expanduser()
    places = {str(base.resolve()): config.served_name} if base.is_dir() else {}
    refusal = RefusalCheck(config.model, config.engine)
    return ModelNames(catalog, config.served_name, places=places, refusal=refusal)


class RefusalCheck:
    """Tells why an engine would refuse a version of the registry, by its settings and facts alone.

    What only the tensors tell is found when they are read. May be called by several threads.
    """

    def __init__(self, model: ModelConfig, engine: EngineConfig) -> None:
        self._model, self._engine = model, engine
        self._lock = threading.Lock()
        self._base: tuple[Base | None] | None = None
        self._fitting: set[tuple[str, str]] = set()

    def __call__(self, version: AdapterVersion) -> Refusal | None:
        """Raises StorageError where the files can't be read now."""
        # A version never changes; its number is used once, but a registry may be another's.
        key = (version.ref, str(version.metadata.get("created_at")))
        if key in self._fitting or (base := self._of_base()) is None:
            return None
        source = AdapterSource(version.ref, version.path)
        try:
            with storage_errors(f"adapter '{version.ref}'"):
                settings, metadata = read_settings(source)
        except AdapterError as error:
            return Refusal("damaged", error) if version.path.is_dir() else None
        checks: dict[str, Callable[[], None]] = {
            "of another base": partial(check_base, settings, metadata, base, self._bits),
            "of a type that the engine does not serve": partial(self._check_type, settings),
            "of a rank above engine.max_rank": partial(self._check_rank, settings),
        }
        for what, check in checks.items():
            try:
                check()
            except AdapterError as error:
                return Refusal(what, error)
        if len(self._fitting) >= _MOST:
            self._fitting.clear()
        self._fitting.add(key)
        return None

    @property
    def _bits(self) -> int | None:
        return None if self._engine.type == "vllm" else self._engine.quantization_bit

    def _of_base(self) -> Base | None:
        """Return the served base; None where its files aren't on this machine."""
        with self._lock:
            if self._base is None:
                try:
                    self._base = (base_of(self._model),)
                except UsageError as error:
                    log.warning("adapters are not held against the base here: %s", error)
                    self._base = (None,)
            return self._base[0]

    def _check_type(self, settings: AdapterSettings) -> None:
        (check_lora_type if self._engine.type == "vllm" else check_type)(settings)

    def _check_rank(self, settings: AdapterSettings) -> None:
        rank = settings.values.get("r")
        # Where single layers have ranks of their own, this one may be none's.
        if type(rank) is int and not settings.values.get("rank_pattern"):
            check_rank(settings, rank, self._engine.max_rank)


@lru_cache(maxsize=1)
def _meta_model(model: ModelConfig) -> Any:
    """Build the model without weights; that blocks a server's other Python threads for a moment."""
    return meta_model(model)


@lru_cache(maxsize=1)
def _vocabulary(model: ModelConfig) -> Vocabulary:
    return Vocabulary(load_tokenizer(model).get_vocab())


def _why(error: ModelError) -> str:
    """Returns what went wrong without the remedy, which is another here."""
    text = str(error).partition("; ")[0].removeprefix("model.name: ")
    return text if len(text) <= 300 else f"{text[:300]}…"

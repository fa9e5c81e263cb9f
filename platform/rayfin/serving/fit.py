"""Checks that an adapter could be served over a base model, without loading the base's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayfin.adapters.files import read_json
from rayfin.adapters.metadata import claimed_base, trusted_metadata
from rayfin.config.serving import ServeConfig
from rayfin.errors import AdapterError, ModelError
from rayfin.hardware import describe_hardware
from rayfin.models import (
    BASE_IDENTITY,
    base_of,
    check_model,
    dtype_on,
    hub_id,
    load_tokenizer,
    skeleton,
)
from rayfin.serving.bases import here
from rayfin.serving.engine.checks import BASE_IS_RIGHT
from rayfin.serving.engine.request import AdapterSource


def base_to_record(
    directory: Path, config: ServeConfig, *, is_right: bool
) -> tuple[ServeConfig, dict[str, Any]]:
    """Returns a deployment that could serve the adapter in `directory`, and what rayfin.json is to
    say of its base.

    The base is model.name where it was given, else the one that the adapter names. With `is_right`
    the user answers for it, whatever the adapter says. Raises AdapterError where the base can't be
    told or isn't here, before anything of the weights is read.
    """
    peft = read_json(directory / "adapter_config.json")
    claim = claimed_base(peft, trusted_metadata(directory, whole=True))
    given = "name" in config.model.model_fields_set
    if not given:
        if claim is None:
            raise AdapterError(
                f"'{directory}' names no base model; if you know it: model.name=BASE "
                f"{BASE_IS_RIGHT}"
            )
        config = config.model_copy(
            update={"model": here(claim, config.model, "the adapter", more=f" {BASE_IS_RIGHT}")}
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
    return config, told


def check_adapter(name: str, directory: Path, config: ServeConfig, told: Mapping[str, Any]) -> None:
    """Raises AdapterError where the engine of `config` could not serve the adapter exactly.

    `told` is what its rayfin.json is going to say.
    """
    from rayfin.serving.engine.adapter import read_adapter
    from rayfin.serving.engine.layout import MAX_VIRTUAL_TOKENS, BaseLayout, linears_of
    from rayfin.serving.engine.vllm_backend import check_lora
    from rayfin.serving.engine.vocabulary import Vocabulary

    source = AdapterSource(name, directory)
    base, model, engine = base_of(config.model), skeleton(config.model), config.engine
    if engine.type == "vllm":
        check_lora(source, base, linears_of(model), engine.max_rank, told)
    else:
        layout = replace(
            BaseLayout.of(model, base),
            max_rank=engine.max_rank,
            max_virtual_tokens=min(MAX_VIRTUAL_TOKENS, engine.max_length - 2),
            max_table_bytes=engine.tables_mb * 2**20,
            itemsize=dtype_on(config.model, describe_hardware("auto").device).itemsize,
        )
        read_adapter(source, layout.unloaded(), told)
    Vocabulary(load_tokenizer(config.model).get_vocab()).check(source)


def _why(error: ModelError) -> str:
    """Returns what went wrong without the remedy, which is another here."""
    text = str(error).partition("; ")[0].removeprefix("model.name: ")
    return text if len(text) <= 300 else f"{text[:300]}…"

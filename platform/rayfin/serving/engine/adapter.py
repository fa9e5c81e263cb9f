"""Read a PEFT directory into the tensors that the engine copies into its slots.

Arithmetic is that of PEFT 0.21; nothing of PEFT is loaded, and no pickle is ever opened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from rayfin.config.serving import MAX_RANK
from rayfin.serving.engine.adapter_tables import SETTING, saved_tables
from rayfin.serving.engine.checks import (
    check_base,
    check_low_rank,
    check_rank,
    modules_of,
)
from rayfin.serving.engine.host_adapter import HostAdapter, LowRank
from rayfin.serving.engine.layout import BaseLayout
from rayfin.serving.engine.peft_files import (
    COMMON,
    CONFIG,
    AdapterSettings,
    AdapterWeights,
    is_finite,
    read_settings,
    shown,
    words,
)
from rayfin.serving.engine.request import AdapterSource
from rayfin.serving.engine.virtual_tokens import read_prefix, read_prompt

LORA_SETTINGS = COMMON | words(
    "r lora_alpha lora_dropout bias layers_to_transform layers_pattern megatron_core rank_pattern",
    "init_lora_weights loftq_config eva_config corda_config lora_ga_config qalora_group_size",
    "ensure_weight_tying",
)
_LORA_ONLY = words("use_rslora use_dora alpha_pattern")
_ADALORA_ONLY = words(
    "target_r init_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step",
)
_VERA = COMMON | words(
    "r vera_dropout d_initial projection_prng_key save_projection init_weights bias",
    "layers_to_transform layers_pattern modules_to_save",
)
_A, _B = "base_model.vera_A", "base_model.vera_B"
_IA3 = COMMON | words("feedforward_modules init_ia3_weights")
# Initialisations that leave the base as it is; PiSSA, CorDA, OLoRA, LoftQ and LoRA-GA change it.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_CONVERT = (
    "others change the base's weights: save it as plain LoRA with "
    "save_pretrained(path_initial_model_for_weight_conversion=…)"
)


@torch.no_grad()
def read_adapter(
    source: AdapterSource, base: BaseLayout, told: Mapping[str, Any] | None = None
) -> HostAdapter:
    """Reads adapter_config.json, adapter_model.safetensors and rayfin.json, and nothing else.

    Raises AdapterError for an adapter of another base, of a kind that can't be served exactly, or
    whose files are damaged or hostile. No tensor is read before all of them are known to fit. Safe
    to call from several threads. `told`: what stands for rayfin.json, of one that is to be
    published.
    """
    settings, metadata = read_settings(source)
    peft_type = check_type(settings)
    told = metadata if told is None else told
    check_base(settings, told, base.base, base.quantization_bit)
    settings.expect("task_type", None, "CAUSAL_LM")
    with AdapterWeights(source) as weights:
        tables = saved_tables(settings, weights, base)
        weights.aside |= set(tables.values())
        fields = {"method": peft_type.lower(), **_READERS[peft_type](settings, weights, base)}
        fields["tables"] = {module: weights.read(tensor) for module, tensor in tables.items()}
    adapter = HostAdapter(source.ref, **fields)
    for tensor in adapter.tensors():
        if not is_finite(tensor):
            raise settings.error(
                "its weights and scaling together leave the range of float32; train it again with "
                "a smaller lora_alpha or learning rate"
            )
    return adapter


def check_type(settings: AdapterSettings) -> str:
    """Return PEFT's type of the adapter; raises AdapterError where the engine does not serve it."""
    peft_type = settings.text("peft_type")
    if peft_type not in _READERS:
        raise settings.error(
            f"it is of type {shown(peft_type)}, and the engine serves {', '.join(_READERS)}; "
            "train it with one of these, or merge it into its base and serve the merged model "
            "(model.name=DIRECTORY)"
        )
    return peft_type


def _lora(settings: AdapterSettings, weights: AdapterWeights, base: BaseLayout) -> dict[str, Any]:
    """Read LoRA, rsLoRA (arXiv:2312.03732) and DoRA (arXiv:2402.09353); QLoRA saves plain LoRA."""
    settings.expect_nothing_else(LORA_SETTINGS | _LORA_ONLY | {SETTING})
    settings.expect("bias", None, "none", "lora_only")
    settings.expect("init_lora_weights", *PLAIN_INITS, remedy=_CONVERT)
    rank, alpha = settings.integer("r", 1, MAX_RANK), settings.number("lora_alpha")
    rank_of = settings.pattern(
        "rank_pattern", lambda key, value: settings.checked_integer(key, value, 1, MAX_RANK)
    )
    alpha_of = settings.pattern("alpha_pattern", settings.checked_number)
    dora, rslora = settings.flag("use_dora"), settings.flag("use_rslora")
    suffixes = {".lora_A.weight": "A", ".lora_B.weight": "B"}
    if dora:
        suffixes[".lora_magnitude_vector"] = "magnitude"
    modules = modules_of(weights, suffixes, base.linears)
    if settings.values.get("bias") == "lora_only":
        _expect_no_bias(settings, base, modules)
    ranks = {module: rank_of(module) or rank for module in modules}
    check_low_rank(settings, weights, base, modules, ranks)
    lora, output_scale = {}, {}
    for module, parts in modules.items():
        r, own_alpha = ranks[module], alpha_of(module)
        scaling = (alpha if own_alpha is None else own_alpha) / (math.sqrt(r) if rslora else r)
        a = weights.read(parts["A"])
        b = weights.read(parts["B"]) * scaling
        if dora:
            # y = m / ||W + B A|| * (W + B A) x, norms over rows: constant once it is trained.
            magnitude = weights.read(parts["magnitude"])
            scale = magnitude / _row_norms(base.weight(module), a, b)
            output_scale[module] = scale
            b = scale[:, None] * b
        lora[module] = _low_rank(a, b)
    method = "dora" if dora else "rslora" if rslora else "lora"
    return {"method": method, "lora": lora, "output_scale": output_scale}


def _expect_no_bias(settings: AdapterSettings, base: BaseLayout, modules: Collection[str]) -> None:
    """Raises AdapterError where an adapted layer has a bias: what was trained of it is missing."""
    for module in modules:
        if base.bias(module) is not None:
            raise settings.error(
                f"{CONFIG} has bias='lora_only', and the file has no bias of "
                f"{shown(module)}, which the base has one for; train it again with bias='none'"
            )


def _adalora(
    settings: AdapterSettings, weights: AdapterWeights, base: BaseLayout
) -> dict[str, Any]:
    """Read AdaLoRA: B (A * E) * alpha / (init_r + 1e-5), as peft.tuners.adalora.layer.SVDLinear.

    The number of singular values is init_r there even after some were dropped.
    """
    settings.expect_nothing_else(LORA_SETTINGS | _ADALORA_ONLY | {SETTING})
    settings.expect("bias", None, "none")
    init_r, alpha = settings.integer("init_r", 1, MAX_RANK), settings.number("lora_alpha")
    kept = settings.mapping("rank_pattern")
    suffixes = {".lora_A": "A", ".lora_B": "B", ".lora_E": "E"}
    modules = modules_of(weights, suffixes, base.linears)
    ranks = dict.fromkeys(modules, init_r)
    for module in modules:
        if (mask := kept.get(f"{module}.lora_E")) is not None:
            if not isinstance(mask, list) or not all(isinstance(one, bool) for one in mask):
                raise settings.wrong("rank_pattern", "lists of true and false")
            ranks[module] = sum(mask)
    check_low_rank(settings, weights, base, modules, ranks)
    lora = {}
    for module, parts in modules.items():
        r = ranks[module]
        scaling = (alpha if alpha > 0 else r) / (init_r + 1e-5)
        a = weights.read(parts["A"]) * weights.read(parts["E"])
        b = weights.read(parts["B"]) * scaling
        if r:
            lora[module] = _low_rank(a, b)
    return {"lora": lora}


def _vera(settings: AdapterSettings, weights: AdapterWeights, base: BaseLayout) -> dict[str, Any]:
    """Read VeRA (arXiv:2310.11454): b * (B (d * (A x))), cut from a pair that all layers share."""
    settings.expect_nothing_else(_VERA)
    settings.expect("bias", None, "none")
    settings.expect("save_projection", True)
    check_rank(settings, r := settings.integer("r", 1, MAX_RANK), base.max_rank)
    weights.aside |= {_A, _B}
    modules = modules_of(weights, {".vera_lambda_d": "d", ".vera_lambda_b": "b"}, base.linears)
    inputs, outputs = zip(*(base.linears[module] for module in modules), strict=True)
    shapes: dict[str, tuple[int, ...]] = {_A: (r, max(inputs)), _B: (max(outputs), r)}
    for parts, out in zip(modules.values(), outputs, strict=True):
        shapes |= {parts["d"]: (r,), parts["b"]: (out,)}
    weights.check(shapes)
    a, b = weights.read(_A), weights.read(_B)
    lora = {}
    for (module, parts), ins, out in zip(modules.items(), inputs, outputs, strict=True):
        d, own = (weights.read(parts[part])[:, None] for part in "db")
        lora[module] = _low_rank(d * a[:, :ins], own * b[:out])
    return {"lora": lora}


def _ia3(settings: AdapterSettings, weights: AdapterWeights, base: BaseLayout) -> dict[str, Any]:
    """Read IA3 (arXiv:2205.05638): vectors [1, in] scale a feedforward layer's input, others [out,
    1] the whole output of a layer.
    """
    settings.expect_nothing_else(_IA3)
    inputs, shapes = set(), {}
    modules = modules_of(weights, {".ia3_l": "scale"}, base.linears)
    for module, parts in modules.items():
        in_features, out_features = base.linears[module]
        shapes[parts["scale"]] = (out_features, 1)
        if weights.shape(parts["scale"])[:1] == (1,) and out_features != 1:
            inputs.add(module)
            shapes[parts["scale"]] = (1, in_features)
    weights.check(shapes)
    input_scale, output_scale, output_shift = {}, {}, {}
    for module, parts in modules.items():
        scale = weights.read(parts["scale"]).flatten()
        if module in inputs:
            input_scale[module] = scale
            continue
        output_scale[module] = scale
        if (bias := base.bias(module)) is not None:
            output_shift[module] = (scale - 1) * bias.cpu()
    return {
        "input_scale": input_scale,
        "output_scale": output_scale,
        "output_shift": output_shift,
    }


def _low_rank(a: torch.Tensor, b: torch.Tensor) -> LowRank:
    # Transposed here, beside decoding: filling a slot is then a plain copy.
    return LowRank(a, b.t().contiguous())


def _row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return ||W + B A|| of each row [out], computed where W is."""
    merged = torch.addmm(weight, b.to(weight.device), a.to(weight.device))
    norms: torch.Tensor = torch.linalg.norm(merged, dim=1)
    return norms.cpu()


_Reader = Callable[[AdapterSettings, AdapterWeights, BaseLayout], dict[str, Any]]

_READERS: Mapping[str, _Reader] = {
    "LORA": _lora,
    "ADALORA": _adalora,
    "IA3": _ia3,
    "P_TUNING": read_prompt,
    "PROMPT_TUNING": read_prompt,
    "PREFIX_TUNING": read_prefix,
    "VERA": _vera,
}

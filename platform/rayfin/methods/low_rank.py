"""LoRA and its variants: an update B A beside the weight of every adapted linear layer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field

from rayfin.errors import MethodError
from rayfin.methods.adapted import TARGET_MODULES, LowRankMethod, Names, listed, whole
from rayfin.methods.attach import ADAPTER
from rayfin.methods.base import Incompatibility, register
from rayfin.methods.conversion import convert, lora_pairs
from rayfin.methods.layers import Linear, targets
from rayfin.methods.rates import Rate
from rayfin.sizes import Sizes

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig


def _no_expression(name: str) -> str:
    """PEFT takes names in patterns for regular expressions, whose engine others may not share."""
    if not re.fullmatch(r"[\w.]+", name):
        raise ValueError(
            f"{name!r} is no module's name; write one, such as q_proj or layers.0.self_attn.q_proj"
        )
    return name


Name = Annotated[str, AfterValidator(_no_expression)]
Index = Annotated[int, Field(ge=0)]
Number = TypeVar("Number", int, float)

_LATER = (
    *("exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern"),
    *("init_lora_weights", "loraplus_lr_ratio"),
)
"""Settings that came later: fingerprints of trials without them are those of before."""


class LowRankConfig(LowRankMethod):
    capacity = "r"
    module_settings = ("target_modules", "exclude_modules")
    synonyms = {  # noqa: RUF012
        "r": ("lora_rank", "rank", "lora_r"),
        "lora_alpha": ("alpha",),
        "lora_dropout": ("dropout",),
    }

    r: int = Field(8, ge=1)
    """Rank of the update matrices."""
    lora_alpha: float = Field(16, gt=0)
    """The update is scaled by lora_alpha / r (lora_alpha / sqrt(r) for rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the update matrices."""
    target_modules: Literal["all-linear"] | Names = "all-linear"
    """Module names that get an update, or `all-linear`."""
    exclude_modules: Names | None = None
    """Those of them that get none after all."""
    layers_to_transform: Annotated[tuple[Index, ...], Field(min_length=1)] | None = None
    """Numbers of the layers that get updates; null takes all of them."""
    rank_pattern: dict[Name, Annotated[int, Field(ge=1)]] = Field({})
    """Module name -> its own rank instead of r."""
    alpha_pattern: dict[Name, Annotated[float, Field(gt=0)]] = Field({})
    """Module name -> its own lora_alpha."""
    init_lora_weights: Literal[True, "gaussian", "pissa", "pissa_niter_16", "olora"] = True
    """How the matrices begin; true adds nothing at first, pissa and olora take the largest part of
    the base's weights (pissa_niter_16 finds it faster, and nearly)."""
    loraplus_lr_ratio: float | None = Field(None, ge=1)
    """LoRA+: the learning rate of B is this many times that of A (Hayou et al. 2024,
    arXiv:2402.12354)."""

    @property
    def served_rank(self) -> int:
        most = max([self.r, *self.rank_pattern.values()])
        return 2 * most if self.alters_base else most

    @property
    def alters_base(self) -> bool:
        """PiSSA and OLoRA take out of the base's weights what their matrices begin with."""
        return self.init_lora_weights not in (True, "gaussian")

    def adapted(self, sizes: Sizes) -> Iterator[tuple[str, Linear, dict[int, float]]]:
        for name, linear, blocks in targets(self.target_modules, sizes):
            only = _layer(name)
            layers = range(sizes.num_layers) if only is None else [only]
            ranks: dict[int, float] = {}
            for layer in layers:
                meant = partial(_may_name, name, layer)
                if not self._left_out(meant, layer):
                    rank = _own(self.rank_pattern, meant) or self.r
                    ranks[rank] = ranks.get(rank, 0.0) + blocks / len(layers)
            yield name, linear, ranks

    @property
    def names_modules(self) -> bool:
        patterns = self.rank_pattern or self.alpha_pattern
        return bool(self.exclude_modules or self.layers_to_transform or patterns)

    def check_modules(self, names: Sequence[str]) -> None:
        named = self.target_modules
        targeted = [n for n in names if named == "all-linear" or any(_names(n, t) for t in named)]
        adapted = [n for n in targeted if not self._left_out(partial(_names, n), _layer(n))]
        for setting, keys, among in (
            ("exclude_modules", self.exclude_modules or (), targeted),
            ("layers_to_transform", self.layers_to_transform or (), targeted),
            ("rank_pattern", self.rank_pattern, adapted),
            ("alpha_pattern", self.alpha_pattern, adapted),
        ):
            for key in keys:
                if not any(key == _layer(name) or _names(name, str(key)) for name in among):
                    raise MethodError(
                        f"method.{setting}: {key!r} is none of the {len(among)} modules that are "
                        f"adapted{f', such as {among[0]!r}' if among else ''}; leave it out, or "
                        "name one of them"
                    )
        for setting, pattern in (
            ("rank_pattern", self.rank_pattern),
            ("alpha_pattern", self.alpha_pattern),
        ):
            for name in adapted:
                # PEFT takes the first, and saves them in another order.
                if len(both := [key for key in pattern if _names(name, key)]) > 1:
                    raise MethodError(
                        f"method.{setting}: {both[0]!r} and {both[1]!r} both name {name!r}; write "
                        "names of which no two name the same module"
                    )
        if targeted and not adapted:
            raise MethodError(
                f"method.exclude_modules and layers_to_transform leave none of the {len(targeted)} "
                "modules of method.target_modules; leave fewer out"
            )

    def _left_out(self, meant: Callable[[str], bool], layer: int | None) -> bool:
        """Whether a targeted module, which `meant` says the names of, gets no update."""
        layers = self.layers_to_transform
        return any(map(meant, self.exclude_modules or ())) or (
            layers is not None and layer not in layers
        )

    def refusals(self, max_steps: int) -> Iterator[Incompatibility]:
        if self.layers_to_transform is not None and self.target_modules == "all-linear":
            yield Incompatibility(
                "method.layers_to_transform with method.target_modules=all-linear",
                "PEFT takes numbers of layers beside names only",
                "name the modules, such as method.target_modules=[q_proj,v_proj]",
            )
        if self.alters_base and (self.quantization_bit or self.type == "dora"):
            yield Incompatibility(
                f"method.init_lora_weights={self.init_lora_weights}",
                "it changes the base's weights, which have to be whole, and no part of a DoRA",
                "use lora or rslora with method.quantization_bit=null, or leave it out",
            )

    def strategy_refusal(self, strategy: str) -> str | None:
        if strategy not in ("auto", "ddp") and self.alters_base:
            return f"{self.init_lora_weights} changes weights that {strategy} shards; use ddp"
        if strategy.startswith("deepspeed") and self.loraplus_lr_ratio not in (None, 1):
            return "LoRA+ has two learning rates, and DeepSpeed is given one; use ddp or fsdp"
        return None

    def computed(self) -> dict[str, Any]:
        """Without later settings that are at their defaults: fingerprints are those of before."""
        found = super().computed()
        idle = [name for name in _LATER if found[name] == type(self).model_fields[name].default]
        return {name: value for name, value in found.items() if name not in idle}

    def peft_config(self, max_steps: int, tokenizer_path: str) -> PeftConfig:
        import peft

        layers = self.layers_to_transform
        settings: dict[str, Any] = {
            "r": self.r,
            "lora_alpha": whole(self.lora_alpha),
            "lora_dropout": self.lora_dropout,
            "target_modules": listed(self.target_modules),
            "exclude_modules": listed(self.exclude_modules),
            "layers_to_transform": None if layers is None else list(layers),
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": {name: whole(alpha) for name, alpha in self.alpha_pattern.items()},
            "init_lora_weights": self.init_lora_weights,
        }
        with warnings.catch_warnings():
            # PEFT's conversion to plain LoRA can't do what `convert` can.
            warnings.filterwarnings("ignore", ".*post-training conversion of modified base weights")
            return peft.LoraConfig(task_type="CAUSAL_LM", **settings, **self._variant())

    def attached(self, model: torch.nn.Module) -> None:
        if self.alters_base:
            for name, layer in model.named_modules():
                ranks = getattr(layer, "r", None) if hasattr(layer, "lora_A") else None
                if ranks and (most := len(layer.lora_A[ADAPTER].weight)) < ranks[ADAPTER]:
                    raise MethodError(
                        f"method.init_lora_weights={self.init_lora_weights}: rank {ranks[ADAPTER]} "
                        f"is more than the {most} rows or columns of {name!r}; use a smaller "
                        "method.r, or a method.rank_pattern for it"
                    )
            model.rayfin_began = lora_pairs(model, ADAPTER)  # type: ignore[assignment]

    def finish_saving(self, model: torch.nn.Module, directory: Path) -> None:
        if self.alters_base:
            convert(directory, model.rayfin_began)  # type: ignore[arg-type]

    def rate_factor(self, parameter: str) -> float:
        return (self.loraplus_lr_ratio or 1.0) if ".lora_B." in parameter else 1.0

    def _variant(self) -> dict[str, Any]:
        """What switches the variant on in PEFT."""
        return {}

    @classmethod
    def usual(cls, rank: int, length: int) -> dict[str, Any]:
        return {**cls.of_capacity(rank), "target_modules": TARGET_MODULES}

    @classmethod
    def of_capacity(cls, capacity: int) -> dict[str, Any]:
        return {"r": capacity, "lora_alpha": cls.usual_alpha}

    @classmethod
    def is_pefts(cls, name: str, config: Mapping[str, Any], bits: int | None) -> bool:
        return name == "lora" and cls is _variant_of(config, bits)


@register
class LoraConfig(LowRankConfig):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    title = "LoRA"
    order = 1
    engines = ("transformers", "vllm")
    rate = Rate(
        of_lora=True, source="by size: QLoRA's README, TRL's guide and PEFT's quicktour (rates.py)"
    )
    coordinates = (0.0, 0.0)

    type: Literal["lora"]

    def computed(self) -> dict[str, Any]:
        """LoRA over a quantised base is QLoRA, by whichever name it was asked for."""
        found = super().computed()
        return found | {"type": "qlora"} if self.quantization_bit else found


@register
class QloraConfig(LowRankConfig):
    """LoRA over a quantised base (Dettmers et al. 2023, arXiv:2305.14314)."""

    title = "QLoRA"
    order = 2
    engines = ("transformers", "vllm")
    rate = Rate(of_lora=True, source="QLoRA's README")
    coordinates = (0.2, 0.0)

    type: Literal["qlora"]
    quantization_bit: Literal[4, 8] = 4
    """Load the base model in 4-bit NF4 (double quantisation) or 8-bit."""


@register
class DoraConfig(LowRankConfig):
    """LoRA on the direction, magnitude apart (Liu et al. 2024, arXiv:2402.09353)."""

    title = "DoRA"
    order = 3
    engines = ("transformers",)
    rate = Rate(
        value=0.75,
        of_lora=True,
        source="'slightly lower than that of LoRA' (github.com/NVlabs/DoRA); by how much is a "
        "convention",
    )
    coordinates = (0.0, -0.2)

    type: Literal["dora"]

    def _variant(self) -> dict[str, Any]:
        return {"use_dora": True}

    def extra_parameters(self, linear: Linear) -> int:
        """A magnitude for each output."""
        return linear.outputs

    def extra_activations(self, linear: Linear) -> int:
        """A magnitude's gradient needs both products."""
        return 2 * linear.outputs


@register
class RsloraConfig(LowRankConfig):
    """LoRA scaled by 1/sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)."""

    title = "rank-stabilised LoRA"
    order = 4
    engines = ("transformers", "vllm")
    rate = Rate(of_lora=True, source="PEFT's comparison has one rate for it and LoRA")
    coordinates = (0.0, 0.2)
    usual_alpha = 8.0  # LoRA's scale, 2, at rank 16: a convention
    scale_exponent = 0.5

    type: Literal["rslora"]

    def _variant(self) -> dict[str, Any]:
        return {"use_rslora": True}


def _variant_of(config: Mapping[str, Any], bits: int | None) -> type[LowRankConfig]:
    """The method whose adapter_config.json of PEFT's type LORA `config` is."""
    if config.get("use_dora"):
        return DoraConfig
    if config.get("use_rslora"):
        return RsloraConfig
    return QloraConfig if bits == 4 else LoraConfig


def _names(module: str, name: str) -> bool:
    """Whether `name` is a module's whole name or its last parts."""
    return module == name or module.endswith(f".{name}")


def _may_name(end: str, layer: int, name: str) -> bool:
    """Whether `name` may be that of the module in a layer whose name has this end."""
    same = name == end or name.endswith(f".{end}") or end.endswith(f".{name}")
    return same and _layer(name) in (None, layer)


def _layer(module: str) -> int | None:
    """The number of the layer that a module is in."""
    return next((int(part) for part in module.split(".") if part.isdigit()), None)


def _own(pattern: Mapping[str, Number], meant: Callable[[str], bool]) -> Number | None:
    return next((value for name, value in pattern.items() if meant(name)), None)

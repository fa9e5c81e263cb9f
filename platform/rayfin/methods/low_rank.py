"""The base class of LoRA and its variants: an update B A beside weights of linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from rayfin.errors import MethodError
from rayfin.methods import initialization
from rayfin.methods.adapted import TARGET_MODULES, LowRankMethod, whole
from rayfin.methods.attach import linear_modules
from rayfin.methods.base import Batches, Incompatibility, name_of
from rayfin.methods.module_names import (
    Name,
    Names,
    is_named,
    layer_of,
    listed,
    own_value,
)
from rayfin.sizes import Sizes

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

Index = Annotated[int, Field(ge=0)]


class LowRankConfig(LowRankMethod):
    capacity = "r"
    first_weights = ("init_lora_weights",)
    module_settings = (*LowRankMethod.module_settings, "exclude_modules")
    later: ClassVar[tuple[str, ...]] = (
        *LowRankMethod.later,
        *("exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern"),
        *("init_lora_weights", "loraplus_lr_ratio"),
    )
    by_layer = (
        *LowRankMethod.by_layer,
        *("exclude_modules", "layers_to_transform", "rank_pattern"),
    )
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
    init_lora_weights: Literal[
        True, "gaussian", "pissa", "pissa_niter_16", "olora", "loftq", "eva"
    ] = True
    """The matrices' first values: true and gaussian add nothing at first, pissa and olora take the
    largest part of the base's weights (pissa_niter_16 finds it faster, and nearly), loftq takes
    what the base's 4 bits have lost, eva the directions of the training data's activations."""
    loraplus_lr_ratio: float | None = Field(None, ge=1)
    """LoRA+: the learning rate of B is this many times that of A (Hayou et al. 2024,
    arXiv:2402.12354)."""

    @property
    def served_rank(self) -> int:
        most = max([self.r, *self.rank_pattern.values()])
        return 2 * most if self.alters_base else most

    @property
    def alters_base(self) -> bool:
        """PiSSA and OLoRA take the first values of their matrices out of the base's weights."""
        return self.init_lora_weights in ("pissa", "pissa_niter_16", "olora")

    def host_parameters(self, sizes: Sizes) -> float:
        """Count the first A and B of PiSSA and OLoRA, which go into every checkpoint."""
        return self._over_layers(self.layer_parameters, sizes) if self.alters_base else 0.0

    @property
    def served_bits(self) -> int | None:
        """LoftQ's adapter makes up for what the base lost to 4 bits, and no other base has lost."""
        return 4 if self.init_lora_weights == "loftq" else None

    @property
    def _initialized(self) -> bool:
        """Whether `initialize` sets the first weights."""
        return self.init_lora_weights not in (True, "gaussian")

    def _rank_of(self, meant: Callable[[str], bool], layer: int | None) -> int | None:
        rank = super()._rank_of(meant, layer)
        if rank is None or self._left_out(meant, layer):
            return None
        return own_value(self.rank_pattern, meant) or rank

    @property
    def depends_on_base(self) -> bool:
        named = self.exclude_modules or self.layers_to_transform
        patterns = self.rank_pattern or self.alpha_pattern
        return bool(named or patterns or self._initialized or super().depends_on_base)

    def check_base(self, base: torch.nn.Module) -> None:
        super().check_base(base)
        linears = linear_modules(base, self.target_modules)
        self._check_names(linears)
        if self._initialized:
            adapted = (n for n in self._targeted(linears) if not self._excluded(n))
            initialization.check_rooms(
                str(self.init_lora_weights),
                {name: linears[name] for name in adapted},
                lambda name: own_value(self.rank_pattern, partial(is_named, name)) or self.r,
            )

    def _check_names(self, names: Iterable[str]) -> None:
        targeted = self._targeted(names)
        adapted = [name for name in targeted if not self._excluded(name)]
        for setting, keys, among in (
            ("exclude_modules", self.exclude_modules or (), targeted),
            ("layers_to_transform", self.layers_to_transform or (), targeted),
            ("rank_pattern", self.rank_pattern, adapted),
            ("alpha_pattern", self.alpha_pattern, adapted),
        ):
            for key in keys:
                if not any(key == layer_of(name) or is_named(name, str(key)) for name in among):
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
                if len(both := [key for key in pattern if is_named(name, key)]) > 1:
                    raise MethodError(
                        f"method.{setting}: {both[0]!r} and {both[1]!r} both name {name!r}; write "
                        "names of which no two name the same module"
                    )
        if targeted and not adapted:
            raise MethodError(
                f"method.exclude_modules and layers_to_transform leave none of the {len(targeted)} "
                "modules of method.target_modules; leave fewer out"
            )
        # PEFT looks at numbers of layers only where a name is the last parts of a module's.
        if self.layers_to_transform and (
            exact := [n for n in targeted if n in self.target_modules]
        ):
            raise MethodError(
                f"method.layers_to_transform has no effect on {exact[0]!r}, which is a module's "
                f"whole name; write its last part, {exact[0].rpartition('.')[2]}, in "
                "method.target_modules"
            )

    def _excluded(self, name: str) -> bool:
        return self._left_out(partial(is_named, name), layer_of(name))

    def _left_out(self, meant: Callable[[str], bool], layer: int | None) -> bool:
        """Return whether a targeted module, of whose names `meant` knows, gets no update."""
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
        init = f"method.init_lora_weights={self.init_lora_weights}"
        if self.alters_base and (self.quantization_bit or self.type == "dora"):
            yield Incompatibility(
                init,
                "it changes the base's weights, which have to be whole, and no part of a DoRA",
                "use lora or rslora with method.quantization_bit=null, or leave it out",
            )
        if self.init_lora_weights == "loftq":
            if self.quantization_bit != 4:
                yield Incompatibility(
                    init,
                    "it makes up for what a base has lost to 4 bits",
                    "use method.quantization_bit=4, or leave it out",
                )
            if self.type == "dora":
                yield Incompatibility(
                    init,
                    "DoRA's magnitudes are those of the base without an update",
                    "use qlora or rslora, or leave it out",
                )
        if self.init_lora_weights == "eva" and self.rank_pattern:
            yield Incompatibility(
                f"{init} with method.rank_pattern",
                "EVA gives layers that read the same input one rank",
                "use method.r alone, or leave it out",
            )

    def strategy_refusal(self, strategy: str) -> str | None:
        if strategy not in ("auto", "ddp") and self._initialized:
            return (
                f"{self.init_lora_weights} computes its first matrices from weights that "
                f"{strategy} shards; use ddp"
            )
        if strategy.startswith("deepspeed") and self.loraplus_lr_ratio not in (None, 1):
            return "LoRA+ has two learning rates, and DeepSpeed is given one; use ddp or fsdp"
        return None

    def computed(self) -> dict[str, Any]:
        """Return the settings without those that say what others say already."""
        same: dict[str, Any] = {
            "rank_pattern": {n: r for n, r in self.rank_pattern.items() if r != self.r},
            "alpha_pattern": {n: a for n, a in self.alpha_pattern.items() if a != self.lora_alpha},
        }
        if self.loraplus_lr_ratio == 1:
            same["loraplus_lr_ratio"] = None
        if any(getattr(self, name) != value for name, value in same.items()):
            return self.model_copy(update=same).computed()
        return super().computed()

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
            "modules_to_save": listed(self.modules_to_save),
            # The others are `initialize`'s, once a trial starts, and not when it is resumed.
            "init_lora_weights": "gaussian" if self.init_lora_weights == "gaussian" else True,
        }
        return peft.LoraConfig(**settings, **self._variant())

    def attached(self, model: torch.nn.Module) -> None:
        if self.alters_base:
            initialization.expect(model)

    def initialize(
        self, model: torch.nn.Module, weights: Callable[[], Path], batches: Batches
    ) -> None:
        if self.alters_base:
            initialization.take_out_of_base(model, str(self.init_lora_weights))
        elif self.init_lora_weights == "loftq":
            initialization.lost_by_quantization(model, weights())
        elif self.init_lora_weights == "eva":
            initialization.explain_variance(model, self.r, batches)

    @classmethod
    def state_beside(cls, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return initialization.initial_state(model)

    @classmethod
    def load_state_beside(cls, model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
        initialization.load_initial_state(model, state)

    def finish_saving(self, model: torch.nn.Module, directory: Path) -> None:
        if self.alters_base:
            initialization.plain_lora(directory, model)

    def rate_factor(self, parameter: str) -> float:
        return (self.loraplus_lr_ratio or 1.0) if ".lora_B." in parameter else 1.0

    def _variant(self) -> dict[str, Any]:
        """Return what switches the variant on in PEFT."""
        return {}

    @classmethod
    def _moving(cls, settings: Mapping[str, Any]) -> set[str]:
        found = super()._moving(settings) - {"init_lora_weights"}
        if settings.get("loraplus_lr_ratio") == 1:
            found.discard("loraplus_lr_ratio")
        init = settings.get("init_lora_weights")
        return found | ({init} if isinstance(init, str) else set())

    @classmethod
    def usual(cls, rank: int, length: int) -> dict[str, Any]:
        return {**cls.of_capacity(rank), "target_modules": TARGET_MODULES}

    @classmethod
    def of_capacity(cls, capacity: int) -> dict[str, Any]:
        return {"r": capacity, "lora_alpha": cls.usual_alpha}

    @classmethod
    def is_pefts(cls, name: str, config: Mapping[str, Any], bits: int | None) -> bool:
        plain = "qlora" if bits == 4 else "lora"
        kind = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else plain
        return name == "lora" and name_of(cls) == kind

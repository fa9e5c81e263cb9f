"""The base classes of methods that adapt linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rayfin.errors import MethodError
from rayfin.methods.attach import linear_modules
from rayfin.methods.base import MethodConfig, Trained
from rayfin.methods.layers import Linear, targets, whole_modules
from rayfin.methods.module_names import Names, is_named, listed, may_be_named
from rayfin.sizes import Sizes

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

TARGET_MODULES = "all-linear"
"""The modules that low-rank methods adapt: every linear layer but the output head.

QLoRA needed all of them to match full fine-tuning, and LoRA Without Regret finds that attention
alone does worse even at a rank that makes up for the parameters.
"""


_MOVES: dict[str, tuple[float, float]] = {
    "pissa": (-0.209, 0.034),
    "pissa_niter_16": (-0.209, 0.034),
    "olora": (-0.054, 0.148),
    "loftq": (-0.048, 0.005),
    "eva": (-0.082, 0.059),
    "loraplus_lr_ratio": (0.082, -0.168),
    "modules_to_save": (0.129, 0.109),
    "exclude_modules": (-0.1, -0.104),
    "layers_to_transform": (0.172, 0.069),
    "rank_pattern": (-0.143, -0.111),
    "alpha_pattern": (0.031, 0.054),
}
"""How far a trial with such a setting lies from one without: a convention. Methods of LoRA's family
are 0.2 apart, and the learned model takes a distance of 1 for a difference. Moves add up, and are
such that no two sets of settings, of one method or of two, have the same coordinates."""


class LowRankMethod(MethodConfig):
    """A method with an update B A of linear layers, whatever its settings are called."""

    trains: ClassVar[Trained] = "low rank"
    quantized_base = True
    packing = True
    gradient_checkpointing = True
    merging = True
    fragments_heap = True
    # 32 whatever the rank, the default of LoRA Without Regret's authors (tinker-cookbook); QLoRA
    # too keeps one, 16. With alpha / r the best learning rate then hardly moves with the rank. The
    # other convention, alpha = 2 r (PEFT's comparison), is the same at rank 16 and takes larger
    # steps above it.
    usual_alpha: ClassVar[float | None] = 32.0
    module_settings: ClassVar[tuple[str, ...]] = ("target_modules", "modules_to_save")
    later: ClassVar[tuple[str, ...]] = ("modules_to_save",)
    """Settings that came later: fingerprints of trials without them are those of before."""
    by_layer: ClassVar[tuple[str, ...]] = ("modules_to_save",)
    """Settings by which single layers differ from the others of their name."""
    conv1d: ClassVar[bool] = True
    """Whether it adapts transformers' Conv1D, the linear layers of GPT-2 and its like."""

    modules_to_save: Names | None = None
    """Modules that are trained whole beside the update, such as the output head (lm_head) and the
    embeddings (embed_tokens), and saved with the adapter."""

    if TYPE_CHECKING:
        target_modules: Literal["all-linear"] | Names

    @property
    def rank(self) -> int:
        return int(getattr(self, str(self.capacity)))

    def computed(self) -> dict[str, Any]:
        """Return the settings without later ones at their defaults, and names in one order."""
        found = super().computed()
        for name in self.later:
            if isinstance(found[name], list):
                found[name] = sorted(set(found[name]))
            if found[name] == type(self).model_fields[name].default:
                del found[name]
        return found

    # --- what fits a base ---------------------------------------------------------------------

    @property
    def depends_on_base(self) -> bool:
        return self.modules_to_save is not None or not self.conv1d

    def check_base(self, base: torch.nn.Module) -> None:
        linears = linear_modules(base, self.target_modules)
        if not self.conv1d:
            self._check_conv1d(linears)
        if self.modules_to_save is not None:
            weights = {name for name, module in base.named_modules() if hasattr(module, "weight")}
            self._check_saved(weights, linear_modules(base))

    def _targeted(self, names: Iterable[str]) -> list[str]:
        """Return those of `names`, which are linear modules', that get an update."""
        named, saved = self.target_modules, self.modules_to_save or ()
        return [
            name
            for name in names
            if (named == "all-linear" or any(is_named(name, target) for target in named))
            and not any(is_named(name, one) for one in saved)
        ]

    def _check_conv1d(self, linears: dict[str, torch.nn.Module]) -> None:
        for name in self._targeted(linears):
            if type(linears[name]).__name__ == "Conv1D":
                raise MethodError(
                    f"method.type={self.type} can't adapt {name!r}, a Conv1D as models like GPT-2 "
                    "have them; use lora, or name other modules by method.target_modules"
                )

    def _check_saved(self, weights: set[str], linears: Iterable[str]) -> None:
        for one in self.modules_to_save or ():
            named = [name for name in weights if is_named(name, one)]
            if not named:
                raise MethodError(
                    f"method.modules_to_save: {one!r} is no module of this model; name one, such "
                    f"as {', '.join(sorted(weights)[:3])}, or leave it out"
                )
            # PEFT compares ends of names, whether or not a part begins there.
            if other := min((n for n in weights if n.endswith(one) and n not in named), default=""):
                raise MethodError(
                    f"method.modules_to_save: PEFT would take {one!r} for {other!r}, too; write "
                    f"the whole name, such as {min(named)}"
                )
            if self.quantization_bit and (lost := sorted(set(named) & set(linears))):
                raise MethodError(
                    f"method.modules_to_save: {lost[0]!r} is in {self.quantization_bit} bits, and "
                    "those have no gradient; use method.quantization_bit=null, or name the "
                    "output head, the embeddings or norms"
                )

    # --- sizes --------------------------------------------------------------------------------

    def adapted(self, sizes: Sizes) -> Iterator[tuple[str, Linear, dict[int, float]]]:
        """Yield each kind of adapted layer, with its name and the number of blocks by rank."""
        same = not any(getattr(self, name) for name in self.by_layer)
        for name, linear, layers, share in targets(self.target_modules, sizes):
            if same:
                yield name, linear, {self.rank: share * len(layers)}
                continue
            found: dict[int, float] = {}
            for layer in layers:
                rank = self._rank_of(partial(may_be_named, name, layer), layer)
                if rank is not None:
                    found[rank] = found.get(rank, 0.0) + share
            if found:
                yield name, linear, found

    def _rank_of(self, meant: Callable[[str], bool], layer: int | None) -> int | None:
        """Return the rank of a targeted module, of whose names `meant` knows.

        It is None where the module has no update. `layer` is the number of its block, if any.
        """
        return None if any(map(meant, self.modules_to_save or ())) else self.rank

    def layer_parameters(self, linear: Linear, rank: int) -> float:
        """Return the number of trained parameters of one layer: by default those of A and B."""
        return rank * (linear.inputs + linear.outputs)

    def layer_activations(self, linear: Linear, rank: int) -> float:
        """Return the numbers a token that autograd keeps beside A's input: A's output."""
        return rank

    def layer_weights(self, linear: Linear) -> float:
        """Return the float32 numbers that autograd keeps of one layer, however many the tokens."""
        return 0.0

    def layer_flops(self, linear: Linear, rank: int) -> float:
        """Return FLOPs a token: products with A and B forward, and of both gradients."""
        return 6 * self.layer_parameters(linear, rank)

    def _over_layers(self, of: Callable[[Linear, int], float], sizes: Sizes) -> float:
        return sum(
            blocks * of(linear, rank)
            for _, linear, ranks in self.adapted(sizes)
            for rank, blocks in ranks.items()
        )

    def trained_parameters(self, sizes: Sizes) -> int:
        saved = whole_modules(self.modules_to_save or (), sizes)
        return round(self._over_layers(self.layer_parameters, sizes) + saved)

    def kept_activations(self, sizes: Sizes, *, mixed_precision: bool) -> float:
        inputs: dict[str, float] = {}
        for name, linear, ranks in self.adapted(sizes):
            share = sum(ranks.values()) / sizes.num_layers
            # What several layers read is kept once, unless dropout or autocast copies it for each.
            copied = getattr(self, "lora_dropout", 0) > 0 or mixed_precision
            if copied or linear.reads != "heads":  # attention's output, which is kept already
                inputs[name if copied else linear.reads] = share * linear.inputs
        of_layers = self._over_layers(self.layer_activations, sizes) / sizes.num_layers
        return of_layers + sum(inputs.values())

    def kept_weights(self, sizes: Sizes) -> float:
        return (
            self._over_layers(lambda linear, _: self.layer_weights(linear), sizes)
            / sizes.num_layers
        )

    def flops_per_token(self, sizes: Sizes) -> float:
        return self._over_layers(self.layer_flops, sizes)

    # --- what the learned model sees ----------------------------------------------------------

    @classmethod
    def coordinates_of(cls, settings: Mapping[str, Any]) -> tuple[float, float]:
        x, y = cls.coordinates
        for name in sorted(cls._moving(settings)):
            move = _MOVES.get(name, (0.0, 0.0))
            x, y = x + move[0], y + move[1]
        return x, y

    @classmethod
    def _moving(cls, settings: Mapping[str, Any]) -> set[str]:
        """Return the names of what moves the coordinates: settings that are not at their default.

        A setting that chooses among several algorithms is named by the one that it chooses.
        """
        return {name for name in cls.later if settings.get(name)}


class PeftNamedMethod(LowRankMethod):
    """A method whose settings are those of one of PEFT's configurations, by the same names."""

    usual_alpha = None
    fragments_heap = False
    capacity = "r"
    pefts: ClassVar[str]
    """The class of PEFT's configuration."""

    target_modules: Literal["all-linear"] | Names = "all-linear"
    """Module names that get an update, or `all-linear`."""

    def peft_config(self, max_steps: int, tokenizer_path: str) -> PeftConfig:
        import peft

        settings = self.model_dump(exclude={"type", "quantization_bit", "init_from"})
        for name in self.module_settings:
            settings[name] = listed(settings[name])
        config: PeftConfig = getattr(peft, self.pefts)(**settings)
        return config

    @classmethod
    def usual(cls, rank: int, length: int) -> dict[str, Any]:
        """Return PEFT's own defaults."""
        capacity = str(cls.capacity)
        default = cls.model_fields[capacity].default
        return {capacity: default, "target_modules": TARGET_MODULES}


def whole(value: float) -> float | int:
    """Return a whole number as int, as PEFT and vLLM's reader declare lora_alpha."""
    return int(value) if value == int(value) else value

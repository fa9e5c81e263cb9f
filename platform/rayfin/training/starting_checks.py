"""Whether a trial can continue an adapter: its base, method, settings and modules are compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rayfin.compat.peft import saved_modules
from rayfin.config import Config, MethodConfig
from rayfin.errors import MethodError, listed
from rayfin.methods import METHODS
from rayfin.methods.attach import ADAPTER, attach
from rayfin.models import base_of, import_bitsandbytes, locate, meta_model
from rayfin.objectives import objective_of
from rayfin.training.starting_adapter import WEIGHTS, StartingAdapter

_PREFIX = "base_model.model."


def check_starting_adapter(start: StartingAdapter, config: Config) -> None:
    """Raise MethodError where a trial of `config` can't continue the adapter `start`.

    PEFT attaches the method to a skeleton of the base, and says what the file has to hold.
    """
    import_bitsandbytes()  # before PEFT, which would import it with a warning
    from peft import get_peft_model_state_dict

    method = config.method
    _check_base(start, config)
    _check_bits(start, method)
    if not method.adapter_is_whole and start.steps is None:
        raise MethodError(
            f"method.init_from: the file of '{start.name}' has what the prompt encoder of "
            f"{method.type} put out, and not the encoder, which is trained; give an adapter that "
            "rayfin has trained without train.save_only_model"
        )
    skeleton = meta_model(config.model)
    modules = {name for name, _ in skeleton.named_modules()}
    stage = objective_of(config.train)
    model: Any = attach(
        skeleton, method, config.train.max_steps, locate(config.model), task_type=stage.task_type
    )
    _check_settings(start, method, model.peft_config[ADAPTER].to_dict())
    if method.virtual_tokens:
        return  # their number, and the base, say all of the shapes
    expected = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    whole = {name.removeprefix(_PREFIX) for name, _ in saved_modules(model)}
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    _check_tensors(start, method, shapes, modules, whole)


def _check_base(start: StartingAdapter, config: Config) -> None:
    own = base_of(config.model)
    if start.base is not None and start.base.is_same(own):
        return
    if start.base is None:
        told, remedy = "does not say which base it was trained on", ""
    else:
        told = f"was trained on {start.base}"
        remedy = f"set model.name={start.base.name}, or "
    raise MethodError(
        f"method.init_from: '{start.name}' {told}, and model.name is {own}; {remedy}give an "
        "adapter of that base (where it is one: rayfin adapters add DIR NAME model.name=… "
        "--base-is-right, then method.init_from=NAME)"
    )


def _check_bits(start: StartingAdapter, method: MethodConfig) -> None:
    if start.bits is not None and method.quantization_bit != start.bits:
        bits = "null" if method.quantization_bit is None else method.quantization_bit
        raise MethodError(
            f"method.init_from: '{start.name}' makes up for what {start.bits} bits have lost, and "
            f"method.quantization_bit={bits}; set method.quantization_bit={start.bits}"
        )


def _check_settings(start: StartingAdapter, method: MethodConfig, own: Mapping[str, Any]) -> None:
    """Compare PEFT's configurations: the method, and settings that change what it computes."""
    theirs = start.config
    for key in ("peft_type", *(key for key in own if key.startswith("use_"))):
        mine, other = own[key], theirs.get(key)
        if getattr(mine, "value", mine) != other and (mine or other):
            kind = str(theirs.get("peft_type")).lower()
            bits = start.bits or method.quantization_bit
            known = [name for name, one in METHODS.items() if one.is_pefts(kind, theirs, bits)]
            raise MethodError(
                f"method.init_from: '{start.name}' is an adapter of {listed(known) or kind}, and "
                f"method.type={method.type}; "
                + (f"set method.type={known[0]}, or give" if known else "give")
                + " an adapter of the same method"
            )
    training_only = {"init_from", *method.first_weights, *method.module_settings}
    for name in type(method).model_fields.keys() & own.keys() & theirs.keys() - training_only:
        if "dropout" in name or name == "layers_to_transform":
            continue
        if _plain(own[name]) != _plain(theirs[name]):
            raise MethodError(
                f"method.init_from: '{start.name}' has {name} {_shown(theirs[name])}, and "
                f"method.{name}={_shown(own[name])}; set method.{name}={_shown(theirs[name])}"
            )


def _check_tensors(
    start: StartingAdapter,
    method: MethodConfig,
    expected: Mapping[str, tuple[int, ...]],
    modules: set[str],
    whole: set[str],
) -> None:
    """Compare the tensors in the file with those that the method would save.

    `modules` are the base's, and `whole` those of them that are trained whole.
    """
    found = _shapes(start)
    mine, theirs = _by_module(expected, modules), _by_module(found, modules)
    if mine.keys() != theirs.keys():
        # A module that is trained whole is saved under its own names.
        theirs_whole = {name for name, keys in theirs.items() if name and {"weight"} >= keys}
        setting = "target_modules"
        own, other = set(mine) - whole, set(theirs) - theirs_whole
        if own == other:
            setting, own, other = "modules_to_save", whole, theirs_whole
        ends = _ends(own), _ends(other)
        odd = min(own ^ other)
        where = "" if ends[0] != ends[1] else f" ({odd} is in one of them only)"
        raise MethodError(
            f"method.init_from: '{start.name}' has {ends[1] or 'none'} as {setting}, and this "
            f"trial {ends[0] or 'none'}{where}; set method.{setting}="
            f"{f'[{ends[1]}]' if ends[1] else 'null'}"
        )
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise MethodError(
                f"method.init_from: the tensor {name} has the shape {found.get(name)} in "
                f"'{start.name}', and {expected.get(name)} by the settings of method; give it "
                "those by which it was trained (its adapter_config.json has them)"
            )


def _shapes(start: StartingAdapter) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(start.directory / WEIGHTS, framework="numpy") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _by_module(names: Iterable[str], modules: set[str]) -> dict[str, set[str]]:
    """Return what each module of the base has of `names`, without its own name."""
    found: dict[str, set[str]] = {}
    for name in names:
        parts = name.removeprefix(_PREFIX).split(".")
        lengths = (n for n in range(len(parts), -1, -1) if ".".join(parts[:n]) in modules)
        length = next(lengths, 0)
        found.setdefault(".".join(parts[:length]), set()).add(".".join(parts[length:]))
    return found


def _ends(names: Iterable[str]) -> str:
    """Return the last parts of modules' names, as a list in a configuration has them."""
    return ",".join(sorted({name.rpartition(".")[2] for name in names if name}))


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)
    return sorted(value) if isinstance(value, list | tuple | set) else value


def _shown(value: Any) -> str:
    value = _plain(value)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value).replace("'", "")

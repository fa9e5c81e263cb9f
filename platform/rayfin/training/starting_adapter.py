"""The adapter that a trial continues (`method.init_from`): find it, and read it into a model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfin.config import Config, MethodConfig, TrainConfig
from rayfin.errors import AdapterError
from rayfin.models import BASE_BITS, Base
from rayfin.paths import TRAINING_STATE, Storage, digest_files

if TYPE_CHECKING:
    import torch

    from rayfin.training.parallel import ParallelStrategy

WEIGHTS = "adapter_model.safetensors"
_MOMENTS, _TRAINED, _RANDOM = "moments/", "weights/", "random/"
_HEADER = "rayfin"
"""The key of a state file's safetensors metadata that holds `steps` and `course` as JSON."""


@dataclass(frozen=True)
class StartingAdapter:
    """An adapter that training starts from, as its files describe it."""

    directory: Path
    name: str
    """NAME@VERSION of an adapter that was published, or the directory."""
    identity: str
    """16 hexadecimal digits, a digest of its weights and of its training state."""
    config: dict[str, Any]
    """The content of adapter_config.json."""
    base: Base | None
    """The base that it was trained on; None where nothing tells."""
    bits: int | None
    """The bits of the quantised base to which it is bound, if it is."""
    steps: int | None
    """The number of optimizer steps behind its training state; None where it has no such file."""
    course: str | None
    """The `TrialSpec.course` of the training that left the state."""

    def continues(self, course: str) -> bool:
        """Whether a training of this course continues the one that made the adapter.

        It then goes on with the optimizer's state and with the samples that come next. Any other
        training takes the weights alone.
        """
        return self.steps is not None and self.course == course

    def as_dict(self, course: str) -> dict[str, Any]:
        """Return the lineage of a trial that starts here, as its row and its adapter have it."""
        continues = self.continues(course)
        return {
            "adapter": self.name,
            "identity": self.identity,
            "continues": continues,
            "steps": self.steps if continues else 0,
        }

    def note(self, course: str) -> str:
        """Return a line that says how a training of this course starts."""
        if self.continues(course):
            return (
                f"continues {self.name} at step {(self.steps or 0) + 1} of its data, with its "
                "optimizer's state"
            )
        why = (
            "it has no training state"
            if self.steps is None
            else "its data, seed, samples a step and their order, objective, or optimizer and its "
            "arguments were not all the same"
        )
        return (
            f"starts from the weights of {self.name}; the optimizer and the order of the data "
            f"begin anew: {why}"
        )


def pinned(config: Config) -> MethodConfig:
    """Return the section `method` with the directory of the adapter in the place of its name.

    An alias names one version from here on. Raises AdapterError where there is no such adapter.
    """
    method = config.method
    if method.init_from is None:
        return method
    directory = _directory(method.init_from, config.registry_storage)
    return method.model_copy(update={"init_from": str(directory)})


def version_of(written: str | None, found: str | None) -> str | None:
    """Return `found`, NAME@VERSION, where `written` names that adapter without a version."""
    if written is None or found is None:
        return None
    from rayfin.adapters import AdapterRef

    try:
        asked, named = AdapterRef.parse(written), AdapterRef.parse(found)
    except AdapterError:  # a directory
        return None
    same = asked.name == named.name and asked.version is None and named.version is not None
    return found if same else None


def _directory(name: str, storage: str) -> Path:
    from rayfin.adapters import AdapterRef, Catalog

    catalog = Catalog(Storage.at(storage).adapters)
    try:
        path = Path(name).expanduser()
        ref = AdapterRef.parse(name) if "/" not in name else None
    except (AdapterError, OSError, RuntimeError):
        ref = None
    try:
        if ref is not None and (catalog.versions(ref.name) or not path.is_dir()):
            # Every byte is read: what is damaged would be trained on.
            return catalog.verify(ref).path
        if path.is_dir():
            return path.resolve()
    except AdapterError as error:
        raise AdapterError(f"method.init_from: {error}") from error
    raise AdapterError(
        f"method.init_from: '{name}' is neither NAME@VERSION of an adapter in the registry nor a "
        f"directory here; `rayfin adapters list` shows those in '{catalog.root}'"
    )


def read_starting_adapter(directory: Path) -> StartingAdapter:
    """Return the adapter in a directory; raises AdapterError for one that is not whole."""
    from rayfin.adapters.files import FULL, inspect_files, read_json, select_files, storage_errors
    from rayfin.adapters.metadata import claimed_base, trusted_metadata

    try:
        files = select_files(directory)
        if inspect_files(directory, files).peft_type == FULL:
            raise AdapterError(
                f"'{directory}' is a whole model and no adapter; continue it by model.name"
            )
        with storage_errors(f"'{directory}'"):
            config = read_json(files["adapter_config.json"])
            told = trusted_metadata(directory)
            own = {name: files[name] for name in (WEIGHTS, TRAINING_STATE) if name in files}
            digests = {name: one["sha256"] for name, one in digest_files(own).items()}
            header = _header(files[TRAINING_STATE]) if TRAINING_STATE in files else {}
    except AdapterError as error:
        raise AdapterError(f"method.init_from: {error}") from error
    named = {"name", "version"} <= told.keys() and str(told["version"]) == directory.name
    text = json.dumps(digests, sort_keys=True)
    return StartingAdapter(
        directory=directory,
        name=f"{told['name']}@{told['version']}" if named else str(directory),
        identity=hashlib.sha256(text.encode()).hexdigest()[:16],
        config=config,
        base=claimed_base(config, told),
        bits=told.get(BASE_BITS),
        steps=header.get("steps"),
        course=header.get("course"),
    )


def _header(path: Path) -> dict[str, Any]:
    """Return what a state file says of itself; raises AdapterError for one that is not ours."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
        if type(header["steps"]) is int and header["steps"] > 0 and str(header["course"]):
            return dict(header)
    except (KeyError, TypeError, ValueError):
        pass
    raise AdapterError(
        f"'{path}' is no training state of rayfin's; remove it to start from the weights alone"
    )


# --- weights and state --------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingState:
    """What a training continues with, beside an adapter's own weights."""

    moments: dict[str, torch.Tensor]
    """The optimizer's state, by the names that `ParallelStrategy.moments` gives it."""
    weights: dict[str, torch.Tensor]
    """All that is trained, as it was loaded."""
    random: dict[str, torch.Tensor]
    """The states of the generators that draw dropout, by device."""

    def set_random(self) -> None:
        """Have dropout drawn as the training before would have drawn it next."""
        import torch

        if "cpu" in self.random:
            torch.set_rng_state(self.random["cpu"])
        if "cuda" in self.random and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.random["cuda"])


@dataclass(frozen=True)
class Beginning:
    """How a training begins: anew, from an adapter's weights, or where another one ended."""

    course: str
    """The training's own `TrialSpec.course`."""
    start: StartingAdapter | None = None
    state: TrainingState | None = None
    """What it continues with; None where it doesn't continue another one."""

    @property
    def steps(self) -> int:
        """The number of steps of the training that it continues."""
        return 0 if self.start is None or self.state is None else self.start.steps or 0

    def save_after(self, steps: int, state: dict[str, torch.Tensor], directory: Path) -> None:
        """Write `state_to_continue`, after so many steps of this training, beside its adapter."""
        from safetensors.torch import save_file

        header = {"steps": self.steps + steps, "course": self.course}
        save_file(state, directory / TRAINING_STATE, {_HEADER: json.dumps(header, sort_keys=True)})


def begin(
    model: torch.nn.Module, method: MethodConfig, start: StartingAdapter | None, course: str
) -> Beginning:
    """Read the weights of `start`, if any, into a model to which `method` has been attached.

    Raises AdapterError for weights that do not belong to the model.
    """
    if start is None:
        return Beginning(course)
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    from rayfin.methods import load_training_state, training_state
    from rayfin.methods.attach import ADAPTER

    needs_state = start.continues(course) or not method.adapter_is_whole
    saved = load_file(start.directory / TRAINING_STATE) if needs_state else {}
    try:
        if method.adapter_is_whole:
            found: Any = set_peft_model_state_dict(
                model, load_file(start.directory / WEIGHTS), adapter_name=ADAPTER
            )
            trained = {name for name, p in model.named_parameters() if p.requires_grad}
            left = sorted(found.unexpected_keys) or sorted(trained & {*found.missing_keys})
            if left and not method.virtual_tokens:  # of which PEFT reads a table under another name
                raise KeyError(left[0])
        else:
            load_training_state(model, _under(_TRAINED, saved))
    except (KeyError, RuntimeError) as error:
        raise AdapterError(
            f"method.init_from: the weights of '{start.name}' do not fit the model "
            f"({' '.join(str(error).split())[:200]}); give an adapter of this base and method"
        ) from error
    if not start.continues(course):
        return Beginning(course, start)
    moments, random = _under(_MOMENTS, saved), _under(_RANDOM, saved)
    return Beginning(course, start, TrainingState(moments, training_state(model), random))


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def saves_state(method: MethodConfig, train: TrainConfig) -> bool:
    """Return whether a trial that keeps its last weights saves what another needs to continue it.

    It does not where nothing can continue it, or nobody wants to.
    """
    # What is saved of one that alters the base is plain LoRA of twice the rank that was trained.
    unable = method.continuation_refusal() is not None or method.alters_base
    return not (train.save_only_model or unable)


def state_to_continue(
    method: MethodConfig, parallel: ParallelStrategy, model: torch.nn.Module, optimizer: Any
) -> dict[str, torch.Tensor] | None:
    """Return what another training needs to continue this one, beside the adapter.

    All workers must call it. None where nothing can continue it, or nobody wants to.
    """
    import torch

    if not saves_state(method, parallel.train):
        return None
    weights = {} if method.adapter_is_whole else parallel.weights(model)
    moments = parallel.moments(model, optimizer)
    state = {f"{_TRAINED}{name}": tensor for name, tensor in weights.items()}
    state |= {f"{_MOMENTS}{name}": tensor for name, tensor in moments.items()}
    if parallel.group.size == 1:  # else each worker has its own
        state[f"{_RANDOM}cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            state[f"{_RANDOM}cuda"] = torch.cuda.get_rng_state()
    return state

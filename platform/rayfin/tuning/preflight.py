"""Find what would make every trial fail, before a history row is written or Ray starts.

Where all is well this takes milliseconds: torch and transformers are loaded only to be sure of, and
to explain, what the files alone leave in doubt.
"""

from __future__ import annotations

from collections.abc import Iterable

from rayfin.compat.versions import check_trainer
from rayfin.config import Config
from rayfin.data import Corpus, check_lengths, needs_length_check
from rayfin.data.token_settings import TokenSettings
from rayfin.errors import MethodError
from rayfin.hardware import describe_hardware
from rayfin.methods import linear_names
from rayfin.models import check_model, load_tokenizer, max_positions, meta_model, weight_names
from rayfin.objectives import objective_of
from rayfin.training.combination import check_combination
from rayfin.training.companions import companion_models, of_companions
from rayfin.training.optimization import check_device, needs_device
from rayfin.training.starting_adapter import StartingAdapter
from rayfin.training.starting_checks import check_starting_adapter
from rayfin.tuning.plan import SweepPlan


def check_run(plan: SweepPlan, configs: Iterable[Config], cluster: str | None) -> None:
    """Raise a UsageError for a device, data, model or module that isn't there.

    `configs` are the variants of `plan.config` to look at; `cluster` is where they will run, None
    for this machine. Raise DependencyError where the installed Transformers can't train.
    """
    check_trainer()
    configs = [*configs]
    if plan.config.scaling.use_gpu is True and cluster is None:
        describe_hardware(use_gpu=True)
    if cluster is None and any(needs_device(config.model, config.train) for config in configs):
        device = describe_hardware(plan.config.scaling.use_gpu).device
        for config in configs:
            check_device(config.model, config.train, device)
    seen: set[tuple[object, ...]] = set()

    def first_time(*what: object) -> bool:
        new = what not in seen
        seen.add(what)
        return new

    for config in configs:
        objective = objective_of(config.train)
        corpus = plan.corpus(config.data, objective)
        if (counted := config.with_rows(corpus.rows)) is not config:
            check_combination(counted)
        if first_time(config.model, config.method.quantization_bit):
            check_model(config.model, config.method.quantization_bit)
            plan.identity(config.model)
        if first_time(config.model, tuple(companion_models(config.train, config.model).items())):
            # Their content, too, is read: it enters each trial's fingerprint.
            of_companions(config.train, config.model, lambda model: check_model(model, None))
            of_companions(config.train, config.model, plan.identity)
        method = config.method.model_dump_json()  # a mapping among its settings has no hash
        if first_time(config.model, method):
            check_method(config, plan.start(plan.space.pinned(config)))
        if first_time(config.model, method, config.data):
            check_positions(config, max_positions(config.model))
        settings = TokenSettings.of(config.data, config.train)
        if first_time(config.model, config.data, objective.identity, settings):
            _check_lengths(config, corpus, settings)


def check_method(config: Config, start: StartingAdapter | None) -> None:
    """Raise MethodError where the method doesn't fit the model, or the adapter it starts from."""
    _check_modules(config)
    if start is not None:
        check_starting_adapter(start, config)


def _check_modules(config: Config) -> None:
    for setting in config.method.module_settings:
        names = getattr(config.method, setting)
        if not isinstance(names, tuple):
            continue
        if not _without_a_match(names, weight_names(config.model)):
            continue
        base = meta_model(config.model)
        modules = [name for name, module in base.named_modules() if hasattr(module, "weight")]
        if unknown := _without_a_match(names, modules):
            if setting == "target_modules":
                there = f"its linear modules are {', '.join(linear_names(base))}, or use all-linear"
            else:  # any module may be excluded or trained whole, and none stands for all
                last_parts = sorted({name.rpartition(".")[2] for name in modules})
                there = f"its modules are {', '.join(last_parts)}"
            raise MethodError(
                f"method.{setting}: '{unknown[0]}' is no module of '{config.model.name}'; {there}"
            )
    if config.method.depends_on_base:
        config.method.check_base(meta_model(config.model))


def _without_a_match(targets: Iterable[str], modules: list[str]) -> list[str]:
    """Return the targets that PEFT would not find, by a module's whole name or its last parts."""
    return [
        target
        for target in targets
        if not any(name == target or name.endswith(f".{target}") for name in modules)
    ]


def check_positions(config: Config, has: int | None) -> None:
    """Raise MethodError where samples are longer than the positions that the model `has`."""
    tokens = config.method.positions
    if has is None or config.data.max_length + tokens <= has:
        return
    beside = f" beside method.{config.method.capacity}={tokens}" if tokens else ""
    raise MethodError(
        f"data.max_length={config.data.max_length}{beside} is more than the {has} positions of "
        f"'{config.model.name}'; use data.max_length={max(8, has - tokens)} or less"
    )


def _check_lengths(config: Config, corpus: Corpus, settings: TokenSettings) -> None:
    """Raise DataError where samples or their chat template leave nothing to train on."""
    length = config.data.max_length
    if config.data.chat_template is not None or needs_length_check(corpus, length, settings):
        tokenizer = load_tokenizer(config.model, config.data.chat_template)
        check_lengths(corpus, tokenizer, length, objective_of(config.train), settings)

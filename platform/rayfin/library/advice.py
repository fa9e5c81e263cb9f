"""`rayfin.recommend` and `rayfin.estimate`: what to train, and what a training takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from rayfin.errors import ConfigError, did_you_mean
from rayfin.library.experiment import ConfigSource, configuration, read_data
from rayfin.library.messages import notes_to
from rayfin.library.process import prepare_process
from rayfin.library.stores import begun_history

if TYPE_CHECKING:
    from rayfin.advisor.answer import Recommendation
    from rayfin.advisor.candidates import ScenarioFacts
    from rayfin.advisor.estimate import Estimate
    from rayfin.advisor.knowledge import Knowledge
    from rayfin.advisor.measurements import MeasuredTrial
    from rayfin.advisor.scenario import HardwareClass, Latency, Priority, Scenario
    from rayfin.config import Config
    from rayfin.hardware import Hardware


def recommend(
    config: ConfigSource = None,
    *,
    k: int = 3,
    hardware: HardwareClass | None = None,
    gpu_memory_gb: float | None = None,
    num_gpus: int | None = None,
    latency: Latency | None = None,
    latency_target_ms: float | None = None,
    budget_hours: float | None = None,
    priority: Priority | None = None,
    progress: bool = True,
) -> Recommendation:
    """Recommend `k` configurations for a model, data and hardware, learned from all trials.

    - `config`: a Config, a mapping of its sections, or the path of a YAML file. What it names is
      kept; the advisor chooses the rest.
    - `hardware`: cpu, single_gpu or multi_gpu, with `gpu_memory_gb` GiB on each of `num_gpus`
      GPUs; this machine where nothing is said.
    - `latency`: strict or normal, whether answers are waited for; `latency_target_ms` is that of
      the first token.
    - `budget_hours`: that a training may take. `priority`: quality, cost or latency.
    - `progress`: tell on standard error what there is to know of the data, else in the log.

    Where nothing fits, `choices` is empty and `nothing_fits` says what would. Nothing is trained or
    written. Raises UsageErrors for data or a model that can't be used, and what can't be meant.
    """
    known = {
        "hardware": hardware,
        "gpu_memory_gb": gpu_memory_gb,
        "num_gpus": num_gpus,
        "latency": latency,
        "latency_target_ms": latency_target_ms,
        "budget_hours": budget_hours,
        "priority": priority,
    }
    for name, allowed in _choices().items():
        if known[name] is not None and known[name] not in allowed:
            near = did_you_mean(str(known[name]), allowed)
            raise ConfigError(f"{name}='{known[name]}' must be one of {', '.join(allowed)}{near}")
    config = configuration(config)
    return answer(config, scenario_facts(config, known, progress=progress), k)


def _choices() -> Mapping[str, tuple[str, ...]]:
    """Return the values that what is told of a scenario may have."""
    from rayfin.advisor.scenario import HardwareClass, Latency, Priority

    kinds = {"hardware": HardwareClass, "latency": Latency, "priority": Priority}
    return {name: get_args(kind) for name, kind in kinds.items()}


def scenario_facts(
    config: Config, known: dict[str, Any], *, progress: bool = True
) -> ScenarioFacts:
    """Return the facts that a recommendation for `config` needs.

    `known` is what is told of the scenario, by the names of `Scenario`'s fields; None is not told.
    """
    from rayfin.advisor.candidates import ScenarioFacts, given_settings
    from rayfin.advisor.scenario import Scenario
    from rayfin.hardware import describe_hardware
    from rayfin.models import describe_model

    prepare_process()
    known = {name: value for name, value in known.items() if value is not None}
    if "data.max_length" in given_settings(config):
        known["sequence_length"] = config.data.max_length
    machine = describe_hardware(config.scaling.use_gpu)
    if "gpu_memory_gb" in known and "hardware" not in known:
        known.setdefault("num_gpus", max(1, machine.device_count))
    facts = describe_model(config.model)
    corpus = read_data(config, notes_to(progress))
    scenario = Scenario.detect(
        use_gpu=config.scaling.use_gpu,
        model_name=config.model.name,
        model_size_b=facts.parameters / 1e9,
        dataset_rows=len(corpus.train),
        **known,
    )
    profile = {
        "rows_train": len(corpus.train),
        "digest": corpus.digest,
        "source": corpus.source,
    }
    return ScenarioFacts(scenario, facts, _described(machine, scenario), profile)


def answer(config: Config, facts: ScenarioFacts, k: int = 3) -> Recommendation:
    """Recommend `k` variants of `config` for a scenario; raises ConfigError for k below 1."""
    from rayfin.advisor import recommendation

    if k < 1:
        raise ConfigError(f"k={k} must be 1 or more: it is the number of configurations")
    return recommendation.recommend(facts, _knowledge(config), k, config=config)


def _described(machine: Hardware, scenario: Scenario) -> Hardware:
    """Return this machine, or the one that the scenario describes."""
    if scenario.hardware == "cpu":
        return replace(machine, device="cpu", device_memory=machine.host_memory, device_count=0)
    if machine.device == "cuda" and scenario.gpu_memory_gb is None:
        return machine
    memory = int((scenario.gpu_memory_gb or 12.0) * 2**30)
    name = machine.device_name if machine.device == "cuda" else "a GPU"
    count = scenario.num_gpus or 1
    return replace(
        machine, device="cuda", device_name=name, device_count=count, device_memory=memory
    )


def _knowledge(config: Config) -> Knowledge:
    """Return what the history knows; only the reference where it has not been begun yet."""
    from rayfin.advisor.knowledge import Knowledge, knowledge_of

    history = begun_history(config)
    if history is None:
        return Knowledge.of([])
    with history:
        return knowledge_of(history)


def estimate(
    config: ConfigSource = None, *, price_per_hour: float | None = None, progress: bool = True
) -> Estimate:
    """Estimate the memory, time and cost of a configuration on this machine, before it runs.

    - `config`: a Config, a mapping of its sections, or the path of a YAML file.
    - `price_per_hour`: what all that the run uses costs an hour, in any currency.
    - `progress`: tell on standard error what there is to know of the data, else in the log.

    The result says whether it fits; nothing is trained or written. Raises UsageErrors for a
    combination, data or a model that can't be used.
    """
    from rayfin.advisor import estimate as estimates
    from rayfin.advisor.memory_check import sampled_profile
    from rayfin.hardware import describe_hardware
    from rayfin.models import describe_model
    from rayfin.training.combination import check_combination
    from rayfin.training.precision import with_precision

    prepare_process()
    config = configuration(config)
    check_combination(config)
    config = with_precision(config)
    measured = _measured(config)
    corpus = read_data(config, notes_to(progress))
    profile = sampled_profile(config, corpus)
    config = config.with_rows(corpus.rows)
    check_combination(config)  # now that its steps are known
    return estimates.estimate(
        config,
        describe_model(config.model),
        describe_hardware(config.scaling.use_gpu),
        measured=measured,
        price_per_hour=price_per_hour,
        profile=profile,
    )


def _measured(config: Config) -> list[MeasuredTrial]:
    """Return the trials of the configuration's history, and those that come with rayfin."""
    from rayfin.advisor.knowledge import measured_trials

    history = begun_history(config)
    if history is None:
        return measured_trials(None)
    with history:
        return measured_trials(history)

"""`rayfin.recommend` and `rayfin.estimate`: what to train, and what a training takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rayfin.errors import ConfigError, did_you_mean
from rayfin.language import Language, answering_in, check_language
from rayfin.library.described_scenario import described_scenario, use_gpu_of
from rayfin.library.experiment import ConfigSource, configuration, read_data
from rayfin.library.messages import notes_to, progress_to
from rayfin.library.probing import ProbeBudget, check_here, probed
from rayfin.library.process import prepare_process
from rayfin.library.stores import begun_history

if TYPE_CHECKING:
    from rayfin.advisor.answer import Recommendation
    from rayfin.advisor.candidates import ScenarioFacts
    from rayfin.advisor.description import Description
    from rayfin.advisor.estimate import Estimate
    from rayfin.advisor.knowledge import Knowledge
    from rayfin.advisor.measurements import LengthFacts, MeasuredTrial
    from rayfin.advisor.scenario import HardwareClass, Latency, Priority
    from rayfin.config import Config
    from rayfin.data import DataProfile
    from rayfin.hardware import Hardware
    from rayfin.models import ModelFacts


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
    model_size_b: float | None = None,
    rows: int | None = None,
    tokens_per_sample: float | None = None,
    probe: int | str | None = None,
    lang: Language = "en",
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
    - `model_size_b`: billions of parameters, in place of model.name.
    - `rows`: the number of training samples, in place of data.path, with a mean length of
      `tokens_per_sample`.
    - `probe`: choose the first choice's learning rate by short trainings on this machine: a number
      of them, or the time for all (`5m`). They become rows of the history.
    - `lang`: en or zh, the language of the sentences.
    - `progress`: tell on standard error what there is to know of the data, else in the log.

    Where nothing fits, `choices` is empty and `nothing_fits` says what would. Nothing is trained or
    written without `probe`. Raises UsageErrors for data or a model that can't be used, and what
    can't be meant.
    """
    known = {
        "hardware": hardware,
        "gpu_memory_gb": gpu_memory_gb,
        "num_gpus": num_gpus,
        "latency": latency,
        "latency_target_ms": latency_target_ms,
        "budget_hours": budget_hours,
        "priority": priority,
        "model_size_b": model_size_b,
        "rows": rows,
        "tokens_per_sample": tokens_per_sample,
    }
    check_language(lang)
    budget = None if probe is None else ProbeBudget.parse(probe)
    if budget is not None:
        check_here(known)
    with answering_in(lang):
        base, facts = scenario_of(configuration(config), known, progress=progress)
        found = answer(base, facts, k)
        if budget is not None:
            found = probed(
                found, base, lambda other: answer(other, facts, 1), budget, progress_to(progress)
            )
        return found


def _choices() -> Mapping[str, tuple[str, ...]]:
    """Return the values that what is told of a scenario may have."""
    from rayfin.advisor.scenario import HardwareClass, Latency, Priority

    kinds = {"hardware": HardwareClass, "latency": Latency, "priority": Priority}
    return {name: get_args(kind) for name, kind in kinds.items()}


def scenario_of(
    config: Config, known: Mapping[str, Any], *, progress: bool = True
) -> tuple[Config, ScenarioFacts]:
    """Return the configuration and the facts that a recommendation for `config` needs.

    `known` is what is told of the scenario, by the names of `recommend`'s arguments; None is not
    told. Raises UsageErrors.
    """
    from rayfin.advisor.candidates import ScenarioFacts, given_settings
    from rayfin.advisor.lengths import estimated_lengths, kept_length, lengths_note
    from rayfin.models import lacks_weights

    prepare_process()
    told, known = _told(config, known)
    if "data.max_length" in given_settings(config):
        known["sequence_length"] = config.data.max_length
    elif told.max_length is not None:
        known["sequence_length"] = told.max_length
    facts, guessed = told.model(config)
    lengths, counted = told.lengths, told.note
    if told.rows is None:
        corpus = read_data(config, notes_to(progress))
        known["dataset_rows"] = len(corpus.train)
        if corpus.stream is None and (guessed is not None or lacks_weights(config.model)):
            lengths = estimated_lengths(corpus)
            known.setdefault("sequence_length", kept_length(lengths))
            counted = lengths_note(lengths)
        profile: dict[str, Any] = {
            "rows_train": len(corpus.train),
            "digest": corpus.digest,
            "source": corpus.source,
        }
    else:
        known["dataset_rows"], profile = told.rows, dict(told.profile)
    scenario, hardware, assumed = described_scenario(
        config, known, model_name=facts.name, model_size_b=facts.parameters / 1e9
    )
    notes = tuple(note for note in (guessed, counted, *assumed) if note is not None)
    return told.applied(config), ScenarioFacts(scenario, facts, hardware, profile, lengths, notes)


def _told(config: Config, known: Mapping[str, Any]) -> tuple[Description, dict[str, Any]]:
    """Return what is told in place of a model and data, and the rest of what is told."""
    from rayfin.advisor.description import Description
    from rayfin.hardware import describe_hardware

    rest = {name: value for name, value in known.items() if value is not None}
    for name, allowed in _choices().items():
        if name in rest and rest[name] not in allowed:
            near = did_you_mean(str(rest[name]), allowed)
            raise ConfigError(f"{name}='{rest[name]}' must be one of {', '.join(allowed)}{near}")
    told = Description(**{each.name: rest.pop(each.name, None) for each in fields(Description)})
    told.check(config)
    if "gpu_memory_gb" in rest and "hardware" not in rest:
        here = describe_hardware(use_gpu_of(config, rest)).device_count
        rest.setdefault("num_gpus", max(1, here))
    return told, rest


def answer(config: Config, facts: ScenarioFacts, k: int = 3) -> Recommendation:
    """Recommend `k` variants of `config` for a scenario; raises ConfigError for k below 1."""
    from rayfin.advisor import recommendation

    if k < 1:
        raise ConfigError(f"k={k} must be 1 or more: it is the number of configurations")
    return recommendation.recommend(facts, _knowledge(config), k, config=config)


def _knowledge(config: Config) -> Knowledge:
    """Return what the history knows; only the reference where it has not been begun yet."""
    from rayfin.advisor.knowledge import knowledge_of

    history = begun_history(config)
    if history is None:
        return knowledge_of(None)
    with history:
        return knowledge_of(history)


def estimate(
    config: ConfigSource = None,
    *,
    price_per_hour: float | None = None,
    hardware: HardwareClass | None = None,
    gpu_memory_gb: float | None = None,
    num_gpus: int | None = None,
    model_size_b: float | None = None,
    rows: int | None = None,
    tokens_per_sample: float | None = None,
    progress: bool = True,
) -> Estimate:
    """Estimate the memory, time and cost of a configuration before it runs.

    - `config`: a Config, a mapping of its sections, or the path of a YAML file.
    - `price_per_hour`: what all that the run uses costs an hour, in any currency.
    - `hardware`, `gpu_memory_gb`, `num_gpus`, `model_size_b`, `rows`, `tokens_per_sample`: as in
      `recommend`; this machine, and the configuration's model and data, where nothing is said.
    - `progress`: tell on standard error what there is to know of the data, else in the log.

    The result says whether it fits; nothing is trained or written. Raises UsageErrors for a
    combination, data or a model that can't be used.
    """
    told = {
        "hardware": hardware,
        "gpu_memory_gb": gpu_memory_gb,
        "num_gpus": num_gpus,
        "model_size_b": model_size_b,
        "rows": rows,
        "tokens_per_sample": tokens_per_sample,
    }
    return estimate_on(configuration(config), told, price_per_hour, progress=progress)[0]


def estimate_on(
    config: Config,
    known: Mapping[str, Any],
    price_per_hour: float | None = None,
    *,
    progress: bool = True,
) -> tuple[Estimate, Hardware, ModelFacts]:
    """Return the estimate of a configuration, with the hardware and the model that it is for.

    `known` is what is told of the scenario, by the names of `estimate`'s arguments; None is not
    told. Raises UsageErrors.
    """
    from rayfin.advisor import estimate as estimates
    from rayfin.advisor.candidates import given_settings
    from rayfin.advisor.lengths import estimated_lengths, lengths_note
    from rayfin.advisor.memory_check import sampled_profile
    from rayfin.config import with_values
    from rayfin.models import lacks_weights
    from rayfin.training.combination import check_combination
    from rayfin.training.optimization import check_device
    from rayfin.training.precision import with_precision
    from rayfin.training.starting_adapter import pinned, read_starting_adapter
    from rayfin.tuning.preflight import check_method

    prepare_process()
    check_combination(config)
    note = notes_to(progress)
    told, known = _told(config, known)
    _, machine, assumed = described_scenario(config, known)
    facts, guessed = told.model(config)
    if told.max_length is not None and "data.max_length" not in given_settings(config):
        config = with_values(config, {"data.max_length": told.max_length})
    for line in (guessed, told.note, *assumed):
        if line is not None:
            note(line)
    check_device(config.model, config.train, machine.device)
    directory = pinned(config).init_from
    if guessed is None:  # else there are no modules to look at
        check_method(config, read_starting_adapter(Path(directory)) if directory else None)
    if machine.device == "cpu":
        config = with_precision(config)
    measured = _measured(config)
    profile: DataProfile | LengthFacts | None
    if told.rows is not None:
        profile = told.lengths and told.lengths.cut(config.data.max_length)
        config = config.with_rows(told.rows)
    else:
        corpus = read_data(config, note)
        if guessed is None and not lacks_weights(config.model):
            profile = sampled_profile(config, corpus)
        elif corpus.stream is not None:
            profile = None
            note(
                f"all samples are taken to have data.max_length={config.data.max_length} tokens, "
                "as the model's tokenizer is not here to count them"
            )
        else:
            estimated = estimated_lengths(corpus)
            note(lengths_note(estimated))
            profile = estimated.cut(config.data.max_length)
        config = config.with_rows(corpus.rows)
    check_combination(config)  # now that its steps are known
    found = estimates.estimate(
        config, facts, machine, measured=measured, price_per_hour=price_per_hour, profile=profile
    )
    return found, machine, facts


def _measured(config: Config) -> list[MeasuredTrial]:
    """Return the trials of the configuration's history, and those that come with rayfin."""
    from rayfin.advisor.knowledge import measured_trials

    history = begun_history(config)
    if history is None:
        return measured_trials(None)
    with history:
        return measured_trials(history)

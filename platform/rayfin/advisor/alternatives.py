"""The rules' other branches (quantise, distribute, merge, distil), with the commands for each."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from rayfin.advisor.answer import Alternative
from rayfin.advisor.candidates import Candidate, ScenarioFacts
from rayfin.advisor.commands import training_command
from rayfin.advisor.preferences import answers_are_waited_for
from rayfin.config import Config, EngineConfig, ServeConfig, with_values
from rayfin.language import localized
from rayfin.methods import METHODS

_SMALLER = 8
"""How many times smaller the model is that answers sooner: a convention, as a prefill's time grows
with the parameters."""
_LEAST_B = 0.135
_SERVED, _FOUR_BITS = 0.8, 0.55
"""The share of a GPU's memory that weights may take where they are served, the rest being for what
is kept of requests, and the bytes of a weight in 4 bits: conventions."""


def alternatives(first: Candidate, base: Config, known: ScenarioFacts) -> list[Alternative]:
    """Return what else could be done than `first`, which is recommended, each with its commands.

    `base` has the given settings. A branch for which this version has no command has none, and
    says so.
    """
    return list(_branches(first, base, known))


def _branches(first: Candidate, base: Config, known: ScenarioFacts) -> Iterator[Alternative]:
    scenario, hardware = known.scenario, known.hardware
    method = first.config.method
    soon = answers_are_waited_for(scenario)
    served = _served(first, base)
    if hardware.device == "cpu":
        yield Alternative(
            kind="quantise",
            text=localized(
                "serve the base with 8-bit weights: faster on a CPU, and an answer may differ in a "
                "word"
            ),
            commands=[_command("serve", served | {"engine.weights": "int8"})],
        )
    elif method.quantization_bit is None:
        found = []
        if first.method == "lora":
            found.append(_trained(first, {"method.type": "qlora"}))
        yield Alternative(
            kind="quantise",
            text=localized(
                "train or serve over 4-bit weights, a quarter of the memory for the base: where "
                "several models share a GPU; each step, and the first token, may take longer"
            ),
            commands=[*found, _command("serve", served | {"engine.quantization_bit": 4})],
        )
    if (shared := _distributed(first, base, known)) is not None:
        yield shared
    if soon and METHODS[method.type].merging:
        yield Alternative(
            kind="merge",
            text=localized(
                "an adapter that is merged into its base costs nothing when it answers; merging is "
                "not in this version: PEFT's merge_and_unload does it, and what it writes to the "
                "directory merged is served so"
            ),
            commands=[_command("serve", {"model.name": "merged"})],
        )
    if soon:
        yield Alternative(
            kind="distil",
            text=localized(
                "a small model answers sooner; distilling this one into it is not in this version, "
                "and what the small one takes on the same data is asked so"
            ),
            commands=[_smaller(base, known)],
        )


def _distributed(first: Candidate, base: Config, known: ScenarioFacts) -> Alternative | None:
    """Return how several GPUs serve the model: each a whole one, or all of them one.

    The recommended training is on all of them already, unless another number was given.
    """
    count, method = known.hardware.device_count, first.config.method
    if count < 2:
        return None
    commands = []
    workers = first.config.scaling.num_workers
    if workers < count:
        shared = {
            "scaling.num_workers": count,
            "train.gradient_accumulation_steps": _shared_by(first.config, count),
        }
        commands.append(_trained(first, shared))
    served, room = _served(first, base), _SERVED * known.hardware.device_memory
    weights = known.facts.parameters * (_FOUR_BITS if method.quantization_bit == 4 else 2)
    if weights <= room:
        text = localized("serve with one engine on each of the {count} GPUs", count=count)
        if method.quantization_bit == 4:
            served["engine.quantization_bit"] = 4
        commands.append(_command("serve", served | {"deployment.replicas": count}))
    elif 2 * known.facts.parameters / count <= room and "vllm" in METHODS[method.type].engines:
        text = localized("serve one model over the {count} GPUs, by vLLM", count=count)
        split = {"engine.type": "vllm", "engine.vllm.tensor_parallel_size": count}
        commands.append(_command("serve", served | split))
    else:
        text = localized("share the training among the {count} GPUs", count=count)
    return Alternative(kind="distribute", text=text, commands=commands) if commands else None


def _command(verb: str, settings: Mapping[str, Any]) -> str:
    return shlex.join(["rayfin", verb, *(f"{key}={_text(settings[key])}" for key in settings)])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _served(first: Candidate, base: Config) -> dict[str, Any]:
    """Return the settings of a deployment of the adapter that training publishes."""
    found: dict[str, Any] = {}
    if base.registry_storage != ServeConfig().storage:
        found["storage"] = base.registry_storage
    rank = first.config.method.served_rank
    if rank > EngineConfig().max_rank:
        found["engine.max_rank"] = rank
    return found


def _trained(first: Candidate, changes: Mapping[str, Any]) -> str:
    """Return the command of a training with changes to `first`."""
    return training_command(with_values(first.config, changes).model_dump(mode="json"))


def _shared_by(config: Config, workers: int) -> int:
    """Return the accumulation with which so many workers can share a step, the least that can."""
    at_once, times = (
        config.train.per_device_train_batch_size,
        config.train.gradient_accumulation_steps,
    )
    return next(n for n in range(times, times + workers) if at_once * n % workers == 0)


def _smaller(base: Config, known: ScenarioFacts) -> str:
    scenario = known.scenario
    size = max(_LEAST_B, known.facts.parameters / 1e9 / _SMALLER)
    words = ["rayfin", "recommend", "--model-size-b", f"{size:.2g}"]
    if known.rows is not None:
        words += ["--rows", str(known.rows)]
        mean = (known.profile or {}).get("tokens_per_sample_mean")
        words += [] if mean is None else ["--tokens-per-sample", f"{mean:.4g}"]
    for option in ("hardware", "gpu_memory_gb", "num_gpus", "latency", "latency_target_ms"):
        value = getattr(scenario, option)
        if value:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            words += [f"--{option.replace('_', '-')}", shown]
    return shlex.join(words)

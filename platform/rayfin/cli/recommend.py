"""`rayfin recommend`: what to train for a model, data and hardware, and how sure that is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfin.cli.experiment import adapter_name, read_data
from rayfin.cli.parser import print_json
from rayfin.cli.places import begun_history
from rayfin.cli.settings import add_settings, split_settings

if TYPE_CHECKING:
    from rayfin.advisor.answer import Choice, Recommendation
    from rayfin.advisor.knowledge import Knowledge
    from rayfin.advisor.recommendation import ScenarioFacts
    from rayfin.config import Config
    from rayfin.hardware import Hardware

_CHOICES = {
    "hardware": ("cpu", "single_gpu", "multi_gpu"),
    "latency": ("strict", "normal"),
    "priority": ("quality", "cost", "latency"),
}
_SCENARIO = {
    "hardware": (str, "cpu, single_gpu or multi_gpu; default: this machine's"),
    "latency": (str, "strict or normal: whether answers are waited for"),
    "priority": (str, "quality, cost or latency"),
    "gpu-memory-gb": (float, "GiB of one GPU"),
    "num-gpus": (int, "GPUs that train together"),
    "latency-target-ms": (float, "milliseconds to the first token"),
    "budget-hours": (float, "hours that a training may take"),
}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "what to train for a model, data and hardware, learned from all trials"
    parser = subparsers.add_parser("recommend", help=summary, description=f"{summary.capitalize()}")
    add_settings(parser)
    parser.add_argument("-k", type=_count, default=3, metavar="N", help="configurations (3)")
    for name, (kind, meaning) in _SCENARIO.items():
        parser.add_argument(
            f"--{name}", type=kind, choices=_CHOICES.get(name), metavar="X", help=meaning
        )
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="quality against cost")
    parser.add_argument(
        "--scaffold", type=Path, metavar="DIR", help="write configurations to train, sweep, serve"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.epilog = (
        f"Example: {parser.prog} model.name=smollm2-135m data.path=my.jsonl --scaffold mine. What "
        "the settings name is kept; the advisor chooses the rest. Exit code 1: nothing fits, and "
        "what would is said. Guide: docs/recommend.md"
    )
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0, or 1 where nothing fits: with one line on stderr that says what would.

    With --json the answer is printed either way, its `nothing_fits` the same line. Nothing is
    trained, and nothing is written where nothing fits.
    """
    from rayfin.advisor.recommendation import recommend
    from rayfin.config import load_config
    from rayfin.errors import NothingFits

    file, settings = split_settings(args.settings)
    config = load_config(file, settings)
    place = _place(config, args)
    answer = recommend(place, _knowledge(config), args.k, config=config)
    if answer.nothing_fits is not None:
        if not args.json:
            raise NothingFits(answer.nothing_fits)
        print_json(answer.model_dump(mode="json"))
        return 1
    if args.picture is not None:
        _write_picture(answer, args.picture)
    written: dict[str, Path] = {}
    if args.scaffold is not None:
        from rayfin.advisor.scaffold import scaffold

        written = scaffold(answer, args.scaffold, name=adapter_name(config))
    if args.json:
        print_json(answer.model_dump(mode="json"))
    else:
        _print(config, place, answer, written)
    return 0


def _place(config: Config, args: argparse.Namespace) -> ScenarioFacts:
    from rayfin.advisor.recommendation import ScenarioFacts
    from rayfin.advisor.scenario import Scenario
    from rayfin.hardware import describe_hardware
    from rayfin.models import describe_model

    known: dict[str, Any] = {
        field: value
        for name in _SCENARIO
        if (value := getattr(args, field := name.replace("-", "_"))) is not None
    }
    if _names_length(config):
        known["sequence_length"] = config.data.max_length
    hardware = describe_hardware(config.scaling.use_gpu)
    if "gpu_memory_gb" in known and "hardware" not in known:
        known.setdefault("num_gpus", max(1, hardware.device_count))
    facts = describe_model(config.model)
    corpus = read_data(config)
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
    return ScenarioFacts(scenario, facts, _as_told(hardware, scenario), profile)


def _names_length(config: Config) -> bool:
    from rayfin.advisor.candidates import given

    return "data.max_length" in given(config)


def _as_told(machine: Hardware, scenario: Any) -> Hardware:
    """This machine, or the one that the scenario describes."""
    from dataclasses import replace

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
    """What the history holds; only the reference where it has not been begun yet."""
    from rayfin.advisor.knowledge import Knowledge, knowledge_of

    history = begun_history(config)
    if history is None:
        return Knowledge.of([])
    with history:
        return knowledge_of(history)


def _write_picture(answer: Recommendation, path: Path) -> None:
    from rayfin.advisor.picture import picture
    from rayfin.errors import StorageError
    from rayfin.paths import write_text

    try:
        write_text(path, picture(answer))
    except OSError as error:
        raise StorageError(f"--picture: '{path}' can't be written ({error.strerror})") from error


def _print(
    config: Config, place: ScenarioFacts, answer: Recommendation, written: dict[str, Path]
) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    what = f"{config.model.name} on {config.data.path}, {place.hardware.device_name}"
    console.print(Text(what, style="bold"))
    console.print(Text(answer.explanation))
    for choice in answer.choices:
        console.print()
        _print_choice(console, choice)
    console.print()
    console.print(Text(f"The rules say: {answer.rule}", style="dim"))
    for name, path in written.items():
        console.print(f"  {name:9}{path}", markup=False)


def _print_choice(console: Any, choice: Choice) -> None:
    from rich.text import Text

    from rayfin.cli.estimate import show_bytes
    from rayfin.evaluation.quantities import show_seconds

    predicted, fits = choice.predictions, choice.feasibility
    console.print(Text(f"{choice.rank}. {choice.method}", style="bold"))
    settings = " ".join(f"{key}={value}" for key, value in choice.settings.items())
    console.print(Text(f"   {settings}"))
    short, chance = predicted.shortfall, predicted.divergence
    diverges = "" if chance is None else f", diverges {chance:.0%}"
    console.print(
        Text(
            f"   shortfall {short.expected:.2f} ({short.low:.2f} to {short.high:.2f}; 0 is the best"
            f" known, 1 the worst){diverges}"
        )
    )
    memory, seconds = predicted.memory_bytes, predicted.train_seconds
    verdict = "fits" if fits.memory else "may not fit"
    console.print(
        Text(
            f"   memory {show_bytes(memory.expected)} ({show_bytes(memory.low)} to "
            f"{show_bytes(memory.high)}; {verdict}), training "
            f"{show_seconds(seconds.expected)} ({show_seconds(seconds.low)} to "
            f"{show_seconds(seconds.high)})"
        )
    )
    for mark, lines in (("+", choice.reasons), ("-", choice.risks)):
        for line in lines:
            console.print(Text(f"   {mark} {line}"))
    for trial in choice.trials:
        console.print(Text(f"   {trial.likeness:4.0%} {trial.trial_id}: {trial.summary}", "dim"))
    console.print(Text(f"   served as {choice.deployment}", style="dim"))


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number from 1 to 100")
    return int(text)

"""The rules' other branches: when they are offered, and that their commands are ones of rayfin."""

from __future__ import annotations

import shlex

import pytest

from rayfin.advisor.answer import Recommendation
from rayfin.cli import build_parser
from rayfin.cli.settings import split_settings
from rayfin.config import load_config, load_serve_config
from rayfin.library.advice import recommend
from rayfin.training.combination import check_combination
from rayfin.training.strategies import check_scaling

EIGHT = {"model_size_b": 8.0, "rows": 5000, "tokens_per_sample": 300.0}
PLACES = {
    "cpu": {"hardware": "cpu", "model_size_b": 0.5},
    "one": {"hardware": "single_gpu", "gpu_memory_gb": 80.0},
    "small": {"hardware": "single_gpu", "gpu_memory_gb": 12.0},
    "several": {"hardware": "multi_gpu", "num_gpus": 8, "gpu_memory_gb": 80.0},
}


def asked(where: str, lang: str = "en", **more: object) -> Recommendation:
    config = {"history": None}
    return recommend(config, lang=lang, progress=False, **(EIGHT | PLACES[where] | more))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("where", "more", "kinds"),
    [
        ("cpu", {}, ["quantise"]),
        ("one", {}, ["quantise"]),
        ("small", {}, []),  # QLoRA is the choice
        ("one", {"latency": "strict"}, ["quantise", "merge", "distil"]),
        ("one", {"latency_target_ms": 50.0}, ["quantise", "merge", "distil"]),
        ("one", {"priority": "latency"}, ["quantise", "merge", "distil"]),
        ("several", {}, ["quantise", "distribute"]),
        ("several", {"latency": "strict"}, ["distribute", "merge", "distil"]),
    ],
)
def test_each_branch_has_commands_that_are_accepted(
    where: str, more: dict[str, object], kinds: list[str]
) -> None:
    answer = asked(where, **more)
    assert [one.kind for one in answer.alternatives] == kinds
    for one in answer.alternatives:
        assert one.commands
        for command in one.commands:
            accept(command)


def accept(command: str) -> None:
    """Parse a command as `rayfin` does, and check the configuration that it means."""
    program, verb, *words = shlex.split(command)
    assert program == "rayfin"
    args = build_parser().parse_args([verb, *words])
    if verb == "train":
        config = load_config(*split_settings(args.settings))
        check_combination(config)
        check_scaling(config)
    elif verb == "serve":
        load_serve_config(*split_settings(args.settings))
    else:
        assert verb == "recommend" and not args.settings


def test_what_was_only_described_has_a_name_to_replace() -> None:
    (quantise,) = asked("one").alternatives
    assert quantise.commands[0].startswith(
        "rayfin train model.name=YOUR_MODEL data.path=YOUR_DATA.jsonl method.type=qlora "
    )
    assert quantise.commands[1] == "rayfin serve engine.quantization_bit=4"


def test_a_model_that_no_gpu_holds_is_served_over_all_of_them() -> None:
    (last,) = (
        one for one in asked("several", model_size_b=70.0).alternatives if one.kind == "distribute"
    )
    assert last.commands == ["rayfin serve engine.type=vllm engine.vllm.tensor_parallel_size=8"]


def test_where_nothing_fits_there_is_no_alternative() -> None:
    assert asked("small", model_size_b=70.0).alternatives == []

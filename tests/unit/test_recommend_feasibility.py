"""What is recommended can run where it is meant to; if nothing can, it is said what would."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, pairwise

import pytest

from rayfin.advisor import Scenario
from rayfin.advisor.answer import Choice, Recommendation
from rayfin.advisor.candidates import candidates, given_settings, memory_savings
from rayfin.advisor.estimate import estimate
from rayfin.advisor.knowledge import Knowledge
from rayfin.advisor.recommendation import ScenarioFacts, recommend
from rayfin.config import build_config, load_config
from rayfin.errors import ConfigError
from rayfin.hardware import Hardware
from rayfin.methods import METHODS
from rayfin.models import ModelFacts
from rayfin.models.sizes import sizes_of
from rayfin.training.strategies import check_scaling

EMPTY = Knowledge.of([], reference=False)
LAPTOP = Hardware("cpu", "x86_64", 0, 24 * 2**30, 8, 24 * 2**30, True)


SHAPES = {  # width, feed-forward width, layers, heads, key-value heads, vocabulary
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": (8192, 28672, 80, 64, 8, 128256),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
}


def facts_of(name: str) -> ModelFacts:
    width, inner, layers, heads, groups, vocabulary = SHAPES[name]
    sizes = sizes_of(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "vocab_size": vocabulary,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": width < 4096,
            "torch_dtype": "bfloat16",
        }
    )
    assert sizes is not None
    return ModelFacts(name=name, identity=f"{name}@1", **vars(sizes))


def gpus(gib: float, count: int = 1) -> Hardware:
    return Hardware("cuda", "a GPU", count, int(gib * 2**30), 16, 256 * 2**30, True)


def where(name: str, hardware: Hardware) -> ScenarioFacts:
    facts, kind = facts_of(name), {0: "cpu", 1: "single_gpu"}
    scenario = Scenario(
        hardware=kind.get(hardware.device_count, "multi_gpu"),
        data_scale="small",
        latency="normal",
        model_name=name,
        model_size_b=facts.parameters / 1e9,
        dataset_rows=1000,
        num_gpus=hardware.device_count,
        gpu_memory_gb=hardware.device_memory / 2**30 if hardware.device == "cuda" else None,
    )
    return ScenarioFacts(scenario, facts, hardware, {"rows_train": 1000, "digest": "d"})


def asked(name: str, hardware: Hardware, *given: str, k: int = 3) -> Recommendation:
    config = load_config({"model": {"name": "tiny"}, "data": {"path": "pydocs"}}, list(given))
    return recommend(where(name, hardware), EMPTY, k, config=config)


PLACES = [LAPTOP, *(gpus(*many) for many in ((8, 1), (24, 1), (80, 1), (24, 4), (80, 8)))]


@pytest.mark.parametrize("hardware", PLACES, ids=lambda it: f"{it.device_count}x{it.device}")
@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.1-8b", "llama-3.1-70b"])
def test_every_choice_fits_by_an_estimate_of_its_own(name: str, hardware: Hardware) -> None:
    answer = asked(name, hardware, k=8)
    assert (answer.nothing_fits is None) == bool(answer.choices) == bool(answer.points)
    for choice in answer.choices:
        config = build_config(choice.config, {})
        check_scaling(config)
        taken = estimate(config, facts_of(name), hardware)
        assert choice.feasibility.memory is taken.fits is True
        assert config.scaling.num_workers <= max(1, hardware.device_count)
        for setting, value in choice.settings.items():
            section, leaf = setting.split(".")
            assert choice.config[section][leaf] == value
        assert "not fit" not in " ".join(choice.risks)


def test_an_eight_billion_model_is_made_to_fit_a_12_gib_gpu() -> None:
    """Fewer samples at once, scored ones too, as many in a step, recomputed, over 4-bit weights."""
    roomy = asked("llama-3.1-8b", gpus(640)).choices[0].config["train"]
    answer = asked("llama-3.1-8b", gpus(12))
    train = answer.choices[0].config["train"]
    assert answer.choices[0].feasibility.memory is True
    assert answer.choices[0].method == answer.choices[0].config["method"]["type"] == "qlora"
    assert answer.choices[0].config["method"]["quantization_bit"] == 4
    assert train["gradient_checkpointing"] is True
    assert train["per_device_eval_batch_size"] < 16
    batches = [
        it["per_device_train_batch_size"] * it["gradient_accumulation_steps"]
        for it in (train, roomy)
    ]
    assert batches[0] == batches[1] == 16


def test_what_was_given_is_not_made_smaller() -> None:
    given = ("train.per_device_train_batch_size=4", "train.per_device_eval_batch_size=8")
    for choice in asked("llama-3.1-8b", gpus(24), *given).choices:
        assert choice.config["train"]["per_device_train_batch_size"] == 4
        assert choice.config["train"]["per_device_eval_batch_size"] == 8


@pytest.mark.parametrize(
    ("name", "hardware", "given", "said"),
    [
        ("llama-3.1-70b", gpus(24), (), ["a GPU of ", "--num-gpus ", "a model of up to "]),
        ("llama-3.1-70b", LAPTOP, (), ["a machine with ", "a model of up to "]),
        ("llama-3.1-8b", gpus(24), ("method.type=full",), ["without method.type (lora"]),
        (
            "llama-3.1-8b",
            gpus(24),
            ("train.per_device_train_batch_size=512",),
            ["without train.per_device_train_batch_size (lora does)"],
        ),
        ("llama-3.1-8b", gpus(4), (), ["a GPU of ", "a model of up to "]),
    ],
)
def test_where_nothing_fits_it_says_what_would(
    name: str, hardware: Hardware, given: tuple[str, ...], said: list[str]
) -> None:
    answer = asked(name, hardware, *given)
    assert answer.choices == [] and answer.nothing_fits is not None
    assert answer.nothing_fits.startswith(f"nothing fits: {name} needs ")
    assert "\n" not in answer.nothing_fits
    for remedy in said:
        assert remedy in answer.nothing_fits


def test_the_gpu_that_is_named_is_one_that_it_fits() -> None:
    said = asked("llama-3.1-8b", gpus(4)).nothing_fits or ""
    gib = int(said.split("a GPU of ")[1].split()[0])
    assert asked("llama-3.1-8b", gpus(gib)).choices


def test_the_length_that_is_named_is_short_enough() -> None:
    where_long = where("llama-3.1-8b", gpus(24))
    long = replace(where_long, scenario=replace(where_long.scenario, sequence_length=18_048))
    said = recommend(long, EMPTY).nothing_fits or ""
    assert "what would: data.max_length=" in said
    length = int(said.split("data.max_length=")[1].split()[0])
    assert 1024 <= length < 18_048
    assert recommend(long, EMPTY, config=build_config({}, {"data.max_length": length})).choices


def test_the_number_of_gpus_that_is_named_is_enough() -> None:
    said = asked("llama-3.1-70b", gpus(24)).nothing_fits or ""
    count = int(said.split("--num-gpus ")[1].split()[0])
    answer = asked("llama-3.1-70b", gpus(24, count))
    assert answer.choices[0].feasibility.memory is True
    assert answer.choices[0].config["scaling"]["num_workers"] == count


def test_weights_that_are_counted_decide_though_the_interval_is_wide() -> None:
    """70 billion parameters in 4 bits are 35 GB, and no doubt about the rest makes them less."""
    config = build_config({"method": {"type": "qlora"}}, {})
    found = estimate(config, facts_of("llama-3.1-70b"), gpus(24), tokens=64)
    assert 24 * 2**30 < found.parts.weights <= found.memory.low < found.memory.high
    assert found.fits is False


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_samples_are_no_longer_than_the_models_positions(method: str) -> None:
    short = where("smollm2-135m", gpus(80))
    short = replace(short, facts=replace(short.facts, max_position_embeddings=2048))
    config = build_config({"data": {"path": "pydocs"}}, {"method.type": method})
    for choice in recommend(short, EMPTY, config=config).choices:
        tokens = choice.config["method"].get("num_virtual_tokens") or 0
        assert choice.config["data"]["max_length"] + tokens <= 2048
        assert choice.settings["data.max_length"] == choice.config["data"]["max_length"]
    with pytest.raises(ConfigError, match="is more than the 2048 positions"):
        recommend(short, EMPTY, config=build_config({}, {"data.max_length": 4096}))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("scaling.num_workers=4",), "needs as many GPUs, and there is 1"),
        (("scaling.num_workers=3", "train.per_device_train_batch_size=8"), "can't share the"),
        (
            ("scaling.strategy=fsdp", "method.type=lora", "method.quantization_bit=8"),
            "8-bit weights keep their scales",
        ),
    ],
)
def test_what_can_not_run_there_is_refused(given: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=f"leave nothing that can be trained: .*{said}"):
        asked("smollm2-135m", gpus(24), *given)


def test_what_may_not_fit_is_no_choice_even_where_there_is_nothing_else() -> None:
    """8 billion parameters on a laptop: the interval of the estimate holds what there is."""
    small = replace(LAPTOP, device_memory=22 * 2**30, host_memory=22 * 2**30)
    answer = asked("llama-3.1-8b", small)
    assert answer.choices == []
    low, high = map(float, re.findall(r"\((.+?) to (.+?)\)", answer.nothing_fits or "")[0])
    assert low < 22 < high


def test_lora_over_four_bits_is_called_qlora_where_lora_was_given() -> None:
    for choice in asked("llama-3.1-8b", gpus(12), "method.type=lora").choices:
        assert choice.method == "qlora"
        assert choice.config["method"]["type"] == "lora"
        assert choice.settings["method.quantization_bit"] == 4


SIZES = (12, 16, 24, 40, 48, 80)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_more_memory_never_answers_worse(name: str, count: int) -> None:
    """What fits a GPU is as good on a larger one, and takes no longer there."""
    firsts = [asked(name, gpus(gib, count)).choices[:1] for gib in SIZES]
    fitting = [first[0] for first in firsts if first]
    assert firsts == [[]] * (len(SIZES) - len(fitting)) + [[first] for first in fitting]
    assert_no_worse(fitting)


@pytest.mark.parametrize("gib", [24, 80])
@pytest.mark.parametrize("name", SHAPES)
def test_more_gpus_never_answer_worse(name: str, gib: int) -> None:
    firsts = [asked(name, gpus(gib, count)).choices[:1] for count in (1, 2, 4, 8)]
    fitting = [first[0] for first in firsts if first]
    assert firsts == [[]] * (len(firsts) - len(fitting)) + [[first] for first in fitting]
    assert_no_worse(fitting)


def assert_no_worse(choices: Sequence[Choice]) -> None:
    for small, large in pairwise(choices):
        predicted = [one.predictions for one in (small, large)]
        assert predicted[1].shortfall.expected <= predicted[0].shortfall.expected + 1e-9
        # LoRA in the place of QLoRA may take its batch in more parts, which costs 0.3 % here.
        assert predicted[1].train_seconds.expected <= predicted[0].train_seconds.expected * 1.01
        assert large.config["data"]["max_length"] == small.config["data"]["max_length"]


def test_what_the_rules_do_not_name_is_no_substitute_where_theirs_does_not_fit() -> None:
    """On 45.5 GiB 70 billion parameters fit with IA3's few numbers, and not with an adapter."""
    answer = asked("llama-3.1-70b", gpus(45.5))
    assert answer.choices == [] and "(qlora" in (answer.nothing_fits or "")
    assert asked("llama-3.1-70b", gpus(45.5), "method.type=ia3").choices[0].method == "ia3"


def test_choices_differ_in_rate_or_method() -> None:
    for name in SHAPES:
        for hardware in (gpus(80), gpus(80, 8)):
            found = asked(name, hardware, k=3).choices
            kinds = {
                (one.method.replace("qlora", "lora"), one.config["train"]["learning_rate"])
                for one in found
            }
            assert len(kinds) == 3
    given = ("method.type=lora", "train.learning_rate=1e-4")
    found = asked("llama-3.1-8b", gpus(80), *given, k=3).choices
    assert len({one.config["method"]["r"] for one in found}) == 3  # nothing else is left


def test_what_needs_whole_weights_is_not_offered_four_bits() -> None:
    """PiSSA takes a part of the base's weights; LoRA's answer for the same machine is quantised."""
    pissa = ("method.type=lora", "method.init_lora_weights=pissa")
    for given, bits in (
        (pissa, {None}),
        (pissa[:1], {None, 4}),
        ((*pissa[:1], "method.modules_to_save=[lm_head]"), {None, 4}),
        ((*pissa[:1], "method.modules_to_save=[lm_head,self_attn.q_proj]"), {None}),
        ((*pissa[:1], "method.modules_to_save=[model.layers.1.mlp.up_proj]"), {None}),
    ):
        base = load_config({"model": {"name": "tiny"}, "data": {"path": "pydocs"}}, list(given))
        place = where("llama-3.1-8b", gpus(80))
        offered = [
            changes.get("method.quantization_bit")
            for option in candidates(base, place)
            for changes in chain(*memory_savings(option, given_settings(base), place.facts))
        ]
        assert set(offered) == bits


@pytest.mark.parametrize(("saved", "bits"), [("lm_head", {None, 4}), ("self_attn.q_proj", {None})])
def test_a_linear_module_to_train_whole_leaves_no_quantised_candidate(
    saved: str, bits: set[int | None]
) -> None:
    model, known = {"name": "tiny"}, where("llama-3.1-70b", gpus(24))

    def options(kind: str) -> set[int | None]:
        given = [f"method.type={kind}", f"method.modules_to_save=[{saved}]"]
        base = load_config({"model": model, "data": {"path": "pydocs"}}, given)
        return {
            changes.get("method.quantization_bit")
            for option in candidates(base, known)
            for changes in chain(*memory_savings(option, {}, known.facts))
        }

    assert options("dora") == bits
    if 4 not in bits:
        with pytest.raises(ConfigError, match="have no gradient in 4 bits; use"):
            options("qlora")

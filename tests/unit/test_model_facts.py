"""Facts by formula are those of the model itself, and come without torch or transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rayfin.config.schema import ModelConfig
from rayfin.errors import ModelError
from rayfin.models import ModelFacts, describe_model, facts, load_base, write_tiny
from rayfin.models.sizes import FORMULAS, sizes_of

SMALL: dict[str, Any] = {
    "vocab_size": 72,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {"vocab_size": 72, "n_embd": 32, "n_layer": 3, "n_head": 4} | {
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALL_BIASES = {"attention_bias": True, "mlp_bias": True}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", SMALL | TIED),
    "llama, untied": ("llama", SMALL | UNTIED),
    "llama, a key head each": ("llama", SMALL | {"num_key_value_heads": 4}),
    "llama, one key head": ("llama", SMALL | {"num_key_value_heads": 1}),
    "llama, wide heads": ("llama", SMALL | {"head_dim": 24}),
    "llama, biases": ("llama", SMALL | ALL_BIASES),
    "mistral": ("mistral", SMALL),
    "qwen2, biases": ("qwen2", SMALL | TIED),
    "qwen3": ("qwen3", SMALL | {"head_dim": 16}),
    "qwen3, biases": ("qwen3", SMALL | {"head_dim": 16, "attention_bias": True}),
    "smollm3": ("smollm3", SMALL | ALL_BIASES),
    "gemma": ("gemma", SMALL | {"head_dim": 16}),
    "gemma2": ("gemma2", SMALL | {"head_dim": 16, "attention_bias": True}),
    "gemma3_text": ("gemma3_text", SMALL | UNTIED | {"head_dim": 16}),
    "granite": ("granite", SMALL | ALL_BIASES),
    "olmo2": ("olmo2", SMALL | {"attention_bias": True}),
    "phi3": ("phi3", SMALL),
    "gpt2": ("gpt2", GPT2),
    "gpt2, untied": ("gpt2", GPT2 | UNTIED | {"n_inner": 40}),
}
# What every config.json of that type has; the rest is left to the library's defaults.
ALWAYS = {"model_type", *SMALL, *GPT2}


def of_skeleton(directory: Path) -> ModelFacts:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "sizes_of", lambda settings: None)
        return describe_model(ModelConfig(name=str(directory)))


def by_formula(directory: Path) -> ModelFacts:
    def refuse(config: ModelConfig) -> None:
        raise AssertionError("the skeleton was built")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "meta_model", refuse)
        return describe_model(ModelConfig(name=str(directory)))


def write(directory: Path, kind: str, values: dict[str, Any]) -> Path:
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**values))
    model.save_pretrained(directory)
    return directory


def rewrite(directory: Path, **changes: Any) -> dict[str, Any]:
    """Changes config.json; the settings that are now its own."""
    path = directory / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(settings))
    return settings


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny(directory)
    return directory


def test_every_formula_is_tested() -> None:
    assert {kind for kind, _ in CHECKPOINTS.values()} == set(FORMULAS)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_formula_gives_what_the_model_has(name: str, tmp_path: Path) -> None:
    directory = write(tmp_path, *CHECKPOINTS[name])
    assert by_formula(directory) == of_skeleton(directory)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_config_json_leaves_out_is_the_default(name: str, tmp_path: Path) -> None:
    kind, values = CHECKPOINTS[name]
    directory = write(tmp_path, kind, SMALL | {"head_dim": 16} if kind != "gpt2" else GPT2)
    settings = json.loads((directory / "config.json").read_text())
    needed = ALWAYS | ({"head_dim"} if "head_dim" in values else set())
    bare = {key: value for key, value in settings.items() if key in needed}
    (directory / "config.json").write_text(json.dumps(bare))
    assert by_formula(directory) == of_skeleton(directory)
    assert by_formula(directory).dtype == "float32"


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("left_out", ["num_key_value_heads", "head_dim"])
def test_a_default_that_is_the_library_s_is_left_to_it(
    kind: str, left_out: str, tmp_path: Path
) -> None:
    values = {"model_type": kind} | (GPT2 if kind == "gpt2" else SMALL | {"head_dim": 16})
    values.pop(left_out, None)
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = sizes_of(values)
    assert found in (None, facts._sizes_of_meta_model(facts.meta_model(_at(tmp_path))))
    # Those of the oldest checkpoints are not left to it.
    assert found is not None or kind not in ("gpt2", "llama")


def _at(directory: Path) -> ModelConfig:
    return ModelConfig(name=str(directory))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_stored_type(tiny: Path, tmp_path: Path, key: str, dtype: str) -> None:
    settings = json.loads((tiny / "config.json").read_text())
    del settings["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(settings | {key: dtype}))
    found = sizes_of(settings | {key: dtype})
    assert found is not None and found.dtype == dtype
    assert found == facts._sizes_of_meta_model(facts.meta_model(_at(tmp_path)))


def test_the_bundled_tiny_model() -> None:
    formula = describe_model(ModelConfig(name="tiny"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "sizes_of", lambda settings: None)
        assert describe_model(ModelConfig(name="tiny")) == formula
    assert formula.parameters == 90_688


@pytest.mark.smollm2
def test_the_bundled_smollm2() -> None:
    formula = describe_model(ModelConfig())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "sizes_of", lambda settings: None)
        assert describe_model(ModelConfig()) == formula
    assert formula.parameters == 134_515_008


def test_packed_weights_count_as_unpacked(tiny: Path, tmp_path: Path) -> None:
    load_base(_at(tiny), 4, "cpu").save_pretrained(tmp_path)
    assert by_formula(tmp_path) == of_skeleton(tmp_path)
    assert by_formula(tmp_path).parameters == by_formula(tiny).parameters


# As on the hub: each model's own config.json, and the number of parameters that its page names.
PUBLISHED = {
    "Llama-2-7b": (
        6_738_415_616,
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096}
        | {"intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096}
        | {"tie_word_embeddings": False, "torch_dtype": "float16"},
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64}
        | {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": True},
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336}
        | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"vocab_size": 32000, "max_position_embeddings": 32768, "tie_word_embeddings": False},
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864}
        | {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
        | {"vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True},
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128}
        | {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
        | {"vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": True},
    ),
    "gemma-2b": (
        2_506_172_416,
        {"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "head_dim": 256}
        | {"num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1}
        | {"vocab_size": 256000, "max_position_embeddings": 8192},
    ),
    "gpt2": (
        124_439_808,
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 768, "n_layer": 12}
        | {"n_head": 12, "n_positions": 1024, "n_ctx": 1024, "vocab_size": 50257},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name: str) -> None:
    parameters, settings = PUBLISHED[name]
    found = sizes_of(settings)
    assert found is not None
    assert found.parameters == parameters


UNUSUAL = [
    {"model_type": "opt"},
    {"model_type": None},
    {"model_type": ["llama"]},
    {"architectures": ["SomethingElse"]},
    {"text_config": {}},
    {"dtype": "int8"},
    {"head_dim": None},
    {"hidden_size": "64"},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": True},
    {"num_attention_heads": 3},
    {"num_key_value_heads": 3},
    {"tie_word_embeddings": None},
    {"attention_bias": 1},
    {"max_position_embeddings": None},
]


@pytest.mark.parametrize("changes", UNUSUAL, ids=str)
def test_the_unusual_is_left_to_the_library(tiny: Path, changes: dict[str, Any]) -> None:
    settings = json.loads((tiny / "config.json").read_text())
    assert sizes_of(settings) is not None
    assert sizes_of(settings | changes) is None


@pytest.mark.parametrize(
    "changes", [{"add_cross_attention": True}, {"num_attention_heads": 2}, {"n_head": 5}], ids=str
)
def test_an_unusual_gpt2_is_left_to_the_library(changes: dict[str, Any]) -> None:
    settings = {"model_type": "gpt2"} | GPT2
    assert sizes_of(settings) is not None
    assert sizes_of(settings | changes) is None


def test_an_architecture_without_formula(tmp_path: Path) -> None:
    values = {"vocab_size": 72, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    write(tmp_path, "opt", values | {"num_attention_heads": 4, "word_embed_proj_dim": 32})
    found = describe_model(_at(tmp_path))
    assert (found.architecture, found.intermediate_size) == ("OPTForCausalLM", 48)
    assert found.linear_parameters == 2 * (4 * 32 * 32 + 2 * 32 * 48)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "no causal language model"),
        ({"model_type": "mine"}, "'mine'.*never run"),
        ({"num_attention_heads": 3}, "no model can be built"),
    ],
)
def test_errors_are_still_those_of_the_library(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    write_tiny(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(ModelError, match=said) as caught:
        describe_model(_at(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_noticed(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="damaged"):
        describe_model(_at(tmp_path))


def test_no_heavy_library_is_loaded(tiny: Path) -> None:
    code = (
        "import sys\n"
        "from rayfin.config.schema import ModelConfig\n"
        "from rayfin.models import describe_model\n"
        "print(describe_model(ModelConfig(name=sys.argv[1])).parameters)\n"
        "print({'torch', 'transformers', 'peft', 'ray'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tiny)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.stdout.splitlines() == ["90688", "set()"]

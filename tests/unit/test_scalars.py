"""A setting of text gets what was typed, and a number what a person reads there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayfin.config import dump_yaml, load_config, load_serve_config, parse_yaml
from rayfin.errors import ConfigError
from rayfin.methods import METHODS

LOOK_LIKE_SOMETHING_ELSE = (
    "51e8870", "1e5", "0123", "007", "1.10", "0o17", "0x1f", "0b1", "1_0", ".inf", ".nan",
    "yes", "no", "on", "off", "y", "N", "true", "False",
    "2024-01-01", "2024-01-01T10:00:00Z", "12:30", "1:2:3", "=", "!", "C:\\models",
)  # fmt: skip
NOT_YAML = ("a: b", "my file #2", "[a]", "{a}", "@x", "*x", "&x", "%x", "a: [", "- a", "`x`", "> a")


@pytest.mark.parametrize("text", [*LOOK_LIKE_SOMETHING_ELSE, *NOT_YAML])
def test_an_override_of_text_is_what_was_typed(text: str) -> None:
    config = load_config(None, [f"model.revision={text}", f"data.path={text}", f"history={text}"])
    assert (config.model.revision, config.data.path, config.history) == (text, text, text)


def test_python_s_own_values_are_what_a_file_would_say() -> None:
    rates = np.array([1e-3, 2e-3])
    axes = {"method.r": list(2 ** np.arange(2, 5)), "method.lora_alpha": range(4, 7)}
    config = load_config(
        {
            "data": {"path": Path("a") / "b.jsonl", "ignore_columns": np.array(["x"])},
            "train": {"max_steps": np.int64(3), "packing": np.bool_(True)},
            "sweep": {"parameters": {**axes, "train.learning_rate": rates}},
            "storage": Path("runs"),
        }
    )
    assert (config.data.path, config.data.ignore_columns) == ("a/b.jsonl", ("x",))
    assert (config.train.max_steps, config.train.packing, config.storage) == (3, True, "runs")
    parameters = config.sweep.parameters
    assert parameters["method.r"] == (4, 8, 16) and parameters["method.lora_alpha"] == (4, 5, 6)
    assert load_config(parse_yaml(dump_yaml(config), "saved")) == load_config(config)
    assert load_serve_config({"storage": Path("runs")}).storage == "runs"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"model.name": "tiny"}, "model.name: unknown key; write {'model': {'name': …}}"),
        (
            {"sweep.parameters.method.r": [4]},
            "sweep.parameters.method.r: unknown key; "
            "write {'sweep': {'parameters': {'method.r': …}}}",
        ),
        ({"storage.x": 1}, "storage.x: unknown key (did you mean 'storage'?)"),
        (42, "configuration 42 is of type int; give a Config, a mapping of sections"),
        ([1], "configuration [1] is of type list; give a Config, a mapping of sections"),
    ],
)
def test_what_python_code_gets_wrong_is_said_in_a_line(source: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    assert str(caught.value).startswith(said)


def in_file(folder: Path, text: str, *overrides: str) -> Any:
    path = folder / "my.yaml"
    path.write_text(text)
    return load_config(path, overrides)


@pytest.mark.parametrize("text", [t for t in LOOK_LIKE_SOMETHING_ELSE if t not in ("=", "!")])
def test_a_file_says_text_without_quotes_too(tmp_path: Path, text: str) -> None:
    config = in_file(
        tmp_path,
        f"model: {{name: {text}, revision: {text}}}\n"
        f"sweep:\n  parameters:\n    model.revision: [{text}, main]\n"
        f"    method.target_modules: [all-linear, [{text}]]\n",
    )
    assert (config.model.name, config.model.revision) == (text, text)
    assert config.sweep.parameters["model.revision"] == (text, "main")
    assert config.sweep.parameters["method.target_modules"] == ("all-linear", [text])
    assert load_config(parse_yaml(dump_yaml(config), "saved")) == config


def test_names_of_nothing_are_nothing_only_where_nothing_is_allowed(tmp_path: Path) -> None:
    for text in ("null", "Null", "~", ""):
        assert load_config(None, [f"model.revision={text}"]).model.revision is None
        assert in_file(tmp_path, f"model: {{revision: {text}}}").model.revision is None
        assert in_file(tmp_path, f"publish: {text}\n", "publish.name=x").publish.name == "x"
    assert load_config(None, ["model.name=null"]).model.name == "null"
    assert in_file(tmp_path, "model: {name: ~}").model.name == "~"
    assert load_config(None, ["model.revision='null'"]).model.revision == "null"
    assert in_file(tmp_path, "model: {revision: 'null'}").model.revision == "null"


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("'1e-4'", 1e-4), ("2e5", 2e5), (".5", 0.5), ("1", 1.0)],
)
def test_a_rate_is_a_number_however_it_is_written(tmp_path: Path, text: str, number: float) -> None:
    axis = "sweep.parameters.train.learning_rate"
    for config in (
        load_config(None, [f"train.learning_rate={text}", f"{axis}=[{text}]"]),
        in_file(
            tmp_path,
            f"train: {{learning_rate: {text}}}\n"
            f"sweep: {{parameters: {{train.learning_rate: [{text}]}}}}\n",
        ),
    ):
        assert config.train.learning_rate == number
        assert config.sweep.parameters["train.learning_rate"] == (number,)


def test_digits_are_read_as_people_read_them(tmp_path: Path) -> None:
    """YAML 1.1 would have 010 be 8, and 1:30 be 90."""
    assert load_config(None, ["train.max_steps=010"]).train.max_steps == 10
    assert in_file(tmp_path, "train: {max_steps: 010}").train.max_steps == 10
    assert load_config(None, ["train.max_steps=1e2"]).train.max_steps == 100
    with pytest.raises(ConfigError, match=r"train\.max_steps: '1:30' is not allowed"):
        load_config(None, ["train.max_steps=1:30"])
    with pytest.raises(ConfigError, match=r"train\.learning_rate: Infinity is not allowed"):
        load_config(None, ["train.learning_rate=51e8870"])


def test_truth_values_keep_their_words(tmp_path: Path) -> None:
    for text, truth in {"yes": True, "off": False, "True": True, "no": False}.items():
        assert load_config(None, [f"train.packing={text}"]).train.packing is truth
        assert in_file(tmp_path, f"train: {{packing: {text}}}").train.packing is truth
        axis = load_config(None, [f"sweep.parameters.train.packing=[{text}]"])
        assert axis.sweep.parameters["train.packing"] == (truth,)
    assert load_config(None, ["scaling.use_gpu=auto"]).scaling.use_gpu == "auto"


def test_keys_of_a_service_are_text(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("api: {admin_token: 0123, api_keys: [{key: 1e5, adapters: [no]}]}\n")
    config = load_serve_config(path, ["engine.type=vllm", "engine.vllm={a: 1e-1, b: no, c: '7'}"])
    assert config.api.admin_token == "0123"
    assert (config.api.api_keys[0].key, config.api.api_keys[0].adapters) == ("1e5", ("no",))
    assert config.engine.vllm == {"a": 0.1, "b": False, "c": "7"}


def test_a_key_that_is_there_twice_and_a_value_in_itself_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'max_steps' is there twice"):
        in_file(tmp_path, "train:\n  max_steps: 5\n  max_steps: 50\n")
    with pytest.raises(ConfigError, match="a value contains itself"):
        in_file(tmp_path, "train: &t {max_steps: *t}\n")
    merged = "a: &a {max_steps: 5, seed: 1}\ntrain: {<<: *a, max_steps: 7}\n"
    with pytest.raises(ConfigError, match=r"^a: unknown key"):  # no other complaint
        in_file(tmp_path, merged)


def test_another_method_over_a_file_keeps_what_it_has_and_names_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = "method: {type: lora, r: 16, lora_alpha: 32, quantization_bit: 4}\n"
    with caplog.at_level(logging.WARNING):
        dora = in_file(tmp_path, file, "method.type=dora").method
        assert (dora.type, dora.r, dora.lora_alpha, dora.quantization_bit) == ("dora", 16, 32, 4)
        assert not caplog.messages
        ia3 = in_file(tmp_path, file, "method.type=ia3").method
    assert (ia3.type, ia3.quantization_bit) == ("ia3", 4)
    (said,) = caplog.messages
    assert said == (
        "method.type=ia3 has no such setting: method.r=16, method.lora_alpha=32; left out"
    )
    with pytest.raises(ConfigError, match=r"method\.rnk: unknown key"):
        in_file(tmp_path, "method: {type: lora, rnk: 16}", "method.type=ia3")


@pytest.mark.parametrize("before", METHODS)
def test_another_method_over_a_saved_file_has_its_own_defaults(
    before: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only what somebody wrote counts as written."""
    saved = dump_yaml(load_config(None, [f"method.type={before}"]))
    with caplog.at_level(logging.WARNING):
        for after in METHODS:
            plain = load_config(None, [f"method.type={after}"])
            assert in_file(tmp_path, saved, f"method.type={after}") == plain
    assert not caplog.messages
    written = load_config(None, ["method.type=lora", "method.quantization_bit=4", "method.r=3"])
    dora = in_file(tmp_path, dump_yaml(written), "method.type=dora").method
    assert (dora.quantization_bit, getattr(dora, "r", None)) == (4, 3)


def test_without_a_type_the_settings_are_those_of_the_first_method_swept() -> None:
    """And not of the default, which may be none of the trials'."""
    axis = "sweep.parameters.method.type=[lora, p_tuning]"
    method = load_config(None, [axis, "method.quantization_bit=null"]).method
    assert (method.type, method.quantization_bit) == ("lora", None)
    assert load_config(None, [axis]).method.type == "lora"
    with pytest.raises(ConfigError, match=r"as an axis, .*method\.num_virtual_tokens=\[5\]"):
        load_config(None, [axis, "method.num_virtual_tokens=5"])


def test_what_a_whole_section_takes_the_place_of_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = "train: {learning_rate: 1e-4, seed: 3}\nsweep: {parameters: {method.r: [4]}}\n"
    with caplog.at_level(logging.WARNING):
        in_file(tmp_path, file, "train.seed=1", "sweep.parameters.train.seed=[1]", "storage=x")
        in_file(tmp_path, file, "train={seed: 1, learning_rate: 1e-3}", "publish={name: x}")
        assert not caplog.messages
        config = in_file(tmp_path, file, "train={seed: 1}", "sweep.parameters={train.seed: [1]}")
    assert config.train.learning_rate == load_config().train.learning_rate
    assert caplog.messages == [
        "train={…} is the whole section: left out learning_rate",
        "sweep.parameters={…} is the whole section: left out method.r",
    ]


# --- names of modules and their values ----------------------------------------------------------


def test_one_modules_rank_is_set_by_its_dotted_name(tmp_path: Path) -> None:
    own = ["method.rank_pattern.layers.0.mlp.up_proj=16", "method.rank_pattern.q_proj=3"]
    written = in_file(tmp_path, "method: {type: lora, rank_pattern: {q_proj: 2, v_proj: 4}}", *own)
    pattern = written.method.model_dump()["rank_pattern"]
    assert pattern == {"q_proj": 3, "v_proj": 4, "layers.0.mlp.up_proj": 16}


def test_a_space_that_a_mapping_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match=r"put a space after the colon, as in {q_proj: 16}$"):
        load_config(None, ["method.type=lora", "method.rank_pattern={q_proj:16}"])


def test_choices_are_named_as_they_are_written() -> None:
    with pytest.raises(ConfigError, match=r"it should be true, 'gaussian', "):
        load_config(None, ["method.type=lora", "method.init_lora_weights=pisa"])

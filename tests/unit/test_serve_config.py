"""A deployment's configuration, before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from rayfin.config import load_serve_config
from rayfin.config.serving import ON_GPU, EngineConfig
from rayfin.errors import ConfigError
from rayfin.serving import proxy

ROOT = Path(__file__).parents[2]


def test_relative_paths_are_taken_from_the_root_that_is_given(tmp_path: Path) -> None:
    settings = ["storage=./runs", "api.request_log=log/asked.jsonl", "history=sqlite:///h.sqlite"]
    config = load_serve_config(None, settings).anchored(tmp_path)
    assert config.storage == str(tmp_path / "runs")
    assert config.api.request_log == str(tmp_path / "log/asked.jsonl")
    assert config.history == f"sqlite:///{tmp_path}/h.sqlite"
    assert config.anchored(Path("/elsewhere")) == config, "absolute ones stay as they are"


def test_what_is_no_path_stays_as_it_is(tmp_path: Path) -> None:
    url = "postgresql+psycopg://team@db/rayfin"
    config = load_serve_config(None, ["storage=s3://bucket/runs", f"history={url}"])
    anchored = config.anchored(tmp_path)
    assert (anchored.storage, anchored.history) == ("s3://bucket/runs", url)
    assert anchored.api.request_log is None
    for nothing in ("sqlite:///", "sqlite:///:memory:"):  # refused by whoever opens it
        assert load_serve_config({"history": nothing}).anchored(tmp_path).history == nothing
    home = load_serve_config(None, ["storage=~/runs"]).anchored(tmp_path)
    assert home.storage == str(Path.home() / "runs")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("tiny", "tiny"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("{here}/my model", "my-model"),
        ("{here}/registry/support/3", "support"),
        ("{here}/models--Qwen--Qwen2.5-0.5B/snapshots/0a1b2c", "Qwen/Qwen2.5-0.5B"),
        ("/mnt/elsewhere/llama", "llama"),
        ("./models/llama/", "llama"),
        ("~/llama", "llama"),
    ],
)
def test_a_directory_is_served_under_its_name_and_never_its_path(
    tmp_path: Path, model: str, name: str
) -> None:
    place = model.format(here=tmp_path)
    if place != model:
        Path(place).mkdir(parents=True)
    config = load_serve_config({"model": {"name": place}})
    assert config.served_name == name
    assert config.named().deployment.served_model_name == name
    told = load_serve_config({"model": {"name": place}}, ["deployment.served_model_name=mine"])
    assert told.served_name == told.named().served_name == "mine"


@pytest.mark.parametrize("name", ["", "two words", "a\nb", "\x1b[31m", "x" * 300])
def test_a_served_name_that_no_client_could_send_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="served_model_name"):
        load_serve_config({"deployment": {"served_model_name": name}})


@pytest.mark.parametrize(
    "file", ["serve/local.yaml", "serve/gpu.yaml", "cluster/kuberay/serve.yaml"]
)
def test_files_for_serve_start_its_proxies_with_rayfins_part(file: str) -> None:
    written = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
    if "spec" in written:
        written = yaml.safe_load(written["spec"]["serveConfigV2"])
    assert written["controller_options"] == {"runtime_env": {"env_vars": proxy.ENVIRONMENT}}
    module, _, function = next(iter(proxy.ENVIRONMENT.values())).partition(":")
    assert module == proxy.__name__ and callable(getattr(proxy, function))


@pytest.mark.parametrize("kind", ["transformers", "vllm"])
def test_what_is_said_of_defaults_on_a_gpu_is_what_they_are(kind: str) -> None:
    engine = load_serve_config({}, [f"engine.type={kind}"]).engine
    assert engine.fitted(0.0, None) == engine, "those of the CPU are as they are listed"
    fitted = engine.fitted(1.0, None)
    for name, value in ON_GPU[kind].items():
        assert getattr(fitted, name) == value
        said = EngineConfig.model_fields[name].description or ""
        words = rf"\b{value} in vLLM on" if kind == "vllm" else rf"\b{value} on a GPU"
        assert re.search(words, " ".join(said.split())), (
            f"--settings says nothing of {name}={value}"
        )


@pytest.mark.parametrize("gpus", [0.0, 1.0])
def test_settings_that_were_written_win_over_the_devices(gpus: float) -> None:
    settings = ["engine.max_rows=16", "engine.max_length=2048", "engine.max_queue=128"]
    engine = load_serve_config({"engine": {"prefill_chunk": 256}}, settings).engine
    fitted = engine.fitted(gpus, 1024)
    assert (fitted.max_rows, fitted.max_length) == (16, 2048), "which is refused, and not lowered"
    assert (fitted.max_queue, fitted.prefill_chunk) == (128, 256)


def test_what_was_not_written_is_no_longer_than_the_model_takes() -> None:
    engine = load_serve_config({}).engine
    assert engine.fitted(0.0, 512).max_length == 512
    assert engine.fitted(1.0, 131072).max_length == 2048


def test_the_guide_has_the_limits_of_each_device() -> None:
    guide = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    for name in sorted({*ON_GPU["transformers"], *ON_GPU["vllm"]}):
        cpu = EngineConfig.model_fields[name].default
        row = [cpu, *(ON_GPU[kind].get(name, cpu) for kind in ("transformers", "vllm"))]
        assert f"| `engine.{name}` | {' | '.join(map(str, row))} |" in guide


def test_the_guide_s_api_keys_are_read_as_it_says() -> None:
    guide = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"## API keys\n\n```yaml\n(.*?)```", guide, re.S)
    api = load_serve_config(yaml.safe_load(block)).api
    support, every = api.api_keys
    assert (support.key, support.adapters) == ("for-support", ("support",))
    assert (support.requests_per_minute, support.max_concurrent_requests) == (60, 4)
    assert (every.key, every.adapters) == ("for-all", None)
    assert load_serve_config({}, ["api.api_keys=[{key: for-all}]"]).api.api_keys == (every,)


# Serve's own schemas, on import.
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field` is deprecated")
def test_a_storage_that_was_not_there_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from rayfin.serving import deployment

    missing = tmp_path / "mistyped"
    config = load_serve_config({}, ["model.name=tiny", f"storage={missing}"])
    deployment.planned(config)
    assert f"storage={missing} was not there" in caplog.text
    caplog.clear()
    deployment.planned(config)
    assert caplog.text == ""

"""A deployment's configuration, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rayfin.config import load_serve_config
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

"""A deployment's configuration, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from rayfin.config import load_serve_config


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

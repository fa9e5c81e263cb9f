"""A hub that does not answer is given up within seconds, and what was downloaded before is used."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import pytest

from rayfin import hub
from rayfin.config.data import DataConfig
from rayfin.config.schema import ModelConfig
from rayfin.data import load_corpus
from rayfin.errors import DataError, ModelError
from rayfin.models import locate

REMEDIES = ("local directory", "HF_ENDPOINT", "HF_HOME")


@pytest.fixture(autouse=True)
def _online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(hub, "_failure", None)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Whom a hub that hangs up at once has been called by."""
    import datasets.config

    found: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", here)

        def hang_up() -> None:
            while True:
                connection, caller = server.accept()
                connection.close()
                if over.is_set():
                    return
                found.append(caller)

        over = Event()
        thread = Thread(target=hang_up)
        thread.start()
        yield found
        over.set()
        socket.create_connection(server.getsockname()).close()
        thread.join()


def refused_model() -> str:
    with pytest.raises(ModelError) as caught:
        locate(ModelConfig(name="someone/something"))
    return str(caught.value)


def refused_data() -> str:
    with pytest.raises(DataError) as caught:
        load_corpus(DataConfig(path="someone/rows"))
    return str(caught.value)


def test_a_hub_that_hangs_up_is_asked_once(calls: list[object]) -> None:
    for message in (refused_data(), refused_model(), refused_data()):
        assert "http://127.0.0.1:" in message and "can't be reached" in message
        assert [words for words in REMEDIES if words not in message] == []
        assert "\n" not in message
    assert len(calls) <= 2  # the client tries a connection that broke once more


def test_a_look_up_of_the_address_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the name server is behind a firewall: no time limit of the client covers it."""
    answered = Event()

    def getaddrinfo(*_: object, **__: object) -> object:
        answered.wait()
        raise socket.gaierror("no such host")

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.invalid")
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    try:
        assert "http://hub.invalid can't be reached (no answer in 0.2 s)" in refused_model()
    finally:
        answered.set()


def test_data_downloaded_before_are_used(tmp_path: Path, calls: list[object]) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": f"q {i}", "completion": "a"} for i in range(6)])
    # The layout of the cache: owner___name/configuration/version/hash.
    place = tmp_path / "datasets" / "someone___rows" / "default" / "0.0.0" / "0123456789abcdef"
    rows.to_parquet(tmp_path / "rows.parquet")
    made = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "made"))
    source = Path(made.cache_files[0]["filename"]).parent
    shutil.copytree(source, place)
    (place / "parquet-train.arrow").rename(place / "rows-train.arrow")
    corpus = load_corpus(DataConfig(path="someone/rows"))
    assert len(corpus.train) + len(corpus.eval) == 6
    assert len(calls) <= 2

"""Places in an object store: an S3 server on this machine, through pyarrow as in earnest."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path

import pytest

from rayfin.errors import StorageError
from rayfin.history import History
from rayfin.objects import ObjectPath, checksums_of
from rayfin.paths import Storage, StoragePath, cache_dir
from rayfin.training.checkpoint import (
    clear_checkpoints,
    latest_checkpoint,
    publish_checkpoint,
    staging,
)


def fill(place: StoragePath, **files: str) -> None:
    for name, text in files.items():
        (place.path / name).parent.mkdir(parents=True, exist_ok=True)
        (place.path / name).write_text(text)


def elsewhere(place: StoragePath, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StoragePath:
    """The same place as another machine, without a copy, knows it."""
    sent = pickle.dumps(place)
    monkeypatch.setenv("RAYFIN_CACHE", str(tmp_path / "elsewhere"))
    received: StoragePath = pickle.loads(sent)
    return received


def test_what_one_machine_publishes_another_fetches(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = StoragePath.at(bucket) / "adapter"
    assert str(here) == f"{bucket}/adapter" and here.path.is_relative_to(cache_dir())
    assert not here.download() and not here.exists()
    fill(here, **{"weights": "w" * 100_000, "deep/er": "x", "empty": ""})
    here.upload()

    there = elsewhere(here, monkeypatch, tmp_path)
    assert there == StoragePath.at(str(here)) and there.path != here.path
    assert there.exists() and there.download()
    assert checksums_of(there.path) == checksums_of(here.path)
    there.remove_local_copy()
    assert not there.path.exists() and there.exists()

    fill(here, weights="other")
    (here.path / "empty").unlink()
    here.upload()
    assert there.download() and checksums_of(there.path) == checksums_of(here.path)
    there.remove()
    assert not here.exists() and StoragePath.at(bucket).names() == []


def test_a_copy_that_is_not_what_the_store_holds_is_made_anew(bucket: str) -> None:
    place = StoragePath.at(bucket) / "checkpoint"
    fill(place, a="1", b="2")
    place.upload()
    fill(place, b="torn", c="left by another")
    found: list[bool] = []
    threads = [threading.Thread(target=lambda: found.append(place.download())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4
    assert {p.name: p.read_text() for p in place.path.iterdir()} == {"a": "1", "b": "2"}


@pytest.mark.parametrize(
    "hurt", ["no list", "a list of nothing", "another list", "a file less", "no file"]
)
def test_a_directory_that_is_not_whole_is_not_fetched(
    bucket: str, hurt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = StoragePath.at(bucket) / "checkpoint"
    fill(place, a="1", b="2")
    place.upload()
    objects = ObjectPath.at(bucket)
    if hurt == "no list":  # as of a writer that was killed
        (objects / "checkpoint.sums.json").remove()
    elif hurt in ("a file less", "no file"):
        (objects / "checkpoint" / "b").remove()
        if hurt == "no file":
            (objects / "checkpoint" / "a").remove()
    else:
        text = b"" if hurt == "a list of nothing" else b'{"a": [1, 5], "b": [1, 6]}'
        (objects / "checkpoint.sums.json").write(text)
    there = elsewhere(place, monkeypatch, tmp_path)
    assert not there.download()
    assert not there.path.exists(), "what is half there could be taken for a checkpoint"


def test_torn_uploads_take_no_whole_checkpoint_along(bucket: str) -> None:
    checkpoints = StoragePath.at(bucket) / "checkpoints"

    def save(step: int) -> None:
        staged = staging(checkpoints) / f"checkpoint-{step}"
        staged.mkdir(parents=True)
        (staged / "weights").write_text(str(step))
        publish_checkpoint(checkpoints, staged.name)

    def newest() -> str | None:
        found = latest_checkpoint(checkpoints)
        return found.name if found is not None else None

    for step in (3, 5, 10):
        save(step)
    assert checkpoints.names() == ["checkpoint-10", "checkpoint-5"]
    for step in (11, 16, 17):  # killed amid the upload
        (ObjectPath.at(bucket) / "checkpoints" / f"checkpoint-{step}" / "weights").write(b"half")
    assert newest() == "checkpoint-10"
    save(12)
    assert newest() == "checkpoint-12"
    assert checkpoints.names() == ["checkpoint-10", "checkpoint-12"]
    damaged = checkpoints / "checkpoint-20"
    fill(damaged, weights="20")
    damaged.upload()
    assert newest() == "checkpoint-12"
    save(14)
    assert checkpoints.names() == ["checkpoint-12", "checkpoint-14"]
    clear_checkpoints(checkpoints)
    assert checkpoints.names() == [] and newest() is None and not checkpoints.path.exists()


def test_what_is_borrowed_is_nobody_elses(bucket: str) -> None:
    place = StoragePath.at(bucket) / "adapter"
    with place.reading_copy() as nothing:
        assert nothing is None
    fill(place, a="1")
    place.upload()
    place.remove_local_copy()
    with place.reading_copy() as one, place.reading_copy() as two:
        assert one is not None and two is not None and one != two
        assert checksums_of(one) == checksums_of(two) == place.objects.checksums()  # type: ignore[union-attr]
    with pytest.raises(KeyError), place.reading_copy() as three:
        raise KeyError
    assert three is not None and not list(place.path.parent.iterdir())


def test_files_alone_and_names(bucket: str) -> None:
    sweeps = StoragePath.at(bucket) / "sweeps"
    for name in ("b", "a"):
        file = sweeps / name / "config.yaml"
        fill(sweeps / name, **{"config.yaml": name})
        file.upload_file()
        file.path.unlink()
        assert file.download_file() and file.path.read_text() == name
    assert sweeps.names() == ["a", "b"]
    gone = sweeps / "a" / "config.yaml"
    assert gone.objects is not None
    gone.objects.remove()
    assert not gone.download_file() and not gone.path.exists(), "the copy is not the file"
    gone.remove_file()
    assert not (sweeps / "c" / "config.yaml").download_file()


def test_options_go_along_and_copies_are_apart() -> None:
    one = StoragePath.at("s3://bucket//runs/?region=eu-west-1") / "x"
    assert str(one) == "s3://bucket/runs/x?region=eu-west-1"
    others = (
        "s3://bucket/runs/x",
        "s3://bucket/runs/x?region=eu-west-2",
        "gs://bucket/runs/x",
        "s3://other/runs/x",
    )
    assert len({one.path, *(StoragePath.at(url).path for url in others)}) == 5


def test_a_store_that_refuses_is_told_in_one_line(bucket: str) -> None:
    with pytest.raises(StorageError, match=r"can't be written .*bucket does not exist.*role"):
        Storage.open("s3://rayfin-none/runs")
    storage = Storage.open(bucket)
    assert StoragePath.at(bucket).names() == [], "the test of writing leaves nothing"
    with pytest.raises(StorageError, match="history=postgresql"):
        History.open(storage.history_url)
    with pytest.raises(StorageError, match=r"publish\.storage=DIR"):
        assert storage.adapters


def test_a_store_that_is_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    away = "s3://bucket/runs?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:1"
    with pytest.raises(StorageError, match=r"s3://bucket/runs.* can't be written .*connect"):
        Storage.open(away)

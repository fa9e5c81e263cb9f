"""A row of a shared history that names somebody else's adapter: it is not recalled or published."""

import json
import shutil
from pathlib import Path

import pytest

from rayfin.adapters import Registry
from rayfin.cli import main
from rayfin.config import load_config
from rayfin.errors import StorageError
from rayfin.history import History, TrialRecord
from rayfin.library.experiment import Experiment

WEIGHTS = "adapter_model.safetensors"


def settings(storage: Path, data: Path, steps: int) -> list[str]:
    return [
        *(f"storage={storage}", f"data.path={data}", "model.name=tiny", "method.type=lora"),
        *("method.r=2", f"train.max_steps={steps}", "train.eval_steps=1", "publish.name=mine"),
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = ({"instruction": f"Say {n}", "output": f"{n}"} for n in range(20))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def only(storage: Path) -> TrialRecord:
    with History.open(f"sqlite:///{storage}/history.sqlite") as history:
        (row,) = history.trials()
    return row


def test_a_row_that_names_anothers_adapter(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for storage, steps in ((theirs, 2), (ours, 1)):
        assert main(["train", *settings(storage, data, steps)]) == 0
    published = Registry(ours / "adapters")
    told = json.loads((published.resolve("mine@1").path / "rayfin.json").read_text())
    assert told["base_identity"][0] == "tiny@1" and told["base_identity"][1].startswith("local@")
    secret, row = only(theirs), only(ours)
    poisoned = row.updated(directory=secret.directory)
    with History.open(f"sqlite:///{ours}/history.sqlite") as history:
        history.put(poisoned)
    before = {path: path.stat().st_mtime_ns for path in theirs.rglob("*") if path.is_file()}
    shutil.rmtree(ours / "adapters")

    # Recalled: it is trained again, and what is published is what was trained.
    assert main(["train", *settings(ours, data, 1)]) == 0
    assert (
        f"which is not that trial's directory (its own ends in trials/{row.fingerprint[:8]})"
        in (caplog.text)
    )
    stolen = Path(secret.directory or "") / "adapter" / WEIGHTS
    mine = published.resolve("mine").path / WEIGHTS
    assert mine.read_bytes() != stolen.read_bytes()
    assert only(ours).directory == row.directory

    # Published: refused, whatever brought the row.
    ours_again = Experiment.open(load_config(None, settings(ours, data, 1)))
    other = {"metrics": row.metrics | {"eval_loss": 0.5}}  # else it is published already
    with pytest.raises(StorageError, match="not that trial's directory"):
        ours_again.publish(poisoned.updated(**other), print)
    link = tmp_path / "sweeps" / "train" / "trials" / row.fingerprint[:8]
    link.mkdir(parents=True)
    (link / "adapter").symlink_to(stolen.parent)
    with pytest.raises(StorageError, match="is a link, and might be another's"):
        ours_again.publish(row.updated(directory=str(link), **other), print)
    ours_again.history.close()
    assert [version.ref for version in published.list()] == ["mine@1"]
    after = {path: path.stat().st_mtime_ns for path in theirs.rglob("*") if path.is_file()}
    assert after == before

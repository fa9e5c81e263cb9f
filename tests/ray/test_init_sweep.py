"""What `rayfin init` writes is swept as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayfin.cli import main


@pytest.mark.ray
def test_a_drafted_configuration_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"q {i}", "completion": f"a {i % 3}"} for i in range(40)]
    Path("mine.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert main(["init", "data.path=mine.jsonl", "model.name=tiny", "sweep.num_samples=2"]) == 0
    capfd.readouterr()
    assert main(["sweep", "my-sweep.yaml", "--json"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [trial["spec"]["data"]["path"] for trial in result["trials"]] == [
        str(Path("mine.jsonl").resolve())
    ] * 2
    assert result["adapter"]["ref"] == "mine@1"

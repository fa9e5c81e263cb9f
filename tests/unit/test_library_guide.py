"""What docs/library.md shows is what its Python prints; trials are trained here, without Ray."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rayfin.config import ServeConfig
from rayfin.config.serving import ApiConfig, ApiKey
from rayfin.serving.local_api import local_api

# Serve's own models, when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")

GUIDE = (Path(__file__).parents[2] / "docs" / "library.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", GUIDE, re.DOTALL)


@contextmanager
def served_here(config: ServeConfig, address: str | None) -> Iterator[Any]:
    """The API and its engine in this process, in place of Ray Serve's replicas."""
    from rayfin.serving.deployment_lifecycle import RunningDeployment
    from rayfin.serving.placement import Placement

    with local_api(config) as endpoint:
        assert endpoint.key is not None
        api = ApiConfig(api_keys=(ApiKey(key=endpoint.key),))
        yield RunningDeployment(
            endpoint.url, config.model_copy(update={"api": api}), Placement(1, 0)
        )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_ray: None) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rayfin.serving.deployment_lifecycle.serving", served_here)
    rows = [{"prompt": f"what is {n}", "completion": f"{n}"} for n in range(12)]
    Path("support.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_guide_s_examples_print_what_it_shows(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other, as in a notebook; … stands for what differs."""
    assert len(SECTIONS) == 7
    names: dict[str, Any] = {"__name__": "notebook"}
    for code, shown in SECTIONS:
        quick = code.replace("smollm2-135m", "tiny").replace('"max_steps": 20', '"max_steps": 2')
        exec(compile(quick, "docs/library.md", "exec"), names)
        printed = capsys.readouterr().out
        pattern = re.escape(shown.replace("smollm2-135m", "tiny")).replace("…", ".*")
        assert re.fullmatch(pattern, printed), (code, printed)
    result = names["result"]
    assert [trial.sweep_id for trial in result.trials] == [result.sweep_id] * 3
    assert Path(result.report).is_file()

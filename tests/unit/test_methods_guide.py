"""What docs/methods.md shows is what commands print; its code merges what no engine reads."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from rayfin.cli import main
from rayfin.config import ModelConfig
from rayfin.errors import AdapterError
from rayfin.models import base_of, load_base
from rayfin.serving.engine.adapter import BaseLayout, read_adapter
from rayfin.serving.engine.request import AdapterSource

GUIDE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
TINY = ModelConfig(name="tiny")
QUICK = ["model.name=tiny", "data.path=support.jsonl", "storage=runs", "train.max_steps=4"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"what is {n}", "completion": f"{n % 5}"} for n in range(40)]
    Path("support.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_what_is_refused_is_said_as_shown(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = re.findall(r"```console\n\$ (.*?)\n(.*?)\n```", GUIDE, re.DOTALL)
    assert len(shown) == 2
    for command, lines in shown:
        capfd.readouterr()
        assert main(shlex.split(command)[1:]) == 2
        pattern = re.escape(lines).replace("…", ".*")
        assert re.fullmatch(pattern, capfd.readouterr().err.strip()), pattern


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("target_modules=[q_prj]", r"its linear modules are [^;]*q_proj, [^;]*or use all-linear"),
        ("modules_to_save=[lm_haed]", r"its modules are [^;]*lm_head, [^;]*v_proj"),
        ("exclude_modules=[q_prj]", r"its modules are [^;]*q_proj, [^;]*v_proj"),
    ],
)
def test_a_module_that_is_not_there_is_refused_with_those_that_may_be_named(
    here: Path, capfd: pytest.CaptureFixture[str], setting: str, named: str
) -> None:
    assert main(["train", *QUICK, "method.type=lora", f"method.{setting}"]) == 2
    assert re.fullmatch(
        rf"rayfin: .*is no module of 'tiny'; {named}", capfd.readouterr().err.strip()
    )


@pytest.mark.parametrize("method", ["loha", "oft"])
def test_what_no_engine_reads_is_published_refused_and_merged(here: Path, method: str) -> None:
    from transformers import AutoModelForCausalLM

    settings = [f"method.type={method}", "train.learning_rate=0.02", "publish.name=support"]
    assert main(["train", *QUICK, *settings]) == 0
    adapter = Path("runs/adapters/support/1")
    layout = BaseLayout.of(load_base(TINY, None, "cpu"), base_of(TINY))
    with pytest.raises(AdapterError, match=f"'{method.upper()}', and the engine .* or merge it"):
        read_adapter(AdapterSource("support@1", adapter), layout)

    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    exec(code, {})
    merged: Any = AutoModelForCausalLM.from_pretrained("merged").eval()
    changed = merged.get_submodule("model.layers.0.self_attn.q_proj").weight
    assert not changed.equal(load_base(TINY, None, "cpu").model.layers[0].self_attn.q_proj.weight)
    assert Path("merged/tokenizer.json").is_file()


def test_a_trial_of_a_sweep_that_cannot_fit_its_model_is_refused_before_the_sweep_begins(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ["method.type=lora", "method.init_lora_weights=pissa"]
    assert main(["sweep", *QUICK, *settings, "sweep.parameters.method.r=[8,512]"]) == 2
    assert "rank 512 is more than the " in capfd.readouterr().err
    assert not Path("runs/sweeps").exists()

"""The public interface: what `rayfin` names, and that calling it neither prints nor ends."""

from __future__ import annotations

import ast
import gc
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import rayfin
from rayfin.config import dump_yaml, load_config
from rayfin.tuning.progress import ProgressDisplay

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "platform" / "rayfin" / "library"


def test_what_type_checkers_know_is_what_there_is() -> None:
    tree = ast.parse((ROOT / "platform" / "rayfin" / "__init__.py").read_text(encoding="utf-8"))
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {
        alias.asname: node.module
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == rayfin._MODULES
    for name, module in imported.items():
        assert getattr(rayfin, name) is getattr(sys.modules[str(module)], name)  # type: ignore[index]
    assert imported.keys() == {name for name in dir(rayfin) if not name.startswith("_")}
    with pytest.raises(AttributeError, match="no attribute 'sweeep'"):
        _ = rayfin.sweeep  # type: ignore[attr-defined]


def test_the_library_has_no_word_for_standard_output_and_no_end_of_the_process() -> None:
    for path in LIBRARY.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                to = [ast.unparse(k.value) for k in node.keywords if k.arg == "file"]
                assert to == ["sys.stderr"], f"{path.name}:{node.lineno}"
            names = {node.attr} if isinstance(node, ast.Attribute) else set()
            names |= {node.id} if isinstance(node, ast.Name) else set()
            assert not names & {"exit", "_exit", "SystemExit", "stdout"}, path.name


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"what is {n}", "completion": f"{n}"} for n in range(12)]
    lines = [*map(json.dumps, rows), "{broken"]
    Path("rows.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return tmp_path


CONFIG = {
    "model": {"name": "tiny"},
    "data": {"path": "rows.jsonl", "on_bad_row": "skip"},
    "method": {"type": "lora"},
    "train": {"max_steps": 2},
    "scaling": {"use_gpu": False},
    "storage": "runs",
}


def test_without_progress_nothing_is_shown_and_nothing_is_lost(
    here: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rayfin.estimate(CONFIG, progress=False)
    assert "data: 1 of 13 rows are bad" in caplog.text
    caplog.clear()
    gc.unfreeze()  # the tests' own
    result = rayfin.train(CONFIG, progress=False)
    assert gc.get_freeze_count() == 0
    gc.freeze()
    assert capfd.readouterr() == ("", "")
    assert "1 of 13 rows are bad" in caplog.text and "step 2/2" not in caplog.text
    rayfin.train(CONFIG, progress=False)
    assert f"already in the history as {result.trial.trial_id}" in caplog.text
    assert result.trial.status == "finished" and result.published is None
    assert any("1 of 13 rows are bad" in note for note in result.trial.notes)
    again = rayfin.train(rayfin.load_config(CONFIG))
    assert again.trial == result.trial
    assert "already in the history" in capfd.readouterr().err
    with rayfin.open_history("runs") as history:
        assert [row.trial_id for row in history.trials()] == [result.trial.trial_id]
    assert rayfin.open_registry("runs").list() == ()


def test_a_sweep_without_progress_tells_the_log_what_is_to_be_known(
    here: Path,
    without_ray: None,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    axes = {"num_samples": 1, "report_samples": 0, "parameters": {"method.r": [4]}}
    config = CONFIG | {"sweep": axes, "train": {"max_steps": 1}}
    result = rayfin.sweep(config, progress=False, notes=["a note of the script's"])
    assert [trial.status for trial in result.trials] == ["finished"]
    assert capfd.readouterr() == ("", "")
    for note in ("1 of 13 rows are bad", "a note of the script's"):
        assert caplog.text.count(note) == 1
    assert "trial 1/1" not in caplog.text
    display = ProgressDisplay.silent()
    display.say("no answer for 30 minutes")
    assert "no answer for 30 minutes" in caplog.text


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"hardware": "single-gpu"}, "hardware='single-gpu' .*did you mean 'single_gpu'"),
        ({"latency": "low"}, "latency='low' must be one of strict, normal"),
        ({"priority": "speed"}, "priority='speed' must be one of quality, cost, latency"),
        ({"k": 0}, "k=0 must be 1 or more"),
        ({"num_gpus": -1}, "num_gpus=-1 must be 0 or more"),
    ],
)
def test_what_can_t_be_meant_of_a_scenario_is_refused(
    here: Path, told: dict[str, Any], said: str
) -> None:
    """The command line's parser does so; here nothing else would."""
    with pytest.raises(rayfin.UsageError, match=said):
        rayfin.recommend(CONFIG, **told)


def test_a_history_that_is_not_there_is_not_made(here: Path) -> None:
    with pytest.raises(rayfin.UsageError, match=r"runs/history\.sqlite"):
        rayfin.open_history("runs")
    assert not Path("runs").exists()


SCRIPT = """
import rayfin

CONFIG = {"model": {"name": "tiny"}, "data": {"path": "rows.jsonl", "on_bad_row": "skip"},
          "method": {"type": "lora"}, "train": {"max_steps": 1}, "scaling": {"use_gpu": False}}
with rayfin.script("train", CONFIG, "Trains.") as script:
    result = rayfin.train(script.config, **script.options)
    script.show(result)
print("and after it")
"""


def test_a_script_takes_the_command_line_s_settings_and_ends_as_a_command(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("mine.py").write_text(SCRIPT)

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["mine.py", *words])
        code: object = 0
        try:
            runpy.run_path("mine.py", run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        assert isinstance(code, int)
        return code

    assert run("method.r=4", "--json", "storage=runs") == 0
    result, after = capfd.readouterr().out.splitlines()
    assert json.loads(result)["trial"]["spec"]["method"]["r"] == 4
    assert after == "and after it"
    for words, said in (
        (["method.rr=4"], "method.rr: unknown key (did you mean 'method.r'?)"),
        (["--resum"], "'--resum' is no option of mine.py"),
        (["data.path=none.jsonl"], "none.jsonl"),
    ):
        assert run(*words) == 2
        out, err = capfd.readouterr()
        assert out == "" and said in err and err.count("\n") == 1, (words, err)
    assert run("method.r=4", "storage=runs", "publish.name=x", "publish.storage=rows.jsonl") == 3
    out, err = capfd.readouterr()
    assert "Trained" in out and "and after it" not in out and "not published as 'x'" in err


OLD_SCRIPT = """
from rayfin.cli import script

DEFAULTS = '''
model: {name: tiny}
data: {path: rows.jsonl, on_bad_row: skip}
method: {type: lora}
train: {max_steps: 1}
scaling: {use_gpu: false}
'''

raise SystemExit(script("train", DEFAULTS, __doc__ or ""))
"""


def test_a_script_of_earlier_versions_still_runs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("old.py").write_text(OLD_SCRIPT)
    for words, code in ((["method.r=4", "--json"], 0), (["method.rr=4"], 2)):
        monkeypatch.setattr(sys, "argv", ["old.py", *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path("old.py", run_name="__main__")
        assert ended.value.code == code
    out, err = capfd.readouterr()
    assert json.loads(out)["trial"]["spec"]["method"]["r"] == 4
    assert "did you mean 'method.r'?" in err


def test_a_configuration_that_was_made_before_is_a_source_as_well() -> None:
    """What was written of it stays what was written: another method has defaults of its own."""
    first = load_config(CONFIG, ["method.r=4", "publish.name=x"])
    assert dump_yaml(load_config(first)) == dump_yaml(first)
    assert load_config(first) == first
    swept = load_config(first, ["sweep.parameters.method.type=[lora,ia3]"])
    assert swept.method.model_fields_set == {"type", "r"}

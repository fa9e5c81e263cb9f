"""Words on the command line: where settings may stand, what a slip is answered, completion."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import argcomplete
import pytest

from rayfin.cli import build_parser, completion, main
from rayfin.cli.parser import Parser
from rayfin.history import History

SLIPS = {
    "train my.jsonl": "'my.jsonl' is data, and no configuration; write data.path=my.jsonl",
    "init Mine.CSV.gz": "'Mine.CSV.gz' is data, and no configuration; write data.path=Mine.CSV.gz",
    "swep": "rayfin: 'swep' is no command of rayfin (did you mean 'sweep'?)",
    "adapters promot x@1": "'promot' is no command of rayfin adapters (did you mean 'promote'?)",
    "history list --jsn": "'--jsn' is no option of rayfin history list (did you mean '--json'?)",
    "sweep --resum": "'--resum' is no option of rayfin sweep (did you mean '--resume'?)",
    "history list --status finshed": "'finshed' is not allowed (did you mean 'finished'?)",
    # Options of other tools, and of rayfin's before: all of them are settings.
    "history list --storage runs": "it is a setting, write storage=runs",
    "doctor --history=sqlite:///h": "it is a setting, write history=sqlite:///h",
    "adapters show x --storage": "it is a setting, write storage=VALUE",
    "train --learning-rate 1e-3": "it is a setting, write train.learning_rate=1e-3",
    "serve --port 80": "it is a setting, write deployment.port=80",
    # What would not be used is not taken.
    "history list data.path=x": "'data.path' is no setting that rayfin history list uses",
    "adapters list history=x": "'history' is no setting that rayfin adapters list uses",
    "doctor storge=x": "(did you mean 'storage'?)",
    # Names of other tools, and values that pydantic's words don't explain.
    "train train.optim=adamw": "(did you mean 'adamw_torch'?)",
    "train train.metric_for_best_model=eval_loss": "(did you mean 'sweep.metric'?)",
    "train train.bf16=true": "(did you mean 'model.dtype'?)",
    "train method.type=lora train.dropout=0.1": "(did you mean 'method.lora_dropout'?)",
    "train train.warmup_steps=0.1": "a share of all steps is train.warmup_ratio",
    "train data.val_size=0": "or those of a file of their own by data.eval_path",
    "train train.eval_steps=0": "a whole number of steps from 1, or a share of all steps above 0",
    "completion bash storage=x": "'storage=x' is no argument of rayfin completion",
}


@pytest.mark.parametrize("words", SLIPS)
def test_a_slip_is_told_what_was_meant(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main(words.split())
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert SLIPS[words] in err


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """`parser`, and those of all its verbs and of theirs."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from parsers(verb)


VERBS = {parser.prog: parser for parser in parsers(build_parser())}


@pytest.mark.parametrize("prog", VERBS)
def test_help_and_lists_of_settings_fit_a_terminal_of_80_columns(
    prog: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = VERBS[prog].format_help()
    if "--settings" in VERBS[prog]._option_string_actions:
        with pytest.raises(SystemExit):
            main([*prog.split()[1:], "--settings"])
        settings = capsys.readouterr().out
        assert len(settings.splitlines()) > 50
        shown += settings
    assert [line for line in shown.splitlines() if len(line) > 80] == []


def test_the_help_of_serve_says_what_is_served_without_a_model_name() -> None:
    told = " ".join(VERBS["rayfin serve"].format_help().split())
    assert "Without model.name the base is the one that the registry's adapters name" in told


@pytest.mark.parametrize(
    "words",
    [
        ["list", "--json", "storage=mine"],
        ["list", "storage=mine", "--json"],
        ["list", "my.yaml", "--json"],
        ["list", "my.yaml", "storage=nowhere", "storage=mine", "--json"],
        ["list", "history=sqlite:///mine/history.sqlite", "--json"],
        ["export", "storage=mine", "out.jsonl", "--json"],
        ["export", "out.jsonl", "my.yaml", "--json"],
    ],
    ids=" ".join,
)
def test_storage_is_named_as_in_every_other_command(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("my.yaml").write_text("storage: mine\ntrain: {max_steps: 3}\n")
    History.open("sqlite:///mine/history.sqlite").close()
    assert main(["history", *words]) == 0
    assert json.loads(capsys.readouterr().out) in ([], {"path": "out.jsonl", "trials": 0})


def completed(line: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What bash would be answered with the cursor at the end of `line`."""
    for name, value in {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_SHELL": "fish",  # which escapes words itself
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line.encode())),
    }.items():
        monkeypatch.setenv(name, value)
    out = io.StringIO()
    ask = argcomplete.autocomplete

    def stop(_: int) -> None:
        raise SystemExit

    def autocomplete(parser: Parser, **options: bool) -> None:
        ask(parser, exit_method=stop, output_stream=out, **options)

    monkeypatch.setattr(argcomplete, "autocomplete", autocomplete)
    # It would take file descriptor 9 for its own, which here is another's.
    monkeypatch.setattr(argcomplete.CompletionFinder, "_init_debug_stream", lambda _: None)
    with pytest.raises(SystemExit):
        main([])
    return out.getvalue().split("\013")


COMPLETED = {
    "rayfin rec": ["recommend"],
    "rayfin adapters ro": ["rollback"],
    "rayfin sweep --res": ["--resume"],
    "rayfin train train.lear": ["train.learning_rate="],
    "rayfin train my.yaml method.num": ["method.num_virtual_tokens="],
    "rayfin train method.type=p_": ["method.type=p_tuning"],
    "rayfin train method.type=pr": ["method.type=prefix_tuning", "method.type=prompt_tuning"],
    "rayfin sweep train.packing=": ["train.packing=true", "train.packing=false"],
    "rayfin sweep sweep.par": ["sweep.parameters."],
    "rayfin sweep sweep.parameters.method.r": [
        "sweep.parameters.method.r=",
        "sweep.parameters.method.rank_pattern=",
        "sweep.parameters.method.rank_dropout=",
    ],
    "rayfin train model.name=smol": ["model.name=smollm2-135m"],
    "rayfin train data.path=su": ["data.path=support.jsonl"],
    "rayfin train my": ["my.yaml"],
    "rayfin train storage=": ["storage=runs/"],
    "rayfin serve engine.weights=": ["engine.weights=auto", "engine.weights=int8"],
    "rayfin history list sto": ["storage="],
    "rayfin history list --status f": ["finished", "failed"],
    "rayfin completion z": ["zsh"],
    "rayfin train no.such": [""],
}


@pytest.mark.parametrize("line", COMPLETED)
def test_the_shell_completes(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("my.yaml").touch()
    Path("support.jsonl").touch()
    assert completed(line, monkeypatch) == COMPLETED[line]


def test_every_setting_is_completed() -> None:
    from rayfin.config import Config, ServeConfig, leaf_names
    from rayfin.methods import METHODS

    known = set(completion.SettingsCompleter("experiment").names())
    for kind in METHODS:
        names = set(leaf_names(Config.model_validate({"method": {"type": kind}})))
        assert names - {"publish", "sweep.parameters"} <= known, kind
    served = set(completion.SettingsCompleter("deployment").names())
    assert set(leaf_names(ServeConfig())) <= served


def test_bash_completes_with_the_printed_script(tmp_path: Path) -> None:
    """Bash itself, which takes words apart at `=` and asks a `rayfin` of its own."""
    rayfin = tmp_path / "rayfin"
    command = "from rayfin.cli import main; raise SystemExit(main())"
    rayfin.write_text(f"#!{sys.executable}\n{command}\n")
    rayfin.chmod(0o755)
    script = """
eval "$(rayfin completion bash)"
COMP_LINE='rayfin train method.type=ql'; COMP_POINT=${#COMP_LINE}
_python_argcomplete rayfin
printf '%s\\n' "${COMPREPLY[@]}"
"""
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["qlora"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "rayfin" in capsys.readouterr().out

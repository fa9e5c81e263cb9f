"""A recommendation as people read it: two lines to act on, a table, evidence on request."""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import yaml

import rayfin
from rayfin.advisor.answer_text import command_lines, wrapped
from rayfin.advisor.commands import training_command
from rayfin.cli import main
from rayfin.config import load_config

SIZE = ("--model-size-b", "8", "--tokens-per-sample", "300")
ONE = ("--hardware", "single_gpu", "--gpu-memory-gb", "24")
TWO = ("--hardware", "multi_gpu", "--num-gpus", "2", "--gpu-memory-gb", "80")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def printed(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["recommend", *arguments]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return out


def width(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in line)


# --- the text -----------------------------------------------------------------------------------


def test_an_answer_begins_with_what_to_train_and_the_command(
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = printed(capfd, *SIZE, "--rows", "5000", *ONE, "train.num_train_epochs=3")
    answer = json.loads(
        printed(capfd, *SIZE, "--rows", "5000", *ONE, "train.num_train_epochs=3", "--json")
    )
    first = answer["choices"][0]
    said = re.match(
        r"Train (\S+) r=(\d+), lr (\S+), 3 epochs: (\S+) of 24 GiB, (\S+) (min|h) "
        r"\((rules|learned), (?:un|\w+ )sure\)\n",
        out,
    )
    assert said is not None
    assert (said[1], int(said[2])) == (first["method"], first["config"]["method"]["r"])
    assert float(said[3]) == first["config"]["train"]["learning_rate"]
    needs = first["predictions"]["memory_bytes"]["expected"] / 2**30
    assert float(said[4]) == pytest.approx(needs, rel=0.05)
    takes = first["predictions"]["train_seconds"]["expected"]
    assert float(said[5]) * {"min": 60, "h": 3600}[said[6]] == pytest.approx(takes, rel=0.05)
    command = out.split("\n\n")[0].split("\n", 1)[1].replace("\\\n", " ")
    assert shlex.split(command) == shlex.split(first["command"])
    table = out.split("\n\n")[1].splitlines()
    assert [line[0] for line in table] == ["#", "1", "2", "3"]


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize(
    "arguments",
    [ONE, (*ONE, "method.type=prefix_tuning", "train.num_train_epochs=0.5"),
     ("--hardware", "cpu", "method.type=p_tuning"), (*TWO, "method.type=lora")],
    ids=lambda arguments: arguments[-1],
)  # fmt: skip
def test_nothing_is_wider_than_80_columns(
    capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], lang: str
) -> None:
    asked = ("--model-size-b", "1", "--rows", "5000", "--tokens-per-sample", "100", *arguments)
    out = printed(capfd, *asked, "--lang", lang, "--why")
    assert max(map(width, out.splitlines())) <= 80


def test_the_evidence_comes_with_why(capfd: pytest.CaptureFixture[str]) -> None:
    asked = (*SIZE, "--rows", "5000", *ONE)
    short, long = printed(capfd, *asked), printed(capfd, *asked, "--why")
    assert "--why says why" in short and len(short.splitlines()) < 40
    for choice in json.loads(printed(capfd, *asked, "--json"))["choices"]:
        for line in (*choice["reasons"], *choice["risks"], choice["deployment"]):
            said = " ".join(line.split())
            assert said in " ".join(long.split())
            assert said not in " ".join(short.split())


def test_a_command_trains_what_was_recommended(capfd: pytest.CaptureFixture[str]) -> None:
    given = ("train.num_train_epochs=2", "train.optim=adamw_torch", "data.val_size=0.25")
    asked = ("model.name=tiny", "data.path=pydocs", *given, "storage=my runs", "publish.name=mine")
    for choice in json.loads(printed(capfd, *asked, "-k", "4", "--json"))["choices"]:
        words = shlex.split(choice["command"])
        assert words[:2] == ["rayfin", "train"]
        told = load_config(None, words[2:]).model_dump(mode="json")
        assert told["train"].pop("max_steps") != choice["config"]["train"].pop("max_steps")
        assert told == choice["config"]


def test_a_command_holds_no_password() -> None:
    config = {"history": "postgresql://me:geheim@db.example/trials"}
    command = training_command(load_config(config, []).model_dump(mode="json"))
    assert "geheim" not in command and "db.example" in command


def test_an_answer_prints_itself_in_its_language(tmp_path: Path) -> None:
    answer = rayfin.recommend(
        model_size_b=8, rows=5000, tokens_per_sample=300, hardware="single_gpu", lang="zh"
    )
    assert str(answer) == repr(answer)
    assert str(answer).startswith("训练 ") and "依据规则" in str(answer)
    none = rayfin.recommend(model_size_b=70, rows=99, hardware="single_gpu", gpu_memory_gb=12)
    assert " ".join(str(none).split()) == none.nothing_fits


def test_lines_are_broken_between_words_and_between_chinese_characters() -> None:
    assert list(wrapped("a" * 50 + " " + "b" * 40, 2)) == ["a" * 50, "  " + "b" * 40]
    assert list(wrapped("字" * 45)) == ["字" * 40, "字" * 5]
    assert list(wrapped("字" * 40 + "。尾")) == ["字" * 39, "字。尾"]
    assert list(wrapped("字" * 39 + "（括）")) == ["字" * 39, "（括）"]
    assert list(wrapped("c" * 90)) == ["c" * 90]
    lines = list(
        command_lines("rayfin train " + " ".join(f"'data.path={n} x.jsonl'" for n in "12345"))
    )
    assert all(line.endswith(" \\") for line in lines[:-1]) and len(lines) == 2
    joined = "\n".join(lines).replace("\\\n", " ")
    assert shlex.split(joined)[2:] == [f"data.path={n} x.jsonl" for n in "12345"]


# --- both languages ------------------------------------------------------------------------------


def figures(text: str) -> list[str]:
    """The numbers of a text, as they are written, in ascending order."""
    return sorted(re.findall(r"\d+(?:[.,]\d+)*(?:e-?\d+)?", text))


def test_figures_are_found() -> None:
    assert figures("r=16，2e-4 的 8B 与 1,000.5 (0.00-0.93)") == sorted(
        ["16", "2e-4", "8", "1,000.5", "0.00", "0.93"]
    )


@pytest.mark.parametrize(
    "arguments",
    [(*SIZE, "--rows", "5000", *ONE), ("model.name=tiny", "data.path=pydocs")],
    ids=["rules", "learned"],
)
def test_the_answer_has_the_same_figures_in_both_languages(
    capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    asked = (*arguments, "method.type=lora")
    zh, en = (printed(capfd, *asked, "--why", "--lang", lang) for lang in ("zh", "en"))
    assert zh.startswith("训练") and en.startswith("Train ")
    assert figures(zh) == figures(en)
    zh, en = (json.loads(printed(capfd, *asked, "--json", "--lang", lang)) for lang in ("zh", "en"))
    assert (zh.pop("lang"), en.pop("lang")) == ("zh", "en")
    assert without_words(zh) == without_words(en)


def without_words(value: Any) -> Any:
    """A value of JSON with the figures of each text in its place."""
    if isinstance(value, dict):
        return {name: without_words(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_words(inner) for inner in value]
    return figures(value) if isinstance(value, str) else value


def test_a_scaffold_says_epochs_and_has_a_guide_in_the_answers_language(
    capfd: pytest.CaptureFixture[str],
) -> None:
    asked = ("model.name=tiny", "data.path=pydocs", "method.type=lora", "train.num_train_epochs=2")
    guides = {}
    for lang in ("en", "zh"):
        printed(capfd, *asked, "--lang", lang, "--scaffold", lang)
        train = yaml.safe_load(Path(lang, "train.yaml").read_text(encoding="utf-8"))["train"]
        assert train["num_train_epochs"] == 2 and "max_steps" not in train
        guides[lang] = Path(lang, "README.md").read_text(encoding="utf-8")
    assert ", 2 epochs: " in guides["en"] and "，2 轮：" in guides["zh"]
    assert figures(guides["en"]) == figures(guides["zh"])
    for command in ("estimate train.yaml", "train train.yaml", "sweep sweep.yaml"):
        assert f"rayfin {command}" in guides["en"] and f"rayfin {command}" in guides["zh"]


def test_an_estimate_has_the_same_figures_in_both_languages(
    capfd: pytest.CaptureFixture[str],
) -> None:
    asked = ("--rows", "5000", *SIZE, *TWO, "scaling.num_workers=2", "train.num_train_epochs=1")
    said = {}
    for lang in ("en", "zh"):
        assert main(["estimate", *asked, "--price-per-hour", "3", "--lang", lang]) == 0
        said[lang] = capfd.readouterr().out
    assert "peak memory" in said["en"] and "峰值内存" in said["zh"]
    assert figures(said["en"]) == figures(said["zh"])

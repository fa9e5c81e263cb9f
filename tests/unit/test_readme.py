"""The READMEs: both say the same, and what they tell people to type is taken."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from rayfin.cli import build_parser
from rayfin.config import build_config, load_config, load_serve_config

ROOT = Path(__file__).resolve().parents[2]
ENGLISH, CHINESE = ((ROOT / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md"))
HEADINGS = {
    "rayfin": "rayfin",
    "What is different": "特点",
    "Your own data": "使用自己的数据",
    "What a sweep leaves": "搜索的产物",
    "What to run": "该跑什么",
    "Serving": "在线服务",
    "On a cluster": "在集群上",
    "State": "现状",
}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content without comments) of every block of code."""
    return [
        (kind, re.sub(r"[ \t]*(?:(?<=\s)|^)#[^\n]*", "", content, flags=re.MULTILINE))
        for kind, content in BLOCK.findall(text)
    ]


def prose(text: str) -> str:
    return BLOCK.sub("", text)


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ .*$", prose(text), re.MULTILINE)


def commands() -> list[list[str]]:
    shell = "".join(content for kind, content in blocks(ENGLISH) if kind == "console")
    lines = shell.replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("$ ")) for line in lines if line.startswith("$ ")]


def test_the_same_headings_in_the_same_order() -> None:
    database_errors = [
        re.sub(r"(?<= ).*", lambda title: HEADINGS[title[0]], line) for line in headings(ENGLISH)
    ]
    assert database_errors == headings(CHINESE)


def test_the_same_code() -> None:
    assert blocks(ENGLISH) == blocks(CHINESE)


def test_the_same_links() -> None:
    found = [
        [link for link in re.findall(r"\]\(([^)]*)\)", text) if not link.startswith("README")]
        for text in (ENGLISH, CHINESE)
    ]
    assert found[0] == found[1]
    for link in found[0]:
        file, _, anchor = link.partition("#")
        assert (ROOT / file).is_file(), link
        titles = re.findall(r"^#+ (.*)$", (ROOT / file).read_text("utf-8"), re.MULTILINE)
        assert not anchor or anchor in [title.lower().replace(" ", "-") for title in titles], link


def test_the_same_names_in_each_section() -> None:
    """Settings, options, values and files: whatever is set as code."""

    def names(text: str) -> list[list[str]]:
        sections = re.split(r"^#+ .*$", prose(text), flags=re.MULTILINE)
        return [
            sorted({" ".join(name.split()) for name in re.findall(r"`([^`]+)`", section)})
            for section in sections
        ]

    assert names(ENGLISH) == names(CHINESE)


def test_the_same_rows_of_tables() -> None:
    first = [re.findall(r"^\|([^|]*)\|", text, re.MULTILINE) for text in (ENGLISH, CHINESE)]
    assert first[0] == first[1]


def test_it_stays_short() -> None:
    assert len(ENGLISH.splitlines()) < 200


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_is_one_that_there_is(words: list[str]) -> None:
    if words[0] == "python":
        assert (ROOT / words[1]).is_file()
    elif words[0] == "rayfin":
        args = build_parser().parse_args(words[1:])
        settings = [word for word in args.settings if "=" in word]
        (load_serve_config if args.command in ("serve", "chat") else load_config)(None, settings)


def test_nothing_is_used_before_it_is_there() -> None:
    lines = [" ".join(words) for words in commands()]
    assert lines[:3] == ["make demo", "make test", "source .venv/bin/activate"]
    assert ".venv/bin/rayfin" not in ENGLISH  # one way to call it
    first = next(number for number, line in enumerate(lines) if "my-sweep.yaml" in line)
    assert lines[first - 1].startswith("rayfin init ")


def test_the_configuration_that_is_shown_can_be_swept() -> None:
    from rayfin.tuning.space import SearchSpace
    from rayfin.tuning.space_check import check_space

    [shown] = [content for kind, content in blocks(ENGLISH) if kind == "yaml"]
    check_space(SearchSpace(build_config(yaml.safe_load(shown))))


@pytest.mark.parametrize("target", ["setup", "demo"])
def test_make_ends_with_how_to_get_the_command(target: str) -> None:
    # Not what `make test` hands on to a make within it: it would say more.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    result = subprocess.run(
        ["make", "-n", "READY=LICENSE", target],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    last = result.stdout.splitlines()[-1].removeprefix("echo; ")
    said = subprocess.run(["sh", "-c", last], capture_output=True, text=True, check=True).stdout
    assert said == "For the command `rayfin` in this shell: source .venv/bin/activate\n"

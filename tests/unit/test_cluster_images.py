"""cluster/docker/, by hadolint and by rules of ours; and no file of cluster/ holds a secret."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ("cpu", "gpu")
HADOLINT = Path(sys.executable).parent / "hadolint"

SECRETS = {
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "an access key of AWS": r"\bA(?:KI|SI)A[0-9A-Z]{16}\b",
    "an account of AWS": r"(?<![\d.])\d{12}(?![\d.])",
    "a token of a hub": r"\b(?:hf|ghp|gho|glpat|sk)[-_][A-Za-z0-9]{20,}",
    "a password in a URL": r"://[^/\s:@$]+:[^/\s@$]+@",
    "a password": r"(?i)\b(?:password|passwd|secret_key)\s*[:=]\s*[\"\']?[^\s\"\'${<]{4,}",
    "a long random text": r"\b[0-9a-f]{40,}\b",
    "an address of a person": r"\b[\w.]+@(?!example\b)[\w-]+\.(?:com|org|net)\b",
}


def dockerfile(kind: str) -> str:
    return (ROOT / "cluster" / "docker" / f"{kind}.Dockerfile").read_text("utf-8")


def lint(text: str) -> str:
    """What hadolint finds, of any severity."""
    command = [str(HADOLINT), "--no-color", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False).stdout


def instructions(text: str) -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^#.*\n", "", text))
    words = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(name, rest) for name, rest in words]


def copied(text: str) -> list[str]:
    """What comes from the build's context."""
    found = []
    for name, rest in instructions(text):
        if name == "COPY" and not rest.startswith("--from"):
            found += rest.split()[:-1]
    return found


def faults(text: str) -> list[str]:
    found = []
    lines = instructions(text)
    bases = [rest for name, rest in lines if name == "FROM"]
    if len(bases) < 2:
        found.append("one stage")
    if any(not re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*( AS \w+)?", base) for base in bases):
        found.append("a base image of any version")
    users = [rest for name, rest in lines if name == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        found.append("runs as root")
    for name, rest in lines:
        pinned = rest.count("pip install") == rest.count("pip install -c constraints.txt")
        if name == "RUN" and not pinned:
            found.append("something is installed at any version")
    if "RAY_AUTH_MODE=token" not in text:
        found.append("Ray would start without a token")
    return found


@pytest.mark.parametrize("kind", IMAGES)
def test_images(kind: str) -> None:
    text = dockerfile(kind)
    assert lint(text) == ""
    assert faults(text) == []


@pytest.mark.parametrize("kind", IMAGES)
def test_the_context_has_what_is_copied(kind: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert "*" in ignored, "whatever is not named stays out"
    let_in = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    for source in copied(dockerfile(kind)):
        assert (ROOT / source).exists() and source in let_in
    assert not {".git", ".venv", "runs", ".env"} & set(let_in)


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("python:3.11.13-slim-bookworm", "python:latest", "DL3007"),
        ("python:3.11.13-slim-bookworm", "python", "DL3006"),
        ("USER 1000:1000", "USER root", "DL3002"),
        ("install -y", "install", "DL3014"),
        ("--no-install-recommends ", "", "DL3015"),
        ("# hadolint ignore=DL3008\n", "", "DL3008"),
        ("WORKDIR /home/ray", "WORKDIR home", "DL3000"),
        ("COPY experiments", "ADD experiments", "DL3020"),
    ],
)
def test_the_linter_can_fail(old: str, new: str, rule: str) -> None:
    text = dockerfile("cpu")
    assert old in text
    assert rule in lint(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("FROM python:3.11.13-slim-bookworm AS build\n", "", "one stage"),
        ("python:3.11.13-slim-bookworm", "python:3", "base image"),
        ("USER 1000:1000\n", "", "root"),
        ("USER 1000:1000", "USER 0:0", "root"),
        ("install -c constraints.txt", "install", "any version"),
        ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", "without a token"),
    ],
)
def test_the_rules_can_fail(old: str, new: str, fault: str) -> None:
    text = dockerfile("gpu")
    assert old in text
    assert fault in str(faults(text.replace(old, new)))


def secrets(text: str) -> list[str]:
    return [name for name, pattern in SECRETS.items() if re.search(pattern, text)]


def test_no_file_holds_a_secret() -> None:
    command = ["git", "ls-files", "-co", "--exclude-standard", "cluster", ".dockerignore"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in listing.stdout.splitlines()]
    assert len(files) > 10
    found = {file.name: secrets(file.read_text("utf-8")) for file in files}
    assert {name: each for name, each in found.items() if each} == {}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("a private key", "-----BEGIN OPENSSH " + "PRIVATE KEY-----"),
        ("an access key of AWS", "AKIA" + "ABCDEFGH12345678"),
        ("an account of AWS", "arn:aws:iam::" + "123456" * 2 + ":role/x"),
        ("a token of a hub", "HF_TOKEN=hf_" + "abcdefghij" * 3),
        ("a password in a URL", "postgresql+psycopg://team:" + "sesame@db/rayfin"),
        ("a password", "pass" + "word: sesame1"),
        ("a long random text", "0123456789abcdef" * 4),
        ("an address of a person", "someone" + "@company.com"),
    ],
)
def test_a_secret_is_noticed(kind: str, text: str) -> None:
    assert kind in secrets(text)

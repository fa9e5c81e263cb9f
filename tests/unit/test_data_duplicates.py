"""`rayfin data dedupe` and `leaks` find equal and similar rows, and lose none without saying so."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
from datasketch import MinHash

from rayfin.cli import main
from rayfin.data_tools import signing
from rayfin.data_tools.minhash import (
    NUM_PERM,
    MinHasher,
    Signatures,
    band_sizes,
    shingle_hashes,
)
from rayfin.data_tools.signing import Signer
from rayfin.data_tools.similar import Matches, match_similar
from rayfin.data_tools.spill import Spill
from rayfin.errors import RayfinError

ENGLISH = "How do I reset the password of my account when I have lost my phone?"
CHINESE = "我的手机丢了，应该怎样重新设置账户的登录密码？请告诉我具体的步骤。"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def pair(
    prompt: str, completion: str = "Open the settings, then choose Security."
) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["data", *words]) == code
    captured = capsys.readouterr()
    return captured.err if code == 2 else captured.out


def jaccard(first: str, second: str) -> float:
    """As the guide defines it, by the texts themselves."""

    def shingles(text: str) -> set[str]:
        text = "".join(
            c + "." * ("\u4e00" <= c <= "\u9fff") for c in " ".join(text.lower().split())
        )
        return {text[n : n + 5] for n in range(len(text) - 4)}

    a, b = shingles(first), shingles(second)
    return len(a & b) / len(a | b)


def test_equal_and_similar_rows_are_left_out_and_reported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the row that each duplicates, and how similar it is; what remains stays as it was."""
    near = CHINESE.replace("应该", "该")
    rows = [
        {"id": 1, **pair(ENGLISH)},
        {"id": 2, **pair(CHINESE)},
        {"id": 3, **pair(ENGLISH)},
        {"id": 4, **pair(ENGLISH.upper().replace("PHONE", "PHONES"))},
        {"id": 5, **pair(near)},
        {"id": 6, **pair("Where do I find my invoices of last year, and who may see them?")},
        {"id": 7, "prompt": "no answer"},
        {"id": 8, **pair(ENGLISH.replace("phone", "phones"))},
    ]
    write("all.jsonl", rows)
    words = ("dedupe", "all.jsonl", "--output=new/some.jsonl", "data.on_bad_row=skip")
    report = json.loads(run(capsys, *words, "--json"))
    assert rows_of("new/some.jsonl") == [rows[0], rows[1], rows[5]]
    assert report == json.loads(Path("new/some.report.json").read_text(encoding="utf-8"))
    counts = [report[name] for name in ("rows", "written", "equal", "similar", "unusable")]
    assert counts == [8, 3, 1, 3, 1] and counts[0] == sum(counts[1:])
    lost = report["left_out"]
    assert [each["row"]["id"] for each in lost] == [3, 4, 5, 7, 8]
    assert [each["line"] for each in lost] == [3, 4, 5, 7, 8]
    found = [each["duplicate_of"]["line"] for each in lost if "duplicate_of" in each]
    assert found == [1, 1, 2, 1]
    assert lost[0]["equal"] and lost[0]["similarity"] == 1
    for each in (lost[1], lost[2], lost[4]):
        texts = (
            "\n".join((row["prompt"], row["completion"]))
            for row in (each["row"], rows[each["duplicate_of"]["line"] - 1])
        )
        assert each["similarity"] == pytest.approx(jaccard(*texts), abs=1e-6)
        assert 0.8 <= each["similarity"] < 1 and not each["equal"]
    equal = ("dedupe", "all.jsonl", "--output=e.jsonl", "data.on_bad_row=skip", "--threshold=1")
    said = run(capsys, *equal)
    assert "e.jsonl: 6 of 8 rows; left out: 1 equal, 0 similar, 1 that can't be used\n" in said


def test_one_of_equal_rows_remains(capsys: pytest.CaptureFixture[str]) -> None:
    """Equal is what is trained on, not what else stands in a row."""
    write("all.jsonl", [{"id": n, **pair("Why?", "So.")} for n in range(50)])
    said = run(capsys, "dedupe", "all.jsonl", "--output=one.jsonl")
    assert "one.jsonl: 1 of 50 rows; left out: 49 equal, 0 similar" in said
    assert rows_of("one.jsonl") == [{"id": 0, **pair("Why?", "So.")}]
    assert "- left out: all.jsonl:2: equal to all.jsonl:1\n" in said and "- and 44 more" in said


@pytest.mark.parametrize(
    ("part", "lines"), [("whole", [4]), ("prompt", [2, 4]), ("answer", [3, 4])]
)
def test_a_part_of_each_row_is_compared(
    capsys: pytest.CaptureFixture[str], part: str, lines: list[int]
) -> None:
    """System turns don't make rows similar."""
    system = {"role": "system", "content": " ".join(map(str, range(500)))}
    other = "Write to the support, who will send you a letter with a new one."
    write(
        "all.jsonl",
        [
            {
                "messages": [
                    system,
                    {"role": "user", "content": p},
                    {"role": "assistant", "content": a},
                ]
            }
            for p, a in (
                (ENGLISH, "Open the settings, then choose Security."),
                (ENGLISH, other),
                (CHINESE, "Open the settings, then choose Security."),
                (ENGLISH, f" {other}"),
            )
        ],
    )
    words = ("dedupe", "all.jsonl", "--output=some.jsonl", f"--part={part}", "--json")
    assert [each["line"] for each in json.loads(run(capsys, *words))["left_out"]] == lines


def test_similar_rows_are_found_among_many(capsys: pytest.CaptureFixture[str]) -> None:
    """Each row left out is similar to the kept one that is named, and few pairs remain."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(500)]
    texts = [" ".join(rng.choices(words, k=rng.randint(20, 40))) for _ in range(150)]
    for _ in range(150):
        changed = rng.choice(texts).split()
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.choice(words)
        texts.append(" ".join(changed))
    write("all.jsonl", [{"text": text} for text in texts])
    report = json.loads(run(capsys, "dedupe", "all.jsonl", "--output=some.jsonl", "--json"))
    lost = {each["line"] - 1: each["duplicate_of"]["line"] - 1 for each in report["left_out"]}
    kept = [n for n in range(300) if n not in lost]
    assert len(lost) > 60 and rows_of("some.jsonl") == [{"text": texts[n]} for n in kept]
    assert all(
        other in kept and jaccard(texts[n], texts[other]) >= 0.8 for n, other in lost.items()
    )
    missed = sum(jaccard(texts[a], texts[b]) >= 0.8 for a in kept for b in kept if a < b)
    assert missed <= 2


def test_rows_that_share_much_text_hide_no_duplicate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a template makes all rows candidates, they are compared with the most similar alone."""
    monkeypatch.setattr("rayfin.data_tools.similar._MOST_IN_BUCKET", 3)
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(500)]
    template = " ".join(rng.choices(words, k=30))
    texts = [f"{template} {' '.join(rng.choices(words, k=14))}" for _ in range(60)]
    texts += [f"{text}s" for text in texts[::6]]
    write("all.jsonl", [{"text": text} for text in texts])
    report = json.loads(run(capsys, "dedupe", "all.jsonl", "--output=some.jsonl", "--json"))
    assert [each["line"] for each in report["left_out"]] == list(range(61, 71))
    assert "share much text with many others" in report["notes"][0]


def test_a_row_equal_to_one_left_out_duplicates_the_one_that_is_kept(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write("all.jsonl", [{"text": text} for text in (ENGLISH, f"{ENGLISH} Eh", f"{ENGLISH} Eh")])
    report = json.loads(run(capsys, "dedupe", "all.jsonl", "--output=some.jsonl", "--json"))
    assert (report["written"], report["equal"], report["similar"]) == (1, 0, 2)
    found = [(each["duplicate_of"]["line"], each["similarity"]) for each in report["left_out"]]
    assert found == [(1, pytest.approx(jaccard(ENGLISH, f"{ENGLISH} Eh"), abs=1e-6))] * 2


def test_copies_of_a_row_to_compare_with_hide_no_other(tmp_path: Path) -> None:
    """And are compared with once, as there may be very many."""
    texts = Spill(tmp_path)
    for text in [CHINESE] * 20 + [ENGLISH, ENGLISH]:
        texts.append(text.encode())
    low_bytes = np.zeros((22, NUM_PERM), np.uint8)
    low_bytes[20] = [1] * 10 + [0] * 118  # seems less similar to the last row than the copies do
    signatures = Signatures(np.zeros((22, 1), np.uint32), low_bytes)
    matches = Matches.none(22)
    match_similar(matches, np.arange(22), 21, signatures, texts, 0.8)
    assert matches.other.tolist() == [-1] * 21 + [20] and not matches.incomplete
    texts.close()


def test_rows_with_one_prompt_are_all_leaks_where_it_is_similar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: they are not compared with each other."""
    monkeypatch.setattr("rayfin.data_tools.similar._MOST_IN_BUCKET", 3)
    write("all.jsonl", [pair(ENGLISH, str(n)) for n in range(9)])
    write("held.jsonl", [pair(f"{ENGLISH} Thanks")])
    said = run(capsys, "leaks", "all.jsonl", "data.eval_path=held.jsonl", code=1)
    assert "9 of 9 rows are leaks (0 equal, 9 similar)" in said and "share much" not in said


def test_the_output_appears_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that where it is there, the report on what it lacks is there too."""
    write("all.jsonl", [pair("a"), pair("b"), {"prompt": "c"}])
    write("held.jsonl", [pair("b")])
    names: list[str] = []
    replace = Path.replace

    def recorded(self: Path, target: Path) -> Path:
        names.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", recorded)
    for verb, *more in (["dedupe"], ["convert"], ["clean"], ["leaks", "data.eval_path=held.jsonl"]):
        words = ["all.jsonl", f"--output={verb}.jsonl", *more]
        run(capsys, verb, *words, *([] if verb == "clean" else ["data.on_bad_row=skip"]))
        assert names[-1] == f"{verb}.jsonl" and f"{verb}.report.json" in names[:-1]


def test_leaks_end_with_1_and_are_taken_out(capsys: pytest.CaptureFixture[str]) -> None:
    """A prompt that is evaluated on is a leak whatever its answer is."""
    Path("data").mkdir()
    other = "Where do I find my invoices of last year, and who may see them?"
    train = [
        pair(ENGLISH, "A."),
        pair(other),
        pair(CHINESE),
        pair(other),
        pair(f"{ENGLISH} Thanks"),
    ]
    write("data/train.jsonl", train)
    write(
        "data/test.jsonl", [pair("Is it free?"), pair(ENGLISH), pair("It's free?"), pair(ENGLISH)]
    )
    eval_path = "data.eval_path=data/test.jsonl"
    said = run(capsys, "leaks", "data/train.jsonl", eval_path, code=1)
    assert said == (
        "data/train.jsonl: 2 of 5 rows are leaks (1 equal, 1 similar), from 2 of the 4 rows "
        "evaluated on\n"
        "- leak: data/train.jsonl:1: equal to data/test.jsonl:2\n"
        "- leak: data/train.jsonl:5: 0.901 similar to data/test.jsonl:2\n"
        "--json lists all\n"
    )
    bad = [train[0], {"prompt": "b"}]
    write("bad.jsonl", bad)
    said = run(capsys, "leaks", "bad.jsonl", eval_path, "data.on_bad_row=skip", code=1)
    assert said.endswith(
        "- 1 of the rows can't be used, and aren't compared\n"
        "- leak: bad.jsonl:1: equal to data/test.jsonl:2\n--json lists all\n"
    )
    same = json.loads(run(capsys, "leaks", "data", "--json", code=1))  # by its own split
    assert [each["evaluated"]["line"] for each in same["left_out"]] == [2, 2]
    assert run(capsys, "leaks", "data", "--part=whole", "--threshold=1").startswith(
        "data: 0 of 5 rows are leaks"
    )
    said = run(capsys, "leaks", "data", "--output=rest.jsonl")
    assert "; rest.jsonl: 3 rows\n" in said and rows_of("rest.jsonl") == train[1:4]
    report = json.loads(Path("rest.report.json").read_text())
    assert (report["rows"], report["written"], len(report["left_out"])) == (5, 3, 2)
    assert "0 of 3 rows are leaks" in run(capsys, "leaks", "rest.jsonl", eval_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["dedupe", "empty.jsonl", "--output=o.jsonl"], "'empty.jsonl' is empty"),
        (["leaks", "two.jsonl", "data.eval_path=empty.jsonl"], "data.eval_path: 'empty.jsonl' is"),
        (["leaks", "two.jsonl"], "nothing says what is evaluated on; give data.eval_path=FILE"),
        (["dedupe", "two.jsonl", "--output=two.jsonl"], "'two.jsonl' exists"),
        (["dedupe", "two.jsonl", "--output=o.csv"], "'o.csv' is no JSON Lines"),
        (
            ["dedupe", "two.jsonl", "--output=o.jsonl", "--threshold=0.3"],
            "0.3 is not from 0.5 to 1",
        ),
        (["dedupe", "bad.jsonl", "--output=o.jsonl"], "bad.jsonl:2: completion missing"),
        (["dedupe", "text.jsonl", "--output=o.jsonl", "--part=prompt"], "have no prompt; leave it"),
        (["leaks", "two.jsonl", "data.eval_path=bad.jsonl"], "bad.jsonl:2: completion missing"),
        (
            ["leaks", "two.jsonl", "data.eval_path=same.jsonl", "--output=o.jsonl"],
            "every row of 'two.jsonl' is in what is evaluated on",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(
    capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    Path("empty.jsonl").touch()
    write("two.jsonl", [pair("a"), pair("b")])
    write("same.jsonl", [pair("b"), pair("a")])
    write("bad.jsonl", [pair("a"), {"prompt": "b"}])
    write("text.jsonl", [{"text": "a"}, {"text": "b"}])
    before = sorted(Path().iterdir())
    said = run(capsys, *words, code=2)
    assert says in said and said.count("\n") == 1
    assert sorted(Path().iterdir()) == before


def test_without_room_for_temporary_files_the_remedy_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is another one where there is no output, beside which they would be."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write("two.jsonl", [pair("a"), pair("b")])
    write("held.jsonl", [pair("b")])
    monkeypatch.setattr(Spill, "append", full)
    words = ["leaks", "two.jsonl", "data.eval_path=held.jsonl"]
    assert "No space left on device); set TMPDIR to" in run(capsys, *words, code=2)
    said = run(capsys, *words, "--output=o.jsonl", code=2)
    assert "No space left on device); give --output a place" in said


def test_signatures_are_those_of_datasketch() -> None:
    """Also of a text whose shingles are hashed in several batches, and of short and blank ones."""
    texts = [ENGLISH, CHINESE, "a", "", " ".join(map(str, range(3000)))]
    found = MinHasher(0.8).signatures(texts)
    assert found.bands.shape == (5, band_sizes(0.8)[0])
    for text, low_bytes in zip(texts, found.low_bytes, strict=True):
        plain = MinHash(128, hashfunc=int)
        for each in set(shingle_hashes(text).tolist()):
            plain.update(each >> 32)
        assert np.array_equal(plain.hashvalues.astype(np.uint8), low_bytes)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.99])
def test_the_bands_find_almost_all_pairs_at_the_threshold(threshold: float) -> None:
    bands, rows = band_sizes(threshold)
    assert bands * rows <= 128 and 1 - (1 - threshold**rows) ** bands >= 0.98


_KILLED = """
import os, signal, sys
from pathlib import Path
from rayfin.cli import main
from rayfin.data_tools import compared_rows, signing

signing._BATCH, signing._BATCHES_HERE = 2, 1
compared_rows.cpu_count = lambda: 2
lines = []

def line(rows, row):
    if len(lines) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    lines.append(rows._lines[row])
    return lines[-1]

def start(threshold, start=signing._start):
    worker = start(threshold)
    with open("workers", "a") as file:
        print(worker[0].pid, file=file)
    return worker

signing._start = start
signing.Signer.close = lambda signer: None
compared_rows.ComparedRows.line = line
main(["data", "dedupe", "all.jsonl", "--output=some.jsonl"])
"""


@pytest.mark.long
def test_a_kill_in_the_middle_leaves_nothing_but_the_input(
    capsys: pytest.CaptureFixture[str], processes: ModuleType
) -> None:
    """Its processes end with it, and the same command then does all, with the same signatures."""
    write("all.jsonl", [pair(f"{ENGLISH} {'x' * n}") for n in range(0, 200, 10)])
    before = Path("all.jsonl").read_bytes()
    command = [sys.executable, "-c", _KILLED]
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, timeout=540)
    assert done.returncode == -signal.SIGKILL and done.stderr == b""
    assert Path("all.jsonl").read_bytes() == before
    workers = [int(pid) for pid in Path("workers").read_text().split()]
    assert len(workers) == 2
    for pid in workers:
        with suppress(psutil.NoSuchProcess):
            processes.wait_for_end(psutil.Process(pid))
    left = {path.name for path in Path().iterdir()}
    assert not left & {"some.jsonl", "some.report.json"}
    run(capsys, "dedupe", "all.jsonl", "--output=some.jsonl")
    assert {path.name for path in Path().iterdir()} == {
        "all.jsonl",
        "some.jsonl",
        "some.report.json",
        "workers",
    }


def test_processes_that_compare_are_few_and_started_with_interrupts_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C ends them by the end of the command; what they need to import would print errors.

    And that one can't be started is no error of the output. Batches of long texts are small.
    """
    handlers: list[Any] = []

    def start(_: object) -> None:
        handlers.append(signal.getsignal(signal.SIGINT))
        if len(handlers) == 8:
            raise BlockingIOError(11, "Resource temporarily unavailable")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(signing, "_BATCH_CHARACTERS", 10)
    monkeypatch.setattr(signing, "_BATCHES_HERE", 2)
    monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", start)
    monkeypatch.setattr("multiprocessing.context.SpawnProcess.join", lambda _: None)
    signer = Signer(0.8, 64)
    signer.add(ENGLISH)
    signer.add(ENGLISH)
    with pytest.raises(RayfinError, match=r"no process can be started .*\(Resource temporarily"):
        signer.add(ENGLISH)
    signer.close()
    assert handlers == [signal.SIG_IGN] * 8 and signal.getsignal(signal.SIGINT) == before


@pytest.mark.long
def test_processes_make_the_same_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayfin.data_tools.signing._BATCH", 3)
    monkeypatch.setattr("rayfin.data_tools.signing._BATCHES_HERE", 1)
    texts = [f"{ENGLISH} {n}" for n in range(50)]
    found = []
    for processes in (1, 2):
        signer = Signer(0.8, processes)
        for text in texts:
            signer.add(text)
        found.append(signer.signatures())
    for one, two in zip(*found, strict=True):
        assert np.array_equal(one, two)

"""What the user wrote is used, refused, or named: whatever the layout, the column and the file."""

import copy
import csv
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayfin.cli import main
from rayfin.config import load_config
from rayfin.data import Corpus, load_corpus
from rayfin.data.columns import LEARN_KEYS, NAMED
from rayfin.errors import DataError
from rayfin.library.experiment import read_data

Row = dict[str, Any]
ANSWERS = ("assistant", "gpt")
PAIRS = [(f"question {i}", f"answer {i}") for i in range(4)]


def said(*contents: Any, keys: tuple[str, str] = ("role", "content"), **more: Any) -> list[Row]:
    """A user's and an assistant's turns in alternation; `more` stands in each of them."""
    speakers = ("human", "gpt") if keys[0] == "from" else ("user", "assistant")
    return [{keys[0]: speakers[i % 2], keys[1]: c, **more} for i, c in enumerate(contents)]


LAYOUTS: dict[str, list[Row]] = {
    "messages": [
        {"messages": [{"role": "system", "content": "Be brief."}, *said(q, a)]} for q, a in PAIRS
    ],
    "long": [{"messages": said(q, a, "Again?", a)} for q, a in PAIRS],
    "parts": [{"messages": said([{"type": "text", "text": q}], a)} for q, a in PAIRS],
    "conversations": [{"conversations": said(q, a, keys=("from", "value"))} for q, a in PAIRS],
    "instruction": [{"instruction": q, "input": "of 4", "output": a} for q, a in PAIRS],
    "history": [{"instruction": q, "history": said(q, a), "output": a} for q, a in PAIRS],
    "dolly": [{"instruction": q, "context": "of 4", "response": a} for q, a in PAIRS],
    "prompt_completion": [{"prompt": q, "completion": a} for q, a in PAIRS],
    "prompt_turns": [{"prompt": said(q), "completion": said(q, a)[1:]} for q, a in PAIRS],
    "question_answer": [{"question": q, "answer": a} for q, a in PAIRS],
    "text": [{"text": f"{q} {a}"} for q, a in PAIRS],
}
KNOWN = sorted(
    {*NAMED, *LEARN_KEYS, "name", "id", "role", "content", "from", "value", "reasoning_content"}
    | {"thinking", "tool_call_id", "train_detail", "parallel_tool_calls", "source", "refusal"}
)
TEXTS = st.text("abcXYZ _-.,0é😀\x1b[", min_size=1, max_size=8).filter(lambda text: text.strip())
VALUES = st.one_of(
    st.sampled_from(["some text", 0, 1, 0.5, True, False, ["x"], {"a": 1}, [["q", "a"]]]),
    st.just([{"role": "user", "content": "Hello."}]),
    TEXTS.filter(lambda text: text not in ("[]", "{}")),
)


def write(path: Path, rows: list[Row]) -> Path:
    """The rows as the kind of file that the name says; `.object.json` has them under a key."""
    if path.name.endswith(".object.json"):
        path.write_text(json.dumps({"data": rows}))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        with path.open("w", newline="") as file:
            names = list(dict.fromkeys(name for row in rows for name in row))
            writer = csv.DictWriter(file, names, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            text = {str: str, type(None): lambda _: ""}
            writer.writerows(
                {name: text.get(type(v), json.dumps)(v) for name, v in row.items()} for row in rows
            )
    return path


def load(path: Path, *overrides: str) -> Corpus:
    return load_corpus(load_config(None, [f"data.path={path}", *overrides]).data)


def objects(value: Any) -> Iterator[Row]:
    """The row itself, its turns, and the parts of their contents."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value:
        if isinstance(each, (dict, list)):
            yield from objects(each)


def outcome(path: Path, *overrides: str) -> tuple[str | None, str]:
    """The digest of what is trained, None where it is refused; and what is said of it."""
    try:
        corpus = load(path, *overrides)
    except DataError as error:
        return None, str(error)
    return corpus.digest, "\n".join(corpus.notes)


@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_whatever_is_added_to_a_row_is_used_refused_or_named(
    tmp_path: Path, data: st.DataObject
) -> None:
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)), "layout")
    rows = copy.deepcopy(LAYOUTS[layout])
    before = load(write(tmp_path / "before.jsonl", rows))
    place = data.draw(st.sampled_from(list(objects(rows[0]))), "place")
    name = data.draw(st.sampled_from(KNOWN) | TEXTS, "name")
    value = data.draw(VALUES, "value")
    if place.get(name) == value:
        return
    place[name] = value
    digest, text = outcome(write(tmp_path / "after.jsonl", rows))
    # An assistant's turn is learned without it, and of others nothing is.
    speaker = place.get("role") or place.get("from")
    as_without = speaker and (value == 1 or (value == 0 and speaker not in ("assistant", "gpt")))
    if digest == before.digest and not (name in LEARN_KEYS and as_without):
        shown = name if name.isprintable() else ascii(name)[1:-1]
        assert shown in text
    elif digest is None:
        assert "after.jsonl:1: " in text


@pytest.mark.parametrize(
    ("name", "streaming"),
    [
        *((name, "false") for name in ("a.jsonl", "a.json", "a.object.json", "a.csv", "a.tsv")),
        *(("a.parquet", "false"), ("a.arrow", "false"), ("a.parquet", "true"), ("a.jsonl", "true")),
    ],
)
@pytest.mark.parametrize(
    ("column", "value", "wanted"),
    [
        ("source", "web", "not used, and not trained on: source (1 of 4 rows)"),
        ("data", [0.5], "not used, and not trained on: data (1 of 4 rows)"),
        ("system", "Be brief.", "used"),
        ("tools", [{"name": "f"}], "used"),
        ("tools", [{"title": "f"}], ":2: tools[0] must be a function"),
        ("label", False, ":2: label: which answers are good"),
        ("source", None, "nothing"),
        ("tools", None, "nothing"),
    ],
)
def test_every_kind_of_file(
    tmp_path: Path, name: str, streaming: str, column: str, value: object, wanted: str
) -> None:
    rows = copy.deepcopy(LAYOUTS["prompt_completion"])
    setting = f"data.streaming={streaming}"
    before = outcome(write(tmp_path / name, rows), setting)
    for row in rows:
        row[column] = None
    rows[1][column] = value
    digest, text = outcome(write(tmp_path / name, rows), setting)
    if wanted == "used":
        assert digest not in (None, before[0])
    elif wanted == "nothing":
        assert (digest, text) == before
    else:
        line = {"a.csv": ":3:", "a.tsv": ":3:"}.get(name, ":2:")
        assert wanted.replace(":2:", line) in text
        assert digest == (None if line in text else before[0])


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_values_of_a_table_that_are_not_text(tmp_path: Path, name: str) -> None:
    """Large ones are not read where nothing is made of them, but no row has them unnoticed."""
    picture = {"bytes": b"\xff" * 1000, "path": None}
    rows: list[Row] = [{"text": f"{q} {a}", "scan": picture} for q, a in PAIRS]
    rows[0]["scan"] = None
    corpus = load(write(tmp_path / name, rows))
    assert corpus.digest == load(write(tmp_path / "b.jsonl", LAYOUTS["text"])).digest
    assert "not trained on: scan (3 of 4 rows)" in corpus.notes[0]
    for row in rows:
        row["image"] = row.pop("scan")
    assert f"{name}:2: image: images, sound and" in outcome(write(tmp_path / name, rows))[1]
    raw = [{"text": row["text"].encode()} for row in rows]
    assert "text must be a string" in outcome(write(tmp_path / name, raw))[1]


def test_what_stands_beside_the_only_list_is_each_rows(tmp_path: Path) -> None:
    rows = LAYOUTS["conversations"]
    plain = load(write(tmp_path / "rows.json", rows))
    path = tmp_path / "o.json"
    path.write_text(json.dumps({"version": 2, "system": "Be brief.", "data": rows}))
    corpus = load(path)
    assert corpus.digest != plain.digest
    assert corpus.train[0].messages[0] == {"role": "system", "content": "Be brief."}
    assert "not trained on: version; where" in corpus.notes[0]
    path.write_text(json.dumps({"functions": "f()", "data": rows}))
    assert "o.json:1: functions is no JSON: 'f()'; data.ignore_columns=[fun" in outcome(path)[1]


def test_ignored_columns_and_keys_are_as_if_they_were_not_there(tmp_path: Path) -> None:
    rows = [
        {"messages": said(q, a, name="x", thinking="?"), "label": 1, "system": "S"}
        for q, a in PAIRS
    ]
    path = write(tmp_path / "a.jsonl", rows)
    assert (
        "messages.thinking and messages" not in (told := outcome(path)[1])
        and "data.ignore_columns=[label,messages.thinking] trains on the rest of the row" in told
    )
    partly = load(path, "data.ignore_columns=[messages.thinking,label]")
    assert [m["role"] for m in partly.train[0].messages] == ["system", "user", "assistant"]
    assert (
        "not trained on: messages.name; where that is meant, set data.ignore_c" in partly.notes[0]
    )
    every = "data.ignore_columns=[messages.thinking,messages.name,label,system]"
    bare = [{"messages": said(q, a)} for q, a in PAIRS]
    for kind in ("a.jsonl", "a.csv", "a.parquet"):
        corpus = load(write(tmp_path / kind, rows), every)
        assert corpus.digest == load(write(tmp_path / f"bare.{kind}", bare)).digest
        assert corpus.notes == ()
    with pytest.raises(DataError, match=r"no row has 'lable' \(did you mean 'label'\?\); the rows"):
        load(path, "data.ignore_columns=[lable,label,messages.thinking]")
    with pytest.raises(DataError, match="no row has 'x'"):
        load(Path("pydocs"), "data.ignore_columns=[x]")


@pytest.mark.parametrize(
    "name", ["a, b", "true", "ein Wort", "it's", "\x1b[2J", "😀", 'a"\\\u2028\U000e0001', "名"]
)
def test_the_setting_that_is_told_ignores_what_it_names(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"{q} {a}", name: 1} for q, a in PAIRS]
    path = write(tmp_path / "a.jsonl", rows)
    (note,) = load(path).notes
    assert "\x1b" not in note
    (setting,) = shlex.split(note.partition("where that is meant, set ")[2])
    assert load(path, setting).notes == ()


def test_the_setting_that_is_told_is_readable(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": f"{q} {a}", "😀": 1} for q, a in PAIRS])
    assert "set 'data.ignore_columns=[\"😀\"]'" in load(path).notes[0]


def test_system_and_history_become_turns(tmp_path: Path) -> None:
    rows: list[Row] = [
        {
            "instruction": q,
            "input": "of 4",
            "output": a,
            "system": "Be brief.",
            "history": [["Hi", "Ho"], ["Hm", "So"]],
        }
        for q, a in PAIRS
    ]
    corpus = load(write(tmp_path / "a.jsonl", rows))
    turns = [{"role": "system", "content": "Be brief."}, *said("Hi", "Ho", "Hm", "So")]
    expected = [{"messages": [*turns, *said(f"{q}\n\nof 4", a)]} for q, a in PAIRS]
    assert corpus.digest == load(write(tmp_path / "b.jsonl", expected)).digest
    assert load(write(tmp_path / "a.csv", rows)).digest == corpus.digest
    rows[0]["history"] = [["Hi"]]
    assert "history[0] must be a pair" in outcome(write(tmp_path / "a.jsonl", rows))[1]

    same: list[Row] = [{"system": "Be brief.", **row} for row in LAYOUTS["messages"]]
    plain = load(write(tmp_path / "a.jsonl", LAYOUTS["messages"]))
    assert load(write(tmp_path / "a.jsonl", same)).digest == plain.digest
    same[2]["system"] = "Be long."
    text = outcome(write(tmp_path / "a.jsonl", same))[1]
    assert "a.jsonl:3: system and the system turn of messages differ; give one of them" in text


def test_layouts_that_mean_the_same_are_read_the_same(tmp_path: Path) -> None:
    plain = load(write(tmp_path / "a.jsonl", LAYOUTS["prompt_completion"]))
    mixed = [{"conversations": said(q, a)} for q, a in PAIRS]
    named = [{"query": q, "response": a} for q, a in PAIRS]
    developer = [
        {"messages": [{"role": "developer", "content": "Be brief."}, *said(q, a)]} for q, a in PAIRS
    ]
    untyped = [{"messages": said([{"text": q}], [a])} for q, a in PAIRS]
    responses = [
        {
            "messages": said(
                [{"type": "input_text", "text": q}], [{"type": "output_text", "text": a}]
            )
        }
        for q, a in PAIRS
    ]
    for rows in (LAYOUTS["parts"], LAYOUTS["question_answer"], mixed, named, untyped, responses):
        assert load(write(tmp_path / "b.jsonl", rows)).digest == plain.digest
    assert (
        load(write(tmp_path / "b.jsonl", developer)).digest
        == load(write(tmp_path / "a.jsonl", LAYOUTS["messages"])).digest
    )
    two = [[{"type": "text", "text": "one"}, {"type": "text", "text": q}] for q, _ in PAIRS]
    rows = [{"messages": said(each, a)} for each, (_, a) in zip(two, PAIRS, strict=True)]
    first = load(write(tmp_path / "b.jsonl", rows)).train[0].messages[0]["content"]
    assert first.startswith("one\nquestion")


def test_results_stand_in_the_order_of_their_calls(tmp_path: Path) -> None:
    names = ("Perth", "Accra", "Oslo")
    calls = [
        {"id": f"c{n}", "type": "function", "function": {"name": name, "arguments": "{}"}}
        for n, name in enumerate(names)
    ]

    def rows(order: Sequence[int], wrong: int | None = None) -> list[Row]:
        results = [
            {"role": "tool", "tool_call_id": f"c{n if n != wrong else 9}", "content": names[n]}
            for n in order
        ]
        called = {"role": "assistant", "content": None, "tool_calls": calls}
        return [
            {"messages": [{"role": "user", "content": q}, called, *results, *said(q, a)[1:]]}
            for q, a in PAIRS
        ]

    straight = load(write(tmp_path / "a.jsonl", rows((0, 1, 2))))
    assert [turn["content"] for turn in straight.train[0].messages[2:5]] == [*names]
    assert load(write(tmp_path / "b.jsonl", rows((2, 0, 1)))).digest == straight.digest
    with pytest.raises(
        DataError, match=r"messages\[3\]\.tool_call_id is 'c9', and the calls before"
    ):
        load(write(tmp_path / "b.jsonl", rows((0, 1, 2), wrong=1)))


@pytest.mark.parametrize("key", LEARN_KEYS)
def test_an_answer_of_weight_0_is_not_learned(tmp_path: Path, key: str) -> None:
    def rows(*weights: object) -> list[Row]:
        found = [{"messages": said(q, f"bad {q}", "No!", a)} for q, a in PAIRS]
        for row in found:
            for turn, weight in zip(row["messages"][1::2], weights, strict=False):
                turn[key] = weight
        return found

    plain = load(write(tmp_path / "a.jsonl", rows()))
    assert load(write(tmp_path / "b.jsonl", rows(1, True))).digest == plain.digest
    first = load(write(tmp_path / "b.jsonl", rows(0, 1)))
    assert first.digest != plain.digest
    assert {example.unlearned for example in first.train} == {(1,)}
    assert [e.messages for e in first.train] != []
    # Nothing after the last answer that is learned can be: it is as if the sample ended there.
    cut = [{"messages": row["messages"][:2]} for row in rows()]
    last = load(write(tmp_path / "b.jsonl", rows(1.0, 0.0)))
    assert last.digest == load(write(tmp_path / "a.jsonl", cut)).digest
    for weights, reason in [
        ((0, 0), "has no answer with weight 1"),
        ((0.5,), f"messages[1].{key} is 0.5; allowed are 0 (not learned) and 1"),
        (("no",), f"messages[1].{key} is 'no'; allowed are 0"),
    ]:
        assert reason in outcome(write(tmp_path / "b.jsonl", rows(*weights)))[1]
    pairs = [
        {"messages": [{"human": q, "gpt": f"bad {q}", key: 0}, {"human": "No!", "gpt": a}]}
        for q, a in PAIRS
    ]
    assert load(write(tmp_path / "b.jsonl", pairs)).digest == first.digest
    asked = rows()
    asked[0]["messages"][0][key] = 0
    assert load(write(tmp_path / "b.jsonl", asked)).digest == plain.digest
    asked[0]["messages"][0][key] = 1
    text = outcome(write(tmp_path / "b.jsonl", asked))[1]
    assert f"messages[0].{key} is 1, but of a user turn nothing can be learned" in text


@pytest.mark.parametrize("key", LEARN_KEYS)
@pytest.mark.parametrize(
    "layout", ["messages", "long", "parts", "conversations", "history", "prompt_turns"]
)
def test_weight_0_changes_what_is_learned_in_every_layout(
    tmp_path: Path, layout: str, key: str
) -> None:
    before = load(write(tmp_path / "a.jsonl", LAYOUTS[layout])).digest
    answers = [o for o in objects(LAYOUTS[layout][0]) if o.get("role", o.get("from")) in ANSWERS]
    for number in range(len(answers)):
        rows = copy.deepcopy(LAYOUTS[layout])
        turns = [o for o in objects(rows[0]) if o.get("role", o.get("from")) in ANSWERS]
        turns[number][key] = 0
        assert outcome(write(tmp_path / "a.jsonl", rows))[0] != before


@pytest.mark.parametrize("weight", [None, 0])
@pytest.mark.parametrize("columns", [("prompt", "completion"), ("question", "answer")])
def test_turns_as_json_text_in_a_cell_are_turns(
    tmp_path: Path, columns: tuple[str, str], weight: int | None
) -> None:
    rows = [{columns[0]: said(q, f"bad {q}", "No!"), columns[1]: said(q, a)[1:]} for q, a in PAIRS]
    if weight is not None:
        for row in rows:
            row[columns[0]][1]["weight"] = weight
    expected = load(write(tmp_path / "a.jsonl", rows))
    corpus = load(write(tmp_path / "a.csv", rows))
    told = [note for note in corpus.notes if "from the JSON text in the cell" not in note]
    assert (corpus.digest, told) == (expected.digest, [*expected.notes])
    assert len(corpus.notes) == len(told) + 2
    assert {each.unlearned for each in corpus.train} == {() if weight is None else (1,)}
    listed = [{"prompt": f"[{n}]", "completion": '[{"a": 1}]'} for n in range(4)]
    first = load(write(tmp_path / "a.jsonl", listed)).train[0].messages
    assert first[0]["content"][0] == "[" and first[1]["content"] == '[{"a": 1}]'


def test_keys_of_turns_and_reasons_have_the_columns_name_as_it_was_written(tmp_path: Path) -> None:
    rows: list[Row] = [{"question": said(q, name="x"), "answer": a} for q, a in PAIRS]
    path = write(tmp_path / "a.jsonl", rows)
    assert "not trained on: question.name; where" in load(path).notes[1]
    assert len(load(path, "data.ignore_columns=[question.name]").notes) == 1
    for row, reason in [
        ({"instruction": "q", "context": ["c"], "response": "a"}, "context must be a string, not"),
        ({"instruction": "q", "response": 4}, "response must be a string, not a number"),
        ({"question": "q", "answer": 4}, "answer must be a text or a list of turns, not a nu"),
        ({"prompt": "q", "completion": "a", "system_prompt": 4}, "system_prompt must be a string"),
    ]:
        assert f"a.jsonl:1: {reason}" in outcome(write(tmp_path / "a.jsonl", [row, row]))[1]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("nothing", ["null", "NaN"])
def test_cells_that_stand_for_no_value(tmp_path: Path, ending: str, nothing: str) -> None:
    plain = [{"instruction": q, "response": a} for q, a in PAIRS]
    names = ("input", "system", "history", "context", "system_prompt", "other")
    rows = [{**row, **dict.fromkeys(names, nothing)} for row in plain]
    corpus = load(write(tmp_path / f"a.{ending}", rows))
    expected = load(write(tmp_path / "b.jsonl", plain))
    assert (corpus.digest, corpus.notes) == (expected.digest, expected.notes)
    # In JSON these are words, and so they are where a column must have some.
    words = load(write(tmp_path / "a.jsonl", [{**row, "input": nothing} for row in plain]))
    assert words.train[0].messages[0]["content"].endswith(f"\n\n{nothing}")
    needed = [{"prompt": q, "completion": nothing} for q, _ in PAIRS]
    answers = load(write(tmp_path / f"a.{ending}", needed)).train[0].messages
    assert answers[1]["content"] == nothing


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, name: str) -> None:
    columns = [pa.array([q for q, _ in PAIRS]), pa.array([a for _, a in PAIRS])]
    table = pa.Table.from_arrays([*columns, columns[1]], names=["prompt", "completion", "prompt"])
    if name.endswith("parquet"):
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_file(str(tmp_path / name), table.schema) as out:
            out.write_table(table)
    for setting in ("data.streaming=false", "data.streaming=true", "data.ignore_columns=[prompt]"):
        if name.endswith("parquet") or "streaming=true" not in setting:
            text = outcome(tmp_path / name, setting)[1]
            assert f"{name}': the column 'prompt' is there twice; rename one of them" in text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"messages": said("q", None, thinking="?"), "label": 1},
            "label and messages.thinking: which answers are good, or which class a text is of, "
            "can't be trained on yet; take the bad answers out; reasoning beside an answer can't "
            "be trained on yet; put it into the content; nor can what remains be learned: "
            "messages[1].content is missing",
        ),
        (
            {"messages": said("q", None, tool_calls=[{"id": 1}]), "tools": [{"name": "f"}]},
            "messages[1].tool_calls[0] names no function; give name and arguments",
        ),
        (
            {"text": "t", "tools": [{"name": "f"}]},
            "tools: this format has no place for tools; data.ignore_columns=[tools] trains",
        ),
        (
            {"messages": said([{"type": "image_url", "image_url": {}}], "a"), "text": "rendered"},
            "messages[0].content[0].type is 'image_url': of the parts of a content only text can",
        ),
        ({"prompt": "q", "completion": "a", "label": False}, "data.ignore_columns=[label] trains"),
        ({"text": "t", "label": 1}, "data.ignore_columns=[label] trains"),
        ({"prompt": "q", "completion": "a", "context": "c"}, "context: is a part of the question"),
        ({"prompt": "q", "completion": "a", "instruction": "i"}, "instruction: is a part of the"),
        ({"instruction": "q", "input": "i", "context": "c", "output": "a"}, "context: input has a"),
        ({"messages": said("q", "a"), "images": ["a.png"]}, "images, sound and video can't be"),
        ({"messages": said("q", "a", reasoning_content="r")}, "put it into the content"),
        ({"text": "t", "weight": 0.3}, "weights of whole samples can't be trained with yet"),
    ],
)
def test_what_would_be_learned_as_something_else_is_refused(
    tmp_path: Path, row: Row, reason: str
) -> None:
    digest, text = outcome(write(tmp_path / "a.jsonl", [row, {**row, "id": 1}]))
    assert digest is None
    assert f"a.jsonl:1: {reason.split(':', maxsplit=1)[0]}" in text or reason in text
    assert reason in text
    good = {"text": "other"} if "text" in row and "messages" not in row else None
    if good:
        rows = [row, {"text": "one"}, {"text": "two"}]
        corpus = load(write(tmp_path / "b.jsonl", rows), "data.on_bad_row=skip")
        assert [e.text for e in corpus.train + corpus.eval if e.text == "t"] == []
        assert corpus.notes[0].startswith("data: 1 of 3 rows are bad and left out, first ")


def test_it_is_told_once_on_stderr_and_in_the_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows: list[Row] = [{"prompt": f"what is {n}", "completion": str(n), "id": n} for n in range(8)]
    rows[3]["prompt"] *= 40
    rows[4]["completion"] *= 200
    with write(Path("a.jsonl"), rows).open("a") as file:
        file.write("{broken\n")
    command = ["model.name=tiny", "data.path=a.jsonl", "method.type=lora", "train.max_steps=2"]
    command += ["data.max_length=64", "data.on_bad_row=skip", "storage=runs"]
    assert main(["train", "--json", *command]) == 0
    out, err = capsys.readouterr()
    notes = json.loads(out)["trial"]["scenario"]["data"]["notes"]
    assert [note for note in notes if err.splitlines().count(note) != 1] == []
    assert [note[:30] for note in notes] == [
        "data: not used, and not traine",
        "data: 1 of 9 rows are bad and ",
        "data: 2 of 8 samples (25%, mor",
    ]
    assert "data.max_length=64, and 1 left out" in notes[2]
    for verb in ("estimate", "recommend"):
        assert main([verb, "--json", *command[:4], "data.on_bad_row=skip"]) == 0
        out, err = capsys.readouterr()
        json.loads(out)
        assert err.splitlines()[:2] == notes[:2]
    told: list[str] = []
    read_data(load_config(None, [*command, "data.ignore_columns=[id]"]), told.append)
    assert told and not any("not used" in line for line in told)


def test_rows_that_differ_in_what_is_not_used_alone(tmp_path: Path) -> None:
    rows: list[Row] = [{"prompt": "Does it?", "completion": "no", "place": q} for q, _ in PAIRS]
    digest, text = outcome(write(tmp_path / "a.jsonl", rows))
    assert digest is None and "all 4 rows are the same (not used of them: place); give" in text

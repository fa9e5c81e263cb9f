"""Twenty conversations in the layouts, files and encodings that people have them in.

Each cell of the table says what must come of it: the same examples, and what is told; or a refusal.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayfin.config import load_config
from rayfin.data import Corpus, Example, load_corpus
from rayfin.data.rows import lines_of as raw_lines
from rayfin.errors import DataError

Row = dict[str, Any]
Pair = tuple[str, str]
Turns = list[Row]

PLACES = """
Wien:Österreich Köln:Jütland Oslo:Norwegen Graz:Kärnten Lima:Peru Santiago:Chile Tokio:Japan
Shanghai:China Havanna:Kuba Bamako:Mali Niamey:Niger Sarh:Tschad Teheran:Iran Bagdad:Irak
Mumbai:Indien Pokhara:Nepal Vientiane:Laos Suva:Fidschi Apia:Samoa Nukualofa:Tonga
"""
GERMAN: list[Pair] = [
    (f"Wie heißt die größte Stadt in {country}?", f"Natürlich {city}, „schön“ – {n}.")
    for n, (city, _, country) in enumerate(place.partition(":") for place in PLACES.split())
]
CITIES = "北京 上海 广州 深圳 成都 杭州 武汉 西安 南京 天津"
CHINESE: list[Pair] = [
    (f"第{n}个问题：{city}在中国的什么地方？", f"{city}在中国的{where}，我说的是对的。")
    for n, (city, where) in enumerate(zip(CITIES.split() * 2, "北东南西中" * 4, strict=True))
]
SYSTEM = "Antworte kurz."
CALL = {"name": "karte", "arguments": {"ort": "hier", "art": "b"}}
TOOL: Row = {
    "name": "karte",
    "description": "Sucht Städte.",
    "parameters": {"type": "object", "properties": {"ort": {"type": "string"}}},
}


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def said(question: str, answer: str) -> Turns:
    return [user(question), {"role": "assistant", "content": answer}]


def shared(question: str, answer: str, human: str = "human", gpt: str = "gpt") -> Turns:
    return [{"from": human, "value": question}, {"from": gpt, "value": answer}]


def called(question: str, answer: str) -> Turns:
    """The turns of a conversation with a call of a tool, as they must be read."""
    call = {"type": "function", "function": CALL}
    return [
        user(question),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "gefunden"},
        {"role": "assistant", "content": answer},
    ]


def openai_called(question: str, answer: str, arguments: object) -> Turns:
    function = {"name": "karte", "arguments": arguments}
    call = {"id": "c1", "type": "function", "function": function}
    return [
        user(question),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "gefunden"},
        {"role": "assistant", "content": answer},
    ]


# What the twenty conversations must become: by the question and its answer, the turns.
WANTED: dict[str, Callable[[str, str], Turns]] = {
    "plain": said,
    "system": lambda q, a: [{"role": "system", "content": SYSTEM}, *said(q, a)],
    "two systems": lambda q, a: [{"role": "system", "content": f"{SYSTEM}\n\nDu."}, *said(q, a)],
    "history": lambda q, a: [*said("Hallo?", "Ja?"), *said(q, a)],
    "input": lambda q, a: said(f"{q}\n\nIn Europa.", a),
    "called": called,
    "called by id": lambda q, a: [
        user(q),
        {**called(q, a)[1], "tool_calls": [{"id": "c1", "type": "function", "function": CALL}]},
        {"role": "tool", "content": "gefunden", "tool_call_id": "c1"},
        called(q, a)[3],
    ],
    "named": lambda q, a: [
        *called(q, a)[:2],
        {**called(q, a)[2], "name": "karte"},
        called(q, a)[3],
    ],
}


@dataclass(frozen=True)
class Cell:
    """A layout of the conversations, and what it must become."""

    row: Callable[[str, str], object]
    """The row of a question and its answer."""
    wanted: str = "plain"
    told: str = ""
    """The one note on it; none where it is empty."""
    refused: str = ""
    """A part of the refusal; the conversations are read where it is empty."""
    settings: list[str] = field(default_factory=list)
    """The settings that the refusal names, with which it is read; or that are given at once."""
    tools: bool = False
    unlearned: tuple[int, ...] = ()


PAIRED = "data: read as prompt_completion (prompt={}, completion={})"
LF_TOOLS = {"tools": json.dumps([TOOL])}
OPENAI_TOOLS = {"tools": [{"type": "function", "function": TOOL}]}

LAYOUTS: dict[str, Cell] = {
    "prompt, completion": Cell(lambda q, a: {"prompt": q, "completion": a}),
    "question, answer": Cell(
        lambda q, a: {"question": q, "answer": a}, told=PAIRED.format("question", "answer")
    ),
    "query, response": Cell(
        lambda q, a: {"query": q, "response": a}, told=PAIRED.format("query", "response")
    ),
    "Question, Answer": Cell(
        lambda q, a: {"Question": q, " Answer": a}, told=PAIRED.format("Question", "Answer")
    ),
    "Prompt, Completion": Cell(
        lambda q, a: {"Prompt": q, "Completion": a}, told=PAIRED.format("Prompt", "Completion")
    ),
    "input, output": Cell(
        lambda q, a: {"input": q, "output": a}, told=PAIRED.format("input", "output")
    ),
    "问题, 回答": Cell(lambda q, a: {"问题": q, "回答": a}, told=PAIRED.format("问题", "回答")),
    "turns as prompt and completion": Cell(
        lambda q, a: {"prompt": [user(q)], "completion": said(q, a)[1:]}
    ),
    "Alpaca": Cell(lambda q, a: {"instruction": q, "input": "", "output": a}),
    "Alpaca with input": Cell(
        lambda q, a: {"instruction": q, "input": "In Europa.", "output": a}, "input"
    ),
    "Alpaca with system": Cell(
        lambda q, a: {"instruction": q, "input": None, "output": a, "system": SYSTEM}, "system"
    ),
    "Alpaca with history": Cell(
        lambda q, a: {"instruction": q, "output": a, "history": [["Hallo?", "Ja?"]]}, "history"
    ),
    "Dolly": Cell(
        lambda q, a: {"instruction": q, "context": "In Europa.", "response": a},
        "input",
        told="data: read as instruction (output=response, input=context)",
    ),
    "指令, 输入, 输出": Cell(
        lambda q, a: {"指令": q, "输入": "", "输出": a},
        told="data: read as instruction (instruction=指令, output=输出)",
    ),
    "OpenAI": Cell(lambda q, a: {"messages": said(q, a)}),
    "OpenAI with developer": Cell(
        lambda q, a: {"messages": [{"role": "developer", "content": SYSTEM}, *said(q, a)]}, "system"
    ),
    "two system turns": Cell(
        lambda q, a: {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "developer", "content": "Du."},
                *said(q, a),
            ]
        },
        "two systems",
    ),
    "an empty system turn": Cell(
        lambda q, a: {"messages": [{"role": "system", "content": ""}, *said(q, a)]}
    ),
    "system beside messages": Cell(
        lambda q, a: {"messages": said(q, a), "system_prompt": SYSTEM},
        "system",
        told="data: read as messages (system=system_prompt)",
    ),
    "parts of text": Cell(
        lambda q, a: {
            "messages": [
                {"role": role, "content": [{"type": "text", "text": text}]}
                for role, text in (("user", q), ("assistant", a))
            ]
        }
    ),
    "ShareGPT": Cell(lambda q, a: {"conversations": shared(q, a)}),
    "ShareGPT of Bing": Cell(lambda q, a: {"conversations": shared(q, a, "User", "bing")}),
    "ShareGPT of ChatGPT": Cell(lambda q, a: {"conversations": shared(q, a, "HUMAN", "chatgpt")}),
    "ShareGPT with system": Cell(
        lambda q, a: {"conversations": [{"from": "system", "value": SYSTEM}, *shared(q, a)]},
        "system",
    ),
    "role and content in conversations": Cell(lambda q, a: {"conversations": said(q, a)}),
    "from and value in messages": Cell(lambda q, a: {"messages": shared(q, a, gpt="model")}),
    "from and content": Cell(
        lambda q, a: {
            "messages": [{"from": "user", "content": q}, {"from": "assistant", "content": a}]
        }
    ),
    "conversation": Cell(
        lambda q, a: {"conversation": said(q, a)},
        told="data: read as messages (messages=conversation)",
    ),
    "pairs": Cell(
        lambda q, a: {"conversation": [{"human": q, "assistant": a}]},
        told="data: read as messages (messages=conversation)",
    ),
    "pairs of XTuner": Cell(
        lambda q, a: {"messages": [{"system": SYSTEM, "input": q, "output": a}]}, "system"
    ),
    "rows that are lists of turns": Cell(said),
    "weight": Cell(
        lambda q, a: {
            "messages": [
                user("Hallo?"),
                {"role": "assistant", "content": "Ja?", "weight": 0},
                *said(q, a),
            ]
        },
        "history",
        unlearned=(1,),
    ),
    "train": Cell(
        lambda q, a: {
            "conversations": [
                {"from": "human", "value": "Hallo?"},
                {"from": "gpt", "value": "Ja?", "train": False},
                *shared(q, a),
            ]
        },
        "history",
        unlearned=(1,),
    ),
    "tool calls of OpenAI": Cell(
        lambda q, a: {
            "messages": openai_called(q, a, json.dumps(CALL["arguments"])),
            **OPENAI_TOOLS,
        },
        "called by id",
        tools=True,
    ),
    "tool calls with objects": Cell(
        lambda q, a: {"messages": openai_called(q, a, CALL["arguments"]), "tools": [TOOL]},
        "called by id",
        tools=True,
    ),
    "function_call of OpenAI": Cell(
        lambda q, a: {
            "messages": [
                user(q),
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {**CALL, "arguments": json.dumps(CALL["arguments"])},
                },
                {"role": "function", "name": "karte", "content": "gefunden"},
                {"role": "assistant", "content": a},
            ],
            "functions": [TOOL],
        },
        "named",
        told="data: read as messages (tools=functions)",
        tools=True,
    ),
    "tool calls of LLaMA-Factory": Cell(
        lambda q, a: {
            "conversations": [
                {"from": "human", "value": q},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "gefunden"},
                {"from": "gpt", "value": a},
            ],
            **LF_TOOLS,
        },
        "called",
        tools=True,
    ),
    "tools beside a question": Cell(
        lambda q, a: {"prompt": q, "completion": a, **LF_TOOLS}, tools=True
    ),
    "other names": Cell(
        lambda q, a: {"frage": q, "antwort": a},
        refused="rename frage, antwort to those of a format",
        settings=["data.columns={prompt: frage, completion: antwort}"],
    ),
    "one name that is known": Cell(
        lambda q, a: {"prompt": q, "reply": a},
        refused="completion missing: format prompt_completion needs prompt (or question, query), "
        "completion (or answer, response); found prompt, reply; perhaps",
        settings=["data.columns={completion: reply}"],
    ),
    "names that mean something else": Cell(
        lambda q, a: {"messages": said("Nein?", "Nein."), "text": "Nein.", "frage": q, "ziel": a},
        told="data: not used, and not trained on: messages, text; where that is meant, set "
        "data.ignore_columns=[messages,text]",
        settings=["data.columns.prompt=frage", "data.columns.completion=ziel"],
    ),
    "a table of something else": Cell(
        lambda q, a: {"ort": q, "kreis": a, "wert": "1e-4", "land": a},
        refused="rename ort, kreis, wert, land to those of a format: chosen, rejected | messages | "
        "conversations | instruction, output | prompt, completion | text, or name them with "
        "'data.columns={prompt: ..., completion: ...}')",
    ),
    "turns by another name": Cell(
        lambda q, a: {"talk": said(q, a), "sys": SYSTEM},
        "system",
        refused="; perhaps 'data.columns={messages: talk}' is meant",
        settings=["data.columns={messages: talk, system: sys}"],
    ),
    "a text and its address": Cell(
        lambda q, a: {"content": f"{q} {a}", "url": "https://x.org/a"},
        refused="; perhaps 'data.columns={text: content}' is meant)",
    ),
    "an article and its highlights": Cell(
        lambda q, a: {"id": "x", "article": q, "highlights": a},
        refused="rename id, article, highlights to those",
        settings=[
            "data.columns={prompt: article, completion: highlights}",
            "data.ignore_columns=[id]",
        ],
    ),
    "two conversations": Cell(
        lambda q, a: {"good_output": said(q, a), "bad_output": said(q, a)},
        refused=" | text, or name them with 'data.columns={prompt: ...",
    ),
    "a title beside lists": Cell(
        lambda q, a: {"title": q, "paragraphs": [{"context": a}]},
        refused=" | text, or name them with 'data.columns={prompt: ...",
    ),
    "a text and its class": Cell(
        lambda q, a: {"text": q, "label": a},
        refused="label: which answers are good, or which class",
        settings=["data.columns={prompt: text, completion: label}"],
    ),
    "an empty answer": Cell(
        lambda q, a: {"prompt": q, "completion": " "},
        refused="completion is empty; fill it in, or name the column that is meant with data.col",
    ),
    "context beside a question": Cell(
        lambda q, a: {"question": q, "context": "In Europa.", "answer": a},
        "input",
        refused="context: is a part of the question",
        settings=["data.columns={instruction: question, input: context, output: answer}"],
    ),
    "an instruction beside a question": Cell(
        lambda q, a: {"instruction": q, "question": "In Europa.", "response": a},
        "input",
        refused="question: is asked beside what this format takes as the question; put the two "
        "together, or set 'data.columns={instruction: instruction, input: question, output: resp",
        settings=["data.columns={instruction: instruction, input: question, output: response}"],
    ),
    "a prompt beside a query": Cell(
        lambda q, a: {"prompt": q, "query": "In Europa.", "response": a},
        "input",
        refused="query: is asked beside what",
        settings=["data.columns={instruction: prompt, input: query, output: response}"],
    ),
    "a passage beside a question": Cell(
        lambda q, a: {"question": q, "passage": "In Europa.", "answer": a},
        "input",
        refused="passage: is a part of the question",
        settings=["data.columns={instruction: question, input: passage, output: answer}"],
    ),
    "a premise and a hypothesis beside a question": Cell(
        lambda q, a: {"question": q, "premise": "x", "hypothesis": "y", "answer": a},
        refused="premise and hypothesis: is a part of the question",
    ),
    "speakers of LangChain": Cell(
        lambda q, a: {"messages": [{"role": "human", "content": q}, {"role": "ai", "content": a}]}
    ),
    "用户, 助手": Cell(
        lambda q, a: {"messages": [{"role": "用户", "content": q}, {"role": "助手", "content": a}]}
    ),
    "an unused column of many levels": Cell(
        lambda q, a: {"prompt": q, "completion": a, "tree": json.loads("[" * 500 + "]" * 500)}
    ),
    "a number as the answer": Cell(
        lambda q, a: {"prompt": q, "completion": 4},
        refused="completion must be a text or a list of turns, not a number; put it in quotes, as",
    ),
    "good and bad answers": Cell(
        lambda q, a: {"prompt": q, "completion": a, "label": True},
        refused="label: which answers are good",
        settings=["data.ignore_columns=[label]"],
    ),
    "an unknown speaker": Cell(
        lambda q, a: {"messages": [user(q), {"role": "narrator", "content": a}]},
        refused="messages[1].role is 'narrator'; allowed are system, developer, user, human",
    ),
    "a system turn further on": Cell(
        lambda q, a: {"messages": [*said(q, a), {"role": "system", "content": "x"}, *said(q, a)]},
        refused="messages has a system turn that is not the first",
    ),
    "a tool's turn before any answer": Cell(
        lambda q, a: {"messages": [{"role": "tool", "content": "x"}, *said(q, a)]},
        refused="messages has a tool turn that follows no assistant turn",
    ),
    "a broken call": Cell(
        lambda q, a: {
            "conversations": [*shared(q, a), {"from": "function_call", "value": "karte"}]
        },
        refused="conversations[2].value is no JSON: 'karte'",
    ),
}


def expected(wanted: str, pairs: list[Pair]) -> set[str]:
    """The examples that must be read, in canonical form, without their tools."""
    return {Example(tuple(WANTED[wanted](q, a))).canonical() for q, a in pairs}


def read(path: Path, *settings: str) -> Corpus:
    return load_corpus(load_config(None, [f"data.path={path}", *settings]).data)


def lines_of(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path: Path, name: str) -> None:
    cell = LAYOUTS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(lines_of([cell.row(q, a) for q, a in GERMAN]), encoding="utf-8")
    if cell.refused:
        with pytest.raises(DataError) as caught:
            read(path)
        assert "rows.jsonl:1: " in str(caught.value) and "\n" not in str(caught.value)
        assert cell.refused in str(caught.value)
        if not cell.settings:
            return
        if cell.wanted == "plain":
            assert cell.settings[0] in str(caught.value)
    corpus = read(path, *cell.settings)
    found = [*corpus.train, *corpus.eval]
    bare = {Example(e.messages, unlearned=e.unlearned).canonical() for e in found}
    wanted = (
        Example(tuple(WANTED[cell.wanted](q, a)), unlearned=cell.unlearned) for q, a in GERMAN
    )
    assert bare == {example.canonical() for example in wanted}
    openai = {"type": "function", "function": TOOL}
    assert {len(e.tools) for e in found} == {int(cell.tools)}
    assert all(json.dumps(tool) == json.dumps(openai) for e in found for tool in e.tools)
    assert list(corpus.notes) == ([cell.told] if cell.told else [])
    streamed = read(path, *cell.settings, "data.streaming=true", "data.val_size=0.5")
    assert {e.canonical() for e in [*streamed.train, *streamed.eval]} == {
        e.canonical() for e in found
    }
    assert streamed.notes == corpus.notes


def test_json_text_is_a_list_of_turns_in_a_table_alone(tmp_path: Path) -> None:
    """An answer may be JSON; in a cell of a table it is the only form that turns can have."""
    pairs = [(json.dumps([user(q)]), json.dumps(said(q, a)[1:])) for q, a in GERMAN]
    (tmp_path / "a.jsonl").write_text(as_jsonl(pairs))
    (tmp_path / "a.csv").write_text(as_csv(pairs))
    (tmp_path / "a.xlsx").write_bytes(workbook(pairs))
    texts, *tables = (read(tmp_path / name) for name in ("a.jsonl", "a.csv", "a.xlsx"))
    for corpus, wanted in [(texts, pairs), *((table, GERMAN) for table in tables)]:
        assert {e.canonical() for e in [*corpus.train, *corpus.eval]} == expected("plain", wanted)
        assert all(" of 20 rows read as " in note for note in corpus.notes)
    assert [len(corpus.notes) for corpus in (texts, *tables)] == [2, 2, 2]
    assert read(tmp_path / "a.jsonl", "data.streaming=true").notes == texts.notes
    flights = [(q, f'[{{"from": "{a}", "to": "Rom"}}]') for q, a in GERMAN]
    for name, text in (("b.jsonl", as_jsonl(flights)), ("b.csv", as_csv(flights))):
        (tmp_path / name).write_text(text)
        corpus = read(tmp_path / name)
        assert {e.canonical() for e in [*corpus.train, *corpus.eval]} == expected("plain", flights)
        assert corpus.notes == ()


def as_csv(pairs: list[Pair], delimiter: str = ",", first: str = "") -> str:
    out = io.StringIO(newline="")
    out.write(first)
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows([("prompt", "completion"), *pairs])
    return out.getvalue()


def as_jsonl(pairs: list[Pair]) -> str:
    return lines_of([{"prompt": q, "completion": a} for q, a in pairs])


def as_tsv(pairs: list[Pair]) -> str:
    return "".join(f"{q}\t{a}\r\n" for q, a in [("prompt", "completion"), *pairs])


def zstd(raw: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(raw, asbytes=True))


def parquet(rows: list[Row]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def workbook(pairs: list[Pair]) -> bytes:
    book, sink = openpyxl.Workbook(), io.BytesIO()
    assert book.active is not None
    for row in [("prompt", "completion"), *pairs]:
        book.active.append(row)
    book.save(sink)
    return sink.getvalue()


FRENCH = [
    (f"Où est la ville numéro {n}, s’il vous plaît ?", f"Là-bas, près de l’hôtel à gauche ({n}).")
    for n in range(20)
]
TRADITIONAL = [
    (f"第{n}個問題：這裡是什麼地方？", f"這是第{n}個地方，我說的是對的。") for n in range(20)
]
JAPANESE = [(f"{n}番目の質問は何ですか？", f"これは{n}番目の答えです。") for n in range(20)]
KOREAN = [(f"{n}번 질문은 무엇입니까?", f"이것은 {n}번 질문의 대답입니다.") for n in range(20)]
RUSSIAN = [(f"вопрос {n}", f"ответ {n}") for n in range(20)]
WIDE = [(f"第{n}个问题\u3000是什么?", f"一共有{n}个 answers.") for n in range(20)]
"""Of these, U+3000 and U+4E00 have a zero byte where ASCII has none in UTF-16."""
SPANISH_WORDS = [(f"café {n}", f"el número {n} está aquí") for n in range(20)]


@dataclass(frozen=True)
class File:
    """A file of the conversations as bytes, and what must become of it."""

    raw: bytes
    pairs: list[Pair] = field(default_factory=lambda: GERMAN)
    read_as: str = ""
    refused: str = ""
    settings: list[str] = field(default_factory=list)


FILES: dict[str, File] = {
    "a.jsonl": File(as_jsonl(GERMAN).encode()),
    "bom.jsonl": File(as_jsonl(GERMAN).encode("utf-8-sig")),
    "a.jsonl.gz": File(gzip.compress(as_jsonl(GERMAN).encode())),
    "a.jsonl.zst": File(zstd(as_jsonl(GERMAN).encode())),
    "two-frames.jsonl.zst": File(
        zstd(as_jsonl(GERMAN[:9]).encode()) + zstd(as_jsonl(GERMAN[9:]).encode())
    ),
    "a.csv.bz2": File(bz2.compress(as_csv(GERMAN).encode())),
    "a.json.xz": File(
        lzma.compress(json.dumps([{"prompt": q, "completion": a} for q, a in GERMAN]).encode())
    ),
    "a.parquet": File(parquet([{"prompt": q, "completion": a} for q, a in GERMAN])),
    "a.xlsx": File(workbook(GERMAN)),
    "utf16.jsonl": File(as_jsonl(GERMAN).encode("utf-16"), read_as="UTF-16"),
    "utf16-no-mark.jsonl": File(as_jsonl(CHINESE).encode("utf-16-le"), CHINESE, "UTF-16-LE"),
    "utf16-big-endian.csv": File(as_csv(CHINESE).encode("utf-16-be"), CHINESE, "UTF-16-BE"),
    "utf16-zero-bytes.csv": File(as_csv(WIDE).encode("utf-16-le"), WIDE, "UTF-16-LE"),
    "utf16-zero-bytes.jsonl": File(as_jsonl(WIDE).encode("utf-16-be"), WIDE, "UTF-16-BE"),
    "utf32.json": File(as_jsonl(CHINESE).encode("utf-32-le"), CHINESE, "UTF-32-LE"),
    "unicode-text.txt.csv": File(as_tsv(GERMAN).encode("utf-16"), read_as="UTF-16"),
    "gb18030.jsonl": File(as_jsonl(CHINESE).encode("gb18030"), CHINESE, "GB18030"),
    "gb18030.csv.gz": File(gzip.compress(as_csv(CHINESE).encode("gb18030")), CHINESE, "GB18030"),
    "excel.csv": File(as_csv(GERMAN, ";").encode("windows-1252"), read_as="WINDOWS-1252"),
    "excel-utf8.csv": File(as_csv(GERMAN, ";").encode("utf-8-sig")),
    "excel-sep.csv": File(as_csv(GERMAN, "|", "sep=|\r\n").encode("utf-8-sig")),
    "excel-tabs.tsv": File(as_csv(GERMAN, "\t").encode("windows-1252"), read_as="WINDOWS-1252"),
    "bars.csv": File(as_csv(GERMAN, "|").encode()),
    "french.csv": File(as_csv(FRENCH, ";").encode("windows-1252"), FRENCH, "WINDOWS-1252"),
    "spanish.jsonl": File(
        as_jsonl(SPANISH_WORDS).encode("windows-1252"), SPANISH_WORDS, "WINDOWS-1252"
    ),
    "german-gb18030.jsonl": File(
        as_jsonl(GERMAN).encode("gb18030"),
        refused="german-gb18030.jsonl:1: not UTF-8 (byte 0x81)",
        settings=["data.encoding=gb18030"],
    ),
    "big5.jsonl": File(
        as_jsonl(TRADITIONAL).encode("big5"),
        TRADITIONAL,
        refused="big5.jsonl:1: not UTF-8 (byte ",
        settings=["data.encoding=big5"],
    ),
    "shift-jis.csv": File(
        as_csv(JAPANESE).encode("shift_jis"),
        JAPANESE,
        refused="shift-jis.csv:2: not UTF-8 (byte ",
        settings=["data.encoding=shift_jis"],
    ),
    "euc-jp.csv": File(
        as_csv(JAPANESE).encode("euc_jp"),
        JAPANESE,
        refused="euc-jp.csv:2: not UTF-8 (byte ",
        settings=["data.encoding=euc_jp"],
    ),
    "euc-kr.jsonl": File(
        as_jsonl(KOREAN).encode("euc_kr"),
        KOREAN,
        refused="euc-kr.jsonl:1: not UTF-8 (byte ",
        settings=["data.encoding=euc_kr"],
    ),
    "czech.csv": File(
        as_csv([(f"žluťoučký kůň {n}", f"příliš {n}") for n in range(20)]).encode("windows-1250"),
        [(f"žluťoučký kůň {n}", f"příliš {n}") for n in range(20)],
        "WINDOWS-1250",
    ),
    "few-letters.csv": File(
        as_csv([(f"è {n}", f"più {n}") for n in range(20)]).encode("windows-1252"),
        [(f"è {n}", f"più {n}") for n in range(20)],
        refused="few-letters.csv:2: not UTF-8 (byte 0xe8); if the file is windows-1252, set "
        "data.encoding=windows-1252",
        settings=["data.encoding=windows-1252"],
    ),
    "russian.csv": File(
        as_csv([(f"вопрос {n}", f"ответ {n}") for n in range(20)]).encode("windows-1251"),
        [(f"вопрос {n}", f"ответ {n}") for n in range(20)],
        refused="russian.csv:2: not UTF-8 (byte ",
        settings=["data.encoding=windows-1251"],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_and_encodings(tmp_path: Path, name: str) -> None:
    file = FILES[name]
    path = tmp_path / name
    path.write_bytes(file.raw)
    if file.refused:
        with pytest.raises(DataError) as caught:
            read(path)
        assert file.refused in str(caught.value) and "\n" not in str(caught.value)
        assert "data.encoding" in str(caught.value)
    corpus = read(path, *file.settings)
    found = {e.canonical() for e in [*corpus.train, *corpus.eval]}
    assert found == expected("plain", file.pairs)
    told = [f"data: {path} read as {file.read_as}"] if file.read_as else []
    assert list(corpus.notes) == told


MAILS = [{"mail": q, "reply": a, "from": "x"} for q, a in GERMAN[:6]]
NAMED = "data.columns={prompt: mail, completion: reply}"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, []) for name in ("a.jsonl", "a.csv", "a.parquet", "a.arrow")),
        *((name, ["data.streaming=true"]) for name in ("a.jsonl", "a.parquet")),
    ],
)
def test_columns_are_named_in_every_kind_of_file(
    tmp_path: Path, name: str, settings: list[str]
) -> None:
    path = tmp_path / name
    table = pa.Table.from_pylist(MAILS)
    if name.endswith("parquet"):
        pq.write_table(table, path)
    elif name.endswith("arrow"):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    elif name.endswith("csv"):
        with path.open("w", newline="") as file:
            csv_writer = csv.DictWriter(file, list(MAILS[0]))
            csv_writer.writeheader()
            csv_writer.writerows(MAILS)
    else:
        path.write_text(lines_of(MAILS))
    corpus = read(path, NAMED, *settings)
    assert {e.canonical() for e in [*corpus.train, *corpus.eval]} == expected("plain", GERMAN[:6])
    assert corpus.notes == (
        "data: not used, and not trained on: from; where that is meant, set "
        "data.ignore_columns=[from]",
    )
    one_by_one = ["data.columns.prompt=mail", "data.columns.completion=reply", *settings]
    assert read(path, *one_by_one, "data.ignore_columns=[from]").digest == corpus.digest


def test_columns_in_a_configuration_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines_of(MAILS))
    yaml = tmp_path / "a.yaml"
    yaml.write_text(f"data:\n  path: {path}\n  columns: {{prompt: mail, completion: reply}}\n")
    corpus = load_corpus(load_config(yaml).data)
    assert {e.canonical() for e in [*corpus.train, *corpus.eval]} == expected("plain", GERMAN[:6])


@pytest.mark.parametrize("streaming", ["true", "false"])
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            ["data.columns={promt: mail}"],
            "data.columns: 'promt' is no column of a format (did you mean 'prompt'?); give ",
        ),
        (
            ["data.columns={question: mail, answer: reply}"],
            "'question' is no column of a format; perhaps 'data.columns={prompt: mail, completion: "
            "reply}' is meant; give ",
        ),
        (
            ["data.columns={mail: prompt, reply: completion}"],
            "perhaps 'data.columns={prompt: mail, completion: reply}' is meant; give ",
        ),
        (
            ["data.columns={prompt: mail, completion: mail}"],
            "data.columns: prompt and completion are both 'mail'; give each a column of its own",
        ),
        (
            ["data.columns={prompt: mail, completion: replay}"],
            "data.columns.completion: no row has 'replay' (did you mean 'reply'?); the rows have "
            "from, mail, reply",
        ),
        (
            [NAMED, "data.columns.system=sytem"],
            "data.columns.system: no row has 'sytem'; the rows have from, mail, reply",
        ),
        (
            [NAMED, "data.format=text"],
            "data.columns: no format has prompt and completion together; what each has is text:",
        ),
        (
            ["data.columns={instruction: mail, completion: reply}"],
            "data.columns: no format has instruction and completion together",
        ),
        (
            [NAMED, "data.ignore_columns=[reply]"],
            "data.columns: completion is 'reply', which data.ignore_columns leaves out",
        ),
        (
            ["data.columns={prompt: from, completion: nil}"],
            "data.columns.completion: no row has 'n",
        ),
        ([NAMED, "data.encoding=utf-9"], "data.encoding: 'utf-9' is no encoding of text"),
        ([NAMED, "data.encoding=rot13"], "data.encoding: 'rot13' is no encoding of text"),
    ],
)
def test_settings_that_cannot_be_meant(
    tmp_path: Path, settings: list[str], reason: str, streaming: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines_of(MAILS))
    with pytest.raises(DataError) as caught:
        read(path, *settings, f"data.streaming={streaming}")
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_the_encoding_that_is_given(tmp_path: Path) -> None:
    """It holds for what has no mark, and no file is read as what it is not."""
    for name, encoding in (("a", "windows-1251"), ("b", "utf-8-sig"), ("c", "windows-1251")):
        rows = [{"prompt": f"вопрос {name} {n}", "completion": "ответ"} for n in range(3)]
        (tmp_path / f"{name}.jsonl").write_text(lines_of(rows), encoding=encoding)
    corpus = read(tmp_path, "data.encoding=windows-1251")
    asked = {e.messages[0]["content"] for e in [*corpus.train, *corpus.eval]}
    assert asked == {f"вопрос {name} {n}" for name in "abc" for n in range(3)}
    streamed = read(tmp_path / "a.jsonl", "data.encoding=windows-1251", "data.streaming=true")
    assert streamed.eval[0].messages[0]["content"].startswith("вопрос a ")
    (tmp_path / "d.jsonl").write_text(lines_of(rows), encoding="utf-8")
    for encoding, reason in [
        ("windows-1251", "d.jsonl' is UTF-8 rather than windows-1251"),
        ("utf-16", "d.jsonl' is not utf-16 (byte 0x0a in line 3)"),
    ]:
        with pytest.raises(DataError) as caught:
            read(tmp_path / "d.jsonl", f"data.encoding={encoding}")
        assert reason in str(caught.value)
    with pytest.raises(DataError, match="'utf-16' can't be read in parts"):
        read(tmp_path / "a.jsonl", "data.encoding=utf-16", "data.streaming=true")


@pytest.mark.parametrize("encoding", ["UTF-8", "utf8", "utf_8", "utf-8-sig"])
@pytest.mark.parametrize("streaming", ["true", "false"])
def test_utf8_by_any_of_its_names(tmp_path: Path, encoding: str, streaming: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(as_jsonl(CHINESE), encoding="utf-8")
    wanted = read(path, f"data.streaming={streaming}").digest
    assert read(path, f"data.encoding={encoding}", f"data.streaming={streaming}").digest == wanted


def test_the_encoding_that_is_given_does_not_garble_streamed_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(as_jsonl(RUSSIAN[:9]), encoding="windows-1251")
    (tmp_path / "b.jsonl").write_text(as_jsonl(RUSSIAN[9:]), encoding="utf-8-sig")
    settings = ["data.encoding=windows-1251", "data.streaming=true"]
    corpus = read(tmp_path, *settings, "data.val_size=0.5")
    assert {e.canonical() for e in (*corpus.train, *corpus.eval)} == expected("plain", RUSSIAN)
    (tmp_path / "c.jsonl").write_text(as_jsonl(RUSSIAN), encoding="utf-8")
    with pytest.raises(DataError, match=r"c\.jsonl' is UTF-8 rather than windows-1251"):
        read(tmp_path, *settings)


def test_utf16_without_a_mark_is_not_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_jsonl(WIDE).encode("utf-16-le"))
    with pytest.raises(DataError, match="is UTF-16-LE, which can't be read in parts; convert it"):
        read(path, "data.streaming=true")


def test_sources_and_evaluated_rows_have_encodings_of_their_own(tmp_path: Path) -> None:
    for name, encoding in (("a", "windows-1251"), ("b", "koi8-r"), ("c", "utf-8")):
        pairs = [(f"{q} {name}", a) for q, a in RUSSIAN]
        (tmp_path / f"{name}.jsonl").write_text(as_jsonl(pairs), encoding=encoding)
    a, b, c = (tmp_path / f"{name}.jsonl" for name in "abc")
    sources = f"data.sources=[{{path: {a}}}, {{path: {b}, encoding: koi8-r}}]"
    settings = ["data.encoding=windows-1251", f"data.eval_path={c}"]
    corpus = load_corpus(load_config(None, [sources, *settings]).data)
    found = {e.messages[0]["content"] for e in (*corpus.train, *corpus.eval)}
    assert found == {f"{q} {name}" for q, _ in RUSSIAN for name in "abc"}
    note = "data: data.encoding is not used for the rows evaluated on, which are UTF-8"
    assert note in corpus.notes and note in read(a, *settings).notes


def test_nulls_that_a_table_puts_into_tools_are_no_part_of_them(tmp_path: Path) -> None:
    """In a table all objects have the same keys; in JSON each has its own."""
    tools = [[TOOL], [{"name": "zeit", "parameters": {"type": "object", "x": 1}}]] * 3
    rows = [
        {"messages": openai_called(q, a, {"ort": q} if n % 2 else {"art": a}), "tools": each}
        for n, ((q, a), each) in enumerate(zip(GERMAN, tools, strict=False))
    ]
    (tmp_path / "a.jsonl").write_text(lines_of(rows))
    (tmp_path / "a.parquet").write_bytes(parquet(rows))
    as_json, as_table = (read(tmp_path / name) for name in ("a.jsonl", "a.parquet"))
    assert as_table.digest == as_json.digest
    for name in ("Tools", "Functions", "offered"):
        named = [{"messages": row["messages"], name: row["tools"]} for row in rows]
        (tmp_path / "b.parquet").write_bytes(parquet(named))
        settings = [f"data.columns.tools={name}"] if name == "offered" else []
        assert read(tmp_path / "b.parquet", *settings).digest == as_json.digest


def test_tools_that_are_given_as_null(tmp_path: Path) -> None:
    """As JSON text, which a table of texts has where a row has no tools, or a call no arguments."""
    plain = [{"prompt": q, "completion": a} for q, a in GERMAN]
    (tmp_path / "a.jsonl").write_text(lines_of(plain))
    (tmp_path / "b.jsonl").write_text(lines_of([{**row, "tools": "null"} for row in plain]))
    (tmp_path / "c.csv").write_text(
        "prompt,completion,tools\n" + "".join(f'"{q}","{a}",NaN\n' for q, a in GERMAN)
    )
    assert len({read(tmp_path / name).digest for name in ("a.jsonl", "b.jsonl", "c.csv")}) == 1
    calls = [
        lines_of([{"messages": openai_called(q, a, given), "tools": [TOOL]} for q, a in GERMAN])
        for given in ("null", {})
    ]
    digests = set()
    for text in calls:
        (tmp_path / "d.jsonl").write_text(text)
        digests.add(read(tmp_path / "d.jsonl").digest)
    assert len(digests) == 1


def test_the_order_of_a_tools_keys_is_that_of_the_data(tmp_path: Path) -> None:
    tool = {"function": TOOL, "type": "function"}
    path = tmp_path / "a.jsonl"
    path.write_text(lines_of([{"prompt": q, "completion": a, "tools": [tool]} for q, a in GERMAN]))
    assert json.dumps(read(path).train[0].tools[0]) == json.dumps(tool)


@pytest.mark.parametrize("blank", ["", None])
@pytest.mark.parametrize("first", [True, False])
def test_a_blank_instruction_is_filled_by_the_input(
    tmp_path: Path, blank: str | None, first: bool
) -> None:
    """Wherever such a row is, the others keep their instructions."""
    rows = [{"instruction": "Sag es.", "input": q, "output": a} for q, a in GERMAN]
    odd = {"instruction": blank, "input": "Wie?", "output": "So."}
    path = tmp_path / "a.jsonl"
    path.write_text(lines_of([odd, *rows] if first else [*rows, odd]))
    corpus = read(path)
    pairs = [("Wie?", "So."), *((f"Sag es.\n\n{q}", a) for q, a in GERMAN)]
    found = {e.canonical() for e in (*corpus.train, *corpus.eval)}
    assert found == expected("plain", pairs) and corpus.notes == ()


def test_an_example_with_tools_is_the_same_after_its_canonical_form() -> None:
    """The order of a tool's keys is what templates write; it is kept, as are calls and ids."""
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "f", "arguments": {"z": 1, "a": 2}},
    }
    turns = ({"role": "assistant", "content": "", "tool_calls": [call]}, user("x"))
    tool = {"type": "function", "function": {"name": "f", "description": "ä", "parameters": {}}}
    example = Example(turns, unlearned=(1,), rejected=turns, tools=(tool,))
    again = Example.from_canonical(example.canonical())
    calls = [json.dumps(e.messages[0]["tool_calls"]) for e in (again, example)]
    assert again == example and calls[0] == calls[1]
    assert json.dumps(again.tools) == json.dumps([tool])
    assert again.uses_tools and Example(turns).uses_tools
    # Of what has no tools, the form is that of all histories before there were any.
    assert Example((user("x"),)).canonical() == '[{"content":"x","role":"user"}]'
    assert not Example((user("x"),)).uses_tools


def test_a_canonical_form_is_what_json_writes_whatever_the_characters() -> None:
    """Splits and fingerprints come of it: of histories before orjson wrote it, too."""
    every = [*map(chr, range(0x100)), "\u2028", "\ud800", "\udfff", "\U0001f600", "", "[", "/"]
    for content in [*every, "".join(every), *(f"a{each}b" for each in every)]:
        turns = (user("x"), {"role": "assistant", "content": content})
        said = [dict(sorted(turn.items())) for turn in turns]
        assert Example(turns).canonical() == json.dumps(said, separators=(",", ":"))
        assert Example((*turns, turns[0])).canonical_prompt() == Example(turns).canonical()
        assert Example(text=content).canonical() == json.dumps(content)


def test_lines_are_the_same_wherever_a_block_of_a_file_ends() -> None:
    block = 2**20
    for size in (block - 2, block - 1, block, block + 1, 2 * block):
        lines = [b"a" * size + b"\n", b"\n", b"b\r\n", b"c" * block + b"\n", b"end"]
        source = io.BytesIO(b"".join(lines))
        assert list(raw_lines(source)) == lines
        for count in range(1, len(lines)):
            begins = sum(map(len, lines[:count]))
            for stop, wanted in ((begins, count), (begins + 1, count + 1)):
                source.seek(0)
                assert list(raw_lines(source, stop)) == lines[:wanted]

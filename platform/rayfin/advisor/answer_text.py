"""A recommendation as people read it: two lines to act on, a table, and the evidence on request.

All of it is at most 80 columns wide, but for words that are longer than that.
"""

from __future__ import annotations

import shlex
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rayfin.language import answering_in, localized
from rayfin.methods import METHODS

COLUMNS = 80
NEAR, WIDE = 0.25, 0.5
"""The upper end of a shortfall's interval below which an answer is quite sure, and the width of
the interval above which it is unsure. Conventions: the shortfall goes from 0 to 1."""
_GIB = 2**30
_CLOSING, _OPENING = "，。；：、）”》", "（“《"
"""Marks that begin no line in Chinese, and that end none."""


def answer_text(answer: Mapping[str, Any], *, why: bool = False) -> str:
    """Return an answer, in the form of `Recommendation.model_dump(mode="json")`, in its language.

    With `why` the reasons, risks and trials of each choice stand below. There is no newline at the
    end.
    """
    with answering_in(answer["lang"]):
        return "\n".join(_lines(answer, why))


def _lines(answer: Mapping[str, Any], why: bool) -> Iterator[str]:
    choices = answer["choices"]
    if not choices:
        yield from wrapped(answer["nothing_fits"])
        return
    first = choices[0]
    yield from wrapped(localized("Train {what}", what=summary(answer)), indent=4)
    yield from command_lines(first["command"])
    if (probes := answer["probes"]) is not None:
        yield from wrapped(probes["summary"])
    yield ""
    yield from _table(choices)
    yield ""
    for line in _basis(first, answer):
        yield from wrapped(line)
    for note in answer["notes"]:
        yield from wrapped(f"- {note}", indent=2)
    if answer["alternatives"]:
        yield ""
    for other in answer["alternatives"]:
        told = localized("Or {kind}: {text}", kind=_kind(other["kind"]), text=other["text"])
        yield from wrapped(told)
        for command in other["commands"]:
            yield from command_lines(command, indent=2)
    if why:
        for choice in choices:
            yield ""
            yield from _evidence(choice)


def summary(answer: Mapping[str, Any]) -> str:
    """Return `qlora r=16, lr 0.0002, 3 epochs: 9.5 of 24 GiB, 3.3 h (rules, unsure)`.

    It is of the first choice of an answer, in the form that `answer_text` takes, in the language in
    force.
    """
    choice = answer["choices"][0]
    config, predicted = choice["config"], choice["predictions"]
    unit, divisor = _time_unit(predicted["train_seconds"]["expected"])
    return localized(
        "{method}, lr {rate:g}, {length}: {memory} GiB, {time} {unit} ({source}, {sure})",
        method=" ".join(filter(None, (choice["method"], _capacity(config["method"])))),
        rate=config["train"]["learning_rate"],
        length=length_text(config["train"]),
        memory=_memory(choice, answer["scenario"]),
        time=_short(predicted["train_seconds"]["expected"] / divisor),
        unit=unit,
        source=localized("learned") if answer["source"] == "learned" else localized("rules"),
        sure=_sureness(predicted["shortfall"]),
    )


def _memory(choice: Mapping[str, Any], scenario: Mapping[str, Any]) -> str:
    """Return `2 x 9.5 of 24`: what each of two workers takes of its GPU, in GiB."""
    workers, room = choice["config"]["scaling"]["num_workers"], scenario["gpu_memory_gb"]
    needs = _short(choice["predictions"]["memory_bytes"]["expected"] / _GIB)
    each = needs if workers == 1 else f"{workers} x {needs}"
    if room is None:
        return each
    return localized("{each} of {room}", each=each, room=_short(room))


def _sureness(shortfall: Mapping[str, float]) -> str:
    if shortfall["high"] < NEAR:
        return localized("quite sure")
    if shortfall["high"] - shortfall["low"] > WIDE:
        return localized("unsure")
    return localized("fairly sure")


def length_text(train: Mapping[str, Any]) -> str:
    """Return `3 epochs`, or `60 steps`, of a configuration's `train` section."""
    epochs, steps = train["num_train_epochs"], train["max_steps"]
    if epochs is None:
        return localized("{steps} step{plural}", steps=steps, plural="s" * (steps != 1))
    return localized("{epochs:g} epoch{plural}", epochs=epochs, plural="s" * (epochs != 1))


def _capacity(method: Mapping[str, Any]) -> str:
    name = METHODS[method["type"]].capacity
    return "" if name is None else f"{name.removeprefix('num_virtual_')}={method[name]}"


def _table(choices: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the choices, a line each; the length is left out where all have the same one."""
    rows = [_row(choice) for choice in choices]
    length = localized("length")
    if len({row[length] for row in rows}) == 1:
        rows = [{name: row[name] for name in row if name != length} for row in rows]
    # A rate that probes chose may be one of which no trial tells whether it diverges.
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([row.get(name, "-") for name in names] for row in rows)]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    between = "  " if sum(widths) + 2 * len(widths) - 2 <= COLUMNS else " "
    for row in cells:
        padded = (
            cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)
        )
        yield between.join(padded).rstrip()


def _row(choice: Mapping[str, Any]) -> dict[str, str]:
    config, predicted = choice["config"], choice["predictions"]
    unit, divisor = _time_unit(predicted["train_seconds"]["expected"])
    row = {
        "#": str(choice["rank"]),
        localized("method"): choice["method"],
        localized("size"): _capacity(config["method"]) or "-",
        "lr": f"{config['train']['learning_rate']:g}",
        localized("length"): length_text(config["train"]),
        "GiB": _interval(predicted["memory_bytes"], _GIB),
        localized("time"): f"{_interval(predicted['train_seconds'], divisor)} {unit}",
        localized("shortfall"): _interval(predicted["shortfall"], 1.0),
    }
    if (chance := predicted["divergence"]) is not None:
        row[localized("diverges")] = f"{chance:.0%}"
    return row


def _basis(first: Mapping[str, Any], answer: Mapping[str, Any]) -> Iterator[str]:
    """Yield for what the answer is, and what it rests on."""
    config = first["config"]
    model, data = config["model"]["name"], config["data"]
    yield localized(
        "For {model} on {data}, {hardware}. Shortfall: 0 is the best known, 1 the worst; in "
        "brackets 80 % intervals.",
        model=model,
        data=data["path"] or ", ".join(source["path"] for source in data["sources"]),
        hardware=_hardware(answer["scenario"]),
    )
    told = answer["explanation"]
    yield localized("{sentence}.", sentence=told[:1].upper() + told[1:])
    yield localized("The rules say: {rule}", rule=answer["rule"])


def _kind(kind: str) -> str:
    return {
        "quantise": localized("quantise"),
        "distribute": localized("distribute"),
        "merge": localized("merge"),
        "distil": localized("distil"),
    }[kind]


def _hardware(scenario: Mapping[str, Any]) -> str:
    """Return `2 GPUs of 24 GiB`, as far as the scenario says it."""
    count, size = scenario["num_gpus"] or 1, scenario["gpu_memory_gb"]
    if scenario["hardware"] == "cpu":
        return "CPU"
    each = "" if size is None else localized(" of {size} GiB", size=_short(size))
    return localized("{count} GPU{plural}{each}", count=count, plural="s" * (count > 1), each=each)


def _evidence(choice: Mapping[str, Any]) -> Iterator[str]:
    """Yield what speaks for and against a choice, and the trials that it rests on."""
    yield f"{choice['rank']}. {choice['method']}"
    yield from command_lines(choice["command"], indent=3)
    for mark, lines in (("+", choice["reasons"]), ("-", choice["risks"])):
        for line in lines:
            yield from _wrapped_at(3, f"{mark} {line}", 2)
    for trial in choice["trials"]:
        told = f"{trial['weight']:4.0%} {trial['trial_id']}: {trial['summary']}"
        yield from _wrapped_at(3, told, 5)
    yield from _wrapped_at(3, localized("served as {how}", how=choice["deployment"]))


# --- numbers ------------------------------------------------------------------------------------


def _interval(value: Mapping[str, float], divisor: float) -> str:
    """Return `9.5 (5.9-20)`."""
    low, middle, high = (_short(value[name] / divisor) for name in ("low", "expected", "high"))
    return f"{middle} ({low}-{high})"


def _short(value: float) -> str:
    """Return a number with two significant digits, or as a whole number."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.2f}" if value < 1 else f"{value:.2g}"


def _time_unit(seconds: float) -> tuple[str, float]:
    """Return the unit in which a time is said, and its seconds."""
    if seconds < 90:
        return "s", 1.0
    if seconds < 90 * 60:
        return "min", 60.0
    return "h", 3600.0


# --- lines --------------------------------------------------------------------------------------


def command_lines(command: str, indent: int = 0) -> Iterator[str]:
    r"""Yield the lines of a command, which a shell reads as one: all but the last end in `\`."""
    words = [shlex.quote(word) for word in shlex.split(command)]
    line, lines = " " * indent + words[0], []
    for word in words[1:]:
        if _width(line) + 1 + _width(word) > COLUMNS - 2:
            lines.append(line + " \\")
            line = " " * (indent + 4) + word
        else:
            line += " " + word
    yield from (*lines, line)


def wrapped(text: str, indent: int = 0) -> Iterator[str]:
    """Yield a text as lines of at most 80 columns, all but the first indented.

    Chinese is broken between any two characters, but for the marks that begin or end no line.
    """
    line = ""
    for part in _parts(text):
        if _width(line + part.rstrip()) <= COLUMNS or not line.strip():
            line += part
        else:
            yield line.rstrip()
            line = " " * indent + part.lstrip()
    yield line.rstrip()


def _wrapped_at(margin: int, text: str, indent: int = 0) -> Iterator[str]:
    return wrapped(" " * margin + text, margin + indent)


def _parts(text: str) -> Iterator[str]:
    """Yield the parts of a text between which a line may be broken."""
    part = ""
    for character in text:
        wide = _width(character) == 2 or bool(part and _width(part[-1]) == 2)
        word = part[-1:] == " " and character != " "
        kept = character in _CLOSING or part[-1:] in _OPENING
        if part and (word or (wide and not kept)):
            yield part
            part = ""
        part += character
    if part:
        yield part


def _width(text: str) -> int:
    """Return the columns of a text in a terminal: two for each wide character, as in Chinese."""
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text)

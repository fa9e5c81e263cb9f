"""Draft a sweep's configuration from the user's own data, with a comment on every setting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import yaml

from rayfin.advisor import practice
from rayfin.advisor.candidates import SECTIONS, Candidate, ScenarioFacts, given_settings
from rayfin.advisor.feasibility import fitted
from rayfin.advisor.lengths import SAMPLED, max_length_within
from rayfin.advisor.rules import rule_for
from rayfin.advisor.scaffold import TRIALS, axes
from rayfin.advisor.scenario import Scenario
from rayfin.config import (
    Config,
    PublishConfig,
    Section,
    Space,
    build_config,
    load_config,
    parse_yaml,
)
from rayfin.hardware import describe_hardware
from rayfin.history.connect import without_password
from rayfin.methods import METHODS
from rayfin.models import describe_model, load_tokenizer
from rayfin.training.combination import check_combination

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from rayfin.data import Corpus

_FEWEST_STEPS, _MOST_STEPS = 30, 500
_VIRTUAL = "method.num_virtual_tokens"


@dataclass(frozen=True)
class SampleLengths:
    """The lengths of samples in tokens before any cut, prompt and answer together."""

    samples: int
    p50: int
    p95: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> SampleLengths:
        """Summarise lengths, of which there must be at least one."""
        ordered = sorted(lengths)
        last = len(ordered) - 1
        return cls(len(ordered), ordered[last // 2], ordered[round(0.95 * last)], ordered[-1])

    def within(self, most: int) -> int:
        """Return the max_length for these lengths: see `max_length_within`."""
        return max_length_within(most, self.p95, self.longest)


def draft(config: Config, corpus: Corpus, *, name: str) -> str:
    """Return the YAML of a sweep over a corpus, with a comment on every setting.

    The given settings of `config` are kept. Practice (`rayfin.advisor.practice`) decides the rest,
    the measured lengths of the data max_length, and this machine's memory what is saved. `name` is
    the adapter's. Raises ConfigError, MethodError or ModelError for what can't work together.
    """
    kept = given_settings(config)
    facts = describe_model(config.model)
    lengths = _lengths(config, corpus)
    scenario = Scenario.detect(
        use_gpu=config.scaling.use_gpu,
        model_name=config.model.name,
        model_size_b=facts.parameters / 1e9,
        dataset_rows=_rows(corpus),
    )
    method = kept.get("method.type") or _first_method(scenario)
    notes: dict[str, str] = {}
    most = practice.usual_length(scenario.hardware)
    length = kept.get("data.max_length") or lengths.within(most)
    practiced = practice.settings(scenario, method)
    # The default of most methods, and no value of ia3's: an axis over methods needs the line away.
    practiced.pop("method.target_modules", None)
    if facts.max_position_embeddings is not None and "data.max_length" not in kept:
        # Virtual tokens need positions of their own; an axis has twice as many.
        virtual = 2 * kept.get(_VIRTUAL, practiced.get(_VIRTUAL, 0))
        length = max(8, min(length, facts.max_position_embeddings - virtual))
    notes["data.max_length"] = (
        f"Of {lengths.samples} samples half have at most {lengths.p50} tokens, 95 % at most "
        f"{lengths.p95}; the longest has {lengths.longest}."
    )
    settings = {
        "model.name": config.model.name,
        **({} if config.data.sources else {"data.path": config.data.path}),
        "data.max_length": length,
        "data.val_size": config.data.val_size,
        **practiced,
    }
    settings |= kept | {"data.max_length": length, "method.type": method}
    batch = (
        settings["train.per_device_train_batch_size"]
        * settings["train.gradient_accumulation_steps"]
    )
    epoch = math.ceil(_rows(corpus) / batch)
    length = "train.num_train_epochs"
    if length not in settings:
        length = "train.max_steps"
        settings.setdefault(length, min(max(epoch, _FEWEST_STEPS), _MOST_STEPS))
    notes[length] = f"{_rows(corpus)} training samples, {batch} a step: one epoch is {epoch} steps."
    base = build_config({}, settings)
    known = ScenarioFacts(scenario, facts, describe_hardware(config.scaling.use_gpu))
    settings |= fitted(Candidate(base, {}), known, (), kept)[0].settings
    base = build_config({}, settings)
    check_combination(base)
    parameters = config.sweep.parameters or axes(base, [base.model_dump(mode="json")])
    rest = {
        "sweep.num_samples": TRIALS,
        "sweep.metric": config.sweep.metric,
        **{f"sweep.{leaf}": getattr(config.sweep, leaf) for leaf in config.sweep.model_fields_set},
        "sweep.parameters": parameters,
        "publish.name": name,
        "storage": config.storage,
    }
    if config.publish is not None:
        rest |= {f"publish.{leaf}": getattr(config.publish, leaf) for leaf in _named(config)}
    if config.history is not None:
        rest["history"] = without_password(config.history)
    text = "".join(f"{line}\n" for line in _lines(settings | rest, notes))
    load_config(parse_yaml(text, name))  # what is written can be read
    return text


def _lengths(config: Config, corpus: Corpus) -> SampleLengths:
    from rayfin.data.accepted import accepted_pairs
    from rayfin.data.token_settings import TokenSettings
    from rayfin.data.tokenization import tokenize_examples

    some = [*corpus.train[:SAMPLED], *corpus.eval[: SAMPLED // 4]]
    settings = TokenSettings.of(config.data, config.train)
    tokenizer = load_tokenizer(config.model, config.data.chat_template)
    encode = partial(tokenize_examples, tokenizer=tokenizer)
    _, tokens = accepted_pairs([settings.with_system(each) for each in some], encode, settings)
    return SampleLengths.of([len(sample["input_ids"]) for sample in tokens])


def _rows(corpus: Corpus) -> int:
    """Return the number of training samples, all of them for streamed data, too."""
    return sum(corpus.stream.rows) if corpus.stream is not None else len(corpus.train)


def _first_method(scenario: Scenario) -> str:
    return next(iter(rule_for(scenario).methods), "lora")


def _named(config: Config) -> Iterator[str]:
    assert config.publish is not None
    return (leaf for leaf in PublishConfig.model_fields if leaf in config.publish.model_fields_set)


def _lines(settings: Mapping[str, Any], notes: Mapping[str, str]) -> Iterator[str]:
    yield "# A sweep to start from, made by `rayfin init`. Run it:  rayfin sweep THIS_FILE"
    yield "# All settings there are, each with its default:         rayfin sweep --settings"
    method = METHODS[settings["method.type"]]
    for section in (*SECTIONS, "sweep", "publish"):
        named = [key for key in settings if key.startswith(f"{section}.")]
        if not named:
            continue
        yield f"\n{section}:"
        for key in named:
            leaf = key.partition(".")[2]
            if section == "method":
                field = method.model_fields[leaf]
            elif section == "publish":
                field = PublishConfig.model_fields[leaf]
            else:
                field = type(Config.model_fields[section].default).model_fields[leaf]
            about = [_meaning(field), notes.get(key, "")]
            if key == "method.type":
                about = [" ".join((method.__doc__ or "").split())]
            yield from (f"  # {line}" for line in about if line)
            yield from _value(leaf, settings[key])
    for key in ("storage", "history"):
        if key in settings:
            yield f"\n# {_meaning(Config.model_fields[key])}"
            yield f"{key}: {_inline(settings[key])}"


def _meaning(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _value(leaf: str, value: Any) -> Iterator[str]:
    if leaf != "parameters":
        yield f"  {leaf}: {_inline(value)}"
        return
    yield "  parameters:"
    for axis, choices in value.items():
        given = choices.model_dump() if isinstance(choices, Space) else choices
        yield f"    {axis}: {_inline(given)}"


def _inline(value: Any) -> str:
    plain = value
    if isinstance(value, tuple):
        plain = [
            each.model_dump(exclude_unset=True) if isinstance(each, Section) else each
            for each in value
        ]
    text = yaml.safe_dump(
        plain, default_flow_style=True, width=math.inf, sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("...\n").strip()

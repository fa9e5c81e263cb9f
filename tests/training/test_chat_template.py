"""A chosen chat template goes along with the adapter, and answers end where the data's do."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from rayfin.data import Example
from rayfin.data.tokenization import tokenize_examples
from rayfin.models import load_tokenizer
from rayfin.models.chat_templates import read_chat_template
from rayfin.models.ends import Ends
from rayfin.serving.api.adapter_tokenizers import AdapterTokenizers
from rayfin.serving.api.prompts import Prompts
from rayfin.serving.api.schema import ChatBody
from rayfin.serving.api.templates import Templates
from rayfin.serving.engine.request import AdapterSource
from rayfin.serving.timed_executor import TimedExecutor

TOOLS = ({"type": "function", "function": {"name": "colour", "parameters": {"type": "object"}}},)
CALL = {"type": "function", "function": {"name": "colour", "arguments": {"of": "sky"}}}
TALK = (
    {"role": "user", "content": "Which colour?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "blue"},
    {"role": "assistant", "content": "Blue."},
)


def test_the_template_goes_along_and_is_served_as_it_was_trained(lab: Any, tmp_path: Path) -> None:
    rows = [{"messages": TALK, "tools": TOOLS, "id": i} for i in range(4)]
    rows[0] = {"messages": [{"role": "user", "content": "Hello"}, TALK[-1]]}
    data = tmp_path / "calls.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"path": str(data), "chat_template": "hermes", "max_length": 1024}
    spec = lab.spec(data=settings | {"ignore_columns": ["id"]}, max_steps=1)
    finished = lab.finish(spec)
    adapter = finished.adapter
    assert (adapter / "chat_template.jinja").read_text() == read_chat_template("hermes")
    assert json.loads((adapter / "rayfin.json").read_text())["chat_template"] == "hermes"

    (sample,) = tokenize_examples(
        [Example(TALK, tools=TOOLS)], load_tokenizer(spec.model, "hermes")
    )
    tokenizer = load_tokenizer(spec.model)  # the base's, by which it is served
    reads = TimedExecutor("reads", threads=1, seconds=60, most_stuck=1)
    templates = Templates(tokenizer, 60.0, AdapterTokenizers(reads))
    source = AdapterSource("calls@1", adapter)
    sent = [TALK[0], TALK[1] | {"content": None}, TALK[2]]
    body = ChatBody.model_validate({"model": "calls", "messages": sent, "tools": list(TOOLS)})

    async def served() -> tuple[tuple[int, ...], Ends]:
        prompts = Prompts(tokenizer, templates)
        ids = await prompts.of_chat(source, body.messages, body.tools)
        return ids, await templates.ends(source)

    try:
        prompt, ends = asyncio.run(served())
    finally:
        templates.close()
        reads.close()
    assert list(prompt) == sample["input_ids"][: len(prompt)]
    assert sample["labels"][len(prompt)] != -100
    assert tokenizer.convert_ids_to_tokens(list(ends.token_ids)) == ["<|im_end|>"]


def test_a_model_whose_pad_token_is_its_end_token_learns_to_end(
    lab: Any, chatml: ModuleType, tmp_path: Path
) -> None:
    tokenizer = chatml.tokenizer_of(eos="<|im_end|>")
    tokenizer.pad_token = tokenizer.eos_token
    model = str(chatml.write_base(tmp_path / "base", tokenizer))
    finished = lab.finish(lab.spec(model=model, max_steps=60, eval_steps=60))
    end = tokenizer.eos_token_id
    assert load_tokenizer(finished.spec.model).pad_token_id == end
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say red 0"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    adapted = lab.reload(finished)
    with torch.no_grad(), adapted.disable_adapter():
        base = adapted.generate(prompt, max_new_tokens=16, do_sample=False, pad_token_id=end)
    with torch.no_grad():
        tuned = adapted.generate(prompt, max_new_tokens=16, do_sample=False, pad_token_id=end)
    assert end not in base[0, prompt.shape[1] :]
    assert tuned[0, -1] == end
    assert tuned.shape[1] - prompt.shape[1] < 16

"""Answers end where those of the data do."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from rayfin.models import load_tokenizer


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

"""What the base model and the adapter answer to the same held-out questions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rayfin.config import DataConfig, ModelConfig
from rayfin.data import load_corpus, render_prompt
from rayfin.evaluation.report import Sample
from rayfin.hardware import describe_hardware
from rayfin.methods import METHODS
from rayfin.models import load_base, load_tokenizer
from rayfin.tuning.rows import adapter_place

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from rayfin.history import TrialRecord


def answer_samples(
    row: TrialRecord,
    count: int,
    *,
    use_gpu: bool | Literal["auto"] = "auto",
    max_new_tokens: int = 24,
) -> list[Sample]:
    """Greedy answers, side by side, to the first `count` validation samples of a trial's data.

    Empty for a trial without an adapter (full fine-tuning) and for plain text, where there is no
    question.
    """
    changes_base = METHODS[row.spec["method"]["type"]].changes_base
    if row.directory is None or changes_base:
        return []
    data = DataConfig.model_validate(row.spec["data"])
    examples = [example for example in load_corpus(data).eval if example.messages][:count]
    if not examples:
        return []
    with adapter_place(row).borrowed() as adapter:
        if adapter is None or not (adapter / "adapter_config.json").exists():
            return []
        model_config = ModelConfig.model_validate(row.spec["model"])
        tokenizer = load_tokenizer(model_config)
        device = describe_hardware(use_gpu).device
        base = load_base(model_config, row.spec["method"]["quantization_bit"], device)
        from peft import PeftModel  # after the base: see import_bitsandbytes

        prompts = [render_prompt(example.messages, tokenizer) for example in examples]

        def answers(model: torch.nn.Module) -> list[str]:
            return [_answer(model, tokenizer, prompt, max_new_tokens) for prompt in prompts]

        before = answers(base)
        after = answers(PeftModel.from_pretrained(base, str(adapter)).eval())
    return [
        Sample(
            _question(example.messages), example.messages[-1]["content"], base_said, adapter_said
        )
        for example, base_said, adapter_said in zip(examples, before, after, strict=True)
    ]


def _question(messages: tuple[dict[str, str], ...]) -> str:
    return next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")


def _answer(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str, max_new_tokens: int
) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    device = next(model.parameters()).device
    output = model.generate(  # type: ignore[operator]
        input_ids=inputs["input_ids"].to(device),
        attention_mask=inputs["attention_mask"].to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()

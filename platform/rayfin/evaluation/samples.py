"""What the base model and the adapter answer to the same held-out questions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rayfin.config import DataConfig, ModelConfig
from rayfin.data import load_corpus, render_prompt, turn_end
from rayfin.data.token_settings import TokenSettings
from rayfin.evaluation.report import Sample
from rayfin.hardware import describe_hardware
from rayfin.methods import METHODS
from rayfin.methods.attach import tied_weights_apart
from rayfin.models import Head, load_base, load_tokenizer
from rayfin.models.ends import Ends, end_token_ids
from rayfin.objectives import OBJECTIVES, stage_of
from rayfin.training.generation import answer, question, turn_text
from rayfin.tuning.rows import adapter_place

if TYPE_CHECKING:
    import torch

    from rayfin.history import TrialRecord


def answer_samples(
    row: TrialRecord,
    count: int,
    *,
    use_gpu: bool | Literal["auto"] = "auto",
    max_new_tokens: int = 24,
) -> list[Sample]:
    """Greedy answers, side by side, to the first `count` validation samples of a trial's data.

    Empty for a trial without an adapter (full fine-tuning), for a model that isn't one of language,
    and for plain text, where there is no question.
    """
    changes_base = METHODS[row.spec["method"]["type"]].changes_base
    if row.directory is None or changes_base:
        return []
    data = DataConfig.model_validate(row.spec["data"])
    objective = OBJECTIVES[stage_of(row.spec)]()
    if objective.auto_class != Head().auto_class:
        return []
    held_out = load_corpus(data, objective).eval
    settings = TokenSettings(data.chat_template, data.system)
    examples = [settings.with_system(it) for it in held_out if it.messages][:count]
    if not examples:
        return []
    with adapter_place(row).reading_copy() as adapter:
        if adapter is None or not (adapter / "adapter_config.json").exists():
            return []
        model_config = ModelConfig.model_validate(row.spec["model"])
        tokenizer = load_tokenizer(model_config, data.chat_template)
        device = describe_hardware(use_gpu).device
        base = load_base(model_config, row.spec["method"]["quantization_bit"], device)
        from peft import PeftModel  # after the base: see import_bitsandbytes

        prompts = [render_prompt(it.messages, tokenizer, it.tools) for it in examples]
        ends = turn_end(tokenizer) | Ends(end_token_ids(model_config, tokenizer))

        def answers(model: torch.nn.Module) -> list[str]:
            return [answer(model, tokenizer, it, ends, max_new_tokens).text for it in prompts]

        before = answers(base)
        with tied_weights_apart(row.spec["method"].get("modules_to_save")):
            adapted = PeftModel.from_pretrained(base, str(adapter)).eval()
        after = answers(adapted)
    return [
        Sample(question(it.messages), turn_text(it.messages[-1]), base_said, adapter_said)
        for it, base_said, adapter_said in zip(examples, before, after, strict=True)
    ]

"""The formula's memory on a GPU against what others published, with the sources."""

from __future__ import annotations

from typing import Any

import pytest

from rayfin.advisor.memory import MemoryParts, memory_of
from rayfin.advisor.published_models import published_model, usual_model
from rayfin.config import build_config
from rayfin.models.facts import ModelFacts
from rayfin.models.sizes import sizes_of

GB = 1e9
LENGTH = 1024
"""The tokens of LLaMA-Factory's memory benchmark, with one sample at once and rank 32: its README
(github.com/hiyouga/LLaMA-Factory, Apache-2.0), "Benchmark", definitions. Its table of hardware says
no length; activations are recomputed by default there."""
ESTIMATED = [
    ("llama2-7b", "qlora", 6),
    ("llama2-13b", "qlora", 12),
    ("llama2-70b", "qlora", 48),
    ("llama2-7b", "lora", 16),
    ("llama2-13b", "lora", 32),
    ("llama2-70b", "lora", 160),
    ("llama2-7b", "full", 120),
    ("llama2-13b", "full", 240),
]
"""GB of "Hardware Requirement" there, which it calls estimated. The full tuning is mixed."""

MEASURED_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
MEASURED = {
    7: (20.1, 20.4, 21.5, 23.8, 29.7, 36.6),
    14: (34.6, 35.1, 35.3, 37.4, 42.5, 55.2),
}
"""GB of LoRA by the length: Qwen's README (github.com/QwenLM/Qwen), "Profiling of Memory and
Speed", on an A100. By its finetune.py and finetune_lora_single_gpu.sh the rank is 64 on all linear
layers, one sample at once, with activations recomputed. Its QLoRA is over GPTQ's weights with
embeddings in float32, and not ours."""
# The first Qwen's hidden width, MLP width, layers and heads; the vocabulary has 151,936 tokens.
FIRST_QWEN = {7: (4096, 11008, 32, 32), 14: (5120, 13696, 40, 40)}


def parts(facts: ModelFacts, method: str, length: int = LENGTH, **others: Any) -> MemoryParts:
    low_rank = {"r": 32, "target_modules": "all-linear"} if method != "full" else {}
    config = build_config(
        {
            "method": {"type": method} | low_rank | others,
            "data": {"max_length": length},
            "train": {
                "per_device_train_batch_size": 1,
                "per_device_eval_batch_size": 1,
                "gradient_checkpointing": True,
            },
        },
        {},
    )
    return memory_of(config, facts, device="cuda")


@pytest.mark.parametrize(("name", "method", "published"), ESTIMATED)
def test_memory_is_within_a_quarter_of_the_published_table(
    name: str, method: str, published: float
) -> None:
    found = published_model(name)
    assert found is not None
    assert parts(found[0], method).total / GB == pytest.approx(published, rel=0.25)


@pytest.mark.parametrize("size", FIRST_QWEN)
def test_memory_with_a_large_vocabulary_is_within_a_quarter_of_what_was_measured(size: int) -> None:
    hidden, wide, layers, heads = FIRST_QWEN[size]
    sizes = sizes_of(
        {
            "model_type": "llama",  # the same shapes, but for the biases of queries, keys, values
            "hidden_size": hidden,
            "intermediate_size": wide,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": hidden // heads,
            "vocab_size": 151_936,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }
    )
    assert sizes is not None
    facts = ModelFacts(name="qwen", identity="qwen", **vars(sizes))
    found = [parts(facts, "lora", length, r=64).total / GB for length in MEASURED_LENGTHS]
    assert found == pytest.approx(MEASURED[size], rel=0.25)


@pytest.mark.parametrize("name", ["llama3.1-8b", "qwen2.5-7b", "qwen3-8b"])
def test_logits_count_by_the_vocabulary(name: str) -> None:
    """Three numbers in float32 for each token of the vocabulary and of the samples."""
    found, other = published_model(name), published_model("llama2-7b")
    assert found is not None and other is not None
    longer = 4096
    for facts in (found[0], other[0]):
        grown = parts(facts, "lora", longer).total - parts(facts, "lora").total
        logits = 3 * 4 * (longer - LENGTH) * facts.vocab_size
        block = 2 * (longer - LENGTH) * facts.num_layers * facts.hidden_size
        # The rest is what the backward pass of one block keeps at once.
        assert logits + block <= grown <= logits + 2 * block + 1.5 * GB


def test_four_bits_and_recomputed_activations_save_what_they_should() -> None:
    facts, _ = usual_model(8)
    whole, four = parts(facts, "lora"), parts(facts, "qlora")
    saved = facts.linear_parameters * (2 - 0.52)
    assert whole.weights - four.weights == pytest.approx(saved, rel=0.02)

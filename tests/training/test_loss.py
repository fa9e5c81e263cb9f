"""The loss and the scores are what transformers would say, however samples are batched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from rayfin.config import DataConfig
from rayfin.models import load_base
from rayfin.training.batches import collate_packed, collate_padded, plan_samples
from rayfin.training.scoring import completion_logits, score

PAD = 0


@pytest.fixture(scope="module")
def texts(lab: Any) -> dict[str, Any]:
    """Plain texts have loss on every token, the first one of a sample being the trap."""
    file: Path = lab.root / "texts.jsonl"
    rows = [{"text": "the cat sat on the mat " * (1 + i % 3) + str(i)} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(file), "max_length": 96}


NO_DROPOUT = {"lora_dropout": 0.0}


def test_packing_changes_no_loss(lab: Any, texts: dict[str, Any]) -> None:
    for data in (None, texts):
        packed, padded = (
            lab.run(lab.spec("lora", NO_DROPOUT, data=data, packing=packing))
            for packing in (True, False)
        )
        assert packed.status == padded.status == "finished", packed.error
        assert lab.losses(packed) == pytest.approx(lab.losses(padded), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "packing"), [("lora", False), ("lora", True), ("adalora", False), ("p_tuning", False)]
)
def test_accumulated_batches_are_one_batch(
    name: str, packing: bool, lab: Any, texts: dict[str, Any]
) -> None:
    settings = NO_DROPOUT if "lora" in name else {}
    at_once, in_parts = (
        lab.run(
            lab.spec(
                name,
                settings,
                data=texts,
                packing=packing,
                learning_rate=2e-3,  # above, Adam makes much of the last digits
                per_device_train_batch_size=8 // parts,
                gradient_accumulation_steps=parts,
            )
        )
        for parts in (1, 2)
    )
    assert in_parts.status == "finished", in_parts.error
    assert lab.losses(in_parts) == pytest.approx(lab.losses(at_once), abs=1e-5)


def test_the_training_loss_is_that_of_transformers(lab: Any, texts: dict[str, Any]) -> None:
    """The first step's loss, before any update, is the base model's own on those samples."""
    for data in (None, texts):
        spec = lab.spec("lora", NO_DROPOUT, data=data, max_steps=1)
        samples = lab.warm.tokenized(spec).train
        plan = plan_samples(
            [len(s["input_ids"]) for s in samples],
            batch_size=4,
            max_steps=1,
            seed=0,
            group_by_length=True,
        )
        base = load_base(spec.model, None, "cpu")
        with torch.no_grad():
            theirs = float(base(**collate_padded([samples[i] for i in plan], PAD)).loss)
        assert lab.losses(lab.run(spec)) == pytest.approx([theirs], abs=1e-5)


def test_the_eval_loss_is_that_of_transformers(lab: Any) -> None:
    finished = lab.finish(lab.spec("lora"))
    base = load_base(finished.spec.model, None, "cpu")
    samples = lab.held_out(finished.spec)
    batch = collate_padded(samples, PAD)
    with torch.no_grad():
        before = float(base(**batch).loss)
        after = float(PeftModel.from_pretrained(base, finished.adapter)(**batch).loss)
    assert finished.result.metrics["base_eval_loss"] == pytest.approx(before, abs=1e-5)
    assert finished.result.metrics["eval_loss"] == pytest.approx(after, abs=1e-5)


def test_scores_do_not_depend_on_the_batch_size(lab: Any) -> None:
    spec = lab.spec()
    base = load_base(spec.model, None, "cpu")
    samples = [*lab.held_out(spec), *lab.warm.tokenized(spec).train]
    whole = score(base, samples, batch_size=64, pad_token_id=PAD)
    single = score(base, samples, batch_size=1, pad_token_id=PAD)
    assert single.loss == pytest.approx(whole.loss, rel=1e-6)
    parts = score(base, samples[::2], batch_size=5, pad_token_id=PAD) + score(
        base, samples[1::2], batch_size=5, pad_token_id=PAD
    )
    assert parts.metrics() == pytest.approx(whole.metrics(), rel=1e-6)
    assert (parts.tokens, parts.samples) == (whole.tokens, len(samples))


def test_exact_match_is_what_greedy_generation_gives(lab: Any) -> None:
    """On a model that has learned some of the samples and not others."""
    spec = lab.spec("full", max_steps=150, eval_steps=150, save_steps=150)
    model = lab.reload(lab.finish(spec)).eval()
    tokenizer, corpus = lab.warm.tokenizer(spec.model), lab.warm.tokenized(spec)
    samples = [*corpus.train, *corpus.eval]
    hits = 0
    for sample in samples:
        labels = [label for label in sample["labels"] if label >= 0]
        generated = lab.continued(model, lab.prompt(sample), tokens=len(labels) + 4)
        answer, reference = (
            tokenizer.decode(ids).partition("<|im_end|>")[0].strip() for ids in (generated, labels)
        )
        hits += answer == reference
    assert 0 < hits < len(samples)
    metrics = score(model, samples, batch_size=8, pad_token_id=PAD).metrics()
    assert metrics["exact_match"] == hits / len(samples)


def test_the_head_sees_the_labelled_positions_only(lab: Any) -> None:
    spec = lab.spec()
    base = load_base(spec.model, None, "cpu")
    batch = collate_padded(lab.held_out(spec), PAD)
    logits, targets, _ = completion_logits(base, batch)
    assert len(logits) == len(targets) == int((batch["labels"] != -100).sum())
    assert not base.get_output_embeddings()._forward_pre_hooks


# --- the order of samples -----------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    batch_size=st.integers(1, 6),
    max_steps=st.integers(1, 60),
    seed=st.integers(0, 5),
)
def test_grouping_by_length_only_reorders(
    lengths: list[int], batch_size: int, max_steps: int, seed: int
) -> None:
    grouped, plain = (
        plan_samples(
            lengths, batch_size=batch_size, max_steps=max_steps, seed=seed, group_by_length=group
        )
        for group in (True, False)
    )
    assert len(plain) == batch_size * max_steps
    assert sorted(grouped) == sorted(plain)
    # Every epoch is a permutation of all samples.
    for start in range(0, len(plain) - len(lengths) + 1, len(lengths)):
        assert sorted(plain[start : start + len(lengths)]) == list(range(len(lengths)))


def test_grouping_by_length_leaves_little_padding() -> None:
    lengths = [10 + (i * 37) % 90 for i in range(200)]

    def padded(group: bool) -> int:
        plan = plan_samples(lengths, batch_size=4, max_steps=50, seed=0, group_by_length=group)
        batches = [[lengths[i] for i in plan[at : at + 4]] for at in range(0, 200, 4)]
        return sum(4 * max(batch) - sum(batch) for batch in batches)

    assert padded(True) < padded(False) / 4


def test_packed_samples_keep_their_positions_and_first_labels() -> None:
    samples = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
        {"input_ids": [8, 9], "labels": [8, 9]},
    ]
    batch = collate_packed(samples)  # type: ignore[arg-type]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]


def test_a_tiny_corpus_is_still_a_corpus(lab: Any) -> None:
    data = DataConfig(path=str(lab.data), max_samples=2, max_length=64).model_dump()
    assert lab.run(lab.spec(data=data, max_steps=2)).status == "finished"

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
from rayfin.objectives import SFT
from rayfin.objectives.tensors import label_logits, pack, pad
from rayfin.training.batches import plan_samples
from rayfin.training.scoring import score

PAD = 0


@pytest.fixture(scope="module")
def texts(lab: Any) -> dict[str, Any]:
    """Plain texts have loss on every token, the first one of a sample being the trap."""
    file: Path = lab.root / "texts.jsonl"
    rows = [{"text": "the cat sat on the mat " * (1 + i % 3) + str(i)} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(file), "max_length": 96}


NO_DROPOUT = {"lora_dropout": 0.0}
# AdamW divides by a gradient's size, and so makes whole steps of one that is rounding alone.
# Weights that were off by growth(128) moved no loss by more than 2e-6 at this rate, and by up to
# 4e-3 at ten times it.
RATE = 2e-3


@pytest.mark.numeric
def test_packing_changes_no_loss(lab: Any, texts: dict[str, Any]) -> None:
    for data in (None, texts):
        packed, padded = (
            lab.run(lab.spec("lora", NO_DROPOUT, data=data, packing=packing, learning_rate=RATE))
            for packing in (True, False)
        )
        assert packed.status == padded.status == "finished", packed.error
        assert lab.losses(packed) == lab.rounded(lab.losses(padded))


@pytest.mark.numeric
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
                learning_rate=RATE,
                per_device_train_batch_size=8 // parts,
                gradient_accumulation_steps=parts,
            )
        )
        for parts in (1, 2)
    )
    assert in_parts.status == "finished", in_parts.error
    assert lab.losses(in_parts) == lab.rounded(lab.losses(at_once))


@pytest.mark.numeric
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
            theirs = float(base(**pad([samples[i] for i in plan], PAD)).loss)
        assert lab.losses(lab.run(spec)) == lab.rounded([theirs])


@pytest.mark.numeric
def test_the_eval_loss_is_that_of_transformers(lab: Any) -> None:
    finished = lab.finish(lab.spec("lora"))
    base = load_base(finished.spec.model, None, "cpu")
    samples = lab.held_out(finished.spec)
    batch = pad(samples, PAD)
    with torch.no_grad():
        before = float(base(**batch).loss)
        after = float(PeftModel.from_pretrained(base, finished.adapter)(**batch).loss)
    assert finished.result.metrics["base_eval_loss"] == lab.rounded(before)
    assert finished.result.metrics["eval_loss"] == lab.rounded(after)


@pytest.mark.numeric
def test_scores_do_not_depend_on_the_batch_size(lab: Any) -> None:
    spec = lab.spec()
    base = load_base(spec.model, None, "cpu")
    samples = [*lab.held_out(spec), *lab.warm.tokenized(spec).train]
    whole = score(base, samples, SFT, batch_size=64, pad_token_id=PAD)
    single = score(base, samples, SFT, batch_size=1, pad_token_id=PAD)
    assert torch.equal(single[:, 1:], whole[:, 1:])
    assert single[:, 0].tolist() == lab.rounded(whole[:, 0].tolist())
    ours, theirs = (SFT.scores(it) for it in (single, whole))
    assert ours["eval_loss"] == lab.rounded(theirs["eval_loss"])
    assert len(whole) == len(samples)
    # In the order of the samples, whatever order they were computed in.
    first = score(base, samples[:1], SFT, batch_size=1, pad_token_id=PAD)
    assert first[0].tolist() == lab.rounded(whole[0].tolist())


def test_the_change_from_the_base_is_paired_by_sample() -> None:
    """Standard errors as the jackknife over samples has them, and what only the base answers."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 30, (400,), generator=draw).double()
    hard = torch.rand(400, generator=draw, dtype=torch.float64) * 5  # so that the pairs are alike
    noise = torch.randn(2, 400, generator=draw, dtype=torch.float64).abs() * 0.3
    hits = (torch.rand(2, 400, generator=draw) * (tokens + 1)).floor()
    base = torch.stack([(hard + noise[0]) * tokens, tokens, hits[0]], 1)
    ours = torch.stack([(hard / 2 + noise[1]) * tokens, tokens, hits[1]], 1)
    found = SFT.change(ours, base)
    keep = ~torch.eye(400, dtype=torch.bool)
    for name in ("eval_loss", "token_accuracy"):
        without = torch.tensor(
            [SFT.scores(ours[kept])[name] - SFT.scores(base[kept])[name] for kept in keep],
            dtype=torch.float64,
        )
        jackknife = float(((without - without.mean()).square().sum() * 399 / 400).sqrt())
        assert found[f"{name}_change_se"] == pytest.approx(jackknife, rel=0.01)
    lost = sum(
        b == t and a != t
        for a, b, t in zip(hits[1].tolist(), hits[0].tolist(), tokens.tolist(), strict=True)
    )
    assert 0 < lost == found["exact_match_only_base"]
    assert SFT.change(ours, ours) == {
        "eval_loss_change_se": 0, "token_accuracy_change_se": 0, "exact_match_only_base": 0,
    }  # fmt: skip
    one = SFT.change(ours[:1], base[:1])
    assert set(one) == {"exact_match_only_base"}


def test_exact_match_is_what_greedy_generation_gives(lab: Any) -> None:
    """On a model that has learned some of the samples and not others."""
    spec = lab.spec("full", max_steps=150, eval_steps=150, save_steps=150)
    model = lab.reload(lab.finish(spec)).eval()
    tokenizer, corpus = lab.warm.tokenizer(spec), lab.warm.tokenized(spec)
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
    metrics = SFT.scores(score(model, samples, SFT, batch_size=8, pad_token_id=PAD))
    assert metrics["exact_match"] == hits / len(samples)


def test_the_head_sees_the_labelled_positions_only(lab: Any) -> None:
    spec = lab.spec()
    base = load_base(spec.model, None, "cpu")
    batch = pad(lab.held_out(spec), PAD)
    logits, targets, _ = label_logits(base, batch)
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
    batch = pack(samples)  # type: ignore[arg-type]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]


def test_a_tiny_corpus_is_still_a_corpus(lab: Any) -> None:
    data = DataConfig(path=str(lab.data), max_samples=2, max_length=64).model_dump()
    assert lab.run(lab.spec(data=data, max_steps=2)).status == "finished"

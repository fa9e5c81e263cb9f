"""The verdict of a sweep: better by how much, on how many samples, how sure, and what then."""

import json
import math
from datetime import UTC, datetime, timedelta

import pytest

from rayfin.config import load_config
from rayfin.evaluation.change import change_of, paired_shares, t_quantile, wilson
from rayfin.evaluation.verdict import SweepOutcome, sweep_verdict
from rayfin.history.record import TrialRecord

START = datetime(2025, 3, 4, 12, tzinfo=UTC)
RATES = {"space": "loguniform", "lower": 1e-5, "upper": 3e-3}
# What 60 held-out samples gave: 41 answered exactly, by the base model 3, of which 1 was lost.
SCORED = {
    "eval_loss": 1.25, "base_eval_loss": 3.5, "eval_loss_change_se": 0.1,
    "perplexity": math.exp(1.25), "base_perplexity": math.exp(3.5),
    "exact_match": 41 / 60, "base_exact_match": 3 / 60, "exact_match_only_base": 1,
    "token_accuracy": 0.8, "base_token_accuracy": 0.5, "token_accuracy_change_se": 0.05,
}  # fmt: skip


def config(metric="eval_loss", **sections):
    sweep = {"metric": metric, "parameters": {"method.r": [8, 16], "train.learning_rate": RATES}}
    return load_config({"sweep": sweep, **sections})


def trial(number=0, status="finished", samples=60, without=(), **metrics):
    scores = {k: v for k, v in {**SCORED, **metrics}.items() if k not in without}
    ended = status in ("finished", "stopped")
    failed = status in ("failed", "oom")
    return TrialRecord(
        trial_id=f"t{number}",
        sweep_id="sweep-1",
        fingerprint="f",
        status=status,
        created_at=START + timedelta(minutes=number),
        updated_at=START + timedelta(minutes=number + 1),
        spec={"method": {"type": "lora", "r": 16}, "train": {"learning_rate": 8e-4}},
        scenario={"data": {"rows_eval": samples}} if samples else {},
        metrics=scores if ended else {},
        error="the loss became NaN" if failed else None,
    )


def verdict(trials, metric="eval_loss", best=0, **options):
    chosen = None if best is None else trials[best]
    return sweep_verdict(SweepOutcome(trials, config(metric), chosen, **options))


# --- intervals ----------------------------------------------------------------------------


def test_the_interval_of_paired_shares_is_newcombe_s() -> None:
    """His own example (1998, table II): 36, 12, 2, 0 of 50, method 10."""
    assert paired_shares(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    assert wilson(0, 60) == pytest.approx((0, 1.96**2 / (60 + 1.96**2)), abs=1e-4)


@pytest.mark.parametrize(
    "shares", [(0.05, 0.6, 0.02, 0.33), (0.5, 0.1, 0.1, 0.3), (0, 0.1, 0, 0.9)]
)
def test_nineteen_of_twenty_intervals_hold_the_difference(shares) -> None:
    """Exactly: the probability of every table of 24 samples whose interval holds it."""
    samples, covered = 24, 0.0
    for both in range(samples + 1):
        for first in range(samples + 1 - both):
            for second in range(samples + 1 - both - first):
                counts = (both, first, second, samples - both - first - second)
                low, high = paired_shares(*counts)
                if low <= shares[1] - shares[2] <= high:
                    ways = math.factorial(samples) / math.prod(map(math.factorial, counts))
                    covered += ways * math.prod(p**n for p, n in zip(shares, counts, strict=True))
    assert covered > 0.945


def test_student_s_t_is_that_of_the_tables() -> None:
    for freedom, value in ((9, 2.2622), (19, 2.0930), (59, 2.0010), (119, 1.9801)):
        assert t_quantile(freedom) == pytest.approx(value, abs=1e-4)


def test_what_was_recorded_becomes_an_interval() -> None:
    loss = change_of(trial(), "eval_loss")
    assert (loss.gain, loss.low, loss.high) == pytest.approx((2.25, 2.0499, 2.4501), abs=1e-4)
    exact = change_of(trial(), "exact_match")
    assert (exact.low, exact.high) == paired_shares(2, 39, 1, 18)
    factor = change_of(trial(), "perplexity")
    assert (factor.gain, factor.low) == pytest.approx((2.25, 2.0499), abs=1e-4)
    accuracy = change_of(trial(), "token_accuracy")
    assert (accuracy.gain, accuracy.low) == pytest.approx((0.3, 0.3 - 2.001 * 0.05), abs=1e-4)


# --- the sentence -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("eval_loss", "has a loss of 1.25 nats a token on 60 held-out samples, the base model 3.5: "
         "2.25 better (95 % interval 2.05 to 2.45)."),
        ("exact_match", "answers 41 of 60 held-out samples exactly, the base model 3: "
         "63 points better (95 % interval 48 to 74)."),
        ("token_accuracy", "predicts 80.0 % of the answer tokens of 60 held-out samples, the base "
         "model 50.0 %: 30 points better (95 % interval 20 to 40)."),
        ("perplexity", "has a perplexity of 3.49 on 60 held-out samples, the base model 33.12: "
         "9.49 times lower (95 % interval ÷ 7.77 to ÷ 11.6)."),
    ],
)  # fmt: skip
def test_it_says_by_how_much_on_how_many_and_how_sure(metric, says) -> None:
    found = verdict([trial()], metric)
    assert found.outcome == "better"
    assert found.sentence == ("The one finished trial (#1: lora, r 16, learning_rate 8e-4) " + says)
    assert found.caution is None
    assert json.loads(json.dumps(found.as_dict()))["change"]["samples"] == 60


def test_the_best_of_several_is_said_to_flatter() -> None:
    rows = [trial(0), trial(1, eval_loss=1.1), trial(2, "failed"), trial(3, "stopped")]
    found = verdict(rows, best=1)
    assert found.sentence.startswith("The best of 2 finished trials (#2: ")
    assert "chosen among 3 trials by these same samples" in found.caution
    assert found.text.index(found.sentence) == 0


def test_what_may_be_chance_is_said_to_be() -> None:
    found = verdict([trial(eval_loss=3.4)])
    assert found.outcome == "no clear difference"
    assert "0.10 better, but that may be chance (95 % interval −0.10 to 0.30 contains zero)" in (
        found.sentence
    )
    assert "hold out more samples (data.val_size; 60 now)" in found.next
    none = {"exact_match": 0.0, "base_exact_match": 0.0, "exact_match_only_base": 0}
    same = verdict([trial(**none)], "exact_match")
    assert same.outcome == "no clear difference"
    assert "the base model 0: no difference (95 % interval −6 to 6)" in same.sentence


def test_a_worse_model_is_called_worse() -> None:
    found = verdict([trial(eval_loss=4.0)])
    assert found.outcome == "worse"
    assert "0.50 worse (95 % interval −0.70 to −0.30)" in found.sentence
    assert "lower train.learning_rate" in found.next


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (trial(without=["eval_loss_change_se"]), "recorded without what one is made from"),
        (trial(samples=6), "6 held-out samples are too few for one"),
        (trial(samples=None), "did not record its number of held-out samples"),
    ],
    ids=["an earlier version's", "few samples", "imported"],
)
def test_no_interval_is_invented(row, why) -> None:
    found = verdict([row])
    assert found.outcome == "no interval"
    assert "2.25 better, without an interval (" in found.sentence
    assert why in found.sentence
    assert (found.change.low, found.change.high) == (None, None)


def test_what_is_worse_without_an_interval_is_not_to_be_published() -> None:
    row = trial(samples=6)
    row.metrics["eval_loss"] = row.metrics["base_eval_loss"] + 1
    found = verdict([row])
    assert found.outcome == "no interval"
    assert "lower train.learning_rate" in found.next and "publish" not in found.next


@pytest.mark.parametrize(
    "wrong",
    [{"exact_match_only_base": 50}, {"exact_match_only_base": 4}, {"exact_match_only_base": "1"}],
)
def test_counts_that_contradict_each_other_give_no_interval(wrong) -> None:
    assert verdict([trial(**wrong)], "exact_match").outcome == "no interval"


def test_without_the_base_model_s_score_there_is_no_comparison() -> None:
    found = verdict([trial(without=[key for key in SCORED if key.startswith("base_")])])
    assert found.outcome == "no base"
    assert "the base model was not scored" in found.sentence


@pytest.mark.parametrize(
    ("trials", "sentence", "after"),
    [
        ([], "No trial was started.", "start the sweep again"),
        ([trial(0, "failed"), trial(1, "oom")], "No trial finished: 1 failed, 1 out of memory.",
         "`rayfin history show t0` tells why"),
        ([trial(0, "stopped")], "No trial finished: 1 stopped early.", "so that a trial finishes"),
        ([trial(0, "running")], "No trial finished: 1 running.", "wait for it to end"),
        ([trial(0, "interrupted")], "No trial finished: 1 interrupted.", "--resume"),
    ],
    ids=["none", "failed", "stopped", "running", "interrupted"],
)  # fmt: skip
def test_a_sweep_without_a_result_says_so(trials, sentence, after) -> None:
    found = verdict(trials, best=None)
    assert (found.outcome, found.sentence) == ("no result", sentence)
    assert after in found.next


def test_the_next_step_follows_from_what_happened() -> None:
    assert "--resume publish.name=NAME publishes it" in verdict([trial()]).next
    model = {"model": {"name": "my model", "revision": None}}
    row = trial().updated(spec=trial().spec | model)
    published = verdict([row], adapter="faq@3").next
    assert published.startswith("Next: `rayfin chat --use faq@3 'model.name=my model' storage=")
    wide = row.updated(spec=model | {"method": {"type": "adalora", "init_r": 96, "target_r": 8}})
    assert verdict([wide], adapter="faq@3").next.endswith(" engine.max_rank=96`.")
    short = row.updated(scenario={"model": {"max_position_embeddings": 1024}})
    assert verdict([short], adapter="faq@3").next.endswith(" engine.max_length=1024`.")
    widest = row.updated(spec=model | {"method": {"type": "lora", "r": 2048}})
    assert verdict([widest], adapter="faq@3").next.startswith("Next: `rayfin adapters show faq@3 ")
    for method in ({"type": "full"}, {"type": "oft"}):
        alone = row.updated(spec=model | {"method": method})
        said = verdict([alone], adapter="faq@3").next
        assert said.startswith("Next: `rayfin adapters show faq@3 "), method
    # It is saved as plain LoRA of twice the rank.
    pissa = {"type": "lora", "r": 40, "init_lora_weights": "pissa"}
    doubled = row.updated(spec=model | {"method": pissa})
    assert verdict([doubled], adapter="faq@3").next.endswith(" engine.max_rank=80`.")
    assert "--resume carries on" in verdict([trial()], adapter="faq@3", interrupted=True).next

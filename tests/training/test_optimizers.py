"""Every optimizer, schedule and regularisation trains, and goes on after a kill to the same end."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import Trainer, TrainingArguments
from transformers.optimization import get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from rayfin.config import Config, TrainConfig, load_config
from rayfin.config.optimizers import OPTIMIZERS
from rayfin.config.schema import Schedule
from rayfin.errors import ConfigError
from rayfin.methods import METHODS
from rayfin.models import import_bitsandbytes
from rayfin.objectives import objective_of
from rayfin.objectives.tensors import label_logits
from rayfin.training.optimization import check_optimization
from rayfin.training.optimizer_state import named_state, states_of
from rayfin.training.schedules import idle_patience, idle_warmup, warmup_steps
from rayfin.training.sharding import optimizer_bytes
from rayfin.training.trainer import TrialTrainer
from rayfin.training.trial_cache import TrialCache
from rayfin.tuning.space import SearchSpace
from rayfin.tuning.space_check import space_notes

ON_CPU = [name for name, facts in OPTIMIZERS.items() if not facts.paged]
PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_steps": 1}
PLATEAU |= {"lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 0.5}}


def test_names_are_transformers_own_and_so_is_the_default() -> None:
    assert set(OPTIMIZERS) <= {name.value for name in OptimizerNames}
    assert set(Schedule.__args__) == {name.value for name in SchedulerType}
    assert TrainConfig().optim == TrainingArguments.default_optim
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "neftune_noise_alpha"):
        ours = TrainConfig.model_fields[name].default
        assert ours == TrainingArguments.__dataclass_fields__[name].default, name


@pytest.mark.parametrize("name", [it.value for it in OptimizerNames if it.value not in OPTIMIZERS])
def test_transformers_other_optimizers_are_refused_with_what_is_missing(name: str) -> None:
    with pytest.raises(ConfigError) as told:
        load_config({"train": {"optim": name}})
    message = str(told.value)
    assert "\n" not in message and f"train.optim: '{name}': " in message
    assert "nstall" in message or "import" in message, message
    assert "rayfin trains with adamw_torch_fused, adamw_torch, adamw_8bit" in message


def test_a_misspelt_optimizer_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no such optimizer.*did you mean 'adamw_8bit'"):
        load_config({"train": {"optim": "adamw_8bitt"}})


class Made:
    """One matrix and one short vector, and an optimizer of them as Trainer makes it."""

    def __init__(self, name: str, optim_args: str | None = None, rows: int = 32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = {
            "matrix": torch.nn.Parameter(torch.randn(rows, 256, generator=generator)),
            "vector": torch.nn.Parameter(torch.randn(8, generator=generator)),
        }
        import_bitsandbytes()
        arguments: Any = SimpleNamespace(
            optim=OptimizerNames(name),
            optim_args=optim_args,
            learning_rate=1e-2,
            adam_beta1=0.9,
            adam_beta2=0.99,
            adam_epsilon=1e-8,
        )
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        self.optimizer: Any = kind([*self.parameters.values()], **options)

    def step(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        states = {n: self.optimizer.state[p] for n, p in self.parameters.items()}
        return named_state({n: s for n, s in states.items() if s}, lambda whole: whole)


STATES = [(name, None) for name in ON_CPU]
STATES += [("sgd", "momentum=0.5"), ("rmsprop", "momentum=0.5,centered=true")]


@pytest.mark.parametrize(("name", "arguments"), STATES)
def test_an_optimizers_state_is_kept_whole_and_weighs_what_is_estimated(
    name: str, arguments: str | None
) -> None:
    made = Made(name, arguments)
    made.step(1)
    made.step(2)
    kept = {key: tensor.clone() for key, tensor in made.state().items()}
    again = Made(name, arguments)
    with torch.no_grad():
        for mine, theirs in zip(again.parameters.values(), made.parameters.values(), strict=True):
            mine.copy_(theirs)
    states = states_of(again.parameters, kept, lambda whole, parameter: whole)
    numbered = {number: states[n] for number, n in enumerate(again.parameters) if n in states}
    groups = again.optimizer.state_dict()["param_groups"]
    again.optimizer.load_state_dict({"state": numbered, "param_groups": groups})
    for one in (made, again):
        one.step(3)
    for parameter in made.parameters:
        assert torch.equal(made.parameters[parameter], again.parameters[parameter])
    ends = made.state(), again.state()
    assert ends[0].keys() == ends[1].keys() == kept.keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in kept)
    of_matrix = [t for key, t in ends[0].items() if key.endswith("/matrix") and t.ndim]
    measured = sum(
        t.numel() * t.element_size() for t in of_matrix if t.numel() != 256 or name == "adafactor"
    )
    train = TrainConfig(optim=name, optim_args=arguments)
    method = METHODS["lora"].model_validate({"type": "lora", "r": 32})
    facts: Any = SimpleNamespace(hidden_size=256)
    assert measured / (32 * 256) == pytest.approx(optimizer_bytes(train, method, facts), rel=1e-6)


def test_adamws_state_has_the_names_that_checkpoints_always_had() -> None:
    made = Made("adamw_torch_fused")
    made.step(1)
    moments = {f"{m}/{n}" for m in ("exp_avg", "exp_avg_sq") for n in ("matrix", "vector")}
    state = made.state()
    assert state.keys() == {"step", *moments}
    assert state["step"].dtype == torch.float32 and state["step"].ndim == 0


def test_one_trials_32_bit_embeddings_are_not_the_next_ones_matrices(lab: Any) -> None:
    """bitsandbytes notes embeddings by their place among the parameters, for all optimizers."""
    from bitsandbytes.optim import GlobalOptimManager

    tables = lab.spec(
        "lora", {"modules_to_save": ["embed_tokens"]}, optim="adamw_8bit", max_steps=1
    )
    assert lab.run(tables).status == "finished"
    manager = GlobalOptimManager.get_instance()
    assert not manager.pid2config and not manager.index2config
    assert not manager.module_weight_config_triple


@pytest.mark.parametrize("name", ["polynomial", "warmup_stable_decay"])
def test_rates_are_those_of_transformers(
    name: str, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {
        "polynomial": {"power": 2.0, "lr_end": 1e-4},
        "warmup_stable_decay": {"num_decay_steps": 3},
    }
    seen: list[float] = []
    step = TrialTrainer.training_step

    def looking(trainer: TrialTrainer, *args: Any, **kwargs: Any) -> Any:
        seen.append(trainer.optimizer.param_groups[0]["lr"])  # type: ignore[union-attr]
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(TrialTrainer, "training_step", looking)
    train = {"lr_scheduler_type": name, "lr_scheduler_kwargs": own[name], "warmup_steps": 2}
    lab.run(lab.spec(**train, learning_rate=1e-2))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule: Any = get_scheduler(name, optimizer, 2, 8, own[name])
    assert seen == [1e-2 * schedule.lr_lambdas[0](step) for step in range(8)]


def test_the_rate_falls_where_the_eval_loss_does_not(lab: Any) -> None:
    directory = lab.directory()
    spec = lab.spec(**PLATEAU, save_steps=1, learning_rate=1e-4, max_steps=5)
    assert lab.run(spec, directory=directory).status == "finished"
    (progress,) = directory.glob("checkpoints/checkpoint-4/progress.json")
    # The first evaluation is the best one, and each of the three after it halves the rate.
    assert f'"learning_rate": {1e-4 / 8!r}' in progress.read_text()


SILENT = 1e-12
"""A learning rate at which nothing is learned."""


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_noise_is_for_training_only_and_leaves_with_it(method: str, lab: Any) -> None:
    warm = TrialCache()
    plain = lab.run(lab.spec(method, learning_rate=SILENT, max_steps=2), warm=warm)
    noisy = lab.spec(method, learning_rate=SILENT, max_steps=2, neftune_noise_alpha=50.0)
    ran = lab.run(noisy, warm=warm)
    assert lab.losses(ran) != lab.losses(plain)
    assert ran.metrics["eval_loss"] == plain.metrics["eval_loss"]
    embeddings: Any = warm.base(noisy, describe()).get_input_embeddings()
    assert not embeddings._forward_hooks and not hasattr(embeddings, "neftune_noise_alpha")

    def left(_: object) -> None:
        raise KeyboardInterrupt

    early = noisy.model_copy(update={"train": noisy.train.model_copy(update={"eval_steps": 1})})
    with pytest.raises(KeyboardInterrupt):
        lab.run(early, report=left, warm=warm)
    assert warm.loads == 1 and not embeddings._forward_hooks


def describe() -> Any:
    from rayfin.hardware import describe_hardware

    return describe_hardware()


def test_smoothing_is_of_the_loss_over_labelled_tokens_and_not_of_the_eval_loss(lab: Any) -> None:
    spec = lab.spec(label_smoothing_factor=0.2, learning_rate=SILENT, max_steps=1)
    plain = lab.spec(learning_rate=SILENT, max_steps=1)
    model = lab.warm.base(spec, describe())
    objective = objective_of(spec.train)
    samples = lab.warm.tokenized(spec).train[:3]
    batch = objective.collate(samples, 0)
    with torch.no_grad():
        logits, targets, _ = label_logits(model, batch)
        likelihoods = functional.log_softmax(logits.float(), -1)
        wanted = -0.8 * likelihoods.gather(1, targets[:, None]).sum()
        wanted -= 0.2 * likelihoods.mean(1).sum()
        loss = float(objective.loss(model, batch))
    assert loss == pytest.approx(float(wanted), rel=1e-5)
    ran, other = lab.run(spec), lab.run(plain)
    assert ran.metrics["eval_loss"] == other.metrics["eval_loss"]
    assert lab.losses(ran) != lab.losses(other)


def test_attention_is_computed_as_it_is_asked_for(lab: Any) -> None:
    spec = lab.spec(max_steps=2, learning_rate=1e-3)
    eager = spec.model_copy(
        update={"model": spec.model.model_copy(update={"attn_implementation": "eager"})}
    )
    warm = TrialCache()
    base: Any = warm.base(eager, describe())
    assert base.config._attn_implementation == "eager"
    ends = [lab.run(one, warm=warm).metrics["eval_loss"] for one in (eager, spec)]
    assert ends[0] == lab.rounded(ends[1]) and warm.loads == 2


def test_a_trial_that_needs_a_gpu_says_so_on_a_machine_without_one(lab: Any) -> None:
    result = lab.run(lab.spec(optim="paged_lion_8bit"))
    assert result.status == "failed"
    assert result.error is not None
    assert "train.optim=paged_lion_8bit needs a GPU" in result.error and "lion_8bit" in result.error


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"optim": "lion_8bit", "adam_epsilon": 1e-6}, "train.adam_epsilon=1e-06 has no effect with"),
    ({"optim_args": "momentum=0.9"}, "train.optim=adamw_torch_fused: .* it takes none"),
    ({"optim": "sgd", "optim_args": "momentum"}, "momentum='' should be a number from 0 to below"),
    ({"optim": "sgd", "optim_args": "nesterov=true"}, "nesterov needs a momentum above 0"),
    ({"optim": "sgd", "optim_args": "dampening=0.1"}, "dampening has no effect without"),
    ({"optim": "sgd", "optim_args": "momentum=0.9,"}, "has an empty part; write name=value"),
    ({"optim": "sgd", "optim_args": "momentum=0.9,momentum=0.8"}, "is there twice"),
    ({"optim": "ademamix", "optim_args": "t_alpha=0"}, "t_alpha='0' should be a whole number"),
    ({"warmup_steps": 2, "warmup_ratio": 0.1}, "say the same; give one of them"),
    ({"warmup_steps": 60}, "would never reach its peak; use 59 or less"),
    ({"warmup_steps": 2, "lr_scheduler_type": "constant"}, "has no warm-up.*constant_with_warmup"),
    ({"lr_scheduler_kwargs": {"power": 2}}, "cosine has no such argument.*it takes num_cycles"),
    ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"power": 2}}, "it takes none"),
    (
        {"lr_scheduler_type": "warmup_stable_decay"},
        "needs train.lr_scheduler_kwargs.num_decay_steps",
    ),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "One of min_lr or min_lr_rate should be set"),
    ({"lr_scheduler_type": "greedy"}, "its min_lr, 0.001, is above train.learning_rate=0.0002"),
    (
        {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 59},
        },
        "num_decay_steps=59 with 2 of warm-up are more than the 60 in all",
    ),
    (
        {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"factor": 2.0}},
        "Factor should be < 1.0",
    ),
    (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}},
        "must be smaller than initial lr",
    ),
    (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "two"}},
        "polynomial: .*its train.lr_scheduler_kwargs are lr_end, power",
    ),
    ({"use_liger_kernel": True}, "train.use_liger_kernel=true needs liger-kernel.*pip install"),
]


@pytest.mark.parametrize(("train", "words"), REFUSED)
def test_what_can_t_work_or_has_no_effect_is_refused(train: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as told:
        check_optimization(Config.model_validate({"train": train}))
    assert "\n" not in str(told.value)


_NO_WARMUP = "warmup_ratio=0.2 has no effect: .* has no warm-up; leave it out, or use constant_with"
_NO_PEAK = "warmup_ratio=0.9 of 5 steps is all of them: .* use train.warmup_steps=4 or less"
_WARMUP = {"lr_scheduler_type": "constant", "warmup_ratio": 0.2}


@pytest.mark.parametrize(
    ("train", "axes", "words"),
    [
        (_WARMUP, {"method.r": [2, 4]}, _NO_WARMUP),
        (_WARMUP | {"lr_scheduler_type": "greedy"}, {"method.r": [2, 4]}, _NO_WARMUP),
        (_WARMUP | {"warmup_ratio": 0.0}, {"method.r": [2, 4]}, None),
        (_WARMUP, {"train.lr_scheduler_type": ["constant", "cosine"]}, None),
        (_WARMUP, {"train.warmup_ratio": [0.1, 0.2]}, None),
        ({"max_steps": 5, "warmup_ratio": 0.9}, {"method.r": [2, 4]}, _NO_PEAK),
        ({"warmup_ratio": 0.9}, {"train.max_steps": [60, 5]}, _NO_PEAK),
        ({"max_steps": 5}, {"train.warmup_ratio": [0.1, 0.9]}, _NO_PEAK),
        ({"max_steps": 1, "warmup_ratio": 0.9}, {"method.r": [2, 4]}, None),
        ({"num_train_epochs": 1, "warmup_ratio": 0.9}, {"method.r": [2, 4]}, None),
    ],
)
def test_a_share_of_warm_up_without_effect_or_of_all_steps_is_named(
    train: dict[str, Any], axes: dict[str, list[Any]], words: str | None
) -> None:
    """It trained before it was named, and a half-done sweep with it goes on."""
    own = {"lr_scheduler_kwargs": {"min_lr": 0.0}} if "greedy" in train.values() else {}
    config = Config.model_validate({"train": train | own, "sweep": {"parameters": axes}})
    check_optimization(config)
    lines = space_notes(SearchSpace(config))
    assert len(lines) == (words is not None) and re.search(words or "", " ".join(lines))
    if "method.r" in axes:
        assert [*idle_warmup(config.train, config.train.steps)] == lines


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"early_stopping_patience": 3}, "early_stopping_patience=3 .* 4 evaluations .*use 2 or"),
        ({"early_stopping_patience": 2}, None),
        ({"early_stopping_patience": 1, "eval_steps": 30}, "2 evaluations of a trial; evaluate"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "patience=10 .* 4 evaluations .*use 1 or"),
        (PLATEAU | {"eval_steps": 20}, None),
        ({"lr_scheduler_type": "greedy"}, "patience=10 .* 4 evaluations .*use 2 or less"),
        ({"lr_scheduler_type": "greedy", "eval_steps": 5}, None),
    ],
)
def test_a_patience_that_can_t_act_is_named(train: dict[str, Any], words: str | None) -> None:
    told = " ".join(idle_patience(TrainConfig.model_validate(train)))
    assert re.search(words, told) if words else not told


def test_one_step_trains(lab: Any) -> None:
    metrics = lab.run(lab.spec(max_steps=1)).metrics
    assert metrics["eval_loss"] != metrics["base_eval_loss"]


@pytest.mark.parametrize(("steps", "rising"), [(1, 0), (2, 1), (33, 1), (34, 2), (60, 2)])
def test_a_share_of_warm_up_is_rounded_up_but_that_of_one_step(steps: int, rising: int) -> None:
    assert warmup_steps(TrainConfig(max_steps=steps), steps) == rising
    every = TrainConfig(max_steps=steps, warmup_ratio=0.99)
    assert warmup_steps(every, steps) == (0 if steps == 1 else steps)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"attn_implementation": "flash_attention_2"}, "needs flash-attn, which isn't installed"),
        ({"attn_implementation": "flash_attention_2", "dtype": "float32"}, "computes in 16 bits"),
    ],
)
def test_attention_that_can_t_be_computed_is_refused(model: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_optimization(Config.model_validate({"model": model}))

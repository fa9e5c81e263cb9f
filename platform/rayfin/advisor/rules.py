"""The rules that recommend methods for a scenario where no trial says anything about it."""

from __future__ import annotations

from dataclasses import dataclass

from rayfin.advisor.scenario import Scenario
from rayfin.language import Language


@dataclass(frozen=True)
class Rule:
    """A rule: the scenarios that it applies to, and what it recommends for them."""

    hardware: tuple[str, ...] | None
    """The hardware that the rule applies to; here and below, None stands for any."""
    data_scale: tuple[str, ...] | None
    latency: tuple[str, ...] | None
    methods: tuple[str, ...]
    """The recommended methods, the first choice first; none where the scenario says too little."""
    gradient_checkpointing: bool
    gradient_accumulation: bool
    zh: str
    en: str
    reason: str
    """In English, as the next two; `rayfin.language.localized` has the Chinese."""
    risk: str
    deployment: str

    def fits(self, scenario: Scenario) -> bool:
        """Whether the rule applies to a scenario."""
        return all(
            allowed is None or value in allowed
            for allowed, value in (
                (self.hardware, scenario.hardware),
                (self.data_scale, scenario.data_scale),
                (self.latency, scenario.latency),
            )
        )


RULES = (
    Rule(
        hardware=("cpu",),
        data_scale=None,
        latency=None,
        methods=("lora", "p_tuning"),
        gradient_checkpointing=False,
        gradient_accumulation=False,
        zh="推荐 LoRA 或 P-Tuning，优先选择轻量模型并结合量化部署。",
        en="LoRA or P-Tuning; prefer a small model, and quantise it for deployment.",
        reason="without a GPU the base model's forward pass is nearly all of the time, so that few "
        "trainable parameters and a small model are what helps",
        risk="4-bit weights save memory on CPU but no time; P-Tuning needs more steps than LoRA",
        deployment="one base model with 8-bit weights (engine.weights=int8) and the adapter beside",
    ),
    Rule(
        hardware=("single_gpu",),
        data_scale=("large",),
        latency=None,
        methods=("qlora",),
        gradient_checkpointing=True,
        gradient_accumulation=False,
        zh="推荐 QLoRA，利用 4bit 加载与梯度检查点应对大规模数据。",
        en="QLoRA: a base model in 4 bits and gradient checkpointing make room for large data.",
        reason="4-bit weights and recomputed activations leave memory for large batches, which a "
        "long run over much data needs most",
        risk="4-bit products and recomputed activations each cost time for every step",
        deployment="the 4-bit base that it was trained on (engine.quantization_bit=4)",
    ),
    Rule(
        hardware=("single_gpu",),
        data_scale=("small", "medium"),
        latency=None,
        methods=("lora",),
        gradient_checkpointing=False,
        gradient_accumulation=True,
        zh="LoRA 即可满足需求，结合梯度累积提升吞吐。",
        en="LoRA is enough; gradient accumulation raises the throughput.",
        reason="the base fits in its own precision, and with little data the adapter's capacity is "
        "not what limits it",
        risk="small data overfit: watch the evaluation loss, and stop early",
        deployment="an adapter in a shared deployment, switched per request",
    ),
    Rule(
        hardware=("multi_gpu",),
        data_scale=None,
        latency=("strict",),
        methods=("qlora",),
        gradient_checkpointing=True,
        gradient_accumulation=False,
        zh="QLoRA + 分布式推理，或蒸馏后上线轻量模型。",
        en="QLoRA with distributed inference, or a small model distilled from it.",
        reason="answers that are waited for need several GPUs at inference, or a smaller model",
        risk="4 bits save memory, and cost time to the first token on some GPUs; a distilled model "
        "has to be evaluated as a new one",
        deployment="several replicas (deployment.replicas), or a distilled model of its own",
    ),
    Rule(
        hardware=("multi_gpu",),
        data_scale=None,
        latency=("normal",),
        methods=("lora", "qlora"),
        gradient_checkpointing=False,
        gradient_accumulation=False,
        zh="LoRA/QLoRA 均可，根据数据规模选择是否量化。",
        en="LoRA or QLoRA; let the size of the data decide whether to quantise.",
        reason="several GPUs hold the base in its own precision, and each step's batch is shared",
        risk="many workers make the batch larger, and with it the learning rate that fits",
        deployment="an adapter in a shared deployment, switched per request",
    ),
    Rule(
        hardware=None,
        data_scale=None,
        latency=None,
        methods=(),
        gradient_checkpointing=False,
        gradient_accumulation=False,
        zh="请提供完整场景信息。",
        en="Please describe the scenario in full.",
        reason="the scenario does not say enough",
        risk="",
        deployment="",
    ),
)
"""All rules, of which the first that fits applies; the last one fits every scenario."""


def rule_for(scenario: Scenario) -> Rule:
    """Return the rule that applies to a scenario."""
    return next(rule for rule in RULES if rule.fits(scenario))


def recommend_text(scenario: Scenario, lang: Language = "zh") -> str:
    """Return the rule's sentence for a scenario; raises ValueError for an unknown language."""
    if lang not in ("zh", "en"):
        raise ValueError(f"lang='{lang}' must be zh or en")
    sentence: str = getattr(rule_for(scenario), lang)
    return sentence

"""From a method's settings to a trainable model, and back to the untouched base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_never

from rayfin.config.method import (
    AdaloraConfig,
    DoraConfig,
    FullConfig,
    Ia3Config,
    LoraConfig,
    MethodConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    QloraConfig,
    RsloraConfig,
)
from rayfin.errors import MethodError

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PreTrainedModel

ADAPTER = "default"


def peft_config(settings: MethodConfig, max_steps: int, tokenizer_path: str) -> PeftConfig | None:
    """PEFT's configuration for `settings`; None for full fine-tuning.

    `max_steps` sets AdaLoRA's budget schedule: the first tenth of the steps at full rank and the
    last quarter at the target, with the cubic schedule of arXiv:2303.10512 between.
    """
    import peft

    common: dict[str, Any] = {"task_type": peft.TaskType.CAUSAL_LM}
    match settings:
        case FullConfig():
            return None
        case LoraConfig() | QloraConfig() | DoraConfig() | RsloraConfig():
            return peft.LoraConfig(
                r=settings.r,
                lora_alpha=_whole(settings.lora_alpha),  # type: ignore[arg-type]
                lora_dropout=settings.lora_dropout,
                target_modules=_modules(settings.target_modules),
                use_dora=settings.type == "dora",
                use_rslora=settings.type == "rslora",
                **common,
            )
        case AdaloraConfig():
            return peft.AdaLoraConfig(
                init_r=settings.init_r,
                target_r=settings.target_r,
                lora_alpha=_whole(settings.lora_alpha),  # type: ignore[arg-type]
                lora_dropout=settings.lora_dropout,
                target_modules=_modules(settings.target_modules),
                orth_reg_weight=settings.orth_reg_weight,
                total_step=max_steps,
                tinit=max_steps // 10,
                tfinal=max(1, max_steps // 4),
                deltaT=max(1, max_steps // 100),
                **common,
            )
        case Ia3Config():
            return peft.IA3Config(
                target_modules=_modules(settings.target_modules),
                feedforward_modules=_modules(settings.feedforward_modules),
                **common,
            )
        case PTuningConfig():
            return peft.PromptEncoderConfig(
                num_virtual_tokens=settings.num_virtual_tokens,
                encoder_reparameterization_type=settings.encoder_reparameterization_type,
                encoder_hidden_size=settings.encoder_hidden_size,  # type: ignore[arg-type]
                encoder_num_layers=settings.encoder_num_layers,
                encoder_dropout=settings.encoder_dropout,
                **common,
            )
        case PrefixTuningConfig():
            return peft.PrefixTuningConfig(
                num_virtual_tokens=settings.num_virtual_tokens,
                prefix_projection=settings.prefix_projection,
                encoder_hidden_size=settings.encoder_hidden_size,  # type: ignore[arg-type]
                **common,
            )
        case PromptTuningConfig():
            text = settings.prompt_tuning_init == "TEXT"
            return peft.PromptTuningConfig(
                num_virtual_tokens=settings.num_virtual_tokens,
                prompt_tuning_init=settings.prompt_tuning_init,
                prompt_tuning_init_text=settings.prompt_tuning_init_text if text else None,
                tokenizer_name_or_path=tokenizer_path if text else None,
                **common,
            )
        case _:
            assert_never(settings)


def attach(
    base: PreTrainedModel,
    settings: MethodConfig,
    max_steps: int,
    tokenizer_path: str,
    *,
    keep_dtype: bool = False,
) -> torch.nn.Module:
    """`base` made trainable in place: a PeftModel, or for full fine-tuning the base itself.

    Trained parameters are float32 whatever the base is: AdamW's updates vanish in bfloat16.
    `keep_dtype` leaves the base's own as they are, for optimizers that keep float32 copies.
    Raises MethodError where target modules don't exist in this model.
    """
    import peft
    import torch

    config = peft_config(settings, max_steps, tokenizer_path)
    if config is None:
        (base if keep_dtype else base.float()).requires_grad_(True)
        return base
    try:
        model: torch.nn.Module = peft.get_peft_model(base, config, adapter_name=ADAPTER)
    except ValueError as error:
        if (
            "target_modules" not in str(error).lower()
            and "target modules" not in str(error).lower()
        ):
            raise
        names = ", ".join(linear_names(base))
        raise MethodError(
            f"method.target_modules={getattr(settings, 'target_modules', None)} does not fit this "
            f"model; its linear modules are: {names}"
        ) from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    for _, layer in _adapted_layers(model):
        # The hook goes with the layer when the adapter is taken off.
        layer.register_forward_pre_hook(_keep_scales)
    return model


def detach(model: torch.nn.Module) -> None:
    """Takes the adapter off again; the base is as it was before `attach`, bit for bit."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return
    base: Any = model.get_base_model()
    # PEFT's own `unload` does the same, but refuses IA3 over a quantised base.
    for name, layer in _adapted_layers(base):
        _keep_scales(layer)
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, layer.get_base_layer())
    base.requires_grad_(False).eval()
    # Recomputation is a switch on the base, with a hook on its embedding.
    base.activation_checkpointing_disable()
    base.disable_input_require_grads()
    # PEFT leaves its mark on the base: the next get_peft_model would warn of a second adapter.
    if hasattr(base, "peft_config"):
        del base.peft_config


def _adapted_layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """Names and modules that PEFT put in the place of the base's own."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]


def _keep_scales(layer: Any, *_: Any) -> None:
    """Gives the 8-bit weight under `layer` its scales back, if it lost them.

    DoRA on CPU replaces the weight at every call by a copy without them (peft 0.21,
    dequantize_module_weight), and bitsandbytes takes them from there on the next call.
    """
    base = layer.get_base_layer()
    if getattr(base.weight, "CB", None) is not None and base.weight.SCB is None:
        base.weight.SCB = base.state.SCB


def linear_names(base: torch.nn.Module) -> list[str]:
    """Last parts of the names of the linear modules that an adapter may target."""
    import torch

    head = getattr(base, "lm_head", None)
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in base.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
    )


def regularizer(model: torch.nn.Module, settings: MethodConfig) -> torch.Tensor | None:
    """AdaLoRA's orthogonality penalty, mean over matrices of ||P P^T - I||_F.

    Equation 4 of arXiv:2303.10512. PEFT adds it to a loss that the model itself computes; ours is
    computed outside.
    """
    import torch

    if not isinstance(settings, AdaloraConfig) or settings.orth_reg_weight == 0:
        return None
    norms = []
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
    return settings.orth_reg_weight * torch.stack(norms).mean()


def after_optimizer_step(model: torch.nn.Module, settings: MethodConfig, step: int) -> None:
    """AdaLoRA moves its rank budget here: after the update, while the gradients are still there."""
    if isinstance(settings, AdaloraConfig):
        model.base_model.update_and_allocate(step)  # type: ignore[operator,union-attr]


def _modules(names: str | tuple[str, ...] | None) -> str | list[str] | None:
    return list(names) if isinstance(names, tuple) else names


def _whole(value: float) -> float | int:
    """PEFT (and vLLM's reader of its files) declare lora_alpha as int."""
    return int(value) if value == int(value) else value

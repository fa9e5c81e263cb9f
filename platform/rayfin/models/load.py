"""Load the tokenizer and the frozen base model, quantised or not, on CPU or GPU."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from rayfin.compat.bitsandbytes import (
    import_bitsandbytes,
    no_cast_warnings,
    without_packing,
)
from rayfin.config.schema import ModelConfig
from rayfin.errors import HardwareError, ModelError
from rayfin.models.bundled import BUNDLED
from rayfin.models.chat_templates import set_chat_template
from rayfin.models.checkpoint import REPLACE, check_causal, check_loadable, read_config
from rayfin.models.quiet import no_progress_bars
from rayfin.models.source import is_hub, model_directory

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast

Device = Literal["cpu", "cuda"]


def load_tokenizer(
    config: ModelConfig, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Return the tokenizer, which pads on the right and has a pad token.

    `chat_template`, a name or a file as `data.chat_template` gives it, takes the place of the
    model's own. Raises ModelError, and DataError for a template that can't be used.
    """
    from transformers import AutoTokenizer

    directory = model_directory(config, weights=False)
    read_config(directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"model.name: the tokenizer in '{directory}' can't be read ({_first_line(error)}); "
            "the directory needs a tokenizer.json that belongs to the model"
        ) from error
    if tokenizer.pad_token is None:
        # A new token would need a new row in the embedding, which adapters don't carry. Padding is
        # masked out of attention and loss, so any token of the vocabulary will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ModelError(
            f"model.name: the tokenizer in '{directory}' has no pad, eos or unk token; "
            "name one of them in its tokenizer_config.json"
        )
    tokenizer.padding_side = "right"
    loaded = cast("PreTrainedTokenizerFast", tokenizer)
    if chat_template is not None:
        set_chat_template(loaded, chat_template)
    return loaded


def check_model(config: ModelConfig, quantization_bit: Literal[4, 8] | None) -> None:
    """Raise the ModelError that loading would raise, as far as the model's small files tell."""
    directory = model_directory(config, weights=False)
    if config.name in BUNDLED:
        return
    if is_hub(config):
        check_causal(directory)
    else:
        check_loadable(directory, quantization_bit)
    load_tokenizer(config)


@dataclass(frozen=True)
class Head:
    """What a model ends in: Transformers' auto class, and settings of the configuration."""

    auto_class: str = "AutoModelForCausalLM"
    settings: dict[str, Any] = field(default_factory=dict)


def load_base(
    config: ModelConfig,
    quantization_bit: Literal[4, 8] | None,
    device: Device,
    index: int | None = None,
    *,
    on_host: bool = False,
    head: Head | None = None,
) -> PreTrainedModel:
    """Return the base model on a device, frozen and in eval mode; raises ModelError, HardwareError.

    `on_host` leaves it in host memory, in the form that the device would have. `head` says what the
    model ends in; a language model's head where it is None.

    4 bits are NF4 with double quantisation (Dettmers et al. 2023, QLoRA), 8 bits LLM.int8(),
    both by bitsandbytes. Attention is PyTorch's fused one where the architecture has it, or that
    of model.attn_implementation.
    """
    import torch
    import transformers

    import_bitsandbytes()
    head = head or Head()
    options: dict[str, Any] = dict(head.settings)
    if device == "cuda" and not on_host:
        options["device_map"] = {"": _gpu(index)}
    elif quantization_bit is not None:
        # Without a map, transformers sends quantised weights to a GPU if it finds one.
        options["device_map"] = {"": "cpu"}
    if config.attn_implementation != "auto":
        options["attn_implementation"] = config.attn_implementation
    dtype = dtype_on(config, device)
    if quantization_bit is not None:
        options["quantization_config"] = _quantization(quantization_bit, dtype, on_host)
    directory = model_directory(config)
    check_loadable(directory, quantization_bit)
    try:
        # A new head is drawn from one seed: the next worker, or a resumed trial, has the same.
        with no_progress_bars(), torch.random.fork_rng(enabled=head != Head()):
            if head != Head():
                torch.manual_seed(0)
            loaded: Any = getattr(transformers, head.auto_class).from_pretrained(
                directory,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        # Too little memory is no fault of the files.
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        raise ModelError(
            f"model.name: '{config.name}' can't be loaded from '{directory}' "
            f"({_first_line(error)}); {REPLACE}"
        ) from error
    model, report = loaded
    new = head.auto_class != Head().auto_class  # the checkpoint doesn't have it
    body = f"{model.base_model_prefix}."
    if missing := sorted(k for k in report["missing_keys"] if not new or k.startswith(body)):
        # transformers has filled these with random numbers.
        raise ModelError(
            f"model.name: the weights in '{directory}' lack {len(missing)} of the model's tensors "
            f"('{missing[0]}', …); {REPLACE}"
        )
    without_packing(model)
    if config.dtype == "bf16-mixed" and quantization_bit is None:
        from rayfin.models.mixed_precision import use_bfloat16_products

        use_bfloat16_products(model)
    return cast("PreTrainedModel", model.eval().requires_grad_(False))


def _gpu(index: int | None) -> int:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise HardwareError(
            "scaling.use_gpu: the model was to go on a GPU, but torch sees none; "
            "install a CUDA build of torch, or set scaling.use_gpu=false"
        )
    if index is not None and not 0 <= index < count:
        raise HardwareError(
            f"there is no GPU {index}: torch sees {count}, counted from 0; choose one of those"
        )
    return torch.cuda.current_device() if index is None else index


def dtype_on(config: ModelConfig, device: Device) -> torch.dtype:
    """Return the data type in which the model computes on a device."""
    import torch

    if config.dtype == "bf16-mixed":
        if device == "cuda":
            raise ModelError(
                "model.dtype: bf16-mixed is for processors, and on a GPU products are 16-bit "
                "anyway; use model.dtype=auto, or scaling.use_gpu=false"
            )
        return torch.float32  # `load_base` rounds the weights of products
    if config.dtype != "auto":
        return cast("torch.dtype", getattr(torch, config.dtype))
    if device == "cpu":
        # bfloat16 products are several times slower than float32 ones on most processors.
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _quantization(
    bits: Literal[4, 8], dtype: torch.dtype, for_sharding: bool
) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"method.quantization_bit: {bits} needs bitsandbytes, which isn't installed; "
            "run: pip install bitsandbytes, or set method.quantization_bit=null"
        )
    from transformers import BitsAndBytesConfig

    if bits == 8:
        no_cast_warnings()
        return BitsAndBytesConfig(load_in_8bit=True)
    # FSDP casts and sums what it takes for floating-point numbers of one kind.
    storage = {"bnb_4bit_quant_storage": dtype} if for_sharding else {}
    return BitsAndBytesConfig(
        load_in_4bit=True,
        **storage,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

"""A base whose chat template ends turns with a token that is not its end-of-sequence token."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rayfin.config.schema import ModelConfig
from rayfin.models import load_base, load_tokenizer
from rayfin.models.quiet import no_progress_bars

END, EOS, OTHER = "<|im_end|>", "<|endoftext|>", "<|other|>"


def tokenizer_of(
    template: str | None = None,
    *added: str,
    eos: str | None = EOS,
    special: bool = True,
    without: tuple[str, ...] = (),
) -> PreTrainedTokenizerFast:
    """A token a byte, then `<|endoftext|>` and the `added` ones, or those of ChatML.

    `template`: ChatML's, if left out. Without `special` what is added is shown in texts. `without`:
    tokens of ChatML's that are left out.
    """
    tiny = load_tokenizer(ModelConfig(name="tiny"))
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = added or tuple(t for t in ("<|im_start|>", END, OTHER) if t not in without)
    backend.add_special_tokens([AddedToken("<|pad|>", special=True), AddedToken(EOS, special=True)])
    backend.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        pad_token="<|pad|>",
        chat_template=template or tiny.chat_template,
        clean_up_tokenization_spaces=False,
    )


def write_base(directory: Path, tokenizer: PreTrainedTokenizerFast, eos: Any = None) -> Path:
    """The tiny model with that tokenizer; `eos`: of its generation_config.json."""
    with torch.random.fork_rng(devices=[]), no_progress_bars():
        torch.manual_seed(0)
        config = load_base(ModelConfig(name="tiny"), None, "cpu").config
        config.vocab_size = len(tokenizer)
        config.eos_token_id = config.bos_token_id = tokenizer.eos_token_id
        model = LlamaForCausalLM(config)
        with torch.no_grad():  # else it repeats its last token, whatever is asked
            for name, parameter in model.named_parameters():
                if "layers" in name and "norm" not in name:
                    parameter.normal_(std=0.2)
        model.generation_config.eos_token_id = tokenizer.eos_token_id if eos is None else eos
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory

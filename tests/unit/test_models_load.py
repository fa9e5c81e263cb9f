"""Loading base models whole and quantised, and the one-line errors when that can't be done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayfin.config.schema import ModelConfig
from rayfin.errors import HardwareError, ModelError
from rayfin.models import describe_model, identity, load, load_base, load_tokenizer, write_tiny

IDS = torch.arange(64).view(2, 32)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "tiny")
    return tmp_path / "tiny"


def at(directory: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(name=str(directory), **settings)


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_the_base_is_frozen_float32_on_cpu(tiny: Path) -> None:
    model = load_base(at(tiny), None, "cpu")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "sdpa"


def test_dtype_can_be_chosen(tiny: Path) -> None:
    assert load_base(at(tiny, dtype="bfloat16"), None, "cpu").dtype == torch.bfloat16


def test_loading_draws_nothing(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_base(at(tiny), 8, "cpu")(IDS)
    load_tokenizer(at(tiny))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("bits", "kind", "error"), [(4, "Linear4bit", 0.25), (8, "Linear8bitLt", 0.03)]
)
def test_quantised_models_are_smaller_and_nearly_the_same(
    tiny: Path, bits: Any, kind: str, error: float
) -> None:
    whole = load_base(at(tiny), None, "cpu")
    small = load_base(at(tiny), bits, "cpu")
    assert type(small.get_submodule("model.layers.0.mlp.up_proj")).__name__ == kind
    assert not any(parameter.requires_grad for parameter in small.parameters())
    assert small.get_memory_footprint() < 0.5 * whole.get_memory_footprint()
    expected, got = whole(IDS).logits, small(IDS).logits
    assert got.dtype == torch.float32
    assert torch.norm(got - expected) / torch.norm(expected) < error


def test_nf4_has_double_quantisation(tiny: Path) -> None:
    layer = load_base(at(tiny), 4, "cpu").get_submodule("model.layers.0.mlp.up_proj")
    assert layer.weight.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert layer.compute_dtype == torch.float32


def test_a_processor_with_bfloat16_leaves_4_bit_weights_as_they_are(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = load_base(at(tiny), 4, "cpu")
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_gradients_pass_4_bit_layers_that_were_called_without_them(tiny: Path) -> None:
    layer = load_base(at(tiny), 4, "cpu").get_submodule("model.layers.0.mlp.up_proj")
    inputs = torch.randn(2, layer.in_features)
    with torch.no_grad():
        before = layer(inputs)
    after = layer(inputs.requires_grad_())
    after.square().sum().backward()
    assert torch.equal(before, after)
    assert inputs.grad is not None
    assert inputs.grad.abs().min() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_loading_onto_a_gpu(tiny: Path, bits: Any) -> None:
    model = load_base(at(tiny), bits, "cuda", 0)
    assert {parameter.device for parameter in model.parameters()} == {torch.device("cuda", 0)}
    expected = load_base(at(tiny), None, "cpu")(IDS).logits
    got = model(IDS.cuda()).logits.float().cpu()
    assert torch.norm(got - expected) / torch.norm(expected) < 0.25
    with pytest.raises(HardwareError, match="no GPU 99"):
        load_base(at(tiny), bits, "cuda", 99)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tiny: Path) -> None:
    with pytest.raises(HardwareError, match=r"set scaling\.use_gpu=false"):
        load_base(at(tiny), None, "cuda")


@pytest.mark.numeric
def test_a_quantised_checkpoint_loads_as_it_is_but_not_quantised_again(
    tiny: Path, tmp_path: Path
) -> None:
    model = load_base(at(tiny), 4, "cpu")
    model.save_pretrained(tmp_path / "nf4")
    again = load_base(at(tmp_path / "nf4"), None, "cpu")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    with pytest.raises(ModelError, match=r"quantised already.*quantization_bit=null"):
        load_base(at(tmp_path / "nf4"), 4, "cpu")
    # Packed bytes don't count as parameters.
    assert describe_model(at(tmp_path / "nf4")).parameters == describe_model(at(tiny)).parameters


def test_sharded_weights_load_and_a_lost_shard_is_noticed(tiny: Path, tmp_path: Path) -> None:
    load_base(at(tiny), None, "cpu").save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert identity(at(tmp_path / "shards")).startswith("local@")
    load_base(at(tmp_path / "shards"), None, "cpu")
    shards[0].unlink()
    with pytest.raises(ModelError, match=r"model-00001.*missing"):
        load_base(at(tmp_path / "shards"), None, "cpu")


def test_a_tokenizer_without_pad_token_pads_with_eos(tiny: Path) -> None:
    edit(tiny / "tokenizer_config.json", pad_token=None)
    tokenizer = load_tokenizer(at(tiny))
    assert tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.padding_side == "right"
    assert len(tokenizer) == 260


def test_a_tokenizer_that_cannot_pad_at_all(tiny: Path) -> None:
    edit(tiny / "tokenizer_config.json", pad_token=None, eos_token=None)
    with pytest.raises(ModelError, match="no pad, eos or unk token"):
        load_tokenizer(at(tiny))


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def broken_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def short_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def garbage_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"\xff" * 5000)


def empty_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")


def lost_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def pickle_only(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def masked_model(directory: Path) -> None:
    edit(directory / "config.json", model_type="bert", architectures=["BertForMaskedLM"])


def own_code(directory: Path) -> None:
    edit(directory / "config.json", model_type="mine", auto_map={"AutoModelForCausalLM": "m.Mine"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_config, "has no config.json"),
        (broken_config, "no readable JSON"),
        (no_weights, "has no model.safetensors"),
        (short_weights, r"damaged \(it has \d+ bytes and should have \d+\)"),
        (garbage_weights, r"damaged \(its header is cut short\)"),
        (empty_weights, "damaged"),
        (lost_tensor, r"lack 1 of the model's tensors \('model.layers.1.mlp.up_proj.weight'"),
        (pickle_only, "pickled weights only.*safetensors"),
        (masked_model, "BertForMaskedLM, no causal language model"),
        (own_code, "'mine'.*never run"),
    ],
)
@pytest.mark.parametrize("bits", [None, 4])
def test_what_cannot_be_loaded_is_said_in_one_line(
    tiny: Path, damage: Callable[[Path], None], said: str, bits: Any
) -> None:
    damage(tiny)
    with pytest.raises(ModelError, match=said) as caught:
        load_base(at(tiny), bits, "cpu")
    assert "\n" not in str(caught.value)
    assert str(tiny) in str(caught.value)


def test_weights_of_another_shape_are_said_in_one_line(tiny: Path) -> None:
    edit(tiny / "config.json", intermediate_size=96)
    with pytest.raises(ModelError, match="can't be loaded") as caught:
        load_base(at(tiny), None, "cpu")
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_said_in_one_line(tiny: Path) -> None:
    for path in tiny.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json") as caught:
        load_tokenizer(at(tiny))
    assert "\n" not in str(caught.value)


def test_quantisation_without_bitsandbytes(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        load_base(at(tiny), 4, "cpu")

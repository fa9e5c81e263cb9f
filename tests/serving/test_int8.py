"""Linear layers over 8-bit weights beside the same in float."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rayfin.config.schema import ModelConfig
from rayfin.config.serving import EngineConfig
from rayfin.errors import ConfigError
from rayfin.serving.engine import native
from rayfin.serving.engine.engine import Engine
from rayfin.serving.engine.int8 import Int8Kernel, Int8Linear, Int8Weight
from rayfin.serving.engine.joint_product import join_layers, product
from rayfin.serving.engine.model import BatchedModel

pytestmark = pytest.mark.numeric


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    was = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(was)


def linear(inputs: int, outputs: int, *, bias: bool = True) -> torch.nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(inputs + outputs)
        return torch.nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def tokens(count: int, inputs: int) -> torch.Tensor:
    """One channel is far beyond the others, as a language model's layers have them."""
    x = torch.randn(count, inputs, generator=torch.Generator().manual_seed(count))
    x[:, inputs // 3] *= 40
    return x


def difference(given: torch.Tensor, expected: torch.Tensor) -> float:
    return float((given - expected).norm() / expected.norm())


@pytest.mark.parametrize("variant", [0, 1])
@pytest.mark.parametrize("count", [1, 5, 16, 49, 100])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 32), (1, 1), (577, 50), (129, 960)])
def test_what_comes_out_is_close_to_float(
    inputs: int, outputs: int, count: int, variant: int
) -> None:
    layer, x = linear(inputs, outputs), tokens(count, inputs)
    given = Int8Linear(layer, Int8Kernel(variant))(x)
    assert given.shape == (count, outputs)
    # Rounding is all that differs: half a step of 127 at most, and far less on the average.
    assert difference(given, layer(x)) < 0.01


def test_variants_threads_and_company_change_no_bit() -> None:
    layer, x = linear(576, 1536), tokens(70, 576)
    with threads(2):
        together = Int8Linear(layer, Int8Kernel())(x)
    with threads(1):
        for kernel in (Int8Kernel(), Int8Kernel(0)):
            rounded = Int8Linear(layer, kernel)
            assert torch.equal(rounded(x), together)
            assert torch.equal(torch.cat([rounded(x[:1]), rounded(x[1:20])]), together[:20])


def test_weights_are_rounded_to_the_nearest_step_of_their_group() -> None:
    weight = linear(300, 20).weight.detach()
    rounded = Int8Weight.rounded(weight)
    assert rounded.values.shape == (2, 150, 16, 2)
    assert rounded.scales.shape == (2, 3, 16)
    steps = rounded.scales.transpose(1, 2).reshape(32, 3)[:20].repeat_interleave(128, 1)[:, :300]
    assert ((rounded.dense()[:20] - weight).abs() <= steps * 0.5001).all()
    assert rounded.dense().shape == (32, 300) and not rounded.dense()[20:].any()
    assert int(rounded.values.abs().max()) == 127


def test_what_is_no_number_stays_so_and_in_its_row() -> None:
    rounded = Int8Linear(linear(64, 32, bias=False), Int8Kernel())
    x = tokens(6, 64)
    alone = rounded(x[:1])
    x[1] *= 1e30
    x[2, 5], x[3, 5] = float("nan"), float("inf")
    x[4], x[5] = 0.0, 1e-42
    together = rounded(x)
    assert torch.equal(together[:1], alone)
    assert together[1].isfinite().all()
    assert together[2:4].isnan().all()
    assert not together[4].any()
    assert together[5].abs().max() < 1e-37


def test_inputs_with_wider_rows() -> None:
    layer, x = linear(32, 16), tokens(3, 80)
    rounded = Int8Linear(layer, Int8Kernel())
    assert difference(rounded(x[:, 20:52]), layer(x[:, 20:52])) < 0.01
    turned = x.t().contiguous().t()[:, :32]
    assert turned.stride(1) != 1
    assert torch.equal(rounded(turned), rounded(x[:, :32].contiguous()))


@pytest.mark.parametrize("x", [torch.ones(2, 31), torch.ones(2, 32, dtype=torch.float64)])
def test_inputs_that_do_not_fit_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="not float32 of 32"):
        Int8Linear(linear(32, 16), Int8Kernel())(x)


def test_it_uses_torchs_threads() -> None:
    assert Int8Kernel().parallel == (sys.platform == "linux")
    assert Int8Kernel(0).variant == 0


def test_layers_with_the_same_input_are_one_product() -> None:
    """Their outputs are no multiples of 16, and they still take no more memory than before."""
    layers = [linear(64, outputs) for outputs in (40, 17, 17)]
    kernel, hidden = Int8Kernel(), tokens(5, 64)[None]
    rounded = [Int8Linear(layer, kernel) for layer in layers]
    expected = [one(hidden[0]) for one in rounded]
    joint = join_layers(rounded)
    assert joint is not None
    for one, alone in zip(rounded, expected, strict=True):
        assert torch.equal(joint.product(one, hidden), alone)
        assert torch.equal(product(one, hidden[0]), alone)
    assert len({one.rounded.values.untyped_storage().data_ptr() for one in rounded}) == 1
    assert join_layers([rounded[0], layers[1]]) is None


@pytest.mark.parametrize("tied", [True, False])
def test_float_weights_are_gone(tied: bool) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    base = LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=tied)).eval()
    embedding = base.get_input_embeddings().weight
    before = [
        weakref.ref(module.weight)
        for module in base.modules()
        if isinstance(module, torch.nn.Linear) and module.weight is not embedding
    ]
    assert len(before) == 14 + (not tied)
    model = BatchedModel("it", base, EngineConfig(weights="int8", max_length=64))
    assert not any(weight() is not None for weight in before)
    assert len(model.linears) == 14


def test_without_a_compiler_it_is_refused(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    with pytest.raises(ConfigError, match=r"no C compiler 'no-such-compiler'.*engine\.weights"):
        Engine(ModelConfig(name=tiny), EngineConfig(weights="int8"))


def test_it_is_for_float_models_on_cpu(tiny: str) -> None:
    with pytest.raises(ValueError, match="set one of them"):
        EngineConfig(weights="int8", quantization_bit=4)
    with pytest.raises(ConfigError, match="float32 models on CPU"):
        Engine(ModelConfig(name=tiny, dtype="bfloat16"), EngineConfig(weights="int8"))

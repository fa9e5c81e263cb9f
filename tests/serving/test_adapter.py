"""What `read_adapter` gives computes what PEFT's own layers and prompts do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import LlamaForCausalLM

from rayfin.adapters import Registry
from rayfin.config.schema import ModelConfig
from rayfin.errors import AdapterError, ModelError
from rayfin.models import Base, base_of, load_base
from rayfin.serving.engine.adapter import read_adapter
from rayfin.serving.engine.host_adapter import HostAdapter
from rayfin.serving.engine.int8 import Int8Kernel, Int8Linear
from rayfin.serving.engine.layout import BaseLayout
from rayfin.serving.engine.request import AdapterSource
from rayfin.serving.engine.slot_linear import SlotAssignment, SlotLinear

pytestmark = pytest.mark.numeric

TINY = ModelConfig(name="tiny")
LM = {"task_type": "CAUSAL_LM"}
ALL = {**LM, "target_modules": "all-linear"}


def random_weights(model: Any) -> None:
    """What training might have made of the adapter: nothing is zero or one any more."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data *= 0.5 + torch.rand_like(parameter)
        elif "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
        elif "vera_lambda" in name:
            parameter.data = torch.randn_like(parameter)
        elif "ia3_" in name:
            parameter.data = 0.5 + torch.rand_like(parameter)


def save(
    config: peft.PeftConfig, directory: Path, model: ModelConfig = TINY, bits: Any = None
) -> Any:
    trained = peft.get_peft_model(load_base(model, bits, "cpu"), config)
    random_weights(trained)
    trained.save_pretrained(directory)
    return trained


def layout(model: ModelConfig = TINY, bits: Any = None) -> BaseLayout:
    return BaseLayout.of(load_base(model, bits, "cpu"), base_of(model))


def read(directory: Path, model: ModelConfig = TINY, bits: Any = None) -> HostAdapter:
    return read_adapter(AdapterSource("support@3", directory), layout(model, bits))


def formula(rounding: Any, adapter: HostAdapter, name: str, linear: Any, x: torch.Tensor) -> Any:
    """The formula in HostAdapter's docstring, with its bound; the base's own product is given.

    What was read is off by a few roundings, DoRA's scales by those of the norm that they hold: over
    all inputs of an output, and over the ranks in each.
    """
    exact, growth = rounding.Inexact.of, rounding.growth

    def one(value: Any, relative: float) -> Any:
        return exact(torch.as_tensor(value), relative)

    low_rank = adapter.lora.get(name)
    few = growth(4)
    scale_terms = x.shape[1] + len(low_rank.a) if low_rank is not None else 0
    scale = one(adapter.output_scale.get(name, 1.0), growth(max(scale_terms, 4)))
    bias = one(0.0 if linear.bias is None else linear.bias, 0.0)
    minus = one(0.0 if linear.bias is None else -linear.bias, 0.0)
    own = one(linear(x * adapter.input_scale.get(name, 1.0)), 0.0)
    y = (own + minus) * scale + bias + one(adapter.output_shift.get(name, 0.0), few)
    if low_rank is None:
        return y
    low = exact(x).times(one(low_rank.a.T, few))
    # PEFT multiplies by its scale between the factors or after them, and DoRA's is within `b`.
    return low.times(one(low_rank.b, growth(max(scale_terms, 4))), onto=y)


@torch.no_grad()
def check_layers(
    rounding: Any, directory: Path, adapter: HostAdapter, model: ModelConfig, bits: Any
) -> int:
    """Compares with PEFT's layers, which read the same directory; how many there are."""
    loaded = peft.PeftModel.from_pretrained(load_base(model, bits, "cpu"), directory).eval()
    layers = {
        name: layer
        for name, layer in loaded.get_base_model().named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    for name, layer in layers.items():
        x = torch.randn(5, layer.in_features)
        theirs = layer(x)
        linear = layer.get_base_layer()
        if bits == 8:  # DoRA in PEFT on CPU loses the scales (see rayfin.methods.attach)
            linear.weight.SCB = linear.state.SCB
        expected = formula(rounding, adapter, name, linear, x)
        changed = (expected.value - linear(x).double()).abs()
        assert changed.max() > 1e4 * expected.error.max(), "the adapter does nothing"
        expected.assert_holds(theirs)
    return len(layers)


LAYERED: dict[str, tuple[Callable[[], peft.PeftConfig], str, int]] = {
    "lora": (lambda: peft.LoraConfig(r=4, lora_alpha=16, **ALL), "lora", 4),
    "rslora": (lambda: peft.LoraConfig(r=6, use_rslora=True, **ALL), "rslora", 6),
    "patterns": (
        lambda: peft.LoraConfig(
            r=4,
            rank_pattern={
                "q_proj": 8,
                "layers.1.mlp.up_proj": 2,
                r"^model\.layers\.\d\.mlp.gate_pro.$": 3,
            },
            alpha_pattern={"layers.0.self_attn.k_proj": 32, "o_proj": 3},
            **ALL,
        ),
        "lora",
        8,
    ),
    "dora": (lambda: peft.LoraConfig(r=4, use_dora=True, **ALL), "dora", 4),
    "dora and rslora": (
        lambda: peft.LoraConfig(r=4, use_dora=True, use_rslora=True, **ALL),
        "dora",
        4,
    ),
    "adalora": (
        lambda: peft.AdaLoraConfig(init_r=6, lora_alpha=16, total_step=10, **ALL),
        "adalora",
        6,
    ),
    "vera": (lambda: peft.VeraConfig(r=24, **ALL), "vera", 24),
    "ia3": (
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "q_proj", "o_proj", "down_proj"],
            feedforward_modules=["down_proj", "o_proj"],
            **LM,
        ),
        "ia3",
        0,
    ),
}


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """The tiny model with biases in all its linear layers, as some families have."""
    config = load_base(TINY, None, "cpu").config
    config.attention_bias = config.mlp_bias = True
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    directory = tmp_path_factory.mktemp("biased") / "base"
    model.save_pretrained(directory)
    return ModelConfig(name=str(directory))


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("method", LAYERED)
def test_layers_compute_what_pefts_do(
    tmp_path: Path, method: str, bits: Any, rounding: Any
) -> None:
    make, name, rank = LAYERED[method]
    save(make(), tmp_path, bits=bits)
    adapter = read(tmp_path, bits=bits)
    assert (adapter.ref, adapter.method, adapter.rank) == ("support@3", name, rank)
    assert adapter.virtual_tokens == 0
    assert check_layers(rounding, tmp_path, adapter, TINY, bits) >= 10


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3"])
def test_biases_are_scaled_by_ia3_alone(
    tmp_path: Path, biased: ModelConfig, method: str, bits: Any, rounding: Any
) -> None:
    make, _, _ = LAYERED[method]
    save(make(), tmp_path, biased, bits)
    adapter = read(tmp_path, biased, bits)
    assert check_layers(rounding, tmp_path, adapter, biased, bits) >= 10
    assert bool(adapter.output_shift) == (method == "ia3")


@pytest.mark.filterwarnings("ignore:Adapter .* have invalid shape")  # a rank of 0
def test_adalora_that_dropped_ranks(tmp_path: Path, rounding: Any) -> None:
    config = peft.AdaLoraConfig(
        init_r=6,
        target_r=1,
        total_step=8,
        tinit=1,
        tfinal=2,
        target_modules=["q_proj", "k_proj"],
        **LM,
    )
    model = peft.get_peft_model(load_base(TINY, None, "cpu"), config)
    random_weights(model)
    ids = torch.arange(20)[None]
    for step in range(1, 8):
        model(input_ids=ids, labels=ids).loss.backward()
        model.base_model.update_and_allocate(step)
        model.zero_grad()
    model.save_pretrained(tmp_path)
    ranks = {name: sum(mask) for name, mask in config.rank_pattern.items()}
    assert 0 in ranks.values() and max(ranks.values()) > 0

    adapter = read(tmp_path)
    assert adapter.rank == max(ranks.values())
    assert len(adapter.lora) == sum(rank > 0 for rank in ranks.values())
    loaded = peft.PeftModel.from_pretrained(load_base(TINY, None, "cpu"), tmp_path).eval()
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"):
        layer: Any = loaded.get_base_model().get_submodule(name)
        x = torch.randn(3, 64)
        with torch.no_grad():
            formula(rounding, adapter, name, layer.get_base_layer(), x).assert_holds(layer(x))


PROMPTS: dict[str, peft.PeftConfig] = {
    "p_tuning": peft.PromptEncoderConfig(num_virtual_tokens=7, **LM),
    "p_tuning with an LSTM": peft.PromptEncoderConfig(
        num_virtual_tokens=7, encoder_reparameterization_type="LSTM", encoder_hidden_size=16, **LM
    ),
    "prompt_tuning": peft.PromptTuningConfig(num_virtual_tokens=7, **LM),
    "prefix_tuning": peft.PrefixTuningConfig(num_virtual_tokens=7, **LM),
    "prefix_tuning projected": peft.PrefixTuningConfig(
        num_virtual_tokens=7, prefix_projection=True, encoder_hidden_size=16, **LM
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("method", PROMPTS)
def test_prompts_are_what_peft_puts_before_a_row(tmp_path: Path, method: str) -> None:
    save(PROMPTS[method], tmp_path)
    adapter = read(tmp_path)
    assert (adapter.method, adapter.virtual_tokens, adapter.rank) == (
        method.split(maxsplit=1)[0],
        7,
        0,
    )
    loaded = peft.PeftModel.from_pretrained(load_base(TINY, None, "cpu"), tmp_path).eval()
    theirs: Any = loaded.get_prompt(1)
    if adapter.prefix is None:
        assert adapter.prompt is not None and torch.equal(adapter.prompt, theirs[0])
        return
    assert adapter.prompt is None and adapter.prefix.shape == (2, 2, 2, 7, 16)
    for index, layer in enumerate(theirs.layers):
        assert torch.equal(adapter.prefix[index, 0], layer.keys[0])
        assert torch.equal(adapter.prefix[index, 1], layer.values[0])


def test_tensors_are_ready_to_be_copied(tmp_path: Path) -> None:
    trained = save(peft.LoraConfig(r=4, target_modules=["q_proj"], **LM), tmp_path)
    trained.half().save_pretrained(tmp_path)
    adapter = read(tmp_path)
    assert set(adapter.lora) == {f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)}
    for low_rank in adapter.lora.values():
        for tensor in (low_rank.a, low_rank.b):
            assert tensor.dtype == torch.float32 and tensor.is_contiguous()
            assert not tensor.requires_grad and tensor.device.type == "cpu"
    assert adapter.nbytes == 2 * 2 * 4 * 64 * 4

    # Nothing is left of the file: what happens to it later can't reach a running request.
    before = adapter.lora["model.layers.0.self_attn.q_proj"].a.clone()
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert torch.equal(adapter.lora["model.layers.0.self_attn.q_proj"].a, before)


def test_a_published_adapter_fits_its_base_wherever_that_lies(tmp_path: Path) -> None:
    save(peft.LoraConfig(target_modules=["q_proj"], **LM), tmp_path / "trained")
    config = tmp_path / "trained" / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "base_model_name_or_path": "/elsewhere/checkpoint-7"}))
    registry = Registry(tmp_path / "adapters")
    ours = registry.publish("support", tmp_path / "trained", {"base_model": "tiny"})
    assert read(ours.path).method == "lora"
    other = registry.publish("support", tmp_path / "trained", {"base_model": "llama"})
    with pytest.raises(AdapterError, match=r"trained on 'llama', and the served base is .*'tiny'"):
        read(other.path)
    known = registry.publish(
        "support",
        tmp_path / "trained",
        {"base_model": "/there/tiny", "base_identity": list(base_of(TINY).identities[1:])},
    )
    assert read(known.path).method == "lora"
    unsaid = registry.publish("support", tmp_path / "trained", {})
    with pytest.raises(AdapterError, match=r"trained on '/elsewhere/checkpoint-7'"):
        read(unsaid.path)


def test_layout_of_a_base_that_the_engine_has_changed() -> None:
    """Layers under the engine's own keep their names, and int8 ones their weights nearly."""
    base = load_base(TINY, None, "cpu")
    before = BaseLayout.of(base, Base("tiny"))
    assert "lm_head" not in before.linears and len(before.linears) == 14
    assert before.linears["model.layers.0.mlp.down_proj"] == (128, 64)
    assert (before.hidden_size, before.num_layers) == (64, 2)
    assert (before.num_key_value_heads, before.head_dim) == (2, 16)
    for name in before.linears:
        parent, _, child = name.rpartition(".")
        inner = base.get_submodule(name)
        inner = Int8Linear(inner, Int8Kernel()) if child == "q_proj" else inner
        setattr(
            base.get_submodule(parent),
            child,
            SlotLinear(inner, SlotAssignment(None), 2, torch.float32),
        )
    after = BaseLayout.of(base, before.base)
    assert after.linears == before.linears
    for name in before.linears:
        found, weight = after.weight(name), before.weight(name)
        # Half of one of 127 steps to the largest weight, and its own rounding.
        step = float(weight.abs().max()) / 127 if name.endswith("q_proj") else 0.0
        assert (found - weight).abs().max() <= step * 0.5001


@torch.no_grad()
def test_weights_of_a_4_bit_base_after_its_first_call_on_avx512_bf16(rounding: Any) -> None:
    """bitsandbytes shuffles them there; done by hand here, as not every machine has it."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    base: Any = load_base(TINY, 4, "cpu")
    found = BaseLayout.of(base, Base("tiny"))
    name = "model.layers.0.mlp.gate_proj"
    before = found.weight(name)
    weight = base.get_submodule(name).weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )
    for _ in range(2):  # asking changes nothing
        # Its scales are bfloat16 from then on.
        rounded = rounding.Inexact.of(before, rounding.growth(2, torch.bfloat16))
        rounded.assert_holds(found.weight(name))


def test_gpt2s_transposed_layers_are_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ModelError, match="Conv1D"):
        BaseLayout.of(model, Base("gpt2"))

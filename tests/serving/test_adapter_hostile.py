"""Adapters that are damaged, hostile or of a kind that can't be served exactly are refused."""

import dataclasses
import json
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from rayfin.config.schema import ModelConfig
from rayfin.errors import AdapterError
from rayfin.models import base_of, load_base
from rayfin.paths import digest_files
from rayfin.serving.engine.adapter import BaseLayout, read_adapter
from rayfin.serving.engine.peft_files import AdapterWeights
from rayfin.serving.engine.request import AdapterSource

TINY = ModelConfig(name="tiny")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base() -> BaseLayout:
    return BaseLayout.of(load_base(TINY, None, "cpu"), base_of(TINY))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One whole adapter of every kind that these tests damage."""
    lm: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    linear = {**lm, "target_modules": ["q_proj", "down_proj"]}
    configs = {
        "lora": peft.LoraConfig(r=4, **linear),
        "dora": peft.LoraConfig(r=4, use_dora=True, **linear),
        "adalora": peft.AdaLoraConfig(init_r=4, total_step=10, **linear),
        "ia3": peft.IA3Config(feedforward_modules=["down_proj"], **linear),
        "vera": peft.VeraConfig(r=4, **linear),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, **lm),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, **lm),
    }
    root = tmp_path_factory.mktemp("good")
    for name, config in configs.items():
        peft.get_peft_model(load_base(TINY, None, "cpu"), config).save_pretrained(root / name)
    return {name: root / name for name in configs}


class Spoilt:
    """A copy of a good adapter to be damaged."""

    def __init__(self, source: Path, path: Path, base: BaseLayout) -> None:
        self.path, self.base = path, base
        shutil.copytree(source, path)
        self.read()

    def read(self) -> Any:
        return read_adapter(AdapterSource("support@3", self.path), self.base)

    def set(self, **values: Any) -> None:
        config = self.path / CONFIG
        config.write_text(json.dumps({**json.loads(config.read_text()), **values}))

    def told(self, **values: Any) -> None:
        """A rayfin.json as a publisher writes it, with `values` beside the digests."""
        files = {name: self.path / name for name in (CONFIG, WEIGHTS)}
        record = self.path / "rayfin.json"
        record.write_text(json.dumps(values | {"files": digest_files(files)}))

    def change(self, edit: Callable[[Tensors], Any]) -> None:
        tensors = load_file(self.path / WEIGHTS)
        edit(tensors)
        save_file({name: t.contiguous() for name, t in tensors.items()}, self.path / WEIGHTS)

    def refused(self, message: str) -> None:
        with pytest.raises(AdapterError, match=message) as refused:
            self.read()
        text = str(refused.value)
        assert "\n" not in text and len(text) < 700 and "support@3" in text + str(self.path)

    def refused_unread(self, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(AdapterWeights, "read", lambda *_: pytest.fail("a tensor was read"))
        self.refused(message)


@pytest.fixture
def spoil(good: dict[str, Path], base: BaseLayout, tmp_path: Path) -> Callable[[str], Spoilt]:
    return lambda kind: Spoilt(good[kind], tmp_path / "support@3", base)


# --- settings -----------------------------------------------------------------------------------

INFINITY = float("inf")
NUMBER = "must be a (whole )?number from"
SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    *(("lora", {"r": r}, NUMBER) for r in (0, -1, 10**6, 10**400, 4.0, True, "4", None, [4])),
    *(("lora", {"lora_alpha": a}, NUMBER) for a in (float("nan"), INFINITY, -INFINITY, 1e300)),
    *(("lora", {"lora_alpha": a}, NUMBER) for a in (10**400, "8", True, None, {})),
    ("lora", {"rank_pattern": {"q_proj": 10**6}}, NUMBER),
    ("lora", {"rank_pattern": {"q_proj": 0}}, NUMBER),
    ("lora", {"alpha_pattern": {"q_proj": float("nan")}}, NUMBER),
    ("lora", {"alpha_pattern": ["q_proj"]}, "must be an object"),
    ("lora", {"alpha_pattern": {"(a|a)*b": 1}}, "write names of modules"),
    ("lora", {"alpha_pattern": {"x" * 10**5: 1}}, "write names of modules"),
    ("lora", {"alpha_pattern": {f"x{n}": 1 for n in range(2000)}}, "2000 entries"),
    ("lora", {"r": 8}, "has shape"),
    ("lora", {"use_dora": 1}, "true or false"),
    ("lora", {"use_rslora": "yes"}, "true or false"),
    ("lora", {"peft_type": ["LORA"]}, "peft_type"),
    ("lora", {"peft_type": "lora"}, "the engine serves LORA, ADALORA, IA3"),
    ("lora", {"peft_type": "OFT"}, "'OFT'.*merge it into its base"),
    ("lora", {"peft_type": "LOHA"}, "'LOHA'"),
    ("lora", {"peft_type": "x\n" * 10**5}, "the engine serves"),
    ("vera", {"save_projection": False}, "save_projection=false"),
    ("vera", {"bias": "vera_only"}, "bias='vera_only'"),
    ("vera", {"r": 10**6}, NUMBER),
    ("vera", {"fan_in_fan_out": True}, "'fan_in_fan_out' to true"),
    ("lora", {"task_type": "SEQ_CLS"}, "task_type"),
    ("lora", {"modules_to_save": ["norm"]}, "'modules_to_save'.*train again without it"),
    ("lora", {"modules_to_save": ["lm_head", 7]}, "'modules_to_save'.*train again without it"),
    ("lora", {"modules_to_save": "lm_head"}, "'modules_to_save'.*train again without it"),
    ("lora", {"modules_to_save": ["lm_head"]}, "the tensor '.*lm_head.weight' is missing"),
    ("lora", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, "name both when you"),
    ("lora", {"lora_bias": True}, "'lora_bias'"),
    ("lora", {"bias": "all"}, "bias='all'"),
    ("lora", {"trainable_token_indices": [1]}, "'trainable_token_indices'"),
    ("lora", {"layer_replication": [[0, 2]]}, "'layer_replication'"),
    ("lora", {"target_parameters": ["experts"]}, "'target_parameters'"),
    ("lora", {"fan_in_fan_out": True}, "'fan_in_fan_out'"),
    ("lora", {"use_qalora": True}, "'use_qalora'"),
    ("lora", {"alora_invocation_tokens": [1]}, "'alora_invocation_tokens'"),
    ("lora", {"kasa_config": {"beta": 1}}, "'kasa_config'"),
    ("lora", {"invented_in_2030": 0.5}, "'invented_in_2030'"),
    (
        "lora",
        {"init_lora_weights": "pissa_niter_4"},
        "init_lora_weights='pissa_niter_4'.*weight_conversion",
    ),
    ("lora", {"init_lora_weights": []}, "init_lora_weights=\\[\\]"),
    ("adalora", {"init_r": 10**6}, NUMBER),
    ("adalora", {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": 5}}, "rank_pattern"),
    (
        "adalora",
        {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True, False]}},
        "has shape",
    ),
    ("adalora", {"use_rslora": True}, "'use_rslora'"),
    ("ia3", {"modules_to_save": ["norm"]}, "'modules_to_save'"),
    *(("prompt", {"num_virtual_tokens": n}, NUMBER) for n in (0, -3, 10**9, 3.0, "3", None)),
    ("prompt", {"num_virtual_tokens": 4}, "has shape"),
    ("prompt", {"num_transformer_submodules": 2}, "num_transformer_submodules=2"),
    ("prompt", {"num_transformer_submodules": True}, "num_transformer_submodules=true"),
    ("prompt", {"token_dim": 128}, "token_dim=128"),
    ("prefix", {"num_attention_heads": 4}, "num_attention_heads=4, and the engine serves 2"),
    ("prefix", {"num_layers": 4}, "num_layers=4"),
    ("prefix", {"token_dim": 64}, "token_dim=64"),
]


@pytest.mark.parametrize("case", range(len(SETTINGS)))
def test_settings_that_are_refused(spoil: Callable[[str], Spoilt], case: int) -> None:
    kind, values, message = SETTINGS[case]
    adapter = spoil(kind)
    adapter.set(**values)
    adapter.refused(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "no JSON object"),
        (b'"LORA"', "no JSON object"),
        (b"{}", "peft_type"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 10**5, "not valid JSON"),
        (b'{"peft_type":' + b'{"a":' * 900 + b"1" + b"}" * 901, "peft_type=an object"),
        (b'{"peft_type":' + b"1" * 10**5 + b"}", "not valid JSON"),
        (b'{"peft_type": "LORA", "x": "' + b"x" * 5 * 2**20 + b'"}', "at most 4194304 are read"),
    ],
)
def test_settings_that_are_no_settings(
    spoil: Callable[[str], Spoilt], content: bytes, message: str
) -> None:
    adapter = spoil("lora")
    (adapter.path / CONFIG).write_bytes(content)
    adapter.refused(message)


@pytest.mark.parametrize("claim", ["llama", "/models/llama-3", "", None, 7, ["tiny"]])
def test_another_base_is_refused_by_both_names(spoil: Callable[[str], Spoilt], claim: Any) -> None:
    adapter = spoil("lora")
    adapter.set(base_model_name_or_path=claim)
    named = isinstance(claim, str) and bool(claim)
    adapter.refused(f"trained on '{claim}'.*'tiny'" if named else "names no base model.*'tiny'")


def test_another_base_by_its_publishers_word(spoil: Callable[[str], Spoilt]) -> None:
    adapter = spoil("lora")
    adapter.set(base_model_name_or_path="tiny")
    adapter.told(base_model="llama")
    adapter.refused("trained on 'llama'.*'tiny'")
    adapter.told(base_model="tiny", base_identity=["local@0123456789abcdef"])
    adapter.refused("trained on 'tiny' .local@0123456789abcdef.*served base is 'tiny' .local@")
    adapter.told(base_model="elsewhere", base_identity=["tiny@1", 7])
    assert adapter.read().method == "lora"
    record = adapter.path / "rayfin.json"
    record.write_text("[")
    adapter.refused("not valid JSON")


@pytest.mark.parametrize("digests", ["none", "empty", "of other files", "no hashes", "outside"])
def test_a_handwritten_record_is_not_believed(spoil: Callable[[str], Spoilt], digests: str) -> None:
    """PEFT's own word counts then: rayfin.json could be anybody's."""
    adapter = spoil("lora")
    adapter.set(base_model_name_or_path="llama")
    adapter.told(base_model="tiny", base_identity=["tiny@1"])
    assert adapter.read().method == "lora"
    record = adapter.path / "rayfin.json"
    told = json.loads(record.read_text())
    if digests == "none":
        del told["files"]
    elif digests == "empty":
        told["files"] = {}
    elif digests == "of other files":
        told["files"][CONFIG]["sha256"] = "0" * 64
    elif digests == "outside":
        told["files"]["../outside.json"] = {"bytes": 2, "sha256": "0" * 64}
    else:
        told["files"] = {name: {"bytes": one["bytes"]} for name, one in told["files"].items()}
    record.write_text(json.dumps(told))
    adapter.refused("trained on 'llama'.*'tiny'.*rayfin adapters add DIR NAME --base-is-right")


# --- tensors ------------------------------------------------------------------------------------


def filled(value: float) -> Callable[[Tensors], Any]:
    return lambda tensors: [tensor.fill_(value) for tensor in tensors.values()]


def put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: tensor})


def drop(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


EMBEDDING = "base_model.model.model.embed_tokens.lora_embedding_A"
TENSORS: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "NaN": ("lora", filled(float("nan")), "NaN or infinity"),
    "infinity": ("dora", filled(INFINITY), "NaN or infinity"),
    "NaN in a prompt": ("prompt", filled(float("nan")), "NaN or infinity"),
    "too large together": ("adalora", filled(3e38), "range of float32"),
    "rank 0": ("lora", put(A, torch.zeros(0, 64)), "has shape"),
    "one rank in A, another in B": ("lora", put(B, torch.zeros(64, 8)), "has shape"),
    "transposed": ("lora", put(A, torch.zeros(64, 4)), "has shape"),
    "one dimension": ("lora", put(A, torch.zeros(256)), "has shape"),
    "many dimensions": ("lora", put(A, torch.zeros([1] * 40 + [4, 64])), "has shape"),
    "integers": ("lora", put(A, torch.zeros(4, 64, dtype=torch.int32)), "of type I32"),
    "doubles": ("lora", put(A, torch.zeros(4, 64, dtype=torch.float64)), "of type F64"),
    "no A": ("lora", drop(A), r"lora_A.weight' is missing"),
    "no B": ("lora", drop(B), r"lora_B.weight' is missing"),
    "no magnitude": ("dora", drop(f"{FIRST}.lora_magnitude_vector"), "vector' is missing"),
    "no E": ("adalora", drop(f"{FIRST}.lora_E"), "lora_E' is missing"),
    "an undeclared magnitude": (
        "lora",
        put(f"{FIRST}.lora_magnitude_vector", torch.ones(64)),
        "does not serve the tensor .*lora_magnitude_vector",
    ),
    "another adapter's name": (
        "lora",
        put(f"{FIRST}.lora_A.other.weight", torch.zeros(4, 64)),
        r"does not serve the tensor .*lora_A.other.weight",
    ),
    "a module once more under a shorter name": (
        "lora",
        put("model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(4, 64)),
        "does not serve the tensor 'model.layers.0",
    ),
    "a weight of the base": ("lora", put(f"{FIRST}.weight", torch.zeros(64, 64)), "not serve"),
    "an embedding": (
        "lora",
        put(EMBEDDING, torch.zeros(4, 260)),
        "or merge the adapter into its base",
    ),
    "an unknown module": (
        "ia3",
        put("base_model.model.model.layers.7.self_attn.q_proj.ia3_l", torch.ones(64, 1)),
        r"'model.layers.7.self_attn.q_proj', which is none of the served base's 14",
    ),
    "the output head": (
        "ia3",
        put("base_model.model.lm_head.ia3_l", torch.ones(260, 1)),
        "'lm_head', which is none",
    ),
    "a name with a line break": ("lora", put("x\ny" * 9999, torch.ones(1)), "not serve"),
    "IA3 of another size": ("ia3", put(f"{FIRST}.ia3_l", torch.ones(1, 63)), "has shape"),
    "IA3 without a shape": ("ia3", put(f"{FIRST}.ia3_l", torch.tensor(1.0)), "has shape"),
    "VeRA without its matrices": ("vera", drop("base_model.vera_A"), "vera_A' is missing"),
    "VeRA of a narrower base": ("vera", put("base_model.vera_A", torch.ones(4, 64)), "has shape"),
    "VeRA of a larger base": ("vera", put("base_model.vera_B", torch.ones(65, 4)), "has shape"),
    "VeRA of another rank": ("vera", put(f"{FIRST}.vera_lambda_d", torch.ones(3)), "has shape"),
    "VeRA without a factor": ("vera", drop(f"{FIRST}.vera_lambda_b"), "lambda_b' is missing"),
    "VeRA of no layer": (
        "vera",
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "lambda" in name],
        "no tensor of an adapted layer",
    ),
    "VeRA too large together": ("vera", filled(3e38), "range of float32"),
    "more than a prompt": ("prompt", put("x", torch.ones(1)), "does not serve the tensor 'x'"),
    "another prompt": ("prompt", put("prompt_embeddings", torch.ones(3, 63)), "has shape"),
    "another prefix": ("prefix", put("prompt_embeddings", torch.ones(3, 256)), "has shape"),
    "no prompt": (
        "prompt",
        lambda tensors: tensors.update(x=tensors.pop("prompt_embeddings")),
        "does not serve the tensor 'x'",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_refused(spoil: Callable[[str], Spoilt], case: str) -> None:
    kind, edit, message = TENSORS[case]
    adapter = spoil(kind)
    adapter.change(edit)
    adapter.refused(message)


def safetensors(header: str, data: bytes = bytes(16)) -> bytes:
    text = header.encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = '"w": {"dtype": "F32", "shape": [2], "data_offsets": [%d, %d]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole safetensors file"),
        (b"\x01\x02", "not a whole safetensors file"),
        (struct.pack("<Q", 2**62) + b"{}", "header of 4611686018427387904 bytes"),
        (safetensors('{"w": "' + "x" * 9 * 2**20 + '"}'), "header of"),
        (safetensors("[" * 10**5), "not a whole safetensors file"),
        (safetensors("{}", b""), "holds no tensor"),
        (safetensors("{" + f"{ENTRY % (0, 8)}, {ENTRY % (8, 16)}" + "}"), "not a whole"),
        (safetensors("{" + ENTRY % (0, 2**40) + "}"), "not a whole"),
        (pickle.dumps({"w": [0.0] * 1000}), "safetensors file"),
    ],
)
def test_files_that_are_no_safetensors(
    spoil: Callable[[str], Spoilt], content: bytes, message: str
) -> None:
    adapter = spoil("lora")
    (adapter.path / WEIGHTS).write_bytes(content)
    adapter.refused(message)


@pytest.mark.parametrize("lost", [1, 1000])
def test_a_file_cut_short(spoil: Callable[[str], Spoilt], lost: int) -> None:
    adapter = spoil("lora")
    weights = adapter.path / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-lost])
    adapter.refused("not a whole safetensors file")


def test_a_file_that_is_overwritten_while_it_is_read(spoil: Callable[[str], Spoilt]) -> None:
    adapter = spoil("lora")
    with AdapterWeights(AdapterSource("support@3", adapter.path)) as weights:
        weights.check({A: (4, 64)})
        os.truncate(adapter.path / WEIGHTS, 100)
        with pytest.raises(AdapterError, match="changed while it was read"):
            weights.read(A)


def test_a_renamed_pickle_is_not_opened(spoil: Callable[[str], Spoilt], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "opened"),)

    adapter = spoil("lora")
    (adapter.path / WEIGHTS).write_bytes(pickle.dumps(Evil()))
    adapter.refused("safetensors file")
    torch.save(Evil(), adapter.path / WEIGHTS)
    adapter.refused("safetensors file")
    (adapter.path / WEIGHTS).rename(adapter.path / "adapter_model.bin")
    adapter.refused("only safetensors are read")
    assert not (tmp_path / "opened").exists()


def test_no_memory_is_taken_for_what_does_not_fit(spoil: Callable[[str], Spoilt]) -> None:
    adapter = spoil("lora")
    rank, size = 10**7, 10**7 * 64 * 4
    header = {
        A: {"dtype": "F32", "shape": [rank, 64], "data_offsets": [0, size]},
        B: {"dtype": "F32", "shape": [64, 0], "data_offsets": [size, size]},
    }
    weights = adapter.path / WEIGHTS
    weights.write_bytes(safetensors(json.dumps(header), b""))
    os.truncate(weights, weights.stat().st_size + size)  # a hole: nothing on disk either
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    adapter.refused(r"has shape \[10000000, 64\]")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 500_000  # KiB; the tensor has 2.5 million

    os.truncate(weights, 9 * 2**30)
    adapter.refused("at most 8589934592 are read")


LAST = "model.layers.1.self_attn.q_proj"
UNREAD: list[tuple[str, dict[str, Any], dict[str, int], str]] = [
    *(
        (kind, {}, {"max_rank": 3}, "rank 4, and slots hold 3; raise engine.max_rank")
        for kind in ("lora", "dora", "adalora", "vera")
    ),
    ("vera", {"r": 5}, {}, "has shape"),
    ("lora", {"rank_pattern": {"1.mlp.down_proj": 9}}, {"max_rank": 8}, "rank 9, and slots hold 8"),
    *(
        (kind, {}, {"max_virtual_tokens": 2}, "room for 2 before a prompt; raise engine.max_length")
        for kind in ("prompt", "prefix")
    ),
    # The last of many tensors is the one that does not fit.
    ("lora", {"rank_pattern": {LAST: 9}}, {}, "has shape"),
    ("dora", {"rank_pattern": {LAST: 9}}, {}, "has shape"),
    ("adalora", {"rank_pattern": {f"{LAST}.lora_E": [True]}}, {}, "has shape"),
]


@pytest.mark.parametrize("case", range(len(UNREAD)))
def test_nothing_is_read_of_what_does_not_fit(
    spoil: Callable[[str], Spoilt], monkeypatch: pytest.MonkeyPatch, case: int
) -> None:
    kind, values, limits, message = UNREAD[case]
    adapter = spoil(kind)
    adapter.set(**values)
    adapter.base = dataclasses.replace(adapter.base, **limits)
    adapter.refused_unread(message, monkeypatch)


def test_nothing_is_read_of_ia3_that_does_not_fit(
    spoil: Callable[[str], Spoilt], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = spoil("ia3")
    adapter.change(put(f"base_model.model.{LAST}.ia3_l", torch.ones(63, 1)))
    adapter.refused_unread("has shape", monkeypatch)


# --- the directory ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "rayfin.json"])
@pytest.mark.parametrize("inside", [True, False])
def test_links_are_refused(
    spoil: Callable[[str], Spoilt], tmp_path: Path, name: str, inside: bool
) -> None:
    adapter = spoil("lora")
    (adapter.path / "rayfin.json").write_text('{"base_model": "tiny"}')
    target = adapter.path / "other" if inside else tmp_path / "other"
    (adapter.path / name).rename(target)
    (adapter.path / name).symlink_to(target)
    adapter.refused(f"{name}' is no regular file")
    (adapter.path / name).unlink()
    (adapter.path / name).symlink_to("nowhere")
    adapter.refused(f"{name}' is no regular file")
    (adapter.path / name).unlink()
    os.mkfifo(adapter.path / name)
    adapter.refused(f"{name}' is no regular file")


def test_directories_that_are_no_adapter(spoil: Callable[[str], Spoilt], tmp_path: Path) -> None:
    adapter = spoil("lora")
    real = adapter.path
    adapter.path = tmp_path / "linked" / "support@3"
    adapter.path.parent.mkdir()
    adapter.path.symlink_to(real)
    adapter.refused("no directory of its own")
    adapter.path = real / CONFIG
    adapter.refused("no directory of its own")
    adapter.path = real
    (real / CONFIG).rename(real / "config.json")
    adapter.refused("full fine-tune.*rayfin serve model.name=")
    (real / "config.json").unlink()
    adapter.refused(f"has no {CONFIG}")
    shutil.rmtree(real)
    adapter.refused("no directory of its own")

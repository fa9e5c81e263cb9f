"""Which base models are taken for one: by content where it is known, else by whole names."""

import json
import shutil
from pathlib import Path

import pytest

from rayfin.config.schema import ModelConfig
from rayfin.models import Base, base_of, locate

FIRST, SECOND = "local@0123456789abcdef", "local@fedcba9876543210"
COMMIT = "0f1e2d3c4b5a69788796a5b4c3d2e1f001122334"
SNAPSHOT = f"/home/ray/.cache/huggingface/hub/models--acme--tiny/snapshots/{COMMIT}"


@pytest.mark.parametrize(
    ("claim", "served", "same"),
    [
        # Names, where nothing is known of the content.
        (Base("tiny"), Base("tiny", ("tiny@1", FIRST), ("/cache/tiny-1",)), True),
        (Base("/cache/tiny-1/"), Base("tiny", ("tiny@1",), ("/cache/tiny-1",)), True),
        (Base("/other/cache/tiny-1"), Base("tiny", ("tiny@1",), ("/cache/tiny-1",)), False),
        (Base("tiny-2"), Base("tiny", ("tiny@1",), ("/cache/tiny-1",)), False),
        (Base("/data/t-full/1"), Base("/data/u-full/1", (FIRST,)), False),
        (Base("C:\\models\\tiny"), Base("/models/tiny", (FIRST,)), False),
        (Base("./out/tiny"), Base("/models/out/tiny", (FIRST,)), False),
        (Base("/"), Base("/models/llama", (FIRST,)), False),
        # Hub ids, in whatever form.
        (Base("org/llama"), Base("org/llama", ("org/llama@a1", FIRST)), True),
        (Base("Org/LLaMA"), Base("org/llama", ("org/llama@a1",)), True),
        (Base("other/llama"), Base("org/llama", ("org/llama@a1",)), False),
        (Base("org/llama"), Base("/models/llama", (FIRST,)), False),
        (Base(SNAPSHOT), Base("acme/tiny", (f"acme/tiny@{COMMIT}",)), True),
        (Base(f"{SNAPSHOT}/"), Base("acme/tiny", ("acme/tiny@other",)), True),
        (Base(SNAPSHOT), Base("other/tiny", ("other/tiny@a1",)), False),
        (Base("acme/tiny"), Base(SNAPSHOT, (FIRST,), (SNAPSHOT,)), True),
        (Base("m" * 10**6), Base("org/llama", ("org/llama@a1",)), False),
        (Base("models--" * 10**5), Base("org/llama", ("org/llama@a1",)), False),
        # Weights that were quantised before they were uploaded.
        (Base("unsloth/tiny-bnb-4bit"), Base("unsloth/tiny", ("unsloth/tiny@a1",)), True),
        (Base("unsloth/tiny-unsloth-bnb-4bit"), Base("unsloth/Tiny"), True),
        (Base("unsloth/tiny"), Base("unsloth/tiny-bnb-4bit"), True),
        (Base("unsloth/tiny-bnb-4bit"), Base("other/tiny"), False),
        (Base("unsloth/tiny-bnb-4bit", (FIRST,)), Base("unsloth/tiny", (SECOND,)), True),
        # Content before names.
        (Base("/a/base", (FIRST,)), Base("/b/other", (FIRST,)), True),
        (Base("/a/base", (FIRST,)), Base("/a/base", (SECOND,)), False),
        (Base("org/x", ("org/x@a1", FIRST)), Base("org/x", ("org/x@b2", FIRST)), True),
        (Base("org/x", ("org/x@a1", FIRST)), Base("org/x", ("org/x@b2", SECOND)), False),
        (Base("org/x", ("org/x@a1", FIRST)), Base("/models/x", (FIRST,)), True),
        (Base("org/x", ("org/x@a1",)), Base("org/x", ("org/x@b2", SECOND)), True),
    ],
)  # fmt: skip
def test_which_bases_are_one(claim: Base, served: Base, same: bool) -> None:
    assert claim.is_same(served) is served.is_same(claim) is same


def test_the_base_at_hand_is_known_by_its_content(tmp_path: Path) -> None:
    tiny = base_of(ModelConfig(name="tiny"))
    assert (tiny.name, tiny.identities[0]) == ("tiny", "tiny@1")
    copy, other = tmp_path / "t-full" / "1", tmp_path / "u-full" / "1"
    for directory in (copy, other):
        shutil.copytree(locate(ModelConfig(name="tiny")), directory)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x42")
    assert base_of(ModelConfig(name=str(copy))).is_same(tiny)
    assert not base_of(ModelConfig(name=str(other))).is_same(tiny)
    assert not base_of(ModelConfig(name=str(other))).is_same(base_of(ModelConfig(name=str(copy))))


def test_another_tokenizer_or_vocabulary_is_another_base(tmp_path: Path) -> None:
    tiny = base_of(ModelConfig(name="tiny"))
    for name in ("tokenizer.json", "config.json"):
        changed = tmp_path / name
        shutil.copytree(locate(ModelConfig(name="tiny")), changed)
        told = json.loads((changed / name).read_text())
        if name == "config.json":
            told["rope_theta"] = 5.0
        else:
            told["added_tokens"] = []
        (changed / name).write_text(json.dumps(told))
        assert not base_of(ModelConfig(name=str(changed))).is_same(tiny)


def test_a_downloaded_snapshot_is_its_hub_model(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--acme--tiny" / "snapshots" / COMMIT
    shutil.copytree(locate(ModelConfig(name="tiny")), snapshot)
    base = base_of(ModelConfig(name=str(snapshot)))
    assert f"acme/tiny@{COMMIT}" in base.identities
    assert Base("acme/tiny").is_same(base)
    assert not Base("other/tiny").is_same(base)

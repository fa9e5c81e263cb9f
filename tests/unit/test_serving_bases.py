"""Which base is served where none is named: the one that the adapters were trained on."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from rayfin.adapters import Registry
from rayfin.config import load_serve_config
from rayfin.errors import AdapterError, ConfigError
from rayfin.serving.base_model import with_adapters_base

SNAPSHOT = "/home/ray/hub/models--acme--small/snapshots/0f1e2d3c"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "runs" / "adapters")


def publish(registry: Registry, name: str, **told: Any) -> None:
    trained = registry.root.parent / "trained"
    trained.mkdir(parents=True, exist_ok=True)
    (trained / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    weights = struct.pack("<Q", len(header)) + header + b"1"
    (trained / "adapter_model.safetensors").write_bytes(weights)
    registry.publish(name, trained, told)


def chosen(registry: Registry, *settings: str, use: str | None = None) -> tuple[str, str | None]:
    config = load_serve_config(None, [f"storage={registry.root.parent}", *settings])
    model = with_adapters_base(config, use).model
    return model.name, model.revision


def test_the_adapters_say_which_base(registry: Registry) -> None:
    assert chosen(registry) == ("smollm2-135m", None)
    publish(registry, "support", base_model="tiny")
    assert chosen(registry) == ("tiny", None)
    assert chosen(registry, "model.name=smollm2-135m") == ("smollm2-135m", None)
    assert chosen(registry, "model.dtype=float32") == ("tiny", None)
    publish(registry, "unsaid")
    assert chosen(registry) == ("tiny", None)


def test_different_bases_are_listed(registry: Registry) -> None:
    publish(registry, "support", base_model="tiny")
    publish(registry, "triage", base_model="acme/small", spec={"model": {"revision": "v2"}})
    with pytest.raises(ConfigError, match=r"'tiny' of support@1; 'acme/small' of triage@1; say"):
        chosen(registry)
    assert chosen(registry, use="triage") == ("acme/small", "v2")
    assert chosen(registry, use="support@latest") == ("tiny", None)
    assert chosen(registry, use="tiny:support") == ("tiny", None)
    assert chosen(registry, use="smollm2-135m") == ("smollm2-135m", None)
    with pytest.raises(AdapterError, match="adapter 'nobody' is not in"):
        chosen(registry, use="nobody")


def test_forms_of_one_base(registry: Registry) -> None:
    """A snapshot that was downloaded elsewhere is had from the hub, the plain model for both."""
    publish(registry, "first", base_model="acme/small-bnb-4bit")
    publish(registry, "second", base_model=SNAPSHOT)
    publish(registry, "third", base_model="acme/small")
    assert chosen(registry) == ("acme/small", None)
    assert chosen(registry, use="second") == ("acme/small", None)
    assert chosen(registry, use="first") == ("acme/small-bnb-4bit", None)


def test_a_directory_that_is_not_here(registry: Registry, tmp_path: Path) -> None:
    publish(registry, "support", base_model="/data/models/small")
    with pytest.raises(AdapterError, match=r"names its base '/data/models/small'.*model\.name="):
        chosen(registry)
    here = tmp_path / "small"
    here.mkdir()
    publish(registry, "support", base_model=str(here))
    assert chosen(registry) == (str(here), None)

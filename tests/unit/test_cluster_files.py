"""The files of cluster/: through Ray's own launcher as far as it goes without a cloud."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
CLUSTERS = ("gpu", "cpu", "gcp-gpu", "local")
WATCHER = "~/rayfin/cluster/spot_notice.py"

Config = dict[str, Any]


def load(name: str) -> Config:
    config: Config = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text("utf-8"))
    return config


def validated(config: Config) -> Config:
    """As `ray up` reads it: with Ray's defaults; raises where it doesn't fit Ray's schema."""
    prepared: Config = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def faults(config: Config) -> list[str]:
    """What is wrong with how a cluster is started, by rules of ours."""
    found = []
    heads, workers = config["head_start_ray_commands"], config["worker_start_ray_commands"]
    starts = [line for line in heads + workers if "ray start" in line]
    if len(starts) != 2 or any("RAY_AUTH_MODE=token" not in line for line in starts):
        found.append("a node starts without token authentication")
    if any("RAY_AUTH_TOKEN" in str(line) for line in starts + config["setup_commands"]):
        found.append("the token stands in the file")
    if config["file_mounts"].get("~/.ray/auth_token") != "~/.ray/auth_token":
        found.append("the token's file does not come along")
    head = next((line for line in heads if "ray start --head" in line), "")
    if "--dashboard-host=127.0.0.1" not in head or "0.0.0.0" in head:
        found.append("the dashboard does not listen on localhost alone")
    if "[r]ay.util.client.server" not in head:
        found.append("Ray Client stays open")
    if any("unset OMP_NUM_THREADS" not in line for line in starts):
        found.append("trials would compute with one thread")
    spot = any(word in str(config) for word in ("'spot'", "'SPOT'"))
    watch = f"RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 ~/rayfin-venv/bin/python {WATCHER} "
    watch += f"{config['provider']['type']} --address $RAY_HEAD_IP:6379"
    if spot != any(watch in line for line in workers) or any(WATCHER in line for line in heads):
        found.append("the notice of spot machines is not passed on, or one of others is waited for")
    installs = [line for line in validated(config)["head_setup_commands"] if "pip install" in line]
    if not installs or any(
        line.count("pip install") != line.count("-c ~/rayfin/constraints.txt") for line in installs
    ):
        found.append("something is installed at any version")
    if "archive $COMMIT" not in str(config["setup_commands"]):
        found.append("no one commit is what runs")
    return found


@pytest.mark.parametrize("name", CLUSTERS)
def test_rays_own_validation(name: str) -> None:
    config = validated(load(name))
    head = config["head_node_type"]
    workers = [kind for kind in config["available_node_types"] if kind != head or name == "local"]
    assert sum(config["available_node_types"][kind]["max_workers"] for kind in workers) > 0


@pytest.mark.parametrize("name", CLUSTERS)
def test_started_as_it_must_be(name: str) -> None:
    assert faults(load(name)) == []


def replaced(old: str, new: str) -> Callable[[Config], Config]:
    def change(config: Config) -> Config:
        text = json.dumps(config)
        assert old in text
        changed: Config = json.loads(text.replace(old, new))
        return changed

    return change


def without(key: str) -> Callable[[Config], Config]:
    return lambda config: {name: value for name, value in config.items() if name != key}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (replaced("RAY_AUTH_MODE=token RAY", "RAY"), "token authentication"),
        (replaced("RAY_AUTH_MODE=token RAY", "RAY_AUTH_TOKEN=1 RAY_AUTH_MODE=token RAY"), "stands"),
        (replaced("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"), "dashboard"),
        (replaced(" --dashboard-host=127.0.0.1", ""), "dashboard"),
        (replaced("[r]ay.util.client.server", "nothing"), "Ray Client"),
        (replaced("unset OMP_NUM_THREADS; ", ""), "one thread"),
        (replaced("pip install -q -c ~/rayfin/constraints.txt", "pip install -q"), "any version"),
        (without("head_setup_commands"), "any version"),
        (replaced("spot_notice.py aws", "spot_notice.py gcp"), "notice of spot"),
        (replaced("RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 ~", "~"), "notice of spot"),
        (replaced('"MarketType": "spot"', '"MarketType": "none"'), "notice of spot"),
        (replaced("archive $COMMIT", "archive main"), "one commit"),
        (replaced("~/.ray/auth_token", "~/.ray/other"), "does not come along"),
    ],
)
def test_the_rules_can_fail(change: Callable[[Config], Config], fault: str) -> None:
    assert fault in str(faults(change(load("gpu"))))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config | {"surprise": 1},
        lambda config: config | {"max_workers": -1},
        lambda config: config | {"head_node_type": "nobody"},
        lambda config: config | {"initialization_commands": "one string"},
        replaced('"min_workers": 0', '"min_workers": 9'),
        replaced('"GPU": 1', '"GPU": "one"'),
        without("provider"),
    ],
)
def test_rays_validation_can_fail(change: Callable[[Config], Config]) -> None:
    with pytest.raises((ValidationError, ValueError, KeyError)):
        validated(change(load("gpu")))

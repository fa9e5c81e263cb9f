"""The README's steps for Kubernetes, and how the manifests of cluster/kuberay/ fit together."""

import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayfin.config import Config, load_config, load_serve_config
from rayfin.history.connect import parse_url

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
README = (ROOT / "cluster" / "README.md").read_text("utf-8")


def spec_of(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = yaml.safe_load((KUBERAY / f"{name}.yaml").read_text("utf-8"))["spec"]
    return spec


def sweep_command() -> str:
    return str(spec_of("sweep")["entrypoint"])


def readme_command() -> str:
    """What the README submits to the cluster that stays."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    [block] = [block for block in blocks if "storage=/mnt/rayfin" in block]
    lines = block.replace("\\\n", " ").splitlines()
    [line] = [line for line in lines if "ray job submit" in line]
    return str(line.partition(" -- ")[2])


def swept(command: str) -> Config:
    """What `python with_workers.py … -- python SCRIPT SETTING…` configures."""
    words = shlex.split(command)
    python, script, *settings = words[words.index("--") + 1 :]
    assert python == "python"
    # The image has the repository's files in /opt/rayfin, a working directory has them as they are.
    file = ROOT / script.removeprefix("/opt/rayfin/")
    spec = importlib.util.spec_from_file_location("cluster_sweep", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return load_config(module.CONFIG, settings)


def test_the_sweep_waits_for_as_many_gpus_as_may_come() -> None:
    words = shlex.split(sweep_command())
    assert words[:2] == ["python", "/opt/rayfin/cluster/with_workers.py"]
    [group] = spec_of("sweep")["rayClusterSpec"]["workerGroupSpecs"]
    assert int(words[2]) == group["maxReplicas"]


@pytest.mark.parametrize("command", [sweep_command, readme_command])
def test_the_sweeps_are_ones_that_rayfin_takes(command: Callable[[], str]) -> None:
    config = swept(command())
    assert config.storage == "/mnt/rayfin"
    # What all pods share is a network disk, which SQLite's history can't be on.
    assert config.history is not None
    assert parse_url(config.history).get_backend_name() == "postgresql"


def test_the_password_of_the_history_comes_from_the_secret() -> None:
    created = re.search(r"kubectl create secret generic (\S+) \\\n(.*--from-literal=.*)", README)
    assert created is not None and "--from-literal=PGPASSWORD=" in created[2]
    sweep, cluster = spec_of("sweep")["rayClusterSpec"], spec_of("cluster")
    groups = [each["headGroupSpec"] for each in (sweep, cluster)]  # where the driver runs
    # An API replica, on a worker, writes the figures of serving.
    groups += spec_of("serve")["rayClusterConfig"]["workerGroupSpecs"]
    for group in groups:
        [container] = group["template"]["spec"]["containers"]
        assert {"secretRef": {"name": created[1]}} in container["envFrom"]


def test_what_the_sweep_publishes_is_what_the_service_serves() -> None:
    [application] = yaml.safe_load(spec_of("serve")["serveConfigV2"])["applications"]
    sweep, service = swept(sweep_command()), load_serve_config(application["args"])
    assert sweep.publish is not None
    assert service.model.name == sweep.model.name
    assert service.storage == sweep.registry_storage
    assert service.history == sweep.history


def test_the_steps_replace_all_that_stands_for_something_of_yours() -> None:
    [line] = re.findall(r"^\$ sed -i (.*?) cluster/kuberay", README, re.MULTILINE | re.DOTALL)
    replaced = re.findall(r"'s\|(.+?)\|", line)
    text = "".join(path.read_text("utf-8") for path in KUBERAY.glob("*.yaml"))
    assert spec_of("storage")["storageClassName"] in replaced
    for name in replaced:
        assert name in text
        text = text.replace(name, "")
    assert "example.com" not in text

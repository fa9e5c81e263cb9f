"""cluster/kuberay/: KubeRay's fields, Kubernetes' own schemas, and rules of ours."""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from rayfin.config import load_serve_config

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
KUBERNETES = "1.32"

Thing = dict[str, Any]


def of(required: tuple[str, ...] = (), **properties: Thing) -> Thing:
    """An object with these fields and no others."""
    described = {name.replace("_", "-"): value for name, value in properties.items()}
    return {
        "type": "object",
        "properties": described,
        "required": list(required),
        "additionalProperties": False,
    }


STRING, INTEGER, BOOLEAN = ({"type": kind} for kind in ("string", "integer", "boolean"))
TEXTS = {"type": "object", "additionalProperties": STRING}
# Pods are validated by Kubernetes' own schema, below.
POD = of(("spec",), metadata=of(labels=TEXTS), spec={"type": "object"})
OBJECT = {"type": "object"}

# The fields in use, with their types, from "KubeRay CRD API reference" in Ray's documentation (of
# KubeRay 1.6.2); `secretName` came with 1.6.
CLUSTER = of(
    ("rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"),
    rayVersion=STRING,
    authOptions=of(("mode", "secretName"), mode={"enum": ["token"]}, secretName=STRING),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=of(
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=INTEGER,
        securityContext=OBJECT,
        resources=OBJECT,
    ),
    headGroupSpec=of(("rayStartParams", "template"), rayStartParams=TEXTS, template=POD),
    workerGroupSpecs={
        "type": "array",
        "items": of(
            ("groupName", "template"),
            groupName=STRING,
            replicas=INTEGER,
            minReplicas=INTEGER,
            maxReplicas=INTEGER,
            rayStartParams=TEXTS,
            template=POD,
        ),
    },
)
SPECS = {
    "RayCluster": CLUSTER,
    "RayJob": of(
        ("entrypoint", "rayClusterSpec"),
        entrypoint=STRING,
        shutdownAfterJobFinishes=BOOLEAN,
        ttlSecondsAfterFinished=INTEGER,
        activeDeadlineSeconds=INTEGER,
        submitterPodTemplate=POD,
        rayClusterSpec=CLUSTER,
    ),
    "RayService": of(
        ("serveConfigV2", "rayClusterConfig"),
        serveConfigV2=STRING,
        excludeHeadPodFromServeSvc=BOOLEAN,
        rayClusterConfig=CLUSTER,
    ),
}
FILES = {"cluster": "RayCluster", "sweep": "RayJob", "serve": "RayService"}


def load(name: str) -> Thing:
    thing: Thing = yaml.safe_load((KUBERAY / f"{name}.yaml").read_text("utf-8"))
    return thing


def cluster_of(thing: Thing) -> Thing:
    spec: Thing = thing["spec"]
    inner: Thing = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return inner


def pods_of(thing: Thing) -> Iterator[Thing]:
    cluster = cluster_of(thing)
    yield cluster["headGroupSpec"]["template"]["spec"]
    yield from (group["template"]["spec"] for group in cluster["workerGroupSpecs"])
    if "submitterPodTemplate" in thing["spec"]:
        yield thing["spec"]["submitterPodTemplate"]["spec"]


def check(thing: Thing) -> None:
    """Raises where a field is none of KubeRay's and Kubernetes', or of another type."""
    whole = of(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"enum": list(SPECS)},
        metadata=of(("name",), name=STRING, labels=TEXTS),
        spec=SPECS.get(thing.get("kind", ""), {}),
    )
    jsonschema.validate(thing, whole)
    for pod in pods_of(thing):
        wrapped = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
        kubernetes_validate.validate(wrapped, KUBERNETES, strict=True)


def faults(thing: Thing) -> list[str]:
    """What is wrong with a manifest by rules of ours."""
    found = []
    for pod in pods_of(thing):
        context = pod.get("securityContext", {})
        if not (context.get("runAsNonRoot") and context.get("runAsUser")):
            found.append("a pod may run as root")
        for container in pod["containers"]:
            inner = container.get("securityContext", {})
            if inner.get("allowPrivilegeEscalation") is not False:
                found.append("a container may become root")
            if inner.get("capabilities", {}).get("drop") != ["ALL"]:
                found.append("a container keeps capabilities")
            name, _, tag = container["image"].rpartition(":")
            if not name or tag == "latest":
                found.append("an image of any version")
            resources = container.get("resources", {})
            if not {"cpu", "memory"} <= resources.get("requests", {}).keys():
                found.append("a container asks for nothing")
            if "memory" not in resources.get("limits", {}):
                found.append("a container has no limit")
            probes = {"startupProbe", "readinessProbe", "livenessProbe"}
            if container["name"].startswith("ray-head") and not probes <= container.keys():
                found.append("a head is not watched")
            if any(
                "value" in each and "TOKEN" in each["name"] for each in container.get("env", [])
            ):
                found.append("a secret stands in the file")
    gpus = [
        group
        for group in cluster_of(thing)["workerGroupSpecs"]
        if "nvidia.com/gpu" in str(group["template"])
    ]
    if not gpus or any(not 0 <= each["minReplicas"] < each["maxReplicas"] for each in gpus):
        found.append("no group of GPUs that grows")
    return found


@pytest.mark.parametrize("name", FILES)
def test_manifests(name: str) -> None:
    thing = load(name)
    assert thing["kind"] == FILES[name]
    check(thing)
    assert faults(thing) == []


@pytest.mark.parametrize("name", ["cluster", "sweep"])
def test_gpus_are_there_only_for_work(name: str) -> None:
    [group] = cluster_of(load(name))["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == 0


@pytest.mark.parametrize("name", ["storage", "network"])
def test_what_the_pods_share(name: str) -> None:
    kubernetes_validate.validate(load(name), KUBERNETES, strict=True)


def test_the_configuration_of_the_service_is_one_that_serve_and_rayfin_take() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of pydantic's, in Ray Serve
        from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(load("serve")["spec"]["serveConfigV2"])
    [application] = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "serve.app:app"
    assert load_serve_config(application.args).deployment.gpus == 1


def at(*path: Any, to: Any) -> Callable[[Thing], Thing]:
    """A copy of a manifest with one value changed; `to` None: left out."""

    def change(thing: Thing) -> Thing:
        changed = copy.deepcopy(thing)
        inner: Any = changed
        for step in path[:-1]:
            inner = inner[step]
        if to is None:
            del inner[path[-1]]
        else:
            inner[path[-1]] = to
        return changed

    return change


HEAD = ("spec", "headGroupSpec", "template", "spec")
BOX = (*HEAD, "containers", 0)
GPU = ("spec", "workerGroupSpecs", 0)


@pytest.mark.parametrize(
    "change",
    [
        at("apiVersion", to="ray.io/v2"),
        at("kind", to="RayClutser"),
        at("spec", "rayVersion", to=2.6),
        at("spec", "authOptions", "mode", to="none"),
        at("spec", "authOptions", to=None),
        at("spec", "authOption", to={}),
        at(*GPU, "minReplicas", to="0"),
        at(*GPU, "rayStartParams", to={"num-cpus": 6}),
        at(*BOX, "imagePolicy", to="Always"),
        at(*BOX, "ports", 0, "containerPort", to="6379"),
        at(*HEAD, "restartPolicies", to="Never"),
        at(*HEAD, "containers", to=None),
    ],
)
def test_the_validation_can_fail(change: Callable[[Thing], Thing]) -> None:
    errors = (jsonschema.ValidationError, kubernetes_validate.ValidationError)
    with pytest.raises(errors):
        check(change(load("cluster")))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (at(*HEAD, "securityContext", "runAsNonRoot", to=False), "run as root"),
        (at(*HEAD, "securityContext", "runAsUser", to=0), "run as root"),
        (at(*BOX, "securityContext", to=None), "become root"),
        (at(*BOX, "securityContext", "capabilities", to=None), "capabilities"),
        (at(*BOX, "image", to="rayfin:latest"), "any version"),
        (at(*BOX, "image", to="rayfin"), "any version"),
        (at(*BOX, "resources", "requests", to=None), "asks for nothing"),
        (at(*BOX, "resources", "limits", to={}), "no limit"),
        (at(*BOX, "livenessProbe", to=None), "not watched"),
        (at(*BOX, "env", to=[{"name": "HF_TOKEN", "value": "x"}]), "secret"),
        (at(*GPU, "maxReplicas", to=0), "no group of GPUs"),
    ],
)
def test_the_rules_can_fail(change: Callable[[Thing], Thing], fault: str) -> None:
    assert fault in str(faults(change(load("cluster"))))

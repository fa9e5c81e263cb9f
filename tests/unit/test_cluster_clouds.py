"""`ray up` on AWS and Google Cloud, without either: AWS in memory, Google's API by its description.

Everything is Ray's own code but the cloud and the SSH commands, which are collected.
"""

import functools
import importlib.util
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import boto3
import httplib2
import pytest
import yaml
from googleapiclient import discovery
from googleapiclient.discovery_cache import get_static_doc
from moto import mock_aws
from ray.autoscaler._private import commands
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws import node_provider as aws_provider
from ray.autoscaler._private.aws import utils as aws_utils
from ray.autoscaler._private.gcp import config as gcp_config
from ray.autoscaler._private.gcp import node_provider as gcp_provider
from ray.autoscaler._private.gcp.node import GCPCompute

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
REGION = "us-west-2"

Config = dict[str, Any]
# moto knows no images; where one is named by AWS's public parameters, none can be known.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find AMI")


def module(name: str) -> ModuleType:
    """A script of cluster/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"cluster_{name}", CLUSTER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class Shell:
    """In the place of `subprocess`: keeps the commands that Ray would run, which all succeed."""

    def __init__(self) -> None:
        self.commands: list[str] = []

    def check_call(self, command: list[str], **_: Any) -> int:
        self.commands.append(" ".join(command))
        return 0

    def check_output(self, command: list[str], **_: Any) -> bytes:
        self.commands.append(" ".join(command))
        return b""

    def index(self, text: str) -> int:
        """Where the one command with `text` stands."""
        found = [index for index, command in enumerate(self.commands) if text in command]
        assert len(found) == 1, (text, found)
        return found[0]


def up(file: Path) -> tuple[Config, Shell]:
    """`ray up FILE`: the configuration that went to the head, and what was run there."""
    shell = Shell()
    config = commands._bootstrap_config(yaml.safe_load(file.read_text("utf-8")), True)
    commands.get_or_create_head_node(config, str(file), False, False, True, None, _runner=shell)
    return config, shell


def start_worker(config: Config) -> None:
    """What the autoscaler on the head does."""
    provider = commands._get_node_provider(config["provider"], config["cluster_name"])
    [kind] = set(config["available_node_types"]) - {config["head_node_type"]}
    labels = {"ray-node-name": f"ray-{config['cluster_name']}-worker"}
    provider.create_node(config["available_node_types"][kind]["node_config"], labels, 1)


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user at the root of the repository, with a token; their home."""
    opened: list[Any] = []
    open_file = tempfile.NamedTemporaryFile

    def remembered(*arguments: Any, **settings: Any) -> Any:
        opened.append(open_file(*arguments, **settings))
        return opened[-1]

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", remembered)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(ROOT)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64, "utf-8")
    yield tmp_path
    for file in opened:  # Ray doesn't close them
        file.close()


_list_instance_types = aws_provider.list_ec2_instances


@functools.cache
def instance_types(region: str, credentials: None) -> list[dict[str, Any]]:
    """The same in every account, and moto takes seconds to write the hundreds of them."""
    return _list_instance_types(region, credentials)


@pytest.fixture
def aws(user: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty account, and its EC2."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setattr(aws_provider, "TAG_BATCH_DELAY", 0)
    monkeypatch.setattr(aws_provider, "list_ec2_instances", instance_types)
    monkeypatch.setenv("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")  # those that nobody here asks for
    with mock_aws():
        for cached in (aws_utils.resource_cache, aws_utils.client_cache):
            cached.cache_clear()
        aws_config._get_subnets_or_die.cache_clear()
        yield boto3.client("ec2", REGION)


def access(*arguments: str) -> None:
    assert module("aws_access").main(arguments) == 0


def running(ec2: Any) -> list[dict[str, Any]]:
    reservations = ec2.describe_instances()["Reservations"]
    return [instance for each in reservations for instance in each["Instances"]]


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_up_on_aws(name: str, aws: Any) -> None:
    access("create", "--bucket", "a-bucket", "--ssh-from", "203.0.113.7/32")
    config, shell = up(CLUSTER / f"{name}.yaml")

    [head] = running(aws)
    assert head["InstanceType"] == "m7i.large"
    assert head["IamInstanceProfile"]["Arn"].endswith("/rayfin-head")
    [group] = head["SecurityGroups"]
    assert group["GroupName"] == "rayfin"
    [rules] = aws.describe_security_groups(GroupIds=[group["GroupId"]])["SecurityGroups"]
    opened = {rule["IpProtocol"]: rule for rule in rules["IpPermissions"]}
    assert opened["tcp"]["FromPort"] == opened["tcp"]["ToPort"] == 22
    assert [each["CidrIp"] for each in opened["tcp"]["IpRanges"]] == ["203.0.113.7/32"]
    assert opened["-1"]["IpRanges"] == []

    worker = config["available_node_types"][name]
    assert worker["node_config"]["SecurityGroupIds"] == [group["GroupId"]]
    assert worker["resources"]["CPU"] > 0 and worker["resources"].get("GPU", 0) == (name == "gpu")
    order = [
        shell.index("auth_token ubuntu@"),
        shell.index(".git/ ubuntu@"),
        shell.index("python3-venv"),
        shell.index("archive $COMMIT"),
        shell.index("pip install"),
        shell.index("ray start --head"),
    ]
    assert order == sorted(order)
    assert all("0" * 64 not in command for command in shell.commands)


def test_workers_on_aws_are_spot_instances(aws: Any) -> None:
    access("create", "--bucket", "a-bucket", "--ssh-from", "203.0.113.7/32")
    config, _ = up(CLUSTER / "gpu.yaml")
    start_worker(config)
    workers = [each for each in running(aws) if each["InstanceType"] == "g6.xlarge"]
    assert {each["InstanceLifecycle"] for each in workers} == {"spot"}
    assert {each["IamInstanceProfile"]["Arn"].rpartition("/")[2] for each in workers} == {
        "rayfin-worker"
    }


def test_an_instance_type_that_does_not_exist_is_noticed(
    aws: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    access("create", "--bucket", "a-bucket", "--ssh-from", "203.0.113.7/32")
    text = (CLUSTER / "gpu.yaml").read_text("utf-8")
    changed = tmp_path / "changed.yaml"
    changed.write_text(text.replace("m7i.large", "m7i.tiny"), "utf-8")
    up(changed)
    assert "Instance type m7i.tiny is not available" in caplog.text


def test_access_is_made_twice_and_removed_twice(aws: Any) -> None:
    iam = boto3.client("iam")
    for address in ("203.0.113.7/32", "203.0.113.8/32"):
        access("create", "--bucket", "a-bucket", "--ssh-from", address)
    roles = {role["RoleName"] for role in iam.list_roles()["Roles"]}
    assert {"rayfin-head", "rayfin-worker"} <= roles
    policy = iam.get_role_policy(RoleName="rayfin-worker", PolicyName="rayfin-worker")
    allowed = json.dumps(policy["PolicyDocument"])
    assert "arn:aws:s3:::a-bucket/*" in allowed and "ec2" not in allowed
    groups = aws.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["rayfin"]}])
    [group] = groups["SecurityGroups"]
    assert "203.0.113.8/32" in str(group) and "203.0.113.7/32" not in str(group)
    for _ in range(2):
        access("remove")
    assert not {role["RoleName"] for role in iam.list_roles()["Roles"]} & roles
    groups = aws.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["rayfin"]}])
    assert groups["SecurityGroups"] == []


class Google:
    """In the place of Google's servers: a project with a network, whose operations end at once."""

    def __init__(self) -> None:
        self.instances: list[Config] = []
        self.schemas = json.loads(get_static_doc("compute", "v1"))["schemas"]

    def request(self, uri: str, method: str, body: str | None = None, **_: Any) -> Any:
        path, sent = uri.partition("?")[0], json.loads(body) if body else {}
        answers = (answer for form, answer in self.answers if re.search(form, f"{method} {path}"))
        answer = next(answers, None)
        assert answer is not None, f"Ray asked for {method} {path}"
        return httplib2.Response({"status": "200"}), json.dumps(answer(self, sent)).encode()

    def create(self, instance: Config) -> Config:
        unknown = list(self.unknown(instance, "Instance"))
        assert unknown == [], f"not in Google's description of an instance: {unknown}"
        network = {"networkIP": "10.0.0.2", "accessConfigs": [{"natIP": "198.51.100.2"}]}
        given = {"status": "RUNNING", "labelFingerprint": "1", "networkInterfaces": [network]}
        self.instances.append(instance | given | {"asked": instance["networkInterfaces"]})
        return {"name": "operation"}

    def unknown(self, value: Config, schema: str) -> Iterator[str]:
        """The settings that an object has and its description has not."""
        known = self.schemas[schema]["properties"]
        for name, inner in value.items():
            if name not in known:
                yield f"{schema}.{name}"
                continue
            described = known[name].get("items", known[name])
            if "$ref" in described:
                for each in inner if isinstance(inner, list) else [inner]:
                    yield from self.unknown(each, described["$ref"])

    answers = (
        (r"/serviceAccounts/", lambda _, __: {"email": "account@a", "projectId": "a-project"}),
        (r":getIamPolicy", lambda _, __: {"bindings": []}),
        (r":setIamPolicy", lambda _, __: {}),
        (
            r"GET .*/v1/projects/[^/]*$",
            lambda _, __: {
                "projectId": "a-project",
                "lifecycleState": "ACTIVE",
                "name": "a-project",
                "commonInstanceMetadata": {},
            },
        ),
        (r"/subnetworks$", lambda _, __: {"items": [{"selfLink": "a-subnet"}]}),
        (r"/operations/", lambda _, __: {"status": "DONE"}),
        (r"POST .*/instances$", create),
        (r"GET .*/instances$", lambda google, _: {"items": google.instances}),
        (r"GET .*/instances/[^/]*$", lambda google, _: google.instances[-1]),
        (r"/setCommonInstanceMetadata|/setLabels", lambda _, __: {"name": "operation"}),
    )


@pytest.fixture
def google(user: Path, monkeypatch: pytest.MonkeyPatch) -> Google:
    made = Google()

    def clients(_: Config) -> tuple[Any, ...]:
        asked = (("cloudresourcemanager", "v1"), ("iam", "v1"), ("compute", "v1"))
        return (*(discovery.build(*each, http=made, static_discovery=True) for each in asked), None)

    for place in (gcp_config, gcp_provider):
        monkeypatch.setattr(place, "construct_clients_from_provider_config", clients)
    monkeypatch.setattr(GCPCompute, "get_new_authorized_http", lambda _, http: http)
    return made


def gcp_file(directory: Path, change: tuple[str, str] = ("", "")) -> Path:
    """What `envsubst` makes of it."""
    text = (CLUSTER / "gcp-gpu.yaml").read_text("utf-8")
    file = directory / "gcp.yaml"
    file.write_text(text.replace("${GOOGLE_CLOUD_PROJECT}", "a-project").replace(*change), "utf-8")
    return file


def test_up_on_google_cloud(google: Google, tmp_path: Path) -> None:
    config, shell = up(gcp_file(tmp_path))
    start_worker(config)

    head, worker = google.instances
    assert head["machineType"].endswith("/e2-standard-2")
    assert head["serviceAccounts"][0]["email"] == "account@a"
    assert worker["scheduling"]["provisioningModel"] == "SPOT"
    assert worker["serviceAccounts"][0]["email"].startswith("ray-autoscaler-sa-v1@a-project.")
    assert worker["asked"][0]["subnetwork"] == "a-subnet"
    order = [shell.index(text) for text in (".git/ ubuntu@", "pip install", "ray start --head")]
    assert order == sorted(order)


def test_a_setting_that_google_does_not_have_is_noticed(google: Google, tmp_path: Path) -> None:
    config, _ = up(gcp_file(tmp_path, ("provisioningModel", "provisioning")))
    with pytest.raises(AssertionError, match=r"Scheduling\.provisioning"):
        start_worker(config)

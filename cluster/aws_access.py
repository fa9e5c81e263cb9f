"""What the clusters on AWS need once in an account: a bucket's two roles, and a security group.

    python cluster/aws_access.py create --bucket my-bucket --ssh-from 203.0.113.7/32
    python cluster/aws_access.py remove

`create` makes the roles and instance profiles rayfin-head (starts and ends the workers of clusters
whose name begins with rayfin; reads and writes the bucket) and rayfin-worker (the bucket alone),
and in the default VPC the security group rayfin: SSH from one address range, everything between its
members. Run again, it brings them up to date. Neither verb touches the bucket; none of it costs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import boto3
from botocore.exceptions import ClientError

GROUP = "rayfin"
HEAD, WORKER = "rayfin-head", "rayfin-worker"
TRUST = {
    "Version": "2012-10-17",
    "Statement": [
        {
            "Effect": "Allow",
            "Principal": {"Service": "ec2.amazonaws.com"},
            "Action": "sts:AssumeRole",
        }
    ],
}
OURS = {"StringLike": {"ec2:ResourceTag/ray-cluster-name": "rayfin*"}}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    create_parser = verbs.add_parser("create")
    create_parser.add_argument("--bucket", required=True, help="where storage= points")
    create_parser.add_argument("--ssh-from", required=True, help="your address: 203.0.113.7/32")
    remove_parser = verbs.add_parser("remove")
    for each in (create_parser, remove_parser):
        each.add_argument("--region", default="us-west-2", help="as in the cluster file")
    args = parser.parse_args(arguments)
    if args.verb == "create":
        create(args.bucket, args.ssh_from, args.region)
    else:
        remove(args.region)
    return 0


def create(bucket: str, ssh_from: str, region: str) -> None:
    iam = boto3.client("iam")
    worker = make_role(iam, WORKER, bucket_policy(bucket))
    make_role(iam, HEAD, bucket_policy(bucket) + head_policy(worker))
    print(f"security group {GROUP}: {make_group(boto3.client('ec2', region), ssh_from)}")


def remove(region: str) -> None:
    """Raises ClientError where a cluster still uses the group."""
    ec2, iam = boto3.client("ec2", region), boto3.client("iam")
    if (group := find_group(ec2)) is not None:
        ec2.delete_security_group(GroupId=group["GroupId"])
    gone = "NoSuchEntity"
    for name in (HEAD, WORKER):
        profile, role = {"InstanceProfileName": name}, {"RoleName": name}
        unless(gone, iam.remove_role_from_instance_profile, **profile, **role)
        unless(gone, iam.delete_instance_profile, **profile)
        unless(gone, iam.delete_role_policy, **role, PolicyName=name)
        unless(gone, iam.delete_role, **role)


def make_role(iam: Any, name: str, statements: list[dict[str, Any]]) -> str:
    """The role's ARN."""
    trust = json.dumps(TRUST)
    exists = "EntityAlreadyExists"
    unless(exists, iam.create_role, RoleName=name, AssumeRolePolicyDocument=trust)
    policy = json.dumps({"Version": "2012-10-17", "Statement": statements})
    iam.put_role_policy(RoleName=name, PolicyName=name, PolicyDocument=policy)
    unless(exists, iam.create_instance_profile, InstanceProfileName=name)
    joined = {"InstanceProfileName": name, "RoleName": name}
    unless("LimitExceeded", iam.add_role_to_instance_profile, **joined)
    arn: str = iam.get_role(RoleName=name)["Role"]["Arn"]
    print(f"role {arn}")
    return arn


def bucket_policy(bucket: str) -> list[dict[str, Any]]:
    place = f"arn:aws:s3:::{bucket}"
    objects = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    return [
        allow(["s3:ListBucket", "s3:GetBucketLocation"], place),
        allow(objects, f"{place}/*"),
    ]


def head_policy(worker: str) -> list[dict[str, Any]]:
    """What Ray's autoscaler does on the head."""
    launched = {"StringEquals": {"ec2:CreateAction": "RunInstances"}}
    spot = {"StringEquals": {"iam:AWSServiceName": "spot.amazonaws.com"}}
    instances = "arn:aws:ec2:*:*:instance/*"
    return [
        allow(["ec2:Describe*", "ec2:RunInstances"], "*"),
        allow(["ec2:CreateTags"], "arn:aws:ec2:*:*:*/*", launched),
        allow(["ec2:CreateTags", "ec2:TerminateInstances"], instances, OURS),
        # ImageId: resolve:ssm:… names the newest image of a kind.
        allow(["ssm:GetParameters"], "arn:aws:ssm:*::parameter/aws/service/*"),
        allow(["iam:PassRole"], worker),
        allow(["iam:CreateServiceLinkedRole"], "*", spot),
    ]


def allow(
    actions: list[str], resource: str, condition: dict[str, Any] | None = None
) -> dict[str, Any]:
    statement: dict[str, Any] = {"Effect": "Allow", "Action": actions, "Resource": resource}
    return statement | ({"Condition": condition} if condition else {})


def make_group(ec2: Any, ssh_from: str) -> str:
    """The group's id; its rules are those that are wanted, and no others."""
    group = find_group(ec2)
    if group is None:
        made = ec2.create_security_group(
            GroupName=GROUP, Description="rayfin's clusters", VpcId=default_vpc(ec2)
        )
        identity: str = made["GroupId"]
    else:
        identity = group["GroupId"]
        if group["IpPermissions"]:
            ec2.revoke_security_group_ingress(
                GroupId=identity, IpPermissions=group["IpPermissions"]
            )
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": ssh_from}]}
    between = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": identity}]}
    ec2.authorize_security_group_ingress(GroupId=identity, IpPermissions=[ssh, between])
    return identity


def find_group(ec2: Any) -> dict[str, Any] | None:
    filters = [
        {"Name": "group-name", "Values": [GROUP]},
        {"Name": "vpc-id", "Values": [default_vpc(ec2)]},
    ]
    groups = ec2.describe_security_groups(Filters=filters)["SecurityGroups"]
    return groups[0] if groups else None


def default_vpc(ec2: Any) -> str:
    vpcs = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not vpcs:
        raise SystemExit("no default VPC in this region: `aws ec2 create-default-vpc` makes one")
    identity: str = vpcs[0]["VpcId"]
    return identity


def unless(code: str, call: Any, **arguments: Any) -> None:
    """Makes the call; that it was needless, which AWS says by `code`, is no error."""
    try:
        call(**arguments)
    except ClientError as error:
        if error.response["Error"]["Code"] != code:
            raise


if __name__ == "__main__":
    sys.exit(main())

"""Makes a stack of the CloudFormation template with moto, a double of AWS, in this process, and looks at what came of it.

Writes the user data of each stack into a folder, and what cloud-init would write, for the router's own loader to
judge.

usage: stack.py FOLDER_OF_THE_TEMPLATE FOLDER
"""

import ast
import base64
import os
import pathlib
import sys

# Nothing may reach AWS, should the double miss a call.
os.environ.update(
    AWS_ACCESS_KEY_ID="none",
    AWS_SECRET_ACCESS_KEY="none",
    AWS_DEFAULT_REGION="eu-central-1",
    AWS_EC2_METADATA_DISABLED="true",
    AWS_ENDPOINT_URL="http://127.0.0.1:9",
)

import boto3
import yaml
from moto import mock_aws


TABLES = ["rtb-0000000000000000a", "rtb-0000000000000000b"]


def clients(*services):
    # moto's own addresses are AWS's, so these are named again where it listens.
    return [boto3.client(s, endpoint_url=f"https://{s}.eu-central-1.amazonaws.com") for s in services]


def the(found):
    [one] = found
    return one


def expect(what, found, wanted):
    if found != wanted:
        sys.exit(f"{what}: {found!r}, and not {wanted!r}")


def make(name, template, parameters):
    """Makes a stack, and returns its resources by their logical names, and its launch template's user data."""
    cloudformation, ec2, autoscaling = clients("cloudformation", "ec2", "autoscaling")
    vpc = ec2.create_vpc(CidrBlock="10.20.0.0/16")["Vpc"]["VpcId"]
    subnets = [
        ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.20.{n}.0/24", AvailabilityZone=f"eu-central-1{zone}")
        for n, zone in enumerate("ab")
    ]
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    parameters = {
        "VpcId": vpc,
        "SubnetIds": ",".join(subnet["Subnet"]["SubnetId"] for subnet in subnets),
        "ImageId": image,
        **parameters,
    }
    cloudformation.create_stack(
        StackName=name,
        TemplateBody=template,
        Capabilities=["CAPABILITY_IAM"],
        Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in parameters.items()],
    )
    expect("stack", the(cloudformation.describe_stacks(StackName=name)["Stacks"])["StackStatus"], "CREATE_COMPLETE")
    resources = cloudformation.describe_stack_resources(StackName=name)["StackResources"]
    # Those whose condition is not met are there without a name, and rules without an id.
    ids = {r["LogicalResourceId"]: r["PhysicalResourceId"] for r in resources if {"LogicalResourceId", "PhysicalResourceId"} <= set(r)}
    data = the(
        ec2.describe_launch_template_versions(LaunchTemplateId=ids["LaunchTemplate"])["LaunchTemplateVersions"]
    )["LaunchTemplateData"]
    group = the(autoscaling.describe_auto_scaling_groups(AutoScalingGroupNames=[name])["AutoScalingGroups"])
    return ids, data, group


def statements(ids):
    (iam,) = clients("iam")
    found = {}
    for name in iam.list_role_policies(RoleName=ids["Role"])["PolicyNames"]:
        policy = iam.get_role_policy(RoleName=ids["Role"], PolicyName=name)["PolicyDocument"]
        # moto keeps a stack's policies in Python's notation.
        policy = ast.literal_eval(policy) if isinstance(policy, str) else policy
        # A statement whose condition is not met is there as none.
        found.update((statement["Sid"], statement) for statement in policy["Statement"] if statement)
    return found


@mock_aws
def plain(template, folder):
    # moto takes a list's default value apart into letters.
    lists = {"Routes": "auto:vpc,10.30.0.0/16", "TagsInTailnet": "tag:router"}
    ids, data, group = make("sluice", template, lists)
    (ec2,) = clients("ec2")
    metadata = data["MetadataOptions"]
    expect("tokens", metadata["HttpTokens"], "required")
    expect("hops", int(metadata["HttpPutResponseHopLimit"]), 1)
    expect("tags in the metadata", metadata["InstanceMetadataTags"], "enabled")
    expect("type", data["InstanceType"], "c7g.medium")
    expect("sizes", (group["MinSize"], group["DesiredCapacity"], group["MaxSize"]), (2, 2, 4))
    expect("instances", len(group["Instances"]), 2)
    expect("subnets", len(group["VPCZoneIdentifier"].split(",")), 2)
    rules = the(ec2.describe_security_groups(GroupIds=[ids["SecurityGroup"]])["SecurityGroups"])["IpPermissions"]
    rules = sorted((r["IpProtocol"], r.get("FromPort"), r.get("ToPort")) for r in rules)
    expect("what is let in", rules, [("icmp", 3, 4), ("udp", 51820, 51820)])
    rights = statements(ids)
    expect("rights", sorted(rights), ["AuthKey", "LifecycleHooks"])
    expect(
        "group of the hooks",
        rights["LifecycleHooks"]["Resource"],
        "arn:aws:autoscaling:eu-central-1:123456789012:autoScalingGroup:*:autoScalingGroupName/sluice",
    )
    (folder / "plain.toml").write_bytes(base64.b64decode(data["UserData"]))


@mock_aws
def with_route_tables(template, folder):
    ids, data, group = make(
        "backwards",
        template,
        {
            "Snat": "false",
            "Routes": "10.20.0.0/16,10.30.0.0/16",
            "VpcRouteTables": ",".join(TABLES),
            "OpenedFrom": "10.20.0.0/16",
            "TagsInTailnet": "tag:router,tag:prod",
            "ListenPort": "443",
            "MoreConfig": '[policy]\ndenied = "reject"',
        },
    )
    rights = statements(ids)
    expect("rights", sorted(rights), ["AuthKey", "LifecycleHooks", "Look", "SourceDestCheck", "VpcRoutes"])
    expect("tables", rights["VpcRoutes"]["Condition"], {"StringEquals": {"ec2:RouteTableID": TABLES}})
    mark = {"StringEquals": {"aws:ResourceTag/sluice:group": "backwards"}}
    expect("interfaces", rights["SourceDestCheck"]["Condition"], mark)
    (folder / "with-route-tables.toml").write_bytes(base64.b64decode(data["UserData"]))


def passed_over(template):
    """What moto leaves out: the hooks that a group begins with, rules about IPv6, how instances are replaced."""
    from cfnlint.decode import cfn_yaml

    resources = cfn_yaml.loads(template)["Resources"]
    group = resources["Group"]["Properties"]
    hooks = {h["LifecycleTransition"].split("_")[-1]: h["DefaultResult"] for h in group["LifecycleHookSpecificationList"]}
    expect("hooks", hooks, {"LAUNCHING": "ABANDON", "TERMINATING": "CONTINUE"})
    policy = group["InstanceMaintenancePolicy"]
    expect("replacement", (policy["MinHealthyPercentage"], policy["MaxHealthyPercentage"]), (100, 200))
    rules = resources["SecurityGroup"]["Properties"]["SecurityGroupIngress"]
    rules = [(r["IpProtocol"], r["FromPort"], r["ToPort"]) for r in rules if "CidrIpv6" in r]
    expect("IPv6 that is let in", rules, [("udp", {"Ref": "ListenPort"}, {"Ref": "ListenPort"}), ("icmpv6", 2, 0)])


if __name__ == "__main__":
    here, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    template = (here / "cloudformation.yaml").read_text()
    passed_over(template)
    plain(template, folder)
    with_route_tables(template, folder)
    file = the(yaml.safe_load((here / "cloud-init.yaml").read_text())["write_files"])
    (folder / "cloud-init.toml").write_text(file["content"])
    print("two stacks are as they should be")

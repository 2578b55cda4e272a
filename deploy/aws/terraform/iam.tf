# What a router may do: its own group's hooks, one secret, and what routing needs, on what is named alone.

data "aws_caller_identity" "current" {}
data "aws_partition" "current" {}
data "aws_region" "current" {}

locals {
  # `id` is there in all versions of the provider; its other names have changed.
  region = data.aws_region.current.id

  arn = { for service in ["autoscaling", "ec2", "ssm"] : service => join(":", [
    "arn",
    data.aws_partition.current.partition,
    service,
    local.region,
    data.aws_caller_identity.current.account_id,
  ]) }

  # Without source translation packets for peers come to the routers, which EC2 lets in only if it is told to.
  needs_source_dest_check_off = !var.snat || length(var.vpc_route_tables) > 0
}

data "aws_iam_policy_document" "router" {
  statement {
    sid = "LifecycleHooks"
    actions = [
      "autoscaling:CompleteLifecycleAction",
      "autoscaling:RecordLifecycleActionHeartbeat",
    ]
    resources = ["${local.arn.autoscaling}:autoScalingGroup:*:autoScalingGroupName/${var.name}"]
  }

  statement {
    sid       = "AuthKey"
    actions   = ["ssm:GetParameter"]
    resources = ["${local.arn.ssm}:parameter${var.auth_key_parameter}"]
  }

  dynamic "statement" {
    for_each = var.auth_key_kms_key_arn == "" ? [] : [var.auth_key_kms_key_arn]
    content {
      sid       = "DecryptAuthKey"
      actions   = ["kms:Decrypt"]
      resources = [statement.value]
      condition {
        test     = "StringLike"
        variable = "kms:ViaService"
        values   = ["ssm.${local.region}.*"]
      }
    }
  }

  dynamic "statement" {
    for_each = local.needs_source_dest_check_off ? [1] : []
    content {
      sid = "Look"
      actions = [
        "ec2:DescribeNetworkInterfaceAttribute",
        "ec2:DescribeRouteTables",
      ]
      # AWS knows no narrower resource for these.
      resources = ["*"]
    }
  }

  dynamic "statement" {
    for_each = local.needs_source_dest_check_off ? [1] : []
    content {
      sid       = "SourceDestCheck"
      actions   = ["ec2:ModifyNetworkInterfaceAttribute"]
      resources = ["${local.arn.ec2}:network-interface/*"]
      condition {
        test     = "StringEquals"
        variable = "aws:ResourceTag/${local.group_tag}"
        values   = [var.name]
      }
    }
  }

  dynamic "statement" {
    for_each = length(var.vpc_route_tables) > 0 ? [1] : []
    content {
      sid = "VpcRoutes"
      actions = [
        "ec2:CreateRoute",
        "ec2:DeleteRoute",
        "ec2:ReplaceRoute",
      ]
      resources = [for table in var.vpc_route_tables : "${local.arn.ec2}:route-table/${table}"]
    }
  }
}

data "aws_iam_policy_document" "assume" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "router" {
  name_prefix        = "${var.name}-"
  description        = "Sluice routers of ${var.name}"
  assume_role_policy = data.aws_iam_policy_document.assume.json
  tags               = local.tags
}

resource "aws_iam_role_policy" "router" {
  name   = "sluice"
  role   = aws_iam_role.router.id
  policy = data.aws_iam_policy_document.router.json
}

resource "aws_iam_instance_profile" "router" {
  name_prefix = "${var.name}-"
  role        = aws_iam_role.router.name
  tags        = local.tags
}

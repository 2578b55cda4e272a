# A group of Sluice routers that serve a VPC to a tailnet. README.md in the folder above says how to use it.

locals {
  launch_hook      = "sluice-launch"
  termination_hook = "sluice-termination"

  # The role may change interfaces that bear this, which are the group's own.
  group_tag = "sluice:group"

  tags = merge(var.tags, { (local.group_tag) = var.name })
}

module "user_data" {
  source = "./user-data"

  control_url        = var.control_url
  auth_key_parameter = var.auth_key_parameter
  tags_in_tailnet    = var.tags_in_tailnet
  listen_port        = var.listen_port
  routes             = var.routes
  snat               = var.snat
  vpc_route_tables   = var.vpc_route_tables
  more_config        = var.more_config
}

resource "aws_launch_template" "router" {
  name_prefix            = "${var.name}-"
  description            = "Sluice routers of ${var.name}"
  image_id               = var.image_id
  instance_type          = var.instance_type
  user_data              = base64encode(module.user_data.toml)
  update_default_version = true

  iam_instance_profile {
    arn = aws_iam_instance_profile.router.arn
  }

  # A router that shuts itself down is gone, and the group begins another.
  instance_initiated_shutdown_behavior = "terminate"

  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
    # The router learns its group's name there.
    instance_metadata_tags = "enabled"
  }

  network_interfaces {
    device_index                = 0
    associate_public_ip_address = var.public_addresses
    delete_on_termination       = true
    security_groups             = [aws_security_group.router.id]
  }

  dynamic "instance_market_options" {
    for_each = var.spot ? [1] : []
    content {
      market_type = "spot"
    }
  }

  dynamic "tag_specifications" {
    for_each = ["instance", "network-interface", "volume"]
    content {
      resource_type = tag_specifications.value
      tags          = merge({ Name = var.name }, local.tags)
    }
  }

  tags = local.tags

  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_autoscaling_group" "routers" {
  name                = var.name
  vpc_zone_identifier = var.subnet_ids
  min_size            = var.routers
  desired_capacity    = var.routers
  # Room for the next ones while those that they replace drain; nothing grows the group by itself.
  max_size = var.routers * 2

  # An instance counts once its router has completed the launch hook, and that is only when it serves.
  health_check_type         = "EC2"
  health_check_grace_period = 0
  default_instance_warmup   = 0
  max_instance_lifetime     = var.max_instance_lifetime
  capacity_rebalance        = var.spot

  launch_template {
    id      = aws_launch_template.router.id
    version = aws_launch_template.router.latest_version
  }

  # They belong to the group from its first instance on; a hook of its own resource would come after that.
  initial_lifecycle_hook {
    name                 = local.launch_hook
    lifecycle_transition = "autoscaling:EC2_INSTANCE_LAUNCHING"
    default_result       = "ABANDON"
    heartbeat_timeout    = 300
  }

  # The router says every 20 s that it is still draining; one that is dead holds nothing up for longer than this.
  initial_lifecycle_hook {
    name                 = local.termination_hook
    lifecycle_transition = "autoscaling:EC2_INSTANCE_TERMINATING"
    default_result       = "CONTINUE"
    heartbeat_timeout    = 300
  }

  # The next one serves before the old one goes.
  instance_maintenance_policy {
    min_healthy_percentage = 100
    max_healthy_percentage = 200
  }

  instance_refresh {
    strategy = "Rolling"
    preferences {
      min_healthy_percentage = 100
      max_healthy_percentage = 200
      skip_matching          = true
    }
  }

  dynamic "tag" {
    for_each = local.tags
    content {
      key                 = tag.key
      value               = tag.value
      propagate_at_launch = false
    }
  }

  # Routers have their rights and the network from the first one on, and as long as the last one drains.
  depends_on = [
    aws_iam_role_policy.router,
    aws_vpc_security_group_egress_rule.router,
    aws_vpc_security_group_ingress_rule.router,
  ]
}

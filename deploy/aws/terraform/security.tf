# What may reach the routers: WireGuard, and word of packets that were too big.

locals {
  v4 = [for cidr in var.peers_from : cidr if !strcontains(cidr, ":")]
  v6 = [for cidr in var.peers_from : cidr if strcontains(cidr, ":")]

  ingress = merge(
    { for cidr in local.v4 : "wireguard ${cidr}" => { protocol = "udp", from = var.listen_port, to = var.listen_port, v4 = cidr, v6 = null } },
    { for cidr in local.v6 : "wireguard ${cidr}" => { protocol = "udp", from = var.listen_port, to = var.listen_port, v4 = null, v6 = cidr } },
    # ICMP: from is the type, to the code: "fragmentation needed" and "packet too big".
    {
      "too big, IPv4" = { protocol = "icmp", from = 3, to = 4, v4 = "0.0.0.0/0", v6 = null }
      "too big, IPv6" = { protocol = "icmpv6", from = 2, to = 0, v4 = null, v6 = "::/0" }
    },
    { for cidr in var.opened_from : "for peers ${cidr}" => {
      protocol = "-1", from = null, to = null,
      v4       = strcontains(cidr, ":") ? null : cidr,
      v6       = strcontains(cidr, ":") ? cidr : null
    } },
  )

  egress = { "IPv4" = ["0.0.0.0/0", null], "IPv6" = [null, "::/0"] }
}

resource "aws_security_group" "router" {
  name_prefix = "${var.name}-"
  description = "Sluice routers of ${var.name}"
  vpc_id      = var.vpc_id
  tags        = merge({ Name = var.name }, local.tags)

  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_vpc_security_group_ingress_rule" "router" {
  for_each = local.ingress

  security_group_id = aws_security_group.router.id
  description       = each.key
  ip_protocol       = each.value.protocol
  from_port         = each.value.from
  to_port           = each.value.to
  cidr_ipv4         = each.value.v4
  cidr_ipv6         = each.value.v6
  tags              = local.tags
}

resource "aws_vpc_security_group_egress_rule" "router" {
  for_each = local.egress

  security_group_id = aws_security_group.router.id
  description       = "all, ${each.key}"
  ip_protocol       = "-1"
  cidr_ipv4         = each.value[0]
  cidr_ipv6         = each.value[1]
  tags              = local.tags
}

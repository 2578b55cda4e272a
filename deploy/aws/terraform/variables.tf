variable "name" {
  description = "Name of the group, and beginning of the names of what belongs to it; the routers are <name>-<zone>-<end of the instance id> in the tailnet."
  type        = string
  default     = "sluice"

  validation {
    condition     = can(regex("^[a-zA-Z0-9-]{1,32}$", var.name))
    error_message = "Letters, digits and hyphens, at most 32: the routers' names in the tailnet begin with it."
  }
}

variable "image_id" {
  description = "The AMI, made by `cargo xtask image aws` and published as docs/aws-image.md says, of the same processor as instance_type."
  type        = string
}

variable "instance_type" {
  description = "Type of the instances; the default is arm64. docs/aws-image.md says which suits what."
  type        = string
  default     = "c7g.medium"
}

variable "vpc_id" {
  description = "The VPC that the routers stand in and serve."
  type        = string
}

variable "subnet_ids" {
  description = "A subnet for each zone that shall have a router. For direct paths they are public ones, with public_addresses."
  type        = list(string)

  validation {
    condition     = length(var.subnet_ids) > 0
    error_message = "At least one subnet."
  }
}

variable "routers" {
  description = "How many routers; two in two zones outlive one zone."
  type        = number
  default     = 2

  validation {
    condition     = var.routers >= 1
    error_message = "At least one router."
  }
}

variable "public_addresses" {
  description = "Whether the instances get public IPv4 addresses. Without, peers reach the routers by relays, or directly where NAT lets them."
  type        = bool
  default     = true
}

variable "spot" {
  description = "Whether to take spot instances: cheaper, and taken back with two minutes' notice, in which a router drains."
  type        = bool
  default     = false
}

variable "max_instance_lifetime" {
  description = "Seconds after which an instance is replaced, e.g. 1209600 for two weeks; 0 for never."
  type        = number
  default     = 0
}

variable "listen_port" {
  description = "UDP port of WireGuard."
  type        = number
  default     = 51820
}

variable "peers_from" {
  description = "Whence WireGuard's packets may come: IPv4 and IPv6 CIDRs. The default is everywhere, for peers roam, and strangers get no answer."
  type        = list(string)
  default     = ["0.0.0.0/0", "::/0"]
}

variable "opened_from" {
  description = "CIDRs of the VPC whose hosts may open connections to peers; needs vpc_route_tables. None by default."
  type        = list(string)
  default     = []
}

variable "control_url" {
  description = "The coordination server; empty for Tailscale's."
  type        = string
  default     = ""
}

variable "auth_key_parameter" {
  description = "Name of the SecureString parameter of Systems Manager that holds the auth key, e.g. /sluice/auth-key. The key is never part of the template or of user data."
  type        = string

  validation {
    condition     = startswith(var.auth_key_parameter, "/")
    error_message = "The parameter's name begins with a slash."
  }
}

variable "auth_key_kms_key_arn" {
  description = "ARN of the KMS key that the parameter is encrypted with, if it is one of your own; empty for the account's aws/ssm."
  type        = string
  default     = ""
}

variable "tags_in_tailnet" {
  description = "Tags that the routers ask for, e.g. [\"tag:router\"]: nodes with tags do not expire."
  type        = list(string)
  default     = ["tag:router"]
}

variable "routes" {
  description = "What the routers serve: CIDRs, or \"auto:vpc\" for all networks of the VPC."
  type        = list(string)
  default     = ["auto:vpc"]
}

variable "snat" {
  description = "Whether peers appear in the VPC with the router's own address. With false vpc_route_tables must lead their addresses back."
  type        = bool
  default     = true
}

variable "vpc_route_tables" {
  description = "Ids of the VPC's route tables in which the routers claim the way to the peers; another's route is never touched."
  type        = list(string)
  default     = []
}

variable "more_config" {
  description = "More of the routers' configuration, in TOML (docs/configuration.md): sections that are not made of the variables above."
  type        = string
  default     = ""
}

variable "tags" {
  description = "AWS tags for everything that is made."
  type        = map(string)
  default     = {}
}

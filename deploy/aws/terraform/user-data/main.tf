# The routers' configuration as user data. No provider is needed for it, so that it can be rendered anywhere:
# `terraform init && terraform plan` in this folder.

variable "control_url" {
  description = "See ../variables.tf, as for all of these."
  type        = string
  default     = ""
}

variable "auth_key_parameter" {
  description = "Name of the parameter that holds the auth key."
  type        = string
}

variable "tags_in_tailnet" {
  description = "Tags to ask for."
  type        = list(string)
  default     = []
}

variable "listen_port" {
  description = "UDP port of WireGuard."
  type        = number
  default     = 51820
}

variable "routes" {
  description = "CIDRs, or auto:vpc."
  type        = list(string)
}

variable "snat" {
  description = "Whether peers appear with the router's address."
  type        = bool
  default     = true
}

variable "vpc_route_tables" {
  description = "Route tables that lead to the peers."
  type        = list(string)
  default     = []
}

variable "more_config" {
  description = "More TOML."
  type        = string
  default     = ""
}

# What jsonencode makes of strings, numbers and lists is TOML as well.
output "toml" {
  description = "The configuration."
  value = templatefile("${path.module}/sluice.toml.tftpl", {
    control_url      = var.control_url
    auth_key         = "ssm:${var.auth_key_parameter}"
    tags             = var.tags_in_tailnet
    listen_port      = var.listen_port
    routes           = var.routes
    snat             = var.snat
    vpc_route_tables = var.vpc_route_tables
    more_config      = var.more_config
  })
}

output "group" {
  description = "Name of the autoscaling group."
  value       = aws_autoscaling_group.routers.name
}

output "security_group_id" {
  description = "The routers' security group, to name it in those of what they shall reach."
  value       = aws_security_group.router.id
}

output "role" {
  description = "Name of the routers' role, to attach more rights to."
  value       = aws_iam_role.router.name
}

output "user_data" {
  description = "The routers' configuration, as they get it."
  value       = module.user_data.toml
}

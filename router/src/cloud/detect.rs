//! Whether this machine is one of a cloud's, without asking anybody over the network.

use std::fs;
use std::path::Path;

use super::imds;

/// Which cloud is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Provider {
    /// The one that this machine is in, if it can be told.
    #[default]
    Auto,
    /// AWS, whatever the machine looks like.
    Aws,
    /// None.
    None,
}

impl Provider {
    /// Whether AWS is asked. Elsewhere nothing is sent to the metadata service's address.
    pub fn is_aws(self) -> bool {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        match self {
            Self::Aws => true,
            Self::None => false,
            Self::Auto if imds::is_disabled() => false,
            // Who names the service's place has one.
            Self::Auto => set(imds::ENDPOINT) || is_ec2(Path::new("/")),
        }
    }
}

/// The instance id as the firmware tells it, on instances of the Nitro kind.
pub fn instance_id() -> Option<String> {
    instance_id_in(Path::new("/"))
}

fn instance_id_in(root: &Path) -> Option<String> {
    let tag = firmware(root, "board_asset_tag")?;
    (is_ec2(root) && tag.starts_with("i-")).then_some(tag)
}

/// "Identify EC2 Linux instances", Amazon EC2 User Guide: Nitro has the vendor, Xen a UUID that begins with `ec2`.
fn is_ec2(root: &Path) -> bool {
    let vendor = firmware(root, "sys_vendor");
    let uuid = || firmware(root, "product_uuid");
    vendor.is_some_and(|vendor| vendor == "Amazon EC2")
        || uuid().is_some_and(|uuid| uuid.to_ascii_lowercase().starts_with("ec2"))
            && firmware(root, "bios_version").is_some_and(|text| text.contains("amazon"))
}

fn firmware(root: &Path, field: &str) -> Option<String> {
    let text = fs::read_to_string(root.join("sys/class/dmi/id").join(field)).ok()?;
    Some(text.trim().to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn machine(fields: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("sys/class/dmi/id");
        fs::create_dir_all(&folder).unwrap();
        for (field, text) in fields {
            fs::write(folder.join(field), format!("{text}\n")).unwrap();
        }
        root
    }

    #[test]
    fn instances_are_told_by_their_firmware() {
        let nitro = machine(&[
            ("sys_vendor", "Amazon EC2"),
            ("board_asset_tag", "i-0123456789abcdef0"),
        ]);
        assert!(is_ec2(nitro.path()));
        assert_eq!(
            instance_id_in(nitro.path()).as_deref(),
            Some("i-0123456789abcdef0")
        );
        let xen = machine(&[
            ("sys_vendor", "Xen"),
            ("bios_version", "4.11.amazon"),
            ("product_uuid", "EC2F0B1A-0000-0000-0000-000000000000"),
        ]);
        assert!(is_ec2(xen.path()));
        assert_eq!(instance_id_in(xen.path()), None);
        // One of 4,096 UUIDs begins like this by chance.
        let other = machine(&[
            ("sys_vendor", "QEMU"),
            ("board_asset_tag", "i-0123456789abcdef0"),
            ("product_uuid", "ec2f0b1a-0000-0000-0000-000000000000"),
        ]);
        assert!(!is_ec2(other.path()));
        assert_eq!(instance_id_in(other.path()), None);
        assert!(!is_ec2(machine(&[]).path()));
    }
}

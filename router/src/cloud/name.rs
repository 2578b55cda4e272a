//! The name that a router has when nobody gives it one.

use std::fs;
use std::path::Path;

use blake2::digest::Mac as _;
use blake2::digest::consts::U4;

use super::instance::Instance;

/// The instance's name in its group; else the host's, unless that is none; else one of the machine's own, which is
/// always the same.
pub fn of(instance: Option<&Instance>) -> String {
    of_in(Path::new("/"), instance)
}

fn of_in(root: &Path, instance: Option<&Instance>) -> String {
    let read = |path: &str| {
        let text = fs::read_to_string(root.join(path)).unwrap_or_default();
        text.trim().to_owned()
    };
    if let Some(name) = instance.and_then(Instance::host_name) {
        return name;
    }
    let host = read("proc/sys/kernel/hostname");
    // Up to the first dot: what follows is the network's.
    let label = host.split('.').next().unwrap_or_default();
    let is_none = label.is_empty()
        || label.to_ascii_lowercase().starts_with("localhost")
        || label == "(none)";
    if !is_none {
        return label.to_owned();
    }
    let machine = Some(read("etc/machine-id"))
        .filter(|id| !id.is_empty() && id != "uninitialized")
        .or_else(|| first_mac(root))
        .unwrap_or_default();
    format!("sluice-{}", digest(&machine))
}

/// The lowest hardware address of the machine's network cards.
fn first_mac(root: &Path) -> Option<String> {
    let links = fs::read_dir(root.join("sys/class/net")).ok()?.flatten();
    let cards = links.filter(|link| link.path().join("device").exists());
    let macs = cards.filter_map(|link| fs::read_to_string(link.path().join("address")).ok());
    macs.map(|mac| mac.trim().to_owned()).min()
}

/// machine-id(5) asks not to show the id itself.
fn digest(id: &str) -> String {
    let Ok(mut hash) = blake2::Blake2sMac::<U4>::new_from_slice(b"sluice host name") else {
        return String::new();
    };
    hash.update(id.as_bytes());
    let bytes = hash.finalize().into_bytes();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_router_is_never_called_localhost() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let instance = Instance {
            id: "i-0123456789abcdef0".to_owned(),
            zone: "eu-central-1a".to_owned(),
            group: Some("routers".to_owned()),
            ..Instance::default()
        };
        write("proc/sys/kernel/hostname", "gateway.example.org\n");
        assert_eq!(of_in(root.path(), None), "gateway");
        let named = of_in(root.path(), Some(&instance));
        assert_eq!(named, "routers-eu-central-1a-cdef0");
        // Without tags nobody knows the group, and such a host has a name of its own.
        assert_eq!(of_in(root.path(), Some(&Instance::default())), "gateway");
        write("etc/machine-id", "0123456789abcdef0123456789abcdef\n");
        let mut seen = Vec::new();
        for none in ["", "localhost\n", "localhost.localdomain\n", "Localhost4"] {
            write("proc/sys/kernel/hostname", none);
            seen.push(of_in(root.path(), None));
        }
        assert!(
            seen[0].starts_with("sluice-") && seen[0].len() == 15,
            "{seen:?}"
        );
        assert!(seen.iter().all(|name| *name == seen[0]), "{seen:?}");
        assert!(!seen[0].contains("01234567"));
        write("etc/machine-id", "fedcba9876543210fedcba9876543210\n");
        assert_ne!(of_in(root.path(), None), seen[0]);
    }
}

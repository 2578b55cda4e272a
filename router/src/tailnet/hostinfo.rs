//! What the router says of itself to a coordination server.

use std::fs;
use std::path::Path;

use blake2::digest::Mac as _;
use blake2::digest::consts::U32;
use ipnet::IpNet;

use crate::tailnet::keys::MachinePublic;
use crate::tailnet::wire::{Hostinfo, List};

/// What an operator has a say in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// The node's name; none: the host's.
    pub hostname: Option<String>,
    /// Routes to advertise.
    pub routes: Vec<IpNet>,
    /// Tags to ask for, each with `tag:`.
    pub tags: Vec<String>,
    /// Whether it carries datagrams between others.
    pub relays: bool,
}

/// Gathers it. Of the machine it tells what Go's client does too, and nothing that names it but the host name.
pub fn gather(wishes: &Wishes, machine: &MachinePublic) -> Hostinfo {
    gather_in(Path::new("/"), wishes, machine)
}

fn gather_in(root: &Path, wishes: &Wishes, machine: &MachinePublic) -> Hostinfo {
    let read = |path: &str| {
        let text = fs::read_to_string(root.join(path)).unwrap_or_default();
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    };
    let release = read("etc/os-release").or_else(|| read("usr/lib/os-release"));
    let release = release.unwrap_or_default();
    let hostname = wishes.hostname.clone();
    let hostname = hostname.or_else(|| read("proc/sys/kernel/hostname"));
    let container = ["run/.containerenv", ".dockerenv", "run/systemd/container"];
    let arch = std::env::consts::ARCH;
    let routes = wishes.routes.iter().map(|route| route.trunc().to_string());
    Hostinfo {
        ipn_version: Some(format!("{}-sluice", env!("CARGO_PKG_VERSION"))),
        backend_log_id: Some(log_id(machine)),
        os: Some("linux".to_owned()),
        os_version: read("proc/sys/kernel/osrelease"),
        container: Some(container.iter().any(|path| root.join(path).exists())),
        distro: field(&release, "ID"),
        distro_version: field(&release, "VERSION_ID"),
        distro_code_name: field(&release, "VERSION_CODENAME"),
        // Up to the first dot: what follows is the network's.
        hostname: hostname.map(|name| name.split('.').next().unwrap_or_default().to_owned()),
        no_logs_no_support: Some(true),
        machine: Some(arch.to_owned()),
        go_arch: Some(
            match arch {
                "x86_64" => "amd64",
                "aarch64" => "arm64",
                other => other,
            }
            .to_owned(),
        ),
        routable_ips: (!wishes.routes.is_empty()).then(|| routes.collect()),
        request_tags: (!wishes.tags.is_empty()).then(|| List(wishes.tags.clone())),
        userspace: Some(false),
        userspace_router: Some(false),
        state_encrypted: Some(false),
        peer_relay: wishes.relays.then_some(true),
        ..Hostinfo::default()
    }
}

/// A value of os-release(5).
fn field(release: &str, name: &str) -> Option<String> {
    release.lines().find_map(|line| {
        let value = line.strip_prefix(name)?.strip_prefix('=')?;
        Some(value.trim_matches(['"', '\'']).to_owned()).filter(|value| !value.is_empty())
    })
}

/// Logs are sent nowhere, but servers insist on a name for them. This one says no more than the machine key does.
fn log_id(machine: &MachinePublic) -> String {
    let Ok(mut hash) = blake2::Blake2sMac::<U32>::new_from_slice(b"sluice log id") else {
        return "0".repeat(64);
    };
    hash.update(machine.as_bytes());
    let digest = hash.finalize().into_bytes();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> MachinePublic {
        MachinePublic::from_bytes([3; 32])
    }

    #[test]
    fn what_is_told_of_a_machine() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write(
            "etc/os-release",
            "NAME=\"Debian\"\nID=debian\nVERSION_ID=\"13\"\nVERSION_CODENAME=trixie\n",
        );
        write("proc/sys/kernel/hostname", "gateway.example.org\n");
        write("proc/sys/kernel/osrelease", "6.12.0-amd64\n");
        write("run/.containerenv", "");
        let wishes = Wishes {
            routes: vec!["10.2.0.9/24".parse().unwrap()],
            ..Wishes::default()
        };
        let info = gather_in(root.path(), &wishes, &machine());
        assert_eq!(info.hostname.as_deref(), Some("gateway"));
        assert_eq!(info.os_version.as_deref(), Some("6.12.0-amd64"));
        assert_eq!(info.distro.as_deref(), Some("debian"));
        assert_eq!(info.distro_version.as_deref(), Some("13"));
        assert_eq!(info.distro_code_name.as_deref(), Some("trixie"));
        assert_eq!(info.container, Some(true));
        // A server refuses host bits.
        assert_eq!(info.routable_ips.unwrap().0, ["10.2.0.0/24"]);
        assert_eq!(info.request_tags, None);
    }

    #[test]
    fn a_bare_machine_has_what_servers_insist_on() {
        let root = tempfile::tempdir().unwrap();
        let wishes = Wishes {
            hostname: Some("named".to_owned()),
            tags: vec!["tag:router".to_owned()],
            ..Wishes::default()
        };
        let info = gather_in(root.path(), &wishes, &machine());
        assert_eq!(info.hostname.as_deref(), Some("named"));
        assert_eq!(info.container, Some(false));
        assert_eq!(info.routable_ips, None);
        assert_eq!(info.request_tags.unwrap().0, ["tag:router"]);
        let id = info.backend_log_id.unwrap();
        assert!(
            id.len() == 64 && id.bytes().all(|c| c.is_ascii_hexdigit()),
            "{id}"
        );
        assert_ne!(id, log_id(&MachinePublic::from_bytes([4; 32])));
    }
}

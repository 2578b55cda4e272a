//! In what container this process is, if in any, so that advice names what mends it there.

use std::fs;
use std::io::{Error, ErrorKind};
use std::path::Path;

/// Who has made the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Container {
    /// LXC, of which Proxmox makes its containers.
    Lxc,
    /// Docker, podman, Kubernetes and others.
    Other,
}

/// Why no program is loaded in an unprivileged container, for whoever fears that something is broken.
pub(crate) const WITHOUT_EBPF: &str = "this is an unprivileged container, for which no kernel loads eBPF \
    programs, so the kernel's own forwarding carries the packets: everything works and nothing has failed, \
    it only takes more CPU; a privileged container or a virtual machine has the fast path";

/// The container of this process; `None`: a machine, or nothing tells of one.
pub(crate) fn kind() -> Option<Container> {
    // systemd writes it down for everybody; what the first process was told root alone may read.
    let told = fs::read_to_string("/run/systemd/container").ok();
    let told = told.or_else(|| {
        let environment = fs::read("/proc/1/environ").ok()?;
        variable(&environment, "container")
    });
    match told {
        Some(name) => Some(named(&name)),
        None => ["/.dockerenv", "/run/.containerenv"]
            .iter()
            .any(|sign| Path::new(sign).exists())
            .then_some(Container::Other),
    }
}

fn named(name: &str) -> Container {
    match name.trim() {
        "lxc" => Container::Lxc,
        _ => Container::Other,
    }
}

/// A variable of an environment as `/proc` shows it.
fn variable(environment: &[u8], name: &str) -> Option<String> {
    environment.split(|byte| *byte == 0).find_map(|entry| {
        let (key, value) = std::str::from_utf8(entry).ok()?.split_once('=')?;
        (key == name && !value.is_empty()).then(|| value.to_owned())
    })
}

/// Whether root here is another user outside (a user namespace): then capabilities count for what belongs to
/// the container, and for nothing of the kernel's own.
pub(crate) fn is_unprivileged() -> bool {
    fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| maps_users(&map))
}

fn maps_users(map: &str) -> bool {
    let words: Vec<&str> = map.split_whitespace().collect();
    !words.is_empty() && words != ["0", "0", "4294967295"]
}

/// What mends that `/dev/net/tun` cannot be opened.
pub(crate) fn tun_mend(error: &Error) -> &'static str {
    mend_of_tun(kind(), error)
}

fn mend_of_tun(container: Option<Container>, error: &Error) -> &'static str {
    let is_permission = error.kind() == ErrorKind::PermissionDenied;
    match container {
        // The device is there, and no driver behind it.
        _ if error.raw_os_error() == Some(libc::ENODEV) => {
            "the machine's kernel has not loaded its driver: run there `modprobe tun`"
        }
        Some(Container::Lxc) if is_permission => {
            "the container may not use the device: on the Proxmox host, pass it in by `pct set <vmid> \
             -dev0 /dev/net/tun`, which gives it to the container's root, take out any lines of lxc.cgroup2 \
             and lxc.mount.entry about it, and `pct reboot <vmid>`"
        }
        Some(Container::Lxc) => {
            "the container has no TUN device: on the Proxmox host, pass it in by `pct set <vmid> -dev0 \
             /dev/net/tun`, then `pct reboot <vmid>`"
        }
        Some(Container::Other) if is_permission => {
            "the container may not use the device: pass it in by `--device /dev/net/tun` (in Kubernetes: a \
             privileged container, or a device plugin)"
        }
        Some(Container::Other) => {
            "the container has no TUN device: pass it in by `--device /dev/net/tun` (in Kubernetes: a volume \
             with hostPath /dev/net/tun)"
        }
        None if is_permission => "run it as root, or let this user open the device",
        None => "load its driver: `modprobe tun`",
    }
}

/// What mends that sysctls below `/proc/sys/net` cannot be written.
pub(crate) fn sysctl_mend() -> &'static str {
    match kind() {
        Some(Container::Lxc) => {
            "LXC leaves /proc/sys/net writable unless the container's configuration says otherwise: take \
             `lxc.mount.auto` and raw mounts of /proc/sys out of it, or set the values on the host"
        }
        Some(Container::Other) => {
            "whoever makes the container sets them: `--sysctl net.ipv4.ip_forward=1 --sysctl \
             net.ipv6.conf.all.forwarding=1` (Docker, podman), securityContext.sysctls (Kubernetes)"
        }
        None => "set them by hand, or run the router where /proc/sys/net can be written",
    }
}

/// What mends that the BPF file system is not there and cannot be mounted; empty where nothing does.
pub(crate) fn bpffs_mend() -> &'static str {
    match kind() {
        Some(Container::Lxc) => {
            "; on the Proxmox host, allow it by `pct set <vmid> -features nesting=1,mount=bpf`, then `pct \
             reboot <vmid>`"
        }
        Some(Container::Other) => {
            "; mount the machine's into the container: `--volume /sys/fs/bpf:/sys/fs/bpf`"
        }
        None => "",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_known_by_its_makers_word() {
        let environment = b"PATH=/bin\0container=lxc\0TERM=linux\0";
        assert_eq!(variable(environment, "container").unwrap(), "lxc");
        assert_eq!(variable(b"container=\0CONTAINER=x\0", "container"), None);
        assert_eq!(named("lxc\n"), Container::Lxc);
        assert_eq!(named("podman"), Container::Other);
    }

    #[test]
    fn roots_of_other_users_are_told_from_root() {
        assert!(!maps_users("         0          0 4294967295\n"));
        assert!(maps_users("         0     100000      65536\n"));
        assert!(maps_users("0 0 1000\n1000 100000 64536\n"));
        assert!(!maps_users(""));
    }

    #[test]
    fn each_lack_of_the_tun_device_has_its_own_mend() {
        let errors = [libc::ENOENT, libc::EPERM, libc::EACCES, libc::ENODEV];
        let errors = errors.map(Error::from_raw_os_error);
        let [absent, not_permitted, not_ours, no_driver] = &errors;
        let mend = mend_of_tun;
        let lxc = Some(Container::Lxc);
        assert!(mend(lxc, absent).contains("has no TUN device"));
        for error in [not_permitted, not_ours] {
            let text = mend(lxc, error);
            assert!(text.contains("may not use") && text.contains("-dev0 /dev/net/tun"));
        }
        assert!(mend(Some(Container::Other), absent).contains("--device"));
        for container in [lxc, Some(Container::Other), None] {
            assert!(mend(container, no_driver).contains("modprobe tun"));
        }
        assert!(mend(None, absent).contains("modprobe tun"));
        assert!(mend(None, not_permitted).contains("root"));
    }
}

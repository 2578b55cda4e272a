//! Containers as Proxmox makes and runs them, by the same LXC without Proxmox: a template is unpacked as its
//! `restore_tar_archive` does, given the edits of its set-up of Debian, and started with the configuration
//! that its `update_lxc_config` writes. AppArmor is left out: the lab's machines need not have it.
//!
//! All runs in the namespace of a [`Host`], which stands for the Proxmox node, and in a mount namespace with
//! the unified control groups that Proxmox has. A container dies with the process that watches over it.

use std::fmt::Write as _;
use std::fs::{self, Permissions};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::command::{Cmd, Output, Process};
use crate::requirements::{self, Need};
use crate::topology::Host;
use crate::wait::wait_until;

/// The users of unprivileged containers, as Proxmox has them.
const FIRST_USER: u32 = 100_000;
const USERS: u32 = 65_536;
const STOP: Duration = Duration::from_secs(30);
const UNPACK: Duration = Duration::from_secs(60);
/// The control group of all containers of labs.
const GROUP: &str = "sluice-lab";
/// The presets that Proxmox writes for the first boot.
const PRESET: &str = "# Added by PVE at create-time for first-boot configuration.\n\
    enable container-getty@.service\ndisable getty@.service\ndisable sys-kernel-config.mount\n\
    disable sys-kernel-debug.mount\ndisable systemd-networkd.service\n";

/// What `pct create` was told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Whether its root is the machine's.
    pub privileged: bool,
    /// Whether it has `/dev/net/tun` (`dev0`).
    pub tun: bool,
    /// Its address with prefix length, or `dhcp`.
    pub ip: String,
    /// Its gateway.
    pub gateway: Option<String>,
    /// The same of IPv6.
    pub ip6: Option<String>,
    /// The same of IPv6.
    pub gateway6: Option<String>,
    /// The MTU of its NIC.
    pub mtu: u32,
    /// Its environment: names and values.
    pub env: Vec<(String, String)>,
}

/// A container, running or not. It is killed when this is dropped.
#[derive(Debug)]
#[must_use = "the container is killed when this is dropped"]
pub struct Container {
    host: Host,
    name: String,
    settings: Settings,
    /// Of this container alone: `config`, `rootfs`.
    folder: PathBuf,
    running: Option<Process>,
}

/// Why containers cannot be run here; `None`: they can.
pub fn unable() -> Option<String> {
    let missing = requirements::missing_for(&[Need::Images]);
    let lack = missing.first()?;
    Some(format!(
        "{} is not installed; `cargo xtask image test lxc` brings it",
        lack.program
    ))
}

impl Container {
    /// Makes a container of a template (`.tar.zst`), for the bridge `vmbr0` of `host`.
    pub fn create(host: &Host, template: &Path, settings: Settings) -> anyhow::Result<Self> {
        let name = format!("ct-{}", host.namespace());
        let folder = host.folder().join(&name);
        let rootfs = folder.join("rootfs");
        fs::DirBuilder::new().mode(0o755).create(&folder)?;
        fs::DirBuilder::new().mode(0o755).create(&rootfs)?;
        let container = Self {
            host: host.clone(),
            name,
            settings,
            folder,
            running: None,
        };
        let root = container.user(0);
        chown(&rootfs, Some(root), Some(root))?;
        container.unpack(template)?;
        // Proxmox removes the id of the template, and has no more to say to a system without password.
        let machine = rootfs.join("etc/machine-id");
        if machine.exists() {
            fs::remove_file(machine)?;
        }
        Ok(container)
    }

    /// A user of the container, outside.
    fn user(&self, inside: u32) -> u32 {
        match self.settings.privileged {
            true => inside,
            false => FIRST_USER + inside,
        }
    }

    fn unpack(&self, template: &Path) -> anyhow::Result<()> {
        let mut words = Vec::new();
        if !self.settings.privileged {
            words.push("lxc-usernsexec".to_owned());
            for kind in ["u", "g"] {
                words.extend(["-m".to_owned(), format!("{kind}:0:{FIRST_USER}:{USERS}")]);
            }
            words.push("--".to_owned());
        }
        let tar = "tar xpf - --zstd --totals --one-file-system -p --sparse --numeric-owner --acls --xattrs \
                   --xattrs-include=user.* --xattrs-include=security.capability --warning=no-file-ignored \
                   --warning=no-xattr-write --skip-old-files --anchored --exclude ./dev/*";
        words.extend(tar.split_whitespace().map(str::to_owned));
        words.push("-C".to_owned());
        let command = self.host.command(words).arg(self.rootfs());
        let archive = fs::read(template).with_context(|| template.display().to_string())?;
        command.stdin(archive).timeout(UNPACK).run().map(drop)
    }

    /// The root of its file system.
    pub fn rootfs(&self) -> PathBuf {
        self.folder.join("rootfs")
    }

    /// Changes its settings, as `pct set` does; in force from the next start on.
    pub fn set(&mut self, change: impl FnOnce(&mut Settings)) {
        change(&mut self.settings);
    }

    /// Writes a file into it, as its root's own.
    pub fn write(&self, path: &str, text: &str, mode: u32) -> anyhow::Result<()> {
        let file = self.rootfs().join(path.trim_start_matches('/'));
        let folder = file.parent().context(path.to_owned())?;
        if !folder.exists() {
            fs::create_dir_all(folder)?;
            chown(folder, Some(self.user(0)), Some(self.user(0)))?;
        }
        // Never through a file that is there: the template's may have others' rights.
        if file.symlink_metadata().is_ok() {
            fs::remove_file(&file)?;
        }
        fs::write(&file, text).with_context(|| file.display().to_string())?;
        fs::set_permissions(&file, Permissions::from_mode(mode))?;
        Ok(chown(&file, Some(self.user(0)), Some(self.user(0)))?)
    }

    /// Copies a file into it.
    pub fn push(&self, from: &Path, path: &str) -> anyhow::Result<()> {
        let file = self.rootfs().join(path.trim_start_matches('/'));
        fs::copy(from, &file).with_context(|| from.display().to_string())?;
        Ok(chown(&file, Some(self.user(0)), Some(self.user(0)))?)
    }

    /// What Proxmox writes before every start.
    fn edit(&self) -> anyhow::Result<()> {
        let set = &self.settings;
        let mut interfaces = "auto lo\niface lo inet loopback\n\nauto eth0\n".to_owned();
        for (family, address, gateway) in [
            ("inet", Some(&set.ip), &set.gateway),
            ("inet6", set.ip6.as_ref(), &set.gateway6),
        ] {
            match address.map(String::as_str) {
                None => {}
                Some("dhcp") => writeln!(interfaces, "iface eth0 {family} dhcp\n")?,
                Some(address) => {
                    writeln!(
                        interfaces,
                        "iface eth0 {family} static\n\taddress {address}"
                    )?;
                    if let Some(gateway) = gateway {
                        writeln!(interfaces, "\tgateway {gateway}")?;
                    }
                    interfaces.push('\n');
                }
            }
        }
        self.write("etc/network/interfaces", &interfaces, 0o644)?;
        self.write("etc/hostname", "gateway\n", 0o644)?;
        self.write(
            "etc/hosts",
            "127.0.0.1 localhost.localnet localhost\n127.0.1.1 gateway\n",
            0o644,
        )?;
        self.write("etc/resolv.conf", "", 0o644)?;
        self.write("fastboot", "", 0o644)?;
        self.write("etc/systemd/system-preset/00-pve.preset", PRESET, 0o644)
    }

    fn configuration(&self) -> anyhow::Result<String> {
        let mut out = String::new();
        let mut say = |key: &str, value: &str| writeln!(out, "lxc.{key} = {value}");
        let group = format!("{GROUP}/{}", self.name);
        say("cgroup.relative", "0")?;
        say("cgroup.dir.monitor", &format!("{group}/monitor"))?;
        // Where the watcher ends; of its own choice it would leave one behind.
        say("cgroup.dir.monitor.pivot", &format!("{group}/pivot"))?;
        say("cgroup.dir.container", &format!("{group}/container"))?;
        say("cgroup.dir.container.inner", "ns")?;
        say("include", "/usr/share/lxc/config/common.conf")?;
        say("tty.dir", "")?;
        if !self.settings.privileged {
            say("include", "/usr/share/lxc/config/userns.conf")?;
            // As the file that Proxmox adds for unprivileged ones.
            for rule in ["deny =", "allow =", "allow = a"] {
                let (key, value) = rule.split_once(" =").context("a rule")?;
                say(&format!("cgroup2.devices.{key}"), value.trim())?;
            }
            say("mount.auto", "sys:mixed")?;
            for kind in ["u", "g"] {
                say("idmap", &format!("{kind} 0 {FIRST_USER} {USERS}"))?;
            }
        }
        say("apparmor.profile", "unconfined")?;
        say("monitor.unshare", "1")?;
        say("console.path", "none")?;
        say("tty.max", "2")?;
        say("environment", "TERM=linux")?;
        say("uts.name", "gateway")?;
        say("rootfs.path", &self.rootfs().display().to_string())?;
        if self.settings.tun {
            let node = self.folder.join("tun").display().to_string();
            say("cgroup2.devices.allow", "c 10:200 rw")?;
            say(
                "mount.entry",
                &format!("{node} dev/net/tun none bind,create=file 0 0"),
            )?;
        }
        say("net.0.type", "veth")?;
        say("net.0.link", "vmbr0")?;
        say("net.0.veth.pair", "veth100i0")?;
        say("net.0.name", "eth0")?;
        // Kept over restarts, or neighbours would go on sending to the one before.
        say("net.0.hwaddr", "bc:24:11:00:00:64")?;
        say("net.0.mtu", &self.settings.mtu.to_string())?;
        say("net.0.flags", "up")?;
        for (name, value) in &self.settings.env {
            say("environment", &format!("{name}={value}"))?;
        }
        Ok(out)
    }

    /// Starts it, and waits until its system is up. Returns what systemd says of it.
    pub fn start(&mut self, timeout: Duration) -> anyhow::Result<String> {
        self.edit()?;
        fs::write(self.folder.join("config"), self.configuration()?)?;
        let node = self.folder.join("tun");
        if self.settings.tun && !node.exists() {
            self.run_on_host(["mknod", "-m", "660"], &node, &["c", "10", "200"])?;
            chown(&node, Some(self.user(0)), Some(self.user(0)))?;
        }
        // sysfs shows the devices of the namespace that has mounted it.
        let script = "mount -t sysfs none /sys && mount -t cgroup2 none /sys/fs/cgroup && exec lxc-start -F -n \"$0\" -P \"$1\" -o \"$2\" -l INFO";
        let command = self
            .host
            .command(["unshare", "--mount", "--propagation", "private", "sh", "-c"])
            .arg(script)
            .args([&self.name, &path(self.host.folder())])
            .arg(self.host.folder().join(format!("{}-lxc.log", self.name)));
        let mut process = self.host.spawn("container", command)?;
        let pid = process.id();
        let mut state = String::new();
        let ready = process.ready(timeout, "the container's system to be up", || {
            let asked = attach(&self.host, &self.name, pid)
                .args(["systemctl", "is-system-running"])
                .output();
            state = asked
                .map(|said| said.stdout.trim().to_owned())
                .unwrap_or_default();
            ["running", "degraded"].contains(&state.as_str())
        });
        self.running = Some(process);
        ready?;
        Ok(state)
    }

    fn run_on_host(
        &self,
        words: impl IntoIterator<Item = &'static str>,
        file: &Path,
        more: &[&str],
    ) -> anyhow::Result<()> {
        let command = self.host.command(words).arg(file).args(more);
        command.run().map(drop)
    }

    /// A program in it, as `pct exec` runs one.
    pub fn command(&self, script: &str) -> anyhow::Result<Cmd> {
        let process = self
            .running
            .as_ref()
            .context("the container does not run")?;
        Ok(attach(&self.host, &self.name, process.id()).args(["sh", "-c", script]))
    }

    /// Runs a shell script in it to its end, whatever that is.
    pub fn output(&self, script: &str) -> anyhow::Result<Output> {
        self.command(script)?.output()
    }

    /// Runs a shell script in it; an exit status other than 0 is an error.
    pub fn run(&self, script: &str) -> anyhow::Result<String> {
        self.command(script)?.timeout(STOP).run()
    }

    /// Shuts it down, as `pct shutdown` does.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        let mut process = self.running.take().context("the container does not run")?;
        let seconds = STOP.as_secs().to_string();
        let stop = inside(&self.host, process.id())
            .args(["lxc-stop", "-n", &self.name, "-t", &seconds, "-P"])
            .arg(self.host.folder());
        stop.timeout(STOP * 2).run()?;
        let status = process.wait(STOP)?;
        ensure!(status.success(), "lxc-start: {status}\n{}", process.log());
        Ok(())
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // Its first process dies with the one that watches over it; its control groups are empty then.
        self.running = None;
        let what = "the container's control groups to be empty";
        let removed = wait_until(STOP, what, || {
            let mut roots = roots().into_iter().map(|root| root.join(GROUP));
            roots.all(|root| remove(&root.join(&self.name)))
        });
        if let Err(error) = removed {
            eprintln!("{}: {error:#}", self.name);
        }
        for root in roots() {
            // Others' containers may be in it.
            let _ = fs::remove_dir(root.join(GROUP));
        }
    }
}

/// Where unified control groups are mounted on this machine.
fn roots() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let of_groups = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (place, kind) = (words.next()?, words.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(place))
    });
    of_groups.collect()
}

/// Removes a control group with those in it; whether it is gone.
fn remove(group: &Path) -> bool {
    let inner = fs::read_dir(group).into_iter().flatten().flatten();
    for entry in inner.filter(|entry| entry.path().is_dir()) {
        remove(&entry.path());
    }
    let _ = fs::remove_dir(group);
    !group.exists()
}

/// A program beside the container's watcher.
fn inside(host: &Host, pid: u32) -> Cmd {
    host.command(["nsenter", "--mount", "--target", &pid.to_string()])
}

fn path(path: &Path) -> String {
    path.display().to_string()
}

fn attach(host: &Host, name: &str, pid: u32) -> Cmd {
    inside(host, pid)
        .args(["lxc-attach"])
        .args(["-n", name, "-P", &path(host.folder()), "--clear-env"])
        .args(["--set-var", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"])
        .args(["--set-var", "TERM=dumb", "--set-var", "HOME=/root", "--"])
}

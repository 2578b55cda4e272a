//! Guests that boot a disk as it is, by UEFI, as a cloud would: kernel, system and all are the disk's. What the lab
//! adds it says to systemd by the machine's SMBIOS tables, as credentials (systemd-debug-generator(8),
//! systemd-tmpfiles(8)), so that nothing on the disk is another for the test.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::{ACCELERATOR, ANSWER, Guest, PROCESSOR};
use crate::command::Cmd;
use crate::requirements;
use crate::topology::Host;

/// Emulated, with all that a first boot does, beside other builds.
const BOOT: Duration = Duration::from_secs(600);
/// What systemd-boot adds to the kernel's command line (smbios-type-11(7)): emulated, udev alone takes systemd's usual
/// 90 seconds to find the disk's partitions beside other builds, and a unit that waits for one then fails.
const PATIENT: &str = "io.systemd.boot.kernel-cmdline-extra=systemd.default_device_timeout_sec=600 \
    systemd.default_timeout_start_sec=600";
/// In MiB: that of EC2's smallest.
const MEMORY: &str = "512";
/// Runs what answers the lab, as soon as there is a system.
const SERVICE: &str = "[Unit]
Description=Runs what the lab asks for
[Service]
ExecStart=/bin/sh /run/lab/answer
Environment=HOME=/root
";
const WANTED: &str = "[Unit]
Wants=lab.service
";
/// What makes disks and runs the tests of them.
const MEND: &str = "`cargo xtask image test` brings it";

/// A processor, as Debian calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// x86-64.
    Amd64,
    /// AArch64.
    Arm64,
}

impl Arch {
    /// The emulator, and the firmware.
    fn programs(self) -> [&'static str; 2] {
        match self {
            Self::Amd64 => ["qemu-system-x86_64", "/usr/share/ovmf/OVMF.fd"],
            Self::Arm64 => [
                "qemu-system-aarch64",
                "/usr/share/qemu-efi-aarch64/QEMU_EFI.fd",
            ],
        }
    }

    /// The machine, with two serial lines that the kernel calls `ttyS0` and `ttyS1`, as on EC2.
    fn machine(self) -> &'static [&'static str] {
        match self {
            Self::Amd64 => &[
                "-machine",
                "q35",
                "-cpu",
                PROCESSOR,
                "-device",
                "isa-serial,chardev=console",
                "-device",
                "isa-serial,chardev=control",
            ],
            Self::Arm64 => &[
                "-machine",
                "virt,gic-version=3",
                "-cpu",
                "neoverse-n1",
                "-device",
                "pci-serial,chardev=console",
                "-device",
                "pci-serial,chardev=control",
            ],
        }
    }
}

/// A disk to boot.
#[derive(Clone, Debug)]
#[must_use]
pub struct Disk {
    file: PathBuf,
    arch: Arch,
    size: Option<u64>,
    tap: Option<String>,
    files: Vec<(String, String)>,
    instance: Option<String>,
    variables: Vec<(String, String)>,
}

impl Disk {
    /// The disk in this file; else the reason why it cannot be booted here.
    pub fn find(file: &Path, arch: Arch) -> Result<Self, String> {
        if !file.exists() {
            return Err(format!("there is no {}; {MEND}", file.display()));
        }
        let [emulator, firmware] = arch.programs();
        if requirements::find(emulator).is_none() || !Path::new(firmware).exists() {
            return Err(format!("{emulator} or {firmware} is missing; {MEND}"));
        }
        Ok(Self {
            file: file.to_owned(),
            arch,
            size: None,
            tap: None,
            files: Vec::new(),
            instance: None,
            variables: Vec::new(),
        })
    }

    /// Has the guest see a disk of so many bytes, more than the file has.
    pub fn grown(mut self, size: u64) -> Self {
        self.size = Some(size);
        self
    }

    /// Adds the NIC: in the host that boots the guest it is the TAP device `name`.
    pub fn nic(mut self, name: &str) -> Self {
        self.tap = Some(name.to_owned());
        self
    }

    /// Puts a file into the guest, for root alone, before its services start.
    pub fn file(mut self, path: &str, text: &str) -> Self {
        self.files.push((path.to_owned(), text.to_owned()));
        self
    }

    /// Gives the router a variable of the environment.
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Has the firmware say that the machine is this instance of EC2, of the Nitro kind.
    pub fn ec2(mut self, instance: &str) -> Self {
        self.instance = Some(instance.to_owned());
        self
    }

    /// Boots a copy of it, as a process of this host.
    pub fn boot(&self, host: &Host) -> anyhow::Result<Guest> {
        let folder = host.folder();
        let file = |end: &str| folder.join(format!("{}-disk{end}", host.name()));
        let (disk, control, console) = (file(".raw"), file(".sock"), file("-console.log"));
        let copy = Cmd::new(["cp", "--sparse=always"]);
        copy.arg(&self.file).arg(&disk).run()?;
        if let Some(size) = self.size {
            let grown = fs::OpenOptions::new().write(true).open(&disk)?;
            grown.set_len(size).context("the disk's copy")?;
        }
        let [emulator, firmware] = self.arch.programs();
        let chardev = |id: &str, what: String| ["-chardev".to_owned(), format!("{what},id={id}")];
        let mut command = host
            .command([emulator, "-nodefaults", "-no-user-config"])
            .args(["-accel", ACCELERATOR, "-smp", "2", "-m", MEMORY])
            .args(["-display", "none", "-no-reboot", "-bios", firmware])
            .args(chardev(
                "console",
                format!("file,path={}", console.display()),
            ))
            .args(chardev(
                "control",
                format!("socket,server=on,path={}", control.display()),
            ))
            .args(self.arch.machine())
            .arg("-drive")
            .arg(format!(
                "if=none,id=disk,format=raw,file={}",
                disk.display()
            ))
            .args(["-device", "nvme,drive=disk,serial=vol0123456789abcdef0"]);
        if let Some(instance) = &self.instance {
            let board = format!("type=2,manufacturer=Amazon EC2,asset={instance}");
            let system = "type=1,manufacturer=Amazon EC2,product=c7g.medium";
            command = command.args(["-smbios", system, "-smbios", &board]);
        }
        if let Some(tap) = &self.tap {
            command = command
                .arg("-netdev")
                .arg(format!("tap,id=nic,ifname={tap},script=no,downscript=no"))
                .args(["-device", "virtio-net-pci,netdev=nic,romfile="]);
        }
        command = command
            .arg("-smbios")
            .arg(format!("type=11,value={PATIENT}"));
        for (n, credential) in self.credentials().iter().enumerate() {
            let file = file(&format!(".credential{n}"));
            fs::write(&file, credential)?;
            command = command
                .arg("-smbios")
                .arg(format!("type=11,path={}", file.display()));
        }
        let process = host.spawn("qemu", command)?;
        let mut guest = Guest::connect(process, console, &control)?;
        guest
            .answer(0, BOOT)
            .context("the system on the disk did not come up")?;
        Ok(guest)
    }

    /// What systemd is told.
    fn credentials(&self) -> [String; 4] {
        let binary = |name: &str, text: &str| {
            let text = STANDARD.encode(text);
            format!("io.systemd.credential.binary:{name}={text}")
        };
        let mut files = "d /lab 0755\nf /lab/functions 0644\n".to_owned();
        let answer = String::from_utf8_lossy(ANSWER).into_owned();
        let own = ("/run/lab/answer".to_owned(), answer);
        for (path, text) in self.files.iter().chain([&own]) {
            files += &format!("f~ {path} 0600 - - - {}\n", STANDARD.encode(text));
        }
        let mut variables = "[Service]\n".to_owned();
        for (name, value) in &self.variables {
            variables += &format!("Environment={name}={value}\n");
        }
        [
            binary("systemd.unit-dropin.sluice.service~lab", &variables),
            binary("systemd.extra-unit.lab.service", SERVICE),
            binary("systemd.unit-dropin.multi-user.target~lab", WANTED),
            binary("tmpfiles.extra", &files),
        ]
    }
}

//! Guests: other kernels in QEMU, with the lab's programs and a connection over which they are told
//! what to run. They run under TCG, which needs no rights and knows every kernel; a guest is up
//! after some seconds. One with a system of its own ([`System`]) is one with systemd, and a [`Disk`] has all its own.

mod disk;
mod image;
mod system;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::command::Process;
use crate::requirements::{self, Need, REQUIREMENTS};
use crate::topology::Host;
use crate::wait::poll;
pub use disk::{Arch, Disk};
use image::Image;
pub use system::System;

/// One thread for both processors: with one for each, QEMU 7.2 now and then runs a breakpoint that
/// the other processor has just taken out of the kernel's code, and the guest dies ("Oops: int3").
const ACCELERATOR: &str = "tcg,thread=single";
/// Without `cmpxchg16b`: QEMU 7.2's emulation of it crashes Linux 6.12 under network load.
const PROCESSOR: &str = "max,-cx16";
/// In MiB. Half of it is for files.
const MEMORY: &str = "1536";
const BOOT: Duration = Duration::from_secs(90);
const POWER_OFF: Duration = Duration::from_secs(20);
/// What the guest says to a question that did not arrive whole.
const AGAIN: &[u8] = b"\x1eagain\n";
/// The first program of a guest.
const INIT: &[u8] = include_bytes!("init");
/// What answers in it.
const ANSWER: &[u8] = include_bytes!("answer");
/// What the kernel is told. A guest that panics ends.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 oops=panic net.ifnames=0";
/// What brings them.
const MEND: &str = "`cargo xtask kernels` brings it and runs these tests";

/// A kernel to boot, as `cargo xtask kernels` lays it out.
#[derive(Clone, Debug)]
pub struct Kernel {
    folder: PathBuf,
    version: String,
}

impl Kernel {
    /// The kernel of a release of Debian in the folder that `SLUICE_KERNELS` names; else the reason
    /// why it cannot be booted here.
    pub fn find(release: &str) -> Result<Self, String> {
        let folder = kernels()?.join(release);
        if let Some(lack) = requirements::missing_for(&[Need::Kernels]).first() {
            return Err(format!("{} is not installed; {MEND}", lack.program));
        }
        let version = fs::read_to_string(folder.join("version"))
            .map_err(|_| format!("there is no kernel of {release}; {MEND}, if Debian has it"))?;
        Ok(Self { folder, version })
    }

    /// Its version, as `uname -r` has it.
    pub fn version(&self) -> &str {
        &self.version
    }
}

/// The folder of kernels and systems.
fn kernels() -> Result<PathBuf, String> {
    let folder = std::env::var_os("SLUICE_KERNELS").map(PathBuf::from);
    folder.ok_or_else(|| format!("SLUICE_KERNELS names no folder of kernels; {MEND}"))
}

/// What a guest shall have.
#[derive(Clone, Debug)]
#[must_use]
pub struct Machine {
    kernel: Kernel,
    system: Option<System>,
    files: Vec<(PathBuf, String)>,
    programs: Vec<(PathBuf, String)>,
    taps: Vec<String>,
    parameters: Vec<String>,
}

impl Machine {
    /// A machine with two processors, the programs that the tests need, and no network.
    pub fn new(kernel: &Kernel) -> Self {
        Self {
            kernel: kernel.clone(),
            system: None,
            files: Vec::new(),
            programs: Vec::new(),
            taps: Vec::new(),
            parameters: Vec::new(),
        }
    }

    /// Has it run this system instead of the programs that the tests need.
    pub fn system(mut self, system: &System) -> Self {
        self.system = Some(system.clone());
        self
    }

    /// Adds a file to its system, at this path.
    pub fn file(mut self, file: &Path, path: &str) -> Self {
        self.files.push((file.to_owned(), path.to_owned()));
        self
    }

    /// Adds a program, found by `name` in the guest's search path.
    pub fn program(mut self, file: &Path, name: &str) -> Self {
        self.programs.push((file.to_owned(), name.to_owned()));
        self
    }

    /// Adds a NIC: `eth0`, `eth1`, … in the guest, and in the host that boots it the TAP device
    /// `name`.
    pub fn nic(mut self, name: &str) -> Self {
        self.taps.push(name.to_owned());
        self
    }

    /// Boots its kernel with this parameter.
    pub fn parameter(mut self, parameter: &str) -> Self {
        self.parameters.push(parameter.to_owned());
        self
    }

    /// Boots it, as a process of this host.
    pub fn boot(&self, host: &Host) -> anyhow::Result<Guest> {
        let folder = host.folder();
        let file = |end: &str| folder.join(format!("{}-guest{end}", host.name()));
        let (image, control, console) = (file(".cpio"), file(".sock"), file("-console.log"));
        self.write_image(&image, folder)?;
        let command = host
            .command(["qemu-system-x86_64", "-nodefaults", "-no-user-config"])
            .args(["-accel", ACCELERATOR, "-cpu", PROCESSOR])
            .args(["-smp", "2", "-m", MEMORY, "-display", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(self.kernel.folder.join("vmlinuz"))
            .arg("-initrd")
            .arg(&image)
            .arg("-append")
            .arg(format!("{COMMAND_LINE} {}", self.parameters.join(" ")))
            .args(["-serial", &format!("file:{}", console.display())])
            .args(["-serial", &format!("unix:{},server=on", control.display())])
            .args(self.nics());
        let process = host.spawn("qemu", command)?;
        let mut guest = Guest::connect(process, console, &control)?;
        guest.answer(0, BOOT).context("the guest did not come up")?;
        // QEMU has read it.
        fs::remove_file(&image)?;
        Ok(guest)
    }

    fn nics(&self) -> Vec<String> {
        let nic = |(n, tap): (usize, &String)| {
            [
                "-netdev".to_owned(),
                format!("tap,id=nic{n},ifname={tap},script=no,downscript=no"),
                "-device".to_owned(),
                // No boot from the network, and so no package with its ROM.
                format!("virtio-net-pci,netdev=nic{n},romfile=,mac=02:00:00:00:ff:{n:02x}"),
            ]
        };
        self.taps.iter().enumerate().flat_map(nic).collect()
    }

    fn write_image(&self, file: &Path, scratch: &Path) -> anyhow::Result<()> {
        let mut image = Image::create(file)?;
        image.program(&find("busybox")?, Path::new("/bin/busybox"))?;
        if let Some(system) = &self.system {
            self.add_system(system, &mut image, scratch)?;
            return Ok(image.finish()?);
        }
        for folder in ["/proc", "/sys", "/dev", "/run", "/tmp", "/etc"] {
            image.folder(Path::new(folder))?;
        }
        image.file(Path::new("/init"), 0o755, INIT)?;
        image.file(Path::new("/lab/answer"), 0o755, ANSWER)?;
        image.file(
            Path::new("/etc/passwd"),
            0o644,
            b"root:x:0:0::/tmp:/bin/sh\n",
        )?;
        image.tree(&self.kernel.folder.join("lib"), Path::new("/lib"))?;
        image.link(Path::new("/sbin"), "bin")?;
        image.link(Path::new("/var/run"), "../run")?;
        let tests = REQUIREMENTS.iter().filter(|r| r.need == Need::Tests);
        for program in tests.map(|r| r.program) {
            image.program(&find(program)?, &place(program))?;
        }
        for (program, name) in &self.programs {
            let stripped = scratch.join(format!("{name}.stripped"));
            image::strip(program, &stripped)?;
            image.program(&stripped, &place(name))?;
            fs::remove_file(&stripped)?;
        }
        Ok(image.finish()?)
    }
}

fn place(program: &str) -> PathBuf {
    Path::new("/lab/bin").join(program)
}

fn find(program: &str) -> anyhow::Result<PathBuf> {
    requirements::find(program).with_context(|| format!("{program} is not installed"))
}

/// A running guest. It is killed when this is dropped.
#[derive(Debug)]
#[must_use = "the guest is killed when this is dropped"]
pub struct Guest {
    process: Process,
    console: PathBuf,
    stream: UnixStream,
    questions: u64,
    /// The last one.
    question: String,
}

/// What a script in a guest left.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its exit status.
    pub status: i32,
    /// What it has printed, errors too.
    pub text: String,
}

impl Guest {
    /// Takes the second serial line of an emulator that begins, at the socket `control`.
    fn connect(mut process: Process, console: PathBuf, control: &Path) -> anyhow::Result<Self> {
        let mut stream = None;
        process.ready(BOOT, "QEMU to listen", || {
            stream = UnixStream::connect(control).ok();
            stream.is_some()
        })?;
        Ok(Self {
            process,
            console,
            stream: stream.context("no connection to QEMU")?,
            questions: 0,
            question: String::new(),
        })
    }

    /// Runs a shell script in the guest to its end, whatever that is. An error means that the guest
    /// has ended or that it took too long. What it leaves in the background must print elsewhere.
    pub fn output(&mut self, script: &str, timeout: Duration) -> anyhow::Result<Answer> {
        self.ask(script)?;
        let answer = self.answer(self.questions, timeout);
        answer.with_context(|| format!("`{script}` in the guest"))
    }

    /// Runs a shell script in the guest and yields what it printed; an exit status other than 0 is
    /// an error.
    pub fn run(&mut self, script: &str, timeout: Duration) -> anyhow::Result<String> {
        let Answer { status, text } = self.output(script, timeout)?;
        ensure!(
            status == 0,
            "`{script}` in the guest: exit status {status}\n{text}"
        );
        Ok(text)
    }

    /// Runs a shell script again and again until it succeeds, and yields what it printed then.
    pub fn wait_for(&mut self, script: &str, timeout: Duration) -> anyhow::Result<String> {
        poll(
            timeout,
            &format!("`{script}` in the guest"),
            || match self.output(script, timeout) {
                Ok(answer) => (answer.status == 0).then_some(Ok(answer.text)),
                Err(error) => Some(Err(error)),
            },
        )?
    }

    /// Adds a file.
    pub fn write(&mut self, path: &str, text: &str) -> anyhow::Result<()> {
        let script = format!("echo {} | base64 -d >{path}", STANDARD.encode(text));
        self.run(&script, POWER_OFF).map(drop)
    }

    /// Shuts it down.
    pub fn power_off(mut self) -> anyhow::Result<()> {
        self.ask("poweroff -f")?;
        let status = self.process.wait(POWER_OFF)?;
        ensure!(status.success(), "QEMU: {status}");
        Ok(())
    }

    /// What the kernel has said.
    pub fn console(&self) -> String {
        let bytes = fs::read(&self.console).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn ask(&mut self, script: &str) -> anyhow::Result<()> {
        self.questions += 1;
        let script = STANDARD.encode(script);
        self.question = format!("ask {} {} {script}\n", self.questions, script.len());
        self.send()
    }

    fn send(&mut self) -> anyhow::Result<()> {
        let sent = self.stream.write_all(self.question.as_bytes());
        sent.with_context(|| format!("the guest has ended\n{}", self.console()))
    }

    /// Reads up to the mark that ends the answer to a question.
    fn answer(&mut self, question: u64, timeout: Duration) -> anyhow::Result<Answer> {
        let deadline = Instant::now() + timeout;
        let mut bytes = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            if let Some(answer) = parse(&bytes, question)? {
                return Ok(answer);
            }
            if bytes.ends_with(AGAIN) {
                bytes.clear();
                self.send()?;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let said = String::from_utf8_lossy(&bytes);
                bail!(
                    "no end after {timeout:?}; it said: {said}\n{}",
                    self.console()
                );
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    let said = String::from_utf8_lossy(&bytes);
                    bail!("the guest has ended; it said: {said}\n{}", self.console());
                }
                Ok(len) => bytes.extend(&buffer[..len]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The answer to a question, if `bytes` hold the mark of its end.
fn parse(bytes: &[u8], question: u64) -> anyhow::Result<Option<Answer>> {
    let mark = format!("\x1e{question} ");
    let Some(end) = bytes
        .windows(mark.len())
        .rposition(|window| window == mark.as_bytes())
    else {
        return Ok(None);
    };
    let Some(status) = std::str::from_utf8(&bytes[end + mark.len()..])?.strip_suffix('\n') else {
        return Ok(None);
    };
    Ok(Some(Answer {
        status: status
            .parse()
            .with_context(|| format!("exit status {status:?}"))?,
        text: String::from_utf8_lossy(&bytes[..end]).into_owned(),
    }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_ends_at_its_own_mark() {
        for part in ["", "hello\n", "hello\n\x1e6 0\n", "\x1e7 ", "\x1e7 1"] {
            assert!(parse(part.as_bytes(), 7).unwrap().is_none(), "{part:?}");
        }
        let answer = parse(b"\x1e6 0\nno newline\x1e7 3\n", 7).unwrap().unwrap();
        assert_eq!((answer.status, &*answer.text), (3, "\x1e6 0\nno newline"));
    }
}

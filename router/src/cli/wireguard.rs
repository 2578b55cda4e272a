//! `sluice wireguard`: a plain WireGuard device, started and configured as wireguard-go is.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::OpenOptions;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

use crate::engine::Offloads;
use crate::uapi;

/// Names of the program under which it is this subcommand: wg-quick takes one word.
const NAMES: [&str; 2] = ["sluice-wireguard", "wireguard-go"];

/// The variable of the environment that lists offloads not to be used. wg-quick passes on no options.
const WITHOUT: &str = "SLUICE_WITHOUT";

/// Options of `wireguard`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Stay in the foreground. WG_PROCESS_FOREGROUND=1 says the same.
    #[arg(short, long)]
    foreground: bool,
    /// Detached already: tell on standard output when the device is there.
    #[arg(long, hide = true)]
    detached: bool,
    /// Name of the device.
    #[arg(value_name = "NAME")]
    name: String,
}

/// The arguments, with the subcommand put in where the program's name stands for it.
pub(super) fn arguments(given: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = given.into_iter().collect();
    let name = arguments
        .first()
        .and_then(|path| Path::new(path).file_name());
    let own = name.is_some_and(|name| NAMES.iter().any(|own| name == OsStr::new(own)));
    let version = arguments.get(1).is_some_and(|word| word == "--version");
    if own && !version {
        arguments.insert(1, "wireguard".into());
    }
    arguments
}

pub(super) fn wireguard(args: &Args, log: Option<&str>) -> anyhow::Result<()> {
    let foreground = args.foreground || env::var("WG_PROCESS_FOREGROUND").is_ok_and(|v| v == "1");
    if !foreground && !args.detached {
        return detach(&args.name, log);
    }
    let chosen = log.is_some()
        || ["SLUICE_LOG", "RUST_LOG"]
            .iter()
            .any(|v| env::var_os(v).is_some());
    let level = env::var("LOG_LEVEL").ok();
    super::logging::start(if chosen {
        log
    } else {
        Some(directive(level.as_deref()))
    })?;
    let options = uapi::Options {
        name: args.name.clone(),
        tun: passed("WG_TUN_FD")?,
        socket: passed("WG_UAPI_FD")?,
        offloads: offloads(env::var(WITHOUT).unwrap_or_default().as_str())?,
    };
    if args.detached {
        // A session of its own: no terminal's end ends it. It fails only for one that has that.
        // SAFETY: no pointers are passed.
        unsafe { libc::setsid() };
        env::set_current_dir("/").context("change to /")?;
    }
    let speaks = chosen || level.is_some_and(|level| !level.is_empty() && level != "silent");
    let detached = args.detached;
    uapi::run(options, move || {
        if !detached {
            return Ok(());
        }
        io::stdout().write_all(b"\n")?;
        io::stdout().flush()?;
        let null = OpenOptions::new().write(true).open("/dev/null")?;
        become_output(&null, libc::STDOUT_FILENO)?;
        if !speaks {
            become_output(&null, libc::STDERR_FILENO)?;
        }
        Ok(())
    })?;
    Ok(())
}

/// Starts the same program in the background, and returns when its device and its socket are there.
fn detach(name: &str, log: Option<&str>) -> anyhow::Result<()> {
    let (mut ready, writer) = io::pipe().context("make a pipe")?;
    let program = env::current_exe().context("find this program")?;
    let mut command = Command::new(program);
    if let Some(log) = log {
        command.args(["--log", log]);
    }
    command
        .args(["wireguard", "--detached", "--", name])
        .stdin(Stdio::null())
        .stdout(writer);
    let mut child = command.spawn().context("start in the background")?;
    // Its end of the pipe must be the only one.
    drop(command);
    let mut byte = [0];
    if ready.read(&mut byte).context("wait for the device")? == 1 {
        return Ok(());
    }
    let status = child.wait().context("wait for the device")?;
    // It has told why on standard error.
    std::process::exit(status.code().filter(|code| *code != 0).unwrap_or(1));
}

fn become_output(file: &std::fs::File, fd: RawFd) -> io::Result<()> {
    // SAFETY: both are open descriptors; standard output and error have no owner that would mind.
    match unsafe { libc::dup2(file.as_raw_fd(), fd) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// The descriptor that a variable of the environment names, as wireguard-go has it.
fn passed(variable: &str) -> anyhow::Result<Option<OwnedFd>> {
    let Some(text) = env::var_os(variable).filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let number = text.to_str().and_then(|text| text.parse::<RawFd>().ok());
    let Some(fd) = number.filter(|fd| *fd > libc::STDERR_FILENO) else {
        bail!(
            "{variable}={}: write the number of an open file descriptor above 2",
            text.display()
        );
    };
    // SAFETY: no pointers are passed.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        bail!("{variable}={fd}: this process was given no such file descriptor");
    }
    // SAFETY: it is open, and whoever set the variable has given it to us.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// All offloads but those that a list names, e.g. `tun_tso,udp_gso`.
fn offloads(without: &str) -> anyhow::Result<Offloads> {
    let mut offloads = Offloads::ALL;
    for name in without.split([',', ' ']).filter(|name| !name.is_empty()) {
        let Some(offload) = offloads.named(name) else {
            bail!(
                "{WITHOUT}: {name:?} is no offload; name some of {}",
                Offloads::NAMES.join(", ")
            );
        };
        *offload = false;
    }
    Ok(offloads)
}

/// What to log by wireguard-go's words.
fn directive(level: Option<&str>) -> &'static str {
    match level {
        Some("verbose" | "debug") => "debug",
        Some("info") => "info",
        Some("error") => "error",
        Some("silent") => "off",
        _ => "warn",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_that_are_not_to_be_used_are_listed() {
        let mut expected = Offloads::ALL;
        assert_eq!(offloads("").unwrap(), expected);
        (expected.tun_tso, expected.udp_gso) = (false, false);
        assert_eq!(offloads("tun_tso,udp_gso").unwrap(), expected);
        let error = offloads("tso").unwrap_err().to_string();
        assert!(
            error.contains("\"tso\"") && error.contains("tun_tso"),
            "{error}"
        );
    }

    #[test]
    fn a_link_of_the_right_name_is_the_subcommand() {
        let words =
            |line: &str| arguments(line.split(' ').map(OsString::from)).join(OsStr::new(" "));
        for (given, expected) in [
            ("sluice wireguard wg0", "sluice wireguard wg0"),
            (
                "/usr/bin/sluice-wireguard -f wg0",
                "/usr/bin/sluice-wireguard wireguard -f wg0",
            ),
            ("wireguard-go wg0", "wireguard-go wireguard wg0"),
            ("wireguard-go --version", "wireguard-go --version"),
            ("sluice", "sluice"),
        ] {
            assert_eq!(words(given), expected);
        }
    }
}

//! Running other programs: where they are, what the reader sees of them while they work, and what
//! is shown when they fail.

use std::env;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::requirements;

/// How often a long step tells that it is alive when its output goes to a file.
const HEARTBEAT: Duration = Duration::from_secs(20);
/// How often the moving line of a long step is drawn anew on a terminal.
const METER: Duration = Duration::from_millis(500);
/// How many of the last lines of a failed program are shown.
const TAIL: usize = 80;

/// The root of the repository.
pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."))
}

/// Cargo's home, where `cargo install` puts programs under `bin`.
pub(crate) fn cargo_home() -> PathBuf {
    env::var_os("CARGO_HOME").map_or_else(
        || PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".cargo"),
        PathBuf::from,
    )
}

/// Finds a program, also where `cargo install` puts it, for that folder is not on every path.
pub(crate) fn which(program: &str) -> Option<PathBuf> {
    let installed = cargo_home().join("bin").join(program);
    requirements::find(program).or_else(|| installed.is_file().then_some(installed))
}

fn search_path() -> OsString {
    let own = env::var_os("PATH").unwrap_or_default();
    let more = [cargo_home().join("bin"), "/usr/sbin".into(), "/sbin".into()];
    env::join_paths(env::split_paths(&own).chain(more)).unwrap_or(own)
}

/// A command that runs in the repository with the search path of [`which`] and no standard input.
pub(crate) fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command
        .current_dir(repository())
        .env("PATH", search_path())
        .stdin(Stdio::null());
    command
}

/// The cargo that runs this task.
pub(crate) fn cargo() -> Command {
    let mut cargo = command(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // What cargo tells this program about its own package would have build scripts run again.
    let ours = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(ours) {
            cargo.env_remove(name);
        }
    }
    cargo
}

/// The command as one would type it.
pub(crate) fn line(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(command.get_program());
    std::iter::once(name)
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs a program whose own output the reader should see.
pub(crate) fn show(command: &mut Command) -> Result<()> {
    println!("> {}", line(command));
    let status = command
        .status()
        .with_context(|| format!("cannot run `{}`", line(command)))?;
    check(command, status)
}

/// Runs a program whose own output the reader should see, and passes its exit status on.
pub(crate) fn status(command: &mut Command) -> Result<ExitCode> {
    println!("> {}", line(command));
    let status = command
        .status()
        .with_context(|| format!("cannot run `{}`", line(command)))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Runs a program and returns its standard output.
pub(crate) fn read(command: &mut Command) -> Result<String> {
    let output = command
        .stderr(Stdio::piped())
        .output()
        .with_context(|| format!("cannot run `{}`", line(command)))?;
    if !output.status.success() {
        bail!(
            "`{}` failed ({}): {}",
            line(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a long, talkative program. Shows what it is for, the time it takes and the line it is at;
/// its output only if it fails.
pub(crate) fn long(purpose: &str, command: &mut Command) -> Result<()> {
    println!("> {purpose}: {}", line(command));
    let started = Instant::now();
    let (output, input) = io::pipe().context("cannot make a pipe")?;
    let mut child = command
        .stderr(
            input
                .try_clone()
                .context("cannot duplicate a pipe")
                .map(Stdio::from)?,
        )
        .stdout(input)
        .spawn()
        .with_context(|| format!("cannot run `{}`", line(command)))?;
    // The command holds the pipe's write ends too: closed here, or the reader never ends.
    command.stdout(Stdio::null()).stderr(Stdio::null());

    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(|l| l.ok()) {
            if sender
                .send(String::from_utf8_lossy(&line).into_owned())
                .is_err()
            {
                return;
            }
        }
    });
    let mut log: Vec<String> = Vec::new();
    let mut meter = Meter::new(started);
    loop {
        match lines.recv_timeout(METER) {
            Ok(line) => log.push(line),
            // A program that leaves a child behind holding the pipe must not hold us too.
            Err(RecvTimeoutError::Timeout) => {
                if child.try_wait().context("cannot wait for it")?.is_some() {
                    break;
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
        meter.tick(log.last().map(String::as_str).unwrap_or_default());
    }
    meter.clear();
    let status = child.wait().context("cannot wait for a child")?;
    if status.success() {
        println!("  done in {:.0} s", started.elapsed().as_secs_f64());
        return Ok(());
    }
    for line in &log[log.len().saturating_sub(TAIL)..] {
        eprintln!("  | {line}");
    }
    check(command, status)
}

/// Runs a program, and shows those lines of its standard output, as they come, for which `show` says
/// so.
pub(crate) fn tee(command: &mut Command, mut show: impl FnMut(&str) -> bool) -> Result<ExitStatus> {
    println!("> {}", line(command));
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run `{}`", line(command)))?;
    let stdout = child.stdout.take().context("no standard output")?;
    let mut reader = BufReader::new(stdout);
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        if reader
            .read_until(b'\n', &mut bytes)
            .context("cannot read the output")?
            == 0
        {
            break;
        }
        if show(String::from_utf8_lossy(&bytes).trim_end()) {
            io::stdout()
                .write_all(&bytes)
                .context("cannot write the output")?;
        }
    }
    child.wait().context("cannot wait for a child")
}

fn check(command: &Command, status: ExitStatus) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    bail!("`{}` failed ({status})", line(command));
}

/// The moving line of a long step on a terminal, or its heartbeat elsewhere.
struct Meter {
    started: Instant,
    last: Instant,
    terminal: bool,
}

impl Meter {
    fn new(started: Instant) -> Self {
        Self {
            started,
            last: started,
            terminal: io::stdout().is_terminal(),
        }
    }

    fn tick(&mut self, doing: &str) {
        let pause = if self.terminal { METER } else { HEARTBEAT };
        if self.last.elapsed() < pause {
            return;
        }
        self.last = Instant::now();
        // Programs draw over their own lines: only what stands after the last return is seen.
        let doing = doing.trim_end().rsplit('\r').next().unwrap_or_default();
        let doing: String = doing.chars().filter(|c| !c.is_control()).take(60).collect();
        let seconds = self.started.elapsed().as_secs();
        if self.terminal {
            print!("\r\x1b[K  {seconds} s  {}", doing.trim());
            // A meter that cannot be shown is no reason to stop the step.
            let _ = io::stdout().flush();
        } else {
            println!("  {seconds} s  {}", doing.trim());
        }
    }

    fn clear(&self) {
        if self.terminal {
            print!("\r\x1b[K");
            let _ = io::stdout().flush();
        }
    }
}

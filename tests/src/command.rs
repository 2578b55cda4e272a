//! Programs run in a namespace: to their end, or in the background with a log.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};

use crate::requirements;
use crate::wait::poll;

const TIMEOUT: Duration = Duration::from_secs(20);

/// A program to run. It gets a session of its own (so that all it starts can be ended together), an
/// IPC namespace of its own (so that shared memory it forgets dies with it), and it is killed when
/// the thread that started it ends, unless [`Cmd::outlive_us`] says otherwise.
#[derive(Clone, Debug)]
#[must_use]
pub struct Cmd {
    argv: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    stdin: Vec<u8>,
    user: Option<(u32, u32)>,
    folder: Option<PathBuf>,
    netns: Option<Arc<File>>,
    timeout: Duration,
    outlive_us: bool,
}

/// What a finished program left.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Cmd {
    /// A program and its arguments.
    pub fn new(argv: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        Self {
            argv: argv.into_iter().map(|a| a.as_ref().to_owned()).collect(),
            env: Vec::new(),
            stdin: Vec::new(),
            user: None,
            folder: None,
            netns: None,
            timeout: TIMEOUT,
            outlive_us: false,
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.argv.push(argument.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args(self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        arguments.into_iter().fold(self, Self::arg)
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// What the program reads from its standard input; nothing unless set.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Runs it as this user and group instead of root.
    pub fn user(mut self, uid: u32, gid: u32) -> Self {
        self.user = Some((uid, gid));
        self
    }

    /// Runs it in this folder.
    pub fn folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.folder = Some(folder.into());
        self
    }

    /// How long [`Cmd::output`] waits before it kills the program.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Leaves the program running when the process that started it ends.
    pub fn outlive_us(mut self, yes: bool) -> Self {
        self.outlive_us = yes;
        self
    }

    pub(crate) fn netns(mut self, netns: Arc<File>) -> Self {
        self.netns = Some(netns);
        self
    }

    /// Runs it to its end, whatever that is. An error means that it could not run or took too long.
    pub fn output(&self) -> anyhow::Result<Output> {
        let (mut stdout, mut stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
        let mut child = self.start(stdout.try_clone()?, stderr.try_clone()?)?;
        let ended = poll(self.timeout, "its end", || child.try_wait().transpose());
        let status = match ended {
            Ok(status) => status.with_context(|| self.to_string())?,
            Err(late) => {
                child.kill_session();
                let text = format!("{}{}", read_back(&mut stdout)?, read_back(&mut stderr)?);
                bail!("`{self}`: {late}; it said: {text}");
            }
        };
        Ok(Output {
            status,
            stdout: read_back(&mut stdout)?,
            stderr: read_back(&mut stderr)?,
        })
    }

    /// Runs it to its end and yields its standard output; an exit status other than 0 is an error.
    pub fn run(&self) -> anyhow::Result<String> {
        let output = self.output()?;
        if !output.status.success() {
            bail!(
                "`{self}`: {}\n{}{}",
                output.status,
                output.stdout,
                output.stderr
            );
        }
        Ok(output.stdout)
    }

    /// Starts it in the background; all it prints goes to the file `log`.
    pub fn spawn(&self, log: &Path) -> anyhow::Result<Process> {
        let file = File::options().create(true).append(true).open(log)?;
        let child = self.start(file.try_clone()?, file)?;
        Ok(Process {
            what: self.to_string(),
            log: log.to_owned(),
            child,
            keep: self.outlive_us,
        })
    }

    fn start(&self, stdout: File, stderr: File) -> anyhow::Result<Session> {
        let Some((program, arguments)) = self.argv.split_first() else {
            bail!("an empty command");
        };
        let path = match program.to_str() {
            Some(name) if !name.contains('/') => {
                // Said where it is installed too, or only a fresh machine would notice.
                if !requirements::is_known(name) {
                    bail!(
                        "{name} is not in tests/src/requirements.rs, so set-up does not bring it"
                    );
                }
                requirements::find(name)
                    .with_context(|| {
                        format!("{name} is not installed; `cargo xtask setup` brings it")
                    })?
                    .into_os_string()
            }
            _ => program.clone(),
        };
        let mut command = Command::new(path);
        command
            .args(arguments)
            .envs(self.env.iter().map(|(k, v)| (k, v)))
            .stdin(input(&self.stdin)?)
            .stdout(stdout)
            .stderr(stderr);
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        let netns = self.netns.clone();
        let user = self.user;
        let parent = (!self.outlive_us).then(std::process::id);
        let prepare = move || {
            enter_isolation(netns.as_deref().map(AsRawFd::as_raw_fd))?;
            // By hand and last: std would change the user before the namespace.
            if let Some((uid, gid)) = user {
                become_user(uid, gid)?;
            }
            parent.map_or(Ok(()), die_with_parent)
        };
        // SAFETY: the closure runs between fork and exec, where only async-signal-safe calls are
        // allowed: it makes bare system calls and allocates nothing.
        unsafe { command.pre_exec(prepare) };
        let child = command.spawn().with_context(|| self.to_string())?;
        Ok(Session(child))
    }
}

impl std::fmt::Display for Cmd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, word) in self.argv.iter().enumerate() {
            let space = if i == 0 { "" } else { " " };
            write!(f, "{space}{}", word.to_string_lossy())?;
        }
        Ok(())
    }
}

fn input(bytes: &[u8]) -> io::Result<Stdio> {
    if bytes.is_empty() {
        return Ok(Stdio::null());
    }
    let mut file = tempfile::tempfile()?;
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file.into())
}

fn read_back(file: &mut File) -> io::Result<String> {
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn enter_isolation(netns: Option<RawFd>) -> io::Result<()> {
    if let Some(fd) = netns {
        // SAFETY: setns takes a file descriptor, open for as long as the command lives, and a flag.
        check(unsafe { libc::setns(fd, libc::CLONE_NEWNET) })?;
        // SAFETY: unshare takes a flag.
        check(unsafe { libc::unshare(libc::CLONE_NEWIPC) })?;
    }
    // SAFETY: setsid has no arguments. It cannot fail: a fresh child leads no process group.
    unsafe { libc::setsid() };
    Ok(())
}

fn become_user(uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: an empty group list needs no memory; the others take numbers.
    unsafe {
        check(libc::setgroups(0, std::ptr::null()))?;
        check(libc::setgid(gid))?;
        check(libc::setuid(uid))
    }
}

/// After every change of user: such a change clears the setting.
fn die_with_parent(parent: u32) -> io::Result<()> {
    // SAFETY: this prctl takes a signal number; getppid has no arguments.
    unsafe {
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        if libc::getppid().unsigned_abs() != parent {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
    }
    Ok(())
}

/// A child that leads a session.
#[derive(Debug)]
struct Session(Child);

impl Session {
    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.0.try_wait()
    }

    fn signal(&self, signal: libc::c_int) {
        let group = self.0.id().cast_signed();
        // SAFETY: kill takes numbers. The child has not been waited for, so that its id, and that of
        // its group, can belong to nobody else.
        unsafe { libc::kill(-group, signal) };
    }

    fn kill_session(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            self.signal(libc::SIGKILL);
            // An error would mean that it is gone already.
            let _ = self.0.wait();
        }
    }
}

/// A program in the background. It is killed, with all it started, when this value is dropped.
#[derive(Debug)]
#[must_use = "the program is killed when this is dropped"]
pub struct Process {
    what: String,
    log: PathBuf,
    child: Session,
    keep: bool,
}

impl Process {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.0.id()
    }

    /// What it has printed so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Sends it, and all it started, a signal.
    pub fn signal(&mut self, signal: libc::c_int) -> anyhow::Result<()> {
        if let Some(status) = self.ended()? {
            bail!(
                "`{}` has ended already: {status}\n{}",
                self.what,
                self.log()
            );
        }
        self.child.signal(signal);
        Ok(())
    }

    /// Waits for its end.
    pub fn wait(&mut self, timeout: Duration) -> anyhow::Result<ExitStatus> {
        let what = format!("the end of `{}`", self.what);
        let status = poll(timeout, &what, || self.child.try_wait().transpose());
        Ok(status.map_err(|late| anyhow!("{late}\n{}", self.log()))??)
    }

    /// Waits until `condition` holds; an error if the program ends first.
    pub fn ready(
        &mut self,
        timeout: Duration,
        what: &str,
        mut condition: impl FnMut() -> bool,
    ) -> anyhow::Result<()> {
        let met = poll(timeout, what, || {
            if condition() {
                return Some(Ok(()));
            }
            match self.child.try_wait() {
                Ok(None) => None,
                Ok(Some(status)) => {
                    Some(Err(anyhow!("it ended, and we waited for {what}: {status}")))
                }
                Err(error) => Some(Err(error.into())),
            }
        });
        met.and_then(|early| early)
            .map_err(|error| anyhow!("`{}`: {error:#}\n{}", self.what, self.log()))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.keep {
            self.child.kill_session();
        }
    }
}

//! Named network namespaces, as `ip netns` knows them.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::{io, thread};

use anyhow::Context;

use crate::command::Cmd;
use crate::wait::wait_until;

const FOLDER: &str = "/run/netns";

/// An open namespace. Dropping it does not remove the name.
#[derive(Clone, Debug)]
pub(crate) struct Netns {
    pub(crate) name: String,
    pub(crate) file: Arc<File>,
}

impl Netns {
    pub(crate) fn create(name: String) -> anyhow::Result<Self> {
        Cmd::new(["ip", "netns", "add", &name]).run()?;
        let file = Arc::new(File::open(path(&name)).with_context(|| name.clone())?);
        Ok(Self { name, file })
    }

    /// Runs `work` on a thread of its own inside the namespace. Sockets made there belong to the
    /// namespace for good and can be used from anywhere.
    pub(crate) fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let fd = self.file.as_raw_fd();
        thread::scope(|scope| {
            let inside = scope.spawn(move || {
                // SAFETY: setns takes an open file descriptor and a flag. It moves this thread
                // alone, and the thread ends with `work`.
                match unsafe { libc::setns(fd, libc::CLONE_NEWNET) } {
                    0 => Ok(work()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
            inside
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// The file that stands for a namespace.
fn path(name: &str) -> PathBuf {
    PathBuf::from(FOLDER).join(name)
}

/// The names of all namespaces.
pub(crate) fn list() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(FOLDER) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// Kills every process inside these namespaces and removes their names.
pub(crate) fn remove(names: &[String]) -> anyhow::Result<()> {
    let inodes: Vec<(u64, u64)> = names
        .iter()
        .filter_map(|name| identity(path(name)))
        .collect();
    let mut survivors = Vec::new();
    let emptied = wait_until(
        Duration::from_secs(10),
        "processes in a namespace to end",
        || {
            survivors = processes_in(&inodes);
            for &pid in &survivors {
                // SAFETY: kill takes numbers. The process was inside one of our namespaces a moment ago.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
            survivors.is_empty()
        },
    );
    for name in names {
        let deleted = Cmd::new(["ip", "netns", "delete", name]).output()?;
        if !deleted.status.success() && path(name).exists() {
            anyhow::bail!("ip netns delete {name}: {}", deleted.stderr);
        }
    }
    emptied.with_context(|| format!("{names:?}: process ids {survivors:?}"))
}

fn identity(path: PathBuf) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

fn processes_in(inodes: &[(u64, u64)]) -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| pid.unsigned_abs() != std::process::id())
        // A zombie has no namespace any more, so that it does not count.
        .filter(|pid| {
            identity(PathBuf::from(format!("/proc/{pid}/ns/net")))
                .is_some_and(|id| inodes.contains(&id))
        })
        .collect()
}

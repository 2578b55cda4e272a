//! One daemon for one network namespace: the lock, and the files that go with a device.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Where the daemon keeps what must survive `kill -9` but not a reboot.
pub(super) const RUN_DIR: &str = "/run/sluice";

/// The network namespace is taken, or the lock could not be made.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another daemon routes here.
    #[error(
        "another sluice (process {pid}) routes in this network namespace, and device {device} would share its routing table; stop that one, or add peers and routes to its file"
    )]
    Taken {
        /// Name of this daemon's device.
        device: String,
        /// Process ID of the other daemon, as it wrote it down.
        pid: String,
    },
    /// The lock file could not be made.
    #[error("{path}: {source}; the daemon needs to write there")]
    Io {
        /// Path of the lock file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// The lock on this network namespace, held until dropped or the process ends: routing table and rules
/// are one daemon's.
#[derive(Debug)]
pub(super) struct RouterLock {
    file: File,
    path: PathBuf,
    /// Of the files that go with the device.
    stem: PathBuf,
}

impl RouterLock {
    pub(super) fn take(device: &str) -> Result<Self, LockError> {
        Self::take_in(Path::new(RUN_DIR), device)
    }

    fn take_in(dir: &Path, device: &str) -> Result<Self, LockError> {
        let io = |path: &Path, source| LockError::Io {
            path: path.to_owned(),
            source,
        };
        fs::create_dir_all(dir).map_err(|source| io(dir, source))?;
        // /run is often shared between network namespaces.
        let netns = Path::new("/proc/thread-self/ns/net");
        let inode = fs::metadata(netns)
            .map_err(|source| io(netns, source))?
            .ino();
        let stem = dir.join(format!("{device}.{inode}"));
        let path = dir.join(format!("{inode}.lock"));
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|source| io(&path, source))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                let _ = file.read_to_string(&mut pid);
                let pid = if pid.is_empty() {
                    "unknown"
                } else {
                    pid.trim()
                };
                return Err(LockError::Taken {
                    device: device.to_owned(),
                    pid: pid.to_owned(),
                });
            }
            Err(TryLockError::Error(source)) => return Err(io(&path, source)),
        }
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            write!(file, "{}", std::process::id())
        };
        write(&mut file).map_err(|source| io(&path, source))?;
        Ok(Self { file, path, stem })
    }

    /// Where the original values of changed sysctls are kept.
    pub(super) fn journal(&self) -> PathBuf {
        self.stem.with_added_extension("sysctl")
    }

    /// Where the next daemon finds out where peers were.
    pub(super) fn whereabouts(&self) -> PathBuf {
        self.stem.with_added_extension("peers")
    }

    /// Where the next daemon finds out that somebody has drained the router.
    pub(super) fn drained(&self) -> PathBuf {
        self.stem.with_added_extension("drained")
    }

    /// Where the next daemon finds out which networks the VPC had.
    pub(super) fn networks(&self) -> PathBuf {
        self.stem.with_added_extension("networks")
    }
}

impl Drop for RouterLock {
    fn drop(&mut self) {
        // The file is removed while locked: a daemon that opened it meanwhile locks a file without
        // a name, and one that starts later makes its own. Only a stop and a start at the same
        // instant could both go on, and then the device's name is taken.
        let _ = fs::remove_file(&self.path);
        let _ = self.file.unlock();
        if let Some(dir) = self.path.parent() {
            // Succeeds only for the last one.
            let _ = fs::remove_dir(dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_taken_once_and_free_again() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let first = RouterLock::take_in(&run, "sluice0").unwrap();
        for device in ["sluice0", "sluice1"] {
            let error = RouterLock::take_in(&run, device).unwrap_err().to_string();
            let id = format!("process {}", std::process::id());
            assert!(error.contains(&id) && error.contains(device), "{error}");
        }
        drop(first);
        assert!(!run.exists());
        RouterLock::take_in(&run, "sluice1").unwrap();
    }
}

//! One daemon for one device: the lock and the files that go with it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Where the daemon keeps what must survive `kill -9` but not a reboot.
pub(super) const RUN_DIR: &str = "/run/sluice";

/// The device is taken, or the lock could not be made.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another daemon serves the device.
    #[error(
        "device {device} is served by another sluice (process {pid}); stop that one, or set another `wireguard.device`"
    )]
    Taken {
        /// Name of the device.
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

/// The lock on a device name in this network namespace, held until dropped or the process ends.
#[derive(Debug)]
pub(super) struct DeviceLock {
    file: File,
    stem: PathBuf,
}

impl DeviceLock {
    pub(super) fn take(device: &str) -> Result<Self, LockError> {
        Self::take_in(Path::new(RUN_DIR), device)
    }

    fn take_in(dir: &Path, device: &str) -> Result<Self, LockError> {
        let io = |path: &Path, source| LockError::Io {
            path: path.to_owned(),
            source,
        };
        fs::create_dir_all(dir).map_err(|source| io(dir, source))?;
        // Device names are unique only within a network namespace, and /run is often shared.
        let netns = Path::new("/proc/thread-self/ns/net");
        let inode = fs::metadata(netns)
            .map_err(|source| io(netns, source))?
            .ino();
        let stem = dir.join(format!("{device}.{inode}"));
        let path = stem.with_added_extension("lock");
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
        Ok(Self { file, stem })
    }

    /// Where the original values of changed sysctls are kept.
    pub(super) fn journal(&self) -> PathBuf {
        self.stem.with_added_extension("sysctl")
    }

    /// Where the next daemon finds out where peers were.
    pub(super) fn whereabouts(&self) -> PathBuf {
        self.stem.with_added_extension("peers")
    }
}

impl Drop for DeviceLock {
    fn drop(&mut self) {
        // The file is removed while locked: a daemon that opened it meanwhile locks a file without
        // a name, and one that starts later makes its own. Only a stop and a start at the same
        // instant could both go on, and then the device's name is taken.
        let _ = fs::remove_file(self.stem.with_added_extension("lock"));
        let _ = self.file.unlock();
        if let Some(dir) = self.stem.parent() {
            // Succeeds only for the last one.
            let _ = fs::remove_dir(dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_taken_once_and_free_again() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let first = DeviceLock::take_in(&run, "sluice0").unwrap();
        let error = DeviceLock::take_in(&run, "sluice0")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(&format!("process {}", std::process::id())),
            "{error}"
        );
        let other = DeviceLock::take_in(&run, "sluice1").unwrap();
        drop(other);
        drop(first);
        assert!(!run.exists());
        DeviceLock::take_in(&run, "sluice0").unwrap();
    }
}

//! A drain by hand outlives the daemon: whoever has taken a router out of service wants it out after a restart and a
//! crash, too. `sluice undrain`, a stop and a reboot end it.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::files::{Existing, write_atomic};

/// Writes down that somebody has drained the router, and how long flows still have.
pub(super) fn keep(path: &Path, left: Duration) {
    let until = (SystemTime::now() + left).duration_since(UNIX_EPOCH);
    let text = until.unwrap_or_default().as_secs().to_string();
    if let Err(error) = write_atomic(path, text.as_bytes(), 0o600, Existing::Replace) {
        tracing::warn!(
            %error, path = %path.display(),
            "a restart of the daemon will end this drain, for it cannot be written down"
        );
    }
}

/// How long flows still have if somebody has drained the router; `None`: nobody has. What cannot be read is no time.
pub(super) fn read(path: &Path) -> Option<Duration> {
    let text = fs::read_to_string(path).ok()?;
    let until = text.trim().parse().unwrap_or_default();
    let until = UNIX_EPOCH.checked_add(Duration::from_secs(until));
    let left = until.and_then(|until| until.duration_since(SystemTime::now()).ok());
    Some(left.unwrap_or_default())
}

/// Nobody has drained the router any more.
pub(super) fn forget(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => tracing::warn!(
            %error, path = %path.display(),
            "the next daemon will begin drained, for that somebody has drained this one is not forgotten"
        ),
        _ => {}
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_is_kept_with_the_time_that_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("drained");
        assert_eq!(read(&path), None);
        let hour = Duration::from_secs(3600);
        keep(&path, hour);
        let left = read(&path).unwrap();
        assert!(left <= hour && left > hour / 2, "{left:?}");
        keep(&path, Duration::ZERO);
        assert_eq!(read(&path), Some(Duration::ZERO));
        fs::write(&path, "nonsense").unwrap();
        assert_eq!(read(&path), Some(Duration::ZERO));
        forget(&path);
        assert_eq!(read(&path), None);
        forget(&path);
    }
}

//! Writes files whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

/// What to do with a file that is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Existing {
    /// Fail with [`io::ErrorKind::AlreadyExists`].
    Keep,
    /// Replace it; its owner stays.
    Replace,
}

/// Writes a file with `mode` so that at every moment, a crash included, `path` is the old file or
/// the whole new one.
pub(crate) fn write_atomic(
    path: &Path,
    contents: &[u8],
    mode: u32,
    existing: Existing,
) -> io::Result<()> {
    let temporary = temporary_beside(path);
    let result = write_temporary(&temporary, contents, mode).and_then(|()| match existing {
        Existing::Replace => {
            if let Ok(old) = fs::metadata(path) {
                chown(&temporary, Some(old.uid()), Some(old.gid()))?;
            }
            fs::rename(&temporary, path)
        }
        // A link, unlike a rename, fails if the name is taken.
        Existing::Keep => fs::hard_link(&temporary, path),
    });
    if result.is_err() || existing == Existing::Keep {
        // Gone already, or never made: nothing to tell.
        let _ = fs::remove_file(&temporary);
    }
    result?;
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

fn temporary_beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

fn write_temporary(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    // One that a crash left; in a container process ids repeat.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?;
    // The umask may have taken bits away.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(contents)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_kept_or_replaced_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        write_atomic(&path, b"one", 0o600, Existing::Keep).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let error = write_atomic(&path, b"two", 0o600, Existing::Keep).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"one");
        write_atomic(&path, b"two", 0o644, Existing::Replace).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(
            fs::read_dir(directory.path()).unwrap().count(),
            1,
            "no temporary file stays"
        );
    }
}

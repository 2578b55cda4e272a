//! Reads files that hold one secret key.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::str::FromStr;

use zeroize::Zeroizing;

use crate::wireguard::keys::KeyError;

/// No key file is longer; whatever is, is another file.
const LONGEST: u64 = 4096;

/// Reads the key in `path`. The error is a sentence that names the mend; `make` is the command
/// that makes such a key.
pub(super) fn read<K: FromStr<Err = KeyError>>(path: &Path, make: &str) -> Result<K, String> {
    let credentials = std::env::var_os("CREDENTIALS_DIRECTORY");
    let shown = path.display();
    let word = shell_word(path);
    let text = match contents(path, credentials.as_deref().map(Path::new)) {
        Ok(text) => text,
        Err(Fault::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
            return Err(format!(
                "{shown} does not exist; make it with: (umask 077 && {make} > {word})"
            ));
        }
        Err(Fault::Io(error)) => return Err(format!("{shown} cannot be read: {error}")),
        Err(Fault::NoFile) => {
            return Err(format!(
                "{shown} is no regular file; name the file that holds the key"
            ));
        }
        Err(Fault::Mode(mode)) => {
            return Err(format!(
                "{shown} has mode {mode:03o}, so others on this machine can get at the key; run: \
                 chmod 600 {word}"
            ));
        }
    };
    text.parse().map_err(|error| match text.trim() {
        "" => format!("{shown} is empty; fill it with: {make} > {word}"),
        _ => format!("{shown} holds no key: {error}"),
    })
}

/// What keeps a file that holds a secret, and may be gone by now, from being used; a sentence with the mend.
pub(super) fn fault(path: &Path) -> Option<String> {
    let credentials = std::env::var_os("CREDENTIALS_DIRECTORY");
    let shown = path.display();
    match contents(path, credentials.as_deref().map(Path::new)) {
        Ok(_) => None,
        Err(Fault::Io(error)) if error.kind() == io::ErrorKind::NotFound => None,
        Err(Fault::Io(error)) => Some(format!("{shown} cannot be read: {error}")),
        Err(Fault::NoFile) => Some(format!(
            "{shown} is no regular file; name the file that holds the key"
        )),
        Err(Fault::Mode(mode)) => Some(format!(
            "{shown} has mode {mode:03o}, so others on this machine can get at the key; run: chmod 600 {}",
            shell_word(path)
        )),
    }
}

/// A path as a command for the shell needs it.
fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-+@:,".contains(c);
    if text.chars().all(plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

enum Fault {
    Io(io::Error),
    NoFile,
    Mode(u32),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn contents(path: &Path, credentials: Option<&Path>) -> Result<Zeroizing<String>, Fault> {
    // Before opening: to open a device or a pipe can have effects, or wait for ever.
    if !fs::metadata(path)?.is_file() {
        return Err(Fault::NoFile);
    }
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    check_mode(path, &file, credentials)?;
    let mut text = Zeroizing::new(String::with_capacity(LONGEST as usize));
    match file.take(LONGEST).read_to_string(&mut text) {
        // Not UTF-8, hence no base64: an empty text would be told as empty.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            *text = "?".to_owned();
            Ok(text)
        }
        Err(error) => Err(error.into()),
        Ok(_) => Ok(text),
    }
}

fn check_mode(path: &Path, file: &File, credentials: Option<&Path>) -> Result<(), Fault> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(Fault::NoFile);
    }
    // In systemd's credentials directory the group bits are the mask of an access list that names
    // only the service's own user.
    let credential = credentials.is_some_and(|directory| path.starts_with(directory));
    let forbidden = if credential { 0o037 } else { 0o077 };
    let mode = metadata.mode() & 0o777;
    if mode & forbidden != 0 {
        return Err(Fault::Mode(mode));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::directory_with_keys;

    #[test]
    fn a_credential_of_systemd_may_be_readable_by_its_mask() {
        let directory = directory_with_keys();
        let fault = |name, credentials| contents(&directory.path().join(name), credentials).err();
        assert!(matches!(fault("group.key", None), Some(Fault::Mode(0o640))));
        assert!(fault("group.key", Some(directory.path())).is_none());
        assert!(matches!(
            fault("world.key", Some(directory.path())),
            Some(Fault::Mode(0o604))
        ));
    }

    #[test]
    fn commands_take_any_path() {
        assert_eq!(
            shell_word(Path::new("/etc/sluice/private.key")),
            "/etc/sluice/private.key"
        );
        assert_eq!(shell_word(Path::new("/a b/it's")), r"'/a b/it'\''s'");
    }

    #[test]
    fn what_is_no_regular_file_is_not_opened() {
        assert!(matches!(
            contents(Path::new("/dev/zero"), None),
            Err(Fault::NoFile)
        ));
        assert!(matches!(contents(Path::new("/"), None), Err(Fault::NoFile)));
    }
}

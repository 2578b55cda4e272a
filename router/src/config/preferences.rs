//! What `sluice up`, `set`, `login`, `logout` and `down` have said, kept in the state directory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::changes::Changes;
use super::{Config, ConfigErrors, flags};
use crate::files::{Existing, write_atomic};

const FILE: &str = "preferences.json";
/// Raised when the file means something else than before.
const VERSION: u32 = 1;

/// The preferences.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Preferences {
    version: u32,
    /// Whether the router is to take part in the tailnet.
    pub running: bool,
    /// The settings, as far as somebody has said some.
    pub settings: Changes,
}

/// Preferences that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum PreferencesError {
    /// The file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: io::Error,
    },
    /// It is none of ours.
    #[error("{path} is damaged: {reason}; remove it, and say what it said with `sluice up` again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl Preferences {
    /// These.
    pub fn new(running: bool, settings: Changes) -> Self {
        Self {
            version: VERSION,
            running,
            settings,
        }
    }

    /// Whether there are any in a state directory.
    pub fn exist(state_dir: &Path) -> bool {
        state_dir.join(FILE).exists()
    }

    /// Those of a state directory; the defaults where nobody has said anything yet.
    pub fn load(state_dir: &Path) -> Result<Self, PreferencesError> {
        let path = state_dir.join(FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => return Err(PreferencesError::Io { path, source }),
        };
        let damaged = |reason| PreferencesError::Damaged {
            path: path.clone(),
            reason,
        };
        let found: Self =
            serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        match found.version {
            VERSION => Ok(found),
            other => Err(damaged(format!("it is of version {other}"))),
        }
    }

    /// Keeps them; the directory is made if it is not there.
    pub fn save(&self, state_dir: &Path) -> Result<(), PreferencesError> {
        let path = state_dir.join(FILE);
        let kept = Self {
            version: VERSION,
            ..self.clone()
        };
        let written = fs::create_dir_all(state_dir)
            .and_then(|()| serde_json::to_vec_pretty(&kept).map_err(io::Error::from))
            .and_then(|text| write_atomic(&path, &text, 0o600, Existing::Replace));
        written.map_err(|source| PreferencesError::Io { path, source })
    }

    /// The configuration of a router with these preferences. Problems are told by the names of flags.
    pub fn config(&self, state_dir: &Path) -> Result<Config, ConfigErrors> {
        self.settings.config(state_dir, "sluice", |key| {
            flags::of_key(key).unwrap_or(key).to_owned()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn what_was_said_is_kept_and_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let state_dir = folder.path().join("state");
        assert_eq!(
            Preferences::load(&state_dir).unwrap(),
            Preferences::default()
        );
        assert!(!Preferences::exist(&state_dir));
        let said = Preferences {
            running: true,
            settings: Changes {
                hostname: Some("gw".to_owned()),
                advertise_routes: Some(vec!["10.0.0.0/16".to_owned()]),
                snat: Some(false),
                ..Changes::default()
            },
            ..Preferences::default()
        };
        said.save(&state_dir).unwrap();
        let mode = fs::metadata(state_dir.join(FILE)).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);
        let again = Preferences::load(&state_dir).unwrap();
        assert!(again.running && again.settings == said.settings);
        let config = again.config(&state_dir).unwrap();
        assert!(!config.snapshot.routes[0].snat);
        assert_eq!(config.tailnet.unwrap().hostname.as_deref(), Some("gw"));
        for broken in ["", "{}", "{\"version\":2}", "nonsense"] {
            fs::write(state_dir.join(FILE), broken).unwrap();
            let error = Preferences::load(&state_dir).unwrap_err().to_string();
            assert!(error.contains("damaged"), "{error}");
        }
    }

    #[test]
    fn what_is_wrong_is_told_by_its_flag() {
        let wrong = Preferences {
            settings: Changes {
                hostname: Some("a\u{7f}b".to_owned()),
                advertise_routes: Some(vec!["10.0.0.1/16".to_owned()]),
                advertise_tags: Some(vec!["tag:\"".to_owned()]),
                control_url: Some("ftp://x".to_owned()),
                ..Changes::default()
            },
            ..Preferences::default()
        };
        let told = wrong.config(Path::new("/x")).unwrap_err().to_string();
        for flag in [
            "--hostname",
            "--advertise-routes",
            "--advertise-tags",
            "--login-server",
        ] {
            assert!(told.contains(&format!("sluice: {flag}: ")), "{told}");
        }
        let empty = Changes {
            hostname: Some(String::new()),
            ..Changes::default()
        };
        let said = empty.over(wrong.settings);
        assert_eq!(said.hostname.as_deref(), Some(""));
        assert!(said.control_url.is_some());
    }
}

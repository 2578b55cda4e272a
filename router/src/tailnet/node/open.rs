//! The state directory when the node begins.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;

use super::Settings;
use super::wanted;
use crate::control::Update;
use crate::tailnet::netmap::Netmap;
use crate::tailnet::state::{self, Identity, Loaded, Store};
use crate::tailnet::time::Timestamp;
use crate::wireguard::keys::PrivateKey;

/// The state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It cannot be made.
    #[error(
        "{}: the state directory cannot be made: {error}; name another one in tailnet.state_dir, \
         SLUICE_STATE_DIR or TS_STATE_DIR, or mount a volume there",
        path.display()
    )]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// What is in it cannot be read, or nothing can be written.
    #[error(transparent)]
    State(#[from] state::Error),
    /// The system gives no random bytes.
    #[error("no keys can be made: {0}")]
    Random(getrandom::Error),
}

/// Who the node is and what it knew last.
#[derive(Debug)]
pub struct Opened {
    pub(super) store: Store,
    pub(super) identity: Identity,
    pub(super) map: Netmap,
    /// Takes no part yet.
    pub(super) idle: bool,
}

impl Opened {
    /// Whether the state was looked at as that of this instance of a cloud.
    pub fn is_of(&self, instance: &str) -> bool {
        self.store.is_of(instance)
    }

    /// The node's WireGuard key.
    pub fn private_key(&self) -> &PrivateKey {
        self.identity.node.wireguard()
    }

    /// The same, but it takes no part in the tailnet until [`Command::Up`](super::Command::Up) or
    /// [`Command::LogIn`](super::Command::LogIn).
    pub fn idle(mut self) -> Self {
        self.idle = true;
        self
    }

    /// What is wanted before the server has answered: the last map's.
    pub fn update(&self, settings: &Settings) -> Update {
        if self.idle {
            return wanted::nothing(&self.identity.node, settings);
        }
        wanted::whole(&self.identity.node, &self.map, settings, Timestamp::now())
    }
}

/// Opens the state directory, and makes a new node's keys where it has none for this server and this machine, which
/// may be a cloud's `instance`.
pub fn open(settings: &Settings, instance: Option<&str>) -> Result<Opened, OpenError> {
    let folder = &settings.state_dir;
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|error| OpenError::Directory {
        path: folder.clone(),
        error,
    })?;
    let store = Store::new(folder, instance);
    let (identity, is_new) = identity(&store, settings)?;
    if is_new {
        // Now rather than later: a directory that cannot be written to makes a new node of each start.
        store.save(&identity)?;
    }
    let map = match identity.registered {
        true => store.load_map(&identity.control_url).unwrap_or_default(),
        false => Netmap::default(),
    };
    Ok(Opened {
        store,
        identity,
        map,
        idle: false,
    })
}

fn identity(store: &Store, settings: &Settings) -> Result<(Identity, bool), OpenError> {
    let url = &settings.control_url;
    let generate = || Identity::generate(url).map_err(OpenError::Random);
    match store.load()? {
        Loaded::Nothing => Ok((generate()?, true)),
        Loaded::Known(known) if known.control_url == *url => Ok((*known, false)),
        // Nobody has let it in, so nothing is lost.
        Loaded::Known(known) if !known.registered => Ok((generate()?, true)),
        Loaded::Known(known) => {
            tracing::warn!(
                "the state directory holds a node of {}, and the settings say {url}: a new node joins there, and the \
                 former state is kept as {}",
                known.control_url,
                state::FORMER
            );
            store.set_aside()?;
            Ok((generate()?, true))
        }
        Loaded::Cloned(_) => {
            tracing::warn!(
                "the state directory comes from another machine (another machine-id, or another instance of the cloud): this machine joins as a new node, \
                 for two with one key take the tailnet's packets from each other; the former state is kept as {}",
                state::FORMER
            );
            store.set_aside()?;
            Ok((generate()?, true))
        }
    }
}

//! What outlives a restart: who the node is, and the last map.
//!
//! Two files in the state directory, mode 0600, each replaced whole: `node.json` with the keys, `map.json` with the
//! map, which changes often and is worth nothing without the keys.

use std::borrow::Cow;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use blake2::digest::Mac as _;
use blake2::digest::consts::U16;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::files::{Existing, write_atomic};
use crate::tailnet::keys::{DiscoSecret, MachinePublic, MachineSecret, NodeSecret};
use crate::tailnet::netmap::Netmap;

const NODE: &str = "node.json";
const MAP: &str = "map.json";
/// What [`Store::set_aside`] makes of the keys.
pub const FORMER: &str = "node.json.former";
/// Raised when a file means something else than before.
const VERSION: u32 = 1;

/// Who the node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The machine's key.
    pub machine: MachineSecret,
    /// The node's key.
    pub node: NodeSecret,
    /// The disco key.
    pub disco: DiscoSecret,
    /// The server that this is about.
    pub control_url: String,
    /// The server's key as it was last.
    pub server_key: Option<MachinePublic>,
    /// The server has let the node key in.
    pub registered: bool,
}

impl Identity {
    /// A new one, which nobody knows.
    pub fn generate(control_url: &str) -> Result<Self, getrandom::Error> {
        Ok(Self {
            machine: MachineSecret::generate()?,
            node: NodeSecret::generate()?,
            disco: DiscoSecret::generate()?,
            control_url: control_url.to_owned(),
            server_key: None,
            registered: false,
        })
    }
}

/// What the state directory holds.
#[derive(Debug)]
pub enum Loaded {
    /// Nothing yet.
    Nothing,
    /// This machine's identity.
    Known(Box<Identity>),
    /// The identity of another machine, of which this one is a copy: both with one key take the tailnet's packets from
    /// each other.
    Cloned(Box<Identity>),
}

/// State that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read or written.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: io::Error,
    },
    /// The file is there, but is none of ours.
    #[error(
        "{path} is damaged: {reason}; without it this machine is a new node, so restore it, or remove it and join again"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong; nothing of the contents.
        reason: String,
    },
}

#[derive(Serialize, Deserialize)]
struct NodeFile<'a> {
    version: u32,
    #[serde(borrow)]
    control_url: Cow<'a, str>,
    server_key: Option<MachinePublic>,
    registered: bool,
    /// Of the machine where this was written, not the id itself.
    machine_id: Option<Cow<'a, str>>,
    /// The same of the cloud's instance id.
    #[serde(default)]
    instance_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    machine_key: Cow<'a, str>,
    #[serde(borrow)]
    node_key: Cow<'a, str>,
    #[serde(borrow)]
    disco_key: Cow<'a, str>,
}

#[derive(Serialize, Deserialize)]
struct MapFile<T> {
    version: u32,
    control_url: String,
    map: T,
}

/// The state directory.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    machine_id: Option<String>,
    instance_id: Option<String>,
}

impl Store {
    /// The state in `folder`, which exists, of a cloud's `instance` or another machine.
    pub fn new(folder: &Path, instance: Option<&str>) -> Self {
        // Containers have none, or an empty one.
        let id = fs::read_to_string("/etc/machine-id").unwrap_or_default();
        Self::of_machine(folder, id.trim(), instance)
    }

    fn of_machine(folder: &Path, id: &str, instance: Option<&str>) -> Self {
        Self {
            folder: folder.to_owned(),
            machine_id: (!id.is_empty()).then(|| digest(id)),
            instance_id: instance.map(digest),
        }
    }

    /// Whether the state is looked at as that of this instance.
    pub fn is_of(&self, instance: &str) -> bool {
        self.instance_id.as_deref() == Some(digest(instance).as_str())
    }

    /// Who the node is.
    pub fn load(&self) -> Result<Loaded, Error> {
        let path = self.folder.join(NODE);
        let text = match fs::read(&path) {
            Ok(text) => Zeroizing::new(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Loaded::Nothing),
            Err(error) => return Err(Error::Io { path, error }),
        };
        let damaged = |reason: String| Error::Damaged {
            path: path.clone(),
            reason,
        };
        // Where, not what: serde's words may quote a value.
        let file: NodeFile<'_> = serde_json::from_slice(&text).map_err(|error| {
            damaged(format!("line {}, column {}", error.line(), error.column()))
        })?;
        if file.version != VERSION {
            return Err(damaged(format!("it is of version {}", file.version)));
        }
        let key = |error: crate::tailnet::keys::KeyError| damaged(error.to_string());
        let identity = Box::new(Identity {
            machine: file.machine_key.parse().map_err(key)?,
            node: file.node_key.parse().map_err(key)?,
            disco: file.disco_key.parse().map_err(key)?,
            control_url: file.control_url.into_owned(),
            server_key: file.server_key,
            registered: file.registered,
        });
        let differ = |there: &Option<Cow<'_, str>>, here: &Option<String>| {
            let both = there.as_deref().zip(here.as_deref());
            both.is_some_and(|(there, here)| there != here)
        };
        // An image of a disk may keep the machine's id, and a state directory on a volume may move.
        if differ(&file.machine_id, &self.machine_id)
            || differ(&file.instance_id, &self.instance_id)
        {
            return Ok(Loaded::Cloned(identity));
        }
        if file.instance_id.is_none() && self.instance_id.is_some() {
            // Or a copy of this would not be known as one.
            self.save(&identity)?;
        }
        Ok(Loaded::Known(identity))
    }

    /// Keeps who the node is.
    pub fn save(&self, identity: &Identity) -> Result<(), Error> {
        let machine = identity.machine.expose_text();
        let node = identity.node.expose_text();
        let disco = identity.disco.expose_text();
        self.write(
            NODE,
            &NodeFile {
                version: VERSION,
                control_url: identity.control_url.as_str().into(),
                server_key: identity.server_key,
                registered: identity.registered,
                machine_id: self.machine_id.as_deref().map(Cow::from),
                instance_id: self.instance_id.as_deref().map(Cow::from),
                machine_key: machine.as_str().into(),
                node_key: node.as_str().into(),
                disco_key: disco.as_str().into(),
            },
        )
    }

    /// Keeps the keys of another node or machine beside, for whoever wants them back, and forgets its map.
    pub fn set_aside(&self) -> Result<(), Error> {
        let path = self.folder.join(NODE);
        if let Err(error) = fs::rename(&path, self.folder.join(FORMER)) {
            return Err(Error::Io { path, error });
        }
        self.forget_map();
        Ok(())
    }

    /// Forgets the map.
    pub fn forget_map(&self) {
        // Without keys, or with others, it is not read.
        let _ = fs::remove_file(self.folder.join(MAP));
    }

    /// The last map of a server. One that cannot be read is no loss: the server sends it again.
    pub fn load_map(&self, control_url: &str) -> Option<Netmap> {
        let text = fs::read(self.folder.join(MAP)).ok()?;
        let file: MapFile<Netmap> = match serde_json::from_slice(&text) {
            Ok(file) => file,
            Err(error) => {
                tracing::info!("the kept map of the tailnet is not understood: {error}");
                return None;
            }
        };
        (file.version == VERSION && file.control_url == control_url).then_some(file.map)
    }

    /// Keeps the map. It is written whole, so not at each change: a map of 10,000 nodes is 10 MB.
    pub fn save_map(&self, control_url: &str, map: &Netmap) -> Result<(), Error> {
        self.write(
            MAP,
            &MapFile {
                version: VERSION,
                control_url: control_url.to_owned(),
                map,
            },
        )
    }

    fn write(&self, name: &str, file: &impl Serialize) -> Result<(), Error> {
        let path = self.folder.join(name);
        let written = serde_json::to_vec(file)
            .map(Zeroizing::new)
            .map_err(io::Error::from)
            .and_then(|text| write_atomic(&path, &text, 0o600, Existing::Replace));
        written.map_err(|error| Error::Io { path, error })
    }
}

/// The machine's id is not to leave it (machine-id(5)): only whether two are the same.
fn digest(id: &str) -> String {
    let keyed = blake2::Blake2sMac::<U16>::new_from_slice(b"sluice tailnet state");
    let Ok(mut keyed) = keyed else {
        return String::new();
    };
    keyed.update(id.as_bytes());
    let digest = keyed.finalize().into_bytes();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::tailnet::time::Timestamp;

    #[test]
    fn an_identity_comes_back_and_only_to_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::of_machine(folder.path(), "a", None);
        assert!(matches!(store.load().unwrap(), Loaded::Nothing));
        let mut identity = Identity::generate("https://hs.example.org").unwrap();
        identity.registered = true;
        identity.server_key = Some(MachineSecret::generate().unwrap().public());
        store.save(&identity).unwrap();
        let Loaded::Known(again) = store.load().unwrap() else {
            panic!("not known");
        };
        assert_eq!(*again, identity);
        let mode = fs::metadata(folder.path().join(NODE))
            .unwrap()
            .permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);
        let shown = format!("{identity:?}");
        assert!(!shown.contains(&identity.node.expose_text()["privkey:".len()..]));
    }

    #[test]
    fn a_copy_of_another_machine_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let here = Store::of_machine(folder.path(), "a", None);
        here.save(&Identity::generate("http://a").unwrap()).unwrap();
        let text = fs::read_to_string(folder.path().join(NODE)).unwrap();
        assert!(!text.contains("\"a\""), "the id itself: {text}");
        let copy = Store::of_machine(folder.path(), "b", None);
        assert!(matches!(copy.load().unwrap(), Loaded::Cloned(_)));
        let unknown = Store::of_machine(folder.path(), "", None);
        assert!(matches!(unknown.load().unwrap(), Loaded::Known(_)));
    }

    #[test]
    fn a_copy_of_another_instance_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let store = |instance| Store::of_machine(folder.path(), "a", instance);
        let identity = Identity::generate("http://a").unwrap();
        store(None).save(&identity).unwrap();
        assert!(store(Some("i-1")).is_of("i-1") && !store(None).is_of("i-1"));
        // The first instance that is seen owns the state from then on.
        for (instance, is_known) in [
            (Some("i-1"), true),
            (Some("i-2"), false),
            (None, true),
            (Some("i-1"), true),
        ] {
            let loaded = store(instance).load().unwrap();
            let known = matches!(loaded, Loaded::Known(_));
            assert_eq!(known, is_known, "{instance:?}");
        }
    }

    #[test]
    fn damage_is_told_without_the_contents() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::of_machine(folder.path(), "a", None);
        let identity = Identity::generate("http://a").unwrap();
        store.save(&identity).unwrap();
        let path = folder.path().join(NODE);
        let text = fs::read_to_string(&path).unwrap();
        let secret = identity.node.expose_text();
        let digits = &secret["privkey:".len()..];
        for broken in [
            text[..text.len() / 2].to_owned(),
            text.replace("privkey:", "privkeys"),
            text.replace("\"version\":1", "\"version\":2"),
            String::new(),
        ] {
            fs::write(&path, &broken).unwrap();
            let error = store.load().unwrap_err().to_string();
            assert!(error.contains("damaged"), "{error}");
            assert!(!error.contains(digits), "{error}");
        }
    }

    #[test]
    fn the_last_map_comes_back_for_its_server() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::of_machine(folder.path(), "a", None);
        assert!(store.load_map("http://a").is_none());
        let mut map = Netmap::default();
        let name = "router-2-05-MapResponse";
        let recorded = crate::tailnet::wire::tests::conversation();
        let (_, body) = recorded.iter().find(|(found, _)| found == name).unwrap();
        let response = serde_json::from_value(body.clone()).unwrap();
        map.apply(response, true, Timestamp(0)).unwrap();
        assert!(map.peers().count() > 0);
        store.save_map("http://a", &map).unwrap();
        assert_eq!(store.load_map("http://a"), Some(map));
        assert!(store.load_map("http://b").is_none());
        fs::write(folder.path().join(MAP), "{}").unwrap();
        assert!(store.load_map("http://a").is_none());
    }
}

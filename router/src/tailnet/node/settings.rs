//! What an operator says of the node.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fmt, fs};

use zeroize::Zeroizing;

use crate::cloud::agent::Secrets;
use crate::control::Route;
use crate::tailnet::auth::is_client_secret;
use crate::tailnet::client::TlsRoots;

/// Tailscale's own server.
pub const DEFAULT_CONTROL_URL: &str = "https://controlplane.tailscale.com";
/// Where the state is kept if nobody says otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/sluice";

/// What the file, the environment or the command line say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The coordination server.
    pub control_url: String,
    /// Lets the node in without a person.
    pub auth_key: Option<KeySource>,
    /// The client ID of a workload's identity: with it, `auth_key` is that workload's ID token.
    pub client_id: Option<String>,
    /// The name to ask for; `None`: the host's.
    pub hostname: Option<String>,
    /// Tags to ask for, each with `tag:`.
    pub advertise_tags: Vec<String>,
    /// Routes to offer and to serve.
    pub advertise_routes: Vec<Route>,
    /// Whether others' subnet routes are taken.
    pub accept_routes: bool,
    /// The server has the node removed when it is gone.
    pub ephemeral: bool,
    /// Underlay addresses at which peers reach the node whatever it finds out itself.
    pub static_endpoints: Vec<SocketAddr>,
    /// Whether the gateway is asked for a port that leads here.
    pub port_mapping: bool,
    /// UDP port on which the node carries datagrams between others; `None`: it does not.
    pub relay_server_port: Option<NonZeroU16>,
    /// Addresses at which that port is reached whatever the node finds out itself.
    pub relay_server_static_endpoints: Vec<SocketAddr>,
    /// Whether names of the tailnet are to be resolved here, which Sluice does not do.
    pub accept_dns: bool,
    /// The state directory.
    pub state_dir: PathBuf,
    /// Certificates in PEM that are believed beside the public ones.
    pub ca: Option<PathBuf>,
}

/// Where the state is kept: `SLUICE_STATE_DIR`, `TS_STATE_DIR`, or [`DEFAULT_STATE_DIR`].
pub fn default_state_dir() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let named = set("SLUICE_STATE_DIR").or_else(|| set("TS_STATE_DIR"));
    named.map_or_else(|| PathBuf::from(DEFAULT_STATE_DIR), PathBuf::from)
}

/// TLS toward the server. The error is a sentence that names the file.
pub fn tls(ca: Option<&Path>) -> Result<Arc<rustls::ClientConfig>, String> {
    let config = roots(ca)?.client_config();
    config.map_err(|error| error.to_string())
}

/// Whom TLS toward the server and its relays believes. The error is a sentence that names the file.
pub fn roots(ca: Option<&Path>) -> Result<TlsRoots, String> {
    let pem = ca.map(|path| {
        fs::read(path).map_err(|error| format!("{} cannot be read: {error}", path.display()))
    });
    let pem = pem.transpose()?;
    TlsRoots::new(pem.as_deref()).map_err(|error| match ca {
        Some(path) => format!(
            "{}: {error}; name a file with the CA's certificate in PEM, which begins with \
             \"-----BEGIN CERTIFICATE-----\"",
            path.display()
        ),
        None => error.to_string(),
    })
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            control_url: DEFAULT_CONTROL_URL.to_owned(),
            auth_key: None,
            client_id: None,
            hostname: None,
            advertise_tags: Vec::new(),
            advertise_routes: Vec::new(),
            accept_routes: false,
            ephemeral: false,
            static_endpoints: Vec::new(),
            port_mapping: true,
            relay_server_port: None,
            relay_server_static_endpoints: Vec::new(),
            accept_dns: false,
            state_dir: PathBuf::from(DEFAULT_STATE_DIR),
            ca: None,
        }
    }
}

/// Where an auth key comes from.
#[derive(Clone, PartialEq, Eq)]
pub enum KeySource {
    /// It is this text.
    Text(Zeroizing<String>),
    /// It stands in this file, which is read each time one is needed.
    File(PathBuf),
    /// It is this parameter of AWS's parameter store, which is asked each time one is needed.
    Parameter(String),
}

impl KeySource {
    /// Reads `TEXT`, `file:PATH` or `ssm:NAME`; a relative path starts at `directory`.
    pub fn parse(text: &str, directory: &Path) -> Self {
        let text = text.trim();
        if let Some(path) = text.strip_prefix("file:") {
            return Self::File(directory.join(path));
        }
        match text.strip_prefix("ssm:") {
            Some(name) => Self::Parameter(name.to_owned()),
            None => Self::Text(Zeroizing::new(text.to_owned())),
        }
    }

    /// Whether what comes of it may be another key each time.
    pub fn may_give_another(&self) -> bool {
        match self {
            Self::Text(text) => is_client_secret(text),
            Self::File(_) | Self::Parameter(_) => true,
        }
    }

    /// The text now, wherever it is. The error is a sentence that names the mend.
    pub async fn fetch(&self, secrets: Option<&Secrets>) -> Result<Zeroizing<String>, String> {
        match (self, secrets) {
            (Self::Parameter(name), Some(secrets)) => secrets.parameter(name).await,
            _ => self.read(),
        }
    }

    fn read(&self) -> Result<Zeroizing<String>, String> {
        match self {
            Self::Text(text) => Ok(text.clone()),
            Self::Parameter(name) => Err(format!(
                "ssm:{name} is to be asked of AWS's parameter store, and AWS is not asked on this machine: set \
                 cloud.provider = \"aws\", or give the key otherwise"
            )),
            Self::File(path) => {
                let text = fs::read_to_string(path).map(Zeroizing::new).map_err(|error| {
                    format!(
                        "the auth key in {} cannot be read: {error}; put the key there, or take \
                         auth_key away and let a person log the node in",
                        path.display()
                    )
                })?;
                Ok(Zeroizing::new(text.trim().to_owned()))
            }
        }
    }
}

impl fmt::Debug for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(_) => f.write_str("Text(..)"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Parameter(name) => f.debug_tuple("Parameter").field(name).finish(),
        }
    }
}

//! Why the daemon ends.

use std::io;
use std::sync::Arc;

use super::LockError;
use crate::{api, config, datapath, engine, netlink};

/// Why the daemon could not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is refused; every problem on a line of its own.
    #[error("{0}")]
    Config(#[from] config::ConfigErrors),
    /// What commands have said before cannot be read.
    #[error(transparent)]
    Preferences(#[from] config::PreferencesError),
    /// The configuration does not fit this machine; every problem on a line of its own.
    #[error("{0}")]
    System(String),
    /// The rights are missing.
    #[error("CAP_NET_ADMIN is missing; run the daemon as root or grant it that capability")]
    Rights,
    /// The network namespace is taken.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// netlink failed at start.
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
    /// The engine could not start.
    #[error(transparent)]
    Engine(#[from] engine::Error),
    /// The engine stopped by itself.
    #[error("{0}")]
    EngineFailed(Arc<engine::Failure>),
    /// The datapath that the configuration insists on does not work here.
    #[error("{0}; set `datapath.mode = \"auto\"` to run on the kernel datapath")]
    Datapath(datapath::Error),
    /// No source says who the router is.
    #[error("no private key: the file has neither private_key_file nor [tailnet]")]
    NoKey,
    /// The tailnet's state cannot be used.
    #[error(transparent)]
    Tailnet(#[from] crate::tailnet::node::OpenError),
    /// The API could not start.
    #[error(transparent)]
    Api(#[from] api::Error),
    /// The process could not set itself up.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
}

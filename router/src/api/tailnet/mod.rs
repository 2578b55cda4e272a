//! The tailnet as the status document has it: Sluice's own part, and the fields of `tailscale status --json` that
//! scripts read.

mod fields;
mod page;
mod routes;

use std::collections::HashMap;
use std::sync::Arc;

use serde::ser::{Serialize, Serializer};

pub(super) use page::page;
pub use routes::AdvertisedRoute;

use crate::engine::PeerStats;
use crate::tailnet::node::Report;
use crate::tailnet::paths::PathsReport;
use crate::wireguard::keys::PublicKey;

/// How the router stands in its tailnet.
#[derive(Clone, Debug)]
pub struct Tailnet {
    /// What is known of the node.
    pub report: Arc<Report>,
    /// What is known of the ways to its peers.
    pub ways: Arc<PathsReport>,
    /// What the engine knows of its peers.
    pub stats: HashMap<PublicKey, PeerStats>,
    /// Who says the settings: `file`, `environment` or `commands`.
    pub settings_from: &'static str,
}

impl Tailnet {
    /// Each advertised route, and how it stands.
    pub fn routes(&self) -> Vec<AdvertisedRoute> {
        routes::of(&self.report)
    }

    /// What the server and the node itself find wrong, in words.
    pub fn health(&self) -> Vec<String> {
        let own = self.report.problems.iter();
        let own = own.map(|problem| problem.text.clone());
        own.chain(self.report.map.health()).collect()
    }

    /// Code of the home relay's region.
    pub fn home(&self) -> Option<String> {
        let home = self.ways.home?;
        Some(self.ways.region_code(home))
    }
}

impl Serialize for Tailnet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        fields::document(self).serialize(serializer)
    }
}

#[cfg(test)]
pub(super) mod tests;

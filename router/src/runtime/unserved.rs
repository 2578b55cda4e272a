//! Interfaces that the kernel would send routed packets out of, and that the router does not serve.

use super::Daemon;
use crate::core::Plan;

impl Daemon {
    /// Notes them, for the status, and says once of each what mends it.
    pub(super) fn tell_unserved(&mut self, plan: &Plan) {
        let unserved = self.facts.unserved(plan);
        let unserved: Vec<String> = unserved
            .map(|(cidr, name)| {
                format!(
                    "packets for {cidr} may leave by {name}, which `datapath.subnet` does not name: \
                     no flow that way is carried; add it there, or write \"auto\""
                )
            })
            .collect();
        for text in unserved.iter().filter(|text| !self.unserved.contains(text)) {
            tracing::warn!("{text}");
        }
        self.unserved = unserved;
    }
}

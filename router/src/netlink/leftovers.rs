//! What a killed run left behind.

use std::path::Path;

use super::nft::{Nft, TABLE_PREFIX};
use super::sysctl::Sysctls;
use super::{Netlink, RuleSpec};

impl Netlink {
    /// Removes what earlier runs for `device` left: rules, nf_tables tables and changed sysctls;
    /// also tables of devices that are no more. Each is described in a few words. What belongs to a
    /// living process stays.
    ///
    /// To be called before the device is made and before [`Sysctls::open`], while the caller holds
    /// whatever keeps a second instance from the device.
    pub async fn remove_leftovers(
        &self,
        device: &str,
        rules: &RuleSpec,
        journal: &Path,
    ) -> Vec<String> {
        let mut removed = Vec::new();
        match self.remove_rules(rules).await {
            Ok(0) => {}
            Ok(count) => removed.push(format!("{count} routing rules")),
            Err(error) => tracing::warn!("{error}"),
        }
        let links = match self.links().await {
            Ok(links) => links,
            Err(error) => {
                tracing::warn!("{error}");
                return removed;
            }
        };
        let left = |table: &&String| {
            table
                .strip_prefix(TABLE_PREFIX)
                .is_some_and(|of| of == device || links.iter().all(|info| info.link.name != of))
        };
        let tables = Nft::open().and_then(|mut nft| Ok((nft.tables()?, nft)));
        match tables {
            Ok((tables, mut nft)) => {
                for table in tables.iter().filter(left) {
                    match nft.remove(table) {
                        Ok(true) => removed.push(format!("nf_tables table {table}")),
                        Ok(false) => {}
                        Err(error) => tracing::warn!("{error}"),
                    }
                }
            }
            Err(error) => tracing::warn!("{error}"),
        }
        match Sysctls::open(journal).restore() {
            Ok(0) => {}
            Ok(count) => removed.push(format!("{count} changed sysctls")),
            Err(error) => tracing::warn!("{error}"),
        }
        removed
    }
}

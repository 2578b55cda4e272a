//! Changes of the ruleset's sets, element by element.

use std::collections::BTreeSet;

use super::peers;
use super::policy::Sources;
use super::tables::Tables;
use super::tree::source_set;
use crate::netlink::nft::Transaction;

/// What changes, by family.
#[derive(Debug, Default)]
pub(super) struct Changes {
    pub(super) families: [FamilyChanges; 2],
}

/// What changes in one family.
#[derive(Debug, Default)]
pub(super) struct FamilyChanges {
    pub(super) peers: peers::Changes,
    /// Lists of sources that have a set: their places, and what was in them.
    pub(super) sources: Vec<(usize, Sources)>,
    /// Whether some list has fewer sources.
    pub(super) taken: bool,
    /// Whether some list is another.
    pub(super) other: bool,
}

impl Changes {
    pub(super) fn is_empty(&self) -> bool {
        let is_empty = |changes: &FamilyChanges| changes.peers.is_empty() && !changes.other;
        self.families.iter().all(is_empty)
    }

    /// Whether flows may have to end.
    pub(super) fn take_away(&self) -> bool {
        let take_away = |changes: &FamilyChanges| changes.taken || changes.peers.take_away();
        self.families.iter().any(take_away)
    }

    /// Whether other ranges are peers' now.
    pub(super) fn ranges(&self) -> bool {
        self.families.iter().any(|changes| changes.peers.ranges())
    }

    /// Single addresses that are peers' now, by family.
    pub(super) fn come(&self) -> [BTreeSet<u128>; 2] {
        let [v4, v6] = &self.families;
        [v4, v6].map(|changes| changes.peers.come().collect())
    }

    /// Writes what makes the sets those of `tables`.
    pub(super) fn write(&self, tx: &mut Transaction<'_>, tables: &Tables) {
        for (tables, changes) in tables.families().into_iter().zip(&self.families) {
            let family = tables.family;
            tables.peers.write_changes(tx, &changes.peers);
            for (place, old) in &changes.sources {
                let Some(new) = tables.policy.sources.get(*place) else {
                    continue;
                };
                let set = source_set(family, *place, false);
                tx.remove_hosts(&set, family, old.hosts.difference(&new.hosts).copied());
                tx.add_hosts(&set, family, new.hosts.difference(&old.hosts).copied());
            }
        }
    }
}

//! What has changed since it was put in force, so that only that is to be put in force.

use std::collections::BTreeMap;

/// The revisions of something large, and what of it each has touched.
#[derive(Debug)]
pub(super) struct Revisions<K> {
    now: u64,
    /// Since this one all that changed is noted; before, anything may have.
    complete_since: u64,
    /// What was touched, and by which revision last.
    touched: BTreeMap<K, u64>,
}

impl<K> Default for Revisions<K> {
    fn default() -> Self {
        Self {
            now: 0,
            complete_since: 0,
            touched: BTreeMap::new(),
        }
    }
}

impl<K: Clone + Ord> Revisions<K> {
    /// The revision that is wanted.
    pub(super) fn now(&self) -> u64 {
        self.now
    }

    /// These have changed, and nothing else.
    pub(super) fn touch(&mut self, keys: impl IntoIterator<Item = K>) {
        let next = self.now + 1;
        for key in keys {
            self.touched.insert(key, next);
            self.now = next;
        }
    }

    /// Anything may have changed.
    pub(super) fn renew(&mut self) {
        self.now += 1;
        self.complete_since = self.now;
        self.touched.clear();
    }

    /// What has changed since a revision; `None`: that is not known.
    pub(super) fn since(&self, revision: u64) -> Option<Vec<K>> {
        let later = self.touched.iter().filter(|(_, by)| **by > revision);
        (revision >= self.complete_since).then(|| later.map(|(key, _)| key.clone()).collect())
    }

    /// A revision is in force: nobody asks for what was before.
    pub(super) fn in_force(&mut self, revision: u64) {
        self.touched.retain(|_, by| *by > revision);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_touched_since_is_told_and_only_where_it_is_known() {
        let mut revisions = Revisions::default();
        assert_eq!(revisions.since(0), Some(vec![]));
        revisions.touch([]);
        assert_eq!(revisions.now(), 0);
        revisions.touch(['a', 'b']);
        let first = revisions.now();
        revisions.touch(['b', 'c']);
        assert_eq!(revisions.since(0), Some(vec!['a', 'b', 'c']));
        assert_eq!(revisions.since(first), Some(vec!['b', 'c']));
        revisions.in_force(first);
        assert_eq!(revisions.since(first), Some(vec!['b', 'c']));
        let second = revisions.now();
        revisions.renew();
        revisions.touch(['d']);
        assert_eq!(revisions.since(second), None);
        assert_eq!(revisions.since(second + 1), Some(vec!['d']));
    }
}

//! Tables of ours that others remove, and news of theirs.
//!
//! The ruleset belongs to our socket, where the kernel knows owners (5.12). The kept table belongs to
//! nobody, and many firewalls begin their rules by `flush ruleset`.

use std::future::pending;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::{Kernel, lock};
use crate::netlink::Error;
use crate::netlink::nft::{Seen, Watch};

/// When the kernel did not say what tables there are, it is asked again.
const AGAIN: Duration = Duration::from_secs(1);

/// What is known of removed tables.
#[derive(Debug, Default)]
pub(super) struct Loss {
    watch: Option<Watch>,
    /// Nothing can be watched.
    blind: bool,
    /// A table may have gone since the last look.
    suspected: bool,
    /// Others have removed something before.
    told: bool,
}

impl Kernel {
    /// Waits until others have removed tables of ours, and says so the first time; then it is true,
    /// and the next [`apply`](crate::datapath::Datapath::apply) puts them back. Or until they have
    /// changed theirs, which [`Kernel::due`] takes in. Cancel safe. It takes a tokio runtime, and the
    /// network namespace of the first `apply`.
    pub async fn disturbed(&mut self) -> bool {
        loop {
            if std::mem::take(&mut self.loss.suspected) {
                match self.look_for_missing() {
                    Ok(true) => return true,
                    Ok(false) => {}
                    Err(error) => {
                        tracing::debug!(%error, "what nf_tables holds is asked again");
                        self.loss.suspected = true;
                        sleep(AGAIN).await;
                        continue;
                    }
                }
            }
            let anything = Seen {
                removed: true,
                others: true,
            };
            let seen = match &mut self.loss.watch {
                Some(watch) => watch.seen().await,
                None if self.loss.blind => pending().await,
                None => Watch::open().map(|watch| {
                    self.loss.watch = Some(watch);
                    anything
                }),
            };
            let seen = seen.unwrap_or_else(|error| {
                self.loss.watch = None;
                self.loss.blind = true;
                tracing::warn!(
                    "{error}; what others remove of our nf_tables tables is missing until the next \
                     change of the configuration, and what their rules do to us is not told in advance"
                );
                anything
            });
            self.loss.suspected |= seen.removed;
            if seen.others {
                self.firewalls.changed(Instant::now());
                return false;
            }
        }
    }

    /// Whether tables have to be put back.
    fn look_for_missing(&mut self) -> Result<bool, Error> {
        let missing = self.missing()?;
        if missing.is_empty() {
            return Ok(false);
        }
        let tables = missing.join(", ");
        if std::mem::replace(&mut self.loss.told, true) {
            tracing::debug!(tables, "others have removed nf_tables tables again");
        } else {
            tracing::warn!(
                tables,
                "others have removed nf_tables tables of this router, as `nft flush ruleset` does: \
                 they are put back, now and in silence whenever it happens again; have that \
                 firewall remove its own tables only"
            );
        }
        Ok(true)
    }

    /// The tables that were made and are not there.
    fn missing(&self) -> Result<Vec<String>, Error> {
        let (Some(nft), Some(_)) = (&self.nft, &self.installed) else {
            return Ok(Vec::new());
        };
        let there = lock(nft).tables()?;
        let kept = self.kept_stands.then_some(&self.kept);
        let made = [Some(&self.table), kept].into_iter().flatten();
        Ok(made
            .filter(|table| !there.contains(table))
            .cloned()
            .collect())
    }
}

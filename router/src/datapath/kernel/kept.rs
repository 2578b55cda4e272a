//! What outlives the daemon, however it ends: a table of its own, which nobody owns.
//!
//! The ruleset goes with the daemon. With the last chain that translates and the last rule that asks
//! connection tracking the kernel would stop looking at packets of the flows that it knows: a server's
//! would be for the router itself, and refused (RST, "port unreachable"). One chain and one rule are
//! enough to have it go on, and they let nothing through: the TUN device is gone, and behind its routes
//! lie others that drop in silence.

use super::ruleset::known;
use crate::netlink::Error;
use crate::netlink::nft::{Hook, Nft, Verdict};

/// The name of the table that stays beside `table`.
pub(super) fn name(table: &str) -> String {
    format!("{table}_kept")
}

/// Makes the table, unless it is there.
pub(super) fn write(nft: &mut Nft, table: &str) -> Result<(), Error> {
    if nft.tables()?.iter().any(|name| name == table) {
        return Ok(());
    }
    nft.replace(table, false, |tx| {
        tx.base_chain("translated", Hook::SourceNat);
        tx.rule("translated", |r| {
            known(r).verdict(Verdict::Accept);
        });
    })
}

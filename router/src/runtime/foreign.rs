//! What is said of others who change what is ours.

use std::time::Instant;

use super::Daemon;
use crate::api::Problem;
use crate::core::{Foreign, PATIENCE};

/// Tells of what has just been put back, in one line.
pub(super) fn tell(device: &str, foreign: &[Foreign]) {
    let what: Vec<&str> = foreign.iter().map(|one| one.what.as_str()).collect();
    let what = what.join("; ");
    match foreign.iter().map(|one| one.times).min() {
        None => {}
        Some(times) if times <= PATIENCE => tracing::warn!(
            "somebody else has changed {device} or the way to it ({what}): it is put back; {}",
            mend(device)
        ),
        Some(times) if times == PATIENCE + 1 => tracing::warn!(
            "somebody else changes {device} or the way to it again and again ({what}): from now on it \
             is put back after a while only; {}",
            mend(device)
        ),
        Some(_) => tracing::debug!(device, what, "put back once more"),
    }
}

fn mend(device: &str) -> String {
    format!(
        "have network managers leave it alone (NetworkManager: \
         unmanaged-devices=interface-name:{device}; systemd-networkd: Unmanaged=yes for it, and \
         ManageForeignRoutingPolicyRules=no)"
    )
}

impl Daemon {
    /// What others change again and again, for `status`.
    pub(super) fn contested(&self) -> impl Iterator<Item = Problem> {
        let device = &self.machine.tun.name;
        self.core.contested(Instant::now()).map(move |(part, foreign)| Problem {
            part: part.label().to_owned(),
            error: format!(
                "somebody else has changed {device} or the way to it {} times in a row, at last: {}. \
                 It is put back after a while only, and until then packets are lost; {}",
                foreign.times,
                foreign.what,
                mend(device)
            ),
        })
    }
}

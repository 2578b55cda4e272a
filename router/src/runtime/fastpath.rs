//! What the runtime does for the eBPF datapath besides applying plans.

use super::{Daemon, Error};
use crate::config::DatapathMode;
use crate::datapath::ebpf::{AtLimit, Ebpf, Opener, Options, Pins};
use crate::datapath::limits::Limits;

impl Daemon {
    /// The kernel's routing may lead elsewhere: the programs must not rely on what they know of it.
    pub(super) fn renew_next_hops(&mut self) {
        if let Some(ebpf) = &mut self.ebpf
            && let Err(error) = ebpf.bump_generation()
        {
            tracing::warn!(%error, "the fast path does not know of a change of the network");
        }
    }

    /// Keeps the kernel's knowledge of the next hops fresh that flows go to.
    pub(super) async fn look_after_neighbours(&self) {
        let report = self.ebpf.as_ref().and_then(Ebpf::flow_report);
        let used = report.map(|report| report.next_hops).unwrap_or_default();
        if let Err(error) = self.netlink.probe_neighbours(&used).await {
            tracing::warn!(%error, "the next hops of flows were not looked after");
        }
    }

    /// Tells, once, who has as many flows as it may.
    pub(super) fn tell_at_limit(&mut self) {
        let report = self.ebpf.as_ref().and_then(Ebpf::flow_report);
        let at_limit = report.map(|report| report.at_limit).unwrap_or_default();
        for one in at_limit.iter().filter(|one| !self.at_limit.contains(one)) {
            tracing::warn!("{}", self.at_limit_text(one));
        }
        self.at_limit = at_limit;
    }

    /// One sentence about one that has as many flows as it may.
    pub(super) fn at_limit_text(&self, at_limit: &AtLimit) -> String {
        let who = match at_limit.opener {
            Opener::Peer(number) => {
                let peer = self.numbers.find(number, &self.snapshot.peers);
                let name = peer.map(|peer| {
                    let name = peer.name.as_ref().map(|name| format!("{name:?}"));
                    name.unwrap_or_else(|| peer.public_key.to_string())
                });
                format!("peer {}", name.unwrap_or_else(|| number.to_string()))
            }
            Opener::Host(address) => format!("host {address} of the subnet side"),
            Opener::Subnet => "the subnet side".to_owned(),
        };
        let family = if at_limit.ipv4 { "IPv4" } else { "IPv6" };
        let (limit, mend) = (
            at_limit.limit,
            match at_limit.opener {
                Opener::Subnet => "a larger datapath.flows",
                _ => "a larger datapath.flows_per_source",
            },
        );
        format!(
            "{who} has opened {limit} {family} flows, as many as it may: packets of further ones are \
             dropped. See `sluice flows` for what they are; a scan or a flood is to be stopped there, \
             what is well takes {mend}"
        )
    }
}

/// Loads the programs for the TUN device `device`, unless the configuration wants none or, where it
/// leaves the choice, the kernel or the rights do not allow it. Tells why in words.
pub(super) fn choose_datapath(
    mode: DatapathMode,
    limits: Limits,
    device: &str,
) -> Result<(Option<Ebpf>, String), Error> {
    let (ebpf, reason) = if mode == DatapathMode::Kernel {
        (None, "the configuration asks for it".to_owned())
    } else {
        let options = Options {
            limits,
            pins: Pins::open(device).map_err(|error| error.to_string()),
            ..Options::default()
        };
        match Ebpf::load_with(options) {
            Ok(ebpf) => (
                Some(ebpf),
                "the kernel and the rights allow eBPF".to_owned(),
            ),
            Err(error) if mode == DatapathMode::Auto => {
                tracing::warn!(%error, "no eBPF here");
                (None, format!("no eBPF here: {error}"))
            }
            Err(error) => return Err(Error::Datapath(error)),
        }
    };
    match &ebpf {
        Some(ebpf) => {
            if let Some(reason) = ebpf.unkept() {
                tracing::info!(reason, "flows end with the daemon");
            }
        }
        None => discard_pins(device),
    }
    Ok((ebpf, reason))
}

/// Takes away what an earlier run with programs has left: its flows are nobody's any more.
pub(super) fn discard_pins(device: &str) {
    if let Err(error) = Pins::discard(device) {
        tracing::warn!(%error, "programs of an earlier run are left");
    }
}

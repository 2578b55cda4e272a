//! What the runtime does for the eBPF datapath besides applying plans.

use super::{Daemon, Error};
use crate::config::{DatapathMode, Local};
use crate::container;
use crate::datapath::ebpf::{AtLimit, Ebpf, Opener, Options, Pins};

impl Daemon {
    /// What is wrong with the ports that flows are translated to.
    pub(super) fn ports_problem(&self) -> Option<String> {
        let spec = &self.core.wanted()?.datapath;
        let (ports, apart) = spec.fast_nat_ports();
        let translates = spec.routes.iter().any(|route| route.snat);
        let local = spec.local_ports.as_ref().filter(|_| translates && !apart)?;
        Some(format!(
            "net.ipv4.ip_local_port_range is {} to {}, which leaves no ports to the flows that the fast \
             path translates: a connection of the router itself to a server that peers use too may get a \
             port of theirs, from {} to {}, and hang. Set it to 32768 60999",
            local.start(),
            local.end(),
            ports.start(),
            ports.end(),
        ))
    }

    /// Tells, once, who has as many flows as it may.
    pub(super) fn tell_at_limit(&mut self) {
        let report = self.machine.ebpf.as_ref().and_then(Ebpf::flow_report);
        let at_limit = report.map(|report| report.at_limit).unwrap_or_default();
        for one in at_limit
            .iter()
            .filter(|one| !self.told.at_limit.contains(one))
        {
            tracing::warn!("{}", self.at_limit_text(one));
        }
        self.told.at_limit = at_limit;
    }

    /// One sentence about one that has as many flows as it may.
    pub(super) fn at_limit_text(&self, at_limit: &AtLimit) -> String {
        let who = match at_limit.opener {
            Opener::Peer(number) => {
                let peer = self.sources.state().peers.numbered(number);
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

/// Loads the programs for the TUN device, unless the configuration wants none or, where it
/// leaves the choice, the kernel or the rights do not allow it. Tells why in words.
pub(super) fn choose_datapath(local: &Local) -> Result<(Option<Ebpf>, String), Error> {
    let (mode, device) = (local.datapath, local.device.as_str());
    let (ebpf, reason) = if mode == DatapathMode::Kernel {
        (None, "the configuration asks for it".to_owned())
    } else {
        let options = Options {
            limits: local.limits,
            marks: local.marks,
            pins: Pins::open(device).map_err(|error| error.to_string()),
            ..Options::default()
        };
        match Ebpf::load_with(options) {
            Ok(ebpf) => (
                Some(ebpf),
                "the kernel and the rights allow eBPF".to_owned(),
            ),
            // As expected: nothing to act on.
            Err(error) if mode == DatapathMode::Auto && container::is_unprivileged() => {
                tracing::debug!(%error, "no eBPF here");
                (None, container::WITHOUT_EBPF.to_owned())
            }
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

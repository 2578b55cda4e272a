//! The tailnet's packet filter, made into our policy.
//!
//! After `wgengine/filter/tailcfg.go` of Tailscale's sources. Three things are other than they look:
//!
//! - No rules at all let nothing through, where a [`Policy`] without rules lets everything: so a rule that
//!   matches nothing stands in for them.
//! - Rules that only grant capabilities have no destinations and let nothing through.
//! - Protocols beyond a byte are passed over. Where none is left, TCP and UDP are not meant (an empty list would
//!   mean them), only ICMP, which goes wherever anything does.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};

use crate::control::{Destination, Direction, Policy, Rule};
use crate::tailnet::wire::{FilterRule, NetPortRange, each};

/// What stands in a filter and is not understood. What it would let through stays shut.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A source or destination that is none of the known forms.
    #[error("\"{0}\" in the packet filter is no address, CIDR, range or capability")]
    Addresses(String),
    /// A form that was given up in 2020; Go's client refuses it too.
    #[error("a rule of the packet filter has prefix lengths beside its addresses")]
    Bits,
    /// A capability among destinations.
    #[error("\"{0}\" in the packet filter cannot be a destination")]
    Capability(String),
    /// Ports that are none.
    #[error("ports {0} to {1} in the packet filter are none")]
    Ports(i64, i64),
}

/// A filter as policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compiled {
    /// The policy. It has a rule at least.
    pub policy: Policy,
    /// What was not understood, each once.
    pub problems: Vec<Problem>,
}

/// Compiles a filter. `holders` tells the addresses of the peers that have a capability.
pub fn compile<'a>(
    rules: impl IntoIterator<Item = &'a FilterRule>,
    holders: &dyn Fn(&str) -> Vec<IpNet>,
) -> Compiled {
    let mut out = Compiled::default();
    for wire in rules {
        match rule(wire, holders, &mut out.problems) {
            Ok(Some(rule)) => out.policy.rules.push(rule),
            Ok(None) => {}
            Err(problem) => out.problems.push(problem),
        }
    }
    if out.policy.rules.is_empty() {
        out.policy.rules.push(Rule {
            direction: Direction::FromOverlay,
            sources: Vec::new(),
            destinations: Vec::new(),
            protocols: Vec::new(),
        });
    }
    let mut seen = Vec::new();
    for problem in out.problems {
        if !seen.contains(&problem) {
            seen.push(problem);
        }
    }
    out.problems = seen;
    out
}

/// One rule; `None` when it lets nothing through.
fn rule(
    wire: &FilterRule,
    holders: &dyn Fn(&str) -> Vec<IpNet>,
    problems: &mut Vec<Problem>,
) -> Result<Option<Rule>, Problem> {
    if each(&wire.src_bits).next().is_some() {
        return Err(Problem::Bits);
    }
    let mut sources = Vec::new();
    for text in each(&wire.src_ips) {
        match Addresses::parse(text) {
            Some(Addresses::Networks(networks)) => sources.extend(networks),
            Some(Addresses::Capability(name)) => sources.extend(holders(name)),
            None => problems.push(Problem::Addresses(text.clone())),
        }
    }
    let mut destinations = Vec::new();
    for range in each(&wire.dst_ports) {
        if range.bits.is_some() {
            return Err(Problem::Bits);
        }
        match reached(range) {
            Ok(some) => destinations.extend(some),
            Err(problem) => problems.push(problem),
        }
    }
    let named: Vec<i64> = each(&wire.ip_proto).copied().collect();
    let mut protocols: Vec<u8> = named
        .iter()
        .filter_map(|number| u8::try_from(*number).ok())
        .collect();
    if protocols.is_empty() && !named.is_empty() {
        protocols.push(libc::IPPROTO_ICMP as u8);
    }
    let lets_through = !sources.is_empty() && !destinations.is_empty();
    Ok(lets_through.then_some(Rule {
        direction: Direction::FromOverlay,
        sources,
        destinations,
        protocols,
    }))
}

/// The networks that a rule is about, as far as they are understood.
pub fn sources(wire: &FilterRule, holders: &dyn Fn(&str) -> Vec<IpNet>) -> Vec<IpNet> {
    let networks = |text: &String| match Addresses::parse(text) {
        Some(Addresses::Networks(networks)) => networks,
        Some(Addresses::Capability(name)) => holders(name),
        None => Vec::new(),
    };
    each(&wire.src_ips).flat_map(networks).collect()
}

fn reached(range: &NetPortRange) -> Result<Vec<Destination>, Problem> {
    let text = range.ip.as_deref().unwrap_or_default();
    let networks = match Addresses::parse(text) {
        Some(Addresses::Networks(networks)) => networks,
        Some(Addresses::Capability(_)) => return Err(Problem::Capability(text.to_owned())),
        None => return Err(Problem::Addresses(text.to_owned())),
    };
    let ports = range.ports.clone().unwrap_or_default();
    let (first, last) = (ports.first.unwrap_or(0), ports.last.unwrap_or(0));
    let (Ok(from), Ok(to)) = (u16::try_from(first), u16::try_from(last)) else {
        return Err(Problem::Ports(first, last));
    };
    if from > to {
        return Err(Problem::Ports(first, last));
    }
    let destination = |cidr| Destination {
        cidr,
        ports: from..=to,
    };
    Ok(networks.into_iter().map(destination).collect())
}

/// What a source or destination can be.
enum Addresses<'a> {
    Networks(Vec<IpNet>),
    Capability(&'a str),
}

impl<'a> Addresses<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let networks = if text == "*" {
            vec![everything(true), everything(false)]
        } else if let Some(name) = text.strip_prefix("cap:") {
            return Some(Self::Capability(name));
        } else if text.contains('/') {
            let network: IpNet = text.parse().ok()?;
            // Host bits would be a mistake of whoever wrote it: better shut than guessed.
            (network == network.trunc()).then(|| vec![network])?
        } else if let Some((first, last)) = text.split_once('-') {
            range(first.parse().ok()?, last.parse().ok()?)?
        } else {
            vec![IpNet::from(text.parse::<IpAddr>().ok()?)]
        };
        Some(Self::Networks(networks))
    }
}

fn everything(ipv4: bool) -> IpNet {
    if ipv4 {
        IpNet::V4(ipnet::Ipv4Net::default())
    } else {
        IpNet::V6(ipnet::Ipv6Net::default())
    }
}

/// The fewest CIDRs that make up a range.
fn range(first: IpAddr, last: IpAddr) -> Option<Vec<IpNet>> {
    match (first, last) {
        (IpAddr::V4(first), IpAddr::V4(last)) if first <= last => {
            Some(Ipv4Subnets::new(first, last, 0).map(IpNet::V4).collect())
        }
        (IpAddr::V6(first), IpAddr::V6(last)) if first <= last => {
            Some(Ipv6Subnets::new(first, last, 0).map(IpNet::V6).collect())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests;

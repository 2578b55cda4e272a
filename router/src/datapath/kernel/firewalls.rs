//! Firewalls of others, which may stop what our rules let pass: an accept of ours does not overrule
//! their drop.
//!
//! What they do is measured: our table counts what it has let through at the beginning of the forward
//! hook, and what has passed all of netfilter at its end. Their chains are read to name who it may be,
//! and followed as they change. One that can let no new flow of a peer pass is told before anything is
//! lost. Rules of iptables-legacy cannot be read through nf_tables: there the count must do.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use router_ebpf::packet::{ICMP, ICMPV6, TCP, UDP};

use super::judge::{Device, Outcome, Packet, judge};
use crate::control::RouteMode;
use crate::datapath::{Link, Spec};
use crate::netlink::Error;
use crate::netlink::nft::{BaseChain, Count, Nft, TABLE_PREFIX};

/// How often what was lost is looked at.
const PERIOD: Duration = Duration::from_secs(2);
/// How long something that was lost is a problem.
const MEMORY: Duration = Duration::from_secs(60);
/// Others change their rules in many steps; this long after the first one they are looked at.
const SETTLE: Duration = Duration::from_millis(300);
/// After a look that took a while, the next one comes so many times later.
const REST: u32 = 50;
/// Less than one in so many packets is lost by chance, as when two flows want one port at a time.
const ONE_IN: u64 = 100;

/// `NF_INET_PRE_ROUTING`, `NF_INET_LOCAL_IN`, `NF_INET_FORWARD` and `NF_INET_LOCAL_OUT`.
const PREROUTING: u32 = 0;
const INPUT: u32 = 1;
const FORWARD: u32 = 2;
const OUTPUT: u32 = 3;
/// `NFPROTO_INET` and `NFPROTO_NETDEV`.
const INET: u8 = 1;
const NETDEV: u8 = 5;
/// `NF_NETDEV_INGRESS`, `NF_NETDEV_EGRESS`, and `NF_INET_INGRESS`.
const INGRESS: u32 = 0;
const EGRESS: u32 = 1;
const INET_INGRESS: u32 = 5;

/// Where a chain of one interface stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AtDevice {
    Ingress,
    Egress,
}

impl AtDevice {
    fn of(chain: &BaseChain) -> Option<Self> {
        match (chain.family, chain.hook) {
            (NETDEV, INGRESS) | (INET, INET_INGRESS) => Some(Self::Ingress),
            (NETDEV, EGRESS) => Some(Self::Egress),
            _ => None,
        }
    }
}

/// Routes that a mend names.
const MOST_NAMED: usize = 8;

/// Packets of one direction: what our rules have let through, and what of it has left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Passage {
    /// Let through.
    pub(super) entered: u64,
    /// Of them, those that have passed all other chains.
    pub(super) left: u64,
}

/// What is lost of one direction.
#[derive(Debug, Default)]
struct Losses {
    /// Most that were under way or lost at once.
    lost: u64,
    /// When how many had entered and been lost, over [`MEMORY`].
    samples: VecDeque<(Instant, u64, u64)>,
}

impl Losses {
    /// `before` was read before `after`: what had entered then has left by now, or never will.
    fn measure(&mut self, before: Passage, after: Passage, now: Instant) {
        self.lost = self.lost.max(before.entered.saturating_sub(after.left));
        self.samples.push_back((now, before.entered, self.lost));
        while self
            .samples
            .get(1)
            .is_some_and(|(at, ..)| *at + MEMORY <= now)
        {
            self.samples.pop_front();
        }
    }

    /// How many were lost of late, if they were more than a few.
    fn recent(&self) -> Option<u64> {
        let (_, entered, lost) = self.samples.front()?;
        let (_, entered_now, lost_now) = self.samples.back()?;
        let (entered, lost) = (entered_now.saturating_sub(*entered), lost_now - lost);
        (lost > 0 && lost.saturating_mul(ONE_IN) >= entered).then_some(lost)
    }

    /// Takes what is lost by now for the past.
    fn forget(&mut self) {
        let newest = self.samples.back().copied();
        self.samples = newest.into_iter().collect();
    }
}

/// What a chain of others does to us.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Suspect {
    chain: BaseChain,
    /// It lets none of these packets pass.
    surely: bool,
}

/// What they are judged by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Place {
    tun: Link,
    subnet: Vec<Link>,
    knocked_port: Option<u16>,
    /// The bit of the underlay's mark.
    mark: u32,
    routes: Vec<IpNet>,
    /// Whether all packets are the programs' before chains at an interface's ingress see them.
    programs_first: bool,
}

/// What is known of other firewalls.
#[derive(Debug, Default)]
pub(super) struct Firewalls {
    place: Place,
    losses: [Losses; 2],
    suspects: Vec<Suspect>,
    /// When they are looked at again, if they have changed.
    look_due: Option<Instant>,
    rested: Option<Instant>,
    measure_due: Option<Instant>,
    /// What was told in the log.
    told: Vec<String>,
}

impl Firewalls {
    /// When [`Firewalls::tend`] has something to do.
    pub(super) fn due(&self) -> Option<Instant> {
        [self.look_due, self.measure_due]
            .into_iter()
            .flatten()
            .min()
    }

    /// The table of this configuration is in force.
    pub(super) fn stand_beside(&mut self, spec: &Spec, now: Instant) {
        let place = Place {
            tun: spec.tun.clone(),
            subnet: spec.subnet.clone(),
            knocked_port: spec.knocked_port,
            mark: spec.marks.underlay,
            routes: spec.routes.iter().map(|route| route.cidr).collect(),
            programs_first: spec.handed_over.is_some()
                && spec
                    .routes
                    .iter()
                    .all(|route| route.mode == RouteMode::Fast),
        };
        self.measure_due.get_or_insert(now);
        if self.place != place {
            self.place = place;
            self.look_due = Some(now);
        }
    }

    /// Others have changed their rules.
    pub(super) fn changed(&mut self, now: Instant) {
        let due = self
            .rested
            .map_or(now + SETTLE, |rested| rested.max(now + SETTLE));
        self.look_due.get_or_insert(due);
    }

    /// Measures what was lost, and looks at changed chains. `passages` reads both directions.
    pub(super) fn tend(
        &mut self,
        nft: &mut Nft,
        now: Instant,
        passages: impl Fn(&mut Nft) -> Result<[Passage; 2], Error>,
    ) {
        if self.measure_due.is_none_or(|due| due <= now) {
            self.measure_due = Some(now + PERIOD);
            match passages(nft).and_then(|before| Ok((before, passages(nft)?))) {
                Ok((before, after)) => {
                    for ((losses, before), after) in self.losses.iter_mut().zip(before).zip(after) {
                        losses.measure(before, after, now);
                    }
                }
                Err(error) => tracing::debug!(%error, "what other firewalls drop is not known"),
            }
        }
        if self.look_due.is_some_and(|due| due <= now) {
            self.look_due = None;
            let begin = Instant::now();
            match look(nft, &self.place) {
                Ok(suspects) => {
                    // What others have lost by rules that are gone is no problem any more.
                    if self
                        .suspects
                        .iter()
                        .any(|before| !suspects.contains(before))
                    {
                        self.losses.iter_mut().for_each(Losses::forget);
                    }
                    self.suspects = suspects;
                }
                // Somebody is changing them.
                Err(error) => {
                    tracing::debug!(%error, "other firewalls are looked at again");
                    self.look_due = Some(now + PERIOD);
                }
            }
            self.rested = Some(now + begin.elapsed() * REST);
        }
        let problems = self.problems();
        for problem in problems
            .iter()
            .filter(|problem| !self.told.contains(&head(problem)))
        {
            tracing::warn!("{problem}");
        }
        if problems.is_empty() && !self.told.is_empty() {
            tracing::info!("no other firewall stops this router's packets any more");
        }
        self.told = problems.iter().map(|problem| head(problem)).collect();
    }

    /// What was lost of what our rules have let through: from peers, and to them.
    pub(super) fn lost(&self) -> [u64; 2] {
        [self.losses[0].lost, self.losses[1].lost]
    }

    /// What is wrong, and the mend.
    pub(super) fn problems(&self) -> Vec<String> {
        let tun = &self.place.tun.name;
        let [from, to] = [self.losses[0].recent(), self.losses[1].recent()];
        let lost = match (from, to) {
            (None, None) => None,
            (from, to) => {
                let (from, to) = (from.unwrap_or(0), to.unwrap_or(0));
                Some(format!(
                    "in the last minute {from} packets from peers and {to} to peers were lost that \
                     this router's own rules had let through"
                ))
            }
        };
        let forward = |suspect: &&Suspect| suspect.chain.hook == FORWARD;
        let mut problems: Vec<String> = self
            .suspects
            .iter()
            .filter(forward)
            .filter(|suspect| suspect.surely || lost.is_some())
            .map(|suspect| {
                let path = path(&suspect.chain);
                let does = match (&lost, suspect.surely) {
                    (None, _) => "drops what peers send through this router".to_owned(),
                    (Some(lost), true) => format!("drops what peers send through this router: {lost}"),
                    (Some(lost), false) => format!("may drop what passes this router: {lost}"),
                };
                format!(
                    "the firewall chain \"{path}\" {does}; an accept elsewhere does not overrule it: \
                     let it pass by `nft insert rule {path} iifname \"{tun}\" accept` and `nft \
                     insert rule {path} oifname \"{tun}\" accept`, and in that firewall's own \
                     configuration"
                )
            })
            .collect();
        if let Some(lost) = lost.filter(|_| problems.is_empty()) {
            let legacy = match legacy_tables() {
                tables if tables.is_empty() => "no nf_tables chain in the forward hook explains it; \
                    look for a source translation that finds no address or port, and for chains that \
                    drop in other hooks (`nft list ruleset`)"
                    .to_owned(),
                tables => format!(
                    "iptables-legacy has rules here ({tables}), which cannot be read through \
                     nf_tables: let packets pass by `iptables-legacy -I FORWARD -i {tun} -j ACCEPT` \
                     and `iptables-legacy -I FORWARD -o {tun} -j ACCEPT` (ip6tables-legacy for IPv6)"
                ),
            };
            problems.push(format!("{lost}: {legacy}"));
        }
        // Nothing is counted in these hooks.
        for suspect in self.suspects.iter().filter(|suspect| suspect.surely) {
            let path = path(&suspect.chain);
            if let Some(at) = AtDevice::of(&suspect.chain) {
                problems.push(self.at_device(&path, at));
                continue;
            }
            let (what, pass) = match (suspect.chain.hook, self.place.knocked_port) {
                (PREROUTING, _) => (
                    "what comes from peers".to_owned(),
                    format!("iifname \"{tun}\""),
                ),
                (INPUT, Some(port)) => (
                    format!(
                        "what comes to UDP port {port}, so that peers without a configured endpoint \
                         cannot connect"
                    ),
                    format!("udp dport {port}"),
                ),
                (OUTPUT, _) => (
                    "the router's own datagrams, so that no peer hears it".to_owned(),
                    format!("meta mark and {0:#x} == {0:#x}", self.place.mark),
                ),
                _ => continue,
            };
            problems.push(format!(
                "the firewall chain \"{path}\" drops {what}: let it pass by `nft insert rule {path} \
                 {pass} accept`, and in that firewall's own configuration"
            ));
        }
        problems
    }
}

impl Firewalls {
    /// What a chain at an interface does, and the mend.
    fn at_device(&self, path: &str, at: AtDevice) -> String {
        let (what, field) = match at {
            AtDevice::Ingress => ("what comes from the subnet side", "saddr"),
            AtDevice::Egress => ("what peers send to the subnet side", "daddr"),
        };
        let pass = self.place.routes.iter().map(|cidr| {
            let family = if cidr.addr().is_ipv4() { "ip" } else { "ip6" };
            format!("`nft insert rule {path} {family} {field} {cidr} accept`")
        });
        let pass: Vec<String> = pass.take(MOST_NAMED).collect();
        format!(
            "the firewall chain \"{path}\" drops {what}: let it pass by {}, and in that firewall's own \
             configuration",
            pass.join(" and ")
        )
    }
}

/// What of a problem stays the same while numbers grow.
fn head(problem: &str) -> String {
    let end = problem.find(" drop").unwrap_or(problem.len());
    let numbers = |c: char| c.is_ascii_digit();
    problem.get(..end).unwrap_or_default().replace(numbers, "")
}

/// As `nft` names it.
fn path(chain: &BaseChain) -> String {
    let family = match chain.family {
        2 => "ip",
        10 => "ip6",
        NETDEV => "netdev",
        _ => "inet",
    };
    format!("{family} {} {}", chain.table, chain.name)
}

/// Tables of iptables-legacy, or nothing.
fn legacy_tables() -> String {
    let files = ["/proc/net/ip_tables_names", "/proc/net/ip6_tables_names"];
    let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
    let names: BTreeSet<String> = files
        .iter()
        .flat_map(|file| read(file).lines().map(str::to_owned).collect::<Vec<_>>())
        .collect();
    names.into_iter().collect::<Vec<_>>().join(", ")
}

/// The chains of others that may drop our packets.
fn look(nft: &mut Nft, place: &Place) -> Result<Vec<Suspect>, Error> {
    let mut suspects = Vec::new();
    for chain in nft.base_chains()? {
        let of_ip = matches!(chain.family, INET | 2 | 10 | NETDEV);
        if !of_ip || chain.table.starts_with(TABLE_PREFIX) {
            continue;
        }
        let mut ask = |packet: Packet<'_>| {
            judge(&packet, &chain, &mut |name| {
                nft.rules(chain.family, &chain.table, name)
            })
        };
        let outcomes: Vec<(u8, Outcome)> = packets(place, &chain)
            .into_iter()
            .map(|packet| Ok((packet.protocol, ask(packet)?)))
            .collect::<Result<_, Error>>()?;
        if outcomes.iter().any(|(_, outcome)| outcome.drops) {
            // Who drops other protocols alone may mean it, and is named when something is lost.
            let surely = outcomes.iter().any(|(protocol, outcome)| {
                let main = *protocol == TCP || matches!(chain.hook, INPUT | OUTPUT);
                main && outcome.drops && !outcome.passes
            });
            suspects.push(Suspect { chain, surely });
        }
    }
    Ok(suspects)
}

/// The packets that a chain is asked about.
fn packets<'a>(place: &'a Place, chain: &BaseChain) -> Vec<Packet<'a>> {
    /// `NF_CT_STATE_BIT`s.
    const ESTABLISHED: u32 = 2;
    const NEW: u32 = 8;
    let base = Packet {
        family: chain.family,
        from: Device::Foreign,
        to: Device::Foreign,
        protocol: TCP,
        port: None,
        state: NEW,
    };
    let subnet = match place.subnet.as_slice() {
        [] => Device::Foreign,
        links => Device::Among(links),
    };
    if let Some(at) = AtDevice::of(chain) {
        let served = place.subnet.iter();
        let mut served = served.filter(|link| chain.devices.contains(&link.name));
        let Some(link) = served
            .next()
            .filter(|_| at == AtDevice::Egress || !place.programs_first)
        else {
            return Vec::new();
        };
        let here = Device::Among(std::slice::from_ref(link));
        let (from, to) = match at {
            AtDevice::Ingress => (here, Device::None),
            AtDevice::Egress => (Device::None, here),
        };
        let of = |family| Packet {
            family,
            from,
            to,
            state: ESTABLISHED,
            ..base
        };
        return vec![of(2), of(10)];
    }
    match chain.hook {
        FORWARD => {
            let tun = std::slice::from_ref(&place.tun);
            let of = |protocol| {
                let there = Packet {
                    from: Device::Among(tun),
                    to: subnet,
                    protocol,
                    ..base
                };
                let back = Packet {
                    from: subnet,
                    to: Device::Among(tun),
                    state: ESTABLISHED,
                    ..there
                };
                [there, back]
            };
            [TCP, UDP, ICMP, ICMPV6].into_iter().flat_map(of).collect()
        }
        PREROUTING => vec![Packet {
            from: Device::Among(std::slice::from_ref(&place.tun)),
            to: Device::None,
            ..base
        }],
        // Who lets out only what answers leaves it to the peers to call.
        OUTPUT => vec![Packet {
            from: Device::None,
            protocol: UDP,
            state: ESTABLISHED,
            ..base
        }],
        INPUT => place
            .knocked_port
            .map(|port| Packet {
                to: Device::None,
                protocol: UDP,
                port: Some(port),
                ..base
            })
            .into_iter()
            .collect(),
        _ => Vec::new(),
    }
}

/// Counters of both directions by name, as [`Passage`]s.
pub(super) fn passages(counts: &BTreeMap<String, Count>, names: [[&str; 2]; 2]) -> [Passage; 2] {
    let packets = |name: &str| counts.get(name).map_or(0, |count| count.packets);
    names.map(|[entered, left]| Passage {
        entered: packets(entered),
        left: packets(left),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_under_way_is_not_lost_and_a_few_are_no_problem() {
        let start = Instant::now();
        let mut losses = Losses::default();
        let measure = |losses: &mut Losses, second, entered, left| {
            let at = |entered| Passage { entered, left };
            losses.measure(
                at(entered),
                at(entered + 9),
                start + Duration::from_secs(second),
            );
        };
        measure(&mut losses, 0, 1000, 1003);
        assert_eq!((losses.lost, losses.recent()), (0, None));
        // One in a thousand.
        measure(&mut losses, 5, 3000, 2998);
        assert_eq!((losses.lost, losses.recent()), (2, None));
        measure(&mut losses, 10, 3100, 3000);
        assert_eq!((losses.lost, losses.recent()), (100, Some(100)));
        // More has been lost than is under way, or the same.
        measure(&mut losses, 20, 3100, 3050);
        assert_eq!((losses.lost, losses.recent()), (100, Some(100)));
        measure(&mut losses, 71, 3200, 3100);
        measure(&mut losses, 72, 3200, 3100);
        assert_eq!(losses.recent(), None);
        measure(&mut losses, 73, 3210, 3100);
        assert_eq!(losses.recent(), Some(10));
        losses.forget();
        assert_eq!((losses.lost, losses.recent()), (110, None));
    }
}

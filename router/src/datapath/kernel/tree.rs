//! The chains of a compiled policy.

use std::collections::BTreeSet;

use super::policy::{Compiled, Opening, Sources, Tree};
use super::ruleset::{load_destination, load_source, of_family};
use super::span::Family;
use crate::datapath::policy::{TCP, UDP};
use crate::netlink::nft::{Base, Cmp, Meta, REG, Rule, Transaction, Verdict};

/// TCP and UDP, of which most rules are.
const TCP_OR_UDP: &str = "tcp_or_udp";

/// How packets are looked at, and what becomes of those that a rule is for.
#[derive(Clone, Copy)]
pub(super) struct Look<'a> {
    /// The family of all names.
    pub(super) family: Family,
    /// Begins the names of the chains and maps.
    pub(super) name: &'a str,
    /// Whether packets are taken for answers: source and destination, and their ports, change places.
    pub(super) turned: bool,
    /// What is counted, and the verdict.
    pub(super) then: (Option<&'a str>, Verdict<'a>),
}

/// The name of a set of sources: single addresses or ranges.
pub(super) fn source_set(family: Family, place: usize, ranges: bool) -> String {
    let kind = if ranges { "ranges" } else { "hosts" };
    match family {
        Family::V4 => format!("rule_{kind}4_{place}"),
        Family::V6 => format!("rule_{kind}6_{place}"),
    }
}

/// Writes what the chains of both families look things up in.
pub(super) fn write_protocols(tx: &mut Transaction<'_>) {
    tx.protocol_set(TCP_OR_UDP, &[TCP, UDP]);
}

/// The places of the sources that `trees` name by sets.
pub(super) fn used(compiled: &Compiled, trees: &[&Tree]) -> BTreeSet<usize> {
    let openings = trees.iter().flat_map(|tree| tree.openings.iter().flatten());
    let places = openings.map(|opening| opening.sources);
    let is_set = |place: &usize| compiled.sources.get(*place).is_some_and(|list| !list.all);
    places.filter(is_set).collect()
}

/// Writes the sets of sources that `trees` name.
pub(super) fn write_sources(
    tx: &mut Transaction<'_>,
    family: Family,
    compiled: &Compiled,
    trees: &[&Tree],
) {
    for place in used(compiled, trees) {
        let Some(sources) = compiled.sources.get(place) else {
            continue;
        };
        // Sources may become single addresses later.
        let hosts = source_set(family, place, false);
        tx.host_set(&hosts, family, sources.hosts.len());
        tx.add_hosts(&hosts, family, sources.hosts.iter().copied());
        if !sources.ranges.is_empty() {
            tx.address_set(&source_set(family, place, true), family, &sources.ranges);
        }
    }
}

impl Look<'_> {
    fn level(&self, level: usize) -> String {
        format!("{}_level_{level}", self.name)
    }

    /// Writes the chains and maps of a tree.
    pub(super) fn write(&self, tx: &mut Transaction<'_>, compiled: &Compiled, tree: &Tree) {
        let chain = |place: usize| format!("{}_{place}", self.name);
        for (place, openings) in tree.openings.iter().enumerate() {
            let chain = chain(place);
            tx.chain(&chain);
            for opening in openings {
                if let Some(sources) = compiled.sources.get(opening.sources) {
                    self.open(tx, &chain, opening, sources);
                }
            }
        }
        for (number, level) in tree.levels.iter().enumerate() {
            let spans = level.iter().map(|(span, place)| (*span, chain(*place)));
            let spans: Vec<_> = spans.collect();
            tx.chain_map(&self.level(number), self.family, &spans);
        }
    }

    /// Asks a tree that [`Look::write`] has written.
    pub(super) fn ask(&self, tx: &mut Transaction<'_>, chain: &str, tree: &Tree) {
        for level in 0..tree.levels.len() {
            tx.rule(chain, |r| {
                of_family(r, self.family);
                self.load(r, false).dispatch(&self.level(level), REG);
            });
        }
    }

    /// Loads the address of the flow's opener, or of its other end.
    fn load<'r, 'a, 'b>(&self, r: &'r mut Rule<'a, 'b>, opener: bool) -> &'r mut Rule<'a, 'b> {
        if opener == self.turned {
            load_destination(r, self.family, REG)
        } else {
            load_source(r, self.family, REG)
        }
    }

    fn open(&self, tx: &mut Transaction<'_>, chain: &str, opening: &Opening, sources: &Sources) {
        let hosts = source_set(self.family, opening.sources, false);
        let ranges = source_set(self.family, opening.sources, true);
        let sets = if sources.all {
            vec![None]
        } else if sources.ranges.is_empty() {
            vec![Some(&hosts)]
        } else {
            vec![Some(&ranges), Some(&hosts)]
        };
        let with_ports = |protocol: &u8| matches!(*protocol, TCP | UDP);
        let both = opening.protocols.iter().copied().filter(with_ports).count() == 2;
        let single = opening.protocols.iter().filter(|p| !both || !with_ports(p));
        let protocols = both.then_some(None).into_iter().chain(single.map(Some));
        for protocol in protocols {
            for set in &sets {
                tx.rule(chain, |r| {
                    // What costs least and says most comes first.
                    if let Some((first, last)) = opening.ports {
                        r.payload(Base::Transport, if self.turned { 0 } else { 2 }, 2, REG);
                        if first == last {
                            r.cmp(Cmp::Eq, REG, &first.to_be_bytes());
                        } else {
                            r.cmp(Cmp::Ge, REG, &first.to_be_bytes()).cmp(
                                Cmp::Le,
                                REG,
                                &last.to_be_bytes(),
                            );
                        }
                    }
                    r.meta(Meta::L4Proto, REG);
                    match protocol {
                        Some(protocol) => r.cmp(Cmp::Eq, REG, &[*protocol]),
                        None => r.lookup(TCP_OR_UDP, REG),
                    };
                    if let Some(set) = set {
                        of_family(r, self.family);
                        self.load(r, true).lookup(set, REG);
                    }
                    let (counter, verdict) = self.then;
                    if let Some(counter) = counter {
                        r.count(counter);
                    }
                    r.verdict(verdict);
                });
            }
        }
    }
}

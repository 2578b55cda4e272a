//! The rules that lead packets to our routing table.

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Error, Family, Netlink, PROTOCOL, address_family};

/// The main routing table.
const MAIN: u32 = libc::RT_TABLE_MAIN as u32;
/// The table of the machine's own addresses.
const LOCAL: u32 = libc::RT_TABLE_LOCAL as u32;

/// Priorities of our rules, as long as none of them comes before the rule that leads to the machine's
/// own addresses. That is the kernel's first; set-ups of VRFs move it behind the VRFs' rule, to 32765
/// (Documentation/networking/vrf.rst), and ours follow. Of several with one priority, the kernel asks
/// the one first that was added first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Priorities {
    /// Our table without its default route: before the machine's own policy routing, which would
    /// else send overlay packets out in the clear.
    pub overlay: u32,
    /// The main table without its default route, then (one higher) all of our table: just before
    /// the main table, so that an overlay default route wins over the machine's, and nothing else.
    pub default: u32,
}

impl Default for Priorities {
    fn default() -> Self {
        Self {
            overlay: 5150,
            default: 32764,
        }
    }
}

/// What the rules are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuleSpec {
    /// Our routing table.
    pub table: u32,
    /// The mark of underlay packets ([`crate::datapath::marks`]); a packet that has all of its bits
    /// set is not led to our table, so that no allowed IP can swallow the tunnel's own packets.
    pub fwmark: u32,
    /// Where among other rules ours stand.
    pub priorities: Priorities,
}

impl RuleSpec {
    /// The usual rules for a table, and the mark of underlay packets.
    pub fn new(table: u32, fwmark: u32) -> Self {
        Self {
            table,
            fwmark,
            priorities: Priorities::default(),
        }
    }

    /// The rules, where that to the machine's own addresses has priority `local`.
    fn wanted(&self, local: u32) -> [Rule; 3] {
        let rule = |priority: u32, table, suppress_default| Rule {
            priority: priority.max(local),
            table,
            fwmark: self.fwmark,
            suppress_default,
        };
        let Priorities { overlay, default } = self.priorities;
        [
            rule(overlay, self.table, true),
            rule(default, MAIN, true),
            rule(default + 1, self.table, false),
        ]
    }

    /// Whether a rule with our protocol number belongs to this table: others may use the number, too.
    fn owns(&self, message: &RuleMessage) -> bool {
        let (mut table, mut priority) = (u32::from(message.header.table), 0);
        let mut ours = false;
        for attribute in &message.attributes {
            match attribute {
                RuleAttribute::Table(value) => table = *value,
                RuleAttribute::Priority(value) => priority = *value,
                RuleAttribute::Protocol(protocol) => ours = u8::from(*protocol) == PROTOCOL,
                _ => {}
            }
        }
        ours && (table == self.table || (table == MAIN && priority >= self.priorities.default))
    }
}

/// What is to be done so that the rules are there and in order.
#[derive(Debug, Default, PartialEq)]
struct Change {
    /// First.
    remove: Vec<RuleMessage>,
    /// Then, one after the other.
    add: Vec<Rule>,
    /// What was wrong, in words.
    wrong: Vec<String>,
}

impl RuleSpec {
    /// Compares the rules of one family, in the kernel's order.
    fn compare(&self, present: Vec<RuleMessage>) -> Change {
        let at_local = present.iter().position(leads_to_own_addresses);
        let local = at_local.map_or(0, |at| priority(&present[at]));
        let wanted = self.wanted(local);
        let mut found: [Option<RuleMessage>; 3] = [None, None, None];
        let mut change = Change::default();
        let mut next = 0;
        for (at, message) in present.into_iter().enumerate() {
            if !self.owns(&message) {
                continue;
            }
            let rule = Rule::read(&message);
            let place = (next..wanted.len()).find(|place| Some(wanted[*place]) == rule);
            match place {
                Some(place) if at_local.is_none_or(|local| at > local) => {
                    found[place] = Some(message);
                    next = place + 1;
                }
                _ => {
                    change.wrong.push(format!(
                        "a rule of priority {} was there or out of place",
                        priority(&message)
                    ));
                    change.remove.push(message);
                }
            }
        }
        for (rule, found) in wanted.into_iter().zip(found) {
            // What is added comes behind those with its priority: they have to be added after it.
            let behind = change
                .add
                .last()
                .is_some_and(|added| added.priority == rule.priority);
            match found {
                Some(_) if !behind => {}
                Some(message) => {
                    change.remove.push(message);
                    change.add.push(rule);
                }
                None => {
                    change.wrong.push(format!("{} was missing", rule.text()));
                    change.add.push(rule);
                }
            }
        }
        change
    }
}

/// Whether this is the rule by which the kernel knows packets for itself: for all packets, without a
/// condition.
fn leads_to_own_addresses(message: &RuleMessage) -> bool {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let mut conditions = header.src_len != 0 || header.dst_len != 0 || header.tos != 0;
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Table(value) => table = *value,
            RuleAttribute::Iifname(_) | RuleAttribute::Oifname(_) | RuleAttribute::FwMark(_) => {
                conditions = true;
            }
            _ => {}
        }
    }
    header.action == RuleAction::ToTable
        && !header.flags.contains(RuleFlags::Invert)
        && table == LOCAL
        && !conditions
}

/// A rule's priority; the kernel leaves 0 out.
fn priority(message: &RuleMessage) -> u32 {
    let attributes = message.attributes.iter();
    let mut priorities = attributes.filter_map(|attribute| match attribute {
        RuleAttribute::Priority(value) => Some(*value),
        _ => None,
    });
    priorities.next().unwrap_or(0)
}

/// A rule of others that ends packets before they come to the main table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DroppingRule {
    /// Of these packets.
    pub family: Family,
    /// Its priority.
    pub priority: u32,
    /// As `ip rule` calls what it does.
    pub action: &'static str,
    /// Only packets from there.
    pub from: Option<IpNet>,
    /// Only packets to there.
    pub to: Option<IpNet>,
    /// Only packets that came by this interface.
    pub iif: Option<String>,
    /// Whether it stands before our first rule, hence before the routes to peers.
    pub before_ours: bool,
}

impl DroppingRule {
    /// Reads a rule; `None` when it drops nothing, or only packets of which the router knows nothing: those
    /// with a mark, of some socket, or all but some.
    fn read(message: &RuleMessage, family: Family, before_ours: bool) -> Option<Self> {
        let header = &message.header;
        let action = match header.action {
            RuleAction::Blackhole => "blackhole",
            RuleAction::Unreachable => "unreachable",
            RuleAction::Prohibit => "prohibit",
            _ => return None,
        };
        if header.flags.contains(RuleFlags::Invert) {
            return None;
        }
        let mut rule = Self {
            family,
            priority: 0,
            action,
            from: None,
            to: None,
            iif: None,
            before_ours,
        };
        for attribute in &message.attributes {
            match attribute {
                RuleAttribute::Priority(value) => rule.priority = *value,
                RuleAttribute::Source(address) => {
                    rule.from = Some(IpNet::new(*address, header.src_len).ok()?);
                }
                RuleAttribute::Destination(address) => {
                    rule.to = Some(IpNet::new(*address, header.dst_len).ok()?);
                }
                RuleAttribute::Iifname(name) => rule.iif = Some(name.clone()),
                RuleAttribute::FwMark(mark) if *mark != 0 => return None,
                RuleAttribute::Oifname(_) | RuleAttribute::UidRange(_) => return None,
                _ => {}
            }
        }
        Some(rule)
    }

    /// As `ip rule` takes and shows it.
    pub fn text(&self) -> String {
        let from = self.from.map_or("all".to_owned(), |net| net.to_string());
        let to = self.to.map(|net| format!(" to {net}")).unwrap_or_default();
        let iif = self.iif.as_ref().map(|name| format!(" iif {name}"));
        let iif = iif.unwrap_or_default();
        format!("from {from}{to}{iif} {}", self.action)
    }
}

/// Those of the rules of one family, in the kernel's order.
fn dropping(present: &[RuleMessage], spec: &RuleSpec, family: Family) -> Vec<DroppingRule> {
    let ours = present.iter().position(|message| spec.owns(message));
    let is_main = |message: &RuleMessage| {
        let plain = message.header.flags.is_empty() && message.header.src_len == 0;
        let suppresses = |a: &RuleAttribute| matches!(a, RuleAttribute::SuppressPrefixLen(0));
        u32::from(message.header.table) == MAIN
            && plain
            && message.header.dst_len == 0
            && !message.attributes.iter().any(suppresses)
    };
    let behind = present.iter().position(is_main).unwrap_or(present.len());
    let before = present.iter().enumerate().take(behind);
    before
        .filter_map(|(at, message)| {
            DroppingRule::read(message, family, ours.is_none_or(|ours| at < ours))
        })
        .collect()
}

/// One rule: packets without the mark look up a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    priority: u32,
    table: u32,
    fwmark: u32,
    /// Whether the table's default route is left out.
    suppress_default: bool,
}

impl Rule {
    fn message(self, family: AddressFamily) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header.family = family;
        message.header.action = RuleAction::ToTable;
        message.header.flags = RuleFlags::Invert;
        message.attributes = vec![
            RuleAttribute::Priority(self.priority),
            RuleAttribute::FwMark(self.fwmark),
            RuleAttribute::FwMask(self.fwmark),
            RuleAttribute::Table(self.table),
            RuleAttribute::Protocol(RouteProtocol::from(PROTOCOL)),
        ];
        if self.suppress_default {
            message.attributes.push(RuleAttribute::SuppressPrefixLen(0));
        }
        message
    }

    /// Reads a rule back; `None` when it has a shape that we do not make.
    fn read(message: &RuleMessage) -> Option<Self> {
        let mut rule = Self {
            priority: 0,
            table: u32::from(message.header.table),
            fwmark: 0,
            suppress_default: false,
        };
        let mut mask = None;
        for attribute in &message.attributes {
            match attribute {
                RuleAttribute::Priority(value) => rule.priority = *value,
                RuleAttribute::Table(value) => rule.table = *value,
                RuleAttribute::FwMark(value) => rule.fwmark = *value,
                RuleAttribute::FwMask(value) => mask = Some(*value),
                RuleAttribute::SuppressPrefixLen(0) => rule.suppress_default = true,
                // The kernel writes "none" as all ones.
                RuleAttribute::SuppressPrefixLen(u32::MAX)
                | RuleAttribute::SuppressIfGroup(u32::MAX)
                | RuleAttribute::Protocol(_) => {}
                RuleAttribute::SuppressPrefixLen(_)
                | RuleAttribute::SuppressIfGroup(_)
                | RuleAttribute::Iifname(_)
                | RuleAttribute::Oifname(_)
                | RuleAttribute::Source(_)
                | RuleAttribute::Destination(_) => return None,
                _ => {}
            }
        }
        let header = &message.header;
        (header.action == RuleAction::ToTable
            && header.flags.contains(RuleFlags::Invert)
            && mask == Some(rule.fwmark))
        .then_some(rule)
    }

    fn text(self) -> String {
        let Self {
            priority, table, ..
        } = self;
        format!("rule {priority} to table {table}")
    }
}

impl Netlink {
    /// Makes the rules of one family that lead to our table, and removes others of ours. A kernel
    /// without IPv6 has none for IPv6. Returns what had to be changed, in words.
    pub async fn sync_rules(&self, spec: &RuleSpec, family: Family) -> Result<Vec<String>, Error> {
        let name = match family {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        };
        let family = address_family(family);
        let Some(present) = self.rules(family).await? else {
            return Ok(Vec::new());
        };
        let change = spec.compare(present);
        for message in change.remove {
            self.remove_rule(message).await?;
        }
        for rule in change.add {
            let request = RouteNetlinkMessage::NewRule(rule.message(family));
            let doing = format!("add {name} {}", rule.text());
            self.request(request, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, &doing)
                .await?;
        }
        let wrong = change.wrong.into_iter();
        Ok(wrong.map(|what| format!("{name}: {what}")).collect())
    }

    /// The rules of one family that end packets before they come to the main table.
    pub async fn dropping_rules(
        &self,
        spec: &RuleSpec,
        family: Family,
    ) -> Result<Vec<DroppingRule>, Error> {
        let present = self.rules(address_family(family)).await?;
        Ok(dropping(&present.unwrap_or_default(), spec, family))
    }

    /// Removes the rules of [`Netlink::sync_rules`]; returns how many there were.
    pub async fn remove_rules(&self, spec: &RuleSpec) -> Result<usize, Error> {
        let mut removed = 0;
        for family in Family::ALL.map(address_family) {
            let present = self.rules(family).await?.unwrap_or_default();
            for message in present.into_iter().filter(|message| spec.owns(message)) {
                self.remove_rule(message).await?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    async fn remove_rule(&self, message: RuleMessage) -> Result<(), Error> {
        let doing = "remove a routing rule of ours";
        let request = RouteNetlinkMessage::DelRule(message);
        match self.request(request, NLM_F_ACK, doing).await {
            Err(error) if error.errno() == libc::ENOENT => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    /// The rules of one family, in the kernel's order; `None` when it lacks the family.
    async fn rules(&self, family: AddressFamily) -> Result<Option<Vec<RuleMessage>>, Error> {
        let mut request = RuleMessage::default();
        request.header.family = family;
        let request = RouteNetlinkMessage::GetRule(request);
        let answers = match self
            .request(request, NLM_F_DUMP, "list routing rules")
            .await
        {
            Ok(answers) => answers,
            Err(error)
                if family == AddressFamily::Inet6
                    && matches!(error.errno(), libc::EAFNOSUPPORT | libc::EOPNOTSUPP) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let messages: Vec<RuleMessage> = answers
            .into_iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewRule(message) => Some(message),
                _ => None,
            })
            .collect();
        // Asked for a family that it lacks, the kernel may list all others instead; and every
        // family that it has begins with rules of its own.
        if !messages
            .iter()
            .any(|message| message.header.family == family)
        {
            return Ok(None);
        }
        let of_family = messages
            .into_iter()
            .filter(|message| message.header.family == family);
        Ok(Some(of_family.collect()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_rule_is_read_as_it_was_written_and_known_as_ours() {
        let spec = RuleSpec::new(51820, 0x1000);
        for rule in spec.wanted(0) {
            let message = rule.message(AddressFamily::Inet);
            assert_eq!(Rule::read(&message), Some(rule));
            assert!(spec.owns(&message));
            let shared = rule.table == MAIN;
            assert_eq!(
                RuleSpec::new(51821, 0x1000).owns(&message),
                shared,
                "{rule:?}"
            );
        }
    }

    #[test]
    fn rules_of_others_are_not_ours() {
        let spec = RuleSpec::new(51820, 0x1000);
        let mut message = spec.wanted(0)[0].message(AddressFamily::Inet);
        message
            .attributes
            .retain(|a| !matches!(a, RuleAttribute::Protocol(_)));
        assert!(!spec.owns(&message));
        message
            .attributes
            .push(RuleAttribute::Protocol(RouteProtocol::Static));
        assert!(!spec.owns(&message));
    }

    #[test]
    fn a_rule_of_another_shape_is_not_taken_for_a_wanted_one() {
        let rule = RuleSpec::new(51820, 0x1000).wanted(0)[2];
        let mut message = rule.message(AddressFamily::Inet6);
        message.header.flags = RuleFlags::empty();
        assert_eq!(Rule::read(&message), None);
        let mut message = rule.message(AddressFamily::Inet6);
        message
            .attributes
            .push(RuleAttribute::Iifname("eth0".into()));
        assert_eq!(Rule::read(&message), None);
    }

    fn kernels(table: u32, priority: u32) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.action = RuleAction::ToTable;
        message.attributes = vec![RuleAttribute::Table(table)];
        if priority != 0 {
            message
                .attributes
                .insert(0, RuleAttribute::Priority(priority));
        }
        message
    }

    /// What the kernel has after a change: it puts a rule behind those with its priority.
    fn after(mut present: Vec<RuleMessage>, change: Change) -> Vec<RuleMessage> {
        present.retain(|message| !change.remove.contains(message));
        for rule in change.add {
            let behind = |message: &RuleMessage| priority(message) > rule.priority;
            let at = present.iter().position(behind).unwrap_or(present.len());
            present.insert(at, rule.message(AddressFamily::Inet));
        }
        present
    }

    #[test]
    fn our_rules_stand_behind_the_way_to_our_own_addresses_wherever_it_is() {
        let spec = RuleSpec::new(51820, 0x1000);
        let main = || kernels(MAIN, 32766);
        let mut present = vec![kernels(LOCAL, 0), main()];
        for (local, wanted) in [
            (0, [5150, 32764, 32765]),
            (1000, [5150, 32764, 32765]),
            (32765, [32765; 3]),
            (6000, [6000, 32764, 32765]),
            (32764, [32764, 32764, 32765]),
            (0, [5150, 32764, 32765]),
        ] {
            // Moved as `ip` does: the new one behind those with its priority, then the old one goes.
            present.retain(|message| !leads_to_own_addresses(message));
            let at = present
                .iter()
                .position(|message| priority(message) > local)
                .unwrap_or(present.len());
            present.insert(at, kernels(LOCAL, local));
            let change = spec.compare(present.clone());
            present = after(present, change);
            let at = |wanted: &dyn Fn(&RuleMessage) -> bool| present.iter().position(wanted);
            let rules = spec.wanted(local);
            assert_eq!(rules.map(|rule| rule.priority), wanted);
            let places = rules.map(|rule| at(&|m| Rule::read(m) == Some(rule)).unwrap());
            assert!(places.is_sorted(), "{local}: {places:?}");
            assert!(at(&leads_to_own_addresses).unwrap() < places[0], "{local}");
            assert!(places[2] < at(&|m| *m == main()).unwrap(), "{local}");
            assert_eq!(present.len(), 5, "{local}");
            assert_eq!(spec.compare(present.clone()), Change::default(), "{local}");
        }
    }

    #[test]
    fn what_is_missing_in_the_middle_comes_back_in_order() {
        let spec = RuleSpec::new(51820, 0x1000);
        let whole: Vec<_> = [kernels(LOCAL, 32765)]
            .into_iter()
            .chain(
                spec.wanted(32765)
                    .map(|rule| rule.message(AddressFamily::Inet)),
            )
            .chain([kernels(MAIN, 32766)])
            .collect();
        for missing in 1..=3 {
            let mut present = whole.clone();
            present.remove(missing);
            let change = spec.compare(present.clone());
            assert_eq!(change.wrong.len(), 1, "{:?}", change.wrong);
            assert_eq!(after(present, change), whole);
        }
        // Made anew in its place, `local` comes behind ours.
        let mut present = whole.clone();
        let local = present.remove(0);
        present.insert(3, local);
        let change = spec.compare(present.clone());
        assert_eq!(after(present, change), whole);
    }

    #[test]
    fn rules_that_drop_are_found_as_far_as_they_come_before_the_main_table() {
        let spec = RuleSpec::new(51820, 0x1000);
        let drop = |action, priority, from: Option<&str>| {
            let mut message = kernels(0, priority);
            message.header.action = action;
            if let Some(from) = from {
                let net: IpNet = from.parse().unwrap();
                message.header.src_len = net.prefix_len();
                message.attributes.push(RuleAttribute::Source(net.addr()));
            }
            message
        };
        let mut marked = drop(RuleAction::Blackhole, 7, None);
        marked.attributes.push(RuleAttribute::FwMark(3));
        let [first, second, third] = spec.wanted(0).map(|r| r.message(AddressFamily::Inet));
        let mut main = kernels(MAIN, 32766);
        main.header.table = MAIN as u8;
        let present = [
            kernels(LOCAL, 0),
            marked,
            drop(RuleAction::Blackhole, 100, Some("100.64.0.0/10")),
            first,
            drop(RuleAction::Unreachable, 6000, None),
            second,
            third,
            main,
            drop(RuleAction::Prohibit, 40_000, None),
        ];
        let found = dropping(&present, &spec, Family::V4);
        let texts: Vec<_> = found.iter().map(|r| (r.text(), r.before_ours)).collect();
        assert_eq!(
            texts,
            [
                ("from 100.64.0.0/10 blackhole".to_owned(), true),
                ("from all unreachable".to_owned(), false)
            ]
        );
        assert_eq!(found[0].priority, 100);
    }

    #[test]
    fn a_rule_with_a_condition_is_not_the_way_to_our_own_addresses() {
        assert!(leads_to_own_addresses(&kernels(LOCAL, 0)));
        assert!(!leads_to_own_addresses(&kernels(MAIN, 0)));
        let mut message = kernels(LOCAL, 7);
        message
            .attributes
            .push(RuleAttribute::Iifname("eth0".into()));
        assert!(!leads_to_own_addresses(&message));
        let mut message = kernels(LOCAL, 7);
        message.header.src_len = 8;
        assert!(!leads_to_own_addresses(&message));
    }
}

//! The rules that lead packets to our routing table.

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Error, Family, Netlink, PROTOCOL, address_family};

/// The mark of underlay packets, one bit: packets that bear it never look up our tables.
///
/// The bit is one that Kubernetes (0x4000, 0x8000), Cilium (0x0f00), Calico (upper half), the AWS
/// VPC CNI (0x80) and Tailscale (0xff0000) leave alone; theirs may stand beside it.
pub const FWMARK: u32 = 0x2000;

/// The main routing table.
const MAIN: u32 = libc::RT_TABLE_MAIN as u32;

/// Priorities of our rules.
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
    /// The mark of underlay packets ([`FWMARK`]); a packet that has all of its bits set is not led
    /// to our table, so that no allowed IP can swallow the tunnel's own packets.
    pub fwmark: u32,
    /// Where among other rules ours stand.
    pub priorities: Priorities,
}

impl RuleSpec {
    /// The usual rules for a table.
    pub fn new(table: u32) -> Self {
        Self {
            table,
            fwmark: FWMARK,
            priorities: Priorities::default(),
        }
    }

    fn wanted(&self) -> [Rule; 3] {
        let rule = |priority, table, suppress_default| Rule {
            priority,
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
        ours && (table == self.table || (table == MAIN && priority == self.priorities.default))
    }
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
        let mut changed = Vec::new();
        let mut missing = spec.wanted().to_vec();
        let Some(present) = self.own_rules(spec, family).await? else {
            return Ok(changed);
        };
        for message in present {
            let same = Rule::read(&message)
                .and_then(|rule| missing.iter().position(|wanted| *wanted == rule));
            match same {
                Some(at) => drop(missing.swap_remove(at)),
                None => self.remove_rule(message).await?,
            }
        }
        for rule in missing {
            let request = RouteNetlinkMessage::NewRule(rule.message(family));
            let doing = format!("add {name} {}", rule.text());
            self.request(request, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, &doing)
                .await?;
            changed.push(format!("{name}: {} was missing", rule.text()));
        }
        Ok(changed)
    }

    /// Removes the rules of [`Netlink::sync_rules`]; returns how many there were.
    pub async fn remove_rules(&self, spec: &RuleSpec) -> Result<usize, Error> {
        let mut removed = 0;
        for family in Family::ALL.map(address_family) {
            for message in self.own_rules(spec, family).await?.unwrap_or_default() {
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

    /// Our rules of one family; `None` when the kernel lacks the family.
    async fn own_rules(
        &self,
        spec: &RuleSpec,
        family: AddressFamily,
    ) -> Result<Option<Vec<RuleMessage>>, Error> {
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
        let ours = messages
            .into_iter()
            .filter(|message| message.header.family == family && spec.owns(message));
        Ok(Some(ours.collect()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_rule_is_read_as_it_was_written_and_known_as_ours() {
        let spec = RuleSpec::new(51820);
        for rule in spec.wanted() {
            let message = rule.message(AddressFamily::Inet);
            assert_eq!(Rule::read(&message), Some(rule));
            assert!(spec.owns(&message));
            let shared = rule.table == MAIN;
            assert_eq!(RuleSpec::new(51821).owns(&message), shared, "{rule:?}");
        }
    }

    #[test]
    fn rules_of_others_are_not_ours() {
        let spec = RuleSpec::new(51820);
        let mut message = spec.wanted()[0].message(AddressFamily::Inet);
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
        let rule = RuleSpec::new(51820).wanted()[2];
        let mut message = rule.message(AddressFamily::Inet6);
        message.header.flags = RuleFlags::empty();
        assert_eq!(Rule::read(&message), None);
        let mut message = rule.message(AddressFamily::Inet6);
        message
            .attributes
            .push(RuleAttribute::Iifname("eth0".into()));
        assert_eq!(Rule::read(&message), None);
    }
}

//! The one list of what can become of a packet.

/// What the outermost function of a program does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The fast path carries it.
    Forward,
    /// The kernel stack carries it, on purpose.
    Slow,
    /// It is none of ours: the stack gets it untouched.
    Pass,
    /// It ends here.
    Drop,
    /// It ends here, and its sender is told.
    Reject,
}

/// Makes a list of verdicts: an enum with counter index, metric label, text and class of each.
macro_rules! verdicts {
    (
        $(#[$meta:meta])*
        enum $list:ident;
        $($name:ident $class:ident $label:literal $text:literal;)*
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum $list {
            $(#[doc = $text] $name,)*
        }

        impl $list {
            /// Every verdict, in the order of the counters.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// Metric label.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)* }
            }

            /// One sentence for people.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// What the program does.
            #[inline(always)]
            pub const fn class(self) -> $crate::verdict::Class {
                match self { $(Self::$name => $crate::verdict::Class::$class,)* }
            }
        }
    };
}
pub(crate) use verdicts;

verdicts! {
    /// What became of a packet. The order is part of the map ABI.
    enum Verdict;
    Forwarded Forward "forwarded" "Carried by the fast path.";
    PassUnrelated Pass "pass_unrelated" "Not a packet between subnet and overlay; the underlay is most of it.";
    SlowNotRouted Slow "slow_not_routed" "The subnet side of the packet is in no advertised route.";
    SlowStackRoute Slow "slow_stack_route" "The route is marked for the kernel stack.";
    SlowSnat Slow "slow_snat" "The kernel translates the sources of this route: the link has no external address of the family.";
    SlowNoFlow Slow "slow_no_flow" "In the middle of a TCP connection, or an ICMP error about a packet, of no flow here; the kernel may know it.";
    SlowScope Slow "slow_scope" "Multicast, broadcast or loopback address, or a link-local one of the subnet side.";
    SlowFragment Slow "slow_fragment" "A fragment.";
    SlowOptions Slow "slow_options" "IPv4 options or an IPv6 extension header.";
    SlowProtocol Slow "slow_protocol" "Neither TCP, UDP nor ICMP.";
    SlowTransport Slow "slow_transport" "The transport header is cut short or impossible.";
    SlowTtl Slow "slow_ttl" "The TTL ends here, and the kernel sends the ICMP error.";
    SlowMtu Slow "slow_mtu" "Too big for the way on; the kernel fragments it or sends the ICMP error.";
    SlowToRouter Slow "slow_to_router" "The kernel would not forward it: an address or a connection of the router itself, or no route.";
    SlowNoNeighbour Slow "slow_no_neighbour" "The next hop's hardware address is not known yet; the kernel resolves it.";
    SlowOtherLink Slow "slow_other_link" "The kernel's route leads to an interface that the programs are not attached to.";
    SlowFib Slow "slow_fib" "The kernel's routing refuses it or needs more than a header: forwarding off, blackhole, prohibit, encapsulation.";
    DropSpoofed Drop "drop_spoofed" "From the tunnel, with a source that is no peer's, or an ICMP error about another peer's packet.";
    DropLinkLocal Drop "drop_link_local" "From the tunnel, to or from a link-local address or a cloud's metadata service, which nobody reaches through this router.";
    DropMalformed Drop "drop_malformed" "From the tunnel, and not a whole IP packet.";
    DropPolicy Drop "drop_policy" "Of a flow that no rule of the policy allows.";
    DropDraining Drop "drop_draining" "A new flow, and the router drains: another one is to carry it.";
    DropSourceLimit Drop "drop_source_limit" "A new flow of a peer, or of the subnet side, that has as many as it may.";
    DropTableFull Drop "drop_table_full" "A new flow, and the flow table is full.";
    DropNatExhausted Drop "drop_nat_exhausted" "A new flow, and no port is free to translate it to; or one whose port the router itself has got.";
    DropFragment Drop "drop_fragment" "A fragment that came before the first one, which has the ports.";
    DropTooBig Drop "drop_too_big" "Too big for the way on; an ICMP error is sent unless there are too many.";
    DropTtl Drop "drop_ttl" "The TTL of a reply to a translated flow ends here; an ICMP error is sent unless there are too many.";
    DropOtherLink Drop "drop_other_link" "Of a translated flow whose way now leads to an interface that the programs are not attached to.";
    DropInternal Drop "drop_internal" "The kernel could not change the packet (no memory).";
    RejectPolicy Reject "reject_policy" "Of a flow that no rule of the policy allows; an RST or an ICMP error is sent.";
}

impl Verdict {
    /// Whether user space is told of such packets ([`crate::abi::Denied`]): those of flows that are not let
    /// through.
    #[inline(always)]
    pub const fn is_denied(self) -> bool {
        matches!(
            self,
            Self::DropSpoofed
                | Self::DropLinkLocal
                | Self::DropPolicy
                | Self::DropDraining
                | Self::DropSourceLimit
                | Self::DropTableFull
                | Self::DropNatExhausted
                | Self::RejectPolicy
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_explained_to_operators() {
        let text = include_str!("../../docs/packet-flow.md");
        let section = text
            .split("## Verdicts of the kernel")
            .next()
            .unwrap_or_default();
        for verdict in Verdict::ALL {
            let row = format!("\n| `{}` | ", verdict.label());
            assert!(section.contains(&row), "docs/packet-flow.md: {verdict:?}");
        }
        let rows = section.lines().filter(|line| line.starts_with("| `"));
        let programs = 4;
        assert_eq!(rows.count(), programs + Verdict::ALL.len(), "one too many");
    }

    #[test]
    fn labels_are_unique_and_tell_the_class() {
        for (index, verdict) in Verdict::ALL.iter().enumerate() {
            assert_eq!(*verdict as usize, index);
            let prefix = match verdict.class() {
                Class::Forward => "forwarded",
                Class::Slow => "slow_",
                Class::Pass => "pass_",
                Class::Drop => "drop_",
                Class::Reject => "reject_",
            };
            assert!(verdict.label().starts_with(prefix), "{verdict:?}");
            let twins = Verdict::ALL
                .iter()
                .filter(|v| v.label() == verdict.label())
                .count();
            assert_eq!(twins, 1, "{verdict:?}");
        }
    }
}

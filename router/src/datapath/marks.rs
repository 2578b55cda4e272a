//! Bits of the firewall mark (`skb->mark`) that are ours. All others are others': they are neither
//! looked at nor changed.

/// Our bits, one for each purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// Of underlay packets, which must not look up our routing table.
    pub underlay: u32,
    /// Of packets that the eBPF programs hand to the kernel in the middle of a flow of theirs.
    pub handed_over: u32,
    /// Of packets that the eBPF programs hand to the kernel and that the policy would let begin a flow.
    /// Together with `handed_over`: of those that it would not, but that may be of a flow which the other
    /// end may open. Our ruleset takes both off where it asks about new flows.
    pub permitted: u32,
}

/// Bits that none of these looks at: kube-proxy (0x4000, 0x8000), Cilium (0x0f00, upper half), Calico
/// (upper half), the AWS VPC CNI (0x80), Istio's ztunnel (0x0fff), Tailscale (0xff0000). The port
/// mapping of CNI and Podman has 0x2000, in the first packet of a flow that it translates and after
/// our table has looked; what is handed over is kept out of translation.
impl Default for Marks {
    fn default() -> Self {
        Self {
            underlay: 0x1000,
            handed_over: 0x2000,
            permitted: 0x40,
        }
    }
}

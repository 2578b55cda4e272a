//! What forwards the packets of a bed.

use std::time::Duration;

use anyhow::Context as _;
use lab::Host;
use router::control::{Route, RouteMode};
use router::datapath::ebpf::{Ebpf, Options};
use router::datapath::kernel::Kernel;
use router::datapath::{Datapath as _, Link, Spec};
use router_ebpf::abi::Side;
use router_ebpf::verdict::Verdict;

use super::bed::{Direction, NIC, ROUTER, TUN};
use super::frame::MTU;
use crate::case::Implementation;

/// A way of forwarding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing is forwarded: the first device drops what the generator sends.
    Drop,
    /// The kernel's forwarding alone, without translation.
    Kernel,
    /// The kernel with masquerade and MSS clamp by nf_tables.
    KernelNft,
    /// Sluice's kernel datapath, with masquerade and MSS clamp.
    SluiceKernel,
    /// Sluice's fast path, without translation.
    SluiceFast,
    /// Sluice's fast path with source NAT.
    SluiceFastNat,
}

impl Kind {
    pub(super) const ALL: [Self; 6] = [
        Self::Drop,
        Self::Kernel,
        Self::KernelNft,
        Self::SluiceKernel,
        Self::SluiceFast,
        Self::SluiceFastNat,
    ];

    pub(super) fn implementation(self, kernel: &str) -> Implementation {
        match self {
            Self::Drop => Implementation::peer("generator alone", kernel),
            Self::Kernel => Implementation::peer("kernel", kernel),
            Self::KernelNft => Implementation::peer(super::REFERENCE, kernel),
            Self::SluiceKernel => Implementation::sluice("kernel path, NAT"),
            Self::SluiceFast => Implementation::sluice("fast path"),
            Self::SluiceFastNat => Implementation::sluice("fast path, NAT"),
        }
    }

    /// Why it cannot be done here.
    pub(super) fn missing(self) -> Option<String> {
        match self {
            Self::SluiceFast | Self::SluiceFastNat => {
                Ebpf::support().err().map(|error| error.to_string())
            }
            _ => None,
        }
    }

    /// Whether what comes out bears the router's address.
    pub(super) fn translates(self) -> bool {
        match self {
            Self::KernelNft | Self::SluiceKernel | Self::SluiceFastNat => true,
            Self::Drop | Self::Kernel | Self::SluiceFast => false,
        }
    }

    fn spec(self, tun: u32, nic: u32) -> Option<Spec> {
        if matches!(self, Self::Drop | Self::Kernel | Self::KernelNft) {
            return None;
        }
        let external = match self {
            Self::SluiceFastNat => [(nic, vec![ROUTER.into()].into())].into(),
            _ => Default::default(),
        };
        let link = |index, name: &str| Link {
            index,
            name: name.to_owned(),
        };
        Some(Spec {
            tun: link(tun, TUN),
            mtu: MTU as u16,
            subnet: vec![link(nic, NIC)],
            overlay: [(super::OVERLAY, 0)].into(),
            routes: vec![Route {
                cidr: super::SUBNET,
                snat: self.translates(),
                mode: RouteMode::Fast,
            }],
            external,
            ..Spec::default()
        })
    }

    /// MSS that a SYN with 1460 must leave with.
    pub(super) fn mss(self) -> u16 {
        match self {
            Self::Drop | Self::Kernel => 1460,
            Self::KernelNft | Self::SluiceKernel | Self::SluiceFast | Self::SluiceFastNat => {
                MTU as u16 - 40
            }
        }
    }
}

/// What was installed in a router, to forward and to count.
pub(super) struct Forwarder {
    kind: Kind,
    /// Held as long as it is to be in force, like the next.
    _kernel: Option<Kernel>,
    ebpf: Option<Ebpf>,
}

impl Forwarder {
    /// Makes `router` forward between its devices of these indexes.
    pub(super) fn install(kind: Kind, router: &Host, tun: u32, nic: u32) -> anyhow::Result<Self> {
        match kind {
            Kind::Drop => {
                for device in [TUN, NIC] {
                    super::bed::drop_and_count(router, device)?;
                }
            }
            Kind::KernelNft => {
                let rules = format!(
                    "table ip bench {{
                        chain nat {{ type nat hook postrouting priority srcnat;
                            iifname {TUN} oifname {NIC} masquerade; }}
                        chain clamp {{ type filter hook forward priority mangle;
                            tcp flags syn tcp option maxseg size set rt mtu; }}
                    }}"
                );
                let nft = router.command(["nft", "-f", "-"]).stdin(rules);
                nft.run().context("install masquerade and MSS clamp")?;
            }
            Kind::Kernel | Kind::SluiceKernel | Kind::SluiceFast | Kind::SluiceFastNat => {}
        }
        let mut forwarder = Self {
            kind,
            _kernel: None,
            ebpf: None,
        };
        if let Some(spec) = kind.spec(tun, nic) {
            // As the daemon does: the kernel datapath always, the other over it.
            let mut kernel = Kernel::new(TUN);
            router.enter(|| kernel.apply(&spec))??;
            forwarder._kernel = Some(kernel);
            if kind != Kind::SluiceKernel {
                // Nobody but this bench settles flows, and none ends.
                let mut ebpf = Ebpf::load_with(Options {
                    sweep: false,
                    ..Options::default()
                })?;
                router.enter(|| ebpf.apply(&spec))??;
                forwarder.ebpf = Some(ebpf);
            }
        }
        Ok(forwarder)
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// Has the flows that were opened settle, as the sweeper does within seconds with flows in use.
    pub(super) fn settle(&mut self) -> anyhow::Result<()> {
        match &mut self.ebpf {
            Some(ebpf) => Ok(ebpf.settle_flows()?),
            None => Ok(()),
        }
    }

    /// Frames that the fast path has forwarded so far, by its own counters; `None` for what has no
    /// fast path.
    pub(super) fn fast(&self, direction: Direction) -> anyhow::Result<Option<u64>> {
        let Some(ebpf) = &self.ebpf else {
            return Ok(None);
        };
        let side = side(direction);
        let counters = ebpf.counters()?;
        let forwarded = counters
            .iter()
            .filter(|c| c.program == side.label() && c.verdict == Verdict::Forwarded.label());
        Ok(Some(forwarded.map(|c| c.packets).sum()))
    }

    /// How long the program of `direction` has run so far in all, and how often, while somebody
    /// held [`aya::sys::enable_stats`]; `None` for what has no fast path.
    pub(super) fn run_time(&self, direction: Direction) -> anyhow::Result<Option<(Duration, u64)>> {
        let Some(ebpf) = &self.ebpf else {
            return Ok(None);
        };
        let info = ebpf.program(side(direction))?.info()?;
        Ok(Some((info.run_time(), info.run_count())))
    }
}

fn side(direction: Direction) -> Side {
    match direction {
        Direction::Up => Side::Overlay,
        Direction::Down => Side::Subnet,
    }
}

//! A router with loaded programs, in a namespace whose routing the tests know by heart.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, ensure};
use aya::maps::{Map, MapData, PerCpuArray, PerCpuValues};
use aya::programs::{TestRun, TestRunOptions};
use aya::util::{KernelVersion, nr_cpus};
use lab::{Host, Lab};
use router::control::{Route, RouteMode};
use router::datapath::ebpf::{AttachMode, Ebpf, Options};
use router::datapath::{Datapath, Link, Spec};
use router_ebpf::abi::{BUDGETS, Budget, Side};
use router_ebpf::verdict::Verdict;

pub(super) const MTU: u16 = 1420;
pub(super) const LINK_MTU: u16 = 1500;
/// MTU of the kernel's route to [`Net::NARROW`].
pub(super) const NARROW_MTU: u16 = 1300;

/// `TC_ACT_UNSPEC`, `TC_ACT_SHOT`, `TC_ACT_REDIRECT`.
pub(super) const NEXT: u32 = u32::MAX;
pub(super) const SHOT: u32 = 2;
pub(super) const REDIRECT: u32 = 7;

/// Address families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

pub(super) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

impl Family {
    pub(super) fn overlay(self, host: u8) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(100, 64, 0, host).into(),
            Self::V6 => Ipv6Addr::new(0xfd64, 0, 0, 0, 0, 0, 0, host.into()).into(),
        }
    }

    pub(super) fn subnet(self, net: Net, host: u8) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(10, net.0, 0, host).into(),
            // Its decimal digits, so that both families read alike.
            Self::V6 => {
                let digits = u16::from(net.0 / 10 * 16 + net.0 % 10);
                Ipv6Addr::new(0x2001, 0xdb8, digits, 0, 0, 0, 0, host.into()).into()
            }
        }
    }

    /// An address that is nobody's.
    pub(super) fn foreign(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(192, 0, 2, 7).into(),
            Self::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 7).into(),
        }
    }
}

/// A network on the subnet side, by its number in the addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Net(pub u8);

impl Net {
    /// Connected to eth0.
    pub(super) const NEAR: Self = Self(20);
    /// Its sources are translated.
    pub(super) const SNAT: Self = Self(30);
    /// Marked for the kernel stack.
    pub(super) const STACK: Self = Self(40);
    /// Behind an interface without a program.
    pub(super) const ELSEWHERE: Self = Self(50);
    /// Prohibited by the kernel's routing.
    pub(super) const PROHIBITED: Self = Self(60);
    /// Behind a gateway, with a small MTU (locked: only then does the kernel tell it to programs).
    pub(super) const NARROW: Self = Self(70);
    /// Behind a gateway that nobody has heard of.
    pub(super) const UNRESOLVED: Self = Self(80);

    const ALL: [Self; 7] = [
        Self::NEAR,
        Self::SNAT,
        Self::STACK,
        Self::ELSEWHERE,
        Self::PROHIBITED,
        Self::NARROW,
        Self::UNRESOLVED,
    ];
}

/// The router's host number in every network, and the gateway's in [`Net::NEAR`].
pub(super) const ROUTER: u8 = 10;
pub(super) const GATEWAY: u8 = 20;
pub(super) const PEER: u8 = 2;

/// What a program made of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) code: u32,
    pub(super) verdict: Verdict,
    pub(super) bytes: Vec<u8>,
}

/// The router.
pub(super) struct Fixture {
    pub(super) ebpf: Ebpf,
    pub(super) spec: Spec,
    /// Hardware addresses of eth0 and of the gateway.
    pub(super) mac: [u8; 6],
    pub(super) gateway_mac: [u8; 6],
}

/// What makes the TUN device.
pub(super) const TUN: [&str; 6] = [
    "tuntap add dev tun0 mode tun",
    "link set tun0 mtu 1420 up",
    "address add 100.64.0.1/32 dev tun0",
    "address add fd64::1/128 dev tun0 nodad",
    "route add 100.64.0.0/24 dev tun0",
    "route add fd64::/64 dev tun0",
];

/// Builds the router's namespace; the subnet behind it is empty.
pub(super) fn router(lab: &Lab) -> anyhow::Result<Host> {
    let (router, subnet) = (lab.host("router")?, lab.host("subnet")?);
    // A host that sends nothing by itself, so that the counters tell of the tests' packets alone.
    subnet.sysctl("net/ipv6/conf/all/disable_ipv6", "1")?;
    subnet.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
    lab.link(
        router
            .port("eth0")
            .address("10.20.0.10/24")
            .address("2001:db8:20::a/64"),
        subnet.port("eth0"),
    )?;
    lab.link(
        router
            .port("eth1")
            .address("10.50.0.10/16")
            .address("2001:db8:50::a/64"),
        subnet.port("eth1"),
    )?;
    for words in TUN.iter().chain(&[
        "neighbour add 10.50.0.20 lladdr 02:00:00:00:01:20 dev eth1 nud permanent",
        "neighbour add 2001:db8:50::14 lladdr 02:00:00:00:01:20 dev eth1 nud permanent",
        "link set eth0 address 02:00:00:00:00:10",
        "neighbour add 10.20.0.20 lladdr 02:00:00:00:00:20 dev eth0 nud permanent",
        "neighbour add 2001:db8:20::14 lladdr 02:00:00:00:00:20 dev eth0 nud permanent",
        "route add prohibit 10.60.0.0/16",
        "route add prohibit 2001:db8:60::/64",
        "route add 10.70.0.0/16 via 10.20.0.20 mtu lock 1300",
        "route add 2001:db8:70::/64 via 2001:db8:20::14 mtu lock 1300",
        "route add 10.30.0.0/16 via 10.20.0.20",
        "route add 2001:db8:30::/64 via 2001:db8:20::14",
        "route add 10.80.0.0/16 via 10.20.0.80",
        "route add 2001:db8:80::/64 via 2001:db8:20::80",
    ]) {
        router.ip(words)?;
    }
    router.sysctl("net/ipv4/ip_forward", "1")?;
    router.sysctl("net/ipv6/conf/all/forwarding", "1")?;
    Ok(router)
}

/// Whether this kernel has tcx.
pub(super) fn has_tcx() -> bool {
    kernel_is(KernelVersion::new(6, 6, 0))
}

/// Whether this kernel's FIB lookup tells the path's MTU.
pub(super) fn has_fib_mtu() -> bool {
    kernel_is(KernelVersion::new(5, 12, 0))
}

fn kernel_is(least: KernelVersion) -> bool {
    KernelVersion::current().is_ok_and(|version| version >= least)
}

/// An interface by its name, in the thread's namespace.
pub(super) fn link(name: &str) -> anyhow::Result<Link> {
    let c_name = std::ffi::CString::new(name)?;
    // SAFETY: the pointer is that of a live C string.
    let index = unsafe { libc::if_nametoindex(c_name.as_ptr()) };
    ensure!(index != 0, "no interface {name}");
    Ok(Link {
        index,
        name: name.to_owned(),
    })
}

impl Fixture {
    /// Loads the programs and puts [`Fixture::spec`] in force. Call it inside the router.
    pub(super) fn new(mode: Option<AttachMode>) -> anyhow::Result<Self> {
        Self::new_on("eth0", mode)
    }

    /// As [`Fixture::new`], with another subnet-side NIC than eth0.
    pub(super) fn new_on(nic: &str, mode: Option<AttachMode>) -> anyhow::Result<Self> {
        let options = Options {
            attach: mode,
            sweep: false,
            ..Options::default()
        };
        Self::with(nic, options)
    }

    /// As [`Fixture::new_on`], with other options.
    pub(super) fn with(nic: &str, options: Options) -> anyhow::Result<Self> {
        let mut routes = Vec::new();
        for net in Net::ALL {
            for (family, len) in [(Family::V4, 16), (Family::V6, 64)] {
                routes.push(Route {
                    cidr: ipnet::IpNet::new(family.subnet(net, 0), len)?,
                    snat: net == Net::SNAT,
                    mode: if net == Net::STACK {
                        RouteMode::Stack
                    } else {
                        RouteMode::Fast
                    },
                });
            }
        }
        let nic = link(nic)?;
        let external = FAMILIES.map(|family| family.subnet(Net::NEAR, ROUTER));
        let spec = Spec {
            tun: link("tun0")?,
            mtu: MTU,
            external: [(nic.index, external.to_vec().into())].into(),
            subnet: vec![nic],
            overlay: [("100.64.0.0/24".parse()?, 0), ("fd64::/64".parse()?, 0)].into(),
            own: FAMILIES.map(|family| family.overlay(1)).into(),
            routes,
            // So that the tests' ports are kept.
            local_ports: Some(61_000..=65_535),
            ..Spec::default()
        };
        let mut ebpf = Ebpf::load_with(options)?;
        ebpf.apply(&spec)?;
        Ok(Self {
            ebpf,
            spec,
            mac: [2, 0, 0, 0, 0, 0x10],
            gateway_mac: [2, 0, 0, 0, 0, 0x20],
        })
    }

    /// Puts a changed specification in force.
    pub(super) fn change(&mut self, change: impl FnOnce(&mut Spec)) -> anyhow::Result<()> {
        change(&mut self.spec);
        Ok(self.ebpf.apply(&self.spec)?)
    }

    /// Runs the program of `side` on a packet (with its Ethernet header on the subnet side) that
    /// came in by tun0 or eth0, and checks that exactly one counter tells of it.
    pub(super) fn run(
        &mut self,
        side: Side,
        bytes: &[u8],
        gso_size: u32,
    ) -> anyhow::Result<Outcome> {
        let before = counted(&self.ebpf)?;
        let (code, out) = self.test_run(side, bytes, gso_size)?;
        let after = counted(&self.ebpf)?;
        let mut moved = (0..before.len()).filter(|n| before[*n] != after[*n]);
        let (Some(slot), None) = (moved.next(), moved.next()) else {
            anyhow::bail!("not exactly one counter has moved");
        };
        let packets = after[slot].0 - before[slot].0;
        let counted_bytes = after[slot].1 - before[slot].1;
        let len = bytes.len().saturating_sub(side.header_offset() as usize);
        ensure!(packets == 1, "{packets} packets counted");
        ensure!(
            counted_bytes == len as u64,
            "{counted_bytes} bytes counted of {len}"
        );
        let verdict = Verdict::ALL
            .iter()
            .find(|verdict| side.counter(**verdict) == slot as u32)
            .context("counted for the other program")?;
        Ok(Outcome {
            code,
            verdict: *verdict,
            bytes: out,
        })
    }

    /// Runs the program of `side` and yields its return code and the packet's bytes afterwards.
    pub(super) fn test_run(
        &self,
        side: Side,
        bytes: &[u8],
        gso_size: u32,
    ) -> anyhow::Result<(u32, Vec<u8>)> {
        let ingress = match side {
            Side::Overlay => self.spec.tun.index,
            Side::Subnet => self.spec.subnet[0].index,
        };
        let mut out = vec![0; bytes.len() + 256];
        let result = self.ebpf.program(side)?.test_run(TestRunOptions {
            data_in: Some(bytes),
            data_out: Some(&mut out),
            ctx_in: Some(&context(ingress, gso_size)),
            ..TestRunOptions::default()
        })?;
        out.truncate(result.data_size_out as usize);
        Ok((result.return_value, out))
    }
}

/// A map of the loaded programs, by its name.
pub(super) fn map(ebpf: &Ebpf, name: &str) -> anyhow::Result<Map> {
    let info = ebpf.program(Side::Overlay)?.info()?;
    for id in info.map_ids()?.context("the kernel tells no maps")? {
        let data = MapData::from_id(id)?;
        if data.info()?.name_as_str() == Some(name) {
            return Ok(Map::from_map_data(data)?);
        }
    }
    anyhow::bail!("the programs have no map {name}")
}

/// Has the programs take so many ns of `CLOCK_MONOTONIC` for the time at which a budget is used up.
pub(super) fn use_up(fixture: &Fixture, budget: Budget, until: u64) -> anyhow::Result<()> {
    let mut budgets: PerCpuArray<MapData, u64> = map(&fixture.ebpf, BUDGETS)?.try_into()?;
    let cpus = nr_cpus().map_err(|(_, error)| error)?;
    let values = PerCpuValues::try_from(vec![until; cpus])?;
    Ok(budgets.set(budget as u32, values, 0)?)
}

/// All counters, in the order of their slots.
fn counted(ebpf: &Ebpf) -> anyhow::Result<Vec<(u64, u64)>> {
    let counters = ebpf.counters()?;
    Ok(counters.iter().map(|c| (c.packets, c.bytes)).collect())
}

/// A `struct __sk_buff` (linux/bpf.h) as TEST_RUN takes it.
fn context(ifindex: u32, gso_size: u32) -> [u8; 192] {
    let mut context = [0; 192];
    context[40..44].copy_from_slice(&ifindex.to_ne_bytes());
    context[176..180].copy_from_slice(&gso_size.to_ne_bytes());
    context
}

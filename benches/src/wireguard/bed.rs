//! The network that a router is measured in: client, router, server, a namespace each.
//!
//! The router has a CPU to itself and everything else runs on the others: the programs are pinned,
//! and receive packet steering moves the softirq work of the router's NICs to its CPU, as their
//! interrupts would. So what that CPU did is what the router cost, in the process and in the kernel
//! alike.
//!
//! What client and server receive is worked off where it is sent, up to their sockets. Steering it
//! away would cost the router an interrupt to the other CPU for nearly every send, which on a
//! virtual machine is dearer than the work itself and like nothing that a NIC would ask of it.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use anyhow::Context as _;
use lab::{Host, Keypair, Lab, Process, Server, Tunnel, Wireguard};
use router::wireguard::keys::PublicKey;

use super::blast::Blast;
use super::programs::Program;
use super::router::{Job, PORT, Router, key_pair};
use crate::cpu::{self, Cores, Snapshot, Usage};
use crate::generator::{Generator, Peer, Target};
use crate::scale::crowd::Crowd;

const UNDERLAY_CLIENT: &str = "192.0.2.1";
const UNDERLAY_ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const ROUTER_INSIDE: &str = "10.80.0.1";
/// The server behind the router.
pub(super) const SERVER: Ipv4Addr = Ipv4Addr::new(10, 80, 0, 2);
const NETWORK: &str = "10.80.0.0/24";
const OVERLAY: &str = "100.64.0.0/10";
const OVERLAY_ROUTER: &str = "100.64.0.1/10";
const OVERLAY_CLIENT: &str = "100.64.0.2/32";
/// Tunnel MTU in bytes, what WireGuard's tools choose on Ethernet.
const MTU: u16 = 1420;
/// UDP port of the echo server.
pub(super) const ECHO: u16 = 7;
/// Where the generator's packets go.
const SINK: u16 = 9;
/// Peers that the generator can play where their number is not what is measured.
pub(super) const PEERS: u16 = 64;
/// UDP port of the first of them.
const FIRST_PEER_PORT: u16 = 20_000;
/// Before the address of the first of them.
const BEFORE_PEERS: Ipv4Addr = Ipv4Addr::new(100, 127, 1, 0);

/// Where programs run.
#[derive(Clone, Debug)]
pub(super) enum Placement {
    /// The router on a CPU of its own, all else on the others: for costs.
    Apart(Cores),
    /// Wherever the scheduler puts them: for what the machine as a whole can carry.
    Free,
}

/// A router in its network. Fields are in the order in which they must go.
pub(super) struct Bed {
    router: Router,
    key: Keypair,
    peers: Vec<Peer>,
    tunnel: Wireguard,
    _iperf: Process,
    _echo: Server,
    pub(super) client: Host,
    pub(super) server: Host,
    host: Host,
    placement: Placement,
    _lab: Lab,
}

/// What the router used while something was done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    /// Time that the router's CPU was busy.
    pub(super) cpu: Duration,
    /// Time that went by.
    pub(super) elapsed: Duration,
}

impl Bed {
    /// Builds the network, and starts `program` as its router, with `crowd` in its
    /// configuration if it is Sluice, and `client` as its client. `peers` is how many the generator
    /// can play.
    pub(super) fn new(
        program: &Program,
        client: &[std::ffi::OsString],
        placement: Placement,
        crowd: Crowd,
        peers: u16,
    ) -> anyhow::Result<Self> {
        let lab = Lab::new()?;
        let (laptop, host, server) = (
            lab.host("client")?,
            lab.host("router")?,
            lab.host("server")?,
        );
        lab.link(
            laptop
                .port("eth0")
                .address(&format!("{UNDERLAY_CLIENT}/24")),
            host.port("wan").address(&format!("{UNDERLAY_ROUTER}/24")),
        )?;
        lab.link(
            host.port("lan").address(&format!("{ROUTER_INSIDE}/24")),
            server.port("eth0").address(&format!("{SERVER}/24")),
        )?;
        host.route("default", UNDERLAY_CLIENT)?;
        // For a router that does not translate sources.
        server.route(OVERLAY, ROUTER_INSIDE)?;

        let (router_cpus, end_cpus) = match &placement {
            Placement::Apart(cores) => {
                steer(&host, &["wan", "lan"], &[cores.router])?;
                (Some(vec![cores.router]), cores.ends.clone())
            }
            Placement::Free => (None, cpu::affinity()?),
        };
        let _pinned = Pinned::to(&end_cpus)?;

        let (mut key, client_key) = (key_pair()?, key_pair()?);
        let mut keys = vec![(client_key.public.clone(), OVERLAY_CLIENT.to_owned())];
        let mut played = Vec::new();
        for n in 1..=peers {
            let private =
                router::wireguard::keys::PrivateKey::generate().context("generate a key")?;
            let address = Ipv4Addr::from_bits(BEFORE_PEERS.to_bits() + u32::from(n));
            keys.push((private.public().to_string(), format!("{address}/32")));
            played.push(Peer { private, address });
        }
        let router = Router::start(
            program,
            &Job {
                host: &host,
                key: &key,
                address: OVERLAY_ROUTER,
                mtu: MTU,
                peers: &keys,
                network: NETWORK,
                lan: "lan",
                clamp: true,
                cpus: router_cpus.as_deref(),
                crowd,
            },
        )?;
        if let Some(own) = router.own_key()? {
            key.public = own;
        }
        let endpoint = SocketAddr::from((UNDERLAY_ROUTER, PORT));
        let tunnel = Tunnel::new(&client_key)
            .address(OVERLAY_CLIENT)
            .mtu(MTU.into())
            .peer(&key.public, endpoint, [NETWORK]);
        let tunnel = laptop
            .wireguard_program(client, &tunnel)
            .context("the client's tunnel")?;
        let iperf = server.spawn("iperf3", server.command(["iperf3", "--server"]))?;
        let echo = server.udp_echo(ECHO)?;
        let bed = Self {
            router,
            key,
            peers: played,
            tunnel,
            _iperf: iperf,
            _echo: echo,
            client: laptop,
            server,
            host,
            placement,
            _lab: lab,
        };
        if !bed.client.pings(&SERVER.to_string(), &[])? {
            anyhow::bail!(
                "no ping passes from the client to the server; the client's log: {}",
                bed.tunnel.log()
            );
        }
        Ok(bed)
    }

    /// Has the uplink's receive path run as a real NIC's does, in a polling loop of its own (here a
    /// kernel thread) on the router's CPU. What a program drops in it is then among the router's
    /// cost, and what the stack takes is merged as a NIC's would be.
    pub(super) fn uplink_like_a_nic(&self, cores: &Cores) -> anyhow::Result<()> {
        let before = cpu::processes_named("napi/wan-")?;
        self.host.run(["ethtool", "-K", "wan", "gro", "on"])?;
        // A veth goes past the polling loop with what may be a super-packet, and a wire has none.
        self.client
            .run(["ethtool", "-K", "eth0", "tso", "off", "gso", "off"])?;
        steer(&self.host, &["wan"], &[])?;
        in_sys(&self.host, "echo 1 > /sys/class/net/wan/threaded")?;
        let mut pinned = false;
        for thread in cpu::processes_named("napi/wan-")? {
            if !before.contains(&thread) {
                cpu::pin_process(thread, &[cores.router])?;
                pinned = true;
            }
        }
        anyhow::ensure!(pinned, "the uplink has no polling thread");
        Ok(())
    }

    /// A flood of forged data messages at the uplink, from addresses from `first` on.
    pub(super) fn blast(
        &self,
        first: Ipv4Addr,
        per_second: u32,
        junk: bool,
    ) -> anyhow::Result<Blast<'_>> {
        let from = SocketAddr::from((first, PORT));
        let cable = ((&self.client, "eth0"), (&self.host, "wan"));
        Blast::new(
            cable.0,
            cable.1,
            from,
            self.endpoint().into(),
            per_second,
            junk,
        )
    }

    /// How many frames the cable to the router did not take so far.
    pub(super) fn not_taken(&self) -> anyhow::Result<u64> {
        const DROPPED: usize = 11;
        let devices = read_in_proc(&self.client, "net/dev")?;
        let counters = devices
            .lines()
            .find_map(|line| line.trim_start().strip_prefix("eth0:"))
            .and_then(|counters| counters.split_whitespace().nth(DROPPED));
        counters
            .and_then(|dropped| dropped.parse().ok())
            .context("the client's NIC has no counters")
    }

    /// Has the router end in favour of the next daemon, which is started.
    pub(super) fn hand_over(&mut self) -> anyhow::Result<()> {
        let _pinned = match &self.placement {
            Placement::Apart(cores) => Some(Pinned::to(&[cores.router])?),
            Placement::Free => None,
        };
        self.router.hand_over()
    }

    /// Where peers find the router.
    pub(super) fn endpoint(&self) -> SocketAddrV4 {
        SocketAddrV4::new(UNDERLAY_ROUTER, PORT)
    }

    pub(super) fn router(&self) -> &Router {
        &self.router
    }

    /// Confines this thread, and what it starts, to the CPUs of the ends until the guard is dropped.
    pub(super) fn at_the_ends(&self) -> anyhow::Result<Option<Pinned>> {
        match &self.placement {
            Placement::Apart(cores) => Pinned::to(&cores.ends).map(Some),
            Placement::Free => Ok(None),
        }
    }

    /// Does `work` and yields what the router's CPU spent meanwhile; zero where it has none of its
    /// own.
    pub(super) fn cost_of<T>(
        &self,
        work: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<(T, Cost)> {
        let before = Snapshot::take()?;
        let done = work()?;
        let after = Snapshot::take()?;
        let usage = Usage::between(&before, &after);
        let cpu = match &self.placement {
            Placement::Apart(cores) => usage.core_busy(cores.router),
            Placement::Free => Duration::ZERO,
        };
        Ok((
            done,
            Cost {
                cpu,
                elapsed: usage.elapsed(),
            },
        ))
    }

    /// A generator with this many peers, connected.
    pub(super) fn generator(&self, peers: u16) -> anyhow::Result<Generator> {
        let server = SocketAddrV4::new(SERVER, SINK);
        let target = Target {
            endpoint: self.endpoint(),
            router: self.key.public.parse::<PublicKey>()?,
            server,
        };
        let peers = self.peers[..usize::from(peers)].to_vec();
        let socket = self.server.udp_socket(server.into())?;
        // A peer of a tailnet does not roam: the next generator's is where the one before was, unless that is there still.
        let mut ports = FIRST_PEER_PORT..;
        Generator::connect(peers, target, socket, || {
            let at = |port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
            let own = self.client.udp_socket(at(ports.next().unwrap_or(0)));
            own.or_else(|_| self.client.udp_socket(at(0)))
        })
    }
}

/// Has the softirq work of these NICs done on these CPUs (Documentation/networking/scaling.rst).
pub(crate) fn steer(host: &Host, nics: &[&str], cpus: &[usize]) -> anyhow::Result<()> {
    let mask = cpus.iter().fold(0u64, |mask, cpu| mask | 1 << (cpu % 64));
    let nics = nics.join(" ");
    let script = format!(
        "for nic in {nics}; do for queue in /sys/class/net/$nic/queues/rx-*; do \
         echo {mask:x} > $queue/rps_cpus; done; done"
    );
    in_sys(host, &script)
}

/// Runs a shell script that sees the host's own /sys, which `ip netns exec` mounts.
fn in_sys(host: &Host, script: &str) -> anyhow::Result<()> {
    lab::Cmd::new(["ip", "netns", "exec", host.namespace(), "sh", "-ec", script])
        .run()
        .map(drop)
}

/// Confines the calling thread while it lives.
pub(crate) struct Pinned {
    before: Vec<usize>,
}

impl Pinned {
    pub(crate) fn to(cpus: &[usize]) -> anyhow::Result<Self> {
        let before = cpu::affinity()?;
        cpu::pin_thread(cpus).context("pin this thread")?;
        Ok(Self { before })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // It was allowed before; if it is not any more, staying where we are is the lesser evil.
        let _ = cpu::pin_thread(&self.before);
    }
}

/// A file of a host's own `/proc`.
fn read_in_proc(host: &Host, file: &str) -> anyhow::Result<String> {
    // /proc/net is that of the process's first thread, which is in no namespace of ours.
    Ok(host.enter(|| std::fs::read_to_string(format!("/proc/thread-self/{file}")))??)
}

/// A counter of a host's `/proc/net/netstat`, such as `TCPOFOQueue` of `TcpExt`.
pub(super) fn protocol_counter(host: &Host, group: &str, name: &str) -> anyhow::Result<u64> {
    let text = read_in_proc(host, "net/netstat")?;
    let mut lines = text
        .lines()
        .filter_map(|line| line.strip_prefix(group)?.strip_prefix(": "));
    let (names, values) = lines
        .next()
        .zip(lines.next())
        .context("no such group of counters")?;
    names
        .split_whitespace()
        .zip(values.split_whitespace())
        .find(|(found, _)| *found == name)
        .and_then(|(_, value)| value.parse().ok())
        .with_context(|| format!("no counter {group}.{name}"))
}

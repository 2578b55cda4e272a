//! What the programs redirect arrives: real TCP/IP stacks on both ends, and in place of the tunnel
//! two TUN devices whose packets this process carries over unchanged, super-packets included.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::ensure;
use lab::{Host, Lab, http, wait_until};
use router::control::{Route, RouteMode};
use router::datapath::ebpf::{AttachMode, Ebpf, Options};
use router::datapath::{Datapath, Spec};
use router_ebpf::abi::Side;
use router_ebpf::verdict::Verdict;

use super::fixture::{FAMILIES, Family, GATEWAY, MTU, Net, PEER, has_tcx, link};

const SOON: Duration = Duration::from_secs(10);
const MIB: u64 = 1 << 20;

/// laptop — (two TUN devices) — router — server.
struct Path {
    laptop: Host,
    router: Host,
    server: Host,
    tuns: [File; 2],
}

impl Path {
    fn new(lab: &Lab) -> anyhow::Result<Self> {
        let (laptop, router, server) = (
            lab.host("laptop")?,
            lab.host("router")?,
            lab.host("server")?,
        );
        lab.link(
            router
                .port("eth0")
                .address("10.20.0.10/24")
                .address("2001:db8:20::a/64"),
            server
                .port("eth0")
                .address("10.20.0.20/24")
                .address("2001:db8:20::14/64"),
        )?;
        server.route("100.64.0.0/24", "10.20.0.10")?;
        server.route("fd64::/64", "2001:db8:20::a")?;
        router.sysctl("net/ipv4/ip_forward", "1")?;
        router.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        let tuns = [
            tun(
                &laptop,
                "100.64.0.2/32",
                "fd64::2/128",
                "10.20.0.0/24",
                "2001:db8:20::/64",
            )?,
            tun(
                &router,
                "100.64.0.1/32",
                "fd64::1/128",
                "100.64.0.0/24",
                "fd64::/64",
            )?,
        ];
        Ok(Self {
            laptop,
            router,
            server,
            tuns,
        })
    }

    /// Runs `work` with the programs attached, while packets are carried over.
    fn with_programs(
        &self,
        mode: Option<AttachMode>,
        work: impl FnOnce(&Ebpf) -> anyhow::Result<()> + Send,
    ) -> anyhow::Result<()> {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let [laptop, router] = &self.tuns;
            scope.spawn(|| carry(laptop, router, &stop));
            scope.spawn(|| carry(router, laptop, &stop));
            let outcome = self.router.enter(|| {
                let mut ebpf = Ebpf::load_with(Options {
                    attach: mode,
                    ..Options::default()
                })?;
                ebpf.apply(&spec()?)?;
                work(&ebpf)?;
                Ok(ebpf.remove()?)
            });
            stop.store(true, Ordering::Relaxed);
            outcome?
        })
    }
}

fn spec() -> anyhow::Result<Spec> {
    let fast = |cidr: &str| {
        anyhow::Ok(Route {
            cidr: cidr.parse()?,
            snat: false,
            mode: RouteMode::Fast,
        })
    };
    Ok(Spec {
        tun: link("tun0")?,
        mtu: MTU,
        subnet: vec![link("eth0")?],
        overlay: [("100.64.0.0/24".parse()?, 0), ("fd64::/64".parse()?, 0)].into(),
        routes: vec![fast("10.20.0.0/24")?, fast("2001:db8:20::/64")?],
        ..Spec::default()
    })
}

/// A TUN device `tun0` with segmentation offload, its addresses, and routes into it.
pub(crate) fn tun(
    host: &Host,
    v4: &str,
    v6: &str,
    to_v4: &str,
    to_v6: &str,
) -> anyhow::Result<File> {
    let file = host.enter(open_tun)??;
    host.ip(&format!("link set tun0 mtu {MTU} up"))?;
    host.ip(&format!("address add {v4} dev tun0"))?;
    host.ip(&format!("address add {v6} dev tun0 nodad"))?;
    host.ip(&format!("route add {to_v4} dev tun0"))?;
    host.ip(&format!("route add {to_v6} dev tun0"))?;
    Ok(file)
}

fn open_tun() -> std::io::Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: `ifreq` consists of integers and arrays, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (slot, byte) in request.ifr_name.iter_mut().zip(b"tun0") {
        *slot = *byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    let offload = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    // SAFETY: the descriptor is open; TUNSETIFF reads and writes one `ifreq`, TUNSETOFFLOAD takes
    // a number.
    let ok = unsafe {
        libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) == 0
            && libc::ioctl(
                file.as_raw_fd(),
                libc::TUNSETOFFLOAD as _,
                libc::c_ulong::from(offload),
            ) == 0
    };
    if ok {
        Ok(file)
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// Carries packets from one TUN device to another until told to stop.
pub(crate) fn carry(mut from: &File, mut to: &File, stop: &AtomicBool) {
    let mut buffer = vec![0; 70_000];
    while !stop.load(Ordering::Relaxed) {
        let mut ready = libc::pollfd {
            fd: from.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: the pointer is that of one live pollfd.
        if unsafe { libc::poll(&raw mut ready, 1, 50) } == 1 {
            let len = from.read(&mut buffer).expect("read from a TUN device");
            // As on any link, what the receiver cannot take is lost.
            let _ = to.write(&buffer[..len]);
        }
    }
}

fn server_of(family: Family) -> IpAddr {
    family.subnet(Net::NEAR, GATEWAY)
}

fn packets(ebpf: &Ebpf, side: Side, verdict: Verdict) -> anyhow::Result<u64> {
    Ok(ebpf.counter(side, verdict)?.packets)
}

#[test]
fn super_packets_arrive_by_tcx() {
    if has_tcx() {
        super_packets_arrive(AttachMode::Tcx);
    }
}

#[test]
fn super_packets_arrive_by_clsact() {
    super_packets_arrive(AttachMode::Clsact);
}

fn super_packets_arrive(mode: AttachMode) {
    lab::test(|lab| {
        let path = Path::new(lab)?;
        let _web = path.server.http_server(80)?;
        path.with_programs(Some(mode), |ebpf| {
            for family in FAMILIES {
                let address = SocketAddr::new(server_of(family), 80);
                http::download(&path.laptop, address, 8 * MIB as usize)?;
                http::upload(&path.laptop, address, 8 * MIB as usize)?;
            }
            for side in Side::ALL {
                let forwarded = ebpf.counter(side, Verdict::Forwarded)?;
                ensure!(forwarded.bytes > 16 * MIB, "{forwarded:?}");
                // Bare acknowledgements are half of the packets; were none coalesced, the mean
                // would be below the MTU.
                let mean = forwarded.bytes / forwarded.packets;
                ensure!(
                    mean > 2 * u64::from(MTU),
                    "{mean} bytes a packet: no super-packets"
                );
            }
            let counters = ebpf.counters()?;
            for counter in counters.iter().filter(|counter| counter.packets > 50) {
                ensure!(counter.verdict == "forwarded", "{counter:?}");
            }
            Ok(())
        })
    });
}

#[test]
fn headers_are_right_where_they_arrive() {
    lab::test(|lab| {
        let path = Path::new(lab)?;
        let _web = path.server.http_server(80)?;
        path.with_programs(None, |ebpf| {
            let at_server = path.server.capture("eth0")?;
            let at_laptop = path.laptop.capture("tun0")?;
            for family in FAMILIES {
                let (peer, server) = (family.overlay(PEER), server_of(family));
                let mss = MTU - if family == Family::V4 { 40 } else { 60 };
                // The neighbour is found by the slow path.
                ensure!(path.laptop.pings(&server.to_string(), &[])?, "no reply");

                // By itself the laptop would announce what its own MTU allows.
                path.laptop
                    .ip(&format!("route replace {server} dev tun0 advmss 8000"))?;
                http::download(&path.laptop, SocketAddr::new(server, 80), 1000)?;
                let syn = at_server.find(SOON, "a SYN", |packet| {
                    (packet.source == peer).then(|| packet.syn_mss()).flatten()
                })?;
                ensure!(syn == mss, "the server saw MSS {syn}");
                let sent = at_laptop.find(SOON, "a SYN", |packet| packet.syn_mss())?;
                ensure!(sent == 8000, "the laptop sent MSS {sent}");
                let (syn_ack, ttl) = at_laptop.find(SOON, "a SYN-ACK", |packet| {
                    let mss = packet.syn_ack_mss()?;
                    (packet.source == server).then_some((mss, packet.ttl))
                })?;
                ensure!(
                    syn_ack == mss && ttl == 63,
                    "the laptop saw MSS {syn_ack} and TTL {ttl}"
                );
            }
            ensure!(packets(ebpf, Side::Overlay, Verdict::Forwarded)? > 4);
            ensure!(packets(ebpf, Side::Subnet, Verdict::Forwarded)? > 4);
            Ok(())
        })
    });
}

#[test]
fn the_kernel_answers_what_the_programs_hand_it() {
    lab::test(|lab| {
        let path = Path::new(lab)?;
        path.with_programs(None, |ebpf| {
            let at_server = path.server.capture("eth0")?;
            let at_laptop = path.laptop.capture("tun0")?;
            for family in FAMILIES {
                let (peer, server) = (family.overlay(PEER), server_of(family));
                ensure!(path.laptop.pings(&server.to_string(), &[])?, "no reply");

                let expired = packets(ebpf, Side::Overlay, Verdict::SlowTtl)?;
                let _ = path.laptop.pings(&server.to_string(), &["-t1"])?;
                ensure!(packets(ebpf, Side::Overlay, Verdict::SlowTtl)? >= expired + 3);
                let time_exceeded = if family == Family::V4 {
                    (11, 0)
                } else {
                    (3, 0)
                };
                at_laptop.find(SOON, "a time-exceeded message", |packet| {
                    (packet.icmp() == Some(time_exceeded)).then_some(())
                })?;

                let too_big = packets(ebpf, Side::Subnet, Verdict::SlowMtu)?;
                let size = (1500 - 48).to_string();
                let _ = path
                    .server
                    .pings(&peer.to_string(), &["-Mdo", "-s", &size])?;
                ensure!(packets(ebpf, Side::Subnet, Verdict::SlowMtu)? > too_big);
                let mtu = at_server.find(SOON, "a packet-too-big message", |packet| {
                    packet.too_big_mtu()
                })?;
                ensure!(mtu == u32::from(MTU), "MTU {mtu}");
            }
            // A peer that is none.
            path.laptop.ip("address add 192.0.2.9/32 dev tun0")?;
            let spoofed = packets(ebpf, Side::Overlay, Verdict::DropSpoofed)?;
            let socket = path.laptop.udp_socket("192.0.2.9:0".parse()?)?;
            socket.send_to(b"hello", SocketAddr::new(server_of(Family::V4), 9))?;
            wait_until(SOON, "a spoofed packet to be counted", || {
                packets(ebpf, Side::Overlay, Verdict::DropSpoofed).is_ok_and(|n| n == spoofed + 1)
            })?;
            ensure!(
                at_server
                    .drain(|packet| (packet.source == IpAddr::from([192, 0, 2, 9])).then_some(()))
                    .is_empty(),
                "a spoofed packet arrived"
            );
            Ok(())
        })
    });
}

//! Segment sizes, fragments, packets that are too big, packets that have come too far.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use lab::packet::Packet;
use lab::site::{self, Arms, CORE, Client, ROUTER, Running, SERVER, Site};
use lab::{Host, http, poll};

use super::{HTTP, Path, SOON, echoes, on_every_path, serve, warm_up};

on_every_path!(
    segment_size_is_clamped_one_armed,
    segment_size_is_clamped_two_armed,
    large_datagrams_and_packet_too_big,
    a_packet_that_has_come_too_far_is_reported,
);

const TUNNEL_MTU: u16 = 1420;
/// A client's tunnel MTU that is too high: then only the router can mend the segment size.
const WRONG_MTU: u32 = 1500;

fn headers(address: IpAddr) -> u16 {
    if address.is_ipv4() { 40 } else { 60 }
}

/// On every path, since the slow one must give the same outcome.
fn segment_size_is_clamped_both_ways(arms: Arms, path: Path) {
    lab::test(|lab| {
        let site = Site::new(lab, arms)?;
        if !path.snat() {
            site.route_overlay()?;
        }
        let client = Client::new("laptop", 2)?;
        let config = site::config(&[&client], path.datapath(), path.snat())?;
        let _sluice = site.router.sluice(&config)?;
        let tunnel = client.tunnel(&config.key).mtu(WRONG_MTU);
        let tunnel = site.laptop.wireguard_go(&tunnel)?;
        let _servers = serve(&site.server)?;
        for server in SERVER {
            warm_up(&site.laptop, server)?;
            let at_server = site.server.capture("eth0")?;
            let at_laptop = site.laptop.capture(tunnel.device())?;
            http::download(&site.laptop, SocketAddr::new(server, HTTP), 1 << 20)?;
            let from = |p: &Packet<'_>| p.syn_mss().filter(|_| p.destination == server);
            let to = |p: &Packet<'_>| p.syn_ack_mss().filter(|_| p.source == server);
            let sent = at_laptop.find(SOON, "a SYN", from)?;
            let seen = at_server.find(SOON, "a SYN", from)?;
            let answered = at_server.find(SOON, "a SYN-ACK", to)?;
            let came = at_laptop.find(SOON, "a SYN-ACK", to)?;
            let clamped = TUNNEL_MTU - headers(server);
            assert!(sent > clamped && answered > clamped, "nothing to clamp");
            assert_eq!([seen, came], [clamped; 2], "{path:?} {server}");
        }
        Ok(())
    });
}

fn segment_size_is_clamped_one_armed(path: Path) {
    segment_size_is_clamped_both_ways(Arms::One, path);
}

fn segment_size_is_clamped_two_armed(path: Path) {
    segment_size_is_clamped_both_ways(Arms::Two, path);
}

#[test]
fn a_small_segment_size_is_left_alone() {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        site.route_overlay()?;
        let client = Client::new("laptop", 2)?;
        let config = site::config(&[&client], "ebpf", false)?;
        let _sluice = site.router.sluice(&config)?;
        let tunnel = client.tunnel(&config.key).mtu(1300);
        let _tunnel = site.laptop.wireguard_go(&tunnel)?;
        let _servers = serve(&site.server)?;
        for server in SERVER {
            warm_up(&site.laptop, server)?;
            let at_server = site.server.capture("eth0")?;
            http::download(&site.laptop, SocketAddr::new(server, HTTP), 1 << 20)?;
            let seen = at_server.find(SOON, "a SYN", |p| p.syn_mss())?;
            assert_eq!(seen, 1300 - headers(server));
        }
        Ok(())
    });
}

/// The laptop sends fragments. The server's answers fit its own MTU but not the tunnel's, so that
/// the first ones die; the router must say so, and the server then sends fragments too.
fn large_datagrams_and_packet_too_big(path: Path) {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        let _servers = serve(&run.site.server)?;
        for server in SERVER {
            warm_up(&run.site.laptop, server)?;
            let at_server = run.site.server.capture("eth0")?;
            poll(SOON, "an echo of 4000 bytes", || {
                echoes(&run.site.laptop, server, 4000, Duration::from_millis(300)).ok()
            })?;
            let mtu = at_server.find(SOON, "a packet too big", |p| p.too_big_mtu())?;
            assert_eq!(mtu, u32::from(TUNNEL_MTU), "{path:?} {server}");
        }
        Ok(())
    });
}

/// By the router, and by the next one, whose report comes from outside every route.
fn a_packet_that_has_come_too_far_is_reported(path: Path) {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        let laptop = &run.site.laptop;
        for ((server, router), core) in SERVER.into_iter().zip(ROUTER).zip(CORE) {
            warm_up(laptop, server)?;
            assert_eq!(hop(laptop, server, 1)?, Some(router), "{path:?}");
            assert_eq!(hop(laptop, server, 2)?, Some(core), "{path:?}");
            assert!(laptop.pings(&server.to_string(), &["-t3"])?);
        }
        Ok(())
    });
}

/// Who reports that a packet with this TTL went too far, as ping sees it: it looks at what the
/// report quotes.
fn hop(laptop: &Host, server: IpAddr, ttl: u8) -> anyhow::Result<Option<IpAddr>> {
    let argv = [
        "ping",
        "-n",
        "-c1",
        "-W2",
        &format!("-t{ttl}"),
        &server.to_string(),
    ]
    .map(str::to_owned);
    let output = laptop.command(argv).output()?;
    // "From 100.64.0.1 icmp_seq=1 Time to live exceeded", "From fd64::1 icmp_seq=1 Time exceeded: …"
    let report = output
        .stdout
        .lines()
        .find(|line| line.starts_with("From ") && line.contains("exceeded"));
    let from = report.and_then(|line| line.split(' ').nth(1)?.parse().ok());
    Ok(from)
}

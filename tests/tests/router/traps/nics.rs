//! Several NICs toward one network, and several addresses on a NIC.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, ensure};
use lab::packet::Packet;
use lab::site::{self, Arms, CORE, Client, ENDPOINT, OVERLAY, SERVER, Site, VPC};
use lab::{Lab, Tunnel, wait_until};

use super::super::{Path, SOON, on_every_path, warm_up};
use super::{PORT, receive, udp_at, udp_to};

on_every_path!(every_next_hop_of_a_route_is_served);

/// The VPC's own router at the far end of a second link.
const CORE_2: [&str; 2] = ["10.31.0.1", "2001:db8:31::1"];

/// A second link between router and VPC; the routes into it lead to both.
fn two_links(lab: &Lab, site: &Site) -> anyhow::Result<()> {
    let core = site.core.as_ref().context("two-armed")?;
    let near = site.router.port("lan2");
    let near = near
        .address("10.31.0.10/24")
        .address("2001:db8:31::10/64")
        .mtu(site::JUMBO);
    let far = CORE_2.iter().zip(["24", "64"]);
    let far = far.fold(core.port("router2"), |port, (address, len)| {
        port.address(&format!("{address}/{len}"))
    });
    lab.link(near, far.mtu(site::JUMBO))?;
    let router = &site.router;
    for family in ["ipv4", "ipv6"] {
        // Ports choose the next hop.
        router.sysctl(&format!("net/{family}/fib_multipath_hash_policy"), "1")?;
    }
    router.ip(&format!(
        "route replace {} nexthop via {} dev lan nexthop via {} dev lan2",
        VPC[0], CORE[0], CORE_2[0]
    ))?;
    router.ip(&format!("nexthop add id 1 via {} dev lan", CORE[1]))?;
    router.ip(&format!("nexthop add id 2 via {} dev lan2", CORE_2[1]))?;
    router.ip("nexthop add id 10 group 1/2")?;
    router.ip(&format!("route del {}", VPC[1]))?;
    router.ip(&format!("route add {} nhid 10", VPC[1]))?;
    Ok(())
}

fn every_next_hop_of_a_route_is_served(path: Path) {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        if !path.snat() {
            site.route_overlay()?;
        }
        two_links(lab, &site)?;
        let client = Client::new("laptop", 2)?;
        let config = site::config(&[&client], path.datapath(), path.snat())?;
        let _sluice = site.router.sluice(&config)?;
        let _tunnel = client.connect(&site.laptop, &config.key)?;
        let core = site.core.as_ref().context("two-armed")?;
        for server in SERVER {
            wait_until(SOON, "the tunnel", || warm_up(&site.laptop, server).is_ok())?;
            let far = udp_at(&site.server, SocketAddr::new(server, PORT))?;
            let by = ["router", "router2"].map(|port| core.capture(port));
            let [by_first, by_second] = by;
            let (by_first, by_second) = (by_first?, by_second?);
            let of_flows = |p: &Packet<'_>| (p.destination == server).then_some(());
            let mut served = [false; 2];
            // By which one a flow goes is a matter of its ports.
            for n in 0..64 {
                let near = udp_to(&site.laptop, far.local_addr()?)?;
                near.send(b"up")?;
                let (_, from) = receive(&far).with_context(|| format!("flow {n} up"))?;
                far.send_to(b"down", from)?;
                let (got, _) = receive(&near).with_context(|| format!("flow {n} down"))?;
                assert_eq!(got, b"down");
                served[0] |= !by_first.drain(of_flows).is_empty();
                served[1] |= !by_second.drain(of_flows).is_empty();
                if n >= 8 && served == [true; 2] {
                    break;
                }
            }
            ensure!(served == [true; 2], "{server} by {served:?}");
        }
        Ok(())
    });
}

/// A NIC with addresses of several networks: sources become the one that the kernel's masquerade takes
/// toward this next hop (IPv4) or destination (IPv6). Another one the server may not know the way
/// back to.
#[test]
fn sources_become_the_address_that_fits_the_way() {
    for datapath in ["ebpf", "kernel"] {
        fitting_address(datapath);
    }
}

fn fitting_address(datapath: &'static str) {
    /// Where the server is, and the router's address that it must see.
    const FITTING: [(&str, &str); 6] = [
        // On a network of the NIC.
        ("10.20.2.9", "10.20.2.1"),
        ("2001:db8:20:2::9", "2001:db8:20:2::1"),
        // Behind a gateway on another one.
        ("10.20.0.1", "10.30.0.10"),
        // The longest prefix in common, and no deprecated address.
        ("2001:db8:20:3::9", "2001:db8:20:3::5"),
        ("2001:db8:20:4::9", "2001:db8:20:3::5"),
        ("fd20::9", "fd20::1"),
    ];
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        let core = site.core.as_ref().context("two-armed")?;
        for (own, far) in [
            ("10.20.2.1/24", "10.20.2.9/24"),
            ("fd20::1/64", "fd20::9/64"),
            ("2001:db8:20:2::1/64", "2001:db8:20:2::9/64"),
            ("2001:db8:20:3::5/64", "2001:db8:20:3::9/64"),
        ] {
            site.router.ip(&format!("address add {own} dev lan"))?;
            core.ip(&format!("address add {far} dev router"))?;
        }
        // The newest IPv6 address comes first.
        let deprecated = "2001:db8:20:3::7/64 dev lan preferred_lft 0";
        site.router.ip(&format!("address add {deprecated}"))?;
        core.ip("address add 2001:db8:20:4::9/64 dev server")?;
        let client = Client::new("laptop", 2)?;
        let mut config = site::config(&[&client], datapath, true)?;
        let mut more = config.routes[1].clone();
        more.cidr = "fd20::/64".to_owned();
        config.routes.push(more);
        let _sluice = site.router.sluice(&config)?;
        let inside = OVERLAY.into_iter().chain(VPC).chain(["fd20::/64"]);
        let [v4, v6] = client.addresses;
        let tunnel = Tunnel::new(&client.key)
            .address(&format!("{v4}/32"))
            .address(&format!("{v6}/128"))
            .peer(&config.key.public, ENDPOINT, inside);
        let _tunnel = site.laptop.wireguard_go(&tunnel)?;
        let mut wrong = Vec::new();
        for (server, fitting) in FITTING {
            let server = server.parse()?;
            wait_until(SOON, "the tunnel", || warm_up(&site.laptop, server).is_ok())?;
            let far = udp_at(core, SocketAddr::new(server, PORT))?;
            let near = udp_to(&site.laptop, far.local_addr()?)?;
            near.send(b"up")?;
            let (_, from) = receive(&far)?;
            if from.ip() != fitting.parse::<IpAddr>()? {
                wrong.push(format!("{server} sees {from}, not {fitting}"));
            }
            far.send_to(b"down", from)?;
            assert_eq!(receive(&near)?.0, b"down", "{server} as {from}");
        }
        ensure!(wrong.is_empty(), "{datapath}: {wrong:#?}");
        Ok(())
    });
}

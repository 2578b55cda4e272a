//! A Kubernetes service range on a node whose kernel translates it, as kube-proxy's nftables mode
//! has it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use anyhow::Context;
use lab::packet::Packet;
use lab::site::{self, Arms, Client, ENDPOINT, OVERLAY, SERVER, Site, VPC};
use lab::sluice::{Route, Rule};
use lab::{Host, Tunnel, http, wait_until};

use super::super::{HTTP, Path, SOON, on_every_path};
use super::BRIEFLY;

on_every_path!(services_are_reached_on_all_backends);

const SERVICES: [&str; 2] = ["10.96.0.0/24", "fd00:96::/112"];
const SERVICE: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
/// Further addresses of the server, to stand for three hosts.
const BACKENDS: [[&str; 3]; 2] = [
    ["10.20.0.21", "10.20.0.22", "10.20.0.23"],
    ["2001:db8:20::21", "2001:db8:20::22", "2001:db8:20::23"],
];
/// Where the backends listen.
const BACKEND_PORT: u16 = 8080;
/// A port of the service that the policy does not name.
const OTHER: u16 = 81;
const MIB: usize = 1 << 20;

/// One of three backends at random, and masquerade for what carries kube-proxy's mark.
fn translate_services(router: &Host) -> anyhow::Result<()> {
    let mut rules = String::new();
    for ((table, service), backends) in ["ip", "ip6"].into_iter().zip(SERVICE).zip(BACKENDS) {
        let [a, b, c] = backends.map(|address| match table {
            "ip6" => format!("[{address}]:{BACKEND_PORT}"),
            _ => format!("{address}:{BACKEND_PORT}"),
        });
        rules += &format!(
            "table {table} kube-proxy {{
                chain service {{
                    meta mark set meta mark or 0x4000
                    numgen random mod 3 vmap {{ 0 : goto a, 1 : goto b, 2 : goto c }}
                }}
                chain a {{ meta l4proto tcp dnat to {a}; }}
                chain b {{ meta l4proto tcp dnat to {b}; }}
                chain c {{ meta l4proto tcp dnat to {c}; }}
                chain prerouting {{ type nat hook prerouting priority -100;
                    {table} daddr {service} tcp dport {{ {HTTP}, {OTHER} }} goto service; }}
                chain postrouting {{ type nat hook postrouting priority 100;
                    meta mark & 0x4000 == 0 return
                    meta mark set meta mark xor 0x4000
                    masquerade fully-random; }}
            }}\n",
        );
    }
    let nft = router.command(["nft", "-f", "-"]).stdin(rules);
    nft.run().map(drop)
}

fn services_are_reached_on_all_backends(path: Path) {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        if !path.snat() {
            site.route_overlay()?;
        }
        for backend in BACKENDS.concat() {
            let len = if backend.contains(':') { 64 } else { 24 };
            site.server
                .add_address(&format!("{backend}/{len}"), "eth0")?;
        }
        translate_services(&site.router)?;
        let client = Client::new("laptop", 2)?;
        let mut config = site::config(&[&client], path.datapath(), path.snat())?;
        config.routes.extend(SERVICES.map(|cidr| Route {
            cidr: cidr.to_owned(),
            snat: path.snat(),
            mode: "stack",
        }));
        let allowed = [
            format!("{}:{HTTP}", SERVICES[0]),
            format!("[{}]:{HTTP}", SERVICES[1]),
        ];
        config.rules = vec![Rule {
            from: vec!["laptop".to_owned()],
            to: allowed.into(),
            protocols: vec!["tcp".to_owned()],
        }];
        let mut sluice = site.router.sluice(&config)?;
        let mut tunnel = Tunnel::new(&client.key);
        for (address, len) in client.addresses.iter().zip([32, 128]) {
            tunnel = tunnel.address(&format!("{address}/{len}"));
        }
        let inside = OVERLAY.into_iter().chain(VPC).chain(SERVICES);
        let tunnel = tunnel.peer(&config.key.public, ENDPOINT, inside);
        let _tunnel = site.laptop.wireguard_go(&tunnel)?;
        let _web = site.server.http_server(BACKEND_PORT)?;

        for (service, backends) in SERVICE.into_iter().zip(BACKENDS) {
            let service: IpAddr = service.parse()?;
            let web = SocketAddr::new(service, HTTP);
            let at_server = site.server.capture("eth0")?;
            let expected = backends
                .iter()
                .map(|backend| backend.parse())
                .collect::<Result<BTreeSet<IpAddr>, _>>()?;
            let mut seen = BTreeSet::new();
            let new = |p: &Packet<'_>| p.syn_mss().map(|mss| (p.destination, mss));
            wait_until(SOON, "a connection to every backend", || {
                let answer = http::get(&site.laptop, web, "/");
                assert_eq!(answer.expect("a page"), http::GREETING.as_bytes());
                let clamped = if service.is_ipv4() { 1380 } else { 1360 };
                for (backend, mss) in at_server.drain(new) {
                    assert_eq!(mss, clamped, "{path:?} {service}");
                    seen.insert(backend);
                }
                seen == expected
            })?;
            http::download(&site.laptop, web, 8 * MIB)
                .with_context(|| format!("{path:?} {service}"))?;
            http::upload(&site.laptop, web, 2 * MIB)
                .with_context(|| format!("{path:?} {service}"))?;
            // Only what the policy names, by the service's own address and port.
            let at_server = site.server.capture("eth0")?;
            let denied = [
                SocketAddr::new(service, OTHER),
                SocketAddr::new(SERVER[usize::from(service.is_ipv6())], BACKEND_PORT),
            ];
            for address in denied {
                let answer = site.laptop.tcp_connect(address, BRIEFLY);
                assert!(answer.is_err(), "{path:?} {address}");
            }
            let arrived = at_server.drain(new);
            assert!(arrived.is_empty(), "{path:?} {service}: {arrived:?}");
        }
        // It is the policy that has kept the other port shut.
        config.rules.clear();
        sluice.reload(&config)?;
        for service in SERVICE {
            let other = SocketAddr::new(service.parse()?, OTHER);
            wait_until(SOON, "the other port", || {
                http::get(&site.laptop, other, "/").is_ok()
            })?;
        }
        Ok(())
    });
}

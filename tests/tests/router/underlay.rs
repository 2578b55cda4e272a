//! What the underlay carries: the tunnel must fit it, and offloads come back when it does again.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, ensure};
use lab::site::{self, Arms, Client, ENDPOINT, ENDPOINT_V6, Running, SERVER, Site};
use lab::sluice::{self, Sluice};
use lab::{Host, Lab, http, poll, wait_until};
use router_ebpf::craft::{ICMP, Ip};

use super::{HTTP, Path, SOON, serve, warm_up};

/// The router looks at its ways every five seconds, and tries offloads anew every ten.
const SEEN: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;
const USUAL: u32 = 1500;
const NARROW: u32 = 1450;

/// Sets the MTU at both ends of the router's uplink.
fn set_uplink(site: &Site, mtu: u32) -> anyhow::Result<()> {
    site.router.ip(&format!("link set wan mtu {mtu}"))?;
    site.internet.ip(&format!("link set router mtu {mtu}"))?;
    Ok(())
}

/// Sets the MTU at both ends of the laptop's link.
fn set_far_link(site: &Site, mtu: u32) -> anyhow::Result<()> {
    site.internet.ip(&format!("link set laptop mtu {mtu}"))?;
    site.laptop.ip(&format!("link set eth0 mtu {mtu}"))?;
    Ok(())
}

/// Drops fragments that come in, before anything puts them together.
fn drop_fragments(host: &Host) -> anyhow::Result<()> {
    let rules = "table inet fragments {
        chain in { type filter hook prerouting priority -450;
            ip frag-off & 0x3fff != 0 drop
            exthdr frag exists drop
        }
    }";
    host.command(["nft", "-f", "-"]).stdin(rules).run()?;
    Ok(())
}

fn forget(router: &Host) -> anyhow::Result<()> {
    router.ip("-4 route flush cache")?;
    router.ip("-6 route flush cache")?;
    Ok(())
}

fn both_ways(laptop: &Host, what: &str) -> anyhow::Result<()> {
    for server in SERVER {
        let address = SocketAddr::new(server, HTTP);
        http::upload(laptop, address, 2 * MIB).with_context(|| format!("{what}: to {server}"))?;
        http::download(laptop, address, 2 * MIB)
            .with_context(|| format!("{what}: from {server}"))?;
    }
    Ok(())
}

fn has_mtu(sluice: &Sluice, router: &Host, mtu: u32) -> anyhow::Result<()> {
    wait_until(SEEN, &format!("a tunnel MTU of {mtu}"), || {
        sluice
            .status()
            .is_ok_and(|status| status["device"]["mtu"] == mtu)
            && router
                .ip("link show sluice0")
                .is_ok_and(|text| text.contains(&format!("mtu {mtu} ")))
    })
}

fn problem(sluice: &Sluice, part: &str) -> Option<String> {
    let status = sluice.status().ok()?;
    let problems = status["problems"].as_array()?;
    let found = problems.iter().find(|problem| problem["part"] == part)?;
    Some(found["error"].as_str()?.to_owned())
}

fn fits_and_follows(path: Path, endpoint: SocketAddr) {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        if !path.snat() {
            site.route_overlay()?;
        }
        set_uplink(&site, NARROW)?;
        for host in [&site.internet, &site.router] {
            drop_fragments(host)?;
        }
        let client = Client::new("laptop", 2)?;
        let config = site::config(&[&client], path.datapath(), path.snat())?;
        let sluice = site.router.sluice(&config)?;
        let tunnel = client.tunnel_to(&config.key, endpoint);
        let _tunnel = site.laptop.wireguard_go(&tunnel)?;
        let _servers = serve(&site.server)?;
        warm_up(&site.laptop, SERVER[0])?;
        both_ways(&site.laptop, "narrow from the start")?;
        // 80 bytes for IPv6, and a multiple of 16.
        has_mtu(&sluice, &site.router, 1360)?;
        set_uplink(&site, USUAL)?;
        has_mtu(&sluice, &site.router, 1420)?;
        both_ways(&site.laptop, "wide")?;
        set_uplink(&site, 1400)?;
        has_mtu(&sluice, &site.router, 1312)?;
        both_ways(&site.laptop, "narrow again")?;
        ensure!(problem(&sluice, "mtu").is_none(), "{}", sluice.log());
        Ok(())
    });
}

#[test]
fn the_tunnel_fits_its_uplink_and_follows_it_ebpf() {
    fits_and_follows(Path::Translated, ENDPOINT);
}

#[test]
fn the_tunnel_fits_its_uplink_and_follows_it_kernel_over_ipv6() {
    fits_and_follows(Path::KernelRouted, ENDPOINT_V6);
}

#[test]
fn the_tunnel_fits_the_mtu_of_routes() {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, "ebpf", true)?;
        let router = &run.site.router;
        warm_up(&run.site.laptop, SERVER[0])?;
        has_mtu(&run.sluice, router, 1420)?;
        router.ip("route add 203.0.113.0/24 via 198.51.100.254 mtu 1400")?;
        has_mtu(&run.sluice, router, 1328)?;
        router.ip("route replace default via 198.51.100.254 mtu 1380")?;
        has_mtu(&run.sluice, router, 1312)?;
        router.ip("route replace default via 198.51.100.254")?;
        router.ip("route delete 203.0.113.0/24")?;
        has_mtu(&run.sluice, router, 1420)
    });
}

fn over_ipv6(lab: &Lab, mtu: Option<u16>) -> anyhow::Result<Running> {
    let site = Site::new(lab, Arms::Two)?;
    let client = Client::new("laptop", 2)?;
    let config = sluice::Config {
        mtu,
        ..site::config(&[&client], "ebpf", true)?
    };
    let sluice = site.router.sluice(&config)?;
    let tunnel = site
        .laptop
        .wireguard_go(&client.tunnel_to(&config.key, ENDPOINT_V6))?;
    Ok(Running {
        site,
        client,
        config,
        sluice,
        tunnel,
    })
}

#[test]
fn the_tunnel_becomes_narrower_upon_a_packet_too_big() {
    lab::test(|lab| {
        let run = over_ipv6(lab, None)?;
        let (site, sluice) = (&run.site, &run.sluice);
        set_far_link(site, 1400)?;
        let _servers = serve(&site.server)?;
        warm_up(&site.laptop, SERVER[0])?;
        both_ways(&site.laptop, "before it is known")?;
        has_mtu(sluice, &site.router, 1312)?;
        ensure!(problem(sluice, "mtu").is_none(), "{}", sluice.log());
        set_far_link(site, USUAL)?;
        forget(&site.router)?;
        has_mtu(sluice, &site.router, 1420)
    });
}

#[test]
fn a_fixed_mtu_that_does_not_fit_is_told() {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        set_uplink(&site, NARROW)?;
        let client = Client::new("laptop", 2)?;
        let config = sluice::Config {
            mtu: Some(1420),
            ..site::config(&[&client], "ebpf", true)?
        };
        let sluice = site.router.sluice_unsettled(&config)?;
        let told = poll(SOON, "a problem", || problem(&sluice, "mtu"))?;
        for part in [
            "1420",
            "1500 bytes",
            "wan carries 1450 bytes",
            "at most 1360",
        ] {
            ensure!(told.contains(part), "{told}");
        }
        let count = || sluice.log().matches("at most 1360").count();
        ensure!(count() == 1, "{}", sluice.log());
        let check = site
            .router
            .command([sluice::binary()?])
            .arg("check-config")
            .arg(sluice.config_file())
            .output()?;
        ensure!(check.status.success(), "{check:?}");
        ensure!(
            check.stdout.starts_with("ok:") && check.stderr.contains(&told),
            "{check:?}"
        );
        set_uplink(&site, USUAL)?;
        wait_until(SEEN, "the problem to end", || {
            sluice
                .status()
                .is_ok_and(|status| status["problems"] == serde_json::json!([]))
        })?;
        ensure!(count() == 1, "{}", sluice.log());
        Ok(())
    });
}

/// Datagrams by system call of a download.
fn datagrams_by_call(run: &Running) -> anyhow::Result<f64> {
    let counters = || -> anyhow::Result<_> {
        let count = |name| run.sluice.engine_counter(name);
        Ok((count("tx_datagrams")?, count("udp_sends")?))
    };
    let before = counters()?;
    http::download(&run.site.laptop, SocketAddr::new(SERVER[0], HTTP), 2 * MIB)?;
    let after = counters()?;
    Ok((after.0 - before.0) as f64 / (after.1 - before.1) as f64)
}

/// GSO was on, goes off with `narrow`, is told with the number that `says`, and comes back with `wide`
/// when the kernel has forgotten what it was told.
fn gso_comes_back(
    run: &Running,
    narrow: impl Fn() -> anyhow::Result<()>,
    says: &str,
    wide: impl Fn() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let _servers = serve(&run.site.server)?;
    warm_up(&run.site.laptop, SERVER[0])?;
    let usual = datagrams_by_call(run)?;
    ensure!(usual > 2.0, "{usual} from the start");
    narrow()?;
    let told = poll(SEEN, "GSO to be off", || {
        let ratio = datagrams_by_call(run).ok()?;
        problem(&run.sluice, "gso").filter(|told| ratio < 1.5 && told.contains(says))
    })?;
    ensure!(told.contains("laptop"), "{told}");
    wide()?;
    forget(&run.site.router)?;
    wait_until(SEEN, "GSO to be back", || {
        datagrams_by_call(run).is_ok_and(|ratio| ratio > 2.0)
            && problem(&run.sluice, "gso").is_none()
    })
}

/// As a router on the path says it: "fragmentation needed" about one of our datagrams.
fn tell_too_big(run: &Running, mtu: u16) -> anyhow::Result<()> {
    let status = run.sluice.status()?;
    let peer: SocketAddr = status["peers"][0]["endpoint"]
        .as_str()
        .context("no endpoint")?
        .parse()?;
    let mut datagram = ENDPOINT.port().to_be_bytes().to_vec();
    datagram.extend(peer.port().to_be_bytes());
    datagram.extend(1488u16.to_be_bytes());
    datagram.extend([0, 0]);
    let quoted = Ip {
        fragment: 0,
        ..Ip::new(ENDPOINT.ip(), peer.ip(), 17, datagram)
    };
    let mut error = vec![3, 4, 0, 0, 0, 0];
    error.extend(mtu.to_be_bytes());
    error.extend(quoted.bytes());
    let gateway: IpAddr = "198.51.100.254".parse()?;
    run.site
        .internet
        .send_ip(&Ip::new(gateway, ENDPOINT.ip(), ICMP, error).bytes())
}

#[test]
fn gso_comes_back_after_fragmentation_needed() {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, "ebpf", true)?;
        let narrow = || {
            poll(SOON, "the kernel to believe it", || {
                tell_too_big(&run, 600).ok()?;
                let known = run.site.router.ip("route get 203.0.113.10").ok()?;
                known.contains("mtu 600").then_some(())
            })
        };
        gso_comes_back(&run, narrow, "600 bytes", || {
            // As small as a tunnel that carries IPv6 may be, which is still too large.
            has_mtu(&run.sluice, &run.site.router, 1280)?;
            let told = problem(&run.sluice, "mtu").context("no problem")?;
            ensure!(told.contains("203.0.113.10 carries 600 bytes"), "{told}");
            Ok(())
        })?;
        has_mtu(&run.sluice, &run.site.router, 1420)
    });
}

#[test]
fn gso_comes_back_after_packet_too_big() {
    lab::test(|lab| {
        let run = over_ipv6(lab, Some(1420))?;
        let set = |mtu| set_far_link(&run.site, mtu);
        gso_comes_back(&run, || set(1400), "1400 bytes", || set(USUAL))
    });
}

//! The steps of the demo, in order.

use std::time::{Duration, Instant};

use anyhow::Context;
use lab::site::{self, Arms, Client, SERVER, Site, TRANSIT, VPC};
use lab::sluice::{Config, Route, Sluice};
use lab::{Lab, Wireguard, wait_until};

use crate::checks;
use crate::packets::Packets;
use crate::report::Report;
use crate::services::Services;

const SOON: Duration = Duration::from_secs(5);
/// What fits an uplink of 1500 bytes over either family.
const TUNNEL_MTU: u16 = 1420;
/// A tunnel MTU that is set too high, as by a user who took the device's for it.
const WRONG_MTU: u32 = 1500;

/// What a visitor may look at when it is over.
struct Stage {
    site: Site,
    config: Config,
    phone: Client,
}

pub(crate) fn run(lab: &Lab, keep: bool, report: &mut Report) -> anyhow::Result<()> {
    report.step("build the networks: a laptop and a phone on the internet, a router, a VPC");
    let site = Site::new(lab, Arms::Two)?;
    site.route_overlay()?;
    report.note(&format!(
        "VPC {} and {} with MTU {}; nothing in it knows WireGuard",
        VPC[0],
        VPC[1],
        site::JUMBO
    ));
    let before = site.router.footprint()?;

    report.step("start a web server and a database in the VPC");
    let services = Services::start(&site.server)?;
    report.note(&format!(
        "nginx {}, PostgreSQL {}",
        services.web_version, services.database_version
    ));
    let reached = site.laptop.pings(&SERVER[0].to_string(), &[])?;
    report.check(
        "without a tunnel the laptop cannot reach them",
        checks::not(reached, "it can"),
    );

    report.step("start Sluice on the router");
    let (laptop, phone) = (Client::new("laptop", 2)?, Client::new("phone", 3)?);
    let mut config = site::config(&[&laptop, &phone], "auto", false)?;
    config.routes.push(Route {
        cidr: TRANSIT[0].to_owned(),
        snat: true,
        mode: "fast",
    });
    let started = Instant::now();
    let sluice = site.router.sluice(&config)?;
    let took = started.elapsed();
    report.check("ready", checks::datapath(&sluice, took));

    report.step("connect the laptop with Debian's wireguard-go");
    let tunnel = laptop.connect(&site.laptop, &config.key)?;
    let handshake = reach(&site, &tunnel, &config);
    report.check(
        "handshake, and the first packet to the VPC and back",
        handshake,
    );

    let mut stage = Stage {
        site,
        config,
        phone,
    };
    reach_services(&stage, &services, &sluice, report)?;
    let phone = segment_sizes(&stage, report)?;
    guard_the_vpc(&stage, &tunnel, &sluice, report)?;
    throughput(&stage, &tunnel, &sluice, report);
    where_packets_went(&sluice, report)?;
    let sluice = revoke(&mut stage, sluice, report)?;
    if keep {
        try_by_hand(&stage, &sluice);
        return Ok(());
    }

    report.step("stop Sluice");
    drop(phone);
    let stopped = sluice.stop().and_then(|()| {
        let left = before.difference(&stage.site.router.footprint()?);
        anyhow::ensure!(left.is_empty(), "{}", left.join("; "));
        Ok("links, addresses, routes, rules, nftables, programs, sysctls".to_owned())
    });
    report.check("it leaves the router as it found it", stopped);
    Ok(())
}

fn reach(site: &Site, tunnel: &Wireguard, config: &Config) -> anyhow::Result<String> {
    let started = Instant::now();
    let argv = ["ping", "-n", "-c1", "-W5", &SERVER[0].to_string()].map(str::to_owned);
    site.laptop.run(argv)?;
    let took = started.elapsed();
    anyhow::ensure!(tunnel.has_handshake(&config.key.public)?, "no handshake");
    Ok(format!("{} ms", took.as_millis()))
}

fn reach_services(
    stage: &Stage,
    services: &Services,
    sluice: &Sluice,
    report: &mut Report,
) -> anyhow::Result<()> {
    let laptop = &stage.site.laptop;
    report.step("use the VPC from the laptop");
    for server in SERVER {
        report.check(&format!("ping {server}"), checks::ping(laptop, server));
        report.check(
            &format!("web page from {server}"),
            checks::page(laptop, server),
        );
    }
    let before = Packets::of(sluice)?;
    for server in SERVER {
        report.check(
            &format!("64 MiB from {server} arrive intact"),
            checks::download(laptop, server, &services.digest),
        );
    }
    report.check(
        "the fast path carried them, both ways",
        Packets::of(sluice)?
            .since(&before)
            .carried_fast(2 * crate::services::FILE_SIZE),
    );
    report.check("Prometheus metrics tell the same", checks::metrics(sluice));
    for server in SERVER {
        report.check(
            &format!("PostgreSQL at {server} answers, large results too"),
            checks::database(laptop, server),
        );
    }
    Ok(())
}

fn segment_sizes(stage: &Stage, report: &mut Report) -> anyhow::Result<Wireguard> {
    report.step(&format!(
        "connect a phone whose tunnel MTU is set to {WRONG_MTU}, too high"
    ));
    let tunnel = stage.phone.tunnel(&stage.config.key).mtu(WRONG_MTU);
    let tunnel = stage.site.phone.wireguard_go(&tunnel)?;
    for server in SERVER {
        report.check(
            &format!("TCP segment size is mended both ways for {server}"),
            checks::segment_size(&stage.site, tunnel.device(), server, TUNNEL_MTU),
        );
    }
    Ok(tunnel)
}

fn guard_the_vpc(
    stage: &Stage,
    tunnel: &Wireguard,
    sluice: &Sluice,
    report: &mut Report,
) -> anyhow::Result<()> {
    report.step("send from the laptop with the phone's addresses");
    for (spoofed, server) in stage.phone.addresses.into_iter().zip(SERVER) {
        report.check(
            &format!("packets from {spoofed} are dropped and counted"),
            checks::spoof(&stage.site, tunnel, sluice, spoofed, server),
        );
    }
    report.step(&format!("cross a route with source NAT ({})", TRANSIT[0]));
    report.check(
        "the other side sees the router's address",
        checks::source_nat(&stage.site),
    );
    Ok(())
}

fn throughput(stage: &Stage, tunnel: &Wireguard, sluice: &Sluice, report: &mut Report) {
    report
        .step("measure: one TCP stream for two seconds, with Debian's wireguard-go on the laptop");
    let laptop = tunnel
        .process_id()
        .map(|id| ("the laptop's wireguard-go", id));
    let programs: Vec<_> = [("sluice", sluice.id())]
        .into_iter()
        .chain(laptop)
        .collect();
    for (direction, option) in [
        ("laptop to VPC", None),
        ("VPC to laptop", Some("--reverse")),
    ] {
        report.check(
            direction,
            checks::throughput(&stage.site.laptop, SERVER[0], option, &programs),
        );
    }
}

fn where_packets_went(sluice: &Sluice, report: &mut Report) -> anyhow::Result<()> {
    report.step("where the clear packets went (a super-packet counts once)");
    for line in Packets::of(sluice)?.table() {
        report.note(&line);
    }
    Ok(())
}

/// Takes the phone out of the file.
fn revoke(stage: &mut Stage, mut sluice: Sluice, report: &mut Report) -> anyhow::Result<Sluice> {
    report.step("remove the phone from the file and reload");
    let server = SERVER[0].to_string();
    let site = &stage.site;
    anyhow::ensure!(site.phone.pings(&server, &[])?, "the phone reaches nothing");
    stage.config.peers.retain(|peer| peer.name != "phone");
    sluice.reload(&stage.config)?;
    let gone = wait_until(SOON, "the phone to be gone", || {
        let status = sluice.status().unwrap_or_default();
        status["peers"].as_array().is_some_and(|all| all.len() == 1)
    });
    gone.context("reload")?;
    report.check(
        "the phone reaches nothing any more",
        checks::not(site.phone.pings(&server, &[])?, "it does"),
    );
    report.check("the laptop goes on", checks::ping(&site.laptop, SERVER[0]));
    Ok(sluice)
}

fn try_by_hand(stage: &Stage, sluice: &Sluice) {
    let [laptop, router, server] = [
        stage.site.laptop.namespace(),
        stage.site.router.namespace(),
        stage.site.server.namespace(),
    ];
    let binary =
        lab::sluice::binary().map_or_else(|_| "sluice".into(), |path| path.display().to_string());
    println!("\nThe lab is still up. As root:");
    for line in [
        format!("{binary} status --socket {}", sluice.socket().display()),
        format!("ip netns exec {laptop} ping {}", SERVER[0]),
        format!("ip netns exec {laptop} curl http://[{}]/", SERVER[1]),
        format!(
            "PGPASSWORD=demo ip netns exec {laptop} psql -h {} -U demo postgres",
            SERVER[0]
        ),
        format!("ip netns exec {laptop} iperf3 -c {}", SERVER[0]),
        format!("ip netns exec {server} tcpdump -ni eth0"),
        format!("ip netns exec {router} bpftool net"),
        format!(
            "$EDITOR {} # read again when it changes",
            sluice.config_file().display()
        ),
    ] {
        println!("  {line}");
    }
    println!("This removes it all:\n  cargo xtask demo --remove\n");
}

//! The router behind its uplink's guard: peers do not notice it, junk does not get past it.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, ensure};
use lab::site::{self, Arms, Client, ENDPOINT, ENDPOINT_V6, Running, SERVER, Site};
use lab::sluice::Sluice;
use lab::{Host, http, wait_until};
use router::datapath::Link;
use router::datapath::ebpf::guard::Guard;
use router_ebpf::guard::INITIATION_BURST;

use super::{ECHO, HTTP, SOON, serve};

/// A session that the other end lost is renewed after 15 s without an answer, and a message of that
/// may get lost too.
const RENEWAL: Duration = Duration::from_secs(40);
/// Forged datagrams of a kind.
const FORGED: u64 = 1000;

/// Frames of a verdict so far.
fn frames(sluice: &Sluice, verdict: &str) -> anyhow::Result<u64> {
    let status = sluice.status()?;
    let count = status["uplink_guard"]["frames"][verdict].as_u64();
    count.with_context(|| format!("{verdict}: {}", status["uplink_guard"]))
}

fn dropped(sluice: &Sluice) -> anyhow::Result<[u64; 3]> {
    Ok([
        frames(sluice, "drop_malformed")?,
        frames(sluice, "drop_index")?,
        frames(sluice, "drop_initiation")?,
    ])
}

/// A running site with the uplink guarded.
fn guarded(lab: &lab::Lab, arms: Arms, datapath: &'static str) -> anyhow::Result<Running> {
    let run = Running::with(lab, arms, datapath, false, |config| config.guard = true)?;
    let uplink = if arms == Arms::One { "eth0" } else { "wan" };
    let guard = &run.sluice.status()?["uplink_guard"];
    ensure!(guard["interface"] == uplink, "{guard}");
    Ok(run)
}

fn downloads(host: &Host) -> anyhow::Result<()> {
    for server in SERVER {
        http::download(host, SocketAddr::new(server, HTTP), 1 << 20)?;
        http::upload(host, SocketAddr::new(server, HTTP), 1 << 20)?;
    }
    Ok(())
}

/// Sends `message` to the router `FORGED` times.
fn forge(host: &Host, message: &[u8]) -> anyhow::Result<()> {
    let socket = host.udp_socket("0.0.0.0:0".parse()?)?;
    for _ in 0..FORGED {
        socket.send_to(message, ENDPOINT)?;
    }
    Ok(())
}

fn message(kind: u8, len: usize) -> Vec<u8> {
    let mut message = vec![0xa5; len];
    message[..4].copy_from_slice(&[kind, 0, 0, 0]);
    message
}

fn forged_datagrams_end_at_the_guard(arms: Arms, datapath: &'static str) {
    lab::test(|lab| {
        let run = guarded(lab, arms, datapath)?;
        let (site, sluice) = (&run.site, &run.sluice);
        let _servers = serve(&site.server)?;
        downloads(&site.laptop)?;
        // No message of the peer was taken for a forged one.
        ensure!(dropped(sluice)? == [0; 3], "{:?}", dropped(sluice)?);
        let passed = frames(sluice, "pass_wireguard")?;
        ensure!(passed > 500, "{passed} messages");

        let by_engine = || -> anyhow::Result<[u64; 2]> {
            Ok([
                sluice.engine_counter("drop_other")?,
                sluice.engine_counter("drop_index")?,
            ])
        };
        let before = by_engine()?;
        for junk in [&b"GET / HTTP/1.1"[..], &[0; 148], &message(2, 93)] {
            forge(&site.phone, junk)?;
        }
        for unknown in [message(2, 92), message(3, 64), message(4, 128)] {
            forge(&site.phone, &unknown)?;
        }
        forge(&site.phone, &message(1, 148))?;
        wait_until(SOON, "the forged datagrams to be dropped", || {
            dropped(sluice).is_ok_and(|[malformed, index, initiation]| {
                malformed == 3 * FORGED
                    && index == 3 * FORGED
                    // Time passes while they are sent.
                    && initiation > FORGED - 2 * INITIATION_BURST
            })
        })
        .with_context(|| format!("{:?}", dropped(sluice)))?;
        ensure!(by_engine()? == before, "some got past the guard");
        let refused = sluice.engine_counter("drop_mac")?;
        ensure!(refused >= INITIATION_BURST, "{refused} initiations arrived");

        // The peer is as well as before, and the metrics tell.
        downloads(&site.laptop)?;
        let wanted = format!(
            "sluice_uplink_guard_frames_total{{verdict=\"drop_index\"}} {}",
            3 * FORGED
        );
        let metrics = sluice.metrics()?;
        ensure!(metrics.lines().any(|line| line == wanted), "{metrics}");
        Ok(())
    });
}

#[test]
fn forged_datagrams_end_at_the_guard_fast() {
    forged_datagrams_end_at_the_guard(Arms::Two, "ebpf");
}

#[test]
fn forged_datagrams_end_at_the_guard_kernel() {
    forged_datagrams_end_at_the_guard(Arms::Two, "kernel");
}

#[test]
fn forged_datagrams_end_at_the_guard_one_armed() {
    forged_datagrams_end_at_the_guard(Arms::One, "ebpf");
}

#[test]
fn what_else_the_uplink_carries_is_not_touched() {
    lab::test(|lab| {
        let run = guarded(lab, Arms::Two, "ebpf")?;
        let (site, sluice) = (&run.site, &run.sluice);
        // Outside the tunnel, from the internet to the router itself.
        let _services = [site.router.http_server(8080)?, site.router.udp_echo(7777)?];
        for ip in [ENDPOINT.ip(), ENDPOINT_V6.ip()] {
            let web = SocketAddr::new(ip, 8080);
            http::download(&site.phone, web, 4 << 20)?;
            http::upload(&site.phone, web, 4 << 20)?;
            ensure!(site.phone.pings(&ip.to_string(), &["-s", "4000"])?, "{ip}");
            let any = if ip.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = site.phone.udp_socket(any.parse()?)?;
            socket.set_read_timeout(Some(SOON))?;
            // The second one comes in fragments.
            for len in [100, 4000] {
                socket.send_to(&http::pattern(len), SocketAddr::new(ip, 7777))?;
                let mut buffer = [0; 5000];
                ensure!(socket.recv(&mut buffer)? == len, "{ip}: {len}");
            }
        }
        ensure!(dropped(sluice)? == [0; 3]);
        Ok(())
    });
}

/// A peer's own program may have the router's listen port as its source port. What comes back must
/// not meet the guard there.
fn a_translated_flow_does_not_get_the_guarded_port(datapath: &'static str) {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::One)?;
        let client = Client::new("laptop", 2)?;
        let mut config = site::config(&[&client], datapath, true)?;
        config.guard = true;
        let sluice = site.router.sluice(&config)?;
        ensure!(sluice.status()?["uplink_guard"]["interface"] == "eth0");
        let tunnel = client.connect(&site.laptop, &config.key)?;
        let argv = ["wg", "set", tunnel.device(), "listen-port", "4242"];
        site.laptop.run(argv)?;
        let _servers = serve(&site.server)?;
        let from = SocketAddr::new(client.addresses[0], ENDPOINT.port());
        let socket = site.laptop.udp_socket(from)?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        wait_until(SOON, "an echo", || {
            let sent = socket.send_to(b"hello", SocketAddr::new(SERVER[0], ECHO));
            sent.is_ok() && socket.recv(&mut [0; 64]).is_ok()
        })?;
        ensure!(dropped(&sluice)? == [0; 3], "{:?}", dropped(&sluice)?);
        Ok(())
    });
}

#[test]
fn a_translated_flow_does_not_get_the_guarded_port_fast() {
    a_translated_flow_does_not_get_the_guarded_port("ebpf");
}

#[test]
fn a_translated_flow_does_not_get_the_guarded_port_kernel() {
    a_translated_flow_does_not_get_the_guarded_port("kernel");
}

/// Waits until the laptop reaches the server through the tunnel.
fn wait_for(host: &Host, to: IpAddr, what: &str) -> anyhow::Result<()> {
    let to = to.to_string();
    wait_until(RENEWAL, what, || {
        host.pings(&to, &["-c", "1"]).unwrap_or(false)
    })
}

/// Puts a new end in the place of a client's old one, which forgets its sessions.
fn renew(run: Running) -> anyhow::Result<Running> {
    // The port must be free.
    drop(run.tunnel);
    Ok(Running {
        tunnel: run.client.connect(&run.site.laptop, &run.config.key)?,
        ..run
    })
}

#[test]
fn peers_come_renew_and_roam() {
    lab::test(|lab| {
        let mut run = guarded(lab, Arms::Two, "ebpf")?;
        let _servers = serve(&run.site.server)?;
        downloads(&run.site.laptop)?;

        // A peer that is configured while the router runs.
        let phone = Client::new("phone", 3)?;
        run.config.peers.push(phone.peer());
        run.sluice.reload(&run.config)?;
        let _phone = phone.connect(&run.site.phone, &run.config.key)?;
        wait_for(&run.site.phone, SERVER[0], "the new peer's ping")?;

        for round in 0..10 {
            run = renew(run)?;
            wait_for(&run.site.laptop, SERVER[0], &format!("ping {round}"))?;
        }

        // To another address, and to the other family.
        let laptop = &run.site.laptop;
        laptop.ip("address delete 203.0.113.10/24 dev eth0")?;
        laptop.ip("address add 203.0.113.77/24 dev eth0")?;
        laptop.ip("route replace default via 203.0.113.1")?;
        wait_for(laptop, SERVER[0], "ping from a new address")?;
        let endpoint = ENDPOINT_V6.to_string();
        let key = &*run.config.key.public;
        let device = run.tunnel.device();
        laptop.run(["wg", "set", device, "peer", key, "endpoint", &*endpoint])?;
        wait_for(laptop, SERVER[1], "ping by the other family")?;
        ensure!(run.sluice.engine_counter("roamed")? >= 2);
        // Not one message was refused, the first with a new index included.
        ensure!(
            dropped(&run.sluice)? == [0; 3],
            "{:?}",
            dropped(&run.sluice)?
        );
        Ok(())
    });
}

#[test]
fn either_end_may_restart() {
    lab::test(|lab| {
        let run = guarded(lab, Arms::Two, "ebpf")?;
        wait_for(&run.site.laptop, SERVER[0], "the first ping")?;

        // The laptop forgets its session and stays silent: the router begins, and the response gets
        // through.
        let run = renew(run)?;
        let laptop = run.client.addresses[0];
        wait_for(&run.site.server, laptop, "the router's own initiation")?;

        // The router forgets its sessions: what the laptop goes on to send names none.
        run.sluice.stop()?;
        let before = run.site.router.footprint()?;
        let sluice = run.site.router.sluice(&run.config)?;
        wait_for(&run.site.laptop, SERVER[0], "the laptop to begin anew")?;
        let strangers = frames(&sluice, "drop_index")?;
        ensure!(strangers > 0, "its old session was not told from others");
        sluice.kill()?;
        let sluice = run.site.router.sluice(&run.config)?;
        wait_for(&run.site.laptop, SERVER[0], "the laptop to begin once more")?;
        sluice.stop()?;
        let left = before.difference(&run.site.router.footprint()?);
        ensure!(left.is_empty(), "left: {}", left.join("\n"));
        Ok(())
    });
}

#[test]
fn a_guard_that_cannot_be_is_told_and_harms_nobody() {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        site.route_overlay()?;
        let client = Client::new("laptop", 2)?;
        let mut config = site::config(&[&client], "ebpf", false)?;
        config.guard = true;
        let mut theirs = Guard::load()?;
        let wan = site.router.ip("-oneline link show dev wan")?;
        let link = Link {
            index: wan.split(':').next().unwrap_or_default().parse()?,
            name: "wan".to_owned(),
        };
        site.router.enter(|| theirs.attach(&link))??;

        let mut sluice = site.router.sluice(&config)?;
        let status = sluice.status()?;
        let guard = &status["uplink_guard"];
        ensure!(guard["interface"].is_null(), "{guard}");
        let reason = guard["reason"].as_str().unwrap_or_default();
        ensure!(reason.contains("another XDP program is there"), "{reason}");
        ensure!(sluice.log().matches("is not guarded").count() == 1);
        let _tunnel = client.connect(&site.laptop, &config.key)?;
        let _servers = serve(&site.server)?;
        downloads(&site.laptop)?;

        // Once the place is free, a reload takes it.
        site.router.enter(|| theirs.detach())??;
        // A program that another test starts holds its descriptor between fork and exec.
        wait_until(SOON, "the place to be free", || {
            let wan = site.router.ip("link show dev wan");
            wan.is_ok_and(|wan| !wan.contains("xdp"))
        })?;
        sluice.reload(&config)?;
        wait_until(SOON, "the guard to be attached", || {
            let status = sluice.status().unwrap_or_default();
            status["uplink_guard"]["interface"] == "wan"
        })?;
        downloads(&site.laptop)?;

        // It goes where the uplink goes.
        site.router
            .ip("route replace default via 10.30.0.1 dev lan")?;
        wait_until(SOON, "the guard to follow the uplink", || {
            let status = sluice.status().unwrap_or_default();
            status["uplink_guard"]["interface"] == "lan"
        })
    });
}

//! What changes while packets flow touches those whom it is about, and nobody else.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context as _, ensure};
use base64::Engine as _;
use lab::site::{self, Arms, Client, ROUTER, Running, SERVER, Site};
use lab::sluice::Sluice;
use lab::{Host, Keypair, wait_until};
use router::engine::{Engine, Offloads, Options, PeerChange, PeerSpec};
use router::wireguard::keys::{PrivateKey, PublicKey};

use super::{HTTP, SOON, serve};

fn until(what: &str, mut condition: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    wait_until(SOON, what, || condition().unwrap_or(false))
}

/// A public key as wg(8)'s protocol has it.
fn hex(key: &str) -> anyhow::Result<String> {
    let bytes = base64::engine::general_purpose::STANDARD.decode(key)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn generation(sluice: &Sluice) -> anyhow::Result<u64> {
    let status = sluice.status()?;
    status["datapath"]["generation"]
        .as_u64()
        .context("no generation")
}

/// The ports of the overlay ends of the flows of `address`, in order.
fn flows_of(sluice: &Sluice, address: &str) -> anyhow::Result<Vec<String>> {
    let flows = sluice.flows()?;
    let flows = flows["flows"].as_array().context("no list of flows")?;
    let ends = flows.iter().filter_map(|flow| flow["overlay"].as_str());
    let mut ends: Vec<String> = ends
        .filter(|end| end.starts_with(address))
        .map(str::to_owned)
        .collect();
    ends.sort();
    Ok(ends)
}

/// Connections into the VPC, one after the other.
fn connections(host: &Host, count: usize) -> anyhow::Result<Vec<TcpStream>> {
    let server = SocketAddr::new(SERVER[0], HTTP);
    (0..count).map(|_| host.tcp_connect(server, SOON)).collect()
}

fn carry(streams: Vec<TcpStream>) -> anyhow::Result<()> {
    for mut stream in streams {
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let count = stream.read(&mut [0; 64])?;
        ensure!(count > 0, "a connection has ended");
    }
    Ok(())
}

/// Peers come, change and go beside one with open connections: it keeps each of its flows, and no
/// flow is judged anew because somebody came.
#[test]
fn a_new_peer_touches_nobody_else() {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, "ebpf", true)?;
        let _servers = serve(&run.site.server)?;
        ensure!(run.site.laptop.pings(&SERVER[0].to_string(), &[])?);
        let streams = connections(&run.site.laptop, 3)?;
        let flows = flows_of(&run.sluice, "100.64.0.2:")?;
        ensure!(flows.len() >= 3, "{flows:?}");
        let begin = generation(&run.sluice)?;

        let phone = Client::new("phone", 3)?;
        let key = hex(&phone.key.public)?;
        for n in 10..30_u8 {
            let other = hex(&Client::new("other", n)?.key.public)?;
            run.sluice
                .set(&format!("public_key={other}\nallowed_ip=100.64.0.{n}/32"))?;
        }
        run.sluice.set(&format!(
            "public_key={key}\nallowed_ip=100.64.0.3/32\nallowed_ip=fd64::3/128"
        ))?;
        let tunnel = phone.connect(&run.site.phone, &run.config.key)?;
        ensure!(run.site.phone.pings(&SERVER[0].to_string(), &[])?);
        let theirs = connections(&run.site.phone, 2)?;
        run.sluice.set(&format!(
            "public_key={key}\npersistent_keepalive_interval=25"
        ))?;
        ensure!(
            generation(&run.sluice)? == begin,
            "flows were judged anew: {begin} and {}",
            generation(&run.sluice)?
        );
        ensure!(flows_of(&run.sluice, "100.64.0.2:")? == flows);

        // Whoever goes takes nothing but its own.
        run.sluice.set(&format!("public_key={key}\nremove=true"))?;
        drop((theirs, tunnel));
        ensure!(flows_of(&run.sluice, "100.64.0.2:")? == flows);
        carry(streams)?;
        let status = run.sluice.status()?;
        ensure!(
            status["problems"].as_array().is_some_and(Vec::is_empty),
            "{status}"
        );
        run.sluice.stop()
    });
}

/// Hundreds of routes that lead none of the router's packets come and go: no flow is judged anew.
#[test]
fn routes_of_others_have_no_flow_judged_anew() {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, "ebpf", true)?;
        ensure!(run.site.laptop.pings(&SERVER[0].to_string(), &[])?);
        let router = &run.site.router;
        let uptime = || -> anyhow::Result<u64> {
            let status = run.sluice.status()?;
            status["uptime_seconds"].as_u64().context("no uptime")
        };
        // What the start has brought is over when a route that leads packets counts just once.
        let mut before = generation(&run.sluice)?;
        until("the start to be over", || {
            let now = generation(&run.sluice)?;
            let is_over = now == before;
            before = now;
            Ok(is_over)
        })?;
        let (begin, since) = (generation(&run.sluice)?, uptime()?);
        // The daemon looks at changes within a fraction of a second: here it has two.
        until("two seconds of changes", || {
            let lines = (0..100).map(|n| {
                let net = format!("11.0.{n}.0/24");
                format!("route replace {net} via 198.51.100.254\nroute del {net}\n")
            });
            let ip = router.command(["ip", "-batch", "-"]);
            ip.stdin(lines.collect::<String>()).run()?;
            Ok(uptime()? >= since + 2)
        })?;
        ensure!(generation(&run.sluice)? == begin, "flows were judged anew");
        // One that does lead packets is heard.
        router.ip("route add 10.20.9.0/24 via 10.30.0.1")?;
        until("a new generation", || Ok(generation(&run.sluice)? > begin))?;
        run.sluice.stop()
    });
}

/// The router takes other overlay addresses and another MTU from its file while it runs, and
/// connections that have nothing to do with them go on.
#[test]
fn addresses_and_mtu_change_while_it_runs() {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        let client = Client::new("laptop", 2)?;
        let mut config = site::config(&[&client], "auto", true)?;
        let mut sluice = site.router.sluice(&config)?;
        let _tunnel = client.connect(&site.laptop, &config.key)?;
        let _servers = serve(&site.server)?;
        ensure!(site.laptop.pings(&SERVER[0].to_string(), &[])?);
        ensure!(site.laptop.pings(&ROUTER[0].to_string(), &[])?);
        let streams = connections(&site.laptop, 2)?;

        config.addresses = vec!["100.64.0.77/24".to_owned(), "fd64::77/64".to_owned()];
        config.mtu = Some(1300);
        sluice.reload(&config)?;
        until("the new addresses", || {
            let shown = site.router.ip("address show dev sluice0")?;
            let is_new = shown.contains("100.64.0.77/24") && shown.contains("fd64::77/64");
            Ok(is_new && !shown.contains("100.64.0.1/") && shown.contains("mtu 1300"))
        })?;
        until("the status", || {
            let status = sluice.status()?;
            let device = &status["device"];
            let is_new = device["addresses"][0] == "100.64.0.77/24" && device["mtu"] == 1300;
            Ok(is_new && status["problems"].as_array().is_some_and(Vec::is_empty))
        })?;
        ensure!(site.laptop.pings("100.64.0.77", &[])?);
        carry(streams)?;
        sluice.stop()
    });
}

/// A peer that the engine cannot take keeps nobody else out, and is reached once it is mended. Every source
/// of configuration finds such a peer before, so the engine is told here without one.
#[test]
fn a_peer_that_was_left_out_is_reached_when_it_is_mended() {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        let clients = [Client::new("laptop", 2)?, Client::new("phone", 3)?];
        let router = Keypair::generate()?;
        let options = Options {
            device: "sluice0".to_owned(),
            mtu: 1420,
            listen_port: 51820,
            fwmark: 0x1000,
            workers: Some(2),
            offloads: Offloads::default(),
        };
        let private: PrivateKey = router.private.parse()?;
        let engine = site.router.enter(|| Engine::start(options, &private))??;
        site.router
            .ip(&format!("address add {}/24 dev sluice0", ROUTER[0]))?;
        site.router.ip("link set sluice0 up")?;
        let specs = clients.each_ref().map(|client| {
            let key: PublicKey = client.key.public.parse()?;
            let address = client.addresses[0];
            anyhow::Ok(PeerSpec {
                public_key: key,
                preshared_key: None,
                allowed_ips: vec![address.into()],
                endpoint: None,
                others: Vec::new(),
                keepalive: None,
                roaming: true,
                masquerade: Vec::new(),
            })
        });
        let [laptop, phone] = specs;
        let (laptop, phone) = (laptop?, phone?);
        let bad = PeerSpec {
            // A point of small order.
            public_key: PublicKey([0; 32]),
            ..phone.clone()
        };
        let skipped = engine.set_peers(&[bad.clone(), laptop.clone()])?;
        ensure!(skipped.len() == 1 && skipped[0].public_key == bad.public_key);
        let inside = ROUTER[0].to_string();
        let _tunnels = [
            clients[0].connect(&site.laptop, &router)?,
            clients[1].connect(&site.phone, &router)?,
        ];
        until("the laptop", || site.laptop.pings(&inside, &[]))?;
        ensure!(!site.phone.pings(&inside, &[])?, "nobody knows its key");

        let change = PeerChange {
            set: vec![phone],
            remove: vec![bad.public_key],
        };
        ensure!(engine.change_peers(&change)?.is_empty());
        until("the phone", || site.phone.pings(&inside, &[]))?;
        ensure!(site.laptop.pings(&inside, &[])?);
        Ok(())
    });
}

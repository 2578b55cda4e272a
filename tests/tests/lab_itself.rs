//! The lab without Sluice: what the other tests rest on.

use std::ffi::OsStr;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use lab::site::{self, Arms, Site};
use lab::{Host, Keypair, Lab, Tunnel, http, packet, poll, wait_until};

const SOON: Duration = Duration::from_secs(10);
const MIB: usize = 1 << 20;

fn pair(lab: &Lab) -> anyhow::Result<(Host, Host)> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    lab.link(
        a.port("eth0")
            .address("192.0.2.1/24")
            .address("2001:db8::1/64"),
        b.port("eth0")
            .address("192.0.2.2/24")
            .address("2001:db8::2/64"),
    )?;
    Ok((a, b))
}

fn echoes(host: &Host, server: SocketAddr, len: usize) -> anyhow::Result<()> {
    let any = if server.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    };
    let socket = host.udp_socket(any.parse()?)?;
    socket.set_read_timeout(Some(SOON))?;
    let sent = http::pattern(len);
    socket.send_to(&sent, server)?;
    let mut buffer = vec![0; len + 1];
    let (got, from) = socket.recv_from(&mut buffer).context("no echo")?;
    ensure!(from == server && buffer[..got] == sent);
    Ok(())
}

#[test]
fn hosts_reach_each_other_and_serve() {
    lab::test(|lab| {
        let (a, b) = pair(lab)?;
        let _web = b.http_server(80)?;
        let _echo = b.udp_echo(7)?;
        for address in ["192.0.2.2", "[2001:db8::2]"] {
            let web: SocketAddr = format!("{address}:80").parse()?;
            assert!(a.pings(address.trim_matches(['[', ']']), &[])?);
            assert_eq!(http::get(&a, web, "/")?, http::GREETING.as_bytes());
            http::download(&a, web, MIB)?;
            http::upload(&a, web, MIB)?;
            assert!(http::get(&a, web, "/nothing").is_err());
            echoes(&a, format!("{address}:7").parse()?, 20_000)?;
        }
        Ok(())
    });
}

#[test]
fn a_switch_joins_and_a_gateway_forwards() {
    lab::test(|lab| {
        let (a, b, c) = (lab.host("a")?, lab.host("b")?, lab.host("c")?);
        let gateway = lab.gateway("gateway")?;
        lab.switch(
            "switch",
            [
                a.port("eth0").address("192.0.2.1/24"),
                b.port("eth0").address("192.0.2.2/24"),
                gateway.port("eth0").address("192.0.2.254/24"),
            ],
        )?;
        lab.link(
            gateway.port("eth1").address("198.51.100.254/24"),
            c.port("eth0").address("198.51.100.1/24"),
        )?;
        a.route("default", "192.0.2.254")?;
        c.route("default", "198.51.100.254")?;
        assert!(a.pings("192.0.2.2", &[])?);
        assert!(a.pings("198.51.100.1", &[])?);
        assert!(!a.pings("198.51.100.1", &["-t", "1"])?, "the TTL must end");
        Ok(())
    });
}

#[test]
fn ports_have_the_settings_asked_for() {
    lab::test(|lab| {
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        lab.link(
            a.port("eth0")
                .address("192.0.2.1/24")
                .mtu(1400)
                .offload("tso", false),
            b.port("eth0").address("192.0.2.2/24").loss(100.0),
        )?;
        let features = a.run(["ethtool", "-k", "eth0"])?;
        assert!(features.contains("tcp-segmentation-offload: off"));
        assert!(a.ip("link show eth0")?.contains("mtu 1400"));
        assert!(b.ip("link show eth0")?.contains("mtu 1500"));
        assert!(!a.pings("192.0.2.2", &[])?, "everything is lost");

        let (c, d) = (lab.host("c")?, lab.host("d")?);
        lab.link(
            c.port("eth0").address("192.0.2.1/24"),
            d.port("eth0")
                .address("192.0.2.2/24")
                .mtu(1400)
                .loss(1.0)
                .rate(400),
        )?;
        let _web = d.http_server(80)?;
        http::download(&c, "192.0.2.2:80".parse()?, MIB)?;
        http::upload(&c, "192.0.2.2:80".parse()?, MIB)?;
        Ok(())
    });
}

#[test]
fn packets_are_delayed_where_the_kernel_can() {
    lab::test(|lab| {
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        if !lab::has_netem(&a)? {
            eprintln!("skipped: this kernel has no netem (CONFIG_NET_SCH_NETEM)");
            return Ok(());
        }
        lab.link(
            a.port("eth0").address("192.0.2.1/24"),
            b.port("eth0")
                .address("192.0.2.2/24")
                .delay(Duration::from_millis(200)),
        )?;
        let impatient = a.command(["ping", "-c1", "-W0.1", "192.0.2.2"]).output()?;
        assert!(!impatient.status.success());
        assert!(a.pings("192.0.2.2", &[])?);
        Ok(())
    });
}

#[test]
fn a_capture_sees_the_mss_of_both_ends() {
    lab::test(|lab| {
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        lab.link(
            a.port("eth0").address("192.0.2.1/24").mtu(1300),
            b.port("eth0").address("192.0.2.2/24"),
        )?;
        let _web = b.http_server(80)?;
        let capture = a.capture("eth0")?;
        http::get(&a, "192.0.2.2:80".parse()?, "/")?;
        let mss = capture.find(SOON, "a SYN", |p| p.syn_mss())?;
        assert_eq!(mss, 1260);
        let mss = capture.find(SOON, "a SYN-ACK", |p| p.syn_ack_mss())?;
        assert_eq!(mss, 1460);
        Ok(())
    });
}

#[test]
fn two_wireguard_go_ends_carry_traffic_through_a_gateway() {
    lab::test(|lab| {
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        let gateway = lab.gateway("gateway")?;
        lab.link(
            a.port("eth0").address("192.0.2.1/24"),
            gateway.port("eth0").address("192.0.2.254/24"),
        )?;
        lab.link(
            gateway.port("eth1").address("198.51.100.254/24"),
            b.port("eth0").address("198.51.100.1/24"),
        )?;
        a.route("default", "192.0.2.254")?;
        b.route("default", "198.51.100.254")?;
        let (key_a, key_b) = (Keypair::generate()?, Keypair::generate()?);
        let at_a = a.wireguard_go(
            &Tunnel::new(&key_a)
                .address("10.9.0.1/24")
                .address("fd09::1/64")
                .peer(
                    &key_b.public,
                    "198.51.100.1:51820".parse::<SocketAddr>()?,
                    ["10.9.0.2/32", "fd09::2/128"],
                ),
        )?;
        let _at_b = b.wireguard_go(
            &Tunnel::new(&key_b)
                .address("10.9.0.2/24")
                .address("fd09::2/64")
                .peer(&key_a.public, None, ["10.9.0.1/32", "fd09::1/128"]),
        )?;
        let _web = b.http_server(80)?;
        let _echo = b.udp_echo(7)?;
        let underlay = gateway.capture("eth1")?;
        for address in ["10.9.0.2", "[fd09::2]"] {
            http::download(&a, format!("{address}:80").parse()?, 2 * MIB)?;
            http::upload(&a, format!("{address}:80").parse()?, 2 * MIB)?;
            echoes(&a, format!("{address}:7").parse()?, 5_000)?;
        }
        assert!(at_a.has_handshake(&key_b.public)?);
        let ports = underlay.drain(|p| p.ports().map(|ports| (p.protocol, ports)));
        assert!(!ports.is_empty());
        for seen in ports {
            assert_eq!(seen, (packet::UDP, (51820, 51820)), "the tunnel alone");
        }
        Ok(())
    });
}

#[test]
fn commands_report_what_happened() {
    lab::test(|lab| {
        let host = lab.host("a")?;
        assert_eq!(host.command(["cat"]).stdin("text").run()?, "text");
        let failed = host.run(["sh", "-c", "echo out; echo err >&2; exit 3"]);
        let message = format!("{:?}", failed.unwrap_err());
        for part in ["exit status: 3", "out", "err"] {
            assert!(message.contains(part), "{message}");
        }
        let late = host
            .command(["sh", "-c", "echo begun; sleep 1000"])
            .timeout(Duration::from_millis(200))
            .output();
        let message = format!("{:?}", late.unwrap_err());
        assert!(message.contains("begun"), "{message}");
        let missing = host.run(["no-such-program"]).unwrap_err();
        assert!(format!("{missing:?}").contains("requirements.rs"));
        let user = host.command(["id", "-u"]).user(65534, 65534).run()?;
        assert_eq!(user.trim(), "65534");
        let mut early = host.spawn("early", host.command(["sh", "-c", "echo bye; exit 1"]))?;
        let ended = early.ready(SOON, "never", || false).unwrap_err();
        assert!(format!("{ended:?}").contains("bye"));
        Ok(())
    });
}

/// A process that starts others, one of which leaves its session.
fn litter(host: &Host) -> anyhow::Result<lab::Process> {
    let script = "sleep 1000 & setsid sleep 1000 & wait";
    let mut process = host.spawn("litter", host.command(["sh", "-c", script]))?;
    process.ready(SOON, "two children", || inhabitants(host).len() == 3)?;
    Ok(process)
}

fn inhabitants(host: &Host) -> Vec<String> {
    let pids = host.run(["ip", "netns", "pids", host.namespace()]);
    // The command runs inside and lists itself.
    let all: Vec<String> = pids
        .unwrap_or_default()
        .lines()
        .map(str::to_owned)
        .collect();
    all.into_iter()
        .filter(|pid| std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok())
        .collect()
}

#[test]
fn a_dropped_or_panicking_lab_leaves_nothing() {
    lab::test(|_| {
        let mut ids = Vec::new();
        let mut pids = Vec::new();
        for panics in [false, true] {
            let run = std::panic::catch_unwind(|| {
                let lab = Lab::new().unwrap();
                let (a, _) = pair(&lab).unwrap();
                let process = litter(&a).unwrap();
                let key = Keypair::generate().unwrap();
                let _tunnel = a.wireguard_go(&Tunnel::new(&key)).unwrap();
                assert!(lab::traces(lab.id()).len() >= 4);
                let found = (lab.id().to_owned(), inhabitants(&a));
                if panics {
                    std::panic::panic_any(found);
                }
                drop(process);
                found
            });
            let (id, inside) = match run {
                Ok(found) => found,
                Err(panic) => *panic.downcast().expect("the panic of the test itself"),
            };
            ids.push(id);
            pids.extend(inside);
        }
        for id in ids {
            assert_eq!(lab::traces(&id), [""; 0]);
        }
        assert!(pids.len() >= 6);
        for pid in pids {
            wait_until(SOON, "the end of every process", || has_ended(&pid))?;
        }
        Ok(())
    });
}

fn has_ended(pid: &str) -> bool {
    // An orphan may stay a zombie for as long as nobody reaps it.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

const VICTIM: &str = "SLUICE_LAB_VICTIM";

/// The run that gets killed: it tells the id of its lab, and then waits.
fn victim(report: &OsStr) {
    lab::test(|lab| {
        let (a, _) = pair(lab)?;
        let _litter = litter(&a)?;
        let _tunnel = a.wireguard_go(&Tunnel::new(&Keypair::generate()?))?;
        std::fs::write(report, lab.id())?;
        loop {
            std::thread::park();
        }
    });
}

#[test]
fn the_next_run_removes_what_a_killed_one_left() {
    if let Some(report) = std::env::var_os(VICTIM) {
        return victim(&report);
    }
    lab::test(|lab| {
        pair(lab)?;
        let report = lab.folder().join("victim");
        let mut victim = Command::new(std::env::current_exe()?)
            .args([
                "--exact",
                "lab_itself::the_next_run_removes_what_a_killed_one_left",
            ])
            .env(VICTIM, &report)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let id = poll(2 * SOON, "the other run's lab", || {
            std::fs::read_to_string(&report)
                .ok()
                .filter(|id| !id.is_empty())
        });
        let swept_alive = lab::sweep();
        victim.kill()?;
        let (id, swept_alive) = (id?, swept_alive?);
        assert!(!swept_alive.contains(&id), "it was alive");
        victim.wait()?;
        assert!(!lab::traces(&id).is_empty(), "kill -9 leaves something");
        // Any run may be the one that removes it.
        lab::sweep()?;
        assert_eq!(lab::traces(&id), [""; 0]);
        assert!(!lab::traces(lab.id()).is_empty(), "ours is alive");
        Ok(())
    });
}

/// Its owner may not be entered yet when another run sweeps.
#[test]
fn a_lab_in_the_making_is_spared() {
    lab::test(|lab| {
        let traces = lab::traces(lab.id());
        let folder = traces.iter().find(|trace| trace.starts_with("/tmp/"));
        let owner = Path::new(folder.context("the lab has no folder")?).join("owner");
        for written in [Some(""), None] {
            match written {
                Some(start) => std::fs::write(&owner, start)?,
                None => std::fs::remove_file(&owner)?,
            }
            assert!(!lab::sweep()?.contains(&lab.id().to_owned()), "{written:?}");
        }
        Ok(())
    });
}

#[test]
fn a_footprint_shows_what_was_left() {
    lab::test(|lab| {
        let (a, _) = pair(lab)?;
        let before = a.footprint()?;
        assert_eq!(before.difference(&a.footprint()?), [""; 0]);
        a.ip("rule add priority 99 lookup 99")?;
        a.ip("route add 10.0.0.0/8 via 192.0.2.2 table 99")?;
        a.sysctl("net/ipv4/conf/eth0/forwarding", "1")?;
        a.command(["nft", "add", "table", "inet", "left"]).run()?;
        let left = before.difference(&a.footprint()?).join("\n");
        for part in [
            "lookup 99",
            "10.0.0.0/8",
            "eth0/forwarding: + 1",
            "inet left",
        ] {
            assert!(left.contains(part), "{part} is missing in:\n{left}");
        }
        a.ip("rule delete priority 99")?;
        a.ip("route flush table 99")?;
        a.sysctl("net/ipv4/conf/eth0/forwarding", "0")?;
        a.command(["nft", "delete", "table", "inet", "left"])
            .run()?;
        assert_eq!(before.difference(&a.footprint()?), [""; 0]);
        Ok(())
    });
}

#[test]
fn the_sites_networks_work_without_a_tunnel() {
    lab::test(|lab| {
        for arms in [Arms::One, Arms::Two] {
            let lab = if arms == Arms::One { lab } else { &Lab::new()? };
            let site = Site::new(lab, arms)?;
            for server in site::SERVER {
                assert!(site.router.pings(&server.to_string(), &[])?, "{server}");
            }
            // The laptop's datagrams for the public endpoint arrive at the router's own address.
            let any: SocketAddr = "[::]:51820".parse()?;
            let socket = site.router.udp_socket(any)?;
            socket.set_read_timeout(Some(SOON))?;
            let laptop = site.laptop.udp_socket("0.0.0.0:0".parse()?)?;
            laptop.set_read_timeout(Some(SOON))?;
            laptop.send_to(b"up", site::ENDPOINT)?;
            let (_, from) = socket.recv_from(&mut [0; 2])?;
            socket.send_to(b"down", from)?;
            assert_eq!(laptop.recv_from(&mut [0; 4])?, (4, site::ENDPOINT));
        }
        Ok(())
    });
}

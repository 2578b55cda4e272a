//! Who may send what where.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use lab::site::{self, Arms, CORE, Client, Running, SERVER, Site, VPC};
use lab::sluice::{Rule, Sluice};
use lab::{Host, Wireguard, http, wait_until};

use super::{ECHO, HTTP, Path, SOON, echoes, on_every_path, serve, warm_up};

on_every_path!(
    spoofed_sources_are_dropped_and_counted,
    what_is_not_advertised_cannot_be_reached,
    a_peer_removed_from_the_file_stops_working_and_others_go_on,
    rules_allow_what_they_name_and_nothing_else,
    who_is_denied_is_told_if_so_configured,
    a_connection_that_is_no_longer_allowed_is_reset,
    what_was_denied_is_listed,
);

/// Long enough for an answer, short enough to wait for none.
const BRIEFLY: Duration = Duration::from_millis(500);

fn gets(host: &Host, server: IpAddr) -> bool {
    let stream = host.tcp_connect(SocketAddr::new(server, HTTP), BRIEFLY);
    stream.is_ok()
}

fn spoofed_sources_are_dropped_and_counted(path: Path) {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        let laptop = &run.site.laptop;
        let at_server = run.site.server.capture("eth0")?;
        let device = run.tunnel.device();
        for (server, strange) in SERVER.into_iter().zip(["100.64.0.77", "fd64::77"]) {
            let length = if server.is_ipv4() { 32 } else { 128 };
            laptop.ip(&format!("address add {strange}/{length} dev {device}"))?;
            let before = run.sluice.engine_counter("drop_source")?;
            assert!(!laptop.pings(&server.to_string(), &["-I", strange])?);
            wait_until(SOON, "three drops to be counted", || {
                let now = run.sluice.engine_counter("drop_source");
                now.is_ok_and(|now| now >= before + 3)
            })?;
            laptop.ip(&format!("address delete {strange}/{length} dev {device}"))?;
            assert!(laptop.pings(&server.to_string(), &[])?, "with its own");
        }
        let sources = at_server.drain(|p| p.icmp().map(|_| p.source));
        let strange: IpAddr = "100.64.0.77".parse()?;
        let strange_v6: IpAddr = "fd64::77".parse()?;
        assert!(!sources.contains(&strange) && !sources.contains(&strange_v6));
        Ok(())
    });
}

fn what_is_not_advertised_cannot_be_reached(path: Path) {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        site.route_overlay()?;
        let client = Client::new("laptop", 2)?;
        let mut config = site::config(&[&client], path.datapath(), path.snat())?;
        config.routes.retain(|route| route.cidr != VPC[1]);
        let _sluice = site.router.sluice(&config)?;
        let _tunnel = client.connect(&site.laptop, &config.key)?;
        assert!(site.laptop.pings(&SERVER[0].to_string(), &[])?);
        let at_server = site.server.capture("eth0")?;
        let at_core = site.core.as_ref().expect("two-armed").capture("router")?;
        for target in [CORE[0], SERVER[1]] {
            let reached = site.laptop.pings(&target.to_string(), &[])?;
            assert!(!reached, "{path:?} {target}");
        }
        let echo_request = |p: &lab::packet::Packet<'_>| match p.icmp() {
            Some((8 | 128, 0)) => Some(p.destination),
            _ => None,
        };
        for capture in [at_server, at_core] {
            let arrived = capture.drain(echo_request);
            assert!(arrived.is_empty(), "{path:?} {arrived:?}");
        }
        Ok(())
    });
}

/// Two clients, so that one can be shut out and the other not.
struct Pair {
    site: Site,
    config: lab::sluice::Config,
    sluice: Sluice,
    tunnels: Vec<Wireguard>,
    clients: [Client; 2],
}

impl Pair {
    fn new(lab: &lab::Lab, path: Path, rules: Vec<Rule>) -> anyhow::Result<Self> {
        let site = Site::new(lab, Arms::Two)?;
        if !path.snat() {
            site.route_overlay()?;
        }
        let clients = [Client::new("laptop", 2)?, Client::new("phone", 3)?];
        let [laptop, phone] = &clients;
        let mut config = site::config(&[laptop, phone], path.datapath(), path.snat())?;
        config.rules = rules;
        let sluice = site.router.sluice(&config)?;
        let tunnels = vec![
            laptop.connect(&site.laptop, &config.key)?,
            phone.connect(&site.phone, &config.key)?,
        ];
        Ok(Self {
            site,
            config,
            sluice,
            tunnels,
            clients,
        })
    }
}

fn a_peer_removed_from_the_file_stops_working_and_others_go_on(path: Path) {
    lab::test(|lab| {
        let mut pair = Pair::new(lab, path, Vec::new())?;
        let _servers = serve(&pair.site.server)?;
        for server in SERVER {
            http::get(&pair.site.phone, SocketAddr::new(server, HTTP), "/")?;
        }
        let (laptop, phone) = (pair.site.laptop.clone(), pair.site.phone.clone());
        pair.config.peers.retain(|peer| peer.name != "phone");
        pair.sluice.reload(&pair.config)?;
        wait_until(SOON, "the peer to be gone", || {
            let status = pair.sluice.status().unwrap_or_default();
            status["peers"].as_array().is_some_and(|all| all.len() == 1)
        })?;
        for server in SERVER {
            assert!(!phone.pings(&server.to_string(), &[])?, "{path:?}");
            assert!(!gets(&phone, server), "{path:?}");
            http::get(&laptop, SocketAddr::new(server, HTTP), "/")?;
        }
        // And it may come back. A new tunnel, for the old one would wait before it tries again.
        pair.config.peers.push(pair.clients[1].peer());
        pair.sluice.reload(&pair.config)?;
        drop(pair.tunnels.pop());
        let tunnel = pair.clients[1].connect(&phone, &pair.config.key)?;
        pair.tunnels.push(tunnel);
        wait_until(SOON, "the phone to be back", || gets(&phone, SERVER[0]))
    });
}

pub(super) fn to_vpc(from: &str, ports: &str, protocols: &[&str]) -> Rule {
    Rule {
        from: vec![from.to_owned()],
        to: vec![
            format!("{}{ports}", VPC[0]),
            if ports.is_empty() {
                VPC[1].to_owned()
            } else {
                format!("[{}]{ports}", VPC[1])
            },
        ],
        protocols: protocols.iter().map(|&p| p.to_owned()).collect(),
    }
}

fn rules_allow_what_they_name_and_nothing_else(path: Path) {
    lab::test(|lab| {
        let web_only = to_vpc("laptop", ":80", &["tcp"]);
        let mut pair = Pair::new(lab, path, vec![web_only])?;
        let _servers = serve(&pair.site.server)?;
        let (laptop, phone) = (pair.site.laptop.clone(), pair.site.phone.clone());
        for server in SERVER {
            http::download(&laptop, SocketAddr::new(server, HTTP), 1 << 20)?;
            let elsewhere = SocketAddr::new(server, 81);
            let refused = laptop.tcp_connect(elsewhere, BRIEFLY).unwrap_err();
            let refusal = refused
                .downcast_ref::<std::io::Error>()
                .expect("of connect");
            assert_eq!(
                refusal.kind(),
                std::io::ErrorKind::TimedOut,
                "{path:?}: the server itself would refuse"
            );
            assert!(echoes(&laptop, server, 100, BRIEFLY).is_err(), "{path:?}");
            // Who may use a service may ping its host.
            let address = server.to_string();
            assert!(laptop.pings(&address, &[])?, "{path:?}");
            assert!(!phone.pings(&address, &[])?, "{path:?}");
            assert!(!gets(&phone, server), "{path:?}");
        }
        pair.config.rules.push(to_vpc("phone", "", &[]));
        pair.sluice.reload(&pair.config)?;
        wait_until(SOON, "the new rule", || gets(&phone, SERVER[0]))?;
        for server in SERVER {
            echoes(&phone, server, 100, SOON)?;
            assert!(phone.pings(&server.to_string(), &[])?, "{path:?}");
            assert!(echoes(&laptop, server, 100, BRIEFLY).is_err(), "{path:?}");
        }
        // Without rules, peers may reach every route.
        pair.config.rules.clear();
        pair.sluice.reload(&pair.config)?;
        wait_until(SOON, "no rules", || {
            echoes(&laptop, SERVER[0], 100, BRIEFLY).is_ok()
        })
    });
}

/// Who is not let through learns it at once: a closed door to TCP, an ICMP error to UDP and ping.
fn is_told(host: &Host, server: IpAddr, path: Path) -> anyhow::Result<()> {
    let refused = host.tcp_connect(SocketAddr::new(server, HTTP), SOON);
    let refused = refused.err().context("connected")?;
    let refusal = refused.downcast_ref::<io::Error>().context("of connect")?;
    ensure!(
        refusal.kind() == io::ErrorKind::ConnectionRefused,
        "{path:?} {server}: {refusal}"
    );
    let any: SocketAddr = match server {
        IpAddr::V4(_) => "0.0.0.0:0".parse()?,
        IpAddr::V6(_) => "[::]:0".parse()?,
    };
    let socket = host.udp_socket(any)?;
    socket.set_read_timeout(Some(SOON))?;
    socket.connect(SocketAddr::new(server, ECHO))?;
    socket.send(b"hello")?;
    let told = socket.recv(&mut [0; 8]).err().context("an echo")?;
    // ip(7) and ipv6(7), of "administratively prohibited".
    let wanted = match server {
        IpAddr::V4(_) => libc::EHOSTUNREACH,
        IpAddr::V6(_) => libc::EACCES,
    };
    ensure!(
        told.raw_os_error() == Some(wanted),
        "{path:?} {server}: {told}"
    );
    let ping = ["ping", "-n", "-c", "1", "-W", "5", &server.to_string()];
    let said = host.command(ping).output()?.stdout;
    let words = match server {
        IpAddr::V4(_) => "Packet filtered",
        IpAddr::V6(_) => "Administratively prohibited",
    };
    ensure!(said.contains(words), "{path:?} {server}: {said}");
    Ok(())
}

fn who_is_denied_is_told_if_so_configured(path: Path) {
    lab::test(|lab| {
        let mut pair = Pair::new(lab, path, vec![to_vpc("laptop", "", &[])])?;
        let _servers = serve(&pair.site.server)?;
        let (laptop, phone) = (pair.site.laptop.clone(), pair.site.phone.clone());
        for server in SERVER {
            assert!(!gets(&phone, server), "{path:?}");
        }
        pair.config.reject = true;
        pair.sluice.reload(&pair.config)?;
        wait_until(SOON, "the change", || {
            is_told(&phone, SERVER[0], path).is_ok()
        })?;
        let told = |program: &str| pair.sluice.packets(program, "reject_policy");
        for server in SERVER {
            is_told(&phone, server, path)?;
            echoes(&laptop, server, 100, SOON)?;
        }
        let program = match path.datapath() {
            "ebpf" => "from_overlay",
            _ => "kernel_from_overlay",
        };
        assert!(told(program)? >= 6, "{path:?}");
        // Where the subnet may begin something, it is told too.
        if !path.snat() {
            let _services = serve(&phone)?;
            for address in pair.clients[1].addresses {
                is_told(&pair.site.server, address, path)?;
            }
            let program = match path.datapath() {
                "ebpf" => "from_subnet",
                _ => "kernel_to_overlay",
            };
            assert!(told(program)? >= 6, "{path:?}");
        }
        pair.config.reject = false;
        pair.sluice.reload(&pair.config)?;
        wait_until(SOON, "silence", || {
            let address = SocketAddr::new(SERVER[0], HTTP);
            let refused = phone.tcp_connect(address, BRIEFLY).err();
            let kind = refused.and_then(|e| Some(e.downcast_ref::<io::Error>()?.kind()));
            kind == Some(io::ErrorKind::TimedOut)
        })
    });
}

fn a_connection_that_is_no_longer_allowed_is_reset(path: Path) {
    lab::test(|lab| {
        let mut pair = Pair::new(lab, path, vec![to_vpc("laptop", "", &[])])?;
        let _servers = serve(&pair.site.server)?;
        let mut streams = Vec::new();
        for server in SERVER {
            let address = SocketAddr::new(server, HTTP);
            streams.push(pair.site.laptop.tcp_connect(address, SOON)?);
        }
        pair.config.reject = true;
        pair.config.rules = vec![to_vpc("phone", "", &[])];
        pair.sluice.reload(&pair.config)?;
        wait_until(SOON, "the change", || {
            is_told(&pair.site.laptop, SERVER[0], path).is_ok()
        })?;
        // On the kernel's path old flows end a moment after new ones are refused. Who has made the
        // change answers when it is whole.
        pair.sluice.status()?;
        for mut stream in streams {
            stream.set_read_timeout(Some(SOON))?;
            // Something else may have been sent already, and answered.
            let asked = stream.write_all(b"GET / HTTP/1.0\r\n\r\n");
            let answered = asked.and_then(|()| stream.read(&mut [0; 1]));
            let ended = answered.err().context("an answer")?;
            assert_eq!(
                ended.kind(),
                io::ErrorKind::ConnectionReset,
                "{path:?}: {ended}"
            );
        }
        Ok(())
    });
}

fn what_was_denied_is_listed(path: Path) {
    lab::test(|lab| {
        let pair = Pair::new(lab, path, vec![to_vpc("laptop", "", &[])])?;
        for server in SERVER {
            assert!(!gets(&pair.site.phone, server), "{path:?}");
        }
        if path.datapath() == "kernel" {
            let told = pair.sluice.denied(&[])?;
            assert!(!told.status.success());
            assert!(told.stderr.contains("only counts"), "{}", told.stderr);
            return Ok(());
        }
        for (server, phone) in SERVER.into_iter().zip(pair.clients[1].addresses) {
            let words = ["--json", "--port", "80", "--address", &server.to_string()];
            let mut packet = serde_json::Value::Null;
            wait_until(SOON, "the packet to be listed", || {
                let told = pair.sluice.denied(&words).map(|told| told.stdout);
                let list = told.ok().and_then(|text| serde_json::from_str(&text).ok());
                packet = list.unwrap_or(packet.take())["packets"][0].take();
                packet.is_object()
            })?;
            let address = |key: &str| packet[key].as_str()?.parse::<SocketAddr>().ok();
            assert_eq!(address("destination"), Some(SocketAddr::new(server, HTTP)));
            assert_eq!(address("source").map(|at| at.ip()), Some(phone));
            for (key, wanted) in [
                ("verdict", "drop_policy"),
                ("program", "from_overlay"),
                ("protocol", "tcp"),
                ("peer", "phone"),
                ("tcp_flags", "SYN"),
            ] {
                assert_eq!(packet[key], wanted, "{packet:#}");
            }
        }
        let page = pair.sluice.denied(&["--protocol", "tcp"])?.stdout;
        assert!(
            page.contains("drop_policy") && page.contains("phone"),
            "{page}"
        );
        let none = pair.sluice.denied(&["--port", "81"])?.stdout;
        assert_eq!(none.lines().count(), 1, "{none}");
        Ok(())
    });
}

/// One side may call the other, not the other way round, and the router has forgotten that it did: a
/// segment from the other one is not answered, for the next one of the caller's brings the connection
/// back.
fn may_belong_to_a_flow_of_the_other_end(path: Path, by_laptop: bool) {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        site.route_overlay()?;
        let client = Client::new("laptop", 2)?;
        // So that the laptop is not all peers.
        let phone = Client::new("phone", 3)?;
        let mut config = site::config(&[&client, &phone], path.datapath(), path.snat())?;
        let port = format!(":{HTTP}");
        config.rules = vec![if by_laptop {
            to_vpc("laptop", &port, &["tcp"])
        } else {
            let [v4, v6] = client.addresses;
            Rule {
                from: VPC.map(str::to_owned).into(),
                to: vec![format!("{v4}{port}"), format!("[{v6}]{port}")],
                protocols: vec!["tcp".to_owned()],
            }
        }];
        config.reject = true;
        let sluice = site.router.sluice(&config)?;
        let tunnel = client.connect(&site.laptop, &config.key)?;
        for core in CORE {
            warm_up(&site.router, core)?;
        }
        // Denied or not, with it the router learns where the laptop is.
        site.laptop.pings(&SERVER[0].to_string(), &[])?;
        let (caller, called, addresses, program) = match (by_laptop, path.datapath()) {
            (true, "ebpf") => (&site.laptop, &site.server, SERVER, "from_subnet"),
            (true, _) => (&site.laptop, &site.server, SERVER, "kernel_to_overlay"),
            (_, "ebpf") => (&site.server, &site.laptop, client.addresses, "from_overlay"),
            _ => (
                &site.server,
                &site.laptop,
                client.addresses,
                "kernel_from_overlay",
            ),
        };
        let mut streams = Vec::new();
        for address in addresses {
            let listener = called.tcp_listener(SocketAddr::new(address, HTTP))?;
            let at_caller = caller.tcp_connect(listener.local_addr()?, SOON)?;
            let (at_called, _) = listener.accept()?;
            for stream in [&at_caller, &at_called] {
                stream.set_read_timeout(Some(SOON))?;
            }
            streams.push((at_caller, at_called));
        }
        sluice.stop()?;
        site.router.run(["conntrack", "-F"])?;
        let sluice = site.router.sluice(&config)?;
        tunnel.begin_anew(&client.tunnel(&config.key))?;
        for (mut at_caller, mut at_called) in streams {
            let what = format!("{path:?} {}", at_caller.local_addr()?);
            let before = sluice.packets(program, "drop_policy")?;
            at_called.write_all(b"x")?;
            wait_until(SOON, &format!("{what}: a drop"), || {
                let now = sluice.packets(program, "drop_policy");
                now.is_ok_and(|now| now > before)
            })?;
            at_caller.write_all(b"y")?;
            for stream in [&mut at_called, &mut at_caller] {
                stream.read_exact(&mut [0]).context(what.clone())?;
            }
        }
        ensure!(sluice.packets(program, "reject_policy")? == 0, "{path:?}");
        Ok(())
    });
}

#[test]
fn what_may_belong_to_a_flow_of_the_other_end_is_not_answered() {
    for path in [Path::Fast, Path::KernelRouted] {
        for by_laptop in [true, false] {
            may_belong_to_a_flow_of_the_other_end(path, by_laptop);
        }
    }
}

/// The subnet may call a peer, not the other way round, and the router has forgotten its neighbours: the
/// peer's answer goes through, though nobody knows yet where to.
#[test]
fn a_peer_answers_though_the_next_hop_is_not_known() {
    for path in [Path::Fast, Path::KernelRouted] {
        lab::test(|lab| {
            let site = Site::new(lab, Arms::Two)?;
            site.route_overlay()?;
            let client = Client::new("laptop", 2)?;
            let mut config = site::config(&[&client], path.datapath(), path.snat())?;
            let [v4, v6] = client.addresses;
            config.rules = vec![Rule {
                from: VPC.map(str::to_owned).into(),
                to: vec![format!("{v4}:{HTTP}"), format!("[{v6}]:{HTTP}")],
                protocols: vec!["tcp".to_owned()],
            }];
            let _sluice = site.router.sluice(&config)?;
            let _tunnel = client.connect(&site.laptop, &config.key)?;
            // Denied, but with it the router learns where the laptop is.
            site.laptop.pings(&SERVER[0].to_string(), &[])?;
            for address in client.addresses {
                // Likewise, the gateway learns where the router is.
                site.server.pings(&address.to_string(), &[])?;
                site.router.ip("neighbour flush all")?;
                let listener = site.laptop.tcp_listener(SocketAddr::new(address, HTTP))?;
                let what = format!("{path:?} {address}");
                let mut calling = site
                    .server
                    .tcp_connect(listener.local_addr()?, SOON)
                    .context(what.clone())?;
                let (mut called, _) = listener.accept()?;
                called.set_read_timeout(Some(SOON))?;
                calling.write_all(b"x")?;
                called.read_exact(&mut [0]).context(what)?;
            }
            Ok(())
        });
    }
}

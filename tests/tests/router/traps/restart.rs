//! Connections outlive the daemon.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use lab::packet::{ICMP, ICMPV6, Packet, TCP};
use lab::site::{Arms, Running, SERVER, VPC};
use lab::sluice::{Config, Sluice};
use lab::{Capture, Lab, Wireguard, wait_until};

use super::super::policy::to_vpc;
use super::super::{Path, SOON, on_every_path, warm_up};
use super::{BRIEFLY, PORT, carries, receive, tcp_pair, udp_at, udp_to};

on_every_path!(
    flows_outlive_a_restart,
    flows_outlive_a_crash,
    flows_outlive_a_flush_of_the_ruleset,
    flows_to_what_is_no_longer_routed_end,
    flows_to_what_the_next_daemon_does_not_route_end,
);

/// A TCP connection and a UDP flow of one family, both ends.
struct Flows {
    near: TcpStream,
    far: TcpStream,
    near_udp: UdpSocket,
    far_udp: UdpSocket,
    /// Whom the server's UDP socket hears.
    external: SocketAddr,
}

/// How long what was sent to nobody may take to come: TCP sends it again with pauses that double, so the next try may be
/// as far away as the outage was long, half a minute in a guest.
const SENT_AGAIN: Duration = Duration::from_secs(120);

/// A running site with established, translated flows, whose router comes and goes.
struct Bed {
    run: Option<Sluice>,
    config: Config,
    site: lab::site::Site,
    client: lab::site::Client,
    tunnel: Wireguard,
    flows: Vec<Flows>,
    /// Whether the server may call the laptop by its own address.
    addressed: bool,
    /// What the server sees, and what leaves by the uplink.
    seen: Capture,
    uplink: Capture,
}

impl Bed {
    fn new(lab: &Lab, path: Path) -> anyhow::Result<Self> {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        let (laptop, server) = (&run.site.laptop, &run.site.server);
        let mut flows = Vec::new();
        for address in SERVER {
            warm_up(laptop, address)?;
            let address = SocketAddr::new(address, PORT);
            let (near, far) = tcp_pair(laptop, server, address)?;
            carries(&near, &far, "before")?;
            let (near_udp, far_udp) = (udp_to(laptop, address)?, udp_at(server, address)?);
            near_udp.send(b"before")?;
            let (_, external) = receive(&far_udp)?;
            flows.push(Flows {
                near,
                far,
                near_udp,
                far_udp,
                external,
            });
        }
        let status = run.sluice.status()?;
        ensure!(status["datapath"]["unkept"].is_null(), "{status:#}");
        let seen = server.capture("eth0")?;
        let uplink = run.site.router.capture("wan")?;
        Ok(Self {
            run: Some(run.sluice),
            config: run.config,
            site: run.site,
            client: run.client,
            tunnel: run.tunnel,
            flows,
            addressed: !path.snat(),
            seen,
            uplink,
        })
    }

    fn end(&mut self, end: impl FnOnce(Sluice) -> anyhow::Result<()>) -> anyhow::Result<()> {
        end(self.run.take().context("it runs")?)
    }

    /// Starts the router again; the laptop's next packet makes a session.
    fn start(&mut self) -> anyhow::Result<&Sluice> {
        let sluice = self.site.router.sluice(&self.config)?;
        let tunnel = self.client.tunnel(&self.config.key);
        self.tunnel.begin_anew(&tunnel)?;
        Ok(self.run.insert(sluice))
    }

    /// The server speaks while nobody is there. What it is told: ICMP errors and resets, as type
    /// and code, or `(0, 0)` for a reset.
    fn speak(&mut self) -> anyhow::Result<Vec<(u8, u8)>> {
        self.seen.drain(|_| Some(()));
        for flows in &mut self.flows {
            flows.far.write_all(b"x")?;
            flows.far_udp.send_to(b"meanwhile", flows.external)?;
        }
        if self.addressed {
            for address in self.client.addresses {
                let stranger = udp_to(&self.site.server, SocketAddr::new(address, PORT))?;
                stranger.send(b"a new flow")?;
            }
        }
        // Each byte is sent again and again as long as nobody answers, with growing pauses: whoever
        // would answer has had the time.
        let mut told = Vec::new();
        let mut sent = [0; 2];
        let outcome = self.seen.find(SOON, "data sent again", |packet| {
            let server = SERVER.iter().position(|own| *own == packet.source);
            match (server, packet.protocol) {
                (Some(family), TCP) => sent[family] += 1,
                (None, TCP) if packet.payload.get(13).is_some_and(|flags| flags & 4 != 0) => {
                    told.push((0, 0));
                }
                (None, ICMP | ICMPV6) => {
                    // Neighbours ask for each other meanwhile.
                    told.extend(
                        packet
                            .icmp()
                            .filter(|(kind, _)| !(133..=137).contains(kind)),
                    );
                }
                _ => {}
            }
            (sent.iter().all(|count| *count >= 4)).then_some(())
        });
        // A reset ends it early.
        if told.is_empty() {
            outcome?;
        }
        let laptop = self.client.addresses;
        let leaked = |packet: &Packet<'_>| laptop.contains(&packet.destination).then_some(());
        ensure!(
            self.uplink.drain(leaked).is_empty(),
            "sent to the internet in the clear"
        );
        Ok(told)
    }

    /// The same connections carry data, by the same external port.
    fn assert_alive(&mut self) -> anyhow::Result<()> {
        for flows in &mut self.flows {
            flows.reach()?;
            let before = flows.near.read_timeout()?;
            flows.near.set_read_timeout(Some(SENT_AGAIN))?;
            let meanwhile = flows.near.read_exact(&mut [0]);
            flows.near.set_read_timeout(before)?;
            meanwhile.with_context(|| format!("{}: what was sent meanwhile", flows.external))?;
            flows.carry()?;
        }
        Ok(())
    }

    /// Whether anything is pinned.
    fn pinned(&self) -> anyhow::Result<bool> {
        Ok(self.site.router.bpffs()?.join("sluice").exists())
    }
}

impl Flows {
    /// The laptop's datagrams arrive, by the same external port. It sends first, and so makes a
    /// session.
    fn reach(&self) -> anyhow::Result<()> {
        self.far_udp.set_read_timeout(Some(BRIEFLY))?;
        let mut external = None;
        wait_until(SOON, "the tunnel", || {
            let reached = self.near_udp.send(b"after").is_ok();
            external = reached
                .then(|| receive(&self.far_udp).ok())
                .flatten()
                .map(|(_, from)| from);
            external.is_some()
        })?;
        ensure!(
            external == Some(self.external),
            "{}: {external:?}",
            self.external
        );
        Ok(())
    }

    /// All of it, once the tunnel is there.
    fn carry(&self) -> anyhow::Result<()> {
        let what = self.external.to_string();
        carries(&self.near, &self.far, &format!("{what} up"))?;
        carries(&self.far, &self.near, &format!("{what} down"))?;
        self.far_udp.send_to(b"after", self.external)?;
        receive(&self.near_udp).with_context(|| format!("{what}: UDP down"))?;
        Ok(())
    }

    /// Nothing of it passes, either way.
    fn assert_ended(&self) -> anyhow::Result<()> {
        for socket in [&self.near_udp, &self.far_udp] {
            socket.set_read_timeout(Some(BRIEFLY))?;
        }
        for stream in [&self.near, &self.far] {
            stream.set_read_timeout(Some(BRIEFLY))?;
        }
        self.near_udp.send(b"up")?;
        ensure!(receive(&self.far_udp).is_err(), "UDP up");
        self.far_udp.send_to(b"down", self.external)?;
        ensure!(receive(&self.near_udp).is_err(), "UDP down");
        ensure!(carries(&self.near, &self.far, "up").is_err(), "TCP up");
        ensure!(carries(&self.far, &self.near, "down").is_err(), "TCP down");
        Ok(())
    }
}

/// Ends the router twice, and each time all goes on.
fn flows_outlive(path: Path, end: fn(Sluice) -> anyhow::Result<()>) {
    lab::test(|lab| {
        let mut bed = Bed::new(lab, path)?;
        // The second time by a daemon that has taken over itself.
        for _ in 0..2 {
            bed.end(end)?;
            let told = bed.speak()?;
            ensure!(told.is_empty(), "the server was told {told:?}");
            let log = bed.start()?.log();
            let taken_over = log.contains("flows go on");
            ensure!(taken_over == (path.datapath() == "ebpf"), "{log}");
            bed.assert_alive()?;
        }
        bed.end(Sluice::stop)?;
        ensure!(!bed.pinned()?, "left pinned");
        Ok(())
    });
}

fn flows_outlive_a_restart(path: Path) {
    flows_outlive(path, |sluice| sluice.stop_by(libc::SIGUSR1));
}

fn flows_outlive_a_crash(path: Path) {
    flows_outlive(path, Sluice::kill);
}

/// Firewalls begin by `nft flush ruleset`; what that takes is there again when the daemon dies.
fn flows_outlive_a_flush_of_the_ruleset(path: Path) {
    lab::test(|lab| {
        let mut bed = Bed::new(lab, path)?;
        let router = bed.site.router.clone();
        let whole = || {
            let tables = router.run(["nft", "list", "tables", "inet"]);
            let tables = tables.unwrap_or_default();
            [
                "table inet sluice_sluice0",
                "table inet sluice_sluice0_kept",
            ]
            .iter()
            .all(|table| tables.lines().any(|line| line == *table))
        };
        for _ in 0..2 {
            ensure!(whole());
            router.run(["nft", "flush", "ruleset"])?;
            wait_until(SOON, "the tables to be there again", whole)?;
            for flows in &bed.flows {
                flows.reach()?;
                flows.carry()?;
            }
        }
        let log = bed.run.as_ref().context("it runs")?.log();
        let warnings = log.lines().filter(|line| line.contains("WARN"));
        let warnings: Vec<_> = warnings.collect();
        let once = matches!(warnings[..], [line] if line.contains("sluice_sluice0_kept"));
        ensure!(once, "{log}");

        bed.end(Sluice::kill)?;
        let told = bed.speak()?;
        ensure!(told.is_empty(), "the server was told {told:?}");
        bed.start()?;
        bed.assert_alive()?;
        bed.end(Sluice::stop)
    });
}

/// After a stop for good the kernel speaks for itself again: so the tests above see what they look
/// for.
#[test]
fn a_stop_ends_flows() {
    for path in [Path::Translated, Path::Kernel] {
        lab::test(|lab| {
            let mut bed = Bed::new(lab, path)?;
            ensure!(bed.pinned()? == (path == Path::Translated));
            bed.end(Sluice::stop)?;
            ensure!(!bed.pinned()?, "left pinned");
            let told = bed.speak()?;
            ensure!(told.contains(&(0, 0)), "{path:?}: {told:?}");
            Ok(())
        });
    }
}

/// The next daemon makes sessions with the clients of the one before, who would notice only after 15
/// seconds, and only if they send.
#[test]
fn silent_clients_are_met_again() {
    lab::test(|lab| {
        let mut bed = Bed::new(lab, Path::Translated)?;
        bed.end(|sluice| sluice.stop_by(libc::SIGUSR1))?;
        let sluice = bed.site.router.sluice(&bed.config)?;
        wait_until(SOON, "a handshake", || {
            let status = sluice.status().unwrap_or_default();
            status["peers"][0]["last_handshake"].is_u64()
        })?;
        for flows in &bed.flows {
            carries(&flows.far, &flows.near, "down")?;
            carries(&flows.near, &flows.far, "up")?;
        }
        Ok(())
    });
}

/// A flow that the next daemon's configuration does not allow ends.
#[test]
fn a_new_policy_rules_over_kept_flows() {
    lab::test(|lab| {
        let mut bed = Bed::new(lab, Path::Translated)?;
        bed.end(|sluice| sluice.stop_by(libc::SIGUSR1))?;
        bed.config.rules = vec![to_vpc("laptop", &format!(":{}", PORT + 1), &["tcp", "udp"])];
        let sluice = bed.start()?;
        ensure!(sluice.log().contains("flows go on"), "{}", sluice.log());
        // What the new rule names works, so it is not the router that is gone.
        for server in SERVER {
            let address = SocketAddr::new(server, PORT + 1);
            let (near, far) = tcp_pair(&bed.site.laptop, &bed.site.server, address)?;
            carries(&near, &far, "the new rule")?;
        }
        for flows in &bed.flows {
            flows.assert_ended()?;
        }
        Ok(())
    });
}

/// The IPv4 route is taken away by `change`: its flows end, and those of IPv6 go on.
fn unrouted_flows_end(path: Path, change: impl FnOnce(&mut Bed) -> anyhow::Result<()>) {
    lab::test(|lab| {
        let mut bed = Bed::new(lab, path)?;
        bed.config.routes.retain(|route| route.cidr != VPC[0]);
        change(&mut bed)?;
        let [v4, v6] = &bed.flows[..] else {
            bail!("of two families");
        };
        v6.reach()?;
        v6.carry()?;
        v4.assert_ended()
    });
}

fn flows_to_what_is_no_longer_routed_end(path: Path) {
    unrouted_flows_end(path, |bed| {
        let sluice = bed.run.as_mut().context("it runs")?;
        sluice.reload(&bed.config)?;
        wait_until(SOON, "the change", || {
            let status = sluice.status().unwrap_or_default();
            status["routes"]
                .as_array()
                .is_some_and(|all| all.len() == 1)
        })
    });
}

fn flows_to_what_the_next_daemon_does_not_route_end(path: Path) {
    let ends: [fn(Sluice) -> _; 2] = [|sluice| sluice.stop_by(libc::SIGUSR1), Sluice::kill];
    for end in ends {
        unrouted_flows_end(path, |bed| {
            bed.end(end)?;
            bed.start().map(drop)
        });
    }
}

/// Another size of the table, or another form of it: the flows end, and the log says why.
#[test]
fn another_limit_begins_anew() {
    lab::test(|lab| {
        let mut bed = Bed::new(lab, Path::Translated)?;
        bed.end(|sluice| sluice.stop_by(libc::SIGUSR1))?;
        bed.config.flows = Some(5000);
        let log = bed.start()?.log();
        ensure!(log.contains("is to have 10000"), "{log}");
        ensure!(!log.contains("flows go on"), "{log}");
        for server in SERVER {
            wait_until(SOON, "the tunnel", || {
                warm_up(&bed.site.laptop, server).is_ok()
            })?;
        }
        Ok(())
    });
}

#[test]
fn a_restart_without_programs_takes_them_off() {
    lab::test(|lab| {
        let mut bed = Bed::new(lab, Path::Translated)?;
        bed.end(|sluice| sluice.stop_by(libc::SIGUSR1))?;
        bed.config.datapath = "kernel";
        bed.start()?;
        ensure!(!bed.pinned()?, "left pinned");
        for server in SERVER {
            wait_until(SOON, "the tunnel", || {
                warm_up(&bed.site.laptop, server).is_ok()
            })?;
        }
        Ok(())
    });
}

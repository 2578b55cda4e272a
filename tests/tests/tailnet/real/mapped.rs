//! A gateway that leads a port to the router when it is asked: miniupnpd, which many home routers have.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::requirements;
use lab::site::{Arms, SERVER};
use lab::sluice::Sluice;
use lab::tailnet::{Nat, PUBLIC, Tailnet};
use lab::{Host, Lab, Process, tailscaled, wait_until};

use super::paths::Apart;
use super::{SOON, diagnosis, router};

/// What the gateway speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Speaks {
    /// PCP and NAT-PMP.
    Pcp,
    /// NAT-PMP alone: what begins as PCP does is dropped before it.
    NatPmp,
    /// UPnP alone.
    Upnp,
}

/// Starts miniupnpd on the router's gateway. Its rules take packets to any address, and nobody's private ones come
/// from the internet.
fn mapper(lab: &Lab, gateway: &Host, program: &Path, speaks: Speaks) -> Result<Process> {
    let deaf = match speaks {
        Speaks::NatPmp => "udp dport 5351 @th,64,8 2 drop;",
        _ => "",
    };
    let rules = format!(
        "table inet mapper {{
        chain miniupnpd {{}}
        chain prerouting_miniupnpd {{}}
        chain postrouting_miniupnpd {{}}
        chain prerouting {{ type nat hook prerouting priority -100; jump prerouting_miniupnpd; }}
        chain postrouting {{ type nat hook postrouting priority 90; jump postrouting_miniupnpd; }}
        chain forward {{ type filter hook forward priority -10; jump miniupnpd; }}
        chain before {{ type filter hook prerouting priority -300; ip daddr 10.30.0.0/16 drop; {deaf} }}
    }}"
    );
    gateway.command(["nft", "-f", "-"]).stdin(rules).run()?;
    let of = |on: bool| if on { "yes" } else { "no" };
    let config = format!(
        "ext_ifname=hotel\next_ip={PUBLIC}\nlistening_ip=router\n\
         enable_natpmp={}\nenable_upnp={}\nsecure_mode=yes\nmin_lifetime=120\nmax_lifetime=86400\n\
         upnp_table_name=mapper\nupnp_nat_table_name=mapper\nupnp_forward_chain=miniupnpd\n\
         upnp_nat_chain=prerouting_miniupnpd\nupnp_nat_postrouting_chain=postrouting_miniupnpd\n\
         uuid=73f9bd5e-07c6-4d30-8a3c-5e7f6ad4f2f0\nallow 1024-65535 0.0.0.0/0 1024-65535\n",
        of(speaks != Speaks::Upnp),
        of(speaks == Speaks::Upnp),
    );
    let (path, pid) = (
        lab.folder().join("mapper.conf"),
        lab.folder().join("mapper.pid"),
    );
    std::fs::write(&path, config)?;
    let command = gateway
        .command([program.as_os_str(), "-d".as_ref(), "-f".as_ref()])
        .arg(path)
        .arg("-P")
        .arg(pid);
    gateway.spawn("miniupnpd", command)
}

/// Router and client behind hard NATs, and the router's can lead ports to it.
struct Mapping {
    apart: Apart,
    mapper: Process,
}

impl Mapping {
    fn new(lab: &Lab, program: &Path, speaks: Speaks) -> Result<Self> {
        let mut process = None;
        let before = |net: &Tailnet| {
            process = Some(mapper(lab, &net.site.internet, program, speaks)?);
            Ok(())
        };
        let apart = Apart::prepared(lab, Nat::Hard, Some(Nat::Hard), before, |_| {})?;
        let mapper = process.context("it was started")?;
        apart.wait_reach()?;
        Ok(Self { apart, mapper })
    }

    /// The ports that the gateway leads somewhere, as it has them.
    fn ports(&self) -> Result<Vec<String>> {
        ports(&self.apart.net.site.internet)
    }

    /// Waits until router and client reach each other by a port of the gateway, had by this protocol, and yields where
    /// it is.
    fn wait_mapped(&self, name: &str) -> Result<String> {
        let Apart { sluice, client, .. } = &self.apart;
        let line = format!("* PortMapping: {name}\n");
        let mut told = String::new();
        wait_until(SOON, name, || {
            let found = sluice.command(&["netcheck"]);
            told = found.map(|found| found.stdout).unwrap_or_default();
            told.contains(&line)
        })
        .with_context(|| format!("{told}\n{}", self.mapper.log()))?;
        // The client may trust the way to the last daemon still, so the router is asked too.
        wait_until(SOON, "a direct way", || {
            let _ = self.apart.hotel.host.pings(&SERVER[0].to_string(), &[]);
            let status = sluice.status().unwrap_or_default();
            let way = &status["tailnet"]["peers"][0]["way"];
            way.as_str().is_some_and(|way| way.starts_with("direct "))
        })
        .with_context(|| diagnosis(client, sluice))?;
        // After a crash the client gives its old session up first.
        self.apart.wait_reach()?;
        self.apart.wait_way(true)?;
        self.apart.transfers()?;
        let seen = client.peer("router")?.context("the router is there")?;
        let at = seen["CurAddr"].as_str().unwrap_or_default();
        ensure!(at.starts_with(&format!("{PUBLIC}:")), "the way is {at}");
        Ok(at.to_owned())
    }
}

fn ports(gateway: &Host) -> Result<Vec<String>> {
    let words = "nft list chain inet mapper prerouting_miniupnpd";
    let rules = gateway.run(words.split(' '))?;
    let led = rules.lines().filter(|line| line.contains("dnat"));
    Ok(led.map(|line| line.trim().to_owned()).collect())
}

/// Runs the body of a test that needs miniupnpd too.
fn test(body: impl FnOnce(&Lab, &Path) -> Result<()>) {
    let Some(program) = requirements::find("miniupnpd") else {
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "there is no miniupnpd; `cargo xtask setup --ci` installs it"
        );
        eprintln!("skipped: there is no miniupnpd");
        return;
    };
    tailscaled::test(|lab| body(lab, &program));
}

/// Both ends are behind hard NATs, so only the port that the gateway gives makes a direct way. It stays the same port
/// for the next daemon, after a hand-over and after a crash, and is given back at a stop.
fn a_port_opens_a_hard_nat(speaks: Speaks, name: &str) {
    test(|lab, program| {
        let mut mapping = Mapping::new(lab, program, speaks)?;
        let at = mapping.wait_mapped(name)?;
        let before = mapping.ports()?;
        ensure!(before.len() == 1, "{before:?}");
        let log =
            |mapping: &Mapping| format!("{}\n{}", mapping.mapper.log(), mapping.apart.sluice.log());
        for signal in [libc::SIGUSR1, libc::SIGKILL] {
            mapping.apart.sluice.succeed(signal)?;
            let next = mapping.wait_mapped(name).with_context(|| log(&mapping))?;
            let now = mapping.ports()?;
            ensure!(
                next == at && now == before,
                "after {signal}: {next}, {now:?}"
            );
        }
        let Apart { sluice, net, .. } = mapping.apart;
        sluice.stop()?;
        wait_until(SOON, "the port to be given back", || {
            ports(&net.site.internet).is_ok_and(|ports| ports.is_empty())
        })
    });
}

#[test]
fn a_port_opens_a_hard_nat_by_pcp() {
    a_port_opens_a_hard_nat(Speaks::Pcp, "PCP");
}

#[test]
fn a_port_opens_a_hard_nat_by_nat_pmp() {
    a_port_opens_a_hard_nat(Speaks::NatPmp, "NAT-PMP");
}

#[test]
fn a_port_opens_a_hard_nat_by_upnp() {
    a_port_opens_a_hard_nat(Speaks::Upnp, "UPnP");
}

/// A gateway that gives one port by PCP, to whoever asks first, and refuses it to every other nonce, as RFC 6887 wants;
/// by NAT-PMP it refuses always.
struct Strict {
    holder: Arc<Mutex<Option<[u8; 12]>>>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Strict {
    fn start(gateway: &Host) -> Result<Self> {
        let socket = gateway.udp_socket((Ipv4Addr::UNSPECIFIED, 5351).into())?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let holder: Arc<Mutex<Option<[u8; 12]>>> = Arc::default();
        let end = Arc::new(AtomicBool::new(false));
        let (held, over) = (Arc::clone(&holder), Arc::clone(&end));
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 1100];
            while !over.load(Ordering::Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut buffer) else {
                    continue;
                };
                let mut holder = held.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(answer) = answer(&buffer[..length], &mut holder) {
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
        Ok(Self {
            holder,
            end,
            thread: Some(thread),
        })
    }

    /// From now on somebody else holds the port.
    fn give_away(&self) {
        let mut holder = self.holder.lock().unwrap_or_else(PoisonError::into_inner);
        *holder = Some([0; 12]);
    }
}

impl Drop for Strict {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Of a request for a port: PCP's are section 11.1 of RFC 6887, NAT-PMP's section 3.3 of RFC 6886. The code 2 means "not
/// authorized" in both.
fn answer(request: &[u8], holder: &mut Option<[u8; 12]>) -> Option<Vec<u8>> {
    let mut out = request.to_vec();
    if let ([2, 1, ..], 60) = (request, request.len()) {
        let nonce = request[24..36].try_into().ok()?;
        let refused = *holder.get_or_insert(nonce) != nonce;
        out[1] |= 0x80;
        out[3] = if refused { 2 } else { 0 };
        out[8..24].fill(0);
        // The outer port, and the address in front of which stands what makes it an IPv6 one.
        out[42..44].copy_from_slice(&51820_u16.to_be_bytes());
        out[44..60].copy_from_slice(&Ipv4Addr::new(11, 0, 0, 1).to_ipv6_mapped().octets());
        return Some(out);
    }
    let ([0, 1, ..], 12) = (request, request.len()) else {
        return None;
    };
    let port = &request[4..6];
    Some([&[0, 0x81, 0, 2, 0, 0, 0, 0], port, &[0; 6]].concat())
}

/// A gateway that keeps a port for one nonce gives it to the next daemon after a crash; where it is another's, status
/// and netcheck tell what was refused and what to do.
#[test]
fn a_strict_gateway_knows_the_next_daemon_and_its_refusals_are_told() {
    lab::test(|lab| {
        let net = Tailnet::new(lab, Arms::Two)?;
        let strict = Strict::start(&net.site.internet)?;
        let (_, mut sluice) = router(&net, &net.site.router, |_| {})?;
        let wait = |sluice: &Sluice, what: &str| {
            let mut told = String::new();
            wait_until(SOON, what, || {
                let found = sluice.command(&["netcheck"]);
                told = found.map(|found| found.stdout).unwrap_or_default();
                told.contains(what)
            })
            .with_context(|| format!("{told}\n{}", sluice.log()))
        };
        wait(&sluice, "* PortMapping: PCP\n")?;
        for signal in [libc::SIGUSR1, libc::SIGKILL] {
            sluice.succeed(signal)?;
            wait(&sluice, "* PortMapping: PCP\n")?;
        }
        strict.give_away();
        sluice.succeed(libc::SIGKILL)?;
        let refused = "PCP (not authorized), NAT-PMP (not authorized)";
        wait(&sluice, &format!("* PortMapping refused: {refused}\n"))?;
        let problems = sluice.status()?["problems"].to_string();
        for part in ["port-mapping", "198.51.100.", refused, "static_endpoints"] {
            ensure!(problems.contains(part), "{part}: {problems}");
        }
        Ok(())
    });
}

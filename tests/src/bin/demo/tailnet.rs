//! The tailnet's part: a router joins, an administrator approves its routes, clients use them, are denied, and go on
//! when another router takes over.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lab::control_server::Node;
use lab::site::{Arms, SERVER, VPC};
use lab::sluice::{Config, Route, Sluice};
use lab::tailnet::{KEY, Nat, Tailnet, rule};
use lab::tailscaled::{self, Tailscaled};
use lab::{Flow, Host, Lab, Stream, poll, wait_until};
use serde_json::{Value, json};

use crate::checks;
use crate::packets::Packets;
use crate::report::Report;
use crate::services::Services;

const SOON: Duration = Duration::from_secs(30);
/// The MTU of every client's tunnel.
const TAILNET_MTU: u16 = 1280;
/// Where the echo server listens.
const ECHO: u16 = 7777;

/// A client: Tailscale's own where there is one, else Sluice, which takes others' routes too.
enum Client {
    Real(Tailscaled),
    Ours(Sluice),
}

impl Client {
    fn join(net: &Tailnet, host: &Host) -> Result<Self> {
        if tailscaled::program("tailscaled").is_ok() {
            return Ok(Self::Real(net.join(host, &[])?));
        }
        let mut config = Config::joining(&net.control.url(), KEY)?;
        if let Some(tailnet) = &mut config.tailnet {
            tailnet.hostname = Some(host.name().to_owned());
            tailnet.accept_routes = true;
        }
        Ok(Self::Ours(host.sluice_unsettled(&config)?))
    }

    /// What it says of a peer. Both have the fields of `tailscale status --json`.
    fn peer(&self, name: &str) -> Option<Value> {
        match self {
            Self::Real(node) => node.peer(name).ok().flatten(),
            Self::Ours(sluice) => {
                let status = sluice.status().ok()?;
                let peers = status["Peer"].as_object()?;
                peers
                    .values()
                    .find(|peer| peer["HostName"] == name)
                    .cloned()
            }
        }
    }

    fn wait_peer(&self, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        poll(SOON, &format!("{name}: {what}"), || {
            self.peer(name).filter(&wanted)
        })
    }

    fn way(&self) -> Result<String> {
        let peer = self.peer("router").context("it knows no router")?;
        let at = peer["CurAddr"].as_str().unwrap_or_default();
        Ok(match at {
            "" => format!("by the relay {}", peer["Relay"].as_str().unwrap_or("?")),
            at => format!("directly, at {at}"),
        })
    }

    fn device(&self) -> &'static str {
        match self {
            Self::Real(_) => "tailscale0",
            Self::Ours(_) => "sluice0",
        }
    }
}

pub(crate) fn run(lab: &Lab, keep: bool, report: &mut Report) -> Result<()> {
    ensure!(
        !keep,
        "the tailnet's part cannot be kept yet: its coordination server ends with the demo"
    );
    let real = tailscaled::program("tailscaled");
    report.step("build the networks, with a coordination server and a relay on the internet");
    report.note(&match &real {
        Ok(_) => format!(
            "clients are Tailscale's own, {}; so is the relay",
            tailscaled::VERSION
        ),
        Err(reason) => format!("clients are Sluice too, and there is no relay: {reason}"),
    });
    let net = Tailnet::new(lab, Arms::Two)?;
    let services = Services::start(&net.site.server)?;
    let _echo = net.site.server.udp_echo(ECHO)?;
    let before = net.site.router.footprint()?;

    let (sluice, laptop) = join(&net, report)?;
    approve_and_reach(&net, &services, &sluice, &laptop, report)?;
    deny(&net, report)?;
    if real.is_ok() {
        behind_nats(lab, &net, report)?;
    }
    let _spare = fail_over(lab, &net, &laptop, report)?;
    let sluice = restart(&net, sluice, report)?;

    report.step("stop Sluice");
    let stopped = sluice.stop().and_then(|()| {
        let left = before.difference(&net.site.router.footprint()?);
        ensure!(left.is_empty(), "{}", left.join("; "));
        Ok(String::new())
    });
    report.check("it leaves the router as it found it", stopped);
    Ok(())
}

/// The configuration of a router that offers the VPC.
fn router(net: &Tailnet, name: &str) -> Result<Config> {
    let mut config = Config::joining(&net.control.url(), KEY)?;
    if let Some(tailnet) = &mut config.tailnet {
        tailnet.hostname = Some(name.to_owned());
    }
    config.routes = VPC
        .map(|cidr| Route {
            cidr: cidr.to_owned(),
            snat: true,
            mode: "fast",
        })
        .into();
    Ok(config)
}

fn wait_offer(net: &Tailnet, name: &str) -> Result<Node> {
    poll(SOON, &format!("{name}'s routes"), || {
        let node = net.control.node(name).ok()?;
        node.hostinfo["RoutableIPs"].is_array().then_some(node)
    })
}

fn join(net: &Tailnet, report: &mut Report) -> Result<(Sluice, Client)> {
    report.step("start Sluice with an auth key");
    let started = Instant::now();
    let sluice = net.site.router.sluice_unsettled(&router(net, "router")?)?;
    let joined = wait_offer(net, "router").map(|node| {
        let took = started.elapsed().as_millis();
        format!("as {} after {took} ms", node.addresses().join(" and "))
    });
    report.check(
        "it joins, and offers its routes",
        joined.with_context(|| sluice.log()),
    );
    let advice = poll(SOON, "its advice", || {
        let status = sluice.status().ok()?;
        let advice = status["tailnet"]["routes"][0]["advice"].as_str()?;
        Some(advice.to_owned())
    });
    report.check("its status says what is missing", advice);

    report.step("connect a laptop");
    let laptop = Client::join(net, &net.site.laptop)?;
    laptop.wait_peer("router", "that it is there", |peer| peer["Online"] == true)?;
    let reached = net.site.laptop.pings(&SERVER[0].to_string(), &[])?;
    report.check("it reaches nothing yet", checks::not(reached, "it does"));
    Ok((sluice, laptop))
}

fn approve_and_reach(
    net: &Tailnet,
    services: &Services,
    sluice: &Sluice,
    laptop: &Client,
    report: &mut Report,
) -> Result<()> {
    let site = &net.site;
    report.step("approve the routes, as an administrator does");
    net.control.approve(net.control.node("router")?.id, &VPC);
    for server in SERVER {
        report.check(&format!("ping {server}"), reach(&site.laptop, server));
    }
    let direct = laptop.wait_peer("router", "a direct path", |peer| peer["CurAddr"] != "");
    report.check("the laptop sends", direct.and_then(|_| laptop.way()));
    let before = Packets::of(sluice)?;
    for server in SERVER {
        report.check(
            &format!("64 MiB from {server} arrive intact"),
            checks::download(&site.laptop, server, &services.digest),
        );
    }
    report.check(
        "the fast path carried them, both ways",
        Packets::of(sluice)?
            .since(&before)
            .carried_fast(2 * crate::services::FILE_SIZE),
    );

    report.step("connect a phone whose tunnel MTU is set too high");
    let phone = Client::join(net, &site.phone)?;
    phone.wait_peer("router", "its routes", |peer| {
        peer["PrimaryRoutes"].is_array()
    })?;
    reach(&site.phone, SERVER[0])?;
    site.phone
        .ip(&format!("link set {} mtu 1500", phone.device()))?;
    for server in SERVER {
        report.check(
            &format!("TCP segment size fits the tailnet's {TAILNET_MTU} both ways for {server}"),
            checks::segment_size(site, phone.device(), server, TAILNET_MTU),
        );
    }
    Ok(())
}

/// The time until a host answers.
fn reach(from: &Host, to: IpAddr) -> Result<String> {
    let started = Instant::now();
    wait_until(SOON, "an answer", || {
        from.pings(&to.to_string(), &[]).unwrap_or(false)
    })?;
    Ok(format!("after {} ms", started.elapsed().as_millis()))
}

fn deny(net: &Tailnet, report: &mut Report) -> Result<()> {
    let site = &net.site;
    report.step("take the right away while a connection is open, and give it back");
    let mut flow = Flow::open(&site.laptop, &site.server, SERVER[0])?;
    flow.works()?;
    let elsewhere = ["10.20.99.0/24", "2001:db8:20:99::/64"];
    net.control.set_filter(json!([rule(&["*"], &elsewhere)]));
    let gone = wait_until(SOON, "the filter", || {
        !site
            .laptop
            .pings(&SERVER[0].to_string(), &[])
            .unwrap_or(true)
    });
    report.check("nothing new gets through", gone.map(|()| String::new()));
    report.check(
        "the open connection is cut",
        flow.hangs().map(|()| String::new()),
    );
    net.control.set_filter(json!([rule(&["*"], &["*"])]));
    // A translated connection that was cut is over; the next one is a new one.
    let opened = wait_until(SOON, "the filter", || {
        site.laptop
            .pings(&SERVER[0].to_string(), &[])
            .unwrap_or(false)
    });
    let opened = opened
        .and_then(|()| Flow::open(&site.laptop, &site.server, SERVER[0]))
        .and_then(|mut flow| flow.works());
    report.check(
        "a new one works when it may again",
        opened.map(|()| String::new()),
    );
    Ok(())
}

fn behind_nats(lab: &Lab, net: &Tailnet, report: &mut Report) -> Result<()> {
    report.step("connect clients that have it harder");
    for (n, name, nat, what) in [
        (
            1,
            "office",
            Nat::Hard,
            "one behind a hard NAT reaches the VPC",
        ),
        (
            2,
            "hotel",
            Nat::NoUdp,
            "one whose UDP is blocked reaches the VPC",
        ),
    ] {
        let hidden = net.hidden(lab, name, n, nat)?;
        let client = Client::join(net, &hidden.host)?;
        client.wait_peer("router", "its routes", |peer| {
            peer["PrimaryRoutes"].is_array()
        })?;
        let reached = reach(&hidden.host, SERVER[0]).and_then(|after| {
            checks::page(&hidden.host, SERVER[0])?;
            Ok(format!("{}, {after}", client.way()?))
        });
        report.check(what, reached);
    }
    Ok(())
}

fn fail_over(lab: &Lab, net: &Tailnet, laptop: &Client, report: &mut Report) -> Result<Sluice> {
    report.step("start a second router of the same routes, and let it take over and give back");
    let host = net.second_router(lab)?;
    let spare = host.sluice_unsettled(&router(net, "spare")?)?;
    net.control.approve(wait_offer(net, "spare")?.id, &VPC);
    laptop.wait_peer("spare", "that it is there", |peer| peer["Online"] == true)?;
    for name in ["spare", "router"] {
        let stream = Stream::start(&net.site.laptop, SocketAddr::new(SERVER[0], ECHO))?;
        stream.wait(100)?;
        let id = net.control.node(name)?.id;
        for route in VPC {
            net.control.set_primary(route, id);
        }
        let moved = laptop
            .wait_peer(name, "the routes", |peer| peer["PrimaryRoutes"].is_array())
            .and_then(|_| reach(&net.site.laptop, SERVER[0]))
            .and_then(|_| stream.wait(100));
        let counted = stream.end()?;
        let seen = moved.and_then(|()| {
            // A second's worth: what a first handshake takes on a slow machine.
            ensure!(counted.lost <= 100, "{counted:?}");
            Ok(format!(
                "{} of {} packets lost at 100 a second",
                counted.lost, counted.sent
            ))
        });
        report.check(&format!("{name} takes over under load"), seen);
    }
    Ok(spare)
}

fn restart(net: &Tailnet, sluice: Sluice, report: &mut Report) -> Result<Sluice> {
    report.step("restart the first router");
    let node = net.control.node("router")?;
    let stream = Stream::start(&net.site.laptop, SocketAddr::new(SERVER[0], ECHO))?;
    // As an update does it: the next daemon takes over what keeps flows alive.
    sluice.stop_by(libc::SIGUSR1)?;
    let sluice = net.site.router.sluice_unsettled(&router(net, "router")?)?;
    let back = reach(&net.site.laptop, SERVER[0]);
    let counted = stream.end()?;
    let seen = back.map(|_| format!("after {:.1} s", counted.gap.as_secs_f64()));
    report.check("the laptop goes on by itself", seen);
    let now = net.control.node("router")?;
    let same = ensure_same(&node, &now);
    report.check("it is the same node", same);
    Ok(sluice)
}

fn ensure_same(old: &Node, new: &Node) -> Result<String> {
    ensure!(
        old.id == new.id && old.key == new.key,
        "{old:?} is now {new:?}"
    );
    Ok(String::new())
}

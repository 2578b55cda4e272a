//! Flows that the router knows, and that it must not go on with.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use anyhow::ensure;
use lab::{Host, wait_until};
use router::datapath::kernel::Kernel;

use super::{ECHO, Net, SOON, nets, one_peer, route, udp_send};

/// Whether the router knows a UDP flow.
fn known(net: &Net, source: &str, to: &str) -> anyhow::Result<bool> {
    let udp = |family| {
        let list = ["conntrack", "-L", "-f", family, "-p", "udp"];
        net.router.run(list)
    };
    let flow = format!(" src={source} dst={to} ");
    Ok((udp("ipv4")? + &udp("ipv6")?).contains(&flow))
}

/// Begins a UDP flow.
fn begin(net: &Net, from: &Host, source: &str, to: &str) -> anyhow::Result<UdpSocket> {
    let socket = udp_send(from, source, to, ECHO)?;
    wait_until(SOON, "the flow", || known(net, source, to).unwrap_or(false))?;
    Ok(socket)
}

/// Has the next daemon's kernel datapath take the place of a crashed one's.
fn crash(net: &mut Net) -> anyhow::Result<()> {
    net.kernel = Kernel::new("tun0");
    // A program that another test is just starting may hold the old one's socket a moment longer.
    wait_until(SOON, "the ruleset to go", || {
        net.ruleset()
            .is_ok_and(|text| !text.contains("table inet sluice_tun0 {"))
    })
}

/// The daemon is another one, and neither routes nor knows all that the one before did.
#[test]
fn flows_end_that_only_the_daemon_before_has_carried() {
    // From where to where, and whether it remains.
    const FLOWS: [(&str, &str, bool); 8] = [
        ("100.64.0.2", "10.0.0.2", true),
        ("100.64.0.2", "10.0.0.4", false),
        ("fd7a::2", "fd00::2", true),
        ("fd7a::2", "fd00::4", false),
        // A peer that will be gone, either way.
        ("100.64.0.3", "10.0.0.2", false),
        ("10.0.0.2", "100.64.0.3", false),
        // To the router itself, and what never passes the tunnel.
        ("100.64.0.2", "10.0.0.1", true),
        ("10.1.0.2", "10.0.0.4", true),
    ];
    lab::test(|lab| {
        let mut net = Net::new(lab)?;
        for address in ["10.0.0.4/24", "fd00::4/64 nodad"] {
            net.server.ip(&format!("address add {address} dev eth0"))?;
        }
        net.spec.overlay = one_peer(&["100.64.0.2/32", "100.64.0.3/32", "fd7a::/64"]);
        net.spec.routes = vec![
            route("10.0.0.2/32", true),
            route("10.0.0.4/32", false),
            route("fd00::2/128", false),
            route("fd00::4/128", true),
        ];
        net.apply()?;
        let mut sockets = Vec::new();
        for (source, to, _) in FLOWS {
            let from = match source {
                "10.0.0.2" => &net.server,
                "10.1.0.2" => &net.other,
                _ => &net.peer,
            };
            sockets.push(begin(&net, from, source, to)?);
        }
        net.spec
            .overlay
            .retain(|peer, _| *peer != nets(&["100.64.0.3/32"])[0]);
        net.spec
            .routes
            .retain(|route| !route.cidr.to_string().contains('4'));
        crash(&mut net)?;
        net.apply()?;
        for (source, to, remains) in FLOWS {
            ensure!(known(&net, source, to)? == remains, "{source} to {to}");
        }
        Ok(())
    });
}

/// External addresses go, one of them while no daemon is there, and one comes back in time.
#[test]
fn flows_end_whose_external_address_is_gone() {
    // From where to where, and in which round it ends.
    const FLOWS: [(&str, &str, Option<u8>); 6] = [
        // As 10.0.0.8, fd00::8 and 10.0.0.9; and untranslated.
        ("100.64.0.2", "10.0.0.2", Some(1)),
        ("fd7a::2", "fd00::2", Some(1)),
        ("100.64.0.3", "10.0.0.2", Some(2)),
        ("100.64.0.2", "10.0.0.4", None),
        // Others may have such flows as well: as 10.0.0.8.
        ("10.1.0.2", "10.0.0.2", None),
        // As fd00::9, which comes back.
        ("fd7a::3", "fd00::2", None),
    ];
    lab::test(|lab| {
        let mut net = Net::new(lab)?;
        net.router
            .command(["nft", "-f", "-"])
            .stdin(
                "table ip others {
                chain post { type nat hook postrouting priority srcnat;
                    ip saddr 10.1.0.2 snat to 10.0.0.8
                }
            }",
            )
            .run()?;
        net.server.ip("address add 10.0.0.4/24 dev eth0")?;
        net.spec.routes.push(route("10.0.0.4/32", false));
        let eth0 = net.spec.subnet[0].index;
        // Which of several addresses a source gets is a matter of its hash: there is one at a time.
        let addresses = |texts: &[&str]| texts.iter().map(|a| a.parse()).collect::<Result<_, _>>();
        let all = [
            "10.0.0.1", "10.0.0.8", "10.0.0.9", "fd00::1", "fd00::8", "fd00::9",
        ];
        net.spec.addresses = addresses(&all)?;
        let mut sockets = Vec::new();
        for (source, to, _) in FLOWS {
            let external = match source {
                "100.64.0.3" => "10.0.0.9",
                "fd7a::3" => "fd00::9",
                "fd7a::2" => "fd00::8",
                _ => "10.0.0.8",
            };
            net.spec.chosen = [(eth0, vec![external.parse()?])].into();
            net.apply()?;
            let from = if source == "10.1.0.2" {
                &net.other
            } else {
                &net.peer
            };
            sockets.push(begin(&net, from, source, to)?);
        }
        net.spec.chosen.clear();

        crash(&mut net)?;
        net.spec.addresses = addresses(&["10.0.0.1", "10.0.0.9", "fd00::1"])?;
        net.apply()?;
        let start = Instant::now();
        let due = net.kernel.addressless_due();
        ensure!(due.is_some_and(|due| due > start), "at once");
        net.spec.addresses = addresses(&["10.0.0.1", "fd00::1", "fd00::9"])?;
        net.apply()?;
        // The first change was noticed before `start`, the second one after it.
        for (round, seconds) in (0..).zip([29, 30, 3600]) {
            net.router.enter(|| {
                net.kernel
                    .end_addressless(start + Duration::from_secs(seconds));
            })?;
            for (source, to, ends) in FLOWS {
                let remains = ends.is_none_or(|ends| ends > round);
                ensure!(
                    known(&net, source, to)? == remains,
                    "{source} to {to} after {seconds}s"
                );
            }
        }
        ensure!(net.kernel.addressless_due().is_none());
        Ok(())
    });
}

//! Beside firewalls, marks and routers of others.

use std::net::SocketAddr;

use anyhow::{Context, ensure};
use lab::packet::TCP;
use lab::site::{self, Arms, Client, Running, SERVER, Site};
use lab::sluice::Sluice;
use lab::{Host, wait_until};
use router_ebpf::craft::{ACK, Ip, RST};

use super::super::{SOON, warm_up};
use super::{PORT, carries, tcp_pair};

/// What `sluice status` says is wrong with `part`, all in one.
fn problem(sluice: &Sluice, part: &str) -> anyhow::Result<String> {
    let status = sluice.status()?;
    let problems = status["problems"].as_array().context("problems")?;
    let of_part = problems.iter().filter(|problem| problem["part"] == part);
    let texts = of_part.filter_map(|problem| problem["error"].as_str());
    Ok(texts.collect::<Vec<_>>().join("\n"))
}

/// Waits until that contains `text`.
fn wait_for(sluice: &Sluice, part: &str, text: &str) -> anyhow::Result<String> {
    let mut last = String::new();
    wait_until(SOON, &format!("{text:?} in status"), || {
        last = problem(sluice, part).unwrap_or_default();
        last.contains(text)
    })
    .with_context(|| format!("it says {last:?}"))?;
    Ok(last)
}

fn wait_for_none(sluice: &Sluice, part: &str) -> anyhow::Result<()> {
    wait_until(SOON, &format!("no problem of {part}"), || {
        problem(sluice, part).is_ok_and(|text| text.is_empty())
    })
    .with_context(|| problem(sluice, part).unwrap_or_default())
}

fn nft(host: &Host, text: &str) -> anyhow::Result<()> {
    host.command(["nft", "-f", "-"]).stdin(text).run().map(drop)
}

/// The commands that a problem names.
fn mend(host: &Host, problem: &str) -> anyhow::Result<()> {
    let commands: Vec<_> = problem
        .split('`')
        .filter(|part| part.starts_with("nft insert"))
        .collect();
    ensure!(!commands.is_empty(), "no command in {problem:?}");
    for command in commands {
        host.run(["sh", "-c", command])?;
    }
    Ok(())
}

/// A router whose kernel carries all packets.
fn by_the_kernel(lab: &lab::Lab, datapath: &'static str) -> anyhow::Result<Running> {
    Running::with(lab, Arms::Two, datapath, true, |config| {
        for route in &mut config.routes {
            route.mode = "stack";
        }
    })
}

#[test]
fn firewalls_that_stop_the_router_are_named_beside_programs() {
    named_firewalls("ebpf");
}

#[test]
fn firewalls_that_stop_the_router_are_named_without_programs() {
    named_firewalls("kernel");
}

fn named_firewalls(datapath: &'static str) {
    lab::test(|lab| {
        let run = by_the_kernel(lab, datapath)?;
        let (router, laptop, server) = (&run.site.router, &run.site.laptop, SERVER[0].to_string());
        let forwarded = || run.sluice.packets("kernel_from_overlay", "forwarded");
        let lost = || run.sluice.packets("kernel_from_overlay", "drop_firewall");
        warm_up(laptop, SERVER[0])?;
        assert!(forwarded()? > 0);
        assert_eq!(
            (lost()?, problem(&run.sluice, "firewall")?),
            (0, String::new())
        );

        // What is jumped to must stand before.
        for (chain, more, rules) in [
            (
                "ip filter FORWARD",
                "",
                "type filter hook forward priority 0; policy drop;",
            ),
            (
                "inet host forward",
                "",
                "type filter hook forward priority -10
                ct state established,related accept
                ip protocol icmp accept
                reject with icmpx admin-prohibited",
            ),
            (
                "ip late forward",
                "chain more { oifname { docker0, docker1 } accept; }",
                "type filter hook forward priority 10; policy drop;
                iifname docker0 accept
                ct state vmap { established : accept, related : accept, invalid : drop }
                jump more",
            ),
        ] {
            let words: Vec<_> = chain.split(' ').collect();
            let (family, table, name) = (words[0], words[1], words[2]);
            nft(
                router,
                &format!("table {family} {table} {{\n{more}\nchain {name} {{\n{rules}\n}}\n}}"),
            )?;
            let told = wait_for(&run.sluice, "firewall", &format!("\"{chain}\""))?;
            let before = (forwarded()?, lost()?);
            if family == "ip" {
                assert!(!laptop.pings(&server, &[])?, "it does drop them");
                wait_until(SOON, "what is lost", || {
                    lost().is_ok_and(|n| n >= before.1 + 3)
                })?;
                assert_eq!(forwarded()?, before.0, "{chain}: none has left");
                wait_for(&run.sluice, "firewall", "lost")?;
            }
            mend(router, &told)?;
            wait_for_none(&run.sluice, "firewall")?;
            assert!(laptop.pings(&server, &[])?, "{chain}");
            nft(router, &format!("delete table {family} {table}"))?;
        }

        // Whether it lets us pass depends on what nobody knows before.
        nft(
            router,
            "table inet odd { chain forward { type filter hook forward priority 0;
                ip daddr 10.20.0.0/16 meta l4proto icmp drop; }
            chain after { type filter hook postrouting priority 0; policy accept; }
            }",
        )?;
        assert!(!laptop.pings(&server, &[])?);
        wait_for(&run.sluice, "firewall", "\"inet odd forward\"")?;
        wait_for(&run.sluice, "firewall", "lost")?;
        assert!(run.sluice.metrics()?.contains("verdict=\"drop_firewall\""));
        Ok(())
    });
}

/// What does not come to the forward hook is not counted there.
#[test]
fn a_firewall_in_another_hook_is_named() {
    lab::test(|lab| {
        let run = by_the_kernel(lab, "kernel")?;
        let (router, laptop, server) = (&run.site.router, &run.site.laptop, SERVER[0].to_string());
        for (name, rules) in [
            (
                "before",
                "type filter hook prerouting priority -300; iifname sluice0 drop",
            ),
            (
                "out",
                "type filter hook output priority 0; policy drop;
                oifname lo accept
                tcp sport 22 accept",
            ),
        ] {
            assert!(laptop.pings(&server, &[])?, "{name}");
            let path = format!("inet host {name}");
            nft(
                router,
                &format!("table inet host {{ chain {name} {{ {rules}\n }}\n }}"),
            )?;
            let told = wait_for(&run.sluice, "firewall", &format!("\"{path}\""))?;
            assert!(!laptop.pings(&server, &[])?, "it does drop them");
            mend(router, &told)?;
            wait_for_none(&run.sluice, "firewall")?;
            assert!(laptop.pings(&server, &[])?, "{path}");
            nft(router, "delete table inet host")?;
        }
        // The usual one.
        nft(
            router,
            "table inet host { chain out { type filter hook output priority 0; policy drop;
                ct state established,related accept
                udp sport 51820 accept
            }
            chain before { type filter hook prerouting priority -150;
                ct state invalid drop
                iifname != lo ip saddr 127.0.0.0/8 drop
            }
            chain late { type filter hook forward priority 0; policy drop; }
            }",
        )?;
        let told = wait_for(&run.sluice, "firewall", "\"inet host late\"")?;
        ensure!(
            !told.contains("host out") && !told.contains("host before"),
            "{told}"
        );
        Ok(())
    });
}

/// What ends at an interface is counted nowhere.
#[test]
fn a_firewall_at_an_interface_of_the_subnet_side_is_named() {
    lab::test(|lab| {
        let run = by_the_kernel(lab, "kernel")?;
        let (router, laptop, server) = (&run.site.router, &run.site.laptop, SERVER[0].to_string());
        let nic = run.site.subnet_nic();
        for (table, hook, rules) in [
            ("netdev", "ingress", "ip protocol { tcp, icmp } drop"),
            ("netdev", "egress", "meta protocol ip drop"),
            ("inet", "ingress", "meta nfproto ipv4 drop"),
        ] {
            assert!(laptop.pings(&server, &[])?, "{table} {hook}");
            let path = format!("{table} odd at");
            nft(
                router,
                &format!(
                    "table {table} odd {{ chain at {{
                        type filter hook {hook} device {nic} priority 0; {rules}
                    }}\n }}"
                ),
            )?;
            let told = wait_for(&run.sluice, "firewall", &format!("\"{path}\""))?;
            assert!(!laptop.pings(&server, &[])?, "it does drop them");
            mend(router, &told)?;
            wait_for_none(&run.sluice, "firewall")?;
            assert!(laptop.pings(&server, &[])?, "{path}");
            nft(router, &format!("delete table {table} odd"))?;
        }
        // It concerns another interface.
        nft(
            router,
            "table netdev odd { chain at { type filter hook ingress device wan priority 0;
                ip protocol tcp drop
            }\n chain late { type filter hook ingress device lo priority 1; policy drop; }\n }
            table inet seen { chain late { type filter hook forward priority 0; policy drop; }\n }",
        )?;
        let told = wait_for(&run.sluice, "firewall", "\"inet seen late\"")?;
        ensure!(!told.contains("odd"), "{told}");
        Ok(())
    });
}

#[test]
fn a_firewall_that_was_there_before_is_named_too_and_one_that_keeps_clients_out() {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        nft(
            &site.router,
            "table inet filter {
                chain input { type filter hook input priority 0; policy drop;
                    iifname lo accept; ct state established,related accept; tcp dport 22 accept; }
                chain forward { type filter hook forward priority 0; policy drop; }
            }",
        )?;
        let client = Client::new("laptop", 2)?;
        let config = site::config(&[&client], "auto", true)?;
        let sluice = site.router.sluice_unsettled(&config)?;
        let told = wait_for(&sluice, "firewall", "\"inet filter forward\"")?;
        ensure!(told.contains("\"inet filter input\""), "{told}");
        mend(&site.router, &told)?;
        wait_for_none(&sluice, "firewall")?;
        let log = sluice.log();
        let told = log
            .lines()
            .filter(|line| line.contains("inet filter forward"));
        ensure!(told.count() == 1, "{log}");
        let _tunnel = client.connect(&site.laptop, &config.key)?;
        warm_up(&site.laptop, SERVER[0])?;
        sluice.stop()
    });
}

#[test]
fn replies_that_nobody_knows_are_not_refused_beside_programs() {
    disowned_replies("ebpf");
}

#[test]
fn replies_that_nobody_knows_are_not_refused_without_programs() {
    disowned_replies("kernel");
}

fn disowned_replies(datapath: &'static str) {
    lab::test(|lab| {
        let run = by_the_kernel(lab, datapath)?;
        let (laptop, server, router) = (&run.site.laptop, &run.site.server, &run.site.router);
        for address in SERVER {
            warm_up(laptop, address)?;
            let to = SocketAddr::new(address, PORT);
            let (near, far) = tcp_pair(laptop, server, to)?;
            carries(&near, &far, "up")?;
            let external = far.peer_addr()?;
            let at_server = server.capture("eth0")?;
            let mut resets = 0;
            let mut reset = || {
                let seen = at_server.drain(|p| {
                    let flags = *p.payload.get(13)?;
                    let refused = p.protocol == TCP && p.destination == address;
                    (refused && flags & RST != 0).then_some(())
                });
                resets += seen.len();
                resets
            };
            // Far outside of the window, wherever that is: what lies before it is a late copy to newer
            // kernels, and passes.
            let stray = |sequence| {
                Ip::tcp(address, external.ip(), ACK, &[], 10)
                    .ports(PORT, external.port())
                    .sequence(sequence, sequence)
            };
            let disowned = || run.sluice.packets("kernel_to_overlay", "drop_invalid");
            let before = disowned()?;
            for part in 0..8 {
                server.send_ip(&stray(part << 29).bytes())?;
            }
            wait_until(SOON, "a stray segment to be counted", || {
                reset() > 0 || disowned().is_ok_and(|n| n > before)
            })?;
            carries(&near, &far, "on")?;
            carries(&far, &near, "back")?;
            assert_eq!(reset(), 0, "{address}: the server is refused");

            // After the end of the half-closed connection's time.
            for state in ["fin_wait", "close_wait"] {
                router.sysctl(
                    &format!("net/netfilter/nf_conntrack_tcp_timeout_{state}"),
                    "1",
                )?;
            }
            near.shutdown(std::net::Shutdown::Write)?;
            wait_until(SOON, "the connection to be forgotten", || {
                let family = if address.is_ipv4() { "ipv4" } else { "ipv6" };
                router
                    .run(["conntrack", "-L", "-f", family, "-p", "tcp"])
                    .is_ok_and(|flows| !flows.contains("dport"))
            })?;
            let before = disowned()?;
            std::io::Write::write_all(&mut &far, b"late")?;
            wait_until(SOON, "a late segment to be counted", || {
                reset() > 0 || disowned().is_ok_and(|n| n > before)
            })?;
            assert_eq!(reset(), 0, "{address}: the server is refused");

            // The router's own sockets have their ports in the same range.
            let own = router.tcp_listener(SocketAddr::new(external.ip(), external.port()))?;
            let out = server.tcp_connect(SocketAddr::new(external.ip(), external.port()), SOON)?;
            let (inside, _) = own.accept()?;
            router.run(["conntrack", "-F"])?;
            carries(&out, &inside, "to the router itself")?;
        }
        Ok(())
    });
}

/// As a CNI or a multi-WAN set-up does, before and after us.
#[test]
fn packets_for_a_peer_that_is_not_here_are_told() {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        site.route_overlay()?;
        let (here, elsewhere) = (Client::new("laptop", 2)?, Client::new("phone", 3)?);
        let config = site::config(&[&here, &elsewhere], "auto", false)?;
        let sluice = site.router.sluice(&config)?;
        let _tunnel = here.connect(&site.laptop, &config.key)?;
        warm_up(&site.laptop, SERVER[0])?;
        assert_eq!(problem(&sluice, "peers")?, "");
        // The phone is connected to another router of the same network.
        assert!(
            !site
                .server
                .pings(&elsewhere.addresses[0].to_string(), &[])?
        );
        let told = wait_for(&sluice, "peers", "phone")?;
        ensure!(
            told.contains("endpoint") && told.contains("100.64.0.3"),
            "{told}"
        );
        let _phone = elsewhere.connect(&site.phone, &config.key)?;
        warm_up(&site.phone, SERVER[0])?;
        wait_for_none(&sluice, "peers")
    });
}

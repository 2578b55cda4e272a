//! Others on the same machine: who switches a family off, moves the kernel's rules, takes ours away,
//! or has a hand in our device.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixDatagram;

use anyhow::{Context as _, ensure};
use lab::site::{Arms, Client, ENDPOINT_V6, ROUTER, Running, SERVER, Site, config};
use lab::sluice::{Config, Sluice};
use lab::{Host, Lab, http, poll, wait_until};

use super::{HTTP, Path, SOON, on_every_path, serve};

on_every_path!(
    ipv4_works_without_ipv6_until_that_comes_back,
    our_rules_come_behind_the_local_one,
    without_its_rules_nothing_leaves_in_the_clear,
    what_others_change_of_the_device_is_put_back,
);

/// The problems in the status, as one text; `None` as long as it does not answer.
fn problems(sluice: &Sluice) -> Option<String> {
    let status = sluice.status().ok()?;
    let problems = status["problems"].as_array()?;
    let all: Vec<String> = problems.iter().map(ToString::to_string).collect();
    Some(all.join("\n"))
}

fn healthy(sluice: &Sluice) -> anyhow::Result<()> {
    wait_until(SOON, "health", || {
        problems(sluice).is_some_and(|all| all.is_empty())
    })
}

/// The laptop gets the server's page.
fn serves(site: &Site, family: usize) -> anyhow::Result<()> {
    let server = SocketAddr::new(SERVER[family], HTTP);
    wait_until(SOON, "the page", || {
        http::get(&site.laptop, server, "/").is_ok()
    })
}

fn warnings(sluice: &Sluice) -> Vec<String> {
    let log = sluice.log();
    let lines = log.lines().filter(|line| line.contains("WARN"));
    lines.map(str::to_owned).collect()
}

fn switch_ipv6(router: &Host, on: bool) -> anyhow::Result<()> {
    for name in ["default", "all"] {
        let key = format!("net/ipv6/conf/{name}/disable_ipv6");
        router.sysctl(&key, if on { "0" } else { "1" })?;
    }
    if on {
        // They went with it.
        let wan = ENDPOINT_V6.ip();
        router.ip(&format!("address add {wan}/64 dev wan nodad"))?;
        router.ip("address add 2001:db8:30::10/64 dev lan nodad")?;
        router.route("default", "2001:db8:51::254")?;
        router.route("2001:db8:20::/56", "2001:db8:30::1")?;
    }
    Ok(())
}

fn site(lab: &Lab, path: Path) -> anyhow::Result<(Site, Client, Config)> {
    let site = Site::new(lab, Arms::Two)?;
    if !path.snat() {
        site.route_overlay()?;
    }
    let client = Client::new("laptop", 2)?;
    let config = config(&[&client], path.datapath(), path.snat())?;
    Ok((site, client, config))
}

fn ipv4_works_without_ipv6_until_that_comes_back(path: Path) {
    lab::test(|lab| {
        let (site, client, mut config) = site(lab, path)?;
        let socket = lab.folder().join("notify");
        let manager = UnixDatagram::bind(&socket)?;
        manager.set_nonblocking(true)?;
        config.notify = Some(socket);
        switch_ipv6(&site.router, false)?;
        let sluice = site.router.sluice_unsettled(&config)?;
        let ready = poll(SOON, "word to the service manager", || {
            let mut buffer = [0; 64];
            let len = manager.recv(&mut buffer).ok()?;
            Some(String::from_utf8_lossy(&buffer[..len]).into_owned())
        })?;
        ensure!(ready == "READY=1", "{ready}");
        let _tunnel = client.connect(&site.laptop, &config.key)?;
        let _servers = serve(&site.server)?;
        serves(&site, 0)?;
        for round in 1..=2 {
            let told = problems(&sluice).context("a status")?;
            ensure!(told.lines().count() == 1, "{told}");
            ensure!(
                told.contains("disable_ipv6") && told.contains("IPv4 only"),
                "{told}"
            );
            let warned = warnings(&sluice);
            let of_it = warned.iter().filter(|line| line.contains("disable_ipv6"));
            ensure!(of_it.count() == round, "{warned:#?}");
            ensure!(warned.len() == round, "{warned:#?}");

            switch_ipv6(&site.router, true)?;
            healthy(&sluice)?;
            serves(&site, 1)?;
            serves(&site, 0)?;

            switch_ipv6(&site.router, false)?;
            wait_until(SOON, "the problem", || {
                problems(&sluice).is_some_and(|all| all.contains("disable_ipv6"))
            })?;
            serves(&site, 0)?;
        }
        sluice.stop()
    });
}

/// As set-ups of VRFs do.
fn move_local(router: &Host, from: u32, to: u32) -> anyhow::Result<()> {
    for family in ["-4", "-6"] {
        router.ip(&format!("{family} rule add priority {to} lookup local"))?;
        router.ip(&format!("{family} rule del priority {from} lookup local"))?;
    }
    Ok(())
}

fn our_rules_come_behind_the_local_one(path: Path) {
    lab::test(|lab| {
        let (site, client, config) = site(lab, path)?;
        let router = &site.router;
        move_local(router, 0, 32765)?;
        let before = router.footprint()?;
        let sluice = router.sluice(&config)?;
        let _tunnel = client.connect(&site.laptop, &config.key)?;
        let _servers = serve(&site.server)?;
        for (from, to) in [(32765, 0), (0, 6000), (6000, 32765)] {
            for (family, address) in ROUTER.iter().enumerate() {
                serves(&site, family)?;
                // To the router itself, by the tunnel and by the internet.
                ensure!(site.laptop.pings(&address.to_string(), &[])?);
            }
            ensure!(site.laptop.pings(&ENDPOINT_V6.ip().to_string(), &[])?);
            move_local(router, from, to)?;
            wait_until(SOON, "our rules to follow", || {
                let rules =
                    ["-4", "-6"].map(|f| router.ip(&format!("{f} rule")).unwrap_or_default());
                rules.iter().all(|rules| {
                    let ours = rules.find("lookup 51820");
                    ours.is_some() && rules.find("lookup local") < ours
                })
            })?;
        }
        for family in 0..2 {
            serves(&site, family)?;
        }
        sluice.stop()?;
        let left = before.difference(&router.footprint()?);
        ensure!(left.is_empty(), "left:\n{}", left.join("\n"));
        Ok(())
    });
}

fn without_its_rules_nothing_leaves_in_the_clear(path: Path) {
    lab::test(|lab| {
        const BEHIND: [(&str, &str); 2] = [
            ("192.168.77.0/24", "192.168.77.5"),
            ("fd77::/64", "fd77::5"),
        ];
        let (site, client, mut config) = site(lab, path)?;
        // What is behind the laptop, and not in the tunnel's own network, of which the kernel has a
        // route itself.
        let nets = BEHIND.map(|(net, _)| net.to_owned());
        config.peers[0].allowed_ips.extend(nets);
        let router = &site.router;
        let sluice = router.sluice(&config)?;
        let _tunnel = client.connect(&site.laptop, &config.key)?;
        let core = site.core.as_ref().context("two arms")?;
        for ((net, _), via) in BEHIND.iter().zip(["10.30.0.10", "2001:db8:30::10"]) {
            core.route(net, via)?;
        }
        // What the router forwards for others still leaves: by it the capture is known to see.
        core.route("203.0.113.0/24", "10.30.0.10")?;
        core.route("2001:db8:113::/64", "2001:db8:30::10")?;
        let others = ["203.0.113.10", "2001:db8:113::10"];
        let _servers = serve(&site.server)?;
        for family in 0..2 {
            serves(&site, family)?;
        }
        let wan = router.capture("wan")?;
        let rules = || -> anyhow::Result<usize> {
            let all = router.ip("-4 rule")? + &router.ip("-6 rule")?;
            Ok(all.matches("lookup 51820").count())
        };
        ensure!(rules()? == 4);
        // So that it cannot put them back.
        let id = sluice.id().to_string();
        router.run(["kill", "-STOP", &id])?;
        for (family, priority) in ["-4", "-6"]
            .into_iter()
            .flat_map(|family| [5150, 32764, 32765].map(|priority| (family, priority)))
        {
            router.ip(&format!("{family} rule del priority {priority}"))?;
        }
        ensure!(rules()? == 0);
        for family in 0..2 {
            let peer = BEHIND[family].1.parse::<IpAddr>()?;
            for host in [&site.server, router] {
                let to_peer = host.udp_socket(match family {
                    0 => "0.0.0.0:0".parse()?,
                    _ => "[::]:0".parse()?,
                })?;
                for _ in 0..3 {
                    // Our own kernel may refuse it, which is as good.
                    let _ = to_peer.send_to(b"for the peer", (peer, 9));
                }
                to_peer.send_to(b"for another", (others[family], 9))?;
                let other = others[family].parse::<IpAddr>()?;
                let mut leaked = 0;
                wan.find(SOON, "what others may send", |packet| {
                    leaked += usize::from(packet.destination == peer);
                    (packet.destination == other).then_some(())
                })?;
                ensure!(leaked == 0, "{leaked} to {peer} from {}", host.name());
            }
        }
        router.run(["kill", "-CONT", &id])?;
        wait_until(SOON, "the rules", || rules().is_ok_and(|count| count == 4))?;
        for family in 0..2 {
            serves(&site, family)?;
        }
        let dropped = sluice.packets("kernel_to_overlay", "drop_astray")?;
        ensure!(dropped >= 6, "{dropped} told");
        sluice.stop()
    });
}

fn what_others_change_of_the_device_is_put_back(path: Path) {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        let router = &run.site.router;
        let _servers = serve(&run.site.server)?;
        for family in 0..2 {
            serves(&run.site, family)?;
        }
        let before = router.footprint()?;
        for (change, told) in [
            ("address flush dev sluice0", "did not have 100.64.0.1/24"),
            ("link set sluice0 mtu 1500", "1500 instead of 1420"),
            ("link set sluice0 mtu 1200", "1200 instead of 1420"),
            ("link set sluice0 down", "down instead of up"),
        ] {
            let known = warnings(&run.sluice).len();
            router.ip(change)?;
            if change.ends_with("down") {
                // By hand, as somebody would who does not know that the address goes with it.
                router.ip("link set sluice0 up")?;
            }
            let mut left = Vec::new();
            let back = wait_until(SOON, "all of it", || {
                let all = router
                    .footprint()
                    .map_or(Vec::new(), |now| before.difference(&now));
                // Packets are counted meanwhile.
                let counted = |line: &&String| line.contains("packets ");
                left = all.iter().filter(|line| !counted(line)).cloned().collect();
                left.is_empty() && warnings(&run.sluice).len() > known
            });
            back.with_context(|| format!("{change}: {}\n{}", left.join("\n"), run.sluice.log()))?;
            for family in 0..2 {
                serves(&run.site, family)?;
            }
            let warned = warnings(&run.sluice).split_off(known);
            ensure!(
                warned.iter().all(|line| line.contains("somebody else")),
                "{warned:#?}"
            );
            let told = if change.ends_with("down") {
                "did not have fd64::1/64"
            } else {
                told
            };
            ensure!(warned.iter().any(|line| line.contains(told)), "{warned:#?}");
            healthy(&run.sluice)?;
        }
        run.sluice.stop()
    });
}

/// Who changes it again and again is told, and not fought without end.
#[test]
fn nobody_is_fought_without_end() {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, "kernel", true)?;
        let router = &run.site.router;
        let contested = || problems(&run.sluice).is_some_and(|all| all.contains("times in a row"));
        for _ in 0..6 {
            ensure!(!contested());
            router.ip("link set sluice0 down")?;
            wait_until(SOON, "it to be up", || {
                let shown = router.ip("link show sluice0").unwrap_or_default();
                shown.contains(",UP")
            })?;
        }
        wait_until(SOON, "the problem", contested)?;
        let log = run.sluice.log();
        ensure!(log.contains("again and again"), "{log}");
        run.sluice.stop()
    });
}

/// Waits until a problem says all of this, and yields the problems.
fn told(sluice: &Sluice, words: &[&str]) -> anyhow::Result<String> {
    let mut last = String::new();
    wait_until(SOON, &format!("{words:?} in status"), || {
        last = problems(sluice).unwrap_or_default();
        words.iter().all(|word| last.contains(word))
    })
    .with_context(|| format!("it says {last:?}"))?;
    Ok(last)
}

/// The commands that problems name.
fn mend(host: &Host, problems: &str) -> anyhow::Result<()> {
    let commands = problems.split('`').filter(|part| part.starts_with("ip "));
    let commands: Vec<_> = commands.collect();
    ensure!(!commands.is_empty(), "no command in {problems:?}");
    for command in commands {
        host.run(["sh", "-c", command])?;
    }
    Ok(())
}

/// Rules that drop before ours or the main table is asked, and routes in our table: nothing is counted.
#[test]
fn rules_and_routes_of_others_that_take_packets_are_named() {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, "kernel", true)?;
        let router = &run.site.router;
        let _servers = serve(&run.site.server)?;
        let log = || run.sluice.log();
        for (family, makes, words) in [
            (
                0,
                "rule add priority 100 from 100.64.0.0/10 blackhole",
                &[
                    "priority 100",
                    "from 100.64.0.0/10 blackhole",
                    "comes from peers",
                ][..],
            ),
            (
                0,
                "rule add priority 20000 from 100.64.0.0/10 unreachable",
                &["priority 20000", "comes from peers"],
            ),
            (
                1,
                "-6 rule add priority 101 to fd64::/64 prohibit",
                &["priority 101", "is for peers"],
            ),
            (
                0,
                "route add 100.64.0.2/32 dev lan table 51820",
                &["100.64.0.2/32", "routing table 51820"],
            ),
            (
                1,
                "-6 route add fd64::/64 dev lan metric 5 table 51820",
                &["fd64::/64", "metric 5"],
            ),
        ] {
            serves(&run.site, family)?;
            router.ip(makes)?;
            let problem = told(&run.sluice, words)?;
            ensure!(problem.lines().count() == 1, "{problem}");
            let all = |line: &&str| words.iter().all(|word| line.contains(word));
            let warned = log().lines().filter(all).count();
            ensure!(warned == 1, "{makes}: {}", log());
            mend(router, &problem)?;
            healthy(&run.sluice)?;
            serves(&run.site, family)?;
        }
        // About nothing that passes here.
        router.ip("rule add priority 100 from 198.18.0.0/15 blackhole")?;
        router.ip("rule add priority 101 from 100.64.0.0/10 fwmark 7 blackhole")?;
        router.ip("link set sluice0 mtu 1300")?;
        told_in_log(&run.sluice, "1300 instead of")?;
        healthy(&run.sluice)?;
        run.sluice.stop()
    });
}

fn told_in_log(sluice: &Sluice, text: &str) -> anyhow::Result<()> {
    wait_until(SOON, text, || sluice.log().contains(text))
}

/// A device with another name is called as before; one in another namespace is not ours to bring back.
#[test]
fn a_device_that_is_renamed_gets_its_name_back_and_one_that_is_moved_is_told() {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, "ebpf", true)?;
        let router = &run.site.router;
        let _servers = serve(&run.site.server)?;
        serves(&run.site, 0)?;
        let known = warnings(&run.sluice).len();
        router.ip("link set sluice0 name other0")?;
        told_in_log(&run.sluice, "it was called other0")?;
        for family in 0..2 {
            serves(&run.site, family)?;
        }
        healthy(&run.sluice)?;
        let warned = warnings(&run.sluice).split_off(known);
        ensure!(
            warned.iter().all(|w| w.contains("somebody else")),
            "{warned:#?}"
        );

        let elsewhere = run.site.server.namespace();
        router.ip(&format!("link set sluice0 netns {elsewhere}"))?;
        told(
            &run.sluice,
            &["another network namespace", "systemctl restart sluice"],
        )?;
        run.sluice.stop()
    });
}

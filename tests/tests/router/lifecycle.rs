//! Start, stop, crash, and what is left.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::net::UnixDatagram;

use anyhow::ensure;

use lab::site::{Arms, Client, Running, SERVER, Site, config};
use lab::sluice::Sluice;
use lab::{Footprint, Host, http, poll, wait_until};
use router::datapath::kernel::Kernel;
use router::datapath::{Datapath as _, Spec};

use super::{HTTP, Path, SOON, on_every_path, serve};

on_every_path!(
    a_stop_leaves_nothing_one_armed,
    a_stop_leaves_nothing_two_armed,
    after_a_crash_the_next_start_works_and_cleans_up,
);

fn assert_unchanged(host: &Host, before: &Footprint, when: &str) -> anyhow::Result<()> {
    let left = before.difference(&host.footprint()?);
    assert!(left.is_empty(), "left {when}:\n{}", left.join("\n"));
    Ok(())
}

/// Traffic goes, for a client that has just come.
fn works(site: &Site, client: &Client, config: &lab::sluice::Config) -> anyhow::Result<()> {
    let _tunnel = client.connect(&site.laptop, &config.key)?;
    let _servers = serve(&site.server)?;
    for server in SERVER {
        http::download(&site.laptop, SocketAddr::new(server, HTTP), 1 << 20)?;
    }
    Ok(())
}

fn a_stop_leaves_nothing(arms: Arms, path: Path) {
    lab::test(|lab| {
        let site = Site::new(lab, arms)?;
        if !path.snat() {
            site.route_overlay()?;
        }
        let before = site.router.footprint()?;
        let client = Client::new("laptop", 2)?;
        let config = config(&[&client], path.datapath(), path.snat())?;
        // Twice: what the first run may have spoilt shows in the second.
        for signal in [libc::SIGTERM, libc::SIGINT] {
            let sluice = site.router.sluice(&config)?;
            works(&site, &client, &config)?;
            let during = before.difference(&site.router.footprint()?);
            assert!(!during.is_empty(), "the comparison sees nothing");
            sluice.stop_by(signal)?;
            assert_unchanged(&site.router, &before, &format!("by {path:?}"))?;
        }
        Ok(())
    });
}

fn a_stop_leaves_nothing_one_armed(path: Path) {
    a_stop_leaves_nothing(Arms::One, path);
}

fn a_stop_leaves_nothing_two_armed(path: Path) {
    a_stop_leaves_nothing(Arms::Two, path);
}

fn after_a_crash_the_next_start_works_and_cleans_up(path: Path) {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        if !path.snat() {
            site.route_overlay()?;
        }
        let before = site.router.footprint()?;
        let client = Client::new("laptop", 2)?;
        let config = config(&[&client], path.datapath(), path.snat())?;
        let hand_over = |sluice: Sluice| sluice.stop_by(libc::SIGUSR1);
        for end in [Sluice::kill, Sluice::kill, hand_over, hand_over] {
            let sluice = site.router.sluice(&config)?;
            works(&site, &client, &config)?;
            end(sluice)?;
        }
        let sluice = site.router.sluice(&config)?;
        works(&site, &client, &config)?;
        sluice.stop()?;
        assert_unchanged(&site.router, &before, &format!("by {path:?}"))
    });
}

#[test]
fn after_a_crash_another_datapath_can_follow() {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        site.route_overlay()?;
        let before = site.router.footprint()?;
        let client = Client::new("laptop", 2)?;
        let mut config = config(&[&client], "ebpf", false)?;
        let sluice = site.router.sluice(&config)?;
        works(&site, &client, &config)?;
        sluice.kill()?;
        config.datapath = "kernel";
        let sluice = site.router.sluice(&config)?;
        works(&site, &client, &config)?;
        sluice.stop()?;
        assert_unchanged(&site.router, &before, "by either")
    });
}

/// Changes the file of a running router so that it names another device.
fn name_another_device(sluice: &Sluice) -> anyhow::Result<()> {
    let file = sluice.config_file();
    let text = fs::read_to_string(file)?;
    let renamed = text.replacen("[wireguard]", "[wireguard]\ndevice = \"sluice7\"", 1);
    ensure!(renamed != text, "{text}");
    Ok(fs::write(file, renamed)?)
}

/// The next daemon would neither take over nor remove what is another device's.
#[test]
fn a_hand_over_to_another_device_leaves_nothing() {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        let before = site.router.footprint()?;
        let client = Client::new("laptop", 2)?;
        let config = config(&[&client], "ebpf", true)?;
        let sluice = site.router.sluice(&config)?;
        works(&site, &client, &config)?;
        name_another_device(&sluice)?;
        sluice.stop_by(libc::SIGUSR1)?;
        assert_unchanged(&site.router, &before, "by a hand-over to nobody")
    });
}

#[test]
fn a_second_instance_is_refused_and_the_first_goes_on() {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, "ebpf", false)?;
        let before = run.site.router.footprint()?;
        let first = run.sluice.id().to_string();
        // They would share routing table and rules, whatever their devices.
        for device in ["sluice0", "sluice7"] {
            if device == "sluice7" {
                name_another_device(&run.sluice)?;
            }
            let second = run.site.router.sluice_output(&["run"])?;
            assert!(!second.status.success(), "{second:?}");
            let last = second.stderr.lines().last().unwrap_or_default();
            assert!(last.contains(device), "names the device: {last}");
            assert!(last.contains(&first), "names the first, {first}: {last}");
            assert_unchanged(&run.site.router, &before, "by the second")?;
        }
        let _servers = serve(&run.site.server)?;
        for server in SERVER {
            http::get(&run.site.laptop, SocketAddr::new(server, HTTP), "/")?;
        }
        Ok(())
    });
}

#[test]
fn a_broken_file_is_told_and_changes_nothing() {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, "ebpf", false)?;
        let before = run.site.router.footprint()?;
        let mut broken = run.config.clone();
        broken.routes[0].cidr = "10.20.0.0/99".to_owned();
        let mut sluice = run.sluice;
        sluice.reload(&broken)?;
        wait_until(SOON, "the problem in the status", || {
            let status = sluice.status().unwrap_or_default();
            status["problems"].to_string().contains("10.20.0.0/99")
        })?;
        assert_unchanged(&run.site.router, &before, "by the broken file")?;
        assert!(run.site.laptop.pings(&SERVER[0].to_string(), &[])?);
        sluice.reload(&run.config)?;
        wait_until(SOON, "health", || {
            let status = sluice.status().unwrap_or_default();
            status["problems"].as_array().is_some_and(Vec::is_empty)
        })
    });
}

/// The next thing that a service manager was told, if there is one.
fn told(manager: &UnixDatagram) -> Option<String> {
    let mut buffer = [0; 256];
    let length = manager.recv(&mut buffer).ok()?;
    Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

#[test]
fn a_reload_does_not_make_a_router_ready() {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        let mut config = config(&[], "kernel", true)?;
        let path = lab.folder().join("notify");
        let manager = UnixDatagram::bind(&path)?;
        manager.set_nonblocking(true)?;
        config.notify = Some(path);
        let next = || poll(SOON, "word to the service manager", || told(&manager));

        // Another process owns the table that the ruleset goes to.
        let mut owner = Kernel::new("sluice0");
        site.router.enter(|| owner.apply(&Spec::default()))??;
        let mut sluice = site.router.sluice_unsettled(&config)?;
        let problem = |sluice: &Sluice, says: &str| {
            wait_until(SOON, says, || {
                let status = sluice.status().unwrap_or_default();
                status["problems"].to_string().contains(says)
            })
        };
        problem(&sluice, "another process may own the table")?;
        // The status shows when the reload is over.
        let mut broken = config.clone();
        broken.key.private = "no key".to_owned();
        sluice.reload(&broken)?;
        problem(&sluice, "private_key_file")?;
        let early: Vec<String> = std::iter::from_fn(|| told(&manager)).collect();
        assert_eq!(early, [""; 0]);

        drop(owner);
        assert_eq!(next()?, "READY=1");
        sluice.reload(&config)?;
        assert_eq!([next()?, next()?], ["RELOADING=1", "READY=1"]);
        sluice.stop()
    });
}

/// The first line of what the router answers to a request for `/status` that names `named`.
fn answer(router: &Host, server: SocketAddr, named: &str) -> anyhow::Result<String> {
    let mut stream = router.tcp_connect(server, SOON)?;
    stream.set_read_timeout(Some(SOON))?;
    write!(
        stream,
        "GET /status HTTP/1.1\r\nhost: {named}\r\nconnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.lines().next().unwrap_or_default().to_owned())
}

/// A web page whose name's address became this machine's (DNS rebinding) reads nothing; a scraper
/// that knows the router by a name is told once, in the log too, what lets it.
#[test]
fn over_http_only_hosts_that_are_known_are_answered() {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::One)?;
        let client = Client::new("laptop", 2)?;
        let mut config = config(&[&client], "kernel", true)?;
        let server: SocketAddr = "127.0.0.1:9577".parse()?;
        config.metrics = Some(server);
        let sluice = site.router.sluice(&config)?;
        for (named, code) in [
            ("attacker.example", 421),
            ("attacker.example:9577", 421),
            ("127.0.0.1:9577", 200),
            ("[::1]:9577", 200),
            ("localhost:9577", 200),
            ("", 400),
        ] {
            let answer = answer(&site.router, server, named)?;
            ensure!(answer.contains(&format!(" {code} ")), "{named}: {answer}");
        }
        let log = sluice.log();
        ensure!(log.matches("metrics.hosts").count() == 1, "{log}");
        Ok(())
    });
}

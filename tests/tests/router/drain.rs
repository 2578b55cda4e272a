//! A router makes room for another one.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::site::{Arms, ROUTER, Running, SERVER};
use lab::sluice::Sluice;
use lab::{Flow, Host, http, wait_until};
use serde_json::Value;

use super::{HTTP, Path, SOON, on_every_path, serve};

on_every_path!(
    a_router_that_drains_carries_on_and_takes_nothing_new,
    a_stop_waits_for_flows_and_no_longer_than_it_may,
);

/// Long enough for an answer, short enough to wait for none.
const BRIEFLY: Duration = Duration::from_millis(500);
/// What had a packet lately counts for ten seconds.
const QUIET: Duration = Duration::from_secs(40);

fn connects(from: &Host, to: IpAddr, port: u16) -> bool {
    let stream = from.tcp_connect(SocketAddr::new(to, port), BRIEFLY);
    stream.is_ok()
}

/// Waits until the part `life` of the status is as `wanted`.
fn wait_life(sluice: &Sluice, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<()> {
    let mut last = Value::Null;
    let waited = wait_until(QUIET, what, || {
        last = sluice.status().unwrap_or_default()["life"].clone();
        wanted(&last)
    });
    waited.with_context(|| format!("{last}\n{}", sluice.log()))
}

/// Why the router is not ready; `None`: it is.
fn unready(sluice: &Sluice) -> Option<String> {
    let answer = http::get_local(sluice.socket(), "/readyz");
    answer.err().map(|error| format!("{error:#}"))
}

/// A connection to the server over each family.
fn flows(run: &Running) -> Result<Vec<Flow>> {
    let open = |server| Flow::open(&run.site.laptop, &run.site.server, server);
    SERVER.into_iter().map(open).collect()
}

fn work(flows: &mut [Flow]) -> Result<()> {
    for _ in 0..50 {
        flows.iter_mut().try_for_each(Flow::works)?;
    }
    Ok(())
}

fn a_router_that_drains_carries_on_and_takes_nothing_new(path: Path) {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        let (site, sluice) = (&run.site, &run.sluice);
        let _servers = [serve(&site.server)?, serve(&site.laptop)?];
        let mut flows = flows(&run)?;
        work(&mut flows)?;
        ensure!(unready(sluice).is_none());

        let drained = sluice.command(&["drain", "--no-wait", "--timeout", "5m"])?;
        ensure!(drained.status.success(), "{drained:?}");
        wait_life(sluice, "the two flows", |life| {
            life["phase"] == "draining" && life["flows"] == 2
        })?;
        let status = sluice.status()?;
        ensure!(status["life"]["cause"] == "hand", "{}", status["life"]);
        ensure!(status["life"]["waits_for"] == "flows to end");
        ensure!(status["life"]["until"].is_u64());
        ensure!(status["problems"] == Value::Array(Vec::new()), "{status}");
        let page = sluice.command(&["status"])?.stdout;
        ensure!(
            page.contains("draining, for somebody has asked for it; 2 flows are left"),
            "{page}"
        );
        let metrics = sluice.metrics()?;
        for line in [
            "sluice_life_phase{phase=\"draining\"} 1",
            "sluice_life_phase{phase=\"serving\"} 0",
            "sluice_drain_flows 2",
        ] {
            ensure!(metrics.contains(line), "{metrics}");
        }
        let why = unready(sluice).context("it is ready")?;
        ensure!(
            why.contains(" 503 ") && why.contains("somebody has asked"),
            "{why}"
        );
        http::get_local(sluice.socket(), "/healthz")?;

        for server in SERVER {
            ensure!(!connects(&site.laptop, server, HTTP), "{server}");
        }
        let program = match path.datapath() {
            "ebpf" => ["from_overlay", "from_subnet"],
            _ => ["kernel_from_overlay", "kernel_to_overlay"],
        };
        ensure!(sluice.packets(program[0], "drop_draining")? >= 2);
        if !path.snat() {
            for address in run.client.addresses {
                ensure!(!connects(&site.server, address, HTTP), "{address}");
            }
            ensure!(sluice.packets(program[1], "drop_draining")? >= 2);
        }
        if path.datapath() == "ebpf" {
            let denied = sluice.denied(&[])?;
            ensure!(denied.stdout.contains("drop_draining"), "{denied:?}");
        }
        // Whoever drains it can still reach it.
        for own in ROUTER {
            ensure!(site.laptop.pings(&own.to_string(), &[])?, "{own}");
        }
        work(&mut flows)?;

        let mut waiting = sluice.command_in_background(&["drain"])?;
        wait_until(SOON, "progress", || {
            waiting.log().contains("2 flows are left")
        })?;
        drop(flows);
        let ended = waiting.wait(QUIET)?;
        ensure!(ended.success(), "{}", waiting.log());
        ensure!(
            waiting.log().contains("no flow is left"),
            "{}",
            waiting.log()
        );
        wait_life(sluice, "it to have drained", |life| {
            life["phase"] == "drained"
        })?;
        ensure!(!connects(&site.laptop, SERVER[0], HTTP));

        let back = sluice.command(&["undrain"])?;
        ensure!(back.status.success(), "{back:?}");
        wait_life(sluice, "it to serve", |life| {
            life["phase"] == "serving" && life["flows"].is_null() && life["waits_for"].is_null()
        })?;
        ensure!(unready(sluice).is_none());
        for server in SERVER {
            http::get(&site.laptop, SocketAddr::new(server, HTTP), "/")?;
        }
        Ok(())
    });
}

fn a_stop_waits_for_flows_and_no_longer_than_it_may(path: Path) {
    lab::test(|lab| {
        let notify = lab.folder().join("notify");
        let manager = UnixDatagram::bind(&notify)?;
        manager.set_nonblocking(true)?;
        let run = Running::with(lab, Arms::Two, path.datapath(), path.snat(), |config| {
            config.stop_timeout = Some(600);
            config.notify = Some(notify.clone());
        })?;
        // The flows end, long before the time is up.
        let mut open = flows(&run)?;
        let mut sluice = run.sluice;
        sluice.signal(libc::SIGTERM)?;
        wait_life(&sluice, "the wait", |life| {
            life["cause"] == "signal" && life["flows"].as_u64() >= Some(2)
        })?;
        let mut told = String::new();
        let mut buffer = [0; 256];
        while let Ok(length) = manager.recv(&mut buffer) {
            told += &String::from_utf8_lossy(&buffer[..length]);
        }
        ensure!(
            told.contains("STOPPING=1\nEXTEND_TIMEOUT_USEC=615000000"),
            "{told}"
        );
        let refused = sluice.command(&["undrain"])?;
        ensure!(
            !refused.status.success() && refused.stderr.contains("told to stop"),
            "{refused:?}"
        );
        work(&mut open)?;
        // What begins the connection keeps its port for a while.
        drop(open);
        sluice.ends()?;

        // The time is up, and one flow is still there.
        let mut config = run.config;
        config.notify = None;
        config.stop_timeout = Some(2);
        let mut sluice = run.site.router.sluice(&config)?;
        let open = |server| Flow::open(&run.site.laptop, &run.site.server, server);
        let mut flow = open(SERVER[0])?;
        flow.works()?;
        sluice.signal(libc::SIGTERM)?;
        sluice.ends()?;
        flow.hangs()?;

        // A second signal is not to be put off.
        config.stop_timeout = Some(600);
        sluice = run.site.router.sluice(&config)?;
        let mut flow = open(SERVER[0])?;
        flow.works()?;
        sluice.signal(libc::SIGTERM)?;
        wait_life(&sluice, "the wait", |life| life["phase"] == "draining")?;
        sluice.signal(libc::SIGTERM)?;
        sluice.ends()
    });
}

/// What the time does not suffice for goes on, and who waits is told.
#[test]
fn what_does_not_end_in_time_goes_on() {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, "ebpf", true)?;
        let mut flows = flows(&run)?;
        work(&mut flows)?;
        let wrong = run.sluice.command(&["drain", "--timeout", "25h"])?;
        ensure!(
            !wrong.status.success() && wrong.stderr.contains("at most 86400"),
            "{wrong:?}"
        );
        let drained = run.sluice.command(&["drain", "--timeout", "1500ms"])?;
        ensure!(!drained.status.success(), "{drained:?}");
        ensure!(
            drained.stderr.contains("the time is up") && drained.stdout.contains("flows are left"),
            "{drained:?}"
        );
        work(&mut flows)?;
        wait_life(&run.sluice, "the flows that stay", |life| {
            life["phase"] == "drained" && life["flows"] == 2
        })?;
        drop(flows);
        wait_life(&run.sluice, "their end", |life| life["flows"] == 0)
    });
}

/// New settings of the file hold for the next time.
#[test]
fn the_file_says_how_long_while_it_runs() {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, "kernel", true)?;
        let mut flow = Flow::open(&run.site.laptop, &run.site.server, SERVER[0])?;
        let mut config = run.config;
        let mut sluice = run.sluice;
        config.stop_timeout = Some(600);
        sluice.reload(&config)?;
        wait_until(SOON, "the file to be read", || {
            sluice.log().contains("the configuration was read again")
        })?;
        sluice.signal(libc::SIGTERM)?;
        wait_life(&sluice, "the wait", |life| life["phase"] == "draining")?;
        flow.works()?;
        drop(flow);
        sluice.ends()
    });
}

/// Whoever has drained a router wants it so after a restart and a crash, too. Who stops it has ended that.
#[test]
fn a_drain_outlives_the_daemon() {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, "ebpf", true)?;
        let site = &run.site;
        let _servers = serve(&site.server)?;
        let mut flows = flows(&run)?;
        work(&mut flows)?;
        let mut sluice = run.sluice;
        let drained = sluice.command(&["drain", "--no-wait", "--timeout", "10m"])?;
        ensure!(drained.status.success(), "{drained:?}");
        let is_draining = |sluice: &Sluice| {
            wait_life(sluice, "the flows to be waited for", |life| {
                life["phase"] == "draining" && life["cause"] == "hand" && life["flows"] == 2
            })
        };
        is_draining(&sluice)?;
        let until = sluice.status()?["life"]["until"].as_u64();

        sluice.hand_over()?;
        is_draining(&sluice)?;
        let again = sluice.status()?["life"]["until"].as_u64();
        let apart = again.context("a time")?.abs_diff(until.context("a time")?);
        ensure!(apart <= 2, "{until:?} {again:?}");
        let why = unready(&sluice).context("it is ready")?;
        ensure!(why.contains("somebody has asked"), "{why}");
        work(&mut flows)?;
        ensure!(!connects(&site.laptop, SERVER[0], HTTP));

        sluice.kill()?;
        let sluice = site.router.sluice(&run.config)?;
        wait_life(&sluice, "it to be drained", |life| {
            life["cause"] == "hand" && life["phase"] != "serving"
        })?;
        ensure!(unready(&sluice).is_some());
        let back = sluice.command(&["undrain"])?;
        ensure!(back.status.success(), "{back:?}");
        wait_life(&sluice, "it to serve", |life| life["phase"] == "serving")?;
        // A client takes its time to notice that its session has crashed.
        wait_until(QUIET, "a page", || {
            http::get(&site.laptop, SocketAddr::new(SERVER[0], HTTP), "/").is_ok()
        })?;

        let drained = sluice.command(&["drain", "--no-wait"])?;
        ensure!(drained.status.success(), "{drained:?}");
        sluice.stop()?;
        let sluice = site.router.sluice(&run.config)?;
        wait_life(&sluice, "it to serve", |life| life["phase"] == "serving")?;
        Ok(())
    });
}

//! A map of 10,000 nodes and 2,000 rules, and a delta for one node, while a flow goes through the router. Prints figures;
//! for a release build named by `SLUICE_BIN`, on a quiet machine: `--ignored scale --nocapture`.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lab::site::SERVER;
use lab::sluice::Sluice;
use lab::{Host, poll, wait_until};
use serde_json::{Value, json};

use super::daemon::Rig;

const LONG: Duration = Duration::from_secs(120);
const NODES: u32 = 10_000;
const RULES: u32 = 2_000;
const ECHO: u16 = 7;
/// How long nothing happens, to see what that costs.
const IDLE: Duration = Duration::from_secs(60);

/// Rules of the kind that policies are made of: some sources, some networks, a port.
fn rules() -> Value {
    let rule = |n: u32| {
        json!({
            "SrcIPs": [format!("100.64.{}.0/24", n % 40), format!("100.64.{}.{}", n % 40, n % 250)],
            "DstPorts": [{
                "IP": format!("10.20.{}.{}/31", n / 125, n % 125 * 2),
                "Ports": {"First": 1000 + n, "Last": 1000 + n},
            }],
        })
    };
    let mut rules: Vec<Value> = (0..RULES - 1).map(rule).collect();
    rules.push(json!({
        "SrcIPs": ["100.64.0.2"], "DstPorts": [{"IP": "10.20.0.0/16", "Ports": {"First": 0, "Last": 65535}}],
    }));
    json!(rules)
}

/// Sends a datagram to the echo each two milliseconds until told to stop; sent, and not come back.
fn flow(host: &Host, stop: &AtomicBool) -> Result<(u64, u64)> {
    let socket = host.udp_socket("0.0.0.0:0".parse()?)?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    socket.connect(SocketAddr::new(SERVER[0], ECHO))?;
    let (mut sent, mut lost, mut buffer) = (0, 0, [0; 16]);
    while !stop.load(Ordering::Relaxed) {
        socket.send(&u64::to_be_bytes(sent))?;
        sent += 1;
        if socket.recv(&mut buffer).is_err() {
            lost += 1;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok((sent, lost))
}

fn memory(sluice: &Sluice, field: &str) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", sluice.id()))?;
    let line = status.lines().find(|line| line.starts_with(field));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(number.context("no such field")?.parse::<u64>()? / 1024)
}

/// CPU time of the daemon so far.
fn cpu(sluice: &Sluice) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", sluice.id()))?;
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    Ok(Duration::from_millis(ticks * 10))
}

fn peers(sluice: &Sluice) -> usize {
    let status = sluice.status().unwrap_or_default();
    status["peers"].as_array().map_or(0, Vec::len)
}

/// The time of day of a line of the log.
fn time(line: &str) -> Option<Duration> {
    let clock = line.split_once('T')?.1.split_once('Z')?.0;
    let mut parts = clock.split(':');
    let mut whole = || parts.next()?.parse::<u64>().ok();
    let minutes = whole()? * 60 + whole()?;
    let seconds: f64 = parts.next()?.parse().ok()?;
    Some(Duration::from_secs(minutes * 60) + Duration::from_secs_f64(seconds))
}

/// From the frame that tells a change until that is in force, by the log's times: nobody asks anything meanwhile.
fn delay(sluice: &Sluice, change: impl FnOnce()) -> Result<Duration> {
    let before = sluice.log().len();
    change();
    poll(LONG, "the change to be in force", || {
        let log = sluice.log();
        let new: Vec<&str> = log.get(before..)?.lines().collect();
        let done = new.iter().position(|line| line.contains("is in force"))?;
        let mut read = new[..done].iter();
        let read = read.rfind(|line| line.contains("a map frame was read"))?;
        time(new[done])?.checked_sub(time(read)?)
    })
}

#[test]
#[ignore = "prints figures, which a busy machine spoils"]
fn ten_thousand_nodes_and_two_thousand_rules() {
    lab::test(|lab| {
        let rig = Rig::new(lab, "ebpf")?;
        let _echo = rig.site.server.udp_echo(ECHO)?;
        let sluice = rig.start()?;
        let _tunnel = rig.connect()?;
        rig.wait_reaches("the laptop to reach the server")?;
        println!("at rest: {} MiB resident", memory(&sluice, "VmRSS")?);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| -> Result<()> {
            let flow = scope.spawn(|| flow(&rig.site.laptop, &stop));
            let changes = || -> Result<()> {
                let before = cpu(&sluice)?;
                let begin = Instant::now();
                rig.control.set_filter(rules());
                rig.control.invent(NODES);
                wait_until(LONG, "all peers", || peers(&sluice) > NODES as usize)?;
                println!(
                    "as deltas: {} nodes and {RULES} rules: {:?} after they were made, {:?} of CPU time",
                    NODES,
                    begin.elapsed(),
                    cpu(&sluice)?.saturating_sub(before)
                );
                ensure!(rig.reaches(0));
                // The whole map, as a stream begins with it.
                for _ in 0..3 {
                    let before = cpu(&sluice)?;
                    rig.control.cut_streams();
                    wait_until(LONG, "the next stream", || {
                        rig.control.nodes().iter().any(|node| node.online)
                    })?;
                    std::thread::sleep(Duration::from_secs(5));
                    println!(
                        "a map that says nothing new: {:?} of CPU time",
                        cpu(&sluice)?.saturating_sub(before)
                    );
                }
                println!(
                    "at work: {} MiB resident, at most {}",
                    memory(&sluice, "VmRSS")?,
                    memory(&sluice, "VmHWM")?
                );
                let (mut renamed, mut removed) = (Vec::new(), Vec::new());
                for n in 0..10 {
                    renamed.push(delay(&sluice, || {
                        rig.control.rename(7, &format!("renamed-{n}"))
                    })?);
                    removed.push(delay(&sluice, || rig.control.remove(100 + n))?);
                }
                println!("from frame to force: renamed {renamed:?}, removed {removed:?}");
                let asked = Instant::now();
                let left = peers(&sluice);
                println!("a status: {:?}", asked.elapsed());
                ensure!(left <= NODES as usize - 9, "{left} peers are left");
                println!(
                    "with all of them: {} MiB resident, at most {}",
                    memory(&sluice, "VmRSS")?,
                    memory(&sluice, "VmHWM")?
                );
                Ok(())
            };
            let outcome = changes();
            stop.store(true, Ordering::Relaxed);
            let (sent, lost) = flow.join().map_err(|_| anyhow::anyhow!("the flow"))??;
            println!("the flow: {lost} of {sent} datagrams lost");
            let before = cpu(&sluice)?;
            std::thread::sleep(IDLE);
            println!(
                "with all peers quiet: {:?} of CPU time in {IDLE:?}",
                cpu(&sluice)?.saturating_sub(before)
            );
            for line in sluice.log().lines() {
                if line.contains("map frame") || line.contains("in force") || line.contains("ready")
                {
                    println!("{line}");
                }
            }
            outcome
        })?;
        sluice.stop()
    });
}

//! The promises, each checked on real packets. Each yields what was seen, or why it is not kept.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use lab::site::{CORE, Site};
use lab::sluice::Sluice;
use lab::{Host, Wireguard, packet, wait_until};

use crate::services::{self, FILE, PAGE};

const SOON: Duration = Duration::from_secs(5);
const SECONDS: &str = "2";

/// That something which should not be is not.
pub(crate) fn not(condition: bool, complaint: &str) -> anyhow::Result<String> {
    ensure!(!condition, "{complaint}");
    Ok(String::new())
}

pub(crate) fn datapath(sluice: &Sluice, took: Duration) -> anyhow::Result<String> {
    let status = sluice.status()?;
    let datapath = &status["datapath"];
    let text = |key: &str| datapath[key].as_str().unwrap_or("-");
    ensure!(
        datapath["active"] == "ebpf",
        "the datapath is {}: {}",
        text("active"),
        text("reason")
    );
    Ok(format!(
        "eBPF by {}, after {} ms",
        text("attach"),
        took.as_millis()
    ))
}

pub(crate) fn ping(laptop: &Host, server: IpAddr) -> anyhow::Result<String> {
    ensure!(laptop.pings(&server.to_string(), &[])?, "no answer");
    Ok(String::new())
}

fn url(server: IpAddr, path: &str) -> String {
    format!("http://{}/{path}", SocketAddr::new(server, 80))
}

pub(crate) fn page(laptop: &Host, server: IpAddr) -> anyhow::Result<String> {
    let page = laptop.run(["curl", "-sS", "--fail", &url(server, "")])?;
    ensure!(page == PAGE, "another page: {page:?}");
    Ok(String::new())
}

pub(crate) fn download(laptop: &Host, server: IpAddr, digest: &str) -> anyhow::Result<String> {
    let script = format!("curl -sS --fail '{}' | sha256sum", url(server, FILE));
    let sum = laptop.run(["sh", "-c", &script])?;
    ensure!(sum.starts_with(digest), "SHA-256 {sum} instead of {digest}");
    Ok(format!("SHA-256 {}…", &digest[..16]))
}

pub(crate) fn metrics(sluice: &Sluice) -> anyhow::Result<String> {
    const METRIC: &str = "sluice_packets_total";
    let text = sluice.metrics()?;
    let forwarded = text
        .lines()
        .filter(|line| line.starts_with(METRIC) && line.contains("verdict=\"forwarded\""))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok());
    let (series, packets) = forwarded.fold((0, 0), |(n, sum), value| (n + 1, sum + value));
    ensure!(series > 0, "no {METRIC} of forwarded packets");
    ensure!(packets > 0, "{METRIC} says that nothing was forwarded");
    Ok(format!("{METRIC} {packets} forwarded"))
}

/// A hundred thousand rows make a result of several MB: it stalls where the MTU is wrong.
pub(crate) fn database(laptop: &Host, server: IpAddr) -> anyhow::Result<String> {
    let version = services::query(laptop, server, "show server_version")?;
    let rows = services::query(
        laptop,
        server,
        "select n, md5(n::text) from generate_series(1, 100000) n",
    )?;
    let (count, last) = (rows.lines().count(), rows.lines().last());
    ensure!(count == 100_000, "{count} rows instead of 100000");
    // The MD5 of "100000".
    ensure!(
        last == Some("100000|14ee22eaba297944c96afdbe5b16c65b"),
        "the last row is {last:?}"
    );
    let version = version.split_whitespace().next().unwrap_or_default();
    Ok(format!("version {version}, {} kB", rows.len() / 1000))
}

/// Looks at a connection's SYN where it arrives in the VPC, and at its SYN-ACK on the phone.
pub(crate) fn segment_size(
    site: &Site,
    device: &str,
    server: IpAddr,
    mtu: u16,
) -> anyhow::Result<String> {
    let headers = if server.is_ipv4() { 40 } else { 60 };
    // The first packet to a next hop takes the slow path: let it not be the one looked at.
    ping(&site.phone, server)?;
    let at_server = site.server.capture("eth0")?;
    let at_phone = site.phone.capture(device)?;
    page(&site.phone, server)?;
    let of_server = |p: &packet::Packet<'_>, mss: Option<u16>| {
        (p.source == server || p.destination == server)
            .then_some(mss)
            .flatten()
    };
    let left = at_phone.find(SOON, "a SYN", |p| of_server(p, p.syn_mss()))?;
    let seen = at_server.find(SOON, "a SYN", |p| of_server(p, p.syn_mss()))?;
    let sent = at_server.find(SOON, "a SYN-ACK", |p| of_server(p, p.syn_ack_mss()))?;
    let came = at_phone.find(SOON, "a SYN-ACK", |p| of_server(p, p.syn_ack_mss()))?;
    let story = format!("phone {left} → server sees {seen}; server {sent} → phone sees {came}");
    ensure!(
        seen == mtu - headers && came == mtu - headers,
        "{story}, instead of {}",
        mtu - headers
    );
    Ok(story)
}

/// Sends with an address that is another peer's.
pub(crate) fn spoof(
    site: &Site,
    tunnel: &Wireguard,
    sluice: &Sluice,
    spoofed: IpAddr,
    server: IpAddr,
) -> anyhow::Result<String> {
    let device = tunnel.device();
    let length = if spoofed.is_ipv4() { 32 } else { 128 };
    let at_server = site.server.capture("eth0")?;
    let before = sluice.engine_counter("drop_source")?;
    site.laptop
        .ip(&format!("address add {spoofed}/{length} dev {device}"))?;
    let answered = site
        .laptop
        .pings(&server.to_string(), &["-I", &spoofed.to_string()]);
    site.laptop
        .ip(&format!("address delete {spoofed}/{length} dev {device}"))?;
    ensure!(!answered?, "they are answered");
    wait_until(SOON, "three drops to be counted", || {
        sluice
            .engine_counter("drop_source")
            .is_ok_and(|now| now >= before + 3)
    })?;
    let arrived = at_server.drain(|p| (p.source == spoofed).then_some(()));
    ensure!(arrived.is_empty(), "{} arrived", arrived.len());
    Ok(String::new())
}

/// Pings across a route whose sources are translated, and looks at them on the other side.
pub(crate) fn source_nat(site: &Site) -> anyhow::Result<String> {
    let core = site.core.as_ref().context("no host behind the router")?;
    let target = CORE[0];
    let router = site.router_inside()[0];
    let at_core = core.capture("router")?;
    ping(&site.laptop, target)?;
    let source = at_core.find(SOON, "an echo request", |p| {
        (p.destination == target && p.icmp() == Some((8, 0))).then_some(p.source)
    })?;
    ensure!(source == router, "it sees {source}");
    Ok(source.to_string())
}

/// One TCP stream, and the CPU time that the given programs took while it ran: who of them is the
/// slower end.
pub(crate) fn throughput(
    laptop: &Host,
    server: IpAddr,
    option: Option<&str>,
    programs: &[(&str, u32)],
) -> anyhow::Result<String> {
    let target = server.to_string();
    let argv = ["iperf3", "--json", "--time", SECONDS, "--client", &target];
    let before = programs.iter().map(|&(_, id)| cpu_seconds(id));
    let before = before.collect::<anyhow::Result<Vec<_>>>()?;
    let output = laptop.command(argv).args(option).run()?;
    let mut used = Vec::new();
    for (&(name, id), before) in programs.iter().zip(before) {
        used.push(format!("{name} {:.2} s", cpu_seconds(id)? - before));
    }
    let report: serde_json::Value = serde_json::from_str(&output)?;
    let sum = &report["end"]["sum_received"];
    let Some(rate) = sum["bits_per_second"].as_f64() else {
        bail!("iperf3 says {}", report["error"]);
    };
    ensure!(rate > 0.0, "nothing arrived");
    let used = used.join(", ");
    Ok(format!("{:.2} Gbit/s; CPU time: {used}", rate / 1e9))
}

/// CPU time of a process so far, in user and kernel mode (proc_pid_stat(5)).
fn cpu_seconds(process: u32) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The program's name may hold spaces and parentheses; the numbers follow the last one.
    let (_, numbers) = stat.rsplit_once(')').context("no process name in stat")?;
    let mut times = numbers.split_whitespace().skip(11);
    let mut next = || -> anyhow::Result<f64> { Ok(times.next().context("short stat")?.parse()?) };
    // SAFETY: sysconf takes a plain number and has no preconditions.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Ok((next()? + next()?) / ticks as f64)
}

//! TCP through the tunnel, by iperf3.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, bail};
use lab::Host;
use serde_json::Value;

use super::bed::{Bed, SERVER, protocol_counter};
use crate::case::{Effort, Measurement, Round};

/// Which way the streams go, as the client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Up,
    Down,
    Both,
}

/// A TCP load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Streams {
    pub(crate) count: u8,
    pub(crate) way: Way,
}

/// What iperf3 reports.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Report {
    /// Payload bytes received, both ways together.
    pub(crate) bytes: f64,
    pub(crate) bits_per_second: f64,
    retransmits: f64,
}

/// iperf3 takes whole seconds.
fn seconds(round: Round) -> u32 {
    match (round.effort, round.warm_up) {
        (Effort::Full, false) => 5,
        _ => 1,
    }
}

/// Runs the streams and measures throughput and cost; without `cost` the throughput alone.
pub(super) fn run(
    bed: &Bed,
    streams: Streams,
    round: Round,
    with_cost: bool,
) -> anyhow::Result<Vec<Measurement>> {
    let receivers = match streams.way {
        Way::Up => vec![&bed.server],
        Way::Down => vec![&bed.client],
        Way::Both => vec![&bed.server, &bed.client],
    };
    let out_of_order = || -> anyhow::Result<u64> {
        receivers
            .iter()
            .map(|host| protocol_counter(host, "TcpExt", "TCPOFOQueue"))
            .sum()
    };
    let before = out_of_order()?;
    let (report, cost) =
        bed.cost_of(|| iperf_from(&bed.client, SERVER, streams, seconds(round)))?;
    let overtaken = out_of_order()?.saturating_sub(before) as f64;
    let gigabytes = report.bytes / 1e9;
    let mut measured = vec![Measurement::higher(
        "throughput",
        "Gbit/s",
        report.bits_per_second / 1e9,
    )];
    if with_cost {
        let per_gigabyte = cost.cpu.as_secs_f64() / gigabytes;
        measured.push(Measurement::lower("router-cpu", "CPU-s/GB", per_gigabyte));
        measured.push(Measurement::higher(
            "throughput-per-core",
            "Gbit/s",
            8.0 / per_gigabyte,
        ));
        let busy = cost.cpu.as_secs_f64() / cost.elapsed.as_secs_f64();
        measured.push(Measurement::fact("router-core-busy", "%", 100.0 * busy));
    }
    measured.push(Measurement::lower(
        "retransmits",
        "1/GB",
        report.retransmits / gigabytes,
    ));
    measured.push(Measurement::lower(
        "out-of-order",
        "segments/GB",
        overtaken / gigabytes,
    ));
    if let Some(resident) = bed.router().resident() {
        measured.push(Measurement::lower(
            "resident",
            "MiB",
            resident as f64 / f64::from(1 << 20),
        ));
    }
    Ok(measured)
}

/// Starts streams both ways as a load for something else, and waits until they flow. They end when
/// the process is dropped.
pub(super) fn background(bed: &Bed) -> anyhow::Result<lab::Process> {
    const FLOWING: u64 = 10_000_000;
    let received = || protocol_counter(&bed.server, "IpExt", "InOctets");
    let streams = Streams {
        count: 2,
        way: Way::Both,
    };
    let before = received()?;
    let command = bed.client.command(arguments(SERVER, streams, 600));
    let mut process = bed.client.spawn("iperf3", command)?;
    process.ready(Duration::from_secs(10), "the streams to flow", || {
        received().is_ok_and(|now| now > before + FLOWING)
    })?;
    Ok(process)
}

fn arguments(server: Ipv4Addr, streams: Streams, seconds: u32) -> Vec<String> {
    let mut argv = vec![
        "iperf3".to_owned(),
        "--json".to_owned(),
        format!("--client={server}"),
        format!("--time={seconds}"),
        format!("--parallel={}", streams.count),
    ];
    match streams.way {
        Way::Up => {}
        Way::Down => argv.push("--reverse".to_owned()),
        Way::Both => argv.push("--bidir".to_owned()),
    }
    argv
}

/// Runs iperf3 on `client`, toward a server of it at `server`.
pub(crate) fn iperf_from(
    client: &Host,
    server: Ipv4Addr,
    streams: Streams,
    seconds: u32,
) -> anyhow::Result<Report> {
    let argv = arguments(server, streams, seconds);
    let timeout = Duration::from_secs(u64::from(seconds) + 20);
    // A server whose last client was killed says for a moment that it is busy.
    lab::poll(Duration::from_secs(5), "a free iperf3 server", || {
        let attempt = || -> anyhow::Result<Option<Report>> {
            let output = client.command(&argv).timeout(timeout).output()?;
            let report: Value = serde_json::from_str(&output.stdout).context("iperf3's report")?;
            match report["error"].as_str() {
                Some(error) if error.contains("busy") => Ok(None),
                Some(error) => bail!("iperf3: {error}"),
                None => parse(&report)
                    .context("iperf3's report lacks its sums")
                    .map(Some),
            }
        };
        attempt().transpose()
    })?
}

fn parse(report: &Value) -> Option<Report> {
    let end = &report["end"];
    let mut sum = Report {
        bytes: 0.0,
        bits_per_second: 0.0,
        retransmits: 0.0,
    };
    // Each direction has a sender and a receiver; without --bidir there is one.
    let both = end["sum_received_bidir_reverse"].is_object();
    for suffix in ["", "_bidir_reverse"].iter().take(1 + usize::from(both)) {
        let received = &end[format!("sum_received{suffix}")];
        sum.bytes += received["bytes"].as_f64()?;
        sum.bits_per_second += received["bits_per_second"].as_f64()?;
        sum.retransmits += end[format!("sum_sent{suffix}")]["retransmits"].as_f64()?;
    }
    (sum.bytes > 0.0).then_some(sum)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn both_directions_are_summed() {
        let one = json!({"end": {
            "sum_sent": {"bytes": 10, "bits_per_second": 80.0, "retransmits": 3},
            "sum_received": {"bytes": 9, "bits_per_second": 72.0},
        }});
        let expected = Report {
            bytes: 9.0,
            bits_per_second: 72.0,
            retransmits: 3.0,
        };
        assert_eq!(parse(&one), Some(expected));
        let mut both = one.clone();
        both["end"]["sum_sent_bidir_reverse"] = json!({"retransmits": 4});
        both["end"]["sum_received_bidir_reverse"] = json!({"bytes": 1, "bits_per_second": 8.0});
        let expected = Report {
            bytes: 10.0,
            bits_per_second: 80.0,
            retransmits: 7.0,
        };
        assert_eq!(parse(&both), Some(expected));
        assert_eq!(parse(&json!({"error": "unable to connect"})), None);
    }
}

//! UDP through the tunnel, by our own generator.

use std::time::Duration;

use super::bed::{Bed, Cost};
use crate::case::{Effort, Failure, Measurement, Round};
use crate::generator::{Direction, Load, Rate, Summary};

/// Packets per second that every router here carries, so that the cost of the same work is
/// compared.
pub(super) const PACED: u32 = 60_000;
/// The same where the generator sends from so many peers that each has one packet at a time.
pub(super) const SINGLE: u32 = 20_000;

/// The metric that only a router with a CPU to itself has.
const ROUTER_CPU: &str = "router-cpu";

/// A UDP load.
#[derive(Clone, Copy, Debug)]
pub(super) struct Datagrams {
    pub(super) load: Load,
    pub(super) peers: u16,
}

/// How long the load runs before measuring, and how long it is measured.
fn times(round: Round) -> (Duration, Duration) {
    let millis = match (round.effort, round.warm_up) {
        (Effort::Full, false) => (500, 3000),
        (Effort::Quick, false) => (100, 800),
        _ => (100, 300),
    };
    (
        Duration::from_millis(millis.0),
        Duration::from_millis(millis.1),
    )
}

pub(super) fn run(
    bed: &Bed,
    datagrams: Datagrams,
    round: Round,
    with_cost: bool,
) -> Result<Vec<Measurement>, Failure> {
    let Datagrams { load, peers } = datagrams;
    let (mut settle, measure) = times(round);
    if let Rate::Paced(rate) = load.rate {
        // Until every flow has begun.
        settle = settle.max(Duration::from_secs(load.flows.into()) / rate);
    }
    let mut generator = bed.generator(peers)?;
    let traffic = generator.start(load)?;
    std::thread::sleep(settle);
    let ((before, after), cost) = bed.cost_of(|| {
        let before = traffic.counts();
        std::thread::sleep(measure);
        Ok((before, traffic.counts()))
    })?;
    let summary = traffic.finish()?;
    let sent = after.sent - before.sent;
    let received = after.received - before.received;
    judge(&summary, load.rate, round.effort)?;
    if received == 0 {
        return Err(Failure::Wrong(format!("none of {sent} packets arrived")));
    }
    let mut measured = measurements(bed, &summary, (sent, received), cost, load.rate);
    if !with_cost {
        measured.retain(|measured| measured.metric != ROUTER_CPU);
    }
    Ok(measured)
}

/// What must not happen to any router, however loaded.
fn judge(summary: &Summary, rate: Rate, effort: Effort) -> Result<(), Failure> {
    let tally = summary.tally;
    if tally.corrupted > 0 || tally.duplicated > 0 {
        return Err(Failure::Wrong(format!(
            "{} of {} packets arrived corrupted, {} twice",
            tally.corrupted, summary.sent, tally.duplicated
        )));
    }
    // A smoke run must pass on a machine that is busy with other things.
    if let Rate::Paced(rate) = rate
        && effort != Effort::Smoke
    {
        let reached = summary.sent as f64 / summary.elapsed.as_secs_f64();
        if reached < 0.9 * f64::from(rate) {
            return Err(Failure::Unmeasured(format!(
                "the generator sent {reached:.0} packets per second instead of {rate}; is the \
                 machine busy?"
            )));
        }
    }
    Ok(())
}

fn measurements(
    bed: &Bed,
    summary: &Summary,
    (sent, received): (u64, u64),
    cost: Cost,
    rate: Rate,
) -> Vec<Measurement> {
    let seconds = cost.elapsed.as_secs_f64();
    let per_second = |packets: u64| packets as f64 / seconds;
    let share = |part: u64, of: u64| 100.0 * part as f64 / (of as f64).max(1.0);
    let cpu = 1e6 * cost.cpu.as_secs_f64() / received as f64;
    let mut measured = match rate {
        Rate::Paced(_) => vec![
            Measurement::lower(ROUTER_CPU, "µs/packet", cpu),
            Measurement::fact("delivered", "packets/s", per_second(received)),
            Measurement::lower("lost", "%", share(summary.lost(), summary.sent)),
        ],
        Rate::Flood => vec![
            Measurement::higher("delivered", "packets/s", per_second(received)),
            Measurement::lower(ROUTER_CPU, "µs/packet", cpu),
            Measurement::fact("offered", "packets/s", per_second(sent)),
        ],
    };
    measured.push(Measurement::lower(
        "reordered",
        "%",
        share(summary.tally.reordered, summary.tally.received),
    ));
    let sender = summary.sender_cpu.as_secs_f64() / summary.elapsed.as_secs_f64();
    measured.push(Measurement::fact("generator-cpu", "%", 100.0 * sender));
    measured.push(Measurement::fact(
        "receiver-overflow",
        "packets",
        summary.overflow as f64,
    ));
    if let Some(resident) = bed.router().resident() {
        measured.push(Measurement::lower(
            "resident",
            "MiB",
            resident as f64 / f64::from(1 << 20),
        ));
    }
    measured
}

/// The name of a case, e.g. `udp-64-256-flows-paced-up`.
pub(super) fn name(datagrams: Datagrams) -> String {
    let Load {
        direction,
        payload,
        flows,
        rate,
    } = datagrams.load;
    let plural = |n: u32, what: &str| format!("{n}-{what}{}", if n == 1 { "" } else { "s" });
    let rate = match rate {
        Rate::Paced(_) => "paced",
        Rate::Flood => "flood",
    };
    let direction = match direction {
        Direction::Up => "up",
        Direction::Down => "down",
    };
    let flows = plural(flows, "flow");
    let peers = plural(datagrams.peers.into(), "peer");
    format!("udp-{payload}-{flows}-{peers}-{rate}-{direction}")
}

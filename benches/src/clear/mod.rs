//! Forwarding between the TUN device and the NIC, with crypto left out.
//!
//! The generator stands where the engine does: it writes to the TUN queue, or sends frames that
//! reach the router from the NIC's side, on one CPU and as fast as that goes. All that a frame sets
//! off until it has left the router happens in the sender's own time, so the CPU time of the sender
//! is the cost of both; what the same frames cost when the first device drops them is subtracted.

mod bed;
mod forwarder;
mod frame;
mod io;

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};

pub use io::open_tun;

use crate::case::{
    Case, CaseId, Chart, ChartKind, Context, Effort, Failure, Measurement, Outcome, Round, Skipped,
    Suite, SuiteEntry,
};
use crate::cpu::Cores;
use bed::{Bed, Direction};
use forwarder::Kind;
use frame::Size;

const SUITE: &str = "clear";
/// What the others are divided by.
const REFERENCE: &str = "kernel+nft";
const OVERLAY: IpNet = IpNet::V4(Ipv4Net::new_assert(
    std::net::Ipv4Addr::new(100, 64, 0, 0),
    24,
));
const SUBNET: IpNet = IpNet::V4(Ipv4Net::new_assert(
    std::net::Ipv4Addr::new(10, 20, 0, 0),
    24,
));

/// CPU time per frame of the generator alone, by what it sends, as last measured.
type Alone = Rc<RefCell<HashMap<(Size, Direction), Duration>>>;

/// The suite, as the command line knows it.
pub(crate) const ENTRY: SuiteEntry = SuiteEntry {
    name: SUITE,
    about: "forwarding between the TUN device and the NIC, without crypto",
    build: suite,
};

fn suite(context: &Context) -> anyhow::Result<Suite> {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let kernel = kernel.trim();
    let alone = Alone::default();
    let beds: Vec<Rc<RefCell<Option<Bed>>>> = Kind::ALL.iter().map(|_| Rc::default()).collect();
    let mut suite = Suite {
        reference: Some(REFERENCE.to_owned()),
        charts: charts(),
        ..Suite::default()
    };
    for direction in [Direction::Up, Direction::Down] {
        for size in Size::ALL {
            for (kind, bed) in Kind::ALL.into_iter().zip(&beds) {
                let name = format!("{}-{}", size.name(), direction.name());
                let id = CaseId::new(SUITE, name, kind.implementation(kernel));
                match kind.missing() {
                    Some(why) => suite.skipped.push(Skipped { id, why }),
                    None => suite.cases.push(Box::new(Forward {
                        id,
                        kind,
                        size,
                        direction,
                        bed: Rc::clone(bed),
                        alone: Rc::clone(&alone),
                        cores: context.cores.clone(),
                    })),
                }
            }
        }
    }
    Ok(suite)
}

fn charts() -> Vec<Chart> {
    let pair = |case: &str, label: &str| (case.to_owned(), label.to_owned());
    vec![
        Chart {
            name: "clear-small".to_owned(),
            title: "Forwarding small packets, per second of CPU (more is better)".to_owned(),
            metric: "forwarding",
            kind: ChartKind::Bars(vec![
                pair("small-up", "64 B UDP, 1,024 flows, TUN to NIC"),
                pair("small-down", "64 B UDP, 1,024 flows, NIC to TUN"),
                pair("mtu-up", "1,420 B UDP, 256 flows, TUN to NIC"),
                pair("mtu-down", "1,420 B UDP, 256 flows, NIC to TUN"),
            ]),
        },
        Chart {
            name: "clear-super".to_owned(),
            title: "Forwarding 64 KiB super-packets, per second of CPU (more is better)".to_owned(),
            metric: "forwarding",
            kind: ChartKind::Bars(vec![
                pair("super-up", "TCP, TUN to NIC"),
                pair("super-down", "TCP, NIC to TUN"),
            ]),
        },
    ]
}

/// Frames of one size, one way, through one router.
struct Forward {
    id: CaseId,
    kind: Kind,
    size: Size,
    direction: Direction,
    bed: Rc<RefCell<Option<Bed>>>,
    alone: Alone,
    cores: Cores,
}

impl Case for Forward {
    fn id(&self) -> &CaseId {
        &self.id
    }

    fn run(&mut self, round: Round) -> Result<Outcome, Failure> {
        let duration = match (round.effort, round.warm_up) {
            (Effort::Smoke, _) => Duration::from_millis(20),
            (Effort::Quick, true) => Duration::from_millis(50),
            (Effort::Quick, false) => Duration::from_millis(300),
            (Effort::Full, true) => Duration::from_millis(300),
            (Effort::Full, false) => Duration::from_secs(2),
        };
        let mut bed = self.bed.borrow_mut();
        let bed = match bed.as_mut() {
            Some(bed) => bed,
            None => bed.insert(Bed::new(self.kind, &self.cores)?),
        };
        let flood = bed.flood(self.size, self.direction, duration)?;
        let packets = flood.sent * self.size.packets();
        let rate = packets as f64 / flood.elapsed.as_secs_f64();
        let per_frame = flood.cpu.div_f64(flood.sent as f64);
        let key = (self.size, self.direction);
        if self.kind == Kind::Drop {
            self.alone.borrow_mut().insert(key, per_frame);
            return Ok(vec![Measurement::fact("ceiling", "packets/s", rate)].into());
        }
        let alone = self.alone.borrow().get(&key).copied();
        let alone = alone.ok_or_else(|| {
            Failure::Unmeasured("the generator alone was not measured".to_owned())
        })?;
        let cost = per_frame.checked_sub(alone).filter(|cost| !cost.is_zero());
        let cost = cost.ok_or_else(|| {
            Failure::Unmeasured(format!(
                "forwarding ({per_frame:?} a frame) cost no more than the generator alone ({alone:?})"
            ))
        })?;
        let mut measurements = vec![
            Measurement::higher("rate", "packets/s", rate),
            Measurement::higher(
                "forwarding",
                "packets/CPU-s",
                self.size.packets() as f64 / cost.as_secs_f64(),
            ),
        ];
        let program = bed.program_time(self.size, self.direction, duration / 4)?;
        if let Some(program) = program {
            measurements.push(Measurement::lower("program", "ns/frame", program));
        }
        if self.direction == Direction::Down {
            let overflow = flood.overflow as f64;
            measurements.push(Measurement::fact("queue-full", "frames", overflow));
        }
        Ok(measurements.into())
    }
}

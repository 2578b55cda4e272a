//! One peer among many comes, changes and goes, while others carry packets: how long until it is in
//! force, and how many packets of the others that costs.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use router::wireguard::keys::PrivateKey;

use super::Lazy;
use super::bed::Bed;
use super::udp::SINGLE;
use crate::case::{Case, CaseId, Effort, Failure, Measurement, Outcome, Round};
use crate::generator::{Direction, Load, Rate};

/// The first address of the peers that come and go.
const FIRST: Ipv4Addr = Ipv4Addr::new(100, 126, 0, 1);

/// A case of the scale suite.
pub(super) struct Churn {
    pub(super) id: CaseId,
    /// Those who carry packets.
    pub(super) peers: u16,
    pub(super) bed: Lazy,
}

impl Case for Churn {
    fn id(&self) -> &CaseId {
        &self.id
    }

    fn run(&mut self, round: Round) -> Result<Outcome, Failure> {
        let measured = self.bed.with(|bed| self.measure(bed, round))?;
        Ok(measured.into())
    }
}

/// How long each took that came, changed and went.
#[derive(Default)]
struct Times {
    add: Vec<Duration>,
    change: Vec<Duration>,
    remove: Vec<Duration>,
}

impl Churn {
    fn measure(&self, bed: &Bed, round: Round) -> Result<Vec<Measurement>, Failure> {
        let _pinned = bed.at_the_ends()?;
        let times = match (round.effort, round.warm_up) {
            (Effort::Full, false) => 100,
            (Effort::Quick, false) => 30,
            _ => 3,
        };
        let mut generator = bed.generator(self.peers)?;
        let flows = u32::from(self.peers);
        let traffic = generator.start(Load {
            direction: Direction::Up,
            payload: 64,
            flows,
            rate: Rate::Paced(SINGLE),
        })?;
        // Until every flow has begun.
        std::thread::sleep(Duration::from_millis(300) + Duration::from_secs(flows.into()) / SINGLE);
        let mut took = Times::default();
        for n in 0..times {
            come_and_go(bed, n, &mut took)?;
        }
        let summary = traffic.finish()?;
        if summary.tally.received == 0 {
            return Err(Failure::Wrong("no packet arrived".to_owned()));
        }
        let mut measured = Vec::new();
        for (metric, worst, mut took) in [
            ("add", "add-worst", took.add),
            ("change", "change-worst", took.change),
            ("remove", "remove-worst", took.remove),
        ] {
            took.sort_unstable();
            let ms = |took: Option<&Duration>| took.map_or(0.0, Duration::as_secs_f64) * 1e3;
            measured.push(Measurement::lower(
                metric,
                "ms",
                ms(took.get(took.len() / 2)),
            ));
            measured.push(Measurement::fact(worst, "ms", ms(took.last())));
        }
        measured.push(Measurement::lower("lost", "packets", summary.lost() as f64));
        measured.push(Measurement::fact("sent", "packets", summary.sent as f64));
        if let Some(resident) = bed.router().resident() {
            let resident = resident as f64 / f64::from(1 << 20);
            measured.push(Measurement::lower("resident", "MiB", resident));
        }
        Ok(measured)
    }
}

fn come_and_go(bed: &Bed, n: u32, took: &mut Times) -> anyhow::Result<()> {
    let key = PrivateKey::generate().context("generate a key")?.public();
    let key: String = key.0.iter().map(|byte| format!("{byte:02x}")).collect();
    let address = |n: u32| Ipv4Addr::from_bits(FIRST.to_bits() + n);
    let (first, second) = (address(2 * n), address(2 * n + 1));
    let timed = |lines: String| {
        let begin = Instant::now();
        bed.router().set(&lines)?;
        anyhow::Ok(begin.elapsed())
    };
    took.add
        .push(timed(format!("public_key={key}\nallowed_ip={first}/32"))?);
    took.change
        .push(timed(format!("public_key={key}\nallowed_ip={second}/32"))?);
    took.remove
        .push(timed(format!("public_key={key}\nremove=true"))?);
    Ok(())
}

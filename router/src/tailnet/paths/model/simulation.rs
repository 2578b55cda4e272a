//! Schedules over a simulated internet: NATs, loss, reordering, relays that die, and somebody who forges.
//!
//! Each schedule is a function of its seed. `SLUICE_SCHEDULES` sets how many are tried (`cargo xtask ci`: 10,000),
//! `SLUICE_SEED` the first.

mod internet;
mod nat;
mod parts;
mod server;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use internet::{Internet, Kind};

use crate::tailnet::paths::peer::TRUST;

/// How long everything may go wrong.
const TROUBLE: Duration = Duration::from_secs(90);
/// How long it may take then until the best way is taken: two of the longest pauses between two looks, and a round.
const BOUND: Duration = Duration::from_secs(150);
/// How long the end of traffic lasts: a session, and places on peer relays that were asked for in it.
const REST: Duration = Duration::from_secs(45 + 10 + 40);
/// For so long there is no traffic in the end.
const QUIET: Duration = Duration::from_secs(250);

fn number(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Runs a schedule, and yields the best way that its two nodes can have, which they have taken.
fn run(seed: u64) -> Kind {
    let mut internet = Internet::new(seed);
    internet.run(TROUBLE);
    internet.end_trouble();
    internet.run(BOUND);
    let best = internet.best();
    internet.assert_way(best);
    let before = internet.carried_by_peer_relay();
    internet.assert_traffic_arrives();
    let carried = internet.carried_by_peer_relay() - before;
    assert_eq!(carried > 0, best == Kind::PeerRelay, "{carried}");
    internet.end_traffic();
    internet.run(REST);
    internet.assert_quiet(QUIET);
    best
}

#[test]
fn every_schedule_ends_on_the_best_way_there_is() {
    let first = number("SLUICE_SEED", 1);
    let end = first + number("SLUICE_SCHEDULES", 500);
    let next = AtomicU64::new(first);
    let work = || {
        let (mut kinds, mut failed) = ([0; 3], Vec::new());
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end {
                return (kinds, failed);
            }
            match std::panic::catch_unwind(|| run(seed)) {
                Ok(best) => kinds[best as usize] += 1,
                Err(_) => failed.push(seed),
            }
        }
    };
    let (mut kinds, mut failed) = ([0; 3], Vec::new());
    std::thread::scope(|scope| {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..cpus).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            let (some, more) = worker.join().unwrap();
            failed.extend(more);
            for (all, some) in kinds.iter_mut().zip(some) {
                *all += some;
            }
        }
    });
    assert!(
        failed.is_empty(),
        "the schedules of the seeds {failed:?} fail, as said above"
    );
    println!("{kinds:?} direct, by peer relays, by relays");
}

/// A direct way that dies without a word costs what its trust lasts, and no more: from then on packets go by the relay
/// too.
#[test]
fn a_way_that_dies_silently_costs_no_more_than_its_trust() {
    let mut tried = 0;
    for seed in 1..=60 {
        let mut internet = Internet::new(seed);
        internet.end_trouble();
        internet.run(BOUND);
        if internet.best() != Kind::Direct {
            continue;
        }
        internet.assert_way(Kind::Direct);
        internet.block_silently();
        internet.run(Duration::from_secs(60));
        internet.assert_way(Kind::Relay);
        let gap = internet.gap();
        // A packet each second, and the way through the relay.
        assert!(gap < TRUST + Duration::from_secs(2), "seed {seed}: {gap:?}");
        tried += 1;
    }
    assert!(tried > 10, "{tried}");
}

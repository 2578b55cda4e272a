//! Which relay is the home: where peers find this node when nothing else is known of it.
//!
//! The nearest of the last five minutes, left only for one that is clearly nearer (`net/netcheck`): each move makes
//! every peer look for this node anew.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use crate::tailnet::wire::{DerpMap, each, entries};

/// How long a measurement counts.
pub(super) const WINDOW: Duration = Duration::from_secs(305);
/// A region that is nearer by less is not moved to.
const WORTH_IT: Duration = Duration::from_millis(10);

/// What a round has measured.
#[derive(Debug)]
pub(super) struct Measured {
    pub(super) at: Instant,
    pub(super) latency: BTreeMap<u32, Duration>,
}

/// The choice.
#[derive(Debug, Default)]
pub(super) struct Home {
    history: VecDeque<Measured>,
    /// Regions that can be a home, and how their latency is weighed.
    eligible: BTreeMap<u32, f64>,
    current: Option<u32>,
    nearest: Option<u32>,
}

impl Home {
    /// Takes the relays.
    pub(super) fn set_map(&mut self, map: &DerpMap) {
        let scores = map.home_params.as_ref();
        let score = |number: &str| {
            let all = scores.and_then(|params| params.region_score.as_ref())?;
            all.get(number)
                .copied()
                .flatten()
                .filter(|score| *score > 0.0)
        };
        let mut all = BTreeMap::new();
        let mut avoided = BTreeSet::new();
        for (text, region) in entries(&map.regions) {
            let mut nodes = each(&region.nodes);
            let relays = nodes.any(|node| node.stun_only != Some(true));
            let Some(number) = text.parse().ok().filter(|_| relays) else {
                continue;
            };
            if region.no_measure_no_home != Some(true) {
                all.insert(number, score(text).unwrap_or(1.0));
                if region.avoid == Some(true) {
                    avoided.insert(number);
                }
            }
        }
        if avoided.len() < all.len() {
            all.retain(|region, _| !avoided.contains(region));
        }
        self.eligible = all;
    }

    /// The home.
    pub(super) fn current(&self) -> Option<u32> {
        self.current
    }

    /// The region that was nearest last.
    pub(super) fn nearest(&self) -> Option<u32> {
        self.nearest
    }

    /// Regions that can be a home.
    pub(super) fn eligible(&self) -> impl Iterator<Item = u32> {
        self.eligible.keys().copied()
    }

    /// The network is another one.
    pub(super) fn forget(&mut self) {
        self.history.clear();
    }

    /// Has a home chosen, whatever is known, if there is none or it can be none any more.
    pub(super) fn need(&mut self, spread: u64) {
        let lost = |region: &u32| !self.eligible.contains_key(region);
        if self.current.as_ref().is_none_or(lost) {
            let count = self.eligible.len() as u64;
            let at = spread.checked_rem(count).unwrap_or(0) as usize;
            let any = self.eligible.keys().nth(at).copied();
            self.current = self.best().map(|(region, _)| region).or(any);
        }
    }

    /// The nearest within the window of those that have answered last, weighed.
    fn best(&self) -> Option<(u32, Duration)> {
        let last = self.history.back()?;
        let weighed = |region: &u32| {
            let weight = self.eligible.get(region)?;
            let all = self.history.iter();
            let least = all.filter_map(|one| one.latency.get(region)).min()?;
            Some((*region, weigh(*least, *weight)))
        };
        last.latency
            .keys()
            .filter_map(weighed)
            .min_by_key(|(region, latency)| (*latency, *region))
    }

    /// Takes what a round has measured. With `may_move` another home may come of it.
    pub(super) fn measured(&mut self, measured: Measured, may_move: bool) {
        let now = measured.at;
        self.history.push_back(measured);
        self.history
            .retain(|one| now.saturating_duration_since(one.at) < WINDOW);
        let Some((best, latency)) = self.best() else {
            self.nearest = None;
            return;
        };
        self.nearest = Some(best);
        let Some(current) = self.current.filter(|at| self.eligible.contains_key(at)) else {
            self.current = Some(best);
            return;
        };
        if !may_move || current == best {
            return;
        }
        let last = self
            .history
            .back()
            .and_then(|last| last.latency.get(&current));
        let weight = self.eligible.get(&current).copied().unwrap_or(1.0);
        let stays = last.is_some_and(|last| {
            let last = weigh(*last, weight);
            last.saturating_sub(latency) < WORTH_IT || latency * 3 > last * 2
        });
        if !stays {
            self.current = Some(best);
        }
    }
}

fn weigh(latency: Duration, weight: f64) -> Duration {
    // A weight that makes no duration weighs nothing.
    Duration::try_from_secs_f64(latency.as_secs_f64() * weight).unwrap_or(latency)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home(regions: &str) -> Home {
        let mut home = Home::default();
        let text = format!(
            r#"{{"Regions":{{{regions}}},"HomeParams":{{"RegionScore":{{"4":0.5,"5":-1}}}}}}"#
        );
        home.set_map(&serde_json::from_str(&text).unwrap());
        home
    }

    const REGIONS: &str = r#""1":{"Nodes":[{}]},"2":{"Nodes":[{}]},"3":{"Nodes":[{}],"Avoid":true},"4":{"Nodes":[{}]},
        "5":{"Nodes":[{}]},"6":{"Nodes":[{"STUNOnly":true}]},"7":{"Nodes":[{}],"NoMeasureNoHome":true}"#;

    fn measure(home: &mut Home, at: Instant, all: &[(u32, u64)], may_move: bool) -> Option<u32> {
        let latency = all
            .iter()
            .map(|(region, ms)| (*region, Duration::from_millis(*ms)));
        home.measured(
            Measured {
                at,
                latency: latency.collect(),
            },
            may_move,
        );
        home.current()
    }

    #[test]
    fn the_nearest_is_the_home_until_another_is_clearly_nearer() {
        let mut home = home(REGIONS);
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(
            measure(&mut home, at(0), &[(1, 30), (2, 40)], true),
            Some(1)
        );
        assert_eq!(
            measure(&mut home, at(20), &[(1, 31), (2, 22)], true),
            Some(1)
        );
        assert_eq!(home.nearest(), Some(2));
        assert_eq!(
            measure(&mut home, at(40), &[(1, 90), (2, 20)], false),
            Some(1)
        );
        assert_eq!(
            measure(&mut home, at(60), &[(1, 90), (2, 20)], true),
            Some(2)
        );
        // One late answer is no reason: the best of five minutes counts.
        assert_eq!(
            measure(&mut home, at(80), &[(1, 30), (2, 300)], true),
            Some(2)
        );
        // One that does not answer is.
        assert_eq!(measure(&mut home, at(100), &[(1, 30)], true), Some(1));
        assert_eq!(measure(&mut home, at(120), &[], true), Some(1));
    }

    #[test]
    fn regions_are_weighed_and_some_are_none() {
        let mut home = home(REGIONS);
        let now = Instant::now();
        let all = [(1, 30), (3, 1), (4, 40), (5, 35), (6, 1), (7, 1), (99, 1)];
        assert_eq!(measure(&mut home, now, &all, true), Some(4));
    }

    #[test]
    fn without_measurements_any_will_do_and_one_that_is_gone_will_not() {
        let mut home = home(REGIONS);
        home.need(7);
        assert_eq!(home.current(), Some(5));
        home.need(8);
        assert_eq!(home.current(), Some(5));
        home.set_map(
            &serde_json::from_str(r#"{"Regions":{"3":{"Nodes":[{}],"Avoid":true}}}"#).unwrap(),
        );
        home.need(0);
        assert_eq!(home.current(), Some(3), "better than none");
        home.set_map(&DerpMap::default());
        home.need(0);
        assert_eq!(home.current(), None);
    }
}

//! What somebody else changes of what is ours: it is put back at once, but nobody fights without end.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::{FIRST_PAUSE, LONGEST_PAUSE, Part};

/// So many times in a row a part is put back at once; then with a growing pause.
pub const PATIENCE: u32 = 5;
/// After this long without a change by others a row has ended.
const ROW_ENDS: Duration = Duration::from_secs(300);

/// What somebody else has changed of a part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Foreign {
    /// What of it, the last time, in words.
    pub what: String,
    /// How often in a row.
    pub times: u32,
    last: Instant,
    /// The part is not put back before.
    held_until: Instant,
}

/// What others have changed, part by part.
#[derive(Debug, Default)]
pub(super) struct Ledger(BTreeMap<Part, Foreign>);

impl Ledger {
    /// Notes that a part had to be put back.
    pub(super) fn note(&mut self, part: Part, what: String, now: Instant) -> Foreign {
        let row = self.0.get(&part).filter(|known| known.goes_on(now));
        let times = row.map_or(0, |known| known.times) + 1;
        let pause = match times.saturating_sub(PATIENCE) {
            0 => Duration::ZERO,
            beyond => FIRST_PAUSE
                .saturating_mul(1 << beyond.min(10))
                .min(LONGEST_PAUSE),
        };
        let foreign = Foreign {
            what,
            times,
            last: now,
            held_until: now + pause,
        };
        self.0.insert(part, foreign.clone());
        foreign
    }

    /// Until when a part is left as others have made it.
    pub(super) fn held_until(&self, part: Part) -> Option<Instant> {
        Some(self.0.get(&part)?.held_until)
    }

    /// The parts that others change again and again.
    pub(super) fn contested(&self, now: Instant) -> impl Iterator<Item = (Part, &Foreign)> {
        self.0
            .iter()
            .filter(move |(_, foreign)| foreign.times > PATIENCE && foreign.goes_on(now))
            .map(|(part, foreign)| (*part, foreign))
    }
}

impl Foreign {
    fn goes_on(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.last) < ROW_ENDS
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Action, Core, Plan};
    use super::*;

    const WHAT: &str = "the MTU was 1500 instead of 1420";

    /// A core that has put everything in force.
    fn core(now: Instant) -> Core {
        let mut core = Core::default();
        let plan = Plan {
            mtu: 1420,
            ..Plan::default()
        };
        core.want(plan, None);
        while let Some(action) = core.poll_action(now) {
            // The first time it is we who change.
            assert_eq!(
                core.handle_done(action, Ok(vec![WHAT.to_owned()]), now),
                None
            );
        }
        core
    }

    fn device(core: &mut Core, now: Instant, changed: &[&str]) -> Option<Foreign> {
        let action = core.poll_action(now).filter(|a| a.part() == Part::Device);
        let changed = changed.iter().map(|text| (*text).to_owned()).collect();
        core.handle_done(action?, Ok(changed), now)
    }

    #[test]
    fn only_what_differs_where_nothing_new_is_wanted_is_anothers() {
        let now = Instant::now();
        let mut core = core(now);
        core.invalidate(Part::Device);
        assert_eq!(device(&mut core, now, &[]), None);
        core.invalidate(Part::Device);
        let foreign = device(&mut core, now, &[WHAT]).expect("somebody else's");
        assert_eq!((foreign.what.as_str(), foreign.times), (WHAT, 1));
        core.invalidate(Part::Device);
        let plan = Plan {
            mtu: 1300,
            ..Plan::default()
        };
        core.want(plan, None);
        let action = core.poll_action(now).expect("a new MTU");
        assert_eq!(action, Action::Device { mtu: 1300 });
        assert_eq!(
            core.handle_done(action, Ok(vec![WHAT.to_owned()]), now),
            None
        );
    }

    #[test]
    fn what_waits_for_a_failure_is_not_due_before() {
        let now = Instant::now();
        for fails in [Part::Peers, Part::Datapath] {
            let mut core = core(now);
            core.invalidate(Part::Peers);
            let action = core.poll_action(now).expect("the peers");
            core.handle_done(action, Ok(vec![WHAT.to_owned()]), now);
            core.invalidate(Part::Peers);
            core.invalidate(fails);
            let action = core.poll_action(now).expect("what fails");
            assert_eq!(action.part(), fails);
            core.handle_done(action, Err("no".to_owned()), now);
            assert_eq!(core.poll_action(now), None);
            assert_eq!(core.poll_timeout(), Some(now + FIRST_PAUSE));
        }
    }

    #[test]
    fn nobody_fights_without_end() {
        let mut now = Instant::now();
        let mut core = core(now);
        for times in 1..=PATIENCE {
            core.invalidate(Part::Device);
            let foreign = device(&mut core, now, &[WHAT]).expect("at once");
            assert_eq!(foreign.times, times);
        }
        assert_eq!(core.contested(now).count(), 0);
        core.invalidate(Part::Device);
        device(&mut core, now, &[WHAT]).expect("at once");
        assert_eq!(core.contested(now).count(), 1);
        // From now on with a pause, which another part does not wait for.
        core.invalidate(Part::Device);
        core.invalidate(Part::Peers);
        assert_eq!(core.poll_action(now).map(|a| a.part()), Some(Part::Peers));
        let due = core.poll_timeout().expect("a pause");
        assert_eq!(due, now + 2 * FIRST_PAUSE);
        now = due;
        device(&mut core, now, &[WHAT]).expect("after the pause");
        core.invalidate(Part::Device);
        let last = core.poll_timeout().expect("a longer one");
        assert_eq!(last, now + 4 * FIRST_PAUSE);
        // Once they have left it alone, it is put back at once again.
        now += ROW_ENDS;
        assert_eq!(core.contested(now).count(), 0);
        let foreign = device(&mut core, now, &[WHAT]).expect("a new row");
        assert_eq!(foreign.times, 1);
    }
}

//! Medians, spreads, and what counts as more than noise.

use serde::{Deserialize, Serialize};

use crate::case::Better;

/// Median, smallest and largest of some runs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The middle value; of an even number of runs the mean of the middle two.
    pub median: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

impl Summary {
    /// Of at least one value, all of them finite.
    pub fn of(values: &[f64]) -> Option<Self> {
        if values.iter().any(|v| !v.is_finite()) {
            return None;
        }
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len().is_multiple_of(2) {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        } else {
            sorted[middle]
        };
        Some(Self { median, min, max })
    }

    /// Each value divided by the reference's of the same round, so that a drift of the machine
    /// that both saw falls out. None if there is not one value each, or a reference is zero.
    pub fn ratio(values: &[f64], reference: &[f64]) -> Option<Self> {
        if values.len() != reference.len() {
            return None;
        }
        let ratios: Vec<f64> = values.iter().zip(reference).map(|(v, r)| v / r).collect();
        Self::of(&ratios)
    }

    fn disjoint(&self, other: &Self) -> bool {
        self.max < other.min || other.max < self.min
    }
}

/// How much a median must move before we speak of it, as a share: with fewer than five runs on
/// either side, disjoint intervals are too likely to be chance.
fn threshold(runs: usize) -> f64 {
    if runs < 5 { 0.10 } else { 0.05 }
}

/// What became of a metric between two reports.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Change {
    /// Within the noise.
    Same,
    /// Beyond the noise, in the good direction; by which share of the old median.
    Better(f64),
    /// Beyond the noise, in the bad direction; by which share of the old median.
    Worse(f64),
    /// One of the sides has a single run, which says nothing about noise.
    Unknown,
}

/// Compares a metric's runs. It moved if the intervals from smallest to largest do not touch, and
/// the medians differ by more than 5 %, or 10 % if either side has fewer than five runs.
pub fn change(old: &[f64], new: &[f64], better: Better) -> Change {
    let (Some(a), Some(b)) = (Summary::of(old), Summary::of(new)) else {
        return Change::Unknown;
    };
    let runs = old.len().min(new.len());
    if better == Better::Neither {
        return Change::Same;
    }
    if runs < 2 {
        return Change::Unknown;
    }
    let share = if a.median == 0.0 {
        b.median.signum() * f64::INFINITY
    } else {
        (b.median - a.median) / a.median.abs()
    };
    if !a.disjoint(&b) || share.abs() <= threshold(runs) {
        Change::Same
    } else if (share > 0.0) == (better == Better::Higher) {
        Change::Better(share)
    } else {
        Change::Worse(share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn summaries() {
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(Summary::of(&[1.0, f64::NAN]), None);
        let s = Summary::of(&[5.0, 1.0, 3.0]).unwrap();
        assert_eq!((s.min, s.median, s.max), (1.0, 3.0, 5.0));
        assert_eq!(Summary::of(&[4.0, 2.0]).unwrap().median, 3.0);
    }

    #[test]
    fn ratios_are_paired_by_round() {
        // Both halve their speed in the second round: the ratio does not notice.
        let ratio = Summary::ratio(&[30.0, 15.0], &[10.0, 5.0]).unwrap();
        assert_eq!((ratio.min, ratio.median, ratio.max), (3.0, 3.0, 3.0));
        assert_eq!(Summary::ratio(&[1.0], &[0.0]), None);
        assert_eq!(Summary::ratio(&[1.0], &[1.0, 2.0]), None);
    }

    #[test]
    fn changes() {
        let old = [100.0, 101.0, 102.0, 103.0, 104.0];
        let case = |new: &[f64], better| change(&old, new, better);
        assert_eq!(
            case(&[104.0, 120.0, 130.0, 131.0, 132.0], Better::Lower),
            Change::Same
        );
        assert_eq!(
            case(&[105.0, 105.5, 106.0, 106.5, 107.0], Better::Lower),
            Change::Same
        );
        let slower = [120.0, 121.0, 122.0, 123.0, 124.0];
        assert!(
            matches!(case(&slower, Better::Lower), Change::Worse(s) if (s - 0.196).abs() < 1e-3)
        );
        assert!(matches!(case(&slower, Better::Higher), Change::Better(s) if s > 0.0));
        assert_eq!(case(&slower, Better::Neither), Change::Same);
        assert_eq!(case(&[120.0], Better::Lower), Change::Unknown);
        // 8 % is enough with five runs, not with three.
        let eight = [109.5, 110.0, 110.5];
        assert_eq!(case(&eight, Better::Lower), Change::Same);
        assert!(matches!(
            case(&[109.5, 110.0, 110.0, 110.0, 110.5], Better::Lower),
            Change::Worse(_)
        ));
        // From nothing to something, such as retransmits.
        assert!(matches!(
            change(&[0.0, 0.0], &[5.0, 9.0], Better::Lower),
            Change::Worse(s) if s.is_infinite()
        ));
        assert_eq!(
            change(&[0.0, 0.0], &[0.0, 0.0], Better::Lower),
            Change::Same
        );
    }

    proptest! {
        #[test]
        fn a_change_has_a_mirror(
            old in prop::collection::vec(1.0f64..1e6, 2..8),
            new in prop::collection::vec(1.0f64..1e6, 2..8),
        ) {
            let lower = change(&old, &new, Better::Lower);
            let higher = change(&old, &new, Better::Higher);
            match lower {
                Change::Same => prop_assert_eq!(higher, Change::Same),
                Change::Worse(s) => { prop_assert!(s > 0.0); prop_assert_eq!(higher, Change::Better(s)); }
                Change::Better(s) => { prop_assert!(s < 0.0); prop_assert_eq!(higher, Change::Worse(s)); }
                Change::Unknown => prop_assert!(false),
            }
            // What lies within the old interval never counts as moved.
            prop_assert_eq!(change(&old, &old, Better::Lower), Change::Same);
        }
    }
}

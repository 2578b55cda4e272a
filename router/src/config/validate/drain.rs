//! `[drain]`.

use std::time::Duration;

use super::super::problem::Problems;
use super::super::raw::Drain;
use super::super::section::{At, within};
use crate::cloud::life::Patience;

/// Longest time in seconds: a day.
const LONGEST: i64 = 86_400;

/// How long flows may take to end, with defaults in the place of what was wrong or is not there.
pub(super) fn patience(raw: &Drain, problems: &mut Problems<'_>) -> Patience {
    let default = Patience::default();
    let mut time = |number: Option<At<i64>>, key, default| {
        let what = "time in seconds that flows may take to end";
        let found: Option<u32> =
            number.and_then(|number| within(number, key, 0..=LONGEST, what, problems));
        found.map_or(default, |seconds| Duration::from_secs(seconds.into()))
    };
    Patience {
        drain: time(raw.timeout, "drain.timeout", default.drain),
        stop: time(raw.stop_timeout, "drain.stop_timeout", default.stop),
    }
}

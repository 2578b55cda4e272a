//! Points in time as the coordination server writes them (RFC 3339).

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

const SECOND: i64 = 1_000_000;
const DAY: i64 = 86_400;

/// Microseconds since 1970, UTC. Written as RFC 3339, to the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// What the system's clock says.
    pub fn now() -> Self {
        Self::from(SystemTime::now())
    }

    /// Reads RFC 3339. Year 1, which is Go's zero, and everything that is no such text is `None`.
    pub fn parse(text: &str) -> Option<Self> {
        let (date, rest) = text.split_at_checked(10)?;
        let (clock, rest) = rest.strip_prefix(['T', 't', ' '])?.split_at_checked(8)?;
        let [year, month, day] = numbers(date, '-')?;
        let [hour, minute, second] = numbers(clock, ':')?;
        let fits = (1..=12).contains(&month)
            && (1..=31).contains(&day)
            && hour < 24
            && minute < 60
            && second <= 60;
        if !fits || year <= 1 {
            return None;
        }
        let (fraction, zone) = match rest.strip_prefix('.') {
            Some(rest) => rest.split_at(rest.find(|c: char| !c.is_ascii_digit())?),
            None => ("", rest),
        };
        let micros = fraction.bytes().chain(std::iter::repeat(b'0')).take(6);
        let micros = micros.fold(0, |sum, digit| sum * 10 + i64::from(digit - b'0'));
        let zone = match zone.as_bytes() {
            b"Z" | b"z" => 0,
            [sign @ (b'+' | b'-'), ..] => {
                let [hours, minutes] = numbers(&zone[1..], ':')?;
                (hours * 60 + minutes) * 60 * if *sign == b'-' { -1 } else { 1 }
            }
            _ => return None,
        };
        let seconds = days(year, month, day) * DAY + hour * 3600 + minute * 60 + second - zone;
        Some(Self(seconds * SECOND + micros))
    }

    /// This long after.
    pub fn after(self, duration: Duration) -> Self {
        let micros = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
        Self(self.0.saturating_add(micros))
    }

    /// How far this is behind `earlier`; nothing when it is not.
    pub fn since(self, earlier: Self) -> Duration {
        let micros = self.0.saturating_sub(earlier.0);
        Duration::from_micros(u64::try_from(micros).unwrap_or(0))
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.div_euclid(SECOND);
        let (day, clock) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
        let (year, month, day) = date(day);
        let (hour, minute, second) = (clock / 3600, clock / 60 % 60, clock % 60);
        write!(
            f,
            "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z"
        )
    }
}

/// `N` numbers of digits alone, with `separator` between.
fn numbers<const N: usize>(text: &str, separator: char) -> Option<[i64; N]> {
    let mut out = [0; N];
    let mut parts = text.split(separator);
    for number in &mut out {
        let part = parts.next()?;
        if part.is_empty() || part.len() > 4 || !part.bytes().all(|c| c.is_ascii_digit()) {
            return None;
        }
        *number = part.parse().ok()?;
    }
    parts.next().is_none().then_some(out)
}

/// Days from 1970 to a date of the Gregorian calendar. The year is taken to begin in March, so that the
/// leap day is its last.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// The inverse of [`days`].
fn date(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = (shifted + 2) % 12 + 1;
    (era * 400 + year + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_times() {
        for (text, micros) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2000-02-29T12:30:15.5Z", 951_827_415_500_000),
            ("2026-11-21T06:52:13.88767373Z", 1_795_243_933_887_673),
            ("2026-11-21T08:52:13+02:00", 1_795_243_933_000_000),
            ("1969-12-31T23:59:59Z", -1_000_000),
        ] {
            assert_eq!(Timestamp::parse(text), Some(Timestamp(micros)), "{text}");
        }
        assert_eq!(Timestamp(123 * SECOND).to_string(), "1970-01-01T00:02:03Z");
    }

    #[test]
    fn what_is_no_time() {
        for text in [
            "",
            "0001-01-01T00:00:00Z",
            "2026-11-21",
            "2026-13-21T06:52:13Z",
            "2026-11-21T06:52:13",
            "2026-11-21T06:52:13.",
            "2026-11-21T06:52:13.5",
            "2026-11-21T06:52:+3Z",
            "2026-11-21T06:52:13ü",
            "ü026-11-21T06:52:13Z",
        ] {
            assert_eq!(Timestamp::parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(seconds in -60_000_000_000_i64..200_000_000_000) {
            let time = Timestamp(seconds * SECOND);
            prop_assert_eq!(Timestamp::parse(&time.to_string()), Some(time));
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".*") {
            let _ = Timestamp::parse(&text);
        }
    }
}

//! The bits of the firewall mark in `[datapath]`.

use super::super::problem::Problems;
use super::super::raw::Datapath;
use super::super::section::At;
use crate::datapath::marks::Marks;

/// The bits, with defaults in the place of what was wrong or is not there.
pub(super) fn marks(raw: &Datapath<'_>, problems: &mut Problems<'_>) -> Marks {
    let default = Marks::default();
    let mut bit = |number: Option<At<i64>>, key| {
        let number = number?;
        let found = u32::try_from(number.value)
            .ok()
            .filter(|mark| mark.is_power_of_two());
        if found.is_none() {
            let message = format!(
                "{:#x} is not one bit of a firewall mark; write one that nothing else here uses, \
                 such as {:#x}",
                number.value, default.underlay
            );
            problems.add(number.at, key, message);
        }
        found
    };
    let keys = ["underlay_mark", "handed_over_mark", "permitted_mark"];
    let underlay = bit(raw.underlay_mark, "datapath.underlay_mark");
    let handed_over = bit(raw.handed_over_mark, "datapath.handed_over_mark");
    let permitted = bit(raw.permitted_mark, "datapath.permitted_mark");
    let marks = Marks {
        underlay: underlay.unwrap_or(default.underlay),
        handed_over: handed_over.unwrap_or(default.handed_over),
        permitted: permitted.unwrap_or(default.permitted),
    };
    let Marks {
        underlay,
        handed_over,
        permitted,
    } = marks;
    let written = [raw.underlay_mark, raw.handed_over_mark, raw.permitted_mark];
    for (one, other, bits) in [
        (0, 1, [underlay, handed_over]),
        (0, 2, [underlay, permitted]),
        (1, 2, [handed_over, permitted]),
    ] {
        if bits[0] == bits[1]
            && let Some(number) = written[other].or(written[one])
        {
            let message = format!(
                "{} and {} are both {:#x}; give each a bit of its own",
                keys[one], keys[other], bits[0]
            );
            problems.add(number.at, "datapath.handed_over_mark", message);
        }
    }
    marks
}

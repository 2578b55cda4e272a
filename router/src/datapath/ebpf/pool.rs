//! The sets of clauses in the programs' map, each once.

use std::collections::{HashMap, HashSet};

use router_ebpf::policy::{MAX_SETS, Set};

use super::banks::wait_for_programs;
use super::failed;
use super::tables::Store;
use crate::datapath::Error;

/// So many sets that nobody uses may lie about.
const LEFT_OVER: usize = 1024;

/// The sets, by what they hold. A set's number means the same as long as it is there, and is never used
/// again: whoever finds an old number finds the old set or none.
pub(super) struct Pool {
    map: Box<dyn Store<u32, Set>>,
    numbers: HashMap<Set, u32>,
    /// The number of the last new one.
    last: u32,
    /// How many there may be before it is looked which are in use.
    enough: usize,
}

impl Pool {
    pub(super) fn new(map: impl Store<u32, Set> + 'static) -> Self {
        Self {
            map: Box::new(map),
            numbers: HashMap::new(),
            last: 0,
            enough: LEFT_OVER,
        }
    }

    /// The number of a set; never zero.
    pub(super) fn number(&mut self, set: &Set) -> Result<u32, Error> {
        if let Some(number) = self.numbers.get(set) {
            return Ok(*number);
        }
        let context = "write the eBPF map of policy sets";
        if self.numbers.len() == MAX_SETS {
            return Err(failed(
                context,
                format!("the rules and peers need more than its {MAX_SETS} places"),
            ));
        }
        let number = self.last + 1;
        self.map
            .put(&number, set)
            .map_err(|error| failed(context, error))?;
        self.numbers.insert(*set, number);
        self.last = number;
        Ok(number)
    }

    /// Removes what nobody uses if there is much of it. Programs that have just read a number find its set
    /// until they are done.
    pub(super) fn tidy(&mut self, in_use: impl FnOnce() -> HashSet<u32>) {
        if self.numbers.len() <= self.enough {
            return;
        }
        let in_use = in_use();
        let _ = wait_for_programs();
        let map = &mut self.map;
        self.numbers.retain(|_, number| {
            in_use.contains(number)
                || map.delete(number).is_err_and(|error| {
                    tracing::debug!(%error, number, "a set of the policy was not removed");
                    true
                })
        });
        self.enough = (2 * self.numbers.len()).clamp(LEFT_OVER, MAX_SETS / 2);
    }
}

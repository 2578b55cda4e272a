//! The policy in the programs' maps, and its change.

use std::sync::Arc;

use aya::maps::{HashMap, LpmTrie, MapData, PerCpuArray, PerCpuValues};
use aya::util::nr_cpus;
use router_ebpf::abi::{Address, Prefix};
use router_ebpf::policy::{
    BANKS, MAX_PREFIXES, MAX_SETS, POLICY, POLICY_HITS, POLICY_SETS, Set, hit,
};

use super::policy::Compiled;
use super::tables::Mirror;
use super::{failed, take_map};
use crate::control::Policy;
use crate::datapath::Error;

/// The policy's maps.
pub(super) struct Banks {
    prefixes: Mirror<Prefix, u32, LpmTrie<MapData, Address, u32>>,
    sets: Mirror<u32, Set, HashMap<MapData, u32, Set>>,
    hits: PerCpuArray<MapData, u64>,
    /// What is in force.
    current: Filled,
    /// What is written to the other bank.
    staged: Option<Filled>,
}

/// A policy in its bank; without rules in none.
#[derive(Default)]
struct Filled {
    policy: Policy,
    compiled: Arc<Compiled>,
    /// By rule: new flows that it let through before these tables were in force.
    before: Vec<u64>,
}

impl Banks {
    /// Takes the maps out of the loaded object.
    pub(super) fn take(programs: &mut aya::Ebpf) -> Result<Self, Error> {
        Ok(Self {
            prefixes: Mirror::new(take_map(programs, POLICY)?, "policy prefixes", MAX_PREFIXES),
            sets: Mirror::new(take_map(programs, POLICY_SETS)?, "policy sets", MAX_SETS),
            hits: take_map(programs, POLICY_HITS)?,
            current: Filled::default(),
            staged: None,
        })
    }

    /// Writes `policy` beside the one in force, and tells the bank that the settings must name for
    /// it to take its place. On failure the one in force stays as it was.
    pub(super) fn stage(&mut self, policy: &Policy) -> Result<u32, Error> {
        if self.staged.take().is_some() {
            self.tidy();
        }
        if *policy == self.current.policy {
            return Ok(self.current.compiled.bank());
        }
        let [one, two] = BANKS;
        let other = if self.current.compiled.bank() == one {
            two
        } else {
            one
        };
        let mut staged = Filled {
            policy: policy.clone(),
            compiled: Arc::default(),
            before: self.carried(policy)?,
        };
        if !policy.rules.is_empty() {
            let compiled = Compiled::new(policy, other);
            staged.compiled =
                Arc::new(compiled.map_err(|error| failed("compile the policy", error))?);
        }
        let bank = staged.compiled.bank();
        let outcome = self
            .clear_hits(&staged.compiled)
            .and_then(|()| self.write(Some(&staged.compiled)));
        self.staged = outcome.is_ok().then_some(staged);
        if let Err(error) = outcome {
            self.tidy();
            return Err(error);
        }
        Ok(bank)
    }

    /// The settings name the bank of the last [`Banks::stage`]: clears the other one. Tells the
    /// policy if it is another now, and has rules.
    pub(super) fn commit(&mut self) -> Option<Arc<Compiled>> {
        self.current = self.staged.take()?;
        // Else a new flow may be judged by tables that are just being cleared, and its first packet be
        // lost: they hold fewer clauses then, never others.
        let _ = wait_for_programs();
        self.tidy();
        let compiled = &self.current.compiled;
        (compiled.bank() != 0).then(|| Arc::clone(compiled))
    }

    /// New flows let through by each rule of the policy in force, in its order. A rule that a new
    /// policy took over unchanged goes on counting.
    pub(super) fn hits(&self) -> Result<Vec<u64>, Error> {
        let mut hits = self.current.before.clone();
        let compiled = &self.current.compiled;
        for (rule, clause) in compiled.rules().iter().zip(0..) {
            let slot = self
                .hits
                .get(&hit(compiled.bank(), clause), 0)
                .map_err(|error| failed("read the eBPF policy's hits", error))?;
            if let Some(sum) = hits.get_mut(*rule) {
                *sum += slot.iter().sum::<u64>();
            }
        }
        Ok(hits)
    }

    /// What rules of `policy` have counted already.
    fn carried(&self, policy: &Policy) -> Result<Vec<u64>, Error> {
        let hits = self.hits()?;
        let mut old: Vec<_> = self.current.policy.rules.iter().zip(hits).collect();
        let carried = policy.rules.iter().map(|rule| {
            let same = old.iter().position(|(known, _)| *known == rule);
            same.map_or(0, |place| old.remove(place).1)
        });
        Ok(carried.collect())
    }

    fn clear_hits(&mut self, compiled: &Compiled) -> Result<(), Error> {
        let failure = |error: &dyn std::error::Error| {
            failed("clear the eBPF policy's hits", error.to_string())
        };
        let cpus = nr_cpus().map_err(|(_, error)| failure(&error))?;
        for (_, clause) in compiled.rules().iter().zip(0..) {
            let zeros = PerCpuValues::try_from(vec![0; cpus]).map_err(|error| failure(&error))?;
            self.hits
                .set(hit(compiled.bank(), clause), zeros, 0)
                .map_err(|error| failure(&error))?;
        }
        Ok(())
    }

    /// Makes the maps hold what is in force, and `beside` it. Sets come before the prefixes that
    /// name them, and go after them.
    fn write(&mut self, beside: Option<&Compiled>) -> Result<(), Error> {
        let both = || std::iter::once(&*self.current.compiled).chain(beside);
        let prefixes = both().flat_map(Compiled::prefixes).collect();
        let sets = both().flat_map(Compiled::sets).collect();
        if beside.is_some() {
            self.sets.install(sets)?;
            self.prefixes.install(prefixes)
        } else {
            self.prefixes.install(prefixes)?;
            self.sets.install(sets)
        }
    }

    /// Leaves nothing but what is in force.
    fn tidy(&mut self) {
        if let Err(error) = self.write(None) {
            tracing::warn!(%error, "the tables of a former policy were not removed whole");
        }
    }
}

/// Waits until no program still runs that has read the maps of before: the kernel's membarrier
/// is one grace period of RCU, under which programs run. `false` without it (kernels built so, or with
/// `nohz_full`).
pub(super) fn wait_for_programs() -> bool {
    // SAFETY: the call takes plain numbers.
    let code = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if code < 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "no membarrier");
    }
    code >= 0
}

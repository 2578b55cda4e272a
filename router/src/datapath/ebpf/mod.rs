//! The eBPF datapath: loads, attaches and feeds the programs of `router-ebpf`.
//!
//! Attachments and maps are held by file descriptors. What is to outlive the daemon is pinned (see
//! [`Pins`]), or (clsact) found again by name, so that nothing of ours outlives it unnoticed.

mod accounts;
mod attach;
mod banks;
mod clsact;
mod denied;
mod flows;
pub mod guard;
mod listing;
mod log;
mod object;
mod pins;
pub mod policy;
mod pool;
mod routes;
mod settled;
mod sweep;
mod sweeper;
mod sys;
mod tables;

use std::collections::{BTreeMap, HashSet};
use std::error::Error as StdError;
use std::io;
use std::sync::Arc;

use aya::EbpfLoader;
use aya::maps::{MapType, PerCpuArray};
use aya::programs::{ProgramError, ProgramType, SchedClassifier};
use aya::sys::SyscallError;
use aya::util::KernelVersion;
use router_ebpf::abi::{self, Address, Side};
use router_ebpf::verdict::Verdict;

pub use accounts::{AtLimit, Opener};
pub use attach::AttachMode;
pub use denied::{DeniedPacket, DeniedPackets};
pub use listing::{FlowFilter, FlowTables, FlowView};
pub use object::{guard_object, object};
pub use pins::Pins;
pub use sweeper::{Ended, FamilyReport, FlowReport};

use super::limits::Limits;
use super::marks::Marks;
use super::{Counter, Datapath, Error, External, Link, OverlayChange, Spec};
use attach::{Attachment, Owner};
use banks::News;
use flows::Table;
use settled::Flows;
use sweeper::{Sweeper, Update};
use tables::Tables;

/// The oldest kernel that the programs are written for.
const OLDEST_KERNEL: KernelVersion = KernelVersion::new(5, 10, 0);

/// What is decided when the programs are loaded.
#[derive(Debug)]
pub struct Options {
    /// The only way to attach; `None`: tcx where the kernel has it (6.6), else clsact.
    pub attach: Option<AttachMode>,
    /// The limits of the flow table.
    pub limits: Limits,
    /// Whether flows end when they are due. Without, whoever fills the table empties it.
    pub sweep: bool,
    /// Our bits of the mark.
    pub marks: Marks,
    /// Where flows are kept for the next daemon, or why they are not.
    pub pins: Result<Pins, String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            attach: None,
            limits: Limits::default(),
            sweep: true,
            marks: Marks::default(),
            pins: Err("nobody asked for it".to_owned()),
        }
    }
}

/// The programs and maps of one TUN device.
pub struct Ebpf {
    programs: aya::Ebpf,
    tables: Tables,
    flows: Arc<FlowTables>,
    sweeper: Option<Sweeper>,
    /// What a sweeper would have, where nobody sweeps.
    unswept: Option<sweeper::Maps>,
    counters: PerCpuArray<aya::maps::MapData, abi::Counter>,
    /// Until somebody takes it.
    denied: Option<DeniedPackets>,
    /// How programs are attached; `None` until the first one has shown what the kernel offers.
    mode: Option<AttachMode>,
    attached: BTreeMap<(u32, &'static str), Attachment>,
    pins: Result<Pins, String>,
    /// What is in force, but for the peers.
    spec: Option<Spec>,
}

impl Ebpf {
    /// Tells in one sentence why this kernel or these rights do not allow the eBPF datapath.
    pub fn support() -> Result<(), Error> {
        let context = "use eBPF";
        let version = KernelVersion::current().map_err(|error| failed(context, error))?;
        if version < OLDEST_KERNEL {
            return Err(failed(context, "it needs Linux 5.10 or later"));
        }
        let program = aya::sys::is_program_supported(ProgramType::SchedClassifier);
        if !program.map_err(|error| refused(context, error))? {
            return Err(failed(
                context,
                "the kernel has no traffic control programs",
            ));
        }
        let map = aya::sys::is_map_supported(MapType::LpmTrie);
        if !map.map_err(|error| refused(context, error))? {
            return Err(failed(context, "the kernel has no LPM maps"));
        }
        Ok(())
    }

    /// Loads the programs with the default [`Options`].
    pub fn load() -> Result<Self, Error> {
        Self::load_with(Options::default())
    }

    /// Loads the programs. They are attached by the first [`Datapath::apply`].
    pub fn load_with(options: Options) -> Result<Self, Error> {
        Self::support()?;
        let entries = options.limits.flows.saturating_mul(2);
        object::check_abi(object())?;
        let unkept = |error: io::Error| error.to_string();
        let left = options
            .pins
            .and_then(|pins| Ok((pins.inspect(entries).map_err(unkept)?, pins)));
        let [blocks4, blocks6] =
            settled::blocks(entries, settled::memory(), settled::descriptors());
        let log_level = log::level();
        let mut loader = EbpfLoader::new();
        // Without relocations against kernel types the kernel's own BTF need not be read.
        loader
            .btf(None)
            .map_max_entries(abi::FLOWS4, entries)
            .map_max_entries(abi::FLOWS6, entries)
            .map_max_entries(abi::SETTLED4, blocks4)
            .map_max_entries(abi::SETTLED6, blocks6)
            .override_global(abi::BLOCKS4, &blocks4, true)
            .override_global(abi::BLOCKS6, &blocks6, true)
            .override_global(abi::HANDED_OVER, &options.marks.handed_over, true)
            .override_global(abi::PERMITTED, &options.marks.permitted, true)
            .override_global(log::LEVEL, &log_level, true);
        if log_level == 0 {
            loader.map_max_entries(log::RECORDS, log::LEAST_ROOM);
        }
        if let Ok((Some(_), pins)) = &left {
            for (name, path) in pins.tables() {
                loader.map_pin_path(name, path);
            }
        }
        let mut programs = loader
            .load(object())
            .map_err(|error| refused("load the eBPF maps", error))?;
        for side in Side::ALL {
            load_program(&mut programs, side.program())?;
        }
        log::start(&mut programs, log_level)?;
        if let Ok((Some(generation), _)) = left {
            tables::begin_behind(&mut programs, generation)?;
            tracing::info!("flows go on where the daemon before has left them");
        }
        let pins = left.and_then(|(_, pins)| match pins.keep(&programs) {
            Ok(()) => Ok(pins),
            Err(error) => {
                // Half of it is of no use to anybody.
                let _ = pins.remove();
                Err(error.to_string())
            }
        });
        let tables = Tables::take(&mut programs, options.limits)?;
        let flows = FlowTables {
            v4: Flows::take(&mut programs, abi::FLOWS4)?,
            v6: Flows::take(&mut programs, abi::FLOWS6)?,
            sources: Table::take(&mut programs, abi::SOURCES)?,
        };
        let maps = sweeper::Maps::of(&flows)
            .map_err(|error| failed("open the eBPF maps of the flow table", error))?;
        let (sweeper, unswept) = if options.sweep {
            let sweeper = Sweeper::start(maps, &options.limits);
            let sweeper = sweeper.map_err(|error| failed("sweep the flow table", error))?;
            (Some(sweeper), None)
        } else {
            (None, Some(maps))
        };
        let counters = take_map(&mut programs, abi::COUNTERS)?;
        let denied = DeniedPackets::take(&mut programs)?;
        Ok(Self {
            programs,
            tables,
            flows: Arc::new(flows),
            sweeper,
            unswept,
            counters,
            denied: Some(denied),
            mode: options.attach,
            attached: BTreeMap::new(),
            pins,
            spec: None,
        })
    }

    /// Why flows do not outlive the daemon; `None`: they do.
    pub fn unkept(&self) -> Option<&str> {
        self.pins.as_ref().err().map(String::as_str)
    }

    /// Ends, and leaves to the next daemon what it can take over.
    pub fn leave(mut self) -> Result<(), Error> {
        if self.pins.is_err() {
            return self.remove();
        }
        if let Some(sweeper) = self.sweeper.take() {
            sweeper.leave();
        }
        if self.unswept.is_some() {
            self.by_hand("leave the flows", sweeper::Maps::refresh)?;
        }
        let attached = std::mem::take(&mut self.attached);
        attached.into_values().try_for_each(Attachment::leave)
    }

    /// How the programs are attached, `tcx` or `clsact`; `None` while they are not.
    pub fn attach_mode(&self) -> Option<&'static str> {
        if self.attached.is_empty() {
            return None;
        }
        self.mode.map(AttachMode::label)
    }

    /// The counter of one program and verdict.
    pub fn counter(&self, side: Side, verdict: Verdict) -> Result<Counter, Error> {
        let slot = self
            .counters
            .get(&side.counter(verdict), 0)
            .map_err(|error| failed("read the eBPF counters", error))?;
        Ok(Counter {
            program: side.label(),
            verdict: verdict.label(),
            packets: slot.iter().map(|cpu| cpu.packets).sum(),
            bytes: slot.iter().map(|cpu| cpu.bytes).sum(),
        })
    }

    /// By what flows are judged now: with each new one, every flow is judged anew by its next packet.
    pub fn generation(&self) -> u32 {
        self.tables.generation()
    }

    /// Has every flow judged anew, and its next hop found anew, by its next packet: to be called
    /// when routes, neighbours, links or addresses of the kernel have changed.
    pub fn bump_generation(&mut self) -> Result<(), Error> {
        self.tables.bump_generation()
    }

    /// New flows that each rule of the policy in force has let through, in the policy's order.
    pub fn rule_hits(&self) -> Result<Vec<u64>, Error> {
        self.tables.rule_hits()
    }

    /// How the flow table is; `None` when nobody sweeps it.
    pub fn flow_report(&self) -> Option<FlowReport> {
        self.sweeper.as_ref().map(Sweeper::report)
    }

    /// The flow table, for reading.
    pub fn flows(&self) -> Arc<FlowTables> {
        Arc::clone(&self.flows)
    }

    /// Settles all flows for which there is room: for tests and measurements, where nobody sweeps.
    pub fn settle_flows(&mut self) -> Result<(), Error> {
        self.by_hand("settle the flows", sweeper::Maps::settle)
    }

    /// Ends all flows: for tests and measurements, where nobody sweeps.
    pub fn end_flows(&mut self) -> Result<(), Error> {
        self.by_hand("end the flows", sweeper::Maps::clear)
    }

    fn by_hand(
        &mut self,
        context: &str,
        work: impl FnOnce(&mut sweeper::Maps) -> io::Result<()>,
    ) -> Result<(), Error> {
        let Some(maps) = &mut self.unswept else {
            return Err(failed(context, "the sweeper does"));
        };
        work(maps).map_err(|error| failed(context, error))
    }

    /// The packets that the programs do not let through; once.
    pub fn take_denied(&mut self) -> Option<DeniedPackets> {
        self.denied.take()
    }

    /// The program that tells what the policy says of a packet, loaded when it is asked for: only
    /// tests and measurements run it.
    pub fn policy_probe(&mut self) -> Result<&SchedClassifier, Error> {
        load_program(&mut self.programs, abi::POLICY_PROBE)
    }

    /// The loaded program of `side`.
    pub fn program(&self, side: Side) -> Result<&SchedClassifier, Error> {
        let context = format!("find {}", side.program());
        let program = self.programs.program(side.program());
        let program = program.ok_or_else(|| failed(&context, "the object does not have it"))?;
        program.try_into().map_err(|error| failed(context, error))
    }

    /// Puts `spec` in force, from whatever is in force now.
    fn install(&mut self, spec: &Spec) -> Result<(), Error> {
        // Maps first: a program must not judge by another network's tables.
        let news = self.tables.install(spec)?;
        self.tell(news);
        if let Some(sweeper) = &self.sweeper
            && self.spec.as_ref().map(external_addresses) != Some(external_addresses(spec))
        {
            sweeper.judge(Update::Addresses(external_addresses(spec)));
        }
        let wanted = wanted(spec);
        let is_subnet = |program: &str| program == Side::Subnet.program();
        let is_gone = |link: &Link| matches!(tables::mtu(&link.name), Ok(None));
        for (key @ (_, program), link) in &wanted {
            if self.attached.contains_key(key) {
                continue;
            }
            let owner = Owner {
                handle: clsact::handle(&spec.tun.name),
                pins: self.pins.as_ref().ok(),
            };
            match attach::attach(&mut self.programs, &mut self.mode, program, link, owner) {
                Ok(attachment) => {
                    tracing::debug!(program, link = %link.name, "attached");
                    self.attached.insert(*key, attachment);
                }
                // Flows through the others go on, and the next spec tells that this one has gone.
                Err(error) if is_subnet(program) && is_gone(link) => {
                    tracing::debug!(%error, link = %link.name, "the interface is gone");
                }
                Err(error) => return Err(error),
            }
        }
        let stale: Vec<_> = self
            .attached
            .keys()
            .filter(|key| !wanted.contains_key(*key))
            .copied()
            .collect();
        for key in stale {
            self.detach(key)?;
        }
        if self.spec.is_none() {
            self.remove_leftovers(spec)
                .map_err(|error| failed("take off what an earlier run left attached", error))?;
        }
        Ok(())
    }

    /// Tells the sweeper what flows are to be judged by.
    fn tell(&self, news: News) {
        let Some(sweeper) = &self.sweeper else {
            return;
        };
        if let Some(policy) = news.policy {
            sweeper.judge(Update::Policy(policy));
        }
        if news.peers != OverlayChange::default() {
            sweeper.judge(Update::Peers {
                change: news.peers,
                gone: news.gone,
            });
        }
    }

    /// Takes off what an earlier run has attached and this one has not taken over.
    fn remove_leftovers(&self, spec: &Spec) -> io::Result<()> {
        let attached = |mode, index| {
            let attached = |side: &Side| self.attached.contains_key(&(index, side.program()));
            self.mode == Some(mode) && Side::ALL.iter().any(attached)
        };
        if let Ok(pins) = &self.pins {
            pins.remove_links(|index| attached(AttachMode::Tcx, index))?;
        }
        let handle = clsact::handle(&spec.tun.name);
        clsact::remove_leftovers(handle, |index| attached(AttachMode::Clsact, index))
    }

    fn detach(&mut self, key: (u32, &'static str)) -> Result<(), Error> {
        let attachment = self.attached.remove(&key);
        attachment.map_or(Ok(()), Attachment::detach)
    }
}

/// What a translated flow may have as its external address.
fn external_addresses(spec: &Spec) -> HashSet<Address> {
    let external = spec.external.values().flat_map(External::addresses);
    let addresses = spec.addresses.iter().chain(external);
    addresses.map(|address| tables::address(*address)).collect()
}

/// Which program belongs on which interface.
fn wanted(spec: &Spec) -> BTreeMap<(u32, &'static str), &Link> {
    let subnet = spec.subnet.iter().map(|link| (link, Side::Subnet));
    std::iter::once((&spec.tun, Side::Overlay))
        .chain(subnet)
        .map(|(link, side)| ((link.index, side.program()), link))
        .collect()
}

impl Datapath for Ebpf {
    fn apply(&mut self, spec: &Spec) -> Result<(), Error> {
        let peers = self.tables.allowed();
        let Err(error) = self.install(spec) else {
            let mut spec = spec.clone();
            spec.overlay.clear();
            self.spec = Some(spec);
            return Ok(());
        };
        let restored = match self.spec.clone() {
            Some(mut before) => {
                before.overlay = peers;
                self.install(&before)
            }
            None => self.remove(),
        };
        if let Err(error) = restored {
            tracing::warn!(%error, "the eBPF datapath could not go back to what was in force");
        }
        Err(error)
    }

    fn change_peers(&mut self, change: &OverlayChange) -> Result<(), Error> {
        if self.spec.is_some() {
            let news = self.tables.change_peers(change)?;
            self.tell(news);
        }
        Ok(())
    }

    fn counters(&self) -> Result<Vec<Counter>, Error> {
        Side::ALL
            .iter()
            .flat_map(|side| {
                Verdict::ALL
                    .iter()
                    .map(|verdict| self.counter(*side, *verdict))
            })
            .collect()
    }

    fn remove(&mut self) -> Result<(), Error> {
        self.spec = None;
        let mut outcome = Ok(());
        for key in self.attached.keys().copied().collect::<Vec<_>>() {
            outcome = outcome.and(self.detach(key));
        }
        let ended = Err("the eBPF datapath was taken away".to_owned());
        if let Ok(pins) = std::mem::replace(&mut self.pins, ended) {
            let removed = pins.remove();
            outcome = outcome.and(removed.map_err(|e| failed("remove what is pinned", e)));
        }
        outcome
    }
}

fn load_program<'a>(programs: &'a mut aya::Ebpf, name: &str) -> Result<&'a SchedClassifier, Error> {
    let context = format!("load {name}");
    let program = programs.program_mut(name);
    let program = program.ok_or_else(|| failed(&context, "the object does not have it"))?;
    let program: &mut SchedClassifier = program
        .try_into()
        .map_err(|error| failed(&context, error))?;
    match program.load() {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(program),
        Err(error) => Err(not_loaded(name, error)),
    }
}

/// How many of the last lines of the verifier's log are told.
const VERIFIER_LINES: usize = 8;

/// The kernel does not take a program.
fn not_loaded(name: &str, error: ProgramError) -> Error {
    let context = format!("load {name}");
    match error {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => {
            let log = verifier_log.to_string();
            tracing::debug!(program = name, log, "refused by the verifier");
            // A missing right has the same number, but leaves no log.
            if io_error.raw_os_error() == Some(libc::EACCES) && !log.trim().is_empty() {
                let mut last: Vec<&str> = log.lines().rev().take(VERIFIER_LINES).collect();
                last.reverse();
                let text = format!("the kernel's verifier refuses it: {}", last.join("; "));
                return failed(context, text);
            }
            refused(context, io_error)
        }
        error => refused(context, error),
    }
}

fn take_map<M>(programs: &mut aya::Ebpf, name: &str) -> Result<M, Error>
where
    M: TryFrom<aya::maps::Map, Error = aya::maps::MapError>,
{
    let context = format!("find the eBPF map {name}");
    let map = programs.take_map(name);
    let map = map.ok_or_else(|| failed(&context, "the object does not have it"))?;
    M::try_from(map).map_err(|error| failed(context, error))
}

fn failed(context: impl Into<String>, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
    Error {
        context: context.into(),
        source: source.into(),
    }
}

/// As [`failed`], with the reason in plain words where the system has refused the call itself.
fn refused(context: impl Into<String>, error: impl StdError + Send + Sync + 'static) -> Error {
    match errno(&error) {
        Some(libc::EPERM | libc::EACCES) => failed(
            context,
            "not permitted: it takes CAP_BPF and CAP_NET_ADMIN (before Linux 5.19, and where BPF \
             is locked down, CAP_SYS_ADMIN); an unprivileged container has none of them",
        ),
        Some(libc::ENOSYS) => failed(context, "the kernel is built without the bpf system call"),
        _ => failed(context, error),
    }
}

/// The errno at the bottom of an error, if there is one.
fn errno(error: &(dyn StdError + 'static)) -> Option<i32> {
    let mut current = Some(error);
    while let Some(error) = current {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return io.raw_os_error();
        }
        if let Some(syscall) = error.downcast_ref::<SyscallError>() {
            return syscall.io_error.raw_os_error();
        }
        current = error.source();
    }
    None
}

//! The uplink's guard: loads, attaches and feeds the XDP program that drops, before the stack sees
//! it, what cannot be a WireGuard message for us.
//!
//! It is an object of its own, attached in native mode or not at all: generic XDP costs more than it
//! saves, and has taken hosts down. The attachment is held by a file descriptor, so nothing of it
//! outlives the daemon.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::EbpfLoader;
use aya::maps::{Array, HashMap, MapData, MapError, PerCpuArray};
use aya::programs::xdp::XdpLinkId;
use aya::programs::{ProgramError, Xdp, XdpMode};
use aya::util::KernelVersion;
use router_ebpf::abi::Address;
use router_ebpf::guard::{
    GUARD_ADDRESSES, GUARD_COUNTERS, GUARD_INDICES, GUARD_SETTINGS, Judgement, MAX_ADDRESSES,
    Settings, UPLINK_GUARD, UPLINK_GUARD_LINEAR, place,
};

use super::attach::is_gone;
use super::object::{check_abi, guard_object};
use super::tables::{Mirror, address};
use super::{errno, failed, not_loaded, refused, take_map};
use crate::datapath::{Error, Link};

/// Since this kernel a program can take frames of several buffers.
const FRAGS_KERNEL: KernelVersion = KernelVersion::new(5, 18, 0);

/// The program and its maps.
pub struct Guard {
    programs: aya::Ebpf,
    /// The one of the object's two programs that this kernel takes.
    name: &'static str,
    addresses: Mirror<Address, u32>,
    indices: Indices,
    counters: PerCpuArray<MapData, u64>,
    attached: Option<(Link, XdpLinkId)>,
}

impl Guard {
    /// Loads the program. It lets everything pass until it is told of port and addresses.
    pub fn load() -> Result<Self, Error> {
        check_abi(guard_object())?;
        let mut programs = EbpfLoader::new()
            .btf(None)
            .load(guard_object())
            .map_err(|error| refused("load the maps of the uplink's guard", error))?;
        let frags = KernelVersion::current().is_ok_and(|version| version >= FRAGS_KERNEL);
        let name = if frags {
            UPLINK_GUARD
        } else {
            UPLINK_GUARD_LINEAR
        };
        let loaded = program(&mut programs, name).and_then(Xdp::load);
        loaded.map_err(|error| not_loaded(name, error))?;
        Ok(Self {
            name,
            addresses: Mirror::new(
                take_map::<HashMap<_, Address, u32>>(&mut programs, GUARD_ADDRESSES)?,
                "the router's addresses",
                MAX_ADDRESSES,
            ),
            indices: Indices(Arc::new(Mutex::new(Shared {
                settings: take_map(&mut programs, GUARD_SETTINGS)?,
                current: Settings::default(),
                words: take_map(&mut programs, GUARD_INDICES)?,
                broken: false,
            }))),
            counters: take_map(&mut programs, GUARD_COUNTERS)?,
            programs,
            attached: None,
        })
    }

    /// Makes the program judge what comes to `port`, host byte order, at one of `addresses`. Those
    /// that it has no room for are not guarded.
    pub fn protect(&mut self, port: u16, addresses: &[IpAddr]) -> Result<(), Error> {
        let wanted: BTreeMap<Address, u32> = addresses
            .iter()
            .map(|own| (address(*own), 0))
            .take(MAX_ADDRESSES)
            .collect();
        self.addresses.install(wanted)?;
        self.indices
            .lock()
            .set(|settings| settings.port = port.to_be_bytes())
            .map_err(|error| failed("write the settings of the uplink's guard", error))
    }

    /// Has the program let pass what comes to the port and is no WireGuard message, or, as at first, drop it.
    pub fn let_others_pass(&mut self, pass: bool) -> Result<(), Error> {
        let set = self.indices.lock().set(|settings| {
            settings.flags &= !Settings::OTHERS;
            if pass {
                settings.flags |= Settings::OTHERS;
            }
        });
        set.map_err(|error| failed("write the settings of the uplink's guard", error))
    }

    /// Attaches the program to `uplink` and to nothing else. On error it is attached nowhere.
    pub fn attach(&mut self, uplink: &Link) -> Result<(), Error> {
        if self.attached_to() == Some(uplink) {
            return Ok(());
        }
        self.detach()?;
        let context = || format!("attach {} to {} (XDP)", self.name, uplink.name);
        let id = program(&mut self.programs, self.name)
            .and_then(|program| program.attach_to_if_index(uplink.index, XdpMode::Driver))
            .map_err(|error| match told(&error) {
                Some(reason) => failed(context(), reason),
                None => refused(context(), error),
            })?;
        self.attached = Some((uplink.clone(), id));
        Ok(())
    }

    /// Takes the program off. That the interface is gone already is no error.
    pub fn detach(&mut self) -> Result<(), Error> {
        let Some((link, id)) = self.attached.take() else {
            return Ok(());
        };
        match program(&mut self.programs, self.name).and_then(|program| program.detach(id)) {
            Err(error) if !is_gone(errno(&error)) => {
                let context = format!("detach {} from {}", self.name, link.name);
                Err(failed(context, error))
            }
            _ => Ok(()),
        }
    }

    /// Where the program is attached.
    pub fn attached_to(&self) -> Option<&Link> {
        self.attached.as_ref().map(|(link, _)| link)
    }

    /// The handle by which the program is told of receiver indices. Until it is used, the program
    /// does not judge by them.
    pub fn indices(&self) -> Indices {
        self.indices.clone()
    }

    /// Frames so far, by judgement.
    pub fn counters(&self) -> Result<Vec<(Judgement, u64)>, Error> {
        let count = |judgement: &Judgement| {
            let slot = self.counters.get(&(*judgement as u32), 0)?;
            Ok((*judgement, slot.iter().sum()))
        };
        let counts: Result<_, MapError> = Judgement::ALL.iter().map(count).collect();
        counts.map_err(|error| failed("read the counters of the uplink's guard", error))
    }

    /// The loaded program, to be run on frames of one's own.
    pub fn program(&mut self) -> Result<&Xdp, Error> {
        let context = format!("find {}", self.name);
        program(&mut self.programs, self.name)
            .map(|program| &*program)
            .map_err(|error| failed(context, error))
    }
}

fn program<'a>(programs: &'a mut aya::Ebpf, name: &str) -> Result<&'a mut Xdp, ProgramError> {
    let program = programs.program_mut(name).ok_or(ProgramError::NotLoaded)?;
    program.try_into()
}

/// Why driver or kernel refuse to attach, for an operator.
fn told(error: &ProgramError) -> Option<String> {
    let reason = match errno(error)? {
        libc::EBUSY | libc::EEXIST => "another XDP program is there, which keeps its place",
        libc::EOPNOTSUPP => {
            "the driver has no native XDP, or not with the offloads that are switched on (LRO, GRO \
             in hardware)"
        }
        libc::EINVAL | libc::ERANGE | libc::E2BIG => {
            let detail = match error {
                ProgramError::SyscallError(error) => error.io_error.to_string(),
                other => other.to_string(),
            };
            return Some(format!(
                "the driver refuses XDP, most often because of an MTU that is too large for it or \
                 of too many queues in use ({detail}); the kernel's log may tell"
            ));
        }
        libc::ENODEV => "the interface is gone",
        _ => return None,
    };
    Some(reason.to_owned())
}

/// What the program knows of receiver indices. All clones are one.
#[derive(Clone)]
pub struct Indices(Arc<Mutex<Shared>>);

struct Shared {
    settings: Array<MapData, Settings>,
    /// What is in `settings`.
    current: Settings,
    words: Array<MapData, u64>,
    /// An index could not be told: the program never again judges by them.
    broken: bool,
}

impl std::fmt::Debug for Indices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Indices").finish_non_exhaustive()
    }
}

impl Indices {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the program which upper 24 bits of receiver indices are in use from now on, and which
    /// no longer. From the first call on it drops messages with any other. Should the kernel refuse,
    /// it lets all pass.
    pub fn change(&self, new: &[u32], gone: &[u32]) -> Result<(), Error> {
        let mut shared = self.lock();
        let outcome = shared.change(new, gone);
        shared.broken |= outcome.is_err();
        let judge = !shared.broken;
        let set = shared.set(|settings| {
            settings.flags &= !Settings::INDICES;
            if judge {
                settings.flags |= Settings::INDICES;
            }
        });
        let context = "tell the uplink's guard of receiver indices";
        outcome.and(set).map_err(|error| failed(context, error))
    }
}

impl Shared {
    fn change(&mut self, new: &[u32], gone: &[u32]) -> Result<(), MapError> {
        for (uppers, in_use) in [(new, true), (gone, false)] {
            for upper in uppers {
                let (word, bit) = place(*upper);
                let bits = self.words.get(&word, 0)?;
                let bits = if in_use { bits | bit } else { bits & !bit };
                self.words.set(word, bits, 0)?;
            }
        }
        Ok(())
    }

    fn set(&mut self, change: impl FnOnce(&mut Settings)) -> Result<(), MapError> {
        let mut wanted = self.current;
        change(&mut wanted);
        if wanted != self.current {
            self.settings.set(0, wanted, 0)?;
            self.current = wanted;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use router_ebpf::guard::{Message, message};

    use crate::wireguard::message::{Kind, kind};

    fn head() -> impl Strategy<Value = [u8; 4]> {
        prop_oneof![
            8 => (0..6u8).prop_map(|kind| [kind, 0, 0, 0]),
            1 => any::<[u8; 4]>(),
        ]
    }

    proptest! {
        /// The guard and the engine tell messages in the same way.
        #[test]
        fn the_guard_drops_what_the_engine_would(
            head in head(),
            length in prop_oneof![Just(148), Just(92), Just(64), 4..200_usize],
        ) {
            let mut bytes: Vec<u8> = (0..length).map(|at| at as u8).collect();
            bytes[..4].copy_from_slice(&head);
            let index = |at: usize| {
                u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
            };
            let guard = message(head, length as u16);
            match kind(&bytes) {
                None => prop_assert_eq!(guard, None),
                Some(Kind::Initiation) => prop_assert_eq!(guard, Some(Message::Initiation)),
                Some(Kind::Response(named) | Kind::Cookie(named) | Kind::Data(named)) => {
                    let Some(Message::Indexed(at)) = guard else {
                        return Err(TestCaseError::fail("not indexed"));
                    };
                    prop_assert_eq!(index(at), named);
                }
            }
        }
    }
}

//! The router as a peer relay, without I/O: places for pairs of nodes, proof of where each is, and what is carried.
//!
//! After `net/udprelay/server.go` of Tailscale's sources. A place is made for two disco keys
//! ([`Server::allocate`]); each of both shows that it hears what is sent to its address, by a challenge that only
//! whoever has its disco key can read, and from then on what comes from one's address goes to the other's. To a
//! datagram that is not authenticated nothing is answered, and nothing is kept of it; no answer is longer than its
//! question.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use blake2::Blake2sMac;
use blake2::digest::Mac as _;
use blake2::digest::consts::U32;

use super::message::{Handshake, Message};
use super::{Header, Inner};
use crate::geneve;
use crate::tailnet::disco::{self, Boxes};
use crate::tailnet::keys::{DiscoPublic, DiscoSecret};

/// How long both ends have to show where they are.
pub const BIND: Duration = Duration::from_secs(30);
/// How long a place lasts while one of its ends is silent.
pub const LASTS: Duration = Duration::from_secs(300);
/// Places in all. Twice as many disco keys are computed with at most, as many as [`Boxes`] keeps.
pub const MOST: usize = 8192;
/// Places of those who were asked for by one node.
pub const MOST_OF_ONE: usize = 1024;
/// Places whose time is over are looked for so often.
const SWEEP: Duration = Duration::from_secs(10);
/// What challenges are made with is another one after so long, and the one before holds as long again.
const ROTATE: Duration = Duration::from_secs(120);
/// The largest number of a place; 0 is none.
const LAST: u32 = 0xff_ffff;

/// Where an end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leg {
    /// Its address.
    pub remote: SocketAddr,
    /// Our address that it sends to, if that is known: a NAT on the way takes answers from no other.
    pub local: Option<IpAddr>,
}

/// A place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocated {
    /// The two nodes' disco keys, in order.
    pub clients: [DiscoPublic; 2],
    /// Greater for places that were made later.
    pub lamport: u64,
    /// The number in headers.
    pub number: u32,
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Both ends are one, neither is whoever asks, or one is the relay.
    #[error("that is no pair of which the asker is one")]
    NoPair,
    /// There are [`MOST`] places, or [`MOST_OF_ONE`] of the asker.
    #[error("there are too many places already")]
    Full,
}

/// Why datagrams go no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// No header that is known.
    Malformed,
    /// No place has the number.
    Unknown,
    /// They come from neither end of the place.
    Stranger,
    /// The other end has not shown yet where it is.
    Unbound,
    /// For the relay itself, and not what an end of the place says now.
    Refused,
    /// The socket was full, or the kernel refused them.
    Unsent,
    /// They came faster than they were taken: the kernel has dropped them.
    Overflow,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Malformed,
        Self::Unknown,
        Self::Stranger,
        Self::Unbound,
        Self::Refused,
        Self::Unsent,
        Self::Overflow,
    ];

    /// A word that stays, for metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Unknown => "unknown",
            Self::Stranger => "stranger",
            Self::Unbound => "unbound",
            Self::Refused => "refused",
            Self::Unsent => "unsent",
            Self::Overflow => "overflow",
        }
    }
}

/// What becomes of datagrams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// They go there as they are.
    Carry(Leg),
    /// This goes back to where they came from.
    Answer(Vec<u8>),
    /// An end has shown where it is.
    Bound,
    /// They go nowhere.
    Drop(Reason),
}

/// Packets, and their bytes with the headers of UDP's payload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Datagrams.
    pub packets: u64,
    /// Bytes of UDP payload.
    pub bytes: u64,
}

/// How a server stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Places whose ends are not both there yet.
    pub connecting: usize,
    /// Places whose ends are both there.
    pub open: usize,
    /// What was carried, by the family it came by and the one it went by: IPv4 first.
    pub carried: [[Count; 2]; 2],
    /// What went no further, by [`Reason::ALL`].
    pub dropped: [u64; Reason::ALL.len()],
    /// Places that were refused.
    pub refused: u64,
    /// Places in a row that have gone without a sign of either end.
    pub missed: u64,
}

impl Stats {
    /// Adds what another one has counted that was there before: all but how many places there are.
    pub fn follow(&mut self, before: &Self) {
        let carried = self.carried.as_flattened_mut().iter_mut();
        for (now, before) in carried.zip(before.carried.as_flattened()) {
            now.packets += before.packets;
            now.bytes += before.bytes;
        }
        for (now, before) in self.dropped.iter_mut().zip(before.dropped) {
            *now += before;
        }
        self.refused += before.refused;
    }

    /// Counts datagrams that go no further.
    pub fn count_dropped(&mut self, reason: Reason, count: u64) {
        let counts = Reason::ALL.iter().zip(&mut self.dropped);
        for (_, dropped) in counts.filter(|(other, _)| **other == reason) {
            *dropped += count;
        }
    }
}

/// One end of a place.
#[derive(Clone, Copy, Debug)]
struct End {
    bound: Option<Leg>,
    /// When it was bound, or something came from it.
    seen: Instant,
    /// The try that is under way, and the one that has ended well: not 0.
    trying: u32,
    done: u32,
}

#[derive(Debug)]
struct Place {
    clients: [DiscoPublic; 2],
    /// Who has asked for it.
    asker: DiscoPublic,
    lamport: u64,
    /// When it was asked for, while it was not open.
    asked: Instant,
    /// Either end has said something.
    heard: bool,
    ends: [End; 2],
}

impl Place {
    fn is_open(&self) -> bool {
        self.ends.iter().all(|end| end.bound.is_some())
    }

    fn is_over(&self, now: Instant) -> bool {
        let since = |at| now.saturating_duration_since(at);
        match self.is_open() {
            true => self.ends.iter().any(|end| since(end.seen) > LASTS),
            false => since(self.asked) > BIND,
        }
    }
}

/// Fills bytes at random; false if it cannot.
pub type Random = Box<dyn FnMut(&mut [u8]) -> bool + Send>;

/// The relay.
pub struct Server {
    key: DiscoPublic,
    boxes: Boxes,
    random: Random,
    places: HashMap<u32, Place>,
    by_clients: HashMap<[DiscoPublic; 2], u32>,
    /// The number that was given last.
    number: u32,
    lamport: u64,
    /// What challenges are made with, and were made with before.
    secrets: [[u8; 32]; 2],
    rotated: Option<Instant>,
    swept: Option<Instant>,
    stats: Stats,
}

impl Server {
    /// One without places. Its key must be a new one: numbers begin anew, and the key tells places apart.
    pub fn new(secret: &DiscoSecret, mut random: Random) -> Self {
        let mut number = [0; 4];
        // Somewhere else than before, so that few of the numbers that are still in use by others mean something.
        random(&mut number);
        Self {
            key: secret.public(),
            boxes: Boxes::new(secret),
            random,
            places: HashMap::new(),
            by_clients: HashMap::new(),
            number: u32::from_be_bytes(number) & LAST,
            lamport: 0,
            secrets: [[0; 32]; 2],
            rotated: None,
            swept: None,
            stats: Stats::default(),
        }
    }

    /// Its disco key, which is not the node's.
    pub fn key(&self) -> DiscoPublic {
        self.key
    }

    /// A place for two nodes, of which `asker` is one: the one that they have, or a new one.
    pub fn allocate(
        &mut self,
        asker: DiscoPublic,
        mut clients: [DiscoPublic; 2],
        now: Instant,
    ) -> Result<Allocated, Refusal> {
        clients.sort_unstable();
        let is_pair = clients[0] != clients[1] && clients.contains(&asker);
        if !is_pair || clients.contains(&self.key) {
            self.stats.refused += 1;
            return Err(Refusal::NoPair);
        }
        if let Some(number) = self.by_clients.get(&clients).copied()
            && let Some(place) = self.places.get_mut(&number)
        {
            if !place.is_over(now) {
                if !place.is_open() {
                    place.asked = now;
                }
                let lamport = place.lamport;
                return Ok(Allocated {
                    clients,
                    lamport,
                    number,
                });
            }
            self.remove(number);
        }
        let of_asker = self.places.values().filter(|place| place.asker == asker);
        if self.places.len() >= MOST || of_asker.count() >= MOST_OF_ONE {
            self.sweep(now);
            let of_asker = self.places.values().filter(|place| place.asker == asker);
            if self.places.len() >= MOST || of_asker.count() >= MOST_OF_ONE {
                self.stats.refused += 1;
                return Err(Refusal::Full);
            }
        }
        // In turn, so that it takes long until a number means something else.
        loop {
            self.number = self.number % LAST + 1;
            if !self.places.contains_key(&self.number) {
                break;
            }
        }
        self.lamport += 1;
        let (number, lamport) = (self.number, self.lamport);
        let end = End {
            bound: None,
            seen: now,
            trying: 0,
            done: 0,
        };
        let place = Place {
            clients,
            asker,
            lamport,
            asked: now,
            heard: false,
            ends: [end; 2],
        };
        self.swept.get_or_insert(now);
        self.places.insert(number, place);
        self.by_clients.insert(clients, number);
        Ok(Allocated {
            clients,
            lamport,
            number,
        })
    }

    /// Takes datagrams that came together and have the same header ([`runs`]), `stride` bytes each but the last.
    pub fn handle(&mut self, run: &[u8], stride: usize, from: Leg, now: Instant) -> Verdict {
        let verdict = self.judge(run, stride, from, now);
        if let Verdict::Drop(reason) = verdict {
            self.count_dropped(reason, datagrams(run, stride));
        }
        verdict
    }

    fn judge(&mut self, run: &[u8], stride: usize, from: Leg, now: Instant) -> Verdict {
        let Some((header, rest)) = Header::parse(run) else {
            return Verdict::Drop(Reason::Malformed);
        };
        let place = self.places.get_mut(&header.number);
        let Some(place) = place.filter(|place| !place.is_over(now)) else {
            return Verdict::Drop(Reason::Unknown);
        };
        if header.control {
            return match header.inner {
                Inner::Disco => self
                    .control(header.number, rest, from, now)
                    .unwrap_or(Verdict::Drop(Reason::Refused)),
                Inner::WireGuard => Verdict::Drop(Reason::Malformed),
            };
        }
        let is_from = |end: &End| end.bound.is_some_and(|leg| leg.remote == from.remote);
        let Some(at) = place.ends.iter().position(is_from) else {
            return Verdict::Drop(Reason::Stranger);
        };
        let Some(to) = place.ends[1 - at].bound else {
            return Verdict::Drop(Reason::Unbound);
        };
        place.ends[at].seen = now;
        let by = |leg: Leg| usize::from(leg.remote.is_ipv6());
        let count = &mut self.stats.carried[by(from)][by(to)];
        count.packets += datagrams(run, stride);
        count.bytes += run.len() as u64;
        Verdict::Carry(to)
    }

    /// Takes what is for the relay itself; `None` if it is refused.
    fn control(&mut self, number: u32, sealed: &[u8], from: Leg, now: Instant) -> Option<Verdict> {
        // Before anything is computed: strangers must cost nothing.
        let sender = disco::sender(sealed)?;
        let place = self.places.get(&number)?;
        let at = place.clients.iter().position(|key| *key == sender)?;
        let other = place.clients[1 - at];
        let clear = self.boxes.open_clear(&sender, sealed)?;
        let message = Message::parse(&clear)?;
        let (Message::Bind(said) | Message::Answer(said)) = message else {
            return None;
        };
        if said.number != number || said.remote != other || said.generation == 0 {
            return None;
        }
        self.rotate(now)?;
        let place = self.places.get_mut(&number)?;
        place.heard = true;
        self.stats.missed = 0;
        let end = &mut place.ends[at];
        if let Message::Answer(_) = message {
            let is_ours = |secret| {
                let mac = mac(secret, &said, from.remote);
                mac.is_some_and(|mac| mac.verify_slice(&said.challenge).is_ok())
            };
            if end.trying != said.generation || !self.secrets.iter().any(is_ours) {
                return None;
            }
            end.bound = Some(from);
            end.seen = now;
            end.done = end.trying;
            end.trying = 0;
            let other = &mut place.ends[1 - at];
            if other.bound.is_some_and(|leg| leg.remote == from.remote) {
                // A NAT has given its port away: it is not there any more, and has to say where it is.
                other.bound = None;
                place.asked = now;
            }
            return Some(Verdict::Bound);
        }
        if said.generation == end.done {
            // Said again by the network or by somebody else: it has had its turn.
            return None;
        }
        end.trying = said.generation;
        let challenge = mac(&self.secrets[0], &said, from.remote)?;
        let challenge = Message::Challenge(Handshake {
            challenge: challenge.finalize().into_bytes().into(),
            ..said
        });
        let mut nonce = [0; 24];
        (self.random)(&mut nonce).then_some(())?;
        let sealed = self.boxes.seal_clear(&sender, &challenge.clear(), nonce)?;
        let header = Header::to_relay(number).bytes();
        Some(Verdict::Answer([&header[..], &sealed].concat()))
    }

    fn rotate(&mut self, now: Instant) -> Option<()> {
        let age = self.rotated.map(|at| now.saturating_duration_since(at));
        if age.is_some_and(|age| age < ROTATE) {
            return Some(());
        }
        let mut new = [[0; 32]; 2];
        for secret in &mut new {
            (self.random)(secret).then_some(())?;
        }
        if age.is_some_and(|age| age < 2 * ROTATE) {
            new[1] = self.secrets[0];
        }
        self.secrets = new;
        self.rotated = Some(now);
        Some(())
    }

    /// Counts datagrams that go no further.
    pub fn count_dropped(&mut self, reason: Reason, count: u64) {
        self.stats.count_dropped(reason, count);
    }

    /// Forgets places whose time is over.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.poll_timeout().is_some_and(|due| due <= now) {
            self.sweep(now);
        }
    }

    /// When there is something to do; `None` without places.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.swept.map(|at| at + SWEEP)
    }

    fn sweep(&mut self, now: Instant) {
        let over = self.places.iter().filter(|(_, place)| place.is_over(now));
        let over: Vec<u32> = over.map(|(number, _)| *number).collect();
        over.iter().for_each(|number| self.remove(*number));
        self.swept = (!self.places.is_empty()).then_some(now);
        if !over.is_empty() {
            let places = self.places.values();
            let used: BTreeSet<_> = places.flat_map(|place| place.clients).collect();
            self.boxes.keep(&used);
        }
    }

    fn remove(&mut self, number: u32) {
        if let Some(place) = self.places.remove(&number) {
            self.by_clients.remove(&place.clients);
            if !place.heard {
                self.stats.missed += 1;
            }
        }
    }

    /// How it stands.
    pub fn stats(&self) -> Stats {
        let open = self.places.values().filter(|place| place.is_open()).count();
        Stats {
            open,
            connecting: self.places.len() - open,
            ..self.stats.clone()
        }
    }
}

/// Proves that whoever repeats it hears what is sent to `from`, in a try of an end of a place.
fn mac(secret: &[u8; 32], said: &Handshake, from: SocketAddr) -> Option<Blake2sMac<U32>> {
    let mut mac = Blake2sMac::<U32>::new_from_slice(secret).ok()?;
    mac.update(&said.number.to_be_bytes());
    mac.update(&said.generation.to_be_bytes());
    // The other end, so this one too.
    mac.update(said.remote.as_bytes());
    mac.update(&disco::bytes(&from));
    Some(mac)
}

fn datagrams(run: &[u8], stride: usize) -> u64 {
    run.len().div_ceil(stride.max(1)) as u64
}

/// Splits datagrams that came in one buffer, `stride` bytes each but the last, into runs with the same header. What
/// is for the relay itself is alone.
pub fn runs(bytes: &[u8], stride: usize) -> impl Iterator<Item = &[u8]> {
    let stride = stride.max(1);
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let first = &rest[..stride.min(rest.len())];
        let head = first.first_chunk::<{ geneve::LEN }>();
        let goes_on = Header::parse(first).is_some_and(|(header, _)| !header.control);
        let mut length = first.len();
        while let Some(head) = head
            && goes_on
            && rest[length..].starts_with(head)
        {
            length = (length + stride).min(rest.len());
        }
        let (run, behind) = rest.split_at(length);
        rest = behind;
        (!run.is_empty()).then_some(run)
    })
}

#[cfg(test)]
mod tests;

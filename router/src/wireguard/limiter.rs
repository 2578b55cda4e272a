//! Which handshake messages are worth work: mac1 always; under load also a cookie, and then a
//! token bucket for each source (WireGuard paper, section 5.3).

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use boringtun::noise::TunnResult;
use boringtun::noise::errors::WireGuardError;

use super::LocalKey;
use super::message::COOKIE;

/// Handshake messages a worker answers per second without asking for cookies. One costs about
/// 0.2 ms, so this is a tenth of a core.
const CALM_RATE: f64 = 500.0;
/// How many may come at once.
const CALM_BURST: f64 = 500.0;
/// Load lasts at least this long after it was last seen.
const LOAD_LINGERS: Duration = Duration::from_secs(1);
/// Handshake messages per second from one source under load, and at once (as in the kernel).
const SOURCE_RATE: f64 = 20.0;
const SOURCE_BURST: f64 = 5.0;
/// Sources remembered. A source gets here only with a valid cookie, so it cannot be spoofed.
const SOURCES: usize = 8192;

/// What to do with a handshake message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Process it.
    Pass,
    /// Answer with the cookie reply of this many bytes.
    Cookie(usize),
    /// Drop: mac1 is wrong.
    WrongMac,
    /// Drop: the source is over its rate.
    OverRate,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    tokens: f64,
    filled: Duration,
}

impl Bucket {
    fn full(burst: f64, now: Duration) -> Self {
        Self {
            tokens: burst,
            filled: now,
        }
    }

    fn refill(&mut self, rate: f64, burst: f64, now: Duration) {
        let gained = now.saturating_sub(self.filled).as_secs_f64() * rate;
        self.tokens = (self.tokens + gained).min(burst);
        self.filled = now;
    }

    fn take(&mut self, rate: f64, burst: f64, now: Duration) -> bool {
        self.refill(rate, burst, now);
        let enough = self.tokens >= 1.0;
        if enough {
            self.tokens -= 1.0;
        }
        enough
    }
}

/// The limiter of one worker.
#[derive(Debug)]
pub(crate) struct Limiter {
    calm: Bucket,
    loaded_until: Option<Duration>,
    sources: HashMap<u64, Bucket>,
}

/// A source's identity: an IPv4 address, or the /64 that an IPv6 host may choose from freely.
fn source(address: IpAddr) -> u64 {
    match address.to_canonical() {
        IpAddr::V4(address) => u64::from(address.to_bits()),
        IpAddr::V6(address) => (address.to_bits() >> 64) as u64,
    }
}

impl Limiter {
    /// A calm limiter.
    pub(crate) fn new() -> Self {
        Self {
            calm: Bucket::full(CALM_BURST, Duration::ZERO),
            loaded_until: None,
            sources: HashMap::new(),
        }
    }

    /// Judges an initiation or a response. `now` is any clock that only goes forward.
    pub(crate) fn check(
        &mut self,
        local: &LocalKey,
        from: IpAddr,
        message: &[u8],
        now: Duration,
        reply: &mut [u8; COOKIE],
    ) -> Verdict {
        // mac1 first: nobody who does not know our public key may count as load.
        if local.calm.verify_packet(None, message, &mut []).is_err() {
            return Verdict::WrongMac;
        }
        if self.calm.take(CALM_RATE, CALM_BURST, now) {
            if self.loaded_until.is_none_or(|until| until <= now) {
                self.loaded_until = None;
                return Verdict::Pass;
            }
        } else {
            self.loaded_until = Some(now + LOAD_LINGERS);
        }
        match local.loaded.verify_packet(Some(from), message, reply) {
            Ok(_) if self.admit(from, now) => Verdict::Pass,
            Ok(_) => Verdict::OverRate,
            Err(TunnResult::WriteToNetwork(cookie)) => Verdict::Cookie(cookie.len()),
            Err(TunnResult::Err(WireGuardError::InvalidMac)) => Verdict::WrongMac,
            Err(_) => Verdict::OverRate,
        }
    }

    fn admit(&mut self, from: IpAddr, now: Duration) -> bool {
        if self.sources.len() >= SOURCES {
            self.sources.retain(|_, bucket| {
                bucket.refill(SOURCE_RATE, SOURCE_BURST, now);
                bucket.tokens < SOURCE_BURST
            });
        }
        let full = self.sources.len() >= SOURCES;
        match self.sources.entry(source(from)) {
            std::collections::hash_map::Entry::Vacant(_) if full => false,
            entry => entry.or_insert(Bucket::full(SOURCE_BURST, now)).take(
                SOURCE_RATE,
                SOURCE_BURST,
                now,
            ),
        }
    }
}

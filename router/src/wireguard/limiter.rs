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
/// How many may come at once: longer work would hold up packets.
const CALM_BURST: f64 = 32.0;
/// The same for handshake messages with a valid cookie, from all sources together.
const COOKIED_RATE: f64 = 500.0;
const COOKIED_BURST: f64 = 32.0;
/// Cookie replies per second, and at once. One costs about 8 us.
const REPLY_RATE: f64 = 5000.0;
const REPLY_BURST: f64 = 500.0;
/// How often full buckets may be looked for: it takes a walk over all of them.
const SWEEP: Duration = Duration::from_secs(1);
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
    cookied: Bucket,
    replies: Bucket,
    loaded_until: Option<Duration>,
    sources: HashMap<u64, Bucket>,
    /// When full buckets may be looked for again.
    next_sweep: Duration,
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
            cookied: Bucket::full(COOKIED_BURST, Duration::ZERO),
            replies: Bucket::full(REPLY_BURST, Duration::ZERO),
            loaded_until: None,
            sources: HashMap::new(),
            next_sweep: Duration::ZERO,
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
        if self.loaded_until.is_none_or(|until| until <= now) {
            self.loaded_until = None;
            // mac1 first: nobody who does not know our public key may count as load.
            if local.calm.verify_packet(None, message, &mut []).is_err() {
                return Verdict::WrongMac;
            }
            if self.calm.take(CALM_RATE, CALM_BURST, now) {
                return Verdict::Pass;
            }
        }
        self.replies.refill(REPLY_RATE, REPLY_BURST, now);
        // Without room boringtun makes no reply.
        let room: &mut [u8] = if self.replies.tokens >= 1.0 {
            reply
        } else {
            &mut []
        };
        let judged = local.loaded.verify_packet(Some(from), message, room);
        if let Err(TunnResult::Err(WireGuardError::InvalidMac)) = judged {
            return Verdict::WrongMac;
        }
        if !self.calm.take(CALM_RATE, CALM_BURST, now) {
            self.loaded_until = Some(now + LOAD_LINGERS);
        }
        match judged {
            Ok(_)
                if self.admit(from, now) && self.cookied.take(COOKIED_RATE, COOKIED_BURST, now) =>
            {
                Verdict::Pass
            }
            Err(TunnResult::WriteToNetwork(cookie)) => {
                self.replies.tokens -= 1.0;
                Verdict::Cookie(cookie.len())
            }
            _ => Verdict::OverRate,
        }
    }

    fn admit(&mut self, from: IpAddr, now: Duration) -> bool {
        if self.sources.len() >= SOURCES && now >= self.next_sweep {
            self.next_sweep = now + SWEEP;
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

#[cfg(test)]
mod tests {
    use super::super::keys::PrivateKey;
    use super::super::message::INITIATION;
    use super::super::{LocalKey, Tunnel};
    use super::*;

    struct Fixture {
        local: LocalKey,
        limiter: Limiter,
        client: Tunnel,
        message: [u8; INITIATION],
    }

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    impl Fixture {
        fn new() -> Self {
            let local = LocalKey::new(&PrivateKey::from_bytes([1; 32]));
            let own = LocalKey::new(&PrivateKey::from_bytes([2; 32]));
            let mut client = Tunnel::new(&own, &local.public(), None, 5);
            let mut message = [0; INITIATION];
            assert_eq!(
                client.initiate(Duration::ZERO, &mut message),
                Some(INITIATION)
            );
            Self {
                local,
                limiter: Limiter::new(),
                client,
                message,
            }
        }

        fn check(&mut self, from: IpAddr, now: u64) -> (Verdict, [u8; COOKIE]) {
            let mut reply = [0; COOKIE];
            let now = Duration::from_secs(now);
            let (local, message) = (&self.local, &self.message);
            let verdict = self.limiter.check(local, from, message, now, &mut reply);
            (verdict, reply)
        }

        /// Uses up what may come without a cookie.
        fn load(&mut self, now: u64) {
            while self.check(CLIENT, now).0 == Verdict::Pass {}
        }
    }

    #[test]
    fn calm_lets_pass_whoever_knows_the_public_key() {
        let mut fixture = Fixture::new();
        assert_eq!(fixture.check(CLIENT, 0).0, Verdict::Pass);
        fixture.message[60] ^= 1;
        assert_eq!(fixture.check(CLIENT, 0).0, Verdict::WrongMac);
    }

    #[test]
    fn load_asks_for_a_cookie_and_believes_it_from_its_address_only() {
        let mut fixture = Fixture::new();
        fixture.load(10);
        let (verdict, reply) = fixture.check(CLIENT, 10);
        assert_eq!(verdict, Verdict::Cookie(COOKIE));
        let mut answer = [0; INITIATION];
        assert_eq!(
            fixture
                .client
                .handshake(&reply, Duration::ZERO, &mut answer),
            Ok((None, false))
        );
        fixture.client.initiate_again(&mut fixture.message);

        let elsewhere = IpAddr::from([192, 0, 2, 2]);
        assert_eq!(fixture.check(elsewhere, 10).0, Verdict::Cookie(COOKIE));
        for _ in 0..SOURCE_BURST as usize {
            assert_eq!(fixture.check(CLIENT, 10).0, Verdict::Pass);
        }
        assert_eq!(fixture.check(CLIENT, 10).0, Verdict::OverRate);
    }

    #[test]
    fn cookie_replies_are_bounded() {
        let mut fixture = Fixture::new();
        fixture.load(10);
        let replies = (0..2 * REPLY_BURST as usize)
            .take_while(|_| fixture.check(CLIENT, 10).0 == Verdict::Cookie(COOKIE))
            .count();
        assert!((1..=REPLY_BURST as usize).contains(&replies));
        assert_eq!(fixture.check(CLIENT, 10).0, Verdict::OverRate);
    }

    #[test]
    fn load_passes() {
        let mut fixture = Fixture::new();
        fixture.load(10);
        assert_ne!(fixture.check(CLIENT, 10).0, Verdict::Pass);
        assert_eq!(fixture.check(CLIENT, 12).0, Verdict::Pass);
    }

    #[test]
    fn sources_are_bounded_and_an_ipv6_host_cannot_multiply() {
        let mut limiter = Limiter::new();
        let now = Duration::from_secs(1);
        for at in 0..SOURCES as u32 + 100 {
            limiter.admit(IpAddr::from(at.to_be_bytes()), now);
        }
        assert!(limiter.sources.len() <= SOURCES);
        // Buckets that are full again make room.
        let later = now + Duration::from_secs(10);
        assert!(limiter.admit(CLIENT, later));

        let mut limiter = Limiter::new();
        let admitted = (0..100u16)
            .filter(|host| {
                let host = IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, *host]);
                limiter.admit(host, now)
            })
            .count();
        assert_eq!(admitted, SOURCE_BURST as usize);
    }
}

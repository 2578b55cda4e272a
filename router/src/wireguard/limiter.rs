//! Which handshake messages are worth work: mac1 always; under load also a cookie, and then a
//! token bucket for each source (WireGuard paper, section 5.3). Cookie replies are worth work too:
//! few go out, and to those who can be honest.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::net::IpAddr;
use std::time::Duration;

use boringtun::noise::TunnResult;

use super::LocalKey;
use super::message::{self, COOKIE};

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
/// A source gets one cookie reply in this time. Retries come after 5 s and a third, so that the
/// next one nearly always falls into the next term.
const TERM: Duration = Duration::from_secs(6);
/// Bits of a [`BloomFilter`], a power of two.
const FILTER: u64 = 1 << 22;
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

/// A set of sources that may take a stranger for a member: two bits for each (B. H. Bloom, 1970).
#[derive(Debug, Default)]
struct BloomFilter(Vec<u64>);

impl BloomFilter {
    fn places(hash: u64) -> [(usize, u64); 2] {
        [hash, hash >> 32].map(|hash| {
            let bit = hash % FILTER;
            ((bit / 64) as usize, 1 << (bit % 64))
        })
    }

    fn has(&self, hash: u64) -> bool {
        let mut places = Self::places(hash).into_iter();
        places.all(|(word, bit)| self.0.get(word).is_some_and(|word| word & bit != 0))
    }

    fn insert(&mut self, hash: u64) {
        // Memory only under load.
        self.0.resize((FILTER / 64) as usize, 0);
        for (word, bit) in Self::places(hash) {
            self.0[word] |= bit;
        }
    }
}

/// Who gets the few cookie replies that we can afford: nobody twice in a term; and when they get
/// scarce, only those who came in the term before too, as an honest peer does. A flood from forged
/// addresses seldom uses one again.
#[derive(Debug)]
struct Replies {
    bucket: Bucket,
    hasher: RandomState,
    came: BloomFilter,
    came_before: BloomFilter,
    answered: BloomFilter,
    next_term: Duration,
}

impl Replies {
    fn new() -> Self {
        Self {
            bucket: Bucket::full(REPLY_BURST, Duration::ZERO),
            hasher: RandomState::new(),
            came: BloomFilter::default(),
            came_before: BloomFilter::default(),
            answered: BloomFilter::default(),
            next_term: Duration::ZERO,
        }
    }

    /// Load is over.
    fn forget(&mut self) {
        self.came = BloomFilter::default();
        self.came_before = BloomFilter::default();
        self.answered = BloomFilter::default();
    }

    /// Whether a source may have a reply now.
    fn may_have(&mut self, source: u64, now: Duration) -> bool {
        if now >= self.next_term {
            self.next_term = now + TERM;
            self.came_before = std::mem::take(&mut self.came);
            self.answered = BloomFilter::default();
        }
        self.bucket.refill(REPLY_RATE, REPLY_BURST, now);
        let hash = self.hasher.hash_one(source);
        self.came.insert(hash);
        let needed = if self.came_before.has(hash) {
            1.0
        } else {
            REPLY_BURST / 2.0
        };
        self.bucket.tokens >= needed && !self.answered.has(hash)
    }

    /// A source gets one.
    fn spend(&mut self, source: u64) {
        self.bucket.tokens -= 1.0;
        self.answered.insert(self.hasher.hash_one(source));
    }
}

/// The limiter of one worker.
#[derive(Debug)]
pub(crate) struct Limiter {
    calm: Bucket,
    cookied: Bucket,
    replies: Replies,
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
            replies: Replies::new(),
            loaded_until: None,
            sources: HashMap::new(),
            next_sweep: Duration::ZERO,
        }
    }

    /// Whether a handshake message has the right mac1.
    pub(crate) fn has_mac(local: &LocalKey, message: &[u8]) -> bool {
        local.calm.verify_packet(None, message, &mut []).is_ok()
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
        if !Self::has_mac(local, message) {
            return Verdict::WrongMac;
        }
        let loaded = self.loaded_until.is_some_and(|until| now < until);
        if self.calm.take(CALM_RATE, CALM_BURST, now) {
            if !loaded {
                // Those who came shortly before the next load are remembered.
                if self
                    .loaded_until
                    .is_some_and(|until| now >= until + 2 * TERM)
                {
                    self.loaded_until = None;
                    self.replies.forget();
                }
                return Verdict::Pass;
            }
        } else {
            self.loaded_until = Some(now + LOAD_LINGERS);
        }
        let source = source(from);
        let room: &mut [u8] = if self.replies.may_have(source, now) {
            reply
        } else if message::has_mac2(message) {
            // Without room boringtun makes no reply.
            &mut []
        } else {
            // Most of a flood: no work for what cannot pass.
            return Verdict::OverRate;
        };
        let judged = local.loaded.verify_packet(Some(from), message, room);
        match judged {
            Ok(_)
                if self.admit(source, now)
                    && self.cookied.take(COOKIED_RATE, COOKIED_BURST, now) =>
            {
                Verdict::Pass
            }
            Err(TunnResult::WriteToNetwork(cookie)) => {
                self.replies.spend(source);
                Verdict::Cookie(cookie.len())
            }
            _ => Verdict::OverRate,
        }
    }

    fn admit(&mut self, source: u64, now: Duration) -> bool {
        if self.sources.len() >= SOURCES && now >= self.next_sweep {
            self.next_sweep = now + SWEEP;
            self.sources.retain(|_, bucket| {
                bucket.refill(SOURCE_RATE, SOURCE_BURST, now);
                bucket.tokens < SOURCE_BURST
            });
        }
        let full = self.sources.len() >= SOURCES;
        match self.sources.entry(source) {
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
            client.initiate_again(&mut message);
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
            let somebody = IpAddr::from([198, 51, 100, 1]);
            while self.check(somebody, now).0 == Verdict::Pass {}
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
        assert_eq!(fixture.check(CLIENT, 10).0, Verdict::Cookie(COOKIE));
        assert_eq!(fixture.check(CLIENT, 10).0, Verdict::OverRate, "one each");
        let replies = (0..2 * REPLY_BURST as u32)
            .filter(|host| {
                let verdict = fixture.check(IpAddr::from(host.to_be_bytes()), 10).0;
                verdict == Verdict::Cookie(COOKIE)
            })
            .count();
        assert!((1..=REPLY_BURST as usize).contains(&replies));
    }

    #[test]
    fn who_comes_again_gets_a_cookie_however_many_strangers_come_once() {
        let mut fixture = Fixture::new();
        fixture.load(10);
        let mut strangers = 0x0a00_0000_u32;
        let (mut answered, mut first) = (0, None);
        for try_ in 0..6 {
            for second in 0..5 {
                // All that a second has for replies, many times over.
                for _ in 0..4 * REPLY_RATE as u32 {
                    strangers += 1;
                    let from = IpAddr::from(strangers.to_be_bytes());
                    fixture.check(from, 10 + 5 * try_ + second);
                }
            }
            if fixture.check(CLIENT, 14 + 5 * try_).0 == Verdict::Cookie(COOKIE) {
                answered += 1;
                first = first.or(Some(try_));
            }
        }
        assert!(first.is_some_and(|first| first <= 2), "{first:?}");
        assert!(answered >= 3, "{answered}");
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
            limiter.admit(source(IpAddr::from(at.to_be_bytes())), now);
        }
        assert!(limiter.sources.len() <= SOURCES);
        // Buckets that are full again make room.
        let later = now + Duration::from_secs(10);
        assert!(limiter.admit(source(CLIENT), later));

        let mut limiter = Limiter::new();
        let admitted = (0..100u16)
            .filter(|host| {
                let host = IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, *host]);
                limiter.admit(source(host), now)
            })
            .count();
        assert_eq!(admitted, SOURCE_BURST as usize);
    }
}

//! Client, router and an attacker on a bad network, by seeds: loss, reordering, duplication, delay,
//! outages, roaming, replays and forgeries. What must hold is asserted at every step.

use std::collections::{BTreeMap, HashMap};

use super::*;
use crate::wireguard::clock;

const SEEDS: u64 = 48;
const CLIENT: usize = 0;
const ROUTER: usize = 1;
/// How long the network is bad, then good.
const BAD: Duration = Duration::from_secs(420);
const GOOD: Duration = Duration::from_secs(60);
/// In a good network everything works after this: a dead session is found out in 15.4 s, and the
/// handshake may just have been tried.
const RECOVERY: Duration = Duration::from_secs(30);
const ATTACKER: SocketAddr =
    SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 66)), 666);
/// REJECT_AFTER_TIME, and a turn of the timers.
const DEAD: Duration = Duration::from_millis(180_100);

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn millis(&mut self, below: u64) -> Duration {
        Duration::from_millis(self.below(below))
    }
}

/// A datagram on its way.
struct Flight {
    to: usize,
    /// Nobody is there any more if this is not the address of `to` on arrival.
    aim: SocketAddr,
    from: SocketAddr,
    bytes: Vec<u8>,
}

struct Simulation {
    seed: u64,
    random: Random,
    ends: [End; 2],
    now: Duration,
    flights: BTreeMap<(Duration, u64), Flight>,
    serial: u64,
    /// In percent, and most milliseconds.
    loss: u64,
    duplication: u64,
    delay: u64,
    outage_until: Duration,
    /// What an end was given to send: when, and whether it has arrived.
    sent: [HashMap<Vec<u8>, (Duration, bool)>; 2],
    /// What has arrived at an end once, for the attacker.
    captured: Vec<(usize, Vec<u8>)>,
    /// When a receiver index of an end was last named by a response.
    born: HashMap<(usize, u32), Duration>,
    last_initiation: [Option<Duration>; 2],
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        random.below(1);
        let (mut client, mut router) = (End::new(1), End::new(2));
        client.meet(&router, &["10.0.0.0/24", "fd00::/64"], true, None);
        let keepalive = random.chance(30).then_some(25);
        router.meet(
            &client,
            &["10.0.0.2/32", "fd00::2/128"],
            random.chance(50),
            keepalive,
        );
        Self {
            seed,
            ends: [client, router],
            now: Duration::ZERO,
            flights: BTreeMap::new(),
            serial: 0,
            loss: random.below(40),
            duplication: random.below(20),
            delay: [20, 200, 3000][random.below(3) as usize],
            outage_until: Duration::ZERO,
            sent: [HashMap::new(), HashMap::new()],
            captured: Vec::new(),
            born: HashMap::new(),
            last_initiation: [None; 2],
            random,
        }
    }

    fn run(mut self) {
        let mut tick = Duration::ZERO;
        while self.now < BAD + GOOD {
            if self.now >= BAD {
                (self.loss, self.duplication, self.delay) = (0, 0, 20);
                self.outage_until = Duration::ZERO;
            } else {
                self.weather();
            }
            self.traffic();
            // What arrives before the next turn of the timers, each at its time.
            tick += TICK;
            while let Some(entry) = self.flights.first_entry()
                && entry.key().0 <= tick
            {
                let ((at, _), flight) = entry.remove_entry();
                self.pass(at);
                self.arrive(flight);
            }
            self.pass(tick);
            for end in [CLIENT, ROUTER] {
                self.ends[end].tick(Duration::ZERO);
                self.collect(end);
            }
        }
        let seed = self.seed;
        for (from, sent) in self.sent.iter().enumerate() {
            let due = BAD + RECOVERY..BAD + GOOD - Duration::from_secs(1);
            let mut expected = sent.values().filter(|(at, _)| due.contains(at));
            assert!(
                expected.clone().count() > 10,
                "seed {seed}: too little traffic"
            );
            assert!(
                expected.all(|(_, arrived)| *arrived),
                "seed {seed}: what {from} sent was lost by a network that loses nothing"
            );
        }
    }

    /// Outages, roaming, and what the attacker does.
    fn weather(&mut self) {
        if self.random.below(600) == 0 {
            self.outage_until = self.now + self.random.millis(130_000);
        }
        if self.random.below(300) == 0 {
            let host = 10 + self.random.below(200) as u8;
            self.ends[CLIENT].address = SocketAddr::from(([198, 51, 100, host], 4000));
        }
        if !self.captured.is_empty() && self.random.chance(20) {
            let at = self.random.below(self.captured.len() as u64) as usize;
            let (to, mut bytes) = self.captured[at].clone();
            if self.random.chance(50) {
                let at = self.random.below(bytes.len() as u64) as usize;
                bytes[at] ^= 1 << self.random.below(8);
            }
            let aim = self.ends[to].address;
            self.fly(Flight {
                to,
                aim,
                from: ATTACKER,
                bytes,
            });
        }
    }

    fn traffic(&mut self) {
        for from in [CLIENT, ROUTER] {
            // Long silences, so that sessions age unused; none at the end.
            let silent = (self.now.as_secs() / 70 + self.seed).is_multiple_of(3) && self.now < BAD;
            if silent || !self.random.chance(20) {
                continue;
            }
            self.serial += 1;
            let length = 8 + self.random.below(1200) as usize;
            let mut payload = vec![self.serial as u8; length];
            payload[..8].copy_from_slice(&self.serial.to_be_bytes());
            let flow = Flow {
                source: 2 - from as u8,
                destination: 1 + from as u8,
                ..Flow::new(self.random.chance(50), false)
            };
            let packet = flow.packet(self.serial as u16, 0, 0, &payload);
            self.ends[from].transmit(&packet);
            self.sent[from].insert(packet, (self.now, false));
            self.collect(from);
        }
    }

    fn pass(&mut self, until: Duration) {
        let by = until.saturating_sub(self.now);
        clock::advance(by);
        self.now += by;
        for end in &mut self.ends {
            end.now = self.now;
        }
    }

    fn fly(&mut self, flight: Flight) {
        self.serial += 1;
        let at = self.now + self.random.millis(self.delay);
        self.flights.insert((at, self.serial), flight);
    }

    /// Puts what an end has sent on the network.
    fn collect(&mut self, from: usize) {
        let (seed, to) = (self.seed, 1 - from);
        for datagram in std::mem::take(&mut self.ends[from].wire.datagrams) {
            match message::kind(&datagram.bytes) {
                Some(Kind::Initiation) => {
                    let apart = self.last_initiation[from].map(|last| self.now - last);
                    assert!(
                        apart.is_none_or(|apart| apart >= Duration::from_secs(5)),
                        "seed {seed}: {from} began handshakes only {apart:?} apart"
                    );
                    self.last_initiation[from] = Some(self.now);
                }
                Some(Kind::Response(index)) => {
                    let own = message::sender(&datagram.bytes).unwrap();
                    self.born.insert((from, own), self.now);
                    self.born.insert((to, index), self.now);
                }
                Some(Kind::Data(index)) => {
                    // The initiator's session begins when the response arrives.
                    let most = DEAD + Duration::from_millis(self.delay.max(3000));
                    let age = self.now - self.born[&(to, index)];
                    assert!(
                        age <= most,
                        "seed {seed}: {from} used a session after {age:?}"
                    );
                }
                kind => assert!(
                    matches!(kind, Some(Kind::Cookie(_))),
                    "seed {seed}: {kind:?}"
                ),
            }
            if self.now < self.outage_until {
                continue;
            }
            let copies = 1 + u64::from(self.random.chance(self.duplication));
            for _ in 0..copies {
                if !self.random.chance(self.loss) {
                    let (aim, from) = (datagram.to, self.ends[from].address);
                    let bytes = datagram.bytes.clone();
                    self.fly(Flight {
                        to,
                        aim,
                        from,
                        bytes,
                    });
                }
            }
        }
    }

    fn arrive(&mut self, flight: Flight) {
        let Flight {
            to,
            aim,
            from,
            bytes,
        } = flight;
        if aim != self.ends[to].address {
            return;
        }
        let seed = self.seed;
        let end = &mut self.ends[to];
        end.receive(from, &bytes, 0);
        assert_ne!(
            end.shared.stats().endpoint(),
            Some(ATTACKER),
            "seed {seed}: {to}"
        );
        for packet in std::mem::take(&mut end.wire.packets) {
            let Some((_, arrived)) = self.sent[1 - to].get_mut(&packet) else {
                panic!("seed {seed}: {to} got a packet that nobody sent");
            };
            assert!(
                !std::mem::replace(arrived, true),
                "seed {seed}: {to} got a packet twice"
            );
            assert_ne!(from, ATTACKER, "seed {seed}: a packet of the attacker's");
        }
        if from != ATTACKER {
            self.captured.push((to, bytes));
        }
        self.collect(to);
    }
}

#[test]
fn nothing_breaks_on_a_bad_network() {
    for seed in 0..SEEDS {
        Simulation::new(seed).run();
    }
}

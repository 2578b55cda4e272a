use proptest::prelude::*;

use super::*;

const STRIDE: usize = 1000;

/// A client of the relay's.
struct Client {
    boxes: Boxes,
    key: DiscoPublic,
}

fn client(digit: u8) -> Client {
    let secret = secret(digit);
    Client {
        boxes: Boxes::new(&secret),
        key: secret.public(),
    }
}

fn secret(digit: u8) -> DiscoSecret {
    format!("privkey:{}", format!("{digit:02x}").repeat(32))
        .parse()
        .unwrap()
}

fn server() -> Server {
    let mut byte = 0_u8;
    let random = move |bytes: &mut [u8]| {
        byte = byte.wrapping_add(1);
        bytes.fill(byte);
        true
    };
    Server::new(&secret(200), Box::new(random))
}

fn leg(port: u16) -> Leg {
    Leg {
        remote: SocketAddr::new([192, 0, 2, 1].into(), port),
        local: Some([203, 0, 113, 9].into()),
    }
}

impl Client {
    fn says(&mut self, server: &Server, number: u32, message: &Message) -> Vec<u8> {
        let sealed = self
            .boxes
            .seal_clear(&server.key(), &message.clear(), [7; 24])
            .unwrap();
        [&Header::to_relay(number).bytes()[..], &sealed].concat()
    }

    fn hears(&mut self, server: &Server, datagram: &[u8]) -> Handshake {
        let (header, sealed) = Header::parse(datagram).unwrap();
        assert!(header.control && header.inner == Inner::Disco);
        let clear = self.boxes.open_clear(&server.key(), sealed).unwrap();
        match Message::parse(&clear) {
            Some(Message::Challenge(challenge)) => challenge,
            other => panic!("{other:?}"),
        }
    }
}

fn hello(number: u32, generation: u32, remote: DiscoPublic) -> Handshake {
    Handshake {
        number,
        generation,
        remote,
        challenge: [0; 32],
    }
}

/// The relay with two clients, and a place for them.
struct Rig {
    server: Server,
    clients: [Client; 2],
    number: u32,
    now: Instant,
}

impl Rig {
    fn new() -> Self {
        let (mut server, now) = (server(), Instant::now());
        let mut clients = [client(1), client(2)];
        clients.sort_by_key(|client| client.key);
        let keys = [clients[1].key, clients[0].key];
        let allocated = server.allocate(keys[0], keys, now).unwrap();
        assert_eq!(allocated.clients, [clients[0].key, clients[1].key]);
        Self {
            number: allocated.number,
            server,
            clients,
            now,
        }
    }

    fn open() -> Self {
        let mut rig = Self::new();
        rig.bind(0, 1, leg(1));
        rig.bind(1, 1, leg(2));
        rig
    }

    fn hello(&self, at: usize, generation: u32) -> Handshake {
        hello(self.number, generation, self.clients[1 - at].key)
    }

    fn says(&mut self, at: usize, message: &Message, from: Leg) -> (usize, Verdict) {
        let datagram = self.clients[at].says(&self.server, self.number, message);
        let verdict = self
            .server
            .handle(&datagram, datagram.len(), from, self.now);
        (datagram.len(), verdict)
    }

    /// A question for a challenge, and the challenge.
    fn asks(&mut self, at: usize, generation: u32, from: Leg) -> Handshake {
        let hello = self.hello(at, generation);
        let (length, verdict) = self.says(at, &Message::Bind(hello), from);
        let Verdict::Answer(answer) = verdict else {
            panic!("{verdict:?}");
        };
        assert_eq!(answer.len(), length, "no amplifier");
        let challenge = self.clients[at].hears(&self.server, &answer);
        let expected = Handshake {
            challenge: challenge.challenge,
            ..hello
        };
        assert_eq!(challenge, expected);
        challenge
    }

    fn bind(&mut self, at: usize, generation: u32, from: Leg) {
        let challenge = self.asks(at, generation, from);
        let (_, verdict) = self.says(at, &Message::Answer(challenge), from);
        assert_eq!(verdict, Verdict::Bound);
    }

    fn data(&mut self, from: Leg) -> Verdict {
        let header = Header {
            inner: Inner::WireGuard,
            control: false,
            number: self.number,
        };
        let run = [&header.bytes()[..], &[4; 100]].concat();
        self.server.handle(&run, STRIDE, from, self.now)
    }
}

#[test]
fn what_comes_from_one_end_goes_to_the_other() {
    let mut rig = Rig::new();
    assert_eq!(rig.data(leg(1)), Verdict::Drop(Reason::Stranger));
    rig.bind(0, 1, leg(1));
    assert_eq!(rig.data(leg(1)), Verdict::Drop(Reason::Unbound));
    assert_eq!(rig.server.stats().connecting, 1);
    rig.bind(1, 9, leg(2));
    assert_eq!(rig.data(leg(1)), Verdict::Carry(leg(2)));
    assert_eq!(rig.data(leg(2)), Verdict::Carry(leg(1)));
    assert_eq!(rig.data(leg(3)), Verdict::Drop(Reason::Stranger));
    let stats = rig.server.stats();
    assert_eq!((stats.connecting, stats.open), (0, 1));
    let carried = Count {
        packets: 2,
        bytes: 216,
    };
    assert_eq!(stats.carried[0][0], carried);
    assert_eq!(stats.dropped, [0, 0, 2, 1, 0, 0, 0]);
}

#[test]
fn nothing_passes_from_one_place_to_another() {
    let mut rig = Rig::open();
    let mut third = client(3);
    let (first, key) = (rig.clients[0].key, third.key);
    let other = rig.server.allocate(first, [first, key], rig.now).unwrap();
    // The end that both places have is elsewhere in each.
    for (client, remote, from) in [(&mut rig.clients[0], key, 5), (&mut third, first, 6)] {
        let ask = Message::Bind(hello(other.number, 1, remote));
        let ask = client.says(&rig.server, other.number, &ask);
        let Verdict::Answer(answer) = rig.server.handle(&ask, STRIDE, leg(from), rig.now) else {
            panic!("no challenge");
        };
        let challenge = client.hears(&rig.server, &answer);
        let answer = client.says(&rig.server, other.number, &Message::Answer(challenge));
        let verdict = rig.server.handle(&answer, STRIDE, leg(from), rig.now);
        assert_eq!(verdict, Verdict::Bound);
    }
    let own = rig.number;
    for (number, from, to) in [
        (own, 1, Ok(2)),
        (own, 5, Err(Reason::Stranger)),
        (own, 6, Err(Reason::Stranger)),
        (other.number, 5, Ok(6)),
        (other.number, 6, Ok(5)),
        (other.number, 1, Err(Reason::Stranger)),
        (other.number, 2, Err(Reason::Stranger)),
        (other.number + 1, 1, Err(Reason::Unknown)),
    ] {
        rig.number = number;
        let expected = match to {
            Ok(port) => Verdict::Carry(leg(port)),
            Err(reason) => Verdict::Drop(reason),
        };
        assert_eq!(rig.data(leg(from)), expected, "{number} {from}");
    }
    // Nor does a challenge of one place open another.
    rig.number = own;
    let challenge = rig.asks(0, 4, leg(7));
    let wrong = Message::Answer(challenge);
    let wrong = rig.clients[0].says(&rig.server, rig.number, &wrong);
    let mut moved = Header::to_relay(other.number).bytes().to_vec();
    moved.extend(&wrong[geneve::LEN..]);
    let verdict = rig.server.handle(&moved, STRIDE, leg(7), rig.now);
    assert_eq!(verdict, Verdict::Drop(Reason::Refused));
}

#[test]
fn an_end_may_move() {
    let mut rig = Rig::open();
    rig.bind(0, 2, leg(11));
    assert_eq!(rig.data(leg(1)), Verdict::Drop(Reason::Stranger));
    assert_eq!(rig.data(leg(11)), Verdict::Carry(leg(2)));
    assert_eq!(rig.data(leg(2)), Verdict::Carry(leg(11)));
    let none = Message::Bind(rig.hello(0, 0));
    assert_eq!(
        rig.says(0, &none, leg(12)).1,
        Verdict::Drop(Reason::Refused)
    );
    // A NAT may give one's port to the other.
    rig.bind(1, 2, leg(11));
    assert_eq!(rig.data(leg(11)), Verdict::Drop(Reason::Unbound));
    assert_eq!(rig.data(leg(2)), Verdict::Drop(Reason::Stranger));
    rig.bind(0, 3, leg(12));
    assert_eq!(rig.data(leg(11)), Verdict::Carry(leg(12)));
    // Whoever has heard what was said then repeats it in vain.
    let hello = rig.hello(0, 3);
    let (_, verdict) = rig.says(0, &Message::Bind(hello), leg(13));
    assert_eq!(verdict, Verdict::Drop(Reason::Refused));
}

#[test]
fn a_challenge_is_for_one_address_one_try_and_some_minutes() {
    let mut rig = Rig::new();
    let refused = Verdict::Drop(Reason::Refused);
    let challenge = rig.asks(0, 1, leg(1));
    let answer = Message::Answer(challenge);
    assert_eq!(rig.says(0, &answer, leg(2)).1, refused);
    let other = Message::Answer(Handshake {
        generation: 2,
        ..challenge
    });
    assert_eq!(rig.says(0, &other, leg(1)).1, refused);
    let other = Message::Answer(Handshake {
        challenge: [0; 32],
        ..challenge
    });
    assert_eq!(rig.says(0, &other, leg(1)).1, refused);
    assert_eq!(rig.says(0, &answer, leg(1)).1, Verdict::Bound);
    // Once.
    assert_eq!(rig.says(0, &answer, leg(1)).1, refused);
    rig.bind(1, 1, leg(2));
    for (age, holds) in [(1, true), (2, true), (4, false)] {
        let generation = 10 + age;
        let challenge = rig.asks(0, generation, leg(3));
        for _ in 0..age {
            // Both ends go on.
            rig.now += Duration::from_secs(60);
            rig.asks(1, generation + rig.number, leg(2));
            rig.data(leg(1));
            rig.data(leg(3));
            rig.data(leg(2));
        }
        let verdict = rig.says(0, &Message::Answer(challenge), leg(3)).1;
        assert_eq!(verdict == Verdict::Bound, holds, "{age}: {verdict:?}");
    }
}

#[test]
fn what_is_not_said_by_an_end_is_refused() {
    let mut rig = Rig::new();
    let refused = Verdict::Drop(Reason::Refused);
    let good = rig.hello(0, 1);
    let third = client(3).key;
    for wrong in [
        Message::Bind(Handshake {
            generation: 0,
            ..good
        }),
        Message::Bind(Handshake {
            number: rig.number + 1,
            ..good
        }),
        Message::Bind(Handshake {
            remote: third,
            ..good
        }),
        Message::Bind(Handshake {
            remote: rig.clients[0].key,
            ..good
        }),
        Message::Answer(good),
        Message::Challenge(good),
        Message::Allocate {
            clients: [third, third],
            generation: 1,
        },
    ] {
        assert_eq!(rig.says(0, &wrong, leg(1)).1, refused, "{wrong:?}");
    }
    // Somebody else, and somebody else who says that it is an end.
    let mut stranger = client(3);
    let datagram = stranger.says(&rig.server, rig.number, &Message::Bind(good));
    let verdict = rig.server.handle(&datagram, STRIDE, leg(1), rig.now);
    assert_eq!(verdict, refused);
    let mut forged = datagram;
    forged[geneve::LEN + 6..][..32].copy_from_slice(rig.clients[0].key.as_bytes());
    let verdict = rig.server.handle(&forged, STRIDE, leg(1), rig.now);
    assert_eq!(verdict, refused);
    // Nothing of it has come in the way.
    rig.bind(0, 1, leg(1));
}

#[test]
fn places_end() {
    // Without both ends.
    let mut rig = Rig::new();
    rig.bind(0, 1, leg(1));
    rig.now += BIND + Duration::from_secs(1);
    assert_eq!(rig.data(leg(1)), Verdict::Drop(Reason::Unknown));
    let due = rig.server.poll_timeout().unwrap();
    rig.server.handle_timeout(due.max(rig.now));
    assert_eq!(rig.server.poll_timeout(), None);
    assert_eq!(rig.server.stats().missed, 0, "one end was heard");
    // With one that is silent.
    let mut rig = Rig::open();
    for _ in 0..2 {
        rig.now += LASTS;
        assert_eq!(rig.data(leg(1)), Verdict::Carry(leg(2)));
        assert_eq!(rig.data(leg(2)), Verdict::Carry(leg(1)));
    }
    rig.now += LASTS;
    assert_eq!(rig.data(leg(1)), Verdict::Carry(leg(2)));
    rig.now += Duration::from_secs(1);
    assert_eq!(rig.data(leg(1)), Verdict::Drop(Reason::Unknown));
    // The same two get another place then.
    let keys = [0, 1].map(|at| rig.clients[at].key);
    let again = rig.server.allocate(keys[0], keys, rig.now).unwrap();
    assert!(again.number != rig.number && again.lamport == 2);
}

#[test]
fn a_pair_has_one_place_and_asking_again_gives_it_time() {
    let mut rig = Rig::new();
    let keys = [0, 1].map(|at| rig.clients[at].key);
    let first = rig.server.allocate(keys[1], keys, rig.now).unwrap();
    for _ in 0..3 {
        rig.now += BIND;
        assert_eq!(
            rig.server.allocate(keys[0], keys, rig.now),
            Ok(first.clone())
        );
    }
    assert_eq!(first.number, rig.number);
    rig.bind(0, 1, leg(1));
}

#[test]
fn only_pairs_of_the_asker_have_places_and_not_too_many() {
    let (mut server, now) = (server(), Instant::now());
    let [one, two, three] = [1, 2, 3].map(|digit| client(digit).key);
    for (asker, pair) in [
        (one, [one, one]),
        (three, [one, two]),
        (one, [one, server.key()]),
    ] {
        assert_eq!(server.allocate(asker, pair, now), Err(Refusal::NoPair));
    }
    let key = |number: u32| {
        let mut bytes = [9; 32];
        bytes[..4].copy_from_slice(&number.to_be_bytes());
        DiscoPublic::from_bytes(bytes)
    };
    let (mut number, mut lamport) = (0, 0);
    for asker in 0..(MOST / MOST_OF_ONE) as u32 {
        let asker = key(u32::MAX - asker);
        for _ in 0..MOST_OF_ONE {
            number += 1;
            let place = server.allocate(asker, [asker, key(number)], now).unwrap();
            assert!(place.lamport > lamport && (1..=LAST).contains(&place.number));
            lamport = place.lamport;
        }
        let more = server.allocate(asker, [asker, one], now);
        assert_eq!(more, Err(Refusal::Full));
    }
    assert_eq!(server.allocate(one, [one, two], now), Err(Refusal::Full));
    let numbers: BTreeSet<_> = server.by_clients.values().collect();
    assert_eq!(numbers.len(), MOST);
    // Time makes room.
    let later = now + BIND + Duration::from_secs(1);
    server.allocate(one, [one, two], later).unwrap();
    let stats = server.stats();
    assert_eq!((stats.connecting, stats.missed), (1, MOST as u64));
    assert_eq!(stats.refused, 3 + (MOST / MOST_OF_ONE) as u64 + 1);
}

#[test]
fn without_random_bytes_nothing_is_bound() {
    let mut rig = Rig::new();
    rig.server.random = Box::new(|_| false);
    let hello = rig.hello(0, 1);
    let (_, verdict) = rig.says(0, &Message::Bind(hello), leg(1));
    assert_eq!(verdict, Verdict::Drop(Reason::Refused));
}

#[test]
fn datagrams_with_one_header_are_a_run() {
    let head = |number| Header {
        inner: Inner::WireGuard,
        control: false,
        number,
    };
    let datagram = |header: Header, length: usize| {
        let mut bytes = header.bytes().to_vec();
        bytes.resize(length, 1);
        bytes
    };
    let control = Header::to_relay(1);
    let all = [
        datagram(head(1), 50),
        datagram(head(1), 50),
        datagram(head(2), 50),
        datagram(control, 50),
        datagram(control, 50),
        datagram(Header::to_peer(1), 50),
        vec![9; 50],
        vec![9; 50],
        datagram(head(1), 50),
        datagram(head(1), 20),
    ];
    let bytes = all.concat();
    let lengths: Vec<_> = runs(&bytes, 50).map(<[u8]>::len).collect();
    assert_eq!(lengths, [100, 50, 50, 50, 50, 50, 50, 70]);
    let mut short = datagram(head(1), 100);
    short.extend([0; 5]);
    let lengths: Vec<_> = runs(&short, 100).map(<[u8]>::len).collect();
    assert_eq!(lengths, [100, 5]);
    assert_eq!(runs(&[], 0).count(), 0);
}

/// What somebody does who may see and repeat everything.
#[derive(Clone, Debug)]
enum Deed {
    Says(usize, bool, u32, u16),
    Repeats(usize, u16),
    Data(bool, u16),
    Bytes(Vec<u8>, u16),
    Waits(u64),
}

fn deed() -> impl Strategy<Value = Deed> {
    let port = 1..4_u16;
    prop_oneof![
        (0..2_usize, any::<bool>(), 0..4_u32, port.clone())
            .prop_map(|(at, answers, generation, from)| Deed::Says(at, answers, generation, from)),
        (any::<usize>(), port.clone()).prop_map(|(which, from)| Deed::Repeats(which, from)),
        (any::<bool>(), port.clone()).prop_map(|(same, from)| Deed::Data(same, from)),
        (proptest::collection::vec(any::<u8>(), 0..80), port)
            .prop_map(|(bytes, from)| Deed::Bytes(bytes, from)),
        (0..200_u64).prop_map(Deed::Waits),
    ]
}

proptest! {
    /// Nothing goes to an address that has not shown that it hears, nobody's own datagrams come back, and no answer is
    /// longer than its question.
    #[test]
    fn whatever_is_sent_the_relay_is_no_amplifier(deeds in proptest::collection::vec(deed(), 1..60)) {
        let mut rig = Rig::new();
        let mut sent: Vec<Vec<u8>> = Vec::new();
        let mut last = [None; 2];
        // Whoever has a challenge for an address hears what is sent there.
        let mut bound: [Option<Leg>; 2] = [None; 2];
        for deed in deeds {
            let (datagram, from) = match deed {
                Deed::Says(at, answers, generation, from) => {
                    let hello = rig.hello(at, generation);
                    let message = match last[at].filter(|_| answers) {
                        Some(challenge) => Message::Answer(challenge),
                        None => Message::Bind(hello),
                    };
                    (rig.clients[at].says(&rig.server, rig.number, &message), from)
                }
                Deed::Repeats(which, from) if !sent.is_empty() => (sent[which % sent.len()].clone(), from),
                Deed::Repeats(..) => continue,
                Deed::Data(same, from) => {
                    let number = if same { rig.number } else { rig.number + 1 };
                    let header = Header { inner: Inner::WireGuard, control: false, number };
                    ([&header.bytes()[..], &[4; 30]].concat(), from)
                }
                Deed::Bytes(bytes, from) => (bytes, from),
                Deed::Waits(seconds) => {
                    rig.now += Duration::from_secs(seconds);
                    rig.server.handle_timeout(rig.now);
                    continue;
                }
            };
            let from = leg(from);
            let verdict = rig.server.handle(&datagram, STRIDE, from, rig.now);
            sent.push(datagram.clone());
            match verdict {
                Verdict::Answer(answer) => {
                    prop_assert!(answer.len() <= datagram.len());
                    let (_, sealed) = Header::parse(&answer).unwrap();
                    let key = rig.server.key();
                    for (client, last) in rig.clients.iter_mut().zip(&mut last) {
                        let Some(clear) = client.boxes.open_clear(&key, sealed) else { continue };
                        if let Some(Message::Challenge(challenge)) = Message::parse(&clear) {
                            *last = Some(challenge);
                        }
                    }
                }
                Verdict::Bound => {
                    let sender = disco::sender(&datagram[geneve::LEN..]).unwrap();
                    let at = rig.clients.iter().position(|client| client.key == sender).unwrap();
                    bound[at] = Some(from);
                    if bound[1 - at] == Some(from) {
                        bound[1 - at] = None;
                    }
                }
                Verdict::Carry(to) => {
                    let at = bound.iter().position(|leg| *leg == Some(from));
                    let other = at.map(|at| bound[1 - at]);
                    prop_assert_eq!(other, Some(Some(to)));
                    prop_assert!(to != from, "nobody's own datagrams come back");
                }
                Verdict::Drop(_) => {}
            }
        }
    }

    #[test]
    fn runs_are_the_buffer(bytes in proptest::collection::vec(prop_oneof![Just(0_u8), Just(0x7a), Just(0x12), any::<u8>()], 0..200), stride in 0..40_usize) {
        let all: Vec<_> = runs(&bytes, stride).collect();
        prop_assert_eq!(all.concat(), bytes.clone());
        let stride = stride.max(1);
        for run in &all[..all.len().saturating_sub(1)] {
            prop_assert_eq!(run.len() % stride, 0);
        }
        for run in all {
            let heads: BTreeSet<_> = run.chunks(stride).map(|one| one.get(..geneve::LEN)).collect();
            prop_assert_eq!(heads.len(), 1);
        }
    }
}

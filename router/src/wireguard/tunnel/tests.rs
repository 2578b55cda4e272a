#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::super::clock;
use super::super::keys::PrivateKey;
use super::*;

/// Collects sealed messages and opened packets.
#[derive(Default)]
struct Heap {
    slot: Vec<u8>,
    all: Vec<Vec<u8>>,
    refused: Vec<Refused>,
}

impl Arena for Heap {
    fn slot(&mut self, length: usize) -> &mut [u8] {
        self.slot = vec![0; length];
        &mut self.slot
    }

    fn filled(&mut self, length: usize) {
        self.all.push(self.slot[..length].to_vec());
    }
}

impl Opened for Heap {
    fn slot(&mut self) -> &mut [u8] {
        self.slot = vec![0; 2000];
        &mut self.slot
    }

    fn packet(&mut self, length: usize) {
        self.all.push(self.slot[..length].to_vec());
    }

    fn refused(&mut self, why: Refused) {
        self.refused.push(why);
    }
}

struct Listed<'a>(std::slice::Iter<'a, &'a [u8]>);

impl Packets for Listed<'_> {
    fn next(&mut self) -> Option<&[u8]> {
        self.0.next().copied()
    }
}

fn pair() -> (Tunnel, Tunnel) {
    let keys = [1, 2].map(|seed| LocalKey::new(&PrivateKey::from_bytes([seed; 32])));
    let tunnel = |own: usize, index| Tunnel::new(&keys[own], &keys[1 - own].public(), None, index);
    (tunnel(0, 0x00ab_cdef), tunnel(1, 0x0012_3456))
}

const START: Duration = Duration::ZERO;

fn open(tunnel: &mut Tunnel, messages: &[&[u8]], opened: &mut Heap) -> (u64, Completed) {
    let Some(Kind::Data(index)) = message::kind(messages[0]) else {
        panic!("no data message");
    };
    tunnel.open(index, messages.iter().copied(), START, opened)
}

fn seal(tunnel: &mut Tunnel, packets: &[&[u8]]) -> (u64, Vec<Vec<u8>>) {
    let mut sealed = Heap::default();
    let bytes = tunnel.seal(&mut Listed(packets.iter()), START, &mut sealed);
    (bytes, sealed.all)
}

fn connected() -> (Tunnel, Tunnel) {
    let (mut client, mut router) = pair();
    let (mut one, mut two, mut three) = ([0; INITIATION], [0; INITIATION], [0; INITIATION]);
    assert!(client.want(START));
    let length = client.tick(START, &mut one).message.unwrap();
    let (length, completed) = router.handshake(&one[..length], START, &mut two).unwrap();
    assert!(
        !completed && !router.ready(START),
        "the initiator has yet to prove itself"
    );
    let (length, completed) = client
        .handshake(&two[..length.unwrap()], START, &mut three)
        .unwrap();
    assert!(completed && client.ready(START));
    let keepalive = &three[..length.unwrap()];
    let mut opened = Heap::default();
    let result = open(&mut router, &[keepalive], &mut opened);
    assert_eq!(result, (keepalive.len() as u64, true));
    assert!(router.ready(START));
    (client, router)
}

/// A small IPv4 packet, padded.
fn packet(serial: u8) -> [u8; 32] {
    let mut packet = [0; 32];
    packet[..4].copy_from_slice(&[0x45, 0, 0, 30]);
    packet[29] = serial;
    packet
}

#[test]
fn receiver_indices_begin_with_the_given_bits() {
    let (mut client, mut router) = pair();
    let (mut one, mut two) = ([0; INITIATION], [0; INITIATION]);
    assert!(client.want(START));
    client.tick(START, &mut one).message.unwrap();
    let (length, _) = router.handshake(&one, START, &mut two).unwrap();
    assert_eq!(
        message::sender(&one).map(|index| index >> 8),
        Some(0x00ab_cdef)
    );
    let response = &two[..length.unwrap()];
    assert_eq!(
        message::sender(response).map(|index| index >> 8),
        Some(0x0012_3456)
    );
}

#[test]
fn padding_is_sent_and_taken_off() {
    let (mut client, mut router) = connected();
    let plain = [packet(1), packet(2)];
    let (bytes, sealed) = seal(&mut client, &plain.each_ref().map(|p| p.as_slice()));
    assert_eq!(bytes, 128);
    let mut opened = Heap::default();
    let result = open(&mut router, &[&sealed[0], &sealed[1]], &mut opened);
    assert_eq!(result, (128, false));
    assert_eq!(opened.all, plain.map(|p| p[..30].to_vec()));
}

#[test]
fn counters_beyond_the_last_are_refused_before_any_work() {
    let (mut client, mut router) = connected();
    let (_, mut sealed) = seal(&mut client, &[&packet(1)]);
    sealed[0][8..16].copy_from_slice(&REJECT_AFTER_MESSAGES.to_le_bytes());
    let mut opened = Heap::default();
    open(&mut router, &[&sealed[0]], &mut opened);
    assert_eq!(opened.refused, [Refused::Replay]);
}

#[test]
fn handshakes_with_keys_of_small_order_are_refused() {
    let (mut client, mut router) = pair();
    let mut one = [0; INITIATION];
    assert!(client.want(START));
    client.tick(START, &mut one).message.unwrap();
    one[8..40].fill(0);
    assert_eq!(
        router.handshake(&one, START, &mut [0; INITIATION]),
        Err(Refused::Handshake)
    );
}

#[test]
fn an_unconfirmed_session_is_not_sent_with() {
    let (mut client, mut router) = pair();
    // boringtun has eight slots for sessions; one of them counts as current from the start.
    for _ in 0..2 * SLOTS {
        let (mut one, mut two) = ([0; INITIATION], [0; INITIATION]);
        client.initiate_again(&mut one);
        router.handshake(&one, START, &mut two).unwrap();
        router.tick(START, &mut two);
        assert!(!router.ready(START));
    }
}

#[test]
fn lost_responses_do_not_end_the_live_session() {
    let (mut client, mut router) = connected();
    let mut two = [0; INITIATION];
    for lost in 0..3 * SLOTS as u8 {
        let mut one = [0; INITIATION];
        client.initiate_again(&mut one);
        assert!(router.handshake(&one, START, &mut two).is_ok());
        assert!(router.ready(START), "after {lost}");
        let (_, sealed) = seal(&mut router, &[&packet(lost)]);
        let mut opened = Heap::default();
        assert_eq!(
            open(&mut client, &[&sealed[0]], &mut opened).0,
            64,
            "after {lost}"
        );
        let (_, sealed) = seal(&mut client, &[&packet(lost)]);
        assert_eq!(
            open(&mut router, &[&sealed[0]], &mut opened).0,
            64,
            "after {lost}"
        );
    }
    // The last response does arrive: its session takes over.
    let (length, completed) = client
        .handshake(&two[..92], START, &mut [0; INITIATION])
        .unwrap();
    assert!(length.is_some() && completed);
    let (_, sealed) = seal(&mut client, &[&packet(0)]);
    let mut opened = Heap::default();
    assert_eq!(open(&mut router, &[&sealed[0]], &mut opened), (64, true));
}

#[test]
fn an_old_initiation_stays_refused_when_the_preshared_key_changes() {
    let [client_key, router_key] =
        [1, 2].map(|seed| LocalKey::new(&PrivateKey::from_bytes([seed; 32])));
    let (mut client, mut router) = connected();
    let initiation = |client: &mut Tunnel| {
        let mut initiation = [0; INITIATION];
        client.initiate_again(&mut initiation);
        initiation
    };
    let [first, second] = [0; 2].map(|_| initiation(&mut client));
    assert!(
        router
            .handshake(&second, START, &mut [0; INITIATION])
            .is_ok()
    );
    // Twice, without a handshake in between.
    for seed in [5, 6] {
        let preshared = PresharedKey::from_bytes([seed; 32]);
        router.set_preshared(&router_key, Some(&preshared));
        client.set_preshared(&client_key, Some(&preshared));
        assert!(!router.ready(START) && !client.ready(START));
        for old in [&first, &second] {
            let answer = router.handshake(old, START, &mut [0; INITIATION]);
            assert_eq!(answer, Err(Refused::Handshake));
        }
    }
    for _ in 0..2 {
        let third = initiation(&mut client);
        let mut response = [0; INITIATION];
        let (length, _) = router.handshake(&third, START, &mut response).unwrap();
        let response = &response[..length.unwrap()];
        let (_, completed) = client
            .handshake(response, START, &mut [0; INITIATION])
            .unwrap();
        assert!(completed, "both have the new key");
        for old in [&first, &second, &third] {
            let answer = router.handshake(old, START, &mut [0; INITIATION]);
            assert_eq!(answer, Err(Refused::Handshake));
        }
    }
}

#[test]
fn a_corrected_clock_is_noticed_between_sessions() {
    let (client, _) = pair();
    assert!(!client.is_behind());
    clock::correct_wall(3600);
    assert!(client.is_behind());
    clock::correct_wall(-3600);
    let (client, _) = connected();
    clock::correct_wall(3600);
    assert!(!client.is_behind());
}

#[test]
fn no_session_seals_nothing() {
    let (mut client, _) = pair();
    let (bytes, sealed) = seal(&mut client, &[&packet(1)]);
    assert_eq!((bytes, sealed.len()), (0, 0));
}

use proptest::prelude::*;

use super::*;
use crate::uapi::{Parser, Request};

const A: u8 = 0xa0;
const B: u8 = 0xb0;

fn public(byte: u8) -> PublicKey {
    PublicKey([byte; 32])
}

fn hex(byte: u8) -> String {
    format!("{byte:02x}").repeat(32)
}

fn edit(interface: &Interface, lines: &str) -> Result<Edited, Refusal> {
    let mut parser = Parser::new(|_| None);
    let text = format!("set=1\n{lines}\n\n");
    match parser.next(&mut text.as_bytes()) {
        Some(Request::Set(set)) => interface.edit(&set),
        other => panic!("{lines}: {other:?}"),
    }
}

/// Carries out one set after the other.
fn after(sets: &[&str]) -> Interface {
    let mut interface = Interface::default();
    for lines in sets {
        interface = edit(&interface, lines).unwrap().interface;
    }
    interface
}

/// What a `get` shows of allowed IPs, by peer.
fn allowed(interface: &Interface) -> Vec<(PublicKey, Vec<String>)> {
    let state = interface.state(0, Vec::new());
    let peers = state.peers.into_iter().map(|peer| {
        let cidrs = peer.allowed_ips.iter().map(ToString::to_string);
        (peer.public_key, cidrs.collect())
    });
    peers.collect()
}

fn peers_a_and_b() -> Interface {
    let (a, b) = (hex(A), hex(B));
    after(&[&format!(
        "private_key={}\npublic_key={b}\nallowed_ip=10.0.0.2/32\nallowed_ip=10.0.1.0/24\n\
         public_key={a}\nallowed_ip=10.0.0.1/32\nendpoint=192.0.2.1:1\n\
         persistent_keepalive_interval=5",
        hex(1)
    )])
}

#[test]
fn peers_stand_in_the_order_they_came() {
    let interface = peers_a_and_b();
    let cidrs = |list: &[&str]| list.iter().map(|c| (*c).to_owned()).collect::<Vec<_>>();
    assert_eq!(
        allowed(&interface),
        [
            (public(B), cidrs(&["10.0.0.2/32", "10.0.1.0/24"])),
            (public(A), cidrs(&["10.0.0.1/32"])),
        ]
    );
}

#[test]
fn an_allowed_ip_moves_to_whom_it_is_given_last() {
    let set = format!("public_key={}\nallowed_ip=10.0.1.7/24", hex(A));
    let interface = edit(&peers_a_and_b(), &set).unwrap().interface;
    let [(_, b), (_, a)] = allowed(&interface).try_into().unwrap();
    assert_eq!(
        (b, a),
        (
            vec!["10.0.0.2/32".to_owned()],
            vec!["10.0.0.1/32".to_owned(), "10.0.1.0/24".to_owned()]
        )
    );
}

#[test]
fn only_ones_own_allowed_ip_can_be_taken_away() {
    let other = format!("public_key={}\nallowed_ip=-10.0.0.2/32", hex(A));
    let own = format!("public_key={}\nallowed_ip=-10.0.0.2/32", hex(B));
    let before = peers_a_and_b();
    assert_eq!(
        allowed(&edit(&before, &other).unwrap().interface),
        allowed(&before)
    );
    let after = edit(&before, &own).unwrap().interface;
    assert_eq!(allowed(&after)[0].1, ["10.0.1.0/24"]);
    // In order: given, taken, given again.
    let text = format!("{own}\nallowed_ip=10.0.0.2/32\nallowed_ip=-10.0.1.0/24");
    let after = edit(&before, &text).unwrap().interface;
    assert_eq!(allowed(&after)[0].1, ["10.0.0.2/32"]);
}

#[test]
fn replacing_frees_allowed_ips_for_others_in_the_same_set() {
    let text = format!(
        "public_key={}\nreplace_allowed_ips=true\npublic_key={}\nallowed_ip=-10.0.0.2/32\n\
         allowed_ip=10.0.0.2/32",
        hex(B),
        hex(A)
    );
    let interface = edit(&peers_a_and_b(), &text).unwrap().interface;
    let [(_, b), (_, a)] = allowed(&interface).try_into().unwrap();
    assert_eq!((b.len(), a.len()), (0, 2));
    // Given and cleared away: whose it was before has lost it all the same.
    let text = format!(
        "public_key={}\nallowed_ip=10.0.0.2/32\nreplace_allowed_ips=true",
        hex(A)
    );
    let interface = edit(&peers_a_and_b(), &text).unwrap().interface;
    let [(_, b), (_, a)] = allowed(&interface).try_into().unwrap();
    assert_eq!((b.len(), a.len()), (1, 0));
}

#[test]
fn peers_come_go_and_are_only_updated() {
    let before = peers_a_and_b();
    let keys = |interface: &Interface| -> Vec<PublicKey> {
        allowed(interface).into_iter().map(|(key, _)| key).collect()
    };
    let cases = [
        (format!("public_key={}\nremove=true", hex(A)), vec![B]),
        (format!("public_key={}\nremove=true", hex(0xc0)), vec![B, A]),
        (
            format!("public_key={}\nupdate_only=true", hex(0xc0)),
            vec![B, A],
        ),
        (
            format!(
                "public_key={}\nallowed_ip=10.9.0.0/16\nupdate_only=true",
                hex(0xc0)
            ),
            vec![B, A],
        ),
        (format!("public_key={}", hex(0xc0)), vec![B, A, 0xc0]),
        (
            format!("replace_peers=true\npublic_key={}", hex(0xc0)),
            vec![0xc0],
        ),
        // Away and back: the last in the row now.
        (
            format!("public_key={0}\nremove=true\npublic_key={0}", hex(B)),
            vec![A, B],
        ),
    ];
    for (text, expected) in cases {
        let after = edit(&before, &text).unwrap().interface;
        let expected: Vec<_> = expected.into_iter().map(public).collect();
        assert_eq!(keys(&after), expected, "{text}");
    }
}

#[test]
fn who_went_and_came_again_is_new() {
    let before = peers_a_and_b();
    for (text, renewed) in [
        (
            format!("public_key={0}\nremove=true\npublic_key={0}", hex(B)),
            vec![B],
        ),
        (
            format!("replace_peers=true\npublic_key={}", hex(A)),
            vec![A],
        ),
        (format!("public_key={}\nremove=true", hex(A)), vec![]),
        (
            format!("public_key={}\nreplace_allowed_ips=true", hex(A)),
            vec![],
        ),
        (format!("public_key={}", hex(0xc0)), vec![]),
    ] {
        let renewed: HashSet<_> = renewed.into_iter().map(public).collect();
        assert_eq!(edit(&before, &text).unwrap().renewed, renewed, "{text}");
    }
}

#[test]
fn what_is_not_named_stays() {
    let text = format!("public_key={}\nendpoint=192.0.2.1:2", hex(A));
    let edited = edit(&peers_a_and_b(), &text).unwrap();
    assert_eq!(edited.listen_port, None);
    let state = edited.interface.state(0, Vec::new());
    let peer = &state.peers[1];
    assert_eq!((peer.keepalive, peer.allowed_ips.len()), (5, 1));
    assert_eq!(peer.endpoint, Some("192.0.2.1:2".parse().unwrap()));
    assert_eq!(
        edited.endpoints,
        [(public(A), "192.0.2.1:2".parse().unwrap())]
    );
    assert!(state.private_key.is_some());
}

#[test]
fn an_endpoint_named_again_counts_though_nothing_changes() {
    let text = format!("public_key={}\nendpoint=192.0.2.1:1", hex(A));
    let edited = edit(&peers_a_and_b(), &text).unwrap();
    assert_eq!(edited.interface, peers_a_and_b());
    assert_eq!(edited.endpoints.len(), 1);
}

#[test]
fn the_endpoint_of_nobody_is_nobodys() {
    let key = hex(0xc0);
    let endpoint = "endpoint=192.0.2.1:1";
    for text in [
        format!("public_key={key}\nupdate_only=true\n{endpoint}\npublic_key={key}"),
        format!("public_key={key}\n{endpoint}\npublic_key={key}\nremove=true\npublic_key={key}"),
    ] {
        let edited = edit(&peers_a_and_b(), &text).unwrap();
        assert_eq!(edited.endpoints, [], "{text}");
        assert_eq!(
            edited.interface.state(0, Vec::new()).peers[2].endpoint,
            None
        );
    }
}

#[test]
fn a_device_is_not_its_own_peer() {
    let key = PrivateKey::from_bytes([7; 32]);
    let own = hex_of(&key.public());
    let with_peer = after(&[&format!("public_key={own}\npublic_key={}", hex(A))]);
    assert_eq!(allowed(&with_peer).len(), 2);
    let text = format!("private_key={}", hex(7));
    let keyed = edit(&with_peer, &text).unwrap().interface;
    assert_eq!(allowed(&keyed).len(), 1);
    let again = edit(&keyed, &format!("public_key={own}\nallowed_ip=10.0.0.0/8"));
    assert_eq!(again.unwrap().interface, keyed);
}

fn hex_of(key: &PublicKey) -> String {
    key.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_key_without_strength_is_refused_and_nothing_is_done() {
    let text = format!(
        "listen_port=5\npublic_key={}\npublic_key={}",
        hex(A),
        hex(0)
    );
    let refusal = edit(&Interface::default(), &text).unwrap_err();
    assert_eq!(refusal.errno, Errno::Invalid);
}

#[test]
fn without_a_private_key_the_engine_has_no_peers() {
    let interface = peers_a_and_b();
    assert_eq!(interface.specs().len(), 2);
    let text = format!("private_key={}", hex(0));
    let silent = edit(&interface, &text).unwrap().interface;
    assert!(silent.specs().is_empty());
    assert_eq!(allowed(&silent), allowed(&interface));
}

#[test]
fn a_get_shows_what_wireguard_go_shows() {
    let interface = after(&[&format!(
        "private_key={}\nfwmark=16\npublic_key={}\npreshared_key={}\nendpoint=[2001:db8::1]:5\n\
         allowed_ip=fd00::1/64",
        hex(0x48),
        hex(A),
        hex(2)
    )]);
    let last_handshake = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000, 7);
    let stats = PeerStats {
        public_key: public(A),
        path: Some("192.0.2.9:9".parse().unwrap()),
        last_handshake: Some(last_handshake),
        rx_bytes: 2224,
        tx_bytes: 38333,
        rx_packets: 2,
        tx_packets: 1,
        nowhere: None,
        uncut: false,
    };
    let expected = format!(
        "private_key={}\nlisten_port=51820\nfwmark=16\npublic_key={}\npreshared_key={}\n\
         protocol_version=1\nendpoint=192.0.2.9:9\nlast_handshake_time_sec=1000000\n\
         last_handshake_time_nsec=7\ntx_bytes=38333\nrx_bytes=2224\n\
         persistent_keepalive_interval=0\nallowed_ip=fd00::/64\n",
        hex(0x48),
        hex(A),
        hex(2)
    );
    assert_eq!(*interface.state(51820, vec![stats]).to_text(), expected);
    assert_eq!(*Interface::default().state(0, Vec::new()).to_text(), "");
}

/// A few peers and CIDRs, so that they meet.
fn any_set() -> impl Strategy<Value = Set> {
    let cidr = || (0_u8..4).prop_map(|n| format!("10.0.0.{n}/32").parse::<IpNet>().unwrap());
    let change = prop_oneof![
        4 => cidr().prop_map(AllowedIp::Add),
        1 => cidr().prop_map(AllowedIp::Remove),
        1 => Just(AllowedIp::Clear),
    ];
    let changes = prop::collection::vec(change, 0..3);
    let peer = (
        0_u8..4,
        any::<bool>(),
        any::<bool>(),
        prop::option::of(0_u16..3),
        changes,
    );
    let peer = peer.prop_map(
        |(key, remove, update_only, keepalive, allowed_ips)| PeerSet {
            public_key: public(0x10 + key),
            remove: remove && update_only,
            update_only,
            preshared_key: None,
            endpoint: None,
            keepalive,
            allowed_ips,
        },
    );
    let key = prop::option::weighted(0.1, prop::option::of(1_u8..3));
    (
        key,
        prop::bool::weighted(0.1),
        prop::collection::vec(peer, 0..3),
    )
        .prop_map(|(key, replace_peers, peers)| Set {
            private_key: key.map(|key| Some(PrivateKey::from_bytes([key?; 32]))),
            replace_peers,
            peers,
            ..Set::default()
        })
}

proptest! {
    #[test]
    fn what_a_set_changes_of_a_part_it_changes_of_the_whole(
        sets in prop::collection::vec(any_set(), 1..12),
    ) {
        let mut by_parts = peers_a_and_b();
        let mut whole = by_parts.clone();
        for set in sets {
            let part = by_parts.part(&set);
            let edited = part.edit(&set).unwrap();
            let wanted = whole.edit(&set).unwrap();
            prop_assert_eq!(&edited.renewed, &wanted.renewed);
            by_parts.put(&part, edited.interface);
            whole = wanted.interface;
            prop_assert_eq!(&by_parts, &whole);
        }
    }
}

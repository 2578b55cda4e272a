use proptest::prelude::*;

use super::*;

const KEY: &str = "e84b5a6d2717c1003a13b431570353dbaca9146cf150c5f8575680feba52027a";
const OTHER: &str = "b85996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33";

fn no_scope(_: &str) -> Option<u32> {
    None
}

/// All requests of a text that comes in pieces of `size` bytes, and what its end brings.
fn requests(text: &str, size: usize) -> Vec<Request> {
    let mut parser = Parser::new(|name| (name == "eth7").then_some(7));
    let mut found = Vec::new();
    for piece in text.as_bytes().chunks(size) {
        let mut input = piece;
        while let Some(request) = parser.next(&mut input) {
            found.push(request);
        }
        assert!(input.is_empty());
    }
    found.extend(parser.finish());
    found
}

fn set(lines: &str) -> Set {
    match requests(&format!("set=1\n{lines}\n\n"), 1000).as_slice() {
        [Request::Set(_)] => {}
        other => panic!("{lines}: {other:?}"),
    }
    match requests(&format!("set=1\n{lines}\n\n"), 1000).remove(0) {
        Request::Set(set) => set,
        other => panic!("{other:?}"),
    }
}

/// The error number for a `set` of these lines.
fn errno(lines: &str) -> Errno {
    match requests(&format!("set=1\n{lines}\n\nget=1\n\n"), 1000).as_slice() {
        // The connection goes on after the error.
        [Request::Refused(refusal), Request::Get] => refusal.errno,
        other => panic!("{lines}: {other:?}"),
    }
}

#[test]
fn every_key_is_understood() {
    let all = format!(
        "private_key={KEY}\nlisten_port=12912\nfwmark=4294967295\nreplace_peers=true\n\
         public_key={OTHER}\nupdate_only=true\npreshared_key={KEY}\n\
         endpoint=[abcd:23::33%2]:51820\npersistent_keepalive_interval=111\n\
         replace_allowed_ips=true\nallowed_ip=192.168.4.4/32\nallowed_ip=10.1.2.3/8\n\
         allowed_ip=-fe80::1/64\nprotocol_version=1\npublic_key={KEY}\nremove=true"
    );
    let got = set(&all);
    let key = hex(KEY).unwrap();
    assert_eq!(got.private_key, Some(Some(PrivateKey::from_bytes(key))));
    assert_eq!((got.listen_port, got.fwmark), (Some(12912), Some(u32::MAX)));
    assert!(got.replace_peers);
    let [first, second] = got.peers.try_into().unwrap();
    let expected = PeerSet {
        update_only: true,
        preshared_key: Some(Some(PresharedKey::from_bytes(key))),
        endpoint: Some("[abcd:23::33%2]:51820".parse().unwrap()),
        keepalive: Some(111),
        allowed_ips: vec![
            AllowedIp::Clear,
            AllowedIp::Add("192.168.4.4/32".parse().unwrap()),
            AllowedIp::Add("10.0.0.0/8".parse().unwrap()),
            AllowedIp::Remove("fe80::/64".parse().unwrap()),
        ],
        ..PeerSet::new(PublicKey(hex(OTHER).unwrap()))
    };
    assert_eq!(first, expected);
    assert_eq!(
        second,
        PeerSet {
            remove: true,
            ..PeerSet::new(PublicKey(key))
        }
    );
}

#[test]
fn zeros_take_a_key_away() {
    let zeros = "0".repeat(64);
    let got = set(&format!(
        "private_key={zeros}\npublic_key={OTHER}\npreshared_key={zeros}"
    ));
    assert_eq!(got.private_key, Some(None));
    assert_eq!(got.peers[0].preshared_key, Some(None));
}

#[test]
fn what_wireguard_go_takes_is_taken() {
    for line in [
        format!("private_key={}", KEY.to_uppercase()),
        "listen_port=0".to_owned(),
        "listen_port=065535".to_owned(),
        "fwmark=0".to_owned(),
        "listen_port=1\r".to_owned(),
        "listen_port=1\nlisten_port=2".to_owned(),
    ] {
        set(&line);
    }
    for line in [
        "endpoint=1.2.3.4:0",
        "endpoint=[::ffff:1.2.3.4]:5",
        "endpoint=[fe80::1%eth7]:5",
        "persistent_keepalive_interval=0",
        "persistent_keepalive_interval=65535",
        "allowed_ip=0.0.0.0/0",
        "allowed_ip=::/0",
        "allowed_ip=-10.0.0.1/32",
    ] {
        set(&format!("public_key={OTHER}\n{line}"));
    }
    let got = set(&format!("public_key={OTHER}\nendpoint=[fe80::1%eth7]:5"));
    let scoped = SocketAddrV6::new("fe80::1".parse().unwrap(), 5, 0, 7);
    assert_eq!(got.peers[0].endpoint, Some(scoped.into()));
    let got = set(&format!("public_key={OTHER}\nendpoint=[::ffff:1.2.3.4]:5"));
    assert_eq!(got.peers[0].endpoint, Some("1.2.3.4:5".parse().unwrap()));
}

#[test]
fn what_is_invalid_gets_einval() {
    let short = &KEY[1..];
    let device = [
        format!("private_key={short}"),
        format!("private_key={short}g"),
        format!("private_key={KEY}00"),
        format!("private_key=+{short}"),
        "listen_port=".to_owned(),
        "listen_port=65536".to_owned(),
        "listen_port=-1".to_owned(),
        "listen_port=+1".to_owned(),
        "listen_port= 1".to_owned(),
        "fwmark=".to_owned(),
        "fwmark=0x1".to_owned(),
        "fwmark=4294967296".to_owned(),
        "replace_peers=false".to_owned(),
        "replace_peers=".to_owned(),
        format!("public_key={short}"),
        "public_key=".to_owned(),
        "=".to_owned(),
        "unknown=1".to_owned(),
        "Listen_port=1".to_owned(),
        " listen_port=1".to_owned(),
        // Keys of peers before there is one.
        "endpoint=1.2.3.4:5".to_owned(),
        "protocol_version=1".to_owned(),
    ];
    for line in device {
        assert_eq!(errno(&line), Errno::Invalid, "{line}");
    }
    for line in [
        "remove=false",
        "update_only=1",
        "replace_allowed_ips=",
        "preshared_key=00",
        "endpoint=1.2.3.4",
        "endpoint=1.2.3.4:65536",
        "endpoint=example.com:51820",
        "endpoint=::1:5",
        "endpoint=[::1]",
        "endpoint=[fe80::1%nowhere]:5",
        "endpoint=[fe80::1%2]5",
        "endpoint=[fe80::1%2]:+5",
        "persistent_keepalive_interval=65536",
        "persistent_keepalive_interval=off",
        "allowed_ip=10.0.0.1",
        "allowed_ip=10.0.0.1/33",
        "allowed_ip=::/129",
        "allowed_ip=--10.0.0.1/32",
        "allowed_ip=",
        "protocol_version=2",
        // Keys of the device after a peer.
        "private_key=00",
        "listen_port=1",
        "replace_peers=true",
        "rx_bytes=1",
        "last_handshake_time_sec=1",
    ] {
        let text = format!("public_key={OTHER}\n{line}");
        assert_eq!(errno(&text), Errno::Invalid, "{line}");
    }
}

#[test]
fn what_is_no_pair_gets_eproto() {
    assert_eq!(errno("listen_port"), Errno::Protocol);
    assert_eq!(
        errno(&format!("public_key={OTHER}\n remove")),
        Errno::Protocol
    );
    let mut parser = Parser::new(no_scope);
    let mut input: &[u8] = b"set=1\nlisten_port=\xff\n";
    let Some(Request::Refused(refusal)) = parser.next(&mut input) else {
        panic!();
    };
    assert_eq!(refusal.errno, Errno::Protocol);
}

#[test]
fn a_refusal_does_not_tell_the_value() {
    let text = format!("set=1\nprivate_key={KEY}0\n\n");
    let Request::Refused(refusal) = requests(&text, 10).remove(0) else {
        panic!();
    };
    assert!(!refusal.reason.contains(&KEY[..8]), "{refusal:?}");
}

#[test]
fn a_get_takes_nothing_but_an_empty_line() {
    assert_eq!(
        requests("get=1\n\nget=1\n\n", 3),
        [Request::Get, Request::Get]
    );
    match requests("get=1\nlisten_port=1\n\nget=1\n\n", 3).as_slice() {
        [Request::Refused(refusal), Request::Get] => assert_eq!(refusal.errno, Errno::Invalid),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_no_request_closes_the_connection() {
    for text in ["get=2\n\n", "set=1 \n\n", "\n", "hello\nget=1\n\n"] {
        match requests(text, 100).as_slice() {
            [Request::Closed(_)] => {}
            other => panic!("{text:?}: {other:?}"),
        }
    }
}

#[test]
fn an_endless_line_closes_the_connection() {
    let text = format!("set=1\nprivate_key={}", "0".repeat(LINE));
    match requests(&text, 4096).as_slice() {
        [Request::Closed(refusal)] => assert_eq!(refusal.errno, Errno::Io),
        other => panic!("{other:?}"),
    }
}

#[test]
fn half_a_set_is_not_carried_out() {
    for text in ["set=1\n", "set=1\nlisten_port=1\n", "set=1\nlisten_port=1"] {
        match requests(text, 100).as_slice() {
            [Request::Refused(refusal)] => assert_eq!(refusal.errno, Errno::Protocol),
            other => panic!("{text:?}: {other:?}"),
        }
    }
    assert_eq!(requests("get=1\n", 100), []);
    assert_eq!(requests("", 100), []);
}

fn lines() -> impl Strategy<Value = String> {
    let line = prop_oneof![
        Just("get=1".to_owned()),
        Just("set=1".to_owned()),
        Just(String::new()),
        Just(format!("public_key={OTHER}")),
        Just(format!("private_key={KEY}")),
        Just("allowed_ip=10.0.0.0/8".to_owned()),
        Just("nonsense".to_owned()),
        "[a-z_]{1,6}=[ -~]{0,8}",
        "\\PC{0,20}",
    ];
    proptest::collection::vec(line, 0..20).prop_map(|lines| lines.join("\n"))
}

proptest! {
    /// However a text is cut into pieces, it means the same; and nothing panics.
    #[test]
    fn pieces_do_not_matter(text in lines(), size in 1usize..50) {
        prop_assert_eq!(requests(&text, size), requests(&text, usize::MAX));
    }

    #[test]
    fn any_bytes_are_taken(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut parser = Parser::new(no_scope);
        let mut input = bytes.as_slice();
        while parser.next(&mut input).is_some() {}
        prop_assert!(input.is_empty());
        parser.finish();
    }
}

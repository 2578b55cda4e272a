#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Instant;

use super::*;
use crate::config::tests::{EXAMPLE, parse_in_temporary_directory};
use crate::core::LinkFacts;
use crate::uapi::{Parser, Request};

/// Where the office's DNS name leads.
const OFFICE: &str = "192.0.2.7:51820";

fn hex(key: &PublicKey) -> String {
    let digits = key.0.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    let digits = digits.map(|digit| char::from_digit(digit.into(), 16).unwrap());
    digits.collect()
}

fn stranger() -> PublicKey {
    PublicKey([0x51; 32])
}

/// A router that runs as the example says: with a laptop, and an office with a DNS name.
struct Router {
    file: Config,
    local: Local,
    combined: Combined,
    names: Names,
    facts: Facts,
    whereabouts: HashMap<PublicKey, SocketAddr>,
}

impl Router {
    fn new() -> Self {
        let file = parse_in_temporary_directory(EXAMPLE).unwrap();
        let mut names = Names::default();
        let now = Instant::now();
        let mut combined = Combined::new(&["file", "tailnet"]);
        combined.apply(FILE, file.update());
        let keys = file.snapshot.peers.iter().map(|peer| &peer.public_key);
        names.follow(combined.state(), keys, now);
        let answer = Ok(vec![OFFICE.parse().unwrap()]);
        names.handle_answer("office.example.com", 51820, answer, now);
        let eth0 = LinkFacts {
            name: "eth0".into(),
            addresses: vec!["203.0.113.5/24".parse().unwrap()],
            ..LinkFacts::default()
        };
        Self {
            local: file.local.clone(),
            combined,
            file,
            names,
            facts: Facts {
                links: BTreeMap::from([(2, eth0)]),
                default_link: Some(2),
                ..Facts::default()
            },
            whereabouts: HashMap::new(),
        }
    }

    fn after(&self, lines: &str) -> Result<Option<Wanted>, Refusal> {
        let text = format!("set=1\n{lines}\n\n");
        let Some(Request::Set(set)) = Parser::new(|_| None).next(&mut text.as_bytes()) else {
            panic!("{lines} is no set");
        };
        let present = Present {
            file: &self.file,
            local: &self.local,
            combined: &self.combined,
            names: &self.names,
            facts: &self.facts,
            whereabouts: &|key| self.whereabouts.get(key).copied(),
        };
        present.after(&set)
    }

    /// Carries out a `set` that changes something.
    fn set(&mut self, lines: &str) -> Wanted {
        let wanted = self.after(lines).unwrap();
        let wanted = wanted.unwrap_or_else(|| panic!("{lines} changes nothing"));
        self.local.listen_port = wanted.listen_port;
        self.combined
            .apply(FILE, Update::Delta(wanted.delta.clone()));
        wanted
    }

    fn keys(&self) -> [PublicKey; 2] {
        let keys = self.file.snapshot.peers.iter().map(|peer| peer.public_key);
        keys.collect::<Vec<_>>().try_into().unwrap()
    }

    fn laptop(&self) -> String {
        hex(&self.keys()[0])
    }

    fn office(&self) -> String {
        hex(&self.keys()[1])
    }

    fn peer(&self, key: &PublicKey) -> &Peer {
        self.combined.state().peers.get(key).unwrap()
    }

    /// What `wg showconf` and `wg syncconf` make of each other.
    fn synced(&self) -> String {
        let state = State {
            private_key: self.combined.key_of(FILE).cloned(),
            listen_port: self.local.listen_port,
            fwmark: 0x1000,
            peers: Vec::new(),
        };
        let mut text = state.to_text().to_string();
        for peer in self.combined.state().peers.iter() {
            let _ = writeln!(text, "public_key={}", hex(&peer.public_key));
            if let Some(endpoint) = self.whereabouts.get(&peer.public_key) {
                let _ = writeln!(text, "endpoint={endpoint}");
            }
            text += "replace_allowed_ips=true\n";
            for cidr in peer.allowed_ips.iter().rev() {
                let _ = writeln!(text, "allowed_ip={cidr}");
            }
        }
        text.trim_end().to_owned()
    }

    /// The sources of the example's last rule, which is `from = ["laptop"]`.
    fn laptop_may(&self) -> Vec<String> {
        let rule = self.combined.state().policy.rules.last().unwrap();
        rule.sources.iter().map(ToString::to_string).collect()
    }

    fn is_as_the_file(&self) -> bool {
        let Config {
            identity, snapshot, ..
        } = &self.file;
        self.combined.wants(FILE, identity.as_ref(), snapshot)
    }
}

#[test]
fn what_a_set_does_not_know_stays() {
    let mut router = Router::new();
    let [laptop, office] = router.keys();
    let lines = format!(
        "public_key={}\npersistent_keepalive_interval=7\npublic_key={}\nallowed_ip=100.64.0.9/32\n\
         public_key={}\nallowed_ip=100.64.0.10/32",
        router.office(),
        router.laptop(),
        hex(&stranger())
    );
    let wanted = router.set(&lines);
    assert_eq!(wanted.renewed, [], "nobody has to go");
    assert_eq!(router.peer(&laptop).name.as_deref(), Some("laptop"));
    let [old, new] = [&router.file.snapshot.peers[1], router.peer(&office)];
    assert!(matches!(new.endpoint, Some(Endpoint::Name { .. })));
    let expected = Peer {
        keepalive: Some(7),
        roaming: true,
        ..old.clone()
    };
    assert_eq!(*new, expected, "with its preshared key, CIDRs in order");
    let expected = Peer {
        name: None,
        public_key: stranger(),
        preshared_key: None,
        allowed_ips: vec!["100.64.0.10/32".parse().unwrap()],
        endpoint: None,
        keepalive: None,
        roaming: true,
        masquerade: Vec::new(),
        jailed: false,
    };
    assert_eq!(*router.peer(&stranger()), expected);
    assert_eq!(wanted.delta.set.len(), 3, "nobody else is touched");

    // Gone and back again, a peer of the file has its name.
    router.set(&format!("public_key={}\nremove=true", router.laptop()));
    router.set(&format!(
        "public_key={}\nallowed_ip=100.64.0.2/32",
        router.laptop()
    ));
    assert_eq!(router.peer(&laptop).name.as_deref(), Some("laptop"));
}

#[test]
fn rules_follow_the_peers_that_they_name() {
    let mut router = Router::new();
    let everybody = router.combined.state().policy.rules[0].clone();
    let lines = format!(
        "public_key={}\nallowed_ip=100.64.0.2/32\nallowed_ip=100.64.0.10/32",
        hex(&stranger())
    );
    router.set(&lines);
    assert_eq!(router.laptop_may(), ["fd7a:93b1:6c00::2/128"]);
    let lines = format!("public_key={}\nallowed_ip=100.64.0.9/32", router.laptop());
    router.set(&lines);
    assert_eq!(
        router.laptop_may(),
        ["100.64.0.9/32", "fd7a:93b1:6c00::2/128"]
    );
    router.set(&format!("public_key={}\nremove=true", router.laptop()));
    assert_eq!(router.laptop_may(), Vec::<String>::new());
    assert_eq!(router.combined.state().policy.rules[0], everybody);
    router.set(&format!("public_key={}\nremove=true", hex(&stranger())));
    router.set(&format!(
        "public_key={}\nallowed_ip=100.64.0.2/32",
        router.laptop()
    ));
    assert_eq!(router.laptop_may(), ["100.64.0.2/32"]);
}

#[test]
fn what_is_shown_changes_nothing_when_it_is_set() {
    let mut router = Router::new();
    let [laptop, office] = router.keys();
    for endpoint in [OFFICE, "192.0.2.8:5"] {
        router.whereabouts = HashMap::from([
            (laptop, "203.0.113.9:7".parse().unwrap()),
            (office, endpoint.parse().unwrap()),
        ]);
        assert!(router.after(&router.synced()).unwrap().is_none());
    }
    for nothing in [
        "fwmark=0".to_owned(),
        "fwmark=4096\nlisten_port=0".to_owned(),
        "listen_port=51820".to_owned(),
        format!("public_key={}\nupdate_only=true", hex(&stranger())),
        format!("public_key={}\nremove=true", hex(&stranger())),
    ] {
        assert!(router.after(&nothing).unwrap().is_none(), "{nothing}");
    }
    // As of `wg setconf`: everybody begins anew, with what was set alone.
    let mut wanted = router.set(&format!("replace_peers=true\n{}", router.synced()));
    let renewed: HashSet<PublicKey> = wanted.renewed.iter().copied().collect();
    assert_eq!(renewed, router.keys().into());
    let told = |text: &str| text.parse().unwrap();
    wanted.endpoints.sort_by_key(|(key, _)| *key != laptop);
    let there = [
        (laptop, told("203.0.113.9:7")),
        (office, told("192.0.2.8:5")),
    ];
    assert_eq!(wanted.endpoints, there);
    assert_eq!(router.peer(&laptop).endpoint, None);
    let endpoint = router.peer(&office).endpoint.as_ref();
    assert!(matches!(endpoint, Some(Endpoint::Name { .. })));
    assert_eq!(router.peer(&office).keepalive, None);
    // Of an endpoint that it does not name nothing is left.
    router.whereabouts.clear();
    router.set(&format!("replace_peers=true\n{}", router.synced()));
    assert_eq!(router.peer(&office).endpoint, None);
}

/// What an operator may not write, a peer may still do: its place is where it was authenticated.
#[test]
fn where_a_peer_has_gone_by_itself_it_may_be_set() {
    for place in ["[fe80::9%2]:7", "10.0.3.4:5", "100.64.0.7:5"] {
        let mut router = Router::new();
        let [laptop, _] = router.keys();
        router.whereabouts = HashMap::from([(laptop, place.parse().unwrap())]);
        let wanted = router.set(&format!("replace_peers=true\n{}", router.synced()));
        assert_eq!(wanted.endpoints, [(laptop, place.parse().unwrap())]);
        assert_eq!(router.peer(&laptop).endpoint, None, "it is no claim");
    }
}

/// What was shown once is taken at any time: also when the peer has gone on, or the router began anew.
#[test]
fn where_a_peer_was_once_it_may_be_set() {
    for place in ["[fe80::9%2]:7", "10.0.3.4:5", "100.64.0.7:5", "192.0.2.9:9"] {
        let place: SocketAddr = place.parse().unwrap();
        let mut router = Router::new();
        let [laptop, office] = router.keys();
        router.whereabouts = HashMap::from([(laptop, place)]);
        let shown = router.synced();
        for (gone_to, lines) in [
            (None, shown.clone()),
            (None, format!("replace_peers=true\n{shown}")),
            (Some("192.0.2.8:5"), shown),
            (
                None,
                format!("public_key={}\nendpoint={place}", hex(&laptop)),
            ),
        ] {
            router = Router::new();
            let gone_to = gone_to.map(|text| (laptop, text.parse().unwrap()));
            router.whereabouts = gone_to.into_iter().collect();
            let wanted = router.set(&lines);
            assert_eq!(wanted.endpoints, [(laptop, place)], "{lines}");
            let endpoint = router.peer(&laptop).endpoint.clone();
            assert_eq!(endpoint, Some(Endpoint::Addr(place)));
            router.whereabouts = HashMap::from([(laptop, place)]);
            let again = format!("public_key={}\nendpoint={place}", hex(&laptop));
            assert!(router.after(&again).unwrap().is_none(), "it is there");
            // Other peers change as before.
            router.set(&format!(
                "public_key={}\nallowed_ip=100.64.0.9/32",
                hex(&office)
            ));
        }
    }
}

#[test]
fn an_endpoint_takes_the_place_of_a_dns_name_unless_it_is_the_same() {
    let mut router = Router::new();
    let office = router.keys()[1];
    let at = |endpoint: &str| format!("public_key={}\nendpoint={endpoint}", hex(&office));
    let roamed: SocketAddr = "192.0.2.8:5".parse().unwrap();
    router.whereabouts.insert(office, roamed);
    assert!(router.after(&at("192.0.2.8:5")).unwrap().is_none());
    // Back to where the name leads.
    let wanted = router.set(&at(OFFICE));
    assert_eq!(wanted.endpoints, [(office, OFFICE.parse().unwrap())]);
    assert!(router.is_as_the_file());
    let wanted = router.set(&at("192.0.2.9:9"));
    let elsewhere: SocketAddr = "192.0.2.9:9".parse().unwrap();
    assert_eq!(wanted.endpoints, [(office, elsewhere)]);
    let endpoint = router.peer(&office).endpoint.clone();
    assert_eq!(endpoint, Some(Endpoint::Addr(elsewhere)));
}

#[test]
fn a_new_key_comes_when_its_peer_has_gone() {
    let mut router = Router::new();
    let key = crate::wireguard::keys::PrivateKey::from_bytes([7; 32]);
    let own = key.public();
    router.set(&format!(
        "public_key={}\nallowed_ip=100.64.0.10/32",
        hex(&own)
    ));
    let private = hex(&PublicKey(*key.expose()));
    let wanted = router.set(&format!("private_key={private}"));
    let identity = wanted.delta.identity.unwrap();
    assert!(identity.private_key == key);
    assert_eq!(identity.addresses, router.file.addresses());
    assert_eq!((wanted.delta.remove, wanted.renewed), (vec![own], vec![]));
    assert!(router.combined.key_of(FILE) == Some(&key));
}

#[test]
fn what_a_file_may_not_say_is_refused() {
    let router = Router::new();
    let (a, b) = (router.laptop(), hex(&stranger()));
    let zero = "0".repeat(64);
    for (lines, errno, says) in [
        ("fwmark=5".to_owned(), Errno::Permission, "0x5"),
        (
            format!("private_key={zero}"),
            Errno::Invalid,
            "nothing without its private key",
        ),
        (
            format!("public_key={b}\nallowed_ip=0.0.0.0/0"),
            Errno::Invalid,
            "would take everything",
        ),
        (
            format!("public_key={b}\nallowed_ip=10.0.7.0/24"),
            Errno::Invalid,
            "\"10.0.0.0/16\" overlaps \"10.0.7.0/24\" of peer UVFRUVFR",
        ),
        (
            format!("public_key={b}\nallowed_ip=100.64.0.0/28"),
            Errno::Invalid,
            "lies within \"100.64.0.0/28\" of peer UVFR",
        ),
        (
            format!("public_key={b}\nallowed_ip=100.64.0.1/32"),
            Errno::Invalid,
            "the router's own tunnel address; write",
        ),
        (
            format!("public_key={b}\nallowed_ip=203.0.113.0/24"),
            Errno::Invalid,
            "the network of eth0",
        ),
        (
            format!("public_key={a}\nendpoint=224.0.0.1:5"),
            Errno::Invalid,
            "\"224.0.0.1:5\" is multicast, where no peer can be",
        ),
        (
            format!("public_key={a}\nendpoint=[fe80::9]:5"),
            Errno::Invalid,
            "is link-local, where no peer can be",
        ),
        (
            format!("public_key={zero}\nallowed_ip=100.64.0.10/32"),
            Errno::Invalid,
            "small order",
        ),
    ] {
        let refusal = router.after(&lines).err();
        let refusal = refusal.unwrap_or_else(|| panic!("{lines} is not refused"));
        assert_eq!(refusal.errno, errno, "{lines}");
        assert!(refusal.reason.contains(says), "{}", refusal.reason);
        assert!(!refusal.reason.contains("(line"), "{}", refusal.reason);
    }
}

#[test]
fn what_another_source_has_is_not_changed() {
    let mut router = Router::new();
    let theirs = Peer {
        name: None,
        public_key: stranger(),
        preshared_key: None,
        allowed_ips: vec!["100.64.0.10/32".parse().unwrap()],
        endpoint: None,
        keepalive: None,
        roaming: true,
        masquerade: Vec::new(),
        jailed: false,
    };
    let delta = Delta {
        set: vec![theirs],
        ..Delta::default()
    };
    router.combined.apply(1, Update::Delta(delta));
    for lines in [
        format!("public_key={}\nremove=true", hex(&stranger())),
        format!("public_key={}\nallowed_ip=100.64.0.10/32", router.laptop()),
    ] {
        let refusal = router.after(&lines).err().unwrap();
        assert_eq!(refusal.errno, Errno::Permission, "{lines}");
        assert!(
            refusal.reason.contains("comes from tailnet"),
            "{}",
            refusal.reason
        );
    }
    // `wg syncconf` replaces what is the file's.
    router.set("replace_peers=true");
    let left: Vec<PublicKey> = router
        .combined
        .state()
        .peers
        .iter()
        .map(|p| p.public_key)
        .collect();
    assert_eq!(left, [stranger()]);
}

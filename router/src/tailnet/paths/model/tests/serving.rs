//! The router as a peer relay.

use super::*;
use crate::tailnet::paths::Serve;
use crate::tailnet::relay::server::Allocated;
use crate::tailnet::relay::service::Seen;
use crate::tailnet::relay::{self, Endpoint};

const STUN: &str = "198.51.100.1:3478";

fn serve(clients: &[NodePublic]) -> Command {
    Command::Serve(Some(Serve {
        port: 7777,
        fixed: vec![at("203.0.113.1:99")],
        clients: clients.iter().copied().collect(),
    }))
}

/// What `b` says to ask `a` for a place.
fn question(a: &End, b: &mut End) -> Vec<u8> {
    let message = relay::Message::Allocate {
        clients: [b.disco, DiscoPublic::from_bytes([9; 32])],
        generation: 5,
    };
    b.boxes
        .seal_clear(&a.disco, &message.clear(), [1; 24])
        .unwrap()
}

fn wishes(a: &mut End) -> Vec<Wish> {
    let all = std::iter::from_fn(|| a.paths.poll_event());
    let wish = |event| match event {
        Event::Allocate(wish) => Some(wish),
        _ => None,
    };
    all.filter_map(wish).collect()
}

#[test]
fn only_those_who_may_are_given_places_and_by_relays_alone() {
    let now = Instant::now();
    let (mut a, mut b) = pair(now);
    let asked = question(&a, &mut b);
    let (key, server) = (b.key, DiscoPublic::from_bytes([8; 32]));
    // It is no peer relay.
    a.paths.handle_relayed(3, key, &asked, now);
    assert_eq!(wishes(&mut a), []);
    assert!(a.paths.report(now).relay_server.is_none());
    // Nobody may.
    a.paths.handle_command(serve(&[a.key]), now);
    a.paths.handle_relayed(3, key, &asked, now);
    assert_eq!(wishes(&mut a), []);
    assert_eq!(a.paths.report(now).relay_server.unwrap().ungranted, 1);
    // By UDP anybody could repeat it, and a relay that says that it comes from somebody else is not believed.
    a.paths.handle_command(serve(&[key]), now);
    a.paths.handle_datagram(at(THERE), None, &asked, now);
    a.paths
        .handle_relayed(3, NodePublic::from_bytes([7; 32]), &asked, now);
    assert_eq!(wishes(&mut a), []);
    a.paths.handle_relayed(3, key, &asked, now);
    let [wish] = wishes(&mut a)[..] else {
        panic!("no question");
    };
    assert_eq!((wish.node, wish.disco, wish.generation), (key, b.disco, 5));
    let allocated = Allocated {
        clients: wish.clients,
        lamport: 2,
        number: 3,
    };
    a.paths.handle_allocated(&wish, server, allocated, now);
    let sent = a.paths.poll_transmit().unwrap();
    assert_eq!(sent.to, Way::Relay(3, key));
    let clear = b.boxes.open_clear(&a.disco, &sent.bytes).unwrap();
    let Some(relay::Message::Allocated {
        generation,
        endpoint,
    }) = relay::Message::parse(&clear)
    else {
        panic!("no answer");
    };
    let expected = Endpoint {
        server,
        clients: wish.clients,
        lamport: 2,
        number: 3,
        bind_within: secs(30.),
        lasts: secs(300.),
        addresses: vec![at("203.0.113.1:99")],
    };
    assert_eq!((generation, endpoint), (5, expected));
    // Whoever has another key by then hears nothing.
    let allocated = Allocated {
        clients: wish.clients,
        lamport: 2,
        number: 3,
    };
    let other = Wish {
        disco: server,
        ..wish
    };
    a.paths.handle_allocated(&other, server, allocated, now);
    assert_eq!(a.paths.poll_transmit(), None);
}

#[test]
fn the_relays_port_is_looked_for_by_itself() {
    let mut now = Instant::now();
    let (mut a, mut b) = pair(now);
    a.paths.handle_command(serve(&[b.key]), now);
    let local = Command::Local {
        port: 41641,
        addresses: ["192.0.2.1", "fe80::1", "127.0.0.1"]
            .map(|t| t.parse().unwrap())
            .into(),
        fixed: Vec::new(),
    };
    a.paths.handle_command(local, now);
    let map = r#"{"Regions":{"3":{"Nodes":[{"IPv4":"198.51.100.1","IPv6":"none"}]}}}"#;
    let map: DerpMap = serde_json::from_str(map).unwrap();
    a.paths.handle_command(Command::Derp(Box::new(map)), now);
    let requests = |a: &mut End, now| {
        a.paths.handle_timeout(now);
        let all = std::iter::from_fn(|| a.paths.poll_transmit());
        let served = all.filter(|transmit| transmit.to == Way::Served(at(STUN)));
        served.map(|transmit| transmit.bytes).collect::<Vec<_>>()
    };
    let addresses = |a: &End, now| a.paths.report(now).relay_server.unwrap().addresses;
    let asked = requests(&mut a, now);
    assert_eq!(asked.len(), 1);
    let unseen = [at("203.0.113.1:99"), at("192.0.2.1:7777")];
    assert_eq!(addresses(&a, now), unseen);
    let seen = |request: &[u8], now| Seen {
        transaction: request[8..20].try_into().unwrap(),
        mapped: at("198.51.100.77:1234"),
        received: now,
    };
    a.paths.handle_served(seen(&asked[0], now), now);
    let all = [unseen[0], at("198.51.100.77:1234"), unseen[1]];
    assert_eq!(addresses(&a, now), all);
    // Seldom while nobody asks, and as often as NATs want it while somebody does.
    let round = |a: &mut End, now: &mut Instant| {
        let before = *now;
        loop {
            *now = a.paths.poll_timeout().unwrap().max(*now);
            if let [request] = &requests(a, *now)[..] {
                a.paths.handle_served(seen(request, *now), *now);
                return *now - before;
            }
        }
    };
    assert_eq!(round(&mut a, &mut now), secs(240.));
    let asked = question(&a, &mut b);
    a.paths.handle_relayed(3, b.key, &asked, now);
    let pause = round(&mut a, &mut now);
    assert!(pause >= secs(20.) && pause < secs(26.), "{pause:?}");
    assert_eq!(addresses(&a, now), all);
    a.paths.handle_command(Command::Serve(None), now);
    now += secs(600.);
    assert_eq!(requests(&mut a, now), Vec::<Vec<u8>>::new());
}

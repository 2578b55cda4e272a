use super::*;

fn map(json: &str) -> DerpMap {
    serde_json::from_str(json).unwrap()
}

fn rounds() -> Rounds {
    let mut rounds = Rounds {
        has: [true, true],
        ..Rounds::default()
    };
    let nodes = |region: u32| {
        format!(
            r#""{region}":{{"RegionID":{region},"RegionCode":"r{region}","Nodes":[
            {{"Name":"a","HostName":"h{region}","IPv4":"192.0.2.{region}","IPv6":"2001:db8::{region}"}},
            {{"Name":"b","HostName":"g{region}","IPv4":"198.51.100.{region}","IPv6":"none"}}]}}"#
        )
    };
    let regions: Vec<_> = (1..=5).map(nodes).collect();
    let text = format!(
        r#"{{"Regions":{{{},"6":null,"x":{{}},"7":{{"NoMeasureNoHome":true,"Nodes":[{{"IPv4":"192.0.2.7"}}]}}}}}}"#,
        regions.join(",")
    );
    assert!(rounds.set_map(&map(&text)));
    assert!(!rounds.set_map(&map(&text)));
    rounds
}

fn requests(rounds: &mut Rounds, now: Instant) -> Vec<(SocketAddr, Transaction)> {
    let mut all = Vec::new();
    let mut number = 0_u64;
    let mut next = || {
        number += 1;
        let mut transaction = [0; 12];
        let nanos = format!("{now:?}").bytes().map(u64::from).sum::<u64>();
        transaction[..8].copy_from_slice(&(number << 32 | nanos).to_be_bytes());
        Some(transaction)
    };
    while let Some(request) = rounds.poll_request(now, &mut next) {
        all.push(request);
    }
    all
}

fn own(port: u16) -> SocketAddr {
    SocketAddr::from(([203, 0, 113, 9], port))
}

#[test]
fn a_full_round_asks_all_again_until_they_answer() {
    let mut rounds = rounds();
    let start = Instant::now();
    rounds.start(true, start);
    let first = requests(&mut rounds, start);
    assert_eq!(first.len(), 10);
    let ms = |ms| start + Duration::from_millis(ms);
    for (server, transaction) in &first {
        if server.is_ipv4() && server.ip() != IpAddr::from([192, 0, 2, 5]) {
            rounds.handle_response(transaction, own(7), ms(30));
        }
    }
    assert!(rounds.finish(true, ms(60)).is_none());
    // Three regions have answered, so the others have little time left.
    let found = rounds.finish(true, ms(200)).unwrap();
    assert_eq!(found.latency4.len(), 4);
    assert_eq!(found.global4, Some(own(7)));
    assert_eq!(found.mapping_varies, Some(false));
    assert!(found.udp && found.ipv4 && !found.ipv6);
    assert!(rounds.home().is_some());
}

#[test]
fn other_addresses_for_others_are_a_hard_nat() {
    let mut rounds = rounds();
    let start = Instant::now();
    rounds.start(true, start);
    for (at, (server, transaction)) in requests(&mut rounds, start).iter().enumerate() {
        let mapped = match server {
            SocketAddr::V4(_) => own(100 + at as u16),
            SocketAddr::V6(_) => "[2001:db8:9::1]:7".parse().unwrap(),
        };
        rounds.handle_response(transaction, mapped, start + Duration::from_millis(9));
    }
    let later = start + Duration::from_millis(10);
    let found = rounds.finish(true, later).unwrap();
    assert_eq!(found.mapping_varies, Some(true));
    assert_eq!(found.latency6.len(), 5);
    let (seen, varies) = rounds.seen(later);
    assert_eq!((seen.count(), varies), (2, true));
    assert_eq!(rounds.seen(later + KEPT).0.count(), 0);
}

#[test]
fn a_later_round_asks_the_nearest_and_the_home() {
    let mut rounds = rounds();
    let start = Instant::now();
    rounds.start(true, start);
    for (server, transaction) in requests(&mut rounds, start) {
        if let SocketAddr::V4(v4) = server {
            let far = u64::from(v4.ip().octets()[3]) * 20;
            let received = start + Duration::from_millis(far);
            rounds.handle_response(&transaction, own(7), received);
        }
    }
    rounds.finish(true, start + PATIENCE).unwrap();
    assert_eq!(rounds.home(), Some(1));
    let later = start + Duration::from_secs(20);
    rounds.start(false, later);
    let regions: BTreeSet<_> = requests(&mut rounds, later)
        .iter()
        .filter(|(server, _)| server.is_ipv4())
        .map(|(server, _)| server.ip())
        .collect();
    let expected = [1, 2, 3].map(|host| IpAddr::from([192, 0, 2, host]));
    assert_eq!(regions, BTreeSet::from(expected));
    // Nobody answers: it ends all the same, and the next one asks all.
    let found = rounds.finish(true, later + PATIENCE).unwrap();
    assert!(!found.udp && found.mapping_varies.is_none());
    assert_eq!(rounds.home(), Some(1));
    rounds.start(false, later + PATIENCE);
    assert_eq!(requests(&mut rounds, later + PATIENCE).len(), 10);
}

/// One lost datagram is no reason to move.
#[test]
fn a_round_does_not_end_early_without_the_home() {
    let mut rounds = rounds();
    let start = Instant::now();
    let answer = |rounds: &mut Rounds, from: Instant, silent: u8| {
        for (server, transaction) in requests(rounds, from) {
            if let SocketAddr::V4(v4) = server
                && v4.ip().octets()[3] != silent
            {
                let far = u64::from(v4.ip().octets()[3]) * 20;
                rounds.handle_response(&transaction, own(7), from + Duration::from_millis(far));
            }
        }
    };
    rounds.start(true, start);
    answer(&mut rounds, start, 0);
    rounds.finish(true, start + PATIENCE).unwrap();
    assert_eq!(rounds.home(), Some(1));
    let later = start + FAR;
    rounds.start(true, later);
    answer(&mut rounds, later, 1);
    let again = rounds.poll_timeout().unwrap();
    assert!(
        rounds.finish(true, again).is_none(),
        "it waits for the home"
    );
    answer(&mut rounds, again, 0);
    let found = rounds.finish(true, later + PATIENCE).unwrap();
    assert!(found.latency.contains_key(&1));
    assert_eq!(rounds.home(), Some(1));
}

#[test]
fn what_nobody_asked_for_is_not_believed() {
    let mut rounds = rounds();
    let start = Instant::now();
    rounds.handle_response(&[0; 12], own(7), start);
    rounds.start(true, start);
    let all = requests(&mut rounds, start);
    rounds.handle_response(&[0xff; 12], own(7), start);
    // An answer of the other family is none.
    let v6 = all.iter().find(|(server, _)| server.is_ipv6()).unwrap();
    rounds.handle_response(&v6.1, own(7), start);
    assert!(rounds.seen(start).0.next().is_none());
    // The second answer to one request is none.
    let v4 = all.iter().find(|(server, _)| server.is_ipv4()).unwrap();
    rounds.handle_response(&v4.1, own(7), start);
    rounds.handle_response(&v4.1, own(8), start);
    assert_eq!(rounds.seen(start).0.next(), Some(own(7)));
}

#[test]
fn names_are_asked_for_and_ports_and_test_addresses_taken() {
    let mut rounds = Rounds {
        has: [true, true],
        ..Rounds::default()
    };
    rounds.set_map(&map(
        r#"{"Regions":{"1":{"Nodes":[{"HostName":"h","STUNPort":99},{"HostName":"n","STUNPort":-1},
        {"HostName":"t","STUNTestIP":"192.0.2.8"}]}}}"#,
    ));
    assert_eq!(rounds.names(), BTreeSet::from(["h"]));
    let addresses = ["2001:db8::1", "192.0.2.1"].map(|text| text.parse().unwrap());
    assert!(rounds.resolved(vec![("h".to_owned(), addresses.into())]));
    let start = Instant::now();
    rounds.start(true, start);
    let last = start + Duration::from_secs(1);
    let servers: BTreeSet<_> = requests(&mut rounds, last)
        .into_iter()
        .map(|r| r.0)
        .collect();
    let expected = ["192.0.2.1:99", "[2001:db8::1]:99", "192.0.2.8:3478"];
    assert_eq!(servers, expected.map(|text| text.parse().unwrap()).into());
}

//! What a node finds out of itself.

use super::*;

#[test]
fn own_endpoints_and_the_home_are_told_once() {
    let now = Instant::now();
    let mut a = End::new(1, now);
    let local = Command::Local {
        port: 41641,
        addresses: ["192.0.2.1", "fe80::1", "2001:db8::1", "127.0.0.1"]
            .map(|t| t.parse().unwrap())
            .into(),
        fixed: vec![at("203.0.113.1:99")],
    };
    a.paths.handle_command(local, now);
    let map =
        r#"{"Regions":{"3":{"RegionCode":"abc","Nodes":[{"IPv4":"198.51.100.1","IPv6":"none"}]}}}"#;
    let map: DerpMap = serde_json::from_str(map).unwrap();
    a.paths.handle_command(Command::Derp(Box::new(map)), now);
    a.paths.handle_timeout(now);
    let request = a.paths.poll_transmit().unwrap();
    assert_eq!(request.to, Way::Udp(at("198.51.100.1:3478"), None));
    let mut response = request.bytes.clone();
    response.truncate(20);
    response[0] = 1;
    response[3] = 12;
    response.extend([0, 1, 0, 8, 0, 1, 4, 210, 198, 51, 100, 77]);
    let later = now + secs(0.01);
    a.paths
        .handle_datagram(at("198.51.100.1:3478"), None, &response, later);
    let told: Vec<_> = std::iter::from_fn(|| a.paths.poll_event()).collect();
    let endpoints = [
        (at("203.0.113.1:99"), EndpointKind::Fixed),
        (at("192.0.2.1:41641"), EndpointKind::Local),
        (at("[2001:db8::1]:41641"), EndpointKind::Local),
    ];
    let mut seen = endpoints.to_vec();
    seen.insert(1, (at("198.51.100.77:1234"), EndpointKind::Stun));
    let outside: Vec<_> = told
        .iter()
        .filter_map(|event| match event {
            Event::Outside(event) => Some(event),
            _ => None,
        })
        .collect();
    assert_eq!(
        outside[0],
        &crate::tailnet::paths::Event::Endpoints(endpoints.to_vec())
    );
    assert_eq!(outside[1], &crate::tailnet::paths::Event::Home(3));
    let crate::tailnet::paths::Event::NetInfo(info) = outside[2] else {
        panic!("{outside:?}");
    };
    assert_eq!(
        (info.preferred_derp, info.working_udp),
        (Some(3), Some(true))
    );
    assert_eq!(outside[3], &crate::tailnet::paths::Event::Endpoints(seen));
    assert_eq!(outside.len(), 4);
}

/// Where UDP is blocked, connections to relays tell which is near; the first to answer is not taken for that.
#[test]
fn without_udp_relays_are_measured_and_the_nearest_becomes_the_home() {
    let now = Instant::now();
    let mut a = End::new(1, now);
    let regions: Vec<_> = (1..=3)
        .map(|n| format!(r#""{n}":{{"Nodes":[{{"IPv4":"198.51.100.{n}","IPv6":"none"}}]}}"#))
        .collect();
    let map = format!(r#"{{"Regions":{{{}}}}}"#, regions.join(","));
    let map: DerpMap = serde_json::from_str(&map).unwrap();
    let local = Command::Local {
        port: 41641,
        addresses: vec!["192.0.2.1".parse().unwrap()],
        fixed: Vec::new(),
    };
    a.paths.handle_command(local, now);
    a.paths.handle_command(Command::Derp(Box::new(map)), now);
    a.paths
        .handle_command(Command::Control { connected: true }, now);
    let mut asked = Vec::new();
    let mut homes = Vec::new();
    let mut take = |paths: &mut Paths| {
        while paths.poll_transmit().is_some() {}
        while let Some(event) = paths.poll_event() {
            match event {
                Event::Measure(regions) => asked.push(regions),
                Event::Outside(crate::tailnet::paths::Event::Home(home)) => homes.push(home),
                _ => {}
            }
        }
        (asked.len(), homes.clone())
    };
    let mut later = now;
    while let Some(due) = a.paths.poll_timeout().filter(|due| *due < now + secs(5.0)) {
        later = due;
        a.paths.handle_timeout(due);
    }
    let (count, first) = take(&mut a.paths);
    assert_eq!((count, first.len()), (1, 1), "any home is better than none");
    let others: Vec<u32> = (1..=3).filter(|region| *region != first[0]).collect();
    let far = |ms| Duration::from_millis(ms);
    a.paths.handle_latency(others[0], far(90), later);
    assert_eq!(take(&mut a.paths).1.len(), 1, "the home has not answered");
    a.paths.handle_latency(first[0], far(120), later);
    a.paths.handle_latency(others[1], far(20), later);
    let (_, all) = take(&mut a.paths);
    assert_eq!(all.last(), Some(&others[1]));
    let found = a.paths.report(later).netcheck.unwrap();
    assert_eq!(
        (found.udp, found.preferred, found.latency.len()),
        (false, Some(others[1]), 3)
    );
    // Rounds go on; relays are not asked with each.
    while let Some(due) = a
        .paths
        .poll_timeout()
        .filter(|due| *due < now + secs(290.0))
    {
        a.paths.handle_timeout(due);
    }
    assert_eq!(take(&mut a.paths).0, 1);
}

/// A peer may be slower to hear that its region is no more, and stay without another for a while.
#[test]
fn a_peer_of_a_lost_region_is_answered_through_the_relay_that_brings_its_word() {
    let now = Instant::now();
    let (mut a, mut b) = pair(now);
    let map = |regions: &[u32]| -> Command {
        let regions: Vec<_> = regions
            .iter()
            .map(|n| format!(r#""{n}":{{"Nodes":[{{"IPv4":"198.51.100.{n}","IPv6":"none"}}]}}"#))
            .collect();
        let map = format!(r#"{{"Regions":{{{}}}}}"#, regions.join(","));
        Command::Derp(Box::new(serde_json::from_str(&map).unwrap()))
    };
    let eight = Path::Relay(RelayId(8));
    let call = Message::CallMeMaybe(vec![at("203.0.113.5:5")]);
    let bytes = b.boxes.seal(&a.disco, &call, [3; 24]).unwrap();
    a.paths.handle_command(map(&[3, 8]), now);
    a.paths.handle_relayed(8, b.key, &bytes, now);
    assert_eq!(a.paths(), [RELAY], "it is at home");
    a.paths.handle_command(map(&[8]), now);
    assert_eq!(a.paths(), [eight]);
    a.paths.handle_command(map(&[3, 8]), now);
    assert_eq!(a.paths(), [RELAY]);
    // The other way round: first the region is gone, then its word comes.
    let (mut a, mut b) = pair(now);
    let bytes = b.boxes.seal(&a.disco, &call, [4; 24]).unwrap();
    a.paths.handle_command(map(&[8]), now);
    a.paths();
    a.paths.handle_active(&b.key, now);
    let why = a.paths.report(now).peers[&b.key].why.clone();
    assert!(
        why.as_ref()
            .is_some_and(|why| why.contains("no longer the region")),
        "{why:?}"
    );
    a.paths.handle_relayed(8, b.key, &bytes, now);
    assert_eq!(a.paths(), [eight]);
}

//! Sessions beside servers of a few lines, on a clock of their own.

use std::time::{Duration, Instant};

use serde_json::json;

use super::*;
use crate::tailnet::keys::DiscoSecret;
use crate::tailnet::wire::RegisterResponse;

/// A session and its clocks.
struct Bench {
    session: Session,
    now: Now,
}

fn start(registered: bool, auth_key: Option<&str>, seed: u64) -> Start {
    Start {
        about: About {
            endpoints: vec![("192.0.2.1:41641".to_owned(), 1)],
            ..About::default()
        },
        auth_key: auth_key.map(|text| AuthKey::new(text).unwrap()),
        node: NodeSecret::generate().unwrap(),
        disco: DiscoSecret::generate().unwrap().public(),
        registered,
        map: Netmap::default(),
        seed,
    }
}

impl Bench {
    fn new(registered: bool, auth_key: Option<&str>) -> Self {
        let now = Now {
            instant: Instant::now() + Duration::from_secs(1_000_000),
            clock: Timestamp(1_795_243_933_000_000),
        };
        let mut session = Session::new(start(registered, auth_key, 1), now);
        session.handle_timeout(now);
        Self { session, now }
    }

    fn pass(&mut self, duration: Duration) {
        self.now = Now {
            instant: self.now.instant + duration,
            clock: self.now.clock.after(duration),
        };
        self.session.handle_timeout(self.now);
    }

    /// Waits until the session wants to act.
    fn wait(&mut self) -> Duration {
        let due = self.session.poll_timeout(self.now).expect("nothing is due");
        let wait = due.saturating_duration_since(self.now.instant);
        self.pass(wait);
        wait
    }

    fn transmits(&mut self) -> Vec<Transmit> {
        std::iter::from_fn(|| self.session.poll_transmit()).collect()
    }

    fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.session.poll_event()).collect()
    }

    /// The one request to register that is wanted now.
    fn registration(&mut self) -> RegisterRequest {
        let transmits = self.transmits();
        let mut found = transmits.into_iter().filter_map(|transmit| match transmit {
            Transmit::Register { request, .. } => Some(*request),
            _ => None,
        });
        let request = found.next().expect("no registration");
        assert!(found.next().is_none(), "two at once");
        request
    }

    fn failed(&mut self, failure: Failure) {
        let attempt = self.session.attempts;
        self.session
            .handle_registered(attempt, Err(failure), self.now);
    }

    fn registered(&mut self, response: serde_json::Value) {
        let response: RegisterResponse = serde_json::from_value(response).unwrap();
        let attempt = self.session.attempts;
        self.session
            .handle_registered(attempt, Ok(response), self.now);
    }

    /// The stream that is opened now.
    fn opened(&mut self) -> (u64, MapRequest) {
        let transmits = self.transmits();
        let mut found = transmits.into_iter().filter_map(|transmit| match transmit {
            Transmit::OpenStream { request, stream } => Some((stream, *request)),
            _ => None,
        });
        found.next().expect("no stream")
    }

    fn map(&mut self, stream: u64, response: serde_json::Value) {
        let response = serde_json::from_value(response).unwrap();
        self.session.handle_map(stream, response, self.now);
    }

    fn own(&self) -> serde_json::Value {
        json!({"ID": 1, "Key": self.session.node().public().to_string(), "Addresses": ["100.64.0.1/32"]})
    }

    /// In, with the first map.
    fn connected(auth_key: Option<&str>) -> (Self, u64) {
        let mut bench = Self::new(false, auth_key);
        bench.registration();
        bench.registered(json!({"MachineAuthorized": true}));
        let (stream, _) = bench.opened();
        let own = bench.own();
        bench.map(stream, json!({"Node": own}));
        assert!(bench.session.is_connected());
        bench.events();
        (bench, stream)
    }
}

fn status(status: u16, retry_after: Option<u64>) -> Failure {
    Failure::Status {
        status,
        text: String::new(),
        retry_after: retry_after.map(Duration::from_secs),
    }
}

#[test]
fn joins_with_a_key_and_tells_everything_each_time() {
    let mut bench = Bench::new(false, Some("tskey-auth-a"));
    let request = bench.registration();
    assert_eq!(
        request.auth.as_ref().unwrap().auth_key.as_deref(),
        Some("tskey-auth-a")
    );
    assert_eq!(request.old_node_key, None);
    assert_eq!(
        request.node_key,
        Some(bench.session.node().public().to_string())
    );
    assert!(!bench.session.is_registered());
    assert!(bench.transmits().is_empty(), "nothing before it is in");

    bench.registered(json!({"MachineAuthorized": true, "AuthURL": "", "Error": ""}));
    assert_eq!(bench.events(), [Event::Registered { new_key: false }]);
    let transmits = bench.transmits();
    let [
        Transmit::Update(update),
        Transmit::OpenStream { request, stream },
    ] = &transmits[..]
    else {
        panic!("{transmits:?}");
    };
    assert_eq!(
        (update.stream, update.omit_peers),
        (Some(false), Some(true))
    );
    assert_eq!(
        (request.stream, request.omit_peers),
        (Some(true), Some(false))
    );
    for request in [update, request] {
        assert_eq!(request.endpoints.as_ref().unwrap().len(), 1);
        assert!(request.hostinfo.is_some());
        assert_eq!(request.version, Some(CAPABILITY_VERSION));
    }
    let own = bench.own();
    bench.map(*stream, json!({"Node": own}));
    assert!(matches!(
        bench.events()[..],
        [Event::Connected, Event::Map(_)]
    ));
}

#[test]
fn a_person_is_sent_once_and_the_answer_waited_for() {
    let mut bench = Bench::new(false, None);
    assert_eq!(bench.registration().auth, None);
    bench.registered(json!({"AuthURL": "https://a/1"}));
    assert_eq!(bench.events(), [Event::Visit("https://a/1".to_owned())]);
    assert_eq!(bench.session.auth_url(), Some("https://a/1"));
    let key = bench.session.node().public();
    let request = bench.registration();
    assert_eq!(request.followup.as_deref(), Some("https://a/1"));
    assert_eq!(request.node_key, Some(key.to_string()), "the same key");
    // The wait was too long: the same again says nothing new; a fresh URL does.
    bench.registered(json!({"AuthURL": "https://a/1"}));
    assert_eq!(bench.events(), []);
    assert!(bench.wait() > Duration::ZERO);
    bench.registration();
    bench.registered(json!({"AuthURL": "https://a/2"}));
    assert_eq!(bench.events(), [Event::Visit("https://a/2".to_owned())]);
    assert_eq!(
        bench.registration().followup.as_deref(),
        Some("https://a/2")
    );
    bench.registered(json!({"MachineAuthorized": true}));
    assert_eq!(bench.events(), [Event::Registered { new_key: false }]);
    assert_eq!(bench.session.auth_url(), None);
}

#[test]
fn a_refused_node_asks_ever_later_until_somebody_acts() {
    let mut bench = Bench::new(false, Some("tskey-auth-bad"));
    let mut waits = Vec::new();
    for _ in 0..8 {
        let auth = bench.registration().auth.unwrap();
        assert_eq!(auth.auth_key.as_deref(), Some("tskey-auth-bad"));
        bench.registered(json!({"Error": "invalid key"}));
        assert_eq!(bench.events(), [Event::Refused("invalid key".to_owned())]);
        assert!(bench.session.is_refused() && bench.transmits().is_empty());
        waits.push(bench.wait().as_secs());
    }
    assert!((15..=45).contains(&waits[0]), "{waits:?}");
    assert!((300..=900).contains(&waits[7]), "{waits:?}");
    bench.registration();
    bench.registered(json!({"Error": "invalid key"}));
    let key = AuthKey::new("tskey-auth-good").ok();
    bench.session.log_in(key, false, bench.now);
    let auth = bench.registration().auth.unwrap();
    assert_eq!(auth.auth_key.as_deref(), Some("tskey-auth-good"));
}

#[test]
fn a_refusal_that_passes_costs_nothing() {
    let mut bench = Bench::new(true, None);
    let (stream, _) = bench.opened();
    let key = bench.session.node().public();
    bench
        .session
        .handle_stream_ended(stream, status(401, None), bench.now);
    bench.wait();
    bench.registration();
    bench.registered(json!({"Error": "database is locked"}));
    assert!(bench.session.is_refused());
    bench.wait();
    assert_eq!(bench.registration().node_key, Some(key.to_string()));
    bench.registered(json!({}));
    assert!(!bench.session.is_refused());
    bench.opened();
}

#[test]
fn another_key_that_is_refused_leaves_a_good_one_in_force() {
    let (mut bench, _) = Bench::connected(None);
    bench.session.log_in(None, true, bench.now);
    bench.registration();
    bench.registered(json!({"Error": "not for you"}));
    assert_eq!(bench.events(), [Event::Refused("not for you".to_owned())]);
    assert!(bench.session.is_refused() && bench.session.is_connected());
    bench.transmits();
    bench.wait();
    assert!(!bench.session.is_refused() && bench.session.is_connected());
    assert!(bench.transmits().is_empty(), "it is not asked again");
}

#[test]
fn a_busy_server_is_left_alone_as_long_as_it_asks() {
    let mut bench = Bench::new(false, None);
    bench.registration();
    bench.failed(status(429, Some(60)));
    assert!(bench.wait() >= Duration::from_secs(60));
    bench.registration();
    // Without a time it is some seconds; another failure is no wait.
    bench.failed(status(429, None));
    assert!(bench.wait() >= Duration::from_secs(5));
    bench.registration();
    bench.failed(status(503, None));
    assert!(bench.wait() <= Duration::from_secs(1));
}

#[test]
fn a_known_key_needs_no_registration() {
    let mut bench = Bench::new(true, Some("tskey-auth-once"));
    let (stream, _) = bench.opened();
    // The server does not know it: asked without the key, which may serve once only; then with it.
    bench
        .session
        .handle_stream_ended(stream, status(404, None), bench.now);
    assert!(!bench.session.is_registered());
    bench.wait();
    assert_eq!(bench.registration().auth, None);
    bench.registered(json!({"AuthURL": "https://a/1"}));
    assert!(bench.registration().auth.is_some());
    bench.registered(json!({}));
    bench.opened();
    let visits = bench.events();
    assert!(
        !visits.iter().any(|event| matches!(event, Event::Visit(_))),
        "{visits:?}"
    );
}

#[test]
fn an_expired_key_gets_another_and_the_map_stays() {
    let (mut bench, stream) = Bench::connected(Some("tskey-auth-a"));
    let mut own = bench.own();
    own["KeyExpiry"] = json!(bench.now.clock.after(Duration::from_secs(100)).to_string());
    let peer = json!({"ID": 2, "Key": format!("nodekey:{}", "02".repeat(32))});
    bench.map(stream, json!({"Node": own, "PeersChanged": [peer]}));
    bench.transmits();
    let old = bench.session.node().public();
    bench.pass(Duration::from_secs(98));
    bench.events();
    assert!(bench.transmits().is_empty());
    let wait = bench.wait();
    assert!(wait <= Duration::from_secs(2), "{wait:?}");
    assert_eq!(bench.events(), [Event::Expired]);
    let request = bench.registration();
    assert_eq!(request.old_node_key, Some(old.to_string()));
    let new = request.node_key.unwrap();
    assert_ne!(new, old.to_string());
    assert!(request.auth.is_some());
    assert_eq!(bench.session.node().public(), old, "not before it is in");
    assert_eq!(bench.session.map().peers().count(), 1);

    bench.registered(json!({}));
    assert_eq!(bench.events(), [Event::Registered { new_key: true }]);
    let transmits = bench.transmits();
    assert_eq!(transmits[0], Transmit::CloseStream);
    let Some(Transmit::OpenStream { request, .. }) = transmits.last() else {
        panic!("{transmits:?}");
    };
    assert_eq!(request.node_key.as_ref(), Some(&new));
    assert_eq!(bench.session.map().peers().count(), 1);
}

#[test]
fn more_time_for_the_key_ends_the_search_for_another() {
    let (mut bench, stream) = Bench::connected(None);
    let mut own = bench.own();
    own["Expired"] = json!(true);
    bench.map(stream, json!({"Node": own}));
    bench.registration();
    bench.registered(json!({"AuthURL": "https://a/1"}));
    assert!(bench.session.auth_url().is_some());
    own["Expired"] = json!(false);
    bench.map(stream, json!({"Node": own}));
    assert_eq!(bench.session.auth_url(), None);
    assert!(bench.session.is_connected() && bench.session.is_registered());
}

#[test]
fn expiry_goes_by_the_servers_clock() {
    let (mut bench, stream) = Bench::connected(None);
    let mut own = bench.own();
    own["KeyExpiry"] = json!(bench.now.clock.after(Duration::from_secs(3600)).to_string());
    // The server is two hours ahead.
    let there = bench.now.clock.after(Duration::from_secs(7200)).to_string();
    bench.map(stream, json!({"KeepAlive": true, "ControlTime": there}));
    bench.map(stream, json!({"Node": own}));
    assert!(bench.events().contains(&Event::Expired));
}

#[test]
fn a_server_that_says_expired_gets_a_new_key_at_once_and_then_slowly() {
    let mut bench = Bench::new(false, None);
    let first = bench.registration().node_key;
    bench.registered(json!({"NodeKeyExpired": true}));
    let second = bench.registration();
    assert_ne!(second.node_key, first);
    bench.registered(json!({"NodeKeyExpired": true}));
    assert!(bench.transmits().is_empty());
    assert!(bench.wait() > Duration::ZERO);
    bench.registration();
}

#[test]
fn leaving_ends_everything() {
    let (mut bench, _) = Bench::connected(None);
    let key = bench.session.node().public();
    bench.session.log_out(bench.now);
    let request = bench.registration();
    assert_eq!(request.node_key, Some(key.to_string()));
    assert_eq!(request.expiry.as_deref(), Some("1970-01-01T00:02:03Z"));
    assert_eq!(request.auth, None);
    bench.registered(json!({}));
    assert_eq!(bench.transmits(), [Transmit::CloseStream]);
    assert_eq!(bench.events(), [Event::LoggedOut { heard: true }]);
    assert!(!bench.session.is_registered());
    bench.pass(Duration::from_secs(10_000));
    assert!(bench.transmits().is_empty());
}

#[test]
fn a_server_that_may_know_the_node_is_told_that_it_leaves() {
    let mut bench = Bench::new(true, None);
    let (stream, _) = bench.opened();
    bench
        .session
        .handle_stream_ended(stream, status(404, None), bench.now);
    bench.wait();
    assert_eq!(bench.registration().expiry, None, "it only asks");
    bench.session.log_out(bench.now);
    assert!(bench.registration().expiry.is_some());
    bench.registered(json!({}));
    assert!(bench.events().contains(&Event::LoggedOut { heard: true }));
    // One that was never in says nothing.
    let mut bench = Bench::new(false, None);
    bench.registration();
    bench.session.log_out(bench.now);
    assert!(bench.transmits().is_empty());
    assert_eq!(bench.events(), [Event::LoggedOut { heard: true }]);
}

#[test]
fn silence_ends_a_stream_and_keep_alives_do_not() {
    let (mut bench, stream) = Bench::connected(None);
    bench.session.handle_updated(Ok(()), bench.now);
    for _ in 0..5 {
        bench.pass(Duration::from_secs(119));
        bench.map(stream, json!({"KeepAlive": true}));
        assert!(bench.session.is_connected());
    }
    bench.pass(Duration::from_secs(119));
    assert!(bench.session.is_connected());
    bench.wait();
    assert_eq!(bench.events(), [Event::Disconnected(Failure::Silent)]);
    assert_eq!(bench.transmits(), [Transmit::CloseStream]);
    // Frames of the old stream that arrive late are not believed.
    bench.map(stream, json!({"KeepAlive": true}));
    assert!(!bench.session.is_connected());
    bench.wait();
    let (next, _) = bench.opened();
    assert_ne!(next, stream);
    let own = bench.own();
    bench.map(stream, json!({"Node": own}));
    assert!(!bench.session.is_connected());
}

#[test]
fn a_first_map_without_the_node_ends_the_stream() {
    let mut bench = Bench::new(true, None);
    let (stream, _) = bench.opened();
    bench.map(stream, json!({"KeepAlive": true}));
    bench.map(stream, json!({"Domain": "a"}));
    assert_eq!(
        bench.events(),
        [Event::Disconnected(Failure::NoSelf(NoSelf))]
    );
    assert!(bench.wait() > Duration::ZERO);
    bench.opened();
}

#[test]
fn a_stream_that_breaks_behind_its_first_map_is_tried_ever_later() {
    let (mut bench, mut stream) = Bench::connected(None);
    let mut waits = Vec::new();
    for _ in 0..8 {
        let broken = Failure::Broken("no JSON".to_owned());
        bench.session.handle_stream_ended(stream, broken, bench.now);
        bench.transmits();
        waits.push(bench.wait());
        stream = bench.opened().0;
        let own = bench.own();
        bench.map(stream, json!({"Node": own}));
    }
    assert!(waits.last() > Some(&Duration::from_secs(10)), "{waits:?}");
    // One that has lived is tried soon.
    for _ in 0..40 {
        bench.pass(Duration::from_secs(1));
        bench.map(stream, json!({"KeepAlive": true}));
    }
    let broken = Failure::Broken("cut".to_owned());
    bench.session.handle_stream_ended(stream, broken, bench.now);
    bench.transmits();
    assert!(bench.wait() < Duration::from_secs(1));
}

#[test]
fn a_key_that_ended_while_the_router_was_away_is_replaced() {
    let mut bench = Bench::new(true, Some("tskey-auth-a"));
    let (stream, _) = bench.opened();
    bench
        .session
        .handle_stream_ended(stream, status(401, None), bench.now);
    bench.wait();
    let old = bench.registration().node_key;
    bench.registered(json!({"NodeKeyExpired": true}));
    let request = bench.registration();
    assert_eq!(request.old_node_key, old, "else it would be another node");
    assert_ne!(request.node_key, old);
}

#[test]
fn leaving_a_server_that_does_not_hear_says_so() {
    let (mut bench, _) = Bench::connected(None);
    bench.session.log_out(bench.now);
    bench.registration();
    bench.failed(Failure::Broken("away".to_owned()));
    assert_eq!(bench.events(), [Event::LoggedOut { heard: false }]);
}

#[test]
fn keep_alives_carry_work() {
    let mut bench = Bench::new(true, None);
    let (stream, _) = bench.opened();
    let plan = json!({"Candidates": [{"IP": "192.0.2.7", "DialTimeoutSec": 5}]});
    let frame = json!({
        "KeepAlive": true, "PingRequest": {"URL": "http://a/1"}, "PopBrowserURL": "https://a/look",
        "ControlDialPlan": plan, "Node": null,
    });
    bench.map(stream, frame.clone());
    bench.map(stream, frame);
    let answers = bench.transmits();
    assert!(matches!(&answers[..], [Transmit::Answer(answer)] if answer.body.is_none()));
    let events = bench.events();
    let looks = events
        .iter()
        .filter(|event| matches!(event, Event::Look(_)))
        .count();
    assert_eq!(looks, 1);
    assert!(
        events
            .iter()
            .any(|event| matches!(event, Event::DialPlan(_)))
    );
    assert!(!bench.session.is_connected(), "it is no map");
}

#[test]
fn asked_to_sleep_it_reads_nothing_and_the_watchdog_sleeps_too() {
    let (mut bench, stream) = Bench::connected(None);
    bench.session.handle_updated(Ok(()), bench.now);
    bench.map(stream, json!({"Debug": {"SleepSeconds": 1e9, "Exit": 3}}));
    assert_eq!(bench.events(), [Event::Exit(3)]);
    assert!(!bench.session.reads());
    bench.pass(Duration::from_secs(299));
    assert!(!bench.session.reads() && bench.session.is_connected());
    bench.wait();
    assert!(bench.session.reads() && bench.session.is_connected());
    bench.pass(Duration::from_secs(119));
    assert!(bench.session.is_connected());
}

#[test]
fn what_changes_here_is_told_once_at_a_time() {
    let (mut bench, _) = Bench::connected(None);
    let updates = |bench: &mut Bench| {
        let transmits = bench.transmits();
        transmits
            .iter()
            .filter(|t| matches!(t, Transmit::Update(_)))
            .count()
    };
    // The first one is in flight.
    for port in 1..4 {
        let about = About {
            endpoints: vec![(format!("192.0.2.1:{port}"), 1)],
            ..About::default()
        };
        bench.session.set_about(about, bench.now);
    }
    assert_eq!(updates(&mut bench), 0);
    bench.session.handle_updated(Ok(()), bench.now);
    let transmits = bench.transmits();
    let [Transmit::Update(update)] = &transmits[..] else {
        panic!("{transmits:?}");
    };
    assert_eq!(update.endpoints.as_ref().unwrap()[0], "192.0.2.1:3");
    bench
        .session
        .handle_updated(Err(status(500, None)), bench.now);
    assert_eq!(updates(&mut bench), 0);
    bench.wait();
    assert_eq!(updates(&mut bench), 1, "tried again");
    bench
        .session
        .handle_updated(Err(status(429, Some(60))), bench.now);
    bench.pass(Duration::from_secs(59));
    assert_eq!(updates(&mut bench), 0, "the server wants to be left alone");
    bench.wait();
    assert_eq!(updates(&mut bench), 1);
    let same = bench.session.about.clone();
    bench.session.handle_updated(Ok(()), bench.now);
    bench.session.set_about(same, bench.now);
    assert_eq!(updates(&mut bench), 0);
}

/// Random servers: they fail in every way for an hour, then are well. Whatever the order was, the node is in and has the map
/// soon after, and no request was made twice at once.
#[test]
fn whatever_a_server_does_the_node_comes_back() {
    for seed in 0..60 {
        let mut bench = Bench::new(seed % 2 == 0, (seed % 3 == 0).then_some("tskey-auth-a"));
        let mut random = Backoff::new(seed);
        let mut pick = |n: u64| (random.spread(Duration::from_secs(1)).as_nanos() as u64) % n;
        let begin = bench.now.instant;
        let well = |bench: &Bench| bench.now.instant - begin > Duration::from_secs(3600);
        let (mut registering, mut updating, mut stream) = (false, false, None);
        for _ in 0..20_000 {
            for transmit in bench.transmits() {
                match transmit {
                    Transmit::Register { .. } => registering = true,
                    Transmit::Update(_) => {
                        assert!(!updating, "seed {seed}: two updates at once");
                        updating = true;
                    }
                    Transmit::OpenStream { stream: id, .. } => {
                        assert!(bench.session.is_registered(), "seed {seed}");
                        stream = Some((id, true));
                    }
                    Transmit::CloseStream => stream = None,
                    Transmit::Answer(_) => {}
                }
            }
            bench.events();
            if well(&bench) && bench.session.is_connected() {
                break;
            }
            let ok = well(&bench);
            let now = bench.now;
            match pick(6) {
                0 if registering => {
                    registering = false;
                    match if ok { 9 } else { pick(10) } {
                        0 => bench.failed(status(429, Some(5))),
                        1 | 2 => bench.failed(status(500, None)),
                        3 if pick(2) == 0 => bench.registered(json!({"Error": "busy"})),
                        3 => bench.registered(json!({"NodeKeyExpired": true})),
                        4 | 5 => {
                            bench.registered(json!({"AuthURL": format!("https://a/{}", pick(3))}))
                        }
                        _ => bench.registered(json!({"MachineAuthorized": true})),
                    }
                }
                1 if updating => {
                    updating = false;
                    let result = if ok || pick(2) == 0 {
                        Ok(())
                    } else {
                        Err(status(502, None))
                    };
                    bench.session.handle_updated(result, now);
                }
                2 | 3 if stream.is_some() => {
                    let (id, first) = stream.unwrap();
                    let own = bench.own();
                    match if ok { 9 } else { pick(10) } {
                        0 => {
                            stream = None;
                            let status = status([401, 404, 429, 500, 503][pick(5) as usize], None);
                            bench.session.handle_stream_ended(id, status, now);
                        }
                        1 => {
                            stream = None;
                            let broken = Failure::Broken("cut".to_owned());
                            bench.session.handle_stream_ended(id, broken, now);
                        }
                        2 => bench.map(id, json!({"KeepAlive": true})),
                        3 => bench.map(id, json!({"Domain": "x"})),
                        4 => {
                            let mut own = own;
                            own["Expired"] = json!(pick(2) == 0);
                            bench.map(id, json!({"Node": own}));
                        }
                        5 => bench.map(id, json!({"Debug": {"SleepSeconds": 30}, "Node": own})),
                        _ => bench.map(id, json!({"Node": own})),
                    }
                    if let Some(stream) = &mut stream {
                        stream.1 = first && !bench.session.is_connected();
                    }
                }
                4 => {
                    // Not further than what is due, as a driver does.
                    let due = bench.session.poll_timeout(now);
                    let due = due.map_or(Duration::from_secs(5), |due| {
                        due.saturating_duration_since(now.instant)
                    });
                    bench.pass(due.min(Duration::from_secs(60)));
                }
                _ => bench.pass(Duration::from_millis(100 + pick(2000))),
            }
        }
        assert!(
            bench.session.is_connected(),
            "seed {seed}: not connected in the end"
        );
    }
}

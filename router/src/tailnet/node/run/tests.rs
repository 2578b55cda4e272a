//! Nodes whose server is never reached: what it would say is said by hand.

use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::tailnet::node::{KeySource, open};
use crate::tailnet::session::{Event, Failure, Now, Transmit};
use crate::tailnet::wire::RegisterRequest;

/// A node and its state directory.
struct Bench {
    node: Node,
    _updates: mpsc::Receiver<Update>,
    folder: TempDir,
}

impl Bench {
    /// One that was let in before if it is `registered`. `key` is its `auth_key`.
    fn new(registered: bool, key: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            control_url: "http://127.0.0.1:9".to_owned(),
            auth_key: key.map(|key| KeySource::parse(key, folder.path())),
            state_dir: folder.path().join("state"),
            ..Settings::default()
        };
        let mut opened = open(&settings, None).unwrap();
        opened.identity.registered = registered;
        let (updates, heard) = mpsc::channel(WAITING);
        let (told, _) = watch::channel(Arc::default());
        Self {
            node: Node::new(settings, Options::default(), opened, updates, told),
            _updates: heard,
            folder,
        }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn session(&mut self) -> &mut Session {
        self.node.driver.as_mut().expect("no session").session_mut()
    }

    /// Has the node hear what its session says.
    fn hear(&mut self) {
        while let Some(event) = self.session().poll_event() {
            self.node.handle_event(event);
        }
    }

    /// The last request to register that is on its way, with its number.
    fn asked(&mut self) -> Option<(RegisterRequest, u64)> {
        let session = self.session();
        let all = std::iter::from_fn(|| session.poll_transmit());
        let all = all.filter_map(|transmit| match transmit {
            Transmit::Register { request, attempt } => Some((*request, attempt)),
            _ => None,
        });
        all.last()
    }

    /// The auth key of the request that is on its way, which the server then answers so.
    fn register(&mut self, answer: Value) -> Option<String> {
        let (request, attempt) = self.asked().expect("nothing is asked");
        let answer = serde_json::from_value(answer).unwrap();
        self.session()
            .handle_registered(attempt, Ok(answer), Now::read());
        self.hear();
        request.auth.and_then(|auth| auth.auth_key.clone())
    }

    /// The server has forgotten the node.
    fn forgotten(&mut self) {
        let session = self.session();
        let streams = std::iter::from_fn(|| session.poll_transmit());
        let stream = streams.filter_map(|transmit| match transmit {
            Transmit::OpenStream { stream, .. } => Some(stream),
            _ => None,
        });
        let stream = stream.last().expect("no stream");
        let failure = Failure::Status {
            status: 404,
            text: String::new(),
            retry_after: None,
        };
        let now = Now::read();
        self.session().handle_stream_ended(stream, failure, now);
        self.ask_again();
        self.hear();
    }

    /// A long time passes for the session.
    fn ask_again(&mut self) {
        let now = Now::read();
        let later = Now {
            instant: now.instant + Duration::from_secs(3600),
            ..now
        };
        self.session().handle_timeout(later);
    }

    /// What comes of the key that is being made, which the node then takes.
    async fn made(&mut self) {
        assert!(self.node.making.is_some(), "no key is made");
        let made = done(&mut self.node.making).await.expect("it was cut off");
        self.node.handle_made(made);
    }
}

/// The same key twice is refused where it serves once.
#[tokio::test]
async fn a_key_is_read_anew_whenever_one_is_needed() {
    let mut bench = Bench::new(false, Some("file:key"));
    let write = |bench: &Bench, key: &str| std::fs::write(bench.path().join("key"), key).unwrap();
    write(&bench, "tskey-auth-first");
    bench.node.join();
    bench.made().await;
    assert_eq!(
        bench.register(json!({})).as_deref(),
        Some("tskey-auth-first")
    );
    assert!(bench.node.identity.registered);

    for key in ["tskey-auth-second", "tskey-auth-third"] {
        write(&bench, key);
        bench.forgotten();
        assert_eq!(bench.register(json!({"AuthURL": "https://a/1"})), None);
        bench.made().await;
        assert_eq!(bench.register(json!({})).as_deref(), Some(key));
        // The same for a node that starts anew.
        bench.node.leave();
        bench.node.join();
    }
}

#[tokio::test]
async fn a_key_of_a_command_is_kept() {
    let mut bench = Bench::new(false, None);
    let key = Some(KeySource::parse("tskey-auth-a", bench.path()));
    bench
        .node
        .handle_command(Command::LogIn { key, fresh: false })
        .await;
    bench.made().await;
    bench.register(json!({}));
    bench.forgotten();
    assert_eq!(bench.register(json!({"AuthURL": "https://a/1"})), None);
    assert_eq!(bench.register(json!({})).as_deref(), Some("tskey-auth-a"));
}

/// A node that took no part, and is told to log in.
async fn logs_in(key: Option<&str>, fresh: bool) -> Bench {
    let mut bench = Bench::new(true, None);
    bench.node.handle_command(Command::Down).await;
    let key = key.map(|key| KeySource::parse(key, bench.path()));
    bench
        .node
        .handle_command(Command::LogIn { key, fresh })
        .await;
    if bench.node.making.is_some() {
        bench.made().await;
    }
    bench
}

#[tokio::test]
async fn a_node_that_was_down_logs_in_anew() {
    for (key, fresh) in [
        (None, true),
        (Some("tskey-auth-a"), true),
        (Some("tskey-auth-a"), false),
    ] {
        let mut bench = logs_in(key, fresh).await;
        let old = bench.node.identity.node.public().to_string();
        let (request, _) = bench.asked().expect("it does not log in");
        let auth = request
            .auth
            .as_ref()
            .and_then(|auth| auth.auth_key.as_deref());
        assert_eq!(auth, key);
        assert_eq!(request.node_key.as_ref() != Some(&old), fresh);
        assert_eq!(request.old_node_key, fresh.then_some(old));
    }
}

/// The key of a command stands nowhere else.
#[tokio::test]
async fn a_key_that_is_not_there_yet_is_tried_again_while_the_node_is_in() {
    let mut bench = logs_in(Some("file:key"), false).await;
    let waits = |bench: &Bench| bench.node.make_again.is_some();
    assert!(waits(&bench) && bench.node.facts.key_problem.is_some());
    assert!(bench.session().is_registered(), "it is not in meanwhile");
    bench.node.handle_event(Event::Connected);
    assert!(bench.node.facts.key_problem.is_some(), "still tried");

    std::fs::write(bench.path().join("key"), "tskey-auth-a").unwrap();
    bench.node.make_again = Some(Instant::now());
    bench.node.handle_timeout();
    bench.made().await;
    assert_eq!(bench.register(json!({})).as_deref(), Some("tskey-auth-a"));
    assert!(!waits(&bench) && bench.node.facts.key_problem.is_none());
}

#[tokio::test]
async fn a_key_that_is_none_is_no_matter_once_the_node_is_in() {
    let mut bench = logs_in(Some("tskey-auth-a b"), false).await;
    assert!(bench.node.facts.key_problem.is_some());
    bench.node.handle_event(Event::Connected);
    assert!(bench.node.facts.key_problem.is_none());

    let key = Some(KeySource::parse("tskey-auth-a b", bench.path()));
    bench
        .node
        .handle_command(Command::LogIn { key, fresh: false })
        .await;
    bench.made().await;
    assert!(bench.node.facts.key_problem.is_some());
    bench.node.handle_command(Command::Up).await;
    assert!(bench.node.facts.key_problem.is_none());
}

#[tokio::test]
async fn another_key_in_the_settings_helps_a_node_that_waits() {
    for answer in [
        json!({"Error": "invalid key"}),
        json!({"AuthURL": "https://a/1"}),
    ] {
        let mut bench = Bench::new(false, Some("tskey-auth-bad"));
        bench.node.join();
        bench.made().await;
        bench.register(answer.clone());
        if bench.node.making.is_some() {
            // The server wants a person in spite of the key.
            bench.made().await;
            bench.register(answer);
        }
        assert!(bench.node.making.is_none());
        let other = Settings {
            auth_key: Some(KeySource::parse("tskey-auth-good", bench.path())),
            ..bench.node.settings.clone()
        };
        bench
            .node
            .handle_command(Command::Set(Box::new(other)))
            .await;
        bench.made().await;
        assert!(bench.node.facts.refused.is_none());
        assert_eq!(
            bench.register(json!({})).as_deref(),
            Some("tskey-auth-good")
        );
        assert!(bench.node.identity.registered);
    }
}

#[tokio::test]
async fn a_key_file_is_read_again_when_the_same_settings_are_said_again() {
    let mut bench = Bench::new(false, Some("file:key"));
    let write = |bench: &Bench, key: &str| std::fs::write(bench.path().join("key"), key).unwrap();
    write(&bench, "tskey-auth-bad");
    bench.node.join();
    bench.made().await;
    bench.register(json!({"Error": "invalid key"}));
    write(&bench, "tskey-auth-good");
    bench.node.handle_command(Command::ReadKey).await;
    bench.made().await;
    assert_eq!(
        bench.register(json!({})).as_deref(),
        Some("tskey-auth-good")
    );
    // One that is in needs none.
    bench.node.handle_command(Command::ReadKey).await;
    assert!(bench.node.making.is_none());
}

/// What is refused is not always the key.
#[tokio::test]
async fn a_key_that_was_not_tried_is_not_spent() {
    let mut bench = Bench::new(true, Some("tskey-auth-a"));
    bench.node.join();
    bench.forgotten();
    assert_eq!(bench.register(json!({"Error": "database is locked"})), None);
    assert!(bench.node.facts.refused.is_some());
    bench.ask_again();
    assert_eq!(bench.register(json!({"AuthURL": "https://a/1"})), None);
    bench.made().await;
    assert_eq!(bench.register(json!({})).as_deref(), Some("tskey-auth-a"));
}

#[tokio::test]
async fn a_refused_key_is_made_anew_where_another_one_can_be_had() {
    let mut bench = Bench::new(false, Some("file:key"));
    let write = |bench: &Bench, key: &str| std::fs::write(bench.path().join("key"), key).unwrap();
    write(&bench, "tskey-auth-spent");
    bench.node.join();
    bench.made().await;
    bench.register(json!({"Error": "already used"}));
    assert!(bench.node.facts.refused.is_some());
    bench.ask_again();
    write(&bench, "tskey-auth-good");
    assert_eq!(bench.register(json!({"AuthURL": "https://a/1"})), None);
    bench.made().await;
    assert_eq!(
        bench.register(json!({})).as_deref(),
        Some("tskey-auth-good")
    );

    // Not where somebody wants to come himself.
    let mut bench = Bench::new(false, Some("file:key"));
    write(&bench, "tskey-auth-spent");
    bench.node.join();
    bench.made().await;
    bench.register(json!({"Error": "already used"}));
    let login = Command::LogIn {
        key: None,
        fresh: false,
    };
    bench.node.handle_command(login).await;
    assert_eq!(bench.register(json!({"AuthURL": "https://a/1"})), None);
    assert!(bench.node.making.is_none());
}

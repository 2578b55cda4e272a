//! A node that is driven by a test.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Result;
use lab::poll;
use router::tailnet::client::{Client, Config, KEEP_ALIVE, client_config};
use router::tailnet::driver::Driver;
use router::tailnet::netmap::Netmap;
use router::tailnet::session::{About, Asked, AuthKey, Event, Now, Session, Start};
use router::tailnet::state::Identity;
use router::tailnet::wire::{Hostinfo, List, PingResponse};
use tokio::sync::mpsc;

/// What a slow machine needs at most.
pub(super) const SOON: Duration = Duration::from_secs(30);

/// What a test asks of its node.
pub(super) enum Command {
    /// Join with this key.
    LogIn(AuthKey),
    /// Leave.
    LogOut,
}

/// A running node.
pub(super) struct Node {
    commands: Option<mpsc::Sender<Command>>,
    seen: Arc<Mutex<Seen>>,
    thread: Option<std::thread::JoinHandle<Session>>,
}

#[derive(Default)]
struct Seen {
    events: Vec<Event>,
    map: Netmap,
    connected: bool,
}

/// What a router with these routes tells.
pub(super) fn about(routes: &[&str]) -> About {
    About {
        hostinfo: Hostinfo {
            backend_log_id: Some("1".repeat(64)),
            ipn_version: Some("1.102.5-sluice".to_owned()),
            os: Some("linux".to_owned()),
            hostname: Some("router".to_owned()),
            routable_ips: Some(routes.iter().map(|route| (*route).to_owned()).collect()),
            ..Hostinfo::default()
        },
        endpoints: vec![("192.0.2.1:41641".to_owned(), 1)],
        ..About::default()
    }
}

/// Tags beside what it tells.
pub(super) fn tagged(mut about: About, tags: &[&str]) -> About {
    let tags = tags.iter().map(|tag| (*tag).to_owned());
    about.hostinfo.request_tags = Some(tags.collect::<List<_>>());
    about
}

/// Answers pings that nobody carries out here.
fn refuse(asked: &Asked, driver: &Driver) {
    for kind in &asked.kinds {
        let found = PingResponse {
            kind: Some(kind.clone()),
            err: Some("a test does not ping".to_owned()),
            ..PingResponse::default()
        };
        let (answer, answers) = (asked.answer(&found).unwrap(), driver.answers());
        tokio::spawn(async move { answers.send(answer).await });
    }
}

impl Node {
    /// Starts a node; `identity` and `map` may be an older one's.
    pub(super) fn start(
        identity: &Identity,
        map: Netmap,
        key: Option<&str>,
        about: About,
    ) -> Result<Self> {
        let config = Config {
            url: identity.control_url.parse()?,
            tls: client_config(None)?,
            proxy: None,
            server_key: identity.server_key,
            keep_alive: KEEP_ALIVE,
            mark: 0,
        };
        Self::start_by(config, identity, map, key, about)
    }

    /// The same by another way to the server.
    pub(super) fn start_by(
        config: Config,
        identity: &Identity,
        map: Netmap,
        key: Option<&str>,
        about: About,
    ) -> Result<Self> {
        let client = Client::new(config, identity.machine.clone());
        let start = Start {
            about,
            auth_key: key.map(AuthKey::new).transpose()?,
            node: identity.node.clone(),
            disco: identity.disco.public(),
            registered: identity.registered,
            map,
            seed: 7,
        };
        let (commands, mut receiver) = mpsc::channel(8);
        let seen = Arc::new(Mutex::new(Seen::default()));
        let noted = seen.clone();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                let session = Session::new(start, Now::read());
                let mut driver = Driver::new(session, client);
                loop {
                    tokio::select! {
                        event = driver.next() => {
                            if let Event::Ping(asked) = &event {
                                refuse(asked, &driver);
                            }
                            let mut seen = noted.lock().unwrap();
                            seen.map = driver.session().map().clone();
                            seen.connected = driver.session().is_connected();
                            seen.events.push(event);
                        }
                        command = receiver.recv() => match command {
                            Some(Command::LogIn(key)) => {
                                driver.session_mut().log_in(Some(key), false, Now::read());
                            }
                            Some(Command::LogOut) => driver.session_mut().log_out(Now::read()),
                            None => return driver.into_session(),
                        },
                    }
                }
            })
        });
        Ok(Self {
            commands: Some(commands),
            seen,
            thread: Some(thread),
        })
    }

    /// A new node that joins with a key.
    pub(super) fn join(url: &str, key: &str, routes: &[&str]) -> Result<Self> {
        let identity = Identity::generate(url)?;
        Self::start(&identity, Netmap::default(), Some(key), about(routes))
    }

    pub(super) fn command(&self, command: Command) {
        let sender = self.commands.as_ref().unwrap();
        sender.blocking_send(command).ok().unwrap();
    }

    /// Waits for an event.
    pub(super) fn wait_event(&self, what: &str, wanted: impl Fn(&Event) -> bool) -> Result<Event> {
        let result = poll(SOON, what, || {
            let seen = self.seen.lock().unwrap();
            seen.events.iter().find(|event| wanted(event)).cloned()
        });
        result.map_err(|error| error.context(format!("events: {:?}", self.events())))
    }

    /// Waits until the stream stands and `wanted` holds of the map.
    pub(super) fn wait_map(&self, what: &str, wanted: impl Fn(&Netmap) -> bool) -> Result<Netmap> {
        let result = poll(SOON, what, || {
            let seen = self.seen.lock().unwrap();
            (seen.connected && wanted(&seen.map)).then(|| seen.map.clone())
        });
        result.map_err(|error| error.context(format!("events: {:?}", self.events())))
    }

    /// Waits for the first map.
    pub(super) fn wait_connected(&self) -> Result<Netmap> {
        self.wait_map("the first map", |map| map.own().is_some())
    }

    pub(super) fn events(&self) -> Vec<Event> {
        self.seen.lock().unwrap().events.clone()
    }

    /// Forgets the events so far.
    pub(super) fn forget(&self) {
        self.seen.lock().unwrap().events.clear();
    }

    /// Ends it and gives the session as it was.
    pub(super) fn end(mut self) -> Session {
        drop(self.commands.take());
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(self.commands.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

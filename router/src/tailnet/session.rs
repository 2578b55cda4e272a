//! A node's session with a coordination server, without I/O: registration, the map stream, what the node tells, and what
//! it is asked.
//!
//! Whoever drives it carries out what [`Session::poll_transmit`] gives, hands back what came of it, calls
//! [`Session::handle_timeout`] at [`Session::poll_timeout`], and looks at [`Session::poll_event`]. After Tailscale's
//! `control/controlclient`. Nothing that happens here takes a peer away but a map that says so: a server that is
//! gone, a key that has ended, a registration that is refused leave the map as it is.

mod answer;
mod auth_key;
pub(in crate::tailnet) mod backoff;
mod login;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

pub use answer::{Answer, Asked};
pub use auth_key::{AuthKey, AuthKeyError};

use answer::{Answers, Reaction};
use backoff::Backoff;
use login::Login;

use crate::tailnet::keys::{DiscoPublic, NodeSecret};
use crate::tailnet::netmap::{Change, Netmap, NoSelf};
use crate::tailnet::time::Timestamp;
use crate::tailnet::wire::{
    CAPABILITY_VERSION, ControlDialPlan, Hostinfo, List, MapRequest, MapResponse, RegisterRequest,
};

/// Without a frame for so long, the stream is dead: the server shows every minute that it lives.
const WATCHDOG: Duration = Duration::from_secs(120);
/// Most that the server can ask the node to do nothing.
const MOST_SLEEP: Duration = Duration::from_secs(300);
/// A stream that has lived so long has not failed: the next one is tried soon. One that brings a map and breaks is not
/// asked for that map again and again.
const STEADY: Duration = Duration::from_secs(30);
/// When a server that has too much to do names no time.
const BUSY: Duration = Duration::from_secs(7);
/// Clocks that differ by less are taken to agree.
const CLOCKS_AGREE: Duration = Duration::from_secs(60);

/// The time, by both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Only goes forward: timers.
    pub instant: Instant,
    /// The system's: expiry of keys.
    pub clock: Timestamp,
}

impl Now {
    /// What the clocks say.
    pub fn read() -> Self {
        Self {
            instant: Instant::now(),
            clock: Timestamp::now(),
        }
    }
}

/// What the node tells of itself. All of it goes into each request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct About {
    /// Routes, tags, host.
    pub hostinfo: Hostinfo,
    /// Underlay addresses, each with how it is known: 1 local, 2 STUN, 3 port mapping, 5 set by hand.
    pub endpoints: Vec<(String, i64)>,
    /// What is wrong here, as `warn-ip-forwarding-off`.
    pub debug_flags: Vec<String>,
    /// The node goes when it is not connected.
    pub ephemeral: bool,
}

/// Something to be sent.
#[derive(Clone, Debug, PartialEq)]
pub enum Transmit {
    /// POST to `/machine/register`; then [`Session::handle_registered`]. Another one in flight ends unasked.
    Register {
        /// The request.
        request: Box<RegisterRequest>,
        /// Names the attempt.
        attempt: u64,
    },
    /// POST to `/machine/map`, and each frame to [`Session::handle_map`], the end to
    /// [`Session::handle_stream_ended`]. Another stream that is open ends unasked.
    OpenStream {
        /// The request.
        request: Box<MapRequest>,
        /// Names the stream.
        stream: u64,
    },
    /// The stream is to end; nothing more is wanted of it.
    CloseStream,
    /// POST to `/machine/map`, whose answer means nothing; then [`Session::handle_updated`].
    Update(Box<MapRequest>),
    /// To be sent once; whether it arrives is not asked.
    Answer(Answer),
}

/// Something that others want to know.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A person must go to this URL, once.
    Visit(String),
    /// The node key is let in. It is another one than before if `new_key`; either way to be kept.
    Registered {
        /// Another key than before.
        new_key: bool,
    },
    /// Registration has failed on the way. It is tried again.
    Unregistered(Failure),
    /// Registration is refused. It is tried again, ever later: [`Session::log_in`] with what is right helps at once.
    Refused(String),
    /// The node's key has ended and another one is asked for.
    Expired,
    /// The node is logged out here. On the server too, if that has heard it; else the node stays there until somebody
    /// removes it, or its key ends.
    LoggedOut {
        /// The server has heard it.
        heard: bool,
    },
    /// The first map of a stream is here.
    Connected,
    /// The stream has ended, and why. It is tried again.
    Disconnected(Failure),
    /// The map has changed.
    Map(Change),
    /// Where the server is to be found from now on; to be kept.
    DialPlan(ControlDialPlan),
    /// A ping to be carried out.
    Ping(Asked),
    /// A person should look at this URL.
    Look(String),
    /// The server asks the node to end with this code.
    Exit(i64),
}

/// Why a request has failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// No connection, or one that broke.
    #[error("{0}")]
    Broken(String),
    /// The server's answer is no success.
    #[error("the server answers with status {status}: {text}")]
    Status {
        /// HTTP status.
        status: u16,
        /// Its words, shortened.
        text: String,
        /// Not before.
        retry_after: Option<Duration>,
    },
    /// Nothing came for two minutes.
    #[error("the server has been silent for two minutes")]
    Silent,
    /// The first map was none.
    #[error("{0}")]
    NoSelf(#[from] NoSelf),
}

impl Failure {
    /// How long the server wants to be left alone.
    fn wait(&self) -> Option<Duration> {
        match self {
            Self::Status {
                status: 429,
                retry_after,
                ..
            } => Some(retry_after.unwrap_or(BUSY)),
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

/// The session.
pub struct Session {
    about: About,
    auth_key: Option<AuthKey>,
    node: NodeSecret,
    disco: DiscoPublic,
    /// The node key was let in.
    registered: bool,
    login: Login,
    attempts: u64,
    stream: Stream,
    streams: u64,
    retry: Backoff,
    /// The same where the server refuses the node.
    refusals: Backoff,
    update: Update,
    map: Netmap,
    answers: Answers,
    /// How far the server's clock is ahead, in microseconds.
    ahead: i64,
    looked: Option<String>,
    transmits: VecDeque<Transmit>,
    events: VecDeque<Event>,
}

#[derive(Debug)]
enum Stream {
    /// To be opened then, if the node is registered.
    Due(Instant),
    Open {
        /// No map yet.
        first: bool,
        /// When it was opened.
        since: Instant,
        /// Dead from then on.
        deadline: Instant,
        /// Nothing is read before.
        paused: Option<Instant>,
    },
}

/// A request that tells about the node.
#[derive(Debug, Default)]
struct Update {
    due: Option<Instant>,
    in_flight: bool,
}

/// With what a session begins.
pub struct Start {
    /// What the node tells.
    pub about: About,
    /// Lets it in without a person.
    pub auth_key: Option<AuthKey>,
    /// The node key, new or kept.
    pub node: NodeSecret,
    /// The disco key.
    pub disco: DiscoPublic,
    /// The node key was let in already: the stream is opened without asking again.
    pub registered: bool,
    /// The last map that is known.
    pub map: Netmap,
    /// For jitter; anything that differs from other nodes'.
    pub seed: u64,
}

impl Session {
    /// Begins. Everything is due at once.
    pub fn new(start: Start, now: Now) -> Self {
        Self {
            login: if start.registered {
                Login::Settled
            } else {
                Login::due(now.instant)
            },
            about: start.about,
            auth_key: start.auth_key,
            node: start.node,
            disco: start.disco,
            registered: start.registered,
            attempts: 0,
            stream: Stream::Due(now.instant),
            streams: 0,
            retry: Backoff::new(start.seed),
            refusals: Backoff::slow(start.seed),
            update: Update {
                due: Some(now.instant),
                in_flight: false,
            },
            map: start.map,
            answers: Answers::default(),
            ahead: 0,
            looked: None,
            transmits: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// The map as it is known now.
    pub fn map(&self) -> &Netmap {
        &self.map
    }

    /// The map, for what is learned of peers elsewhere.
    pub fn map_mut(&mut self) -> &mut Netmap {
        &mut self.map
    }

    /// The map, at the end.
    pub fn into_map(self) -> Netmap {
        self.map
    }

    /// How far the server's clock is ahead of ours, in microseconds; 0 if they agree.
    pub fn ahead(&self) -> i64 {
        self.ahead
    }

    /// The node key that is let in, or will be.
    pub fn node(&self) -> &NodeSecret {
        &self.node
    }

    /// Whether the node key was let in.
    pub fn is_registered(&self) -> bool {
        self.registered
    }

    /// Whether the stream stands and has brought a map.
    pub fn is_connected(&self) -> bool {
        matches!(self.stream, Stream::Open { first: false, .. })
    }

    /// Whether frames of the stream are to be read now.
    pub fn reads(&self) -> bool {
        matches!(self.stream, Stream::Open { paused: None, .. })
    }

    /// What the server's clock says.
    pub fn control_time(&self, clock: Timestamp) -> Timestamp {
        Timestamp(clock.0.saturating_add(self.ahead))
    }

    /// Tells something else about the node from now on.
    pub fn set_about(&mut self, about: About, now: Now) {
        if self.about != about {
            self.about = about;
            self.update.due = Some(now.instant);
        }
        self.handle_timeout(now);
    }

    /// The next request.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`Self::handle_timeout`] is to be called, by the clock that only goes forward.
    pub fn poll_timeout(&self, now: Now) -> Option<Instant> {
        let stream = match &self.stream {
            Stream::Due(at) => self.registered.then_some(*at),
            Stream::Open {
                deadline, paused, ..
            } => Some(paused.unwrap_or(*deadline)),
        };
        let update = (self.registered && !self.update.in_flight)
            .then_some(self.update.due)
            .flatten();
        let expiry = self
            .watched_expiry()
            .map(|expiry| now.instant + expiry.since(self.control_time(now.clock)));
        [stream, update, self.login.due_at(), expiry]
            .into_iter()
            .flatten()
            .min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Now) {
        self.handle_expiry(now);
        self.handle_login_due(now);
        if self.registered {
            if !self.update.in_flight && self.update.due.is_some_and(|due| due <= now.instant) {
                self.update = Update {
                    due: None,
                    in_flight: true,
                };
                let request = Box::new(self.map_request(false));
                self.transmits.push_back(Transmit::Update(request));
            }
            match &mut self.stream {
                Stream::Due(at) if *at <= now.instant => self.open_stream(now),
                Stream::Open {
                    paused, deadline, ..
                } => {
                    if paused.is_some_and(|until| until <= now.instant) {
                        *paused = None;
                    }
                    if paused.is_none() && *deadline <= now.instant {
                        self.transmits.push_back(Transmit::CloseStream);
                        self.stream_ended(Failure::Silent, now);
                    }
                }
                Stream::Due(_) => {}
            }
        }
    }

    /// A frame of the stream that is named `stream`.
    pub fn handle_map(&mut self, stream: u64, response: MapResponse, now: Now) {
        if stream != self.streams {
            return;
        }
        let Stream::Open {
            first,
            deadline,
            paused,
            ..
        } = &mut self.stream
        else {
            return;
        };
        *deadline = now.instant + WATCHDOG;
        // Keep-alives carry work too.
        if let Some(request) = &response.ping_request {
            match self.answers.react(request) {
                Reaction::Nothing => {}
                Reaction::Answer(answer) => self.transmits.push_back(Transmit::Answer(answer)),
                Reaction::Ping(asked) => self.events.push_back(Event::Ping(asked)),
            }
        }
        if let Some(url) = response.pop_browser_url.as_ref().filter(|u| !u.is_empty())
            && self.looked.as_ref() != Some(url)
        {
            self.looked = Some(url.clone());
            self.events.push_back(Event::Look(url.clone()));
        }
        if let Some(time) = response.control_time.as_deref().and_then(Timestamp::parse) {
            let ahead = time.0.saturating_sub(now.clock.0);
            let agree = ahead.unsigned_abs() < CLOCKS_AGREE.as_micros() as u64;
            self.ahead = if agree { 0 } else { ahead };
        }
        if let Some(plan) = &response.control_dial_plan {
            self.events.push_back(Event::DialPlan(plan.clone()));
        }
        if response.keep_alive == Some(true) {
            return;
        }
        if let Some(orders) = &response.debug {
            if let Some(code) = orders.exit {
                self.events.push_back(Event::Exit(code));
            }
            let sleep = orders.sleep_seconds.unwrap_or(0.0);
            if sleep > 0.0 {
                let sleep = Duration::try_from_secs_f64(sleep).unwrap_or(MOST_SLEEP);
                let until = now.instant + sleep.min(MOST_SLEEP);
                *paused = Some(until);
                *deadline = until + WATCHDOG;
            }
        }
        match self.map.apply(response, *first, now.clock) {
            Ok(change) => {
                if std::mem::take(first) {
                    self.events.push_back(Event::Connected);
                }
                if !change.is_empty() {
                    self.events.push_back(Event::Map(change));
                }
                self.handle_timeout(now);
            }
            Err(error) => {
                self.transmits.push_back(Transmit::CloseStream);
                self.stream_ended(error.into(), now);
            }
        }
    }

    /// The stream that is named `stream` has ended, or never began.
    pub fn handle_stream_ended(&mut self, stream: u64, failure: Failure, now: Now) {
        if stream == self.streams && matches!(self.stream, Stream::Open { .. }) {
            self.stream_ended(failure, now);
        }
    }

    /// What came of [`Transmit::Update`].
    pub fn handle_updated(&mut self, result: Result<(), Failure>, now: Now) {
        self.update.in_flight = false;
        if let Err(failure) = result
            && self.update.due.is_none()
        {
            self.update.due = Some(self.retry.after(&failure, now.instant));
        }
        self.handle_timeout(now);
    }

    fn stream_ended(&mut self, failure: Failure, now: Now) {
        let refused = matches!(&failure, Failure::Status { status, .. }
            if (400..500).contains(status) && !matches!(status, 408 | 429));
        if let Stream::Open { first, since, .. } = &self.stream
            && !first
            && now.instant.duration_since(*since) >= STEADY
        {
            self.retry.succeeded();
        }
        let again = self.retry.after(&failure, now.instant);
        self.stream = Stream::Due(again);
        // What a server that starts anew has forgotten.
        self.update.due = Some(again);
        self.events.push_back(Event::Disconnected(failure));
        if refused && matches!(self.login, Login::Settled) {
            // It does not know the node key any more, or not for this machine.
            self.login = Login::confirming(again);
            self.registered = false;
        }
    }

    fn open_stream(&mut self, now: Now) {
        self.streams += 1;
        self.stream = Stream::Open {
            first: true,
            since: now.instant,
            deadline: now.instant + WATCHDOG,
            paused: None,
        };
        self.transmits.push_back(Transmit::OpenStream {
            request: Box::new(self.map_request(true)),
            stream: self.streams,
        });
    }

    fn map_request(&self, stream: bool) -> MapRequest {
        let endpoints = &self.about.endpoints;
        let flags = &self.about.debug_flags;
        let listed = !endpoints.is_empty();
        MapRequest {
            version: Some(CAPABILITY_VERSION),
            compress: Some("zstd".to_owned()),
            keep_alive: Some(true),
            node_key: Some(self.node.public().to_string()),
            disco_key: Some(self.disco.to_string()),
            stream: Some(stream),
            hostinfo: Some(self.about.hostinfo.clone()),
            endpoints: listed.then(|| endpoints.iter().map(|(at, _)| at.clone()).collect()),
            endpoint_types: listed.then(|| endpoints.iter().map(|(_, kind)| *kind).collect()),
            omit_peers: Some(!stream),
            debug_flags: (!flags.is_empty()).then(|| List(flags.clone())),
        }
    }
}

#[cfg(test)]
mod tests;

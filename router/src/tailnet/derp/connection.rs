//! One region's task: connects, reads and writes, connects again, and ends when nobody needs it.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::sync::{Notify, mpsc};

use super::dial::{self, Connection, Region, Relay};
use super::queue::Queue;
use super::session::{Said, Session, SessionError};
use super::{Failure, Options, RelayEvent};
use crate::tailnet::client::dial::Io;
use crate::tailnet::keys::{NodePublic, NodeSecret};
use crate::tailnet::session::backoff::Backoff;

/// How long a connection is kept that nobody needs.
const IDLE: Duration = Duration::from_secs(60);
/// How long one must have held for the next failure to count as the first.
const HELD: Duration = Duration::from_secs(10);
/// Bytes of room to read into.
const READ: usize = 64 << 10;
/// Between tries while a relay restarts.
const RESTART: Duration = Duration::from_millis(500);

/// What a region's task shares with whoever sends.
pub(super) struct Shared {
    state: Mutex<State>,
    wake: Notify,
}

pub(super) struct State {
    pub(super) queue: Queue,
    pub(super) region: Region,
    session: Option<Session>,
    /// Which one it is with.
    relay: Option<Relay>,
    home: bool,
    /// When packets went last, or a connection was asked for.
    used: Instant,
    /// The task has ended, or is about to.
    pub(super) over: bool,
    /// Do not wait to try again.
    hurry: bool,
    /// What the relay says when it restarts: not before, and how long to try.
    restart: Option<(Instant, Instant)>,
}

impl Shared {
    pub(super) fn new(region: Region, home: bool, queue: Queue) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                queue,
                region,
                session: None,
                relay: None,
                home,
                used: Instant::now(),
                over: false,
                hurry: false,
                restart: None,
            }),
            wake: Notify::new(),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and has the task look at it.
    pub(super) fn tell<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.wake.notify_one();
        result
    }
}

impl State {
    pub(super) fn set_home(&mut self, home: bool) {
        if self.home && !home {
            self.used = Instant::now();
        }
        self.home = home;
        if let Some(session) = &mut self.session {
            session.set_home(home);
        }
    }

    pub(super) fn touch(&mut self, now: Instant) {
        self.used = now;
    }

    pub(super) fn check(&mut self, now: Instant) {
        match &mut self.session {
            Some(session) => session.check(now),
            None => self.hurry = true,
        }
    }

    /// When nobody needs it any more.
    fn idle(&self) -> Option<Instant> {
        (!self.home).then(|| self.used + IDLE)
    }

    /// Whether to end, from now on for good.
    fn end(&mut self, now: Instant) -> bool {
        self.over |= self.idle().is_some_and(|idle| now >= idle);
        self.over
    }
}

/// What the task needs.
pub(super) struct Task {
    pub(super) number: u32,
    pub(super) node: NodeSecret,
    pub(super) options: Options,
    pub(super) shared: Arc<Shared>,
    pub(super) out: mpsc::Sender<RelayEvent>,
}

/// Why a connection ends.
enum End {
    /// Nobody listens any more, or nobody needs it.
    Over,
    /// Without anybody wanting it.
    Broken(String),
}

impl From<SessionError> for End {
    fn from(error: SessionError) -> Self {
        Self::Broken(error.to_string())
    }
}

fn broken(error: std::io::Error) -> End {
    End::Broken(format!("the connection broke: {error}"))
}

impl Task {
    /// Until nobody needs the region any more.
    pub(super) async fn run(self) {
        let mut backoff = Backoff::new(getrandom::u64().unwrap_or(self.number.into()));
        let region = self.number;
        loop {
            let began = Instant::now();
            let End::Broken(why) = self.once().await else {
                break;
            };
            let now = Instant::now();
            if now - began >= HELD {
                backoff.succeeded();
            }
            let restart = self.shared.lock().restart;
            let until = match restart.filter(|(_, until)| now < *until) {
                // Without growing patience, for as long as the relay has asked for.
                Some((not_before, _)) => not_before.max(now + backoff.spread(RESTART)),
                None => backoff.next(now),
            };
            let retry = until.saturating_duration_since(now);
            tracing::debug!("relay region {region}: {why}; again in {retry:?}");
            let failure = Some(Failure { why, retry });
            if self
                .tell(RelayEvent::Disconnected { region, failure })
                .await
                .is_err()
                || self.wait(until).await.is_err()
            {
                break;
            }
        }
        let failure = None;
        let _ = self
            .tell(RelayEvent::Disconnected { region, failure })
            .await;
    }

    async fn tell(&self, event: RelayEvent) -> Result<(), End> {
        self.out.send(event).await.map_err(|_| End::Over)
    }

    /// Waits to try again.
    async fn wait(&self, until: Instant) -> Result<(), End> {
        loop {
            let idle = {
                let mut state = self.shared.lock();
                let now = Instant::now();
                if state.end(now) {
                    return Err(End::Over);
                }
                if std::mem::take(&mut state.hurry) || now >= until {
                    return Ok(());
                }
                state.idle()
            };
            let next = idle.map_or(until, |idle| idle.min(until));
            tokio::select! {
                () = tokio::time::sleep_until(next.into()) => {}
                () = self.shared.wake.notified() => {}
            }
        }
    }

    /// One connection, to its end.
    async fn once(&self) -> End {
        let region = self.shared.lock().region.clone();
        let connection = match dial::dial(&region, &self.options).await {
            Ok(connection) => connection,
            Err(error) => return End::Broken(error.to_string()),
        };
        let mut nonce = [0; 24];
        if getrandom::fill(&mut nonce).is_err() {
            return End::Broken("the system gives no random numbers".to_owned());
        }
        let Connection {
            io,
            rest,
            server,
            relay,
        } = connection;
        let name = relay.name.clone();
        {
            let mut state = self.shared.lock();
            let now = Instant::now();
            match Session::new(self.node.clone(), server, state.home, nonce, now) {
                Ok(session) => state.session = Some(session),
                Err(error) => return error.into(),
            }
            state.relay = Some(relay);
        }
        let (read, write) = tokio::io::split(io);
        let Err(end) = tokio::select! {
            end = self.read(read, rest, name) => end,
            end = self.write(write) => end,
        };
        let mut state = self.shared.lock();
        state.session = None;
        state.relay = None;
        end
    }

    async fn read(
        &self,
        mut io: ReadHalf<Io>,
        mut buffer: BytesMut,
        relay: String,
    ) -> Result<Infallible, End> {
        let region = self.number;
        loop {
            let (said, packets) = self.take(&mut buffer)?;
            for what in said {
                self.tell(event(region, what, &relay)).await?;
            }
            if !packets.is_empty() {
                self.tell(RelayEvent::Packets { region, packets }).await?;
            }
            buffer.reserve(READ);
            if io.read_buf(&mut buffer).await.map_err(broken)? == 0 {
                return Err(End::Broken(
                    "the relay has closed the connection".to_owned(),
                ));
            }
        }
    }

    /// What is in what was read: what the relay says, and packets.
    #[allow(clippy::type_complexity)]
    fn take(&self, buffer: &mut BytesMut) -> Result<(Vec<Said>, Vec<(NodePublic, Bytes)>), End> {
        let now = Instant::now();
        let (mut said, mut packets) = (Vec::new(), Vec::new());
        let mut state = self.shared.lock();
        let session = state.session.as_mut().ok_or(End::Over)?;
        session.handle_input(buffer, now)?;
        let mut wake = session.has_control();
        while let Some(what) = session.poll_said() {
            match what {
                Said::Packet(from, bytes) => packets.push((from, bytes)),
                other => said.push(other),
            }
        }
        if !packets.is_empty() {
            state.used = now;
        }
        for what in &said {
            match what {
                // Now what waits may go.
                Said::Welcome => wake = true,
                Said::Restarting {
                    reconnect_in,
                    try_for,
                } => {
                    let not_before = now + *reconnect_in;
                    state.restart = Some((not_before, not_before + *try_for));
                }
                _ => {}
            }
        }
        drop(state);
        if wake {
            self.shared.wake.notify_one();
        }
        Ok((said, packets))
    }

    async fn write(&self, mut io: WriteHalf<Io>) -> Result<Infallible, End> {
        let mut out = BytesMut::new();
        loop {
            let mut next = self.due(Some(&mut out))?;
            if out.is_empty() {
                tokio::select! {
                    () = tokio::time::sleep_until(next.into()) => {}
                    () = self.shared.wake.notified() => {}
                }
                continue;
            }
            let written = async {
                io.write_all(&out).await?;
                io.flush().await
            };
            let mut written = std::pin::pin!(written);
            loop {
                tokio::select! {
                    result = &mut written => break result.map_err(broken)?,
                    // A relay that takes nothing may be dead too.
                    () = tokio::time::sleep_until(next.into()) => next = self.due(None)?,
                }
            }
            out.clear();
        }
    }

    /// Does what is due, writes what may go to `out`, and says when something is due again.
    fn due(&self, out: Option<&mut BytesMut>) -> Result<Instant, End> {
        let now = Instant::now();
        let mut state = self.shared.lock();
        if state.end(now) {
            return Err(End::Over);
        }
        let State {
            session,
            queue,
            region,
            relay,
            ..
        } = &mut *state;
        let session = session.as_mut().ok_or(End::Over)?;
        if relay
            .as_ref()
            .is_some_and(|relay| !region.relays.contains(relay))
        {
            return Err(End::Broken(
                "the map does not have this relay any more".to_owned(),
            ));
        }
        session.handle_timeout(now)?;
        let room = out.is_some();
        if let Some(out) = out {
            session.transmit(queue, out, now);
        }
        let timeout = match room {
            true => session.poll_timeout(),
            // Nothing can be sent now: only the end is waited for.
            false => session.death().0,
        };
        Ok(state.idle().map_or(timeout, |idle| idle.min(timeout)))
    }
}

fn event(region: u32, said: Said, relay: &str) -> RelayEvent {
    match said {
        Said::Welcome => RelayEvent::Connected {
            region,
            relay: relay.to_owned(),
        },
        Said::Packet(from, bytes) => RelayEvent::Packets {
            region,
            packets: vec![(from, bytes)],
        },
        Said::Gone(peer, reason) => RelayEvent::Gone {
            region,
            peer,
            reason,
        },
        Said::Health(text) => RelayEvent::Health { region, text },
        Said::Restarting { reconnect_in, .. } => RelayEvent::Restarting {
            region,
            reconnect_in,
        },
        Said::Latency(latency) => RelayEvent::Latency { region, latency },
    }
}

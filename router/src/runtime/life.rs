//! The router's life: what moves it on, and what it has the daemon do.
//!
//! [`crate::cloud::life`] decides; here are the clock, the flows that are counted, and whoever carries its actions
//! out: the daemon itself, and for what concerns a cloud, the agent there.

use std::future::pending;
use std::io;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::task::JoinHandle;

use super::ending::Ending;
use super::{Daemon, drained, notify};
use crate::api::LifeStatus;
use crate::cloud::life::{Action, Cause, Life, Patience, Phase, Seen};
use crate::core::Part;
use crate::datapath::Connections;
use crate::tailnet::node::{BackendState, Command};

/// Flows are counted so often while they are waited for...
const OFTEN: Duration = Duration::from_secs(1);
/// ...and so often when they are not any more...
const SELDOM: Duration = Duration::from_secs(10);
/// ...but between two counts goes so many times as long as one takes: a large table costs something.
const PAUSES: u32 = 20;
/// A daemon that was told to stop ends so long after the flows' time, whatever is still to be done.
const GRACE: Duration = Duration::from_secs(15);

/// The life and what it needs.
pub(super) struct Course {
    life: Life,
    /// Routes are not offered, and new flows are refused.
    withdrawn: bool,
    count: Count,
    /// When a daemon that was told to stop ends at the latest.
    ends: Option<Instant>,
    /// The phase that the log has told.
    told: Phase,
}

/// The flows that are still in use.
#[derive(Default)]
struct Count {
    /// How many there were; `None`: nobody has counted.
    last: Option<u64>,
    /// Why they could not be counted.
    failure: Option<String>,
    /// Those of the programs are being counted; how many others there are, and since when.
    running: Option<(JoinHandle<io::Result<u64>>, u64, Instant)>,
    /// When they are counted again, if ever.
    due: Option<Instant>,
}

impl Course {
    /// A router that begins. The daemon before may have been drained by hand, with so much time left: then this one
    /// takes no new flow from the start.
    pub(super) fn new(patience: Patience, drained: Option<Duration>) -> Self {
        let mut course = Self {
            life: Life::new(patience),
            withdrawn: drained.is_some(),
            count: Count::default(),
            ends: None,
            told: Phase::Starting,
        };
        if let Some(left) = drained {
            tracing::info!(
                "somebody has drained the daemon before this one, so this one is drained, too; `sluice undrain` takes \
                 that back"
            );
            course.see(Seen::Drain(Some(left)));
        }
        course
    }

    pub(super) fn set_patience(&mut self, patience: Patience) {
        self.life.set_patience(patience);
    }

    /// Whether routes are not offered, and new flows refused.
    pub(super) fn has_withdrawn(&self) -> bool {
        self.withdrawn
    }

    /// A signal asks the daemon to stop. The second one is not to be put off.
    pub(super) fn tell_to_stop(&mut self, name: &str) {
        let now = Instant::now();
        if self.ends.is_some() {
            tracing::info!("stopping at once on another {name}");
            self.ends = Some(now);
            return;
        }
        tracing::info!("stopping on {name}");
        let patience = self.life.patience().stop;
        let longest = patience + GRACE;
        if !patience.is_zero() {
            notify::notify(&format!(
                "STOPPING=1\nEXTEND_TIMEOUT_USEC={}",
                longest.as_micros()
            ));
        }
        self.ends = Some(now + longest);
        self.see(Seen::Signal);
    }

    fn drain(&mut self, patience: Option<Duration>) -> Result<(), String> {
        self.stays()?;
        self.see(Seen::Drain(patience));
        Ok(())
    }

    fn undrain(&mut self) -> Result<(), String> {
        self.stays()?;
        self.see(Seen::Undrain);
        Ok(())
    }

    /// How long flows still have.
    fn left(&self) -> Duration {
        match self.life.phase() {
            Phase::Draining { until, .. } => until.saturating_duration_since(Instant::now()),
            _ => Duration::ZERO,
        }
    }

    fn stays(&self) -> Result<(), String> {
        match self.life.cause().filter(|cause| cause.leaves()) {
            Some(cause) => Err(format!(
                "this router is on its way out, for {}, which a command does not change",
                cause.words()
            )),
            None => Ok(()),
        }
    }

    /// Waits until the programs' flows are counted, if they are being counted. Cancel safe.
    pub(super) async fn counted(&mut self) {
        let Some((running, others, since)) = &mut self.count.running else {
            return pending().await;
        };
        let (others, since) = (*others, *since);
        let counted = match running.await {
            Ok(Ok(flows)) => Ok(flows + others),
            Ok(Err(error)) => Err(error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        self.count.running = None;
        self.take_count(counted, since);
    }

    /// When [`Daemon::live`] has something to do although nothing happened.
    pub(super) fn due(&self) -> Option<Instant> {
        let count = self.count.due.filter(|_| self.count.running.is_none());
        let dues = [self.life.poll_timeout(), count, self.ends];
        dues.into_iter().flatten().min()
    }

    /// Takes what was seen.
    pub(super) fn see(&mut self, seen: Seen) {
        self.life.handle(seen, Instant::now());
    }

    /// What comes next.
    fn next_action(&mut self) -> Option<Action> {
        self.life.poll_action(Instant::now())
    }

    /// An action is done, or has failed.
    pub(super) fn done(&mut self, action: Action, well: bool) {
        self.life.handle_done(action, well, Instant::now());
    }

    /// What is being done will not be answered.
    pub(super) fn give_up(&mut self) {
        if let Some(action) = self.life.pending() {
            self.done(action, true);
        }
    }

    /// Takes a count of all flows, which began at `since`.
    fn take_count(&mut self, counted: Result<u64, String>, since: Instant) {
        let now = Instant::now();
        match counted {
            Ok(flows) => {
                self.count.last = Some(flows);
                self.count.failure = None;
                self.see(Seen::Flows(flows));
            }
            Err(error) => {
                if self.count.failure.is_none() {
                    tracing::warn!(
                        "flows cannot be counted, so all of the time is waited: {error}"
                    );
                }
                self.count.failure = Some(error);
            }
        }
        let pause = match self.life.phase() {
            Phase::Draining { .. } => OFTEN,
            _ => SELDOM,
        };
        self.count.due = Some(now + pause.max(PAUSES * (now - since)));
    }

    /// Says in the log where it is now.
    fn tell(&mut self) {
        let phase = self.life.phase();
        if std::mem::discriminant(&phase) == std::mem::discriminant(&self.told) {
            return;
        }
        let before = std::mem::replace(&mut self.told, phase);
        let left = self.count.last;
        let cause = self.life.cause().map_or("", Cause::words);
        match phase {
            Phase::Draining { .. } => {
                let seconds = self.left().as_secs();
                tracing::info!(
                    "draining, for {cause}: new flows are refused, and those that are there have {seconds} s"
                );
            }
            Phase::Drained => match left {
                Some(0) => tracing::info!("drained: no flow is left"),
                _ => tracing::info!(
                    left,
                    "drained: the time is up, and flows that are left go on"
                ),
            },
            Phase::Serving if before != Phase::Starting => tracing::info!("serving again"),
            // A mere stop has been told.
            Phase::Leaving if self.withdrawn => tracing::info!(left, "leaving, for {cause}"),
            Phase::Left if self.ends.is_none() => {
                tracing::info!("nothing holds this instance any more")
            }
            _ => {}
        }
    }

    /// What is to be known of it.
    pub(super) fn status(&self) -> LifeStatus {
        let phase = self.life.phase();
        let until = match phase {
            Phase::Draining { .. } => {
                let at = (SystemTime::now() + self.left()).duration_since(UNIX_EPOCH);
                at.ok().map(|at| at.as_secs())
            }
            _ => None,
        };
        let waits_for = match (self.life.pending(), phase) {
            (Some(action), _) => Some(words(action)),
            (None, Phase::Draining { .. }) => Some("flows to end"),
            _ => None,
        };
        let cause = self.life.cause();
        LifeStatus {
            phase: phase.label(),
            cause: cause.map(Cause::label),
            reason: cause.map(Cause::words),
            until,
            flows: self.count.last.filter(|_| self.withdrawn),
            waits_for,
        }
    }

    /// Why no new flows are taken; `None`: they are.
    pub(super) fn unready(&self) -> Option<String> {
        if self.life.serves() {
            return None;
        }
        let phase = self.life.phase().label();
        let cause = self.life.cause().map_or("", Cause::words);
        Some(format!(
            "life: {phase}, for {cause}, so new flows are refused"
        ))
    }

    /// Why it may wait for longer than it need.
    pub(super) fn problem(&self) -> Option<String> {
        let error = self.count.failure.as_ref()?;
        Some(format!(
            "the flows that are left cannot be counted, so that a router that drains waits for all of its time: {error}"
        ))
    }
}

/// What is waited for while an action is to be done.
fn words(action: Action) -> &'static str {
    match action {
        Action::CompleteLaunch => "the group to hear that the instance serves",
        Action::Withdraw => "new flows to be refused",
        Action::Advertise => "new flows to be taken again",
        Action::Heartbeat => "the group to hear that the instance still drains",
        Action::Leave => "the node to leave its tailnet",
        Action::DropRoutes => "VPC routes to this instance to be deleted",
        Action::CompleteTermination => "the group to hear that nothing holds the instance",
    }
}

impl Daemon {
    /// Moves the life on, and does what it asks for; how the daemon ends, if it is at its end.
    pub(super) async fn live(&mut self) -> Option<Ending> {
        if self.ready && self.has_map() {
            let starts = self.life.life.phase() == Phase::Starting;
            self.life.see(Seen::Ready);
            if starts {
                self.cloud.claim(true);
            }
        }
        loop {
            self.life.life.handle_timeout(Instant::now());
            self.life.tell();
            let Some(action) = self.life.next_action() else {
                // A count may be what was waited for.
                match self.count_flows() {
                    true => continue,
                    false => break,
                }
            };
            let well = match action {
                Action::Withdraw => self.offer(false).await,
                Action::Advertise => self.offer(true).await,
                Action::Leave => {
                    self.leave_tailnet(true).await;
                    true
                }
                Action::CompleteLaunch
                | Action::Heartbeat
                | Action::DropRoutes
                | Action::CompleteTermination => {
                    if self.cloud.act(action) {
                        // The agent tells when that is done.
                        continue;
                    }
                    // Nobody waits for it.
                    true
                }
            };
            self.life.done(action, well);
        }
        let ends = self.life.ends?;
        let over = self.life.life.phase() == Phase::Left || ends <= Instant::now();
        if over {
            // Whoever starts it again wants it to serve.
            drained::forget(&self.lock.drained());
        }
        over.then_some(Ending::Stop)
    }

    /// Somebody asks for it; a sentence where that cannot be.
    pub(super) fn drain_by_hand(&mut self, patience: Option<Duration>) -> Result<(), String> {
        self.life.drain(patience)?;
        drained::keep(&self.lock.drained(), self.life.left());
        Ok(())
    }

    /// Takes [`Daemon::drain_by_hand`] back.
    pub(super) fn undrain(&mut self) -> Result<(), String> {
        self.life.undrain()?;
        drained::forget(&self.lock.drained());
        Ok(())
    }

    /// Whether what there is to serve is known: from the cloud, and from the tailnet, if the router is to be in one.
    fn has_map(&self) -> bool {
        if !self.cloud.unready(&self.sources.config).is_empty() {
            return false;
        }
        if self.sources.config.tailnet.is_none() || !self.sources.is_up() {
            return true;
        }
        let state = self.tailnet.as_ref().map(|t| t.node.report().state);
        state == Some(BackendState::Running)
    }

    /// Has routes offered and new flows taken, or neither; whether that is in force.
    async fn offer(&mut self, offers: bool) -> bool {
        self.life.withdrawn = !offers;
        self.life.count = Count::default();
        self.life.count.due = (!offers).then(Instant::now);
        self.cloud.claim(offers);
        if let Some(tailnet) = &self.tailnet {
            tailnet.node.send(Command::Offer(offers));
        }
        self.replan();
        self.act().await;
        self.core.holds(Part::Datapath)
    }

    /// Counts the flows that are in use, if it is time; whether they are counted by now.
    fn count_flows(&mut self) -> bool {
        let now = Instant::now();
        let count = &mut self.life.count;
        if count.running.is_some() || count.due.is_none_or(|due| due > now) {
            return false;
        }
        count.due = None;
        // A tailnet's route moves with all its flows, and what the clients leave behind nobody closes.
        let connections = match self.tailnet {
            Some(_) => Connections::Busy,
            None => Connections::Open,
        };
        let kernels = self.machine.kernel.live_flows(connections);
        match (kernels, &self.machine.ebpf) {
            (Err(error), _) => self.life.take_count(Err(error.to_string()), now),
            (Ok(flows), None) => self.life.take_count(Ok(flows), now),
            (Ok(flows), Some(ebpf)) => {
                let tables = ebpf.flows();
                let running = tokio::task::spawn_blocking(move || tables.live(connections));
                self.life.count.running = Some((running, flows, now));
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests;

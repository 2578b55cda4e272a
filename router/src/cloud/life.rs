//! The life of a router that others may replace, without I/O: it serves, lets its flows end, leaves.
//!
//! One life for every cause: the group takes the instance away, the spot market wants it back, somebody drains
//! the router by hand, or the daemon is told to stop. What differs is how long there is, and whom to tell.
//!
//! The order is always the same. First the routes are withdrawn, so that new flows go to another router, and new
//! ones are refused here. Then the flows that are there end by themselves, or the time is up. Then the node
//! leaves, and takes a VPC route that names it along; at last the group is told that nothing holds the
//! instance any more. Drained by hand it does not leave, and gives up the VPC route all the same.

use std::time::{Duration, Instant};

/// Without a sign of life for its heartbeat timeout, a hook ends by its default. The shortest timeout that a
/// hook can have is 30 s.
const HEARTBEAT: Duration = Duration::from_secs(20);
/// A reclaimed spot instance is gone two minutes after the notice; some of it is already over when it is seen.
const SPOT: Duration = Duration::from_secs(100);
/// How long an action that has failed waits before it is tried again, doubled each time up to [`MOST`].
const RETRY: Duration = Duration::from_secs(2);
const MOST: Duration = Duration::from_secs(60);
/// On the way out an action is passed over after so many failures: who cannot be told must not hold the rest up.
const TRIES: u32 = 4;

/// Why a router drains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// Somebody has asked for it, and may take it back.
    Hand,
    /// The group takes the instance out.
    Group,
    /// The daemon has been told to stop.
    Signal,
    /// The spot market takes the instance in two minutes.
    Spot,
}

impl Cause {
    /// The word for JSON and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Hand => "hand",
            Self::Group => "group",
            Self::Signal => "signal",
            Self::Spot => "spot",
        }
    }

    /// In words, for `status` and the log.
    pub fn words(self) -> &'static str {
        match self {
            Self::Hand => "somebody has asked for it",
            Self::Group => "its group takes the instance out",
            Self::Signal => "the daemon has been told to stop",
            Self::Spot => "the spot instance is taken back within two minutes",
        }
    }

    /// Whether the router leaves when it has drained. By hand it stays.
    pub fn leaves(self) -> bool {
        matches!(self, Self::Group | Self::Signal | Self::Spot)
    }
}

/// Where in its life a router is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Not yet all in force.
    Starting,
    /// All in force.
    Serving,
    /// Its flows end.
    Draining {
        /// Why.
        cause: Cause,
        /// When it no longer waits.
        until: Instant,
    },
    /// Drained, and staying.
    Drained,
    /// On its way out.
    Leaving,
    /// Nothing is left to do.
    Left,
}

impl Phase {
    /// Every word for it, in the order of a life.
    pub const LABELS: [&str; 6] = [
        "starting", "serving", "draining", "drained", "leaving", "left",
    ];

    /// The word for `status`, JSON and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Serving => "serving",
            Self::Draining { .. } => "draining",
            Self::Drained => "drained",
            Self::Leaving => "leaving",
            Self::Left => "left",
        }
    }
}

/// Something to be done. Whoever does it says how it went by [`Life::handle_done`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// The launch hook: the instance serves.
    CompleteLaunch,
    /// Routes are no longer advertised, and new flows are refused.
    Withdraw,
    /// Takes [`Action::Withdraw`] back, and [`Action::DropRoutes`].
    Advertise,
    /// The termination hook is to wait on.
    Heartbeat,
    /// The node leaves its tailnet, if it is one that should.
    Leave,
    /// VPC routes that name this instance's own interface go.
    DropRoutes,
    /// The termination hook: nothing holds the instance.
    CompleteTermination,
}

/// What was seen from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// What is wanted is in force.
    Ready,
    /// The group wants this state of the instance (`target-lifecycle-state`).
    Target(Target),
    /// The spot market's notice.
    Spot,
    /// `sluice drain`, and how long flows may take instead of what was configured.
    Drain(Option<Duration>),
    /// `sluice undrain`.
    Undrain,
    /// SIGTERM.
    Signal,
    /// So many flows are carried.
    Flows(u64),
}

/// What the group wants of the instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// To serve.
    InService,
    /// To go.
    Terminated,
}

/// How long things may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// How long flows may take to end.
    pub drain: Duration,
    /// The same when the daemon is told to stop, which a service manager waits for. Zero: it leaves at once.
    pub stop: Duration,
}

impl Default for Patience {
    /// Five minutes; and none when the daemon is told to stop, for most flows have no other router to go on by.
    fn default() -> Self {
        Self {
            drain: Duration::from_secs(300),
            stop: Duration::ZERO,
        }
    }
}

/// The life.
#[derive(Debug)]
pub struct Life {
    patience: Patience,
    phase: Phase,
    /// Why it drains, has drained or leaves.
    cause: Option<Cause>,
    /// It is in a group, whose hooks wait for a word; whether the one about the launch is still to come.
    launch: Option<bool>,
    /// The group waits for a word about the end.
    termination: bool,
    heartbeat: Option<Instant>,
    /// What is to be done now, the first of it first.
    todo: Vec<Action>,
    /// What is being done.
    doing: Option<Action>,
    /// What has failed is tried again then; how often it has failed.
    again: Option<(Instant, u32)>,
}

impl Life {
    /// A router that begins. Whether it is in a group is told by [`Seen::Target`].
    pub fn new(patience: Patience) -> Self {
        Self {
            patience,
            phase: Phase::Starting,
            cause: None,
            launch: None,
            termination: false,
            heartbeat: None,
            todo: Vec::new(),
            doing: None,
            again: None,
        }
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Why it drains, has drained or leaves.
    pub fn cause(&self) -> Option<Cause> {
        self.cause
    }

    /// What is being done, or is to be done next.
    pub fn pending(&self) -> Option<Action> {
        self.doing.or_else(|| self.todo.first().copied())
    }

    /// How long things may take.
    pub fn patience(&self) -> Patience {
        self.patience
    }

    /// Has things take so long from now on. What is under way goes on as it began.
    pub fn set_patience(&mut self, patience: Patience) {
        self.patience = patience;
    }

    /// Whether new flows are welcome.
    pub fn serves(&self) -> bool {
        matches!(self.phase, Phase::Starting | Phase::Serving)
    }

    /// Takes what was seen.
    pub fn handle(&mut self, seen: Seen, now: Instant) {
        match seen {
            Seen::Ready if self.phase == Phase::Starting => {
                self.phase = Phase::Serving;
                self.complete_launch();
            }
            Seen::Ready => {}
            Seen::Target(Target::InService) => {
                self.launch.get_or_insert(true);
                self.complete_launch();
            }
            Seen::Target(Target::Terminated) => {
                if !self.termination && self.phase != Phase::Left {
                    self.termination = true;
                    self.heartbeat = Some(now);
                    if self.phase == Phase::Leaving {
                        self.push(Action::CompleteTermination);
                    }
                }
                self.drain(Cause::Group, now);
            }
            Seen::Spot => self.drain(Cause::Spot, now),
            Seen::Drain(patience) => self.drain_by_hand(patience, now),
            Seen::Signal => self.drain(Cause::Signal, now),
            Seen::Undrain => self.undrain(),
            Seen::Flows(0) => {
                if let Phase::Draining { cause, .. } = self.phase
                    && !self.is_due(Action::Withdraw)
                {
                    self.drained(cause);
                }
            }
            Seen::Flows(_) => {}
        }
    }

    /// What is to be done next, one thing at a time. Its outcome is told by [`Life::handle_done`].
    pub fn poll_action(&mut self, now: Instant) -> Option<Action> {
        if self.doing.is_some() {
            return None;
        }
        if self.heartbeat.is_some_and(|at| at <= now) {
            self.heartbeat = Some(now + HEARTBEAT);
            self.doing = Some(Action::Heartbeat);
            return self.doing;
        }
        if self.again.is_some_and(|(at, _)| at > now) || self.todo.is_empty() {
            return None;
        }
        self.doing = Some(self.todo.remove(0));
        self.doing
    }

    /// An action is done, or has failed and is tried again. A heartbeat is not: the next one serves as well.
    pub fn handle_done(&mut self, action: Action, well: bool, now: Instant) {
        if self.doing == Some(action) {
            self.doing = None;
        }
        if action == Action::Heartbeat {
            return;
        }
        if action == Action::CompleteLaunch && well {
            self.launch = Some(false);
        }
        let failed = self.again.map_or(0, |(_, failed)| failed) + 1;
        // What is no longer wanted need not be done.
        let well = well || !self.wants(action);
        if !well && (self.phase != Phase::Leaving || failed < TRIES) {
            let wait = RETRY.saturating_mul(1 << (failed - 1).min(10)).min(MOST);
            self.again = Some((now + wait, failed));
            self.todo.insert(0, action);
            return;
        }
        self.again = None;
        if self.phase == Phase::Leaving && self.todo.is_empty() {
            self.phase = Phase::Left;
            self.heartbeat = None;
        }
    }

    /// When [`Life::handle_timeout`] and [`Life::poll_action`] are to be called.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let until = match self.phase {
            Phase::Draining { until, .. } => Some(until),
            _ => None,
        };
        let again = self.again.map(|(at, _)| at);
        [until, self.heartbeat, again].into_iter().flatten().min()
    }

    /// The time has come for something.
    pub fn handle_timeout(&mut self, now: Instant) {
        if let Phase::Draining { cause, until } = self.phase
            && until <= now
        {
            self.drained(cause);
        }
    }

    /// The group is told of the launch once, when the router serves. What a drain by hand has come between is told
    /// after it.
    fn complete_launch(&mut self) {
        let due = self.is_due(Action::CompleteLaunch);
        if self.phase == Phase::Serving && self.launch == Some(true) && !due {
            self.push(Action::CompleteLaunch);
        }
    }

    /// Who asks again may give more or less time.
    fn drain_by_hand(&mut self, patience: Option<Duration>, now: Instant) {
        let new = now + patience.unwrap_or(self.patience.drain);
        match &mut self.phase {
            Phase::Draining {
                cause: Cause::Hand,
                until,
            } if patience.is_some() => *until = new,
            _ => self.drain_until(Cause::Hand, new),
        }
    }

    fn drain(&mut self, cause: Cause, now: Instant) {
        let patience = match cause {
            Cause::Signal => self.patience.stop,
            Cause::Spot => self.patience.drain.min(SPOT),
            _ => self.patience.drain,
        };
        let serves = self.serves();
        self.drain_until(cause, now + patience);
        if serves && cause == Cause::Signal && patience.is_zero() {
            // Who leaves at once need not withdraw before.
            self.drained(cause);
        }
    }

    fn drain_until(&mut self, cause: Cause, new: Instant) {
        match self.phase {
            Phase::Starting | Phase::Serving => {
                self.phase = Phase::Draining { cause, until: new };
                self.cause = Some(cause);
                // Nothing that is still to be done matters more, nor does a launch that ends here.
                self.todo.clear();
                self.again = None;
                self.push(Action::Withdraw);
            }
            // A graver cause takes over, and never gives more time than there was.
            Phase::Draining { cause: old, until } if cause > old => {
                self.phase = Phase::Draining {
                    cause,
                    until: until.min(new),
                };
                self.cause = Some(cause);
            }
            // What had drained already has nothing to wait for.
            Phase::Drained if cause.leaves() => self.drained(cause),
            _ => {}
        }
    }

    fn undrain(&mut self) {
        let by_choice = match self.phase {
            Phase::Draining { cause, .. } => !cause.leaves(),
            Phase::Drained => true,
            _ => false,
        };
        if by_choice {
            self.phase = Phase::Serving;
            self.cause = None;
            self.todo.clear();
            self.again = None;
            self.push(Action::Advertise);
            self.complete_launch();
        }
    }

    fn drained(&mut self, cause: Cause) {
        self.cause = Some(cause);
        if !cause.leaves() {
            self.phase = Phase::Drained;
            // Or the VPC goes on sending here what is refused, and no other router may take the route.
            self.push(Action::DropRoutes);
            return;
        }
        self.phase = Phase::Leaving;
        // What could not be withdrawn in time goes with the rest.
        self.todo.clear();
        self.again = None;
        self.push(Action::Leave);
        self.push(Action::DropRoutes);
        if self.termination {
            self.push(Action::CompleteTermination);
        }
    }

    fn wants(&self, action: Action) -> bool {
        match action {
            Action::Withdraw => matches!(self.phase, Phase::Draining { .. } | Phase::Drained),
            Action::Advertise | Action::CompleteLaunch => self.serves(),
            Action::DropRoutes => !self.serves(),
            _ => true,
        }
    }

    fn push(&mut self, action: Action) {
        if !self.todo.contains(&action) {
            self.todo.push(action);
        }
    }

    fn is_due(&self, action: Action) -> bool {
        self.doing == Some(action) || self.todo.contains(&action)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

//! Who asks the cloud for the daemon: a thread that says what it has seen, and carries out what the daemon asks of it.
//!
//! What is asked of the metadata service costs nothing and is polled; calls to AWS are made where the configuration
//! wants something that needs them. What fails is tried again, more and more rarely, and stands in the report meanwhile.

mod calls;
mod run;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use ipnet::IpNet;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};
use zeroize::Zeroizing;

use super::instance::Instance;
use super::life;

/// What the daemon wants of the cloud.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// The lifecycle hook that holds an instance which begins.
    pub launch_hook: String,
    /// The one that holds an instance which ends.
    pub termination_hook: String,
    /// VPC route tables that are to lead to the overlay by this instance.
    pub route_tables: Vec<String>,
    /// What these tables are to lead here.
    pub overlay: Vec<IpNet>,
    /// Peers appear in the VPC by their own addresses, so interfaces must take packets that are not their own.
    pub keeps_sources: bool,
    /// Where the instance's user data goes; `None`: nobody wants it.
    pub user_data: Option<PathBuf>,
}

/// What the cloud has said, and what came of an order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Something that the router's life depends on.
    Seen(life::Seen),
    /// An action is done (`true`), or has failed.
    Done(life::Action, bool),
    /// The VPC's networks, all of them.
    Networks(Vec<IpNet>),
    /// The report is another.
    Changed,
}

/// What is known of the cloud.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// This instance; `None` until the metadata service has answered.
    pub instance: Option<Instance>,
    /// The metadata service has been asked, with or without success.
    pub asked: bool,
    /// The group that the instance belongs to, as far as known.
    pub group: Option<String>,
    /// What the group wants of the instance (`target-lifecycle-state`); `None`: it belongs to none.
    pub target: Option<String>,
    /// The spot market recommends to replace the instance, for it is likely to take it back.
    pub rebalance: bool,
    /// The VPC's networks as they were told last.
    pub networks: Option<Vec<IpNet>>,
    /// Whether interfaces drop what is not their own: for each that was looked at.
    pub source_dest_check: Vec<Checked>,
    /// The VPC routes that are claimed, as they were seen last.
    pub routes: Vec<Claimed>,
    /// What is polled, in words.
    pub polled: Vec<&'static str>,
    /// What is wrong, each a sentence with its mend.
    pub problems: Vec<String>,
}

/// The source/destination check of an interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// The interface.
    pub interface: String,
    /// Whether it is on.
    pub on: bool,
}

/// A VPC route that is claimed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Claimed {
    /// The table.
    pub table: String,
    /// The destination.
    pub cidr: IpNet,
    /// The interface that it leads to; `None`: there is no such route, or it leads to something else.
    pub interface: Option<String>,
    /// Whether it leads here.
    pub own: bool,
    /// It may be another router's of the group, whose end is waited for.
    pub waits: bool,
}

/// What is asked of the agent.
enum Order {
    Act(life::Action),
    Claim(bool),
    Set(Box<Settings>),
    Parameter(String, oneshot::Sender<Result<Zeroizing<String>, String>>),
}

/// The agent from outside.
#[derive(Debug)]
pub struct Handle {
    orders: mpsc::UnboundedSender<Order>,
    events: mpsc::UnboundedReceiver<Event>,
    report: watch::Receiver<Arc<Report>>,
}

impl Handle {
    /// Asks for an action; [`Event::Done`] says what came of it. An agent that has ended hears nothing.
    pub fn act(&self, action: life::Action) {
        let _ = self.orders.send(Order::Act(action));
    }

    /// Takes VPC routes that nobody has, or does not, as from the start: what a router takes before it serves or while
    /// it drains is another one's to serve. What it has, it has until [`life::Action::DropRoutes`].
    pub fn claim(&self, claims: bool) {
        let _ = self.orders.send(Order::Claim(claims));
    }

    /// Is to be like this from now on.
    pub fn set(&self, settings: Settings) {
        let _ = self.orders.send(Order::Set(Box::new(settings)));
    }

    /// What has happened next; `None` when the agent has ended. Cancel safe.
    pub async fn event(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// What is known now.
    pub fn report(&self) -> Arc<Report> {
        self.report.borrow().clone()
    }

    /// Who fetches secrets.
    pub fn secrets(&self) -> Secrets {
        Secrets(self.orders.clone())
    }
}

/// Fetches secrets from the parameter store. Clones are the same.
#[derive(Clone, Debug)]
pub struct Secrets(mpsc::UnboundedSender<Order>);

impl Secrets {
    /// A parameter, decrypted. The error is a sentence that names what is missing.
    pub async fn parameter(&self, name: &str) -> Result<Zeroizing<String>, String> {
        let (answer, told) = oneshot::channel();
        let _ = self.0.send(Order::Parameter(name.to_owned(), answer));
        let ended = || Err("the daemon is ending".to_owned());
        told.await.unwrap_or_else(|_| ended())
    }
}

/// Starts the agent on a thread of its own, which ends with its handles. Connections carry `mark` (`SO_MARK`), which
/// keeps them out of the tunnel; 0 for none. On error no thread or runtime can be had.
pub fn spawn(settings: Settings, mark: u32) -> io::Result<Handle> {
    let (orders, inbox) = mpsc::unbounded_channel();
    let (told, events) = mpsc::unbounded_channel();
    let (published, report) = watch::channel(Arc::default());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let agent = run::Agent::new(settings, mark, told, published);
    std::thread::Builder::new()
        .name("sluice-cloud".to_owned())
        .spawn(move || runtime.block_on(agent.run(inbox)))?;
    Ok(Handle {
        orders,
        events,
        report,
    })
}

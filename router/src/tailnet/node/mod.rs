//! The router as a node: what runs a session with the coordination server, keeps what outlives a restart, makes the
//! network map into what a control source says, and tells the rest of the router how it stands.
//!
//! [`open()`] reads the state directory, [`spawn`] starts the node on a thread of its own (a map of 10,000 nodes takes a
//! while to be read, and the daemon has others to answer), [`TailnetSource`] is the control source, and a [`Handle`]
//! gives the [`Report`] and takes [`Command`]s.

mod open;
mod problems;
mod report;
mod run;
mod settings;
mod wanted;

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};

pub use open::{OpenError, Opened, open};
pub use report::{BackendState, Problem, Report};
pub use settings::{
    DEFAULT_CONTROL_URL, DEFAULT_STATE_DIR, KeySource, Settings, default_state_dir, roots, tls,
};

use crate::cloud::agent::Secrets;
use crate::control::{Source, Update};
use crate::tailnet::inside::Inside;
use crate::tailnet::keys::DiscoPublic;
use crate::tailnet::paths;

/// What others ask of the node.
#[derive(Debug)]
pub enum Command {
    /// Joins, with this key or the one of the settings; without either a person has to come. With `fresh` for a new
    /// node key, even if the one of now is good.
    LogIn {
        /// Instead of the one of the settings.
        key: Option<KeySource>,
        /// For a new node key.
        fresh: bool,
    },
    /// Ends the node key, on the server too. What comes of it goes to `done`.
    LogOut {
        /// Whether the server has heard it, or why the node is not logged out.
        done: oneshot::Sender<Result<(), String>>,
    },
    /// Goes on after [`Command::Down`].
    Up,
    /// Takes no part in the tailnet, but stays its node: no peers, no connection to the server.
    Down,
    /// Is like this from now on.
    Set(Box<Settings>),
    /// Somebody has said the same again: a key that stands elsewhere may be another one.
    ReadKey,
    /// Says all that is wanted anew.
    SayAgain,
    /// Offers the routes of the settings, or none of them until it is told to again. They are served all the same.
    Offer(bool),
    /// Ends, and keeps what is known. `done` is dropped unsent if the node is gone already.
    End {
        /// For good, as far as is known: an ephemeral node logs out first. Otherwise another daemon goes on.
        stop: bool,
        /// When all is done.
        done: oneshot::Sender<()>,
    },
}

/// The node from outside. Clones are the same node.
#[derive(Clone, Debug)]
pub struct Handle {
    commands: mpsc::UnboundedSender<Command>,
    discos: mpsc::Sender<(IpAddr, DiscoPublic)>,
    report: watch::Receiver<Arc<Report>>,
}

impl Handle {
    /// How the node stands now.
    pub fn report(&self) -> Arc<Report> {
        self.report.borrow().clone()
    }

    /// The same, to wait for changes.
    pub fn watch(&self) -> watch::Receiver<Arc<Report>> {
        self.report.clone()
    }

    /// Asks something of the node. One that has ended hears nothing.
    pub fn send(&self, command: Command) {
        let _ = self.commands.send(command);
    }

    /// The peer at this address has told its disco key through the tunnel. If peers tell more than the node can take,
    /// some is lost.
    pub fn learn_disco(&self, from: IpAddr, key: DiscoPublic) {
        let _ = self.discos.try_send((from, key));
    }
}

/// What the node needs beside the settings.
#[derive(Debug, Default)]
pub struct Options {
    /// Firewall mark of connections to the server (`SO_MARK`), which keeps them out of the tunnel; 0 for none.
    pub mark: u32,
    /// Who knows the ways to peers, and what is heard of them.
    pub paths: Option<(paths::Handle, mpsc::UnboundedReceiver<paths::Event>)>,
    /// Who pings inside the tunnel.
    pub inside: Option<Inside>,
    /// Who fetches secrets that are not on this machine.
    pub secrets: Option<Secrets>,
}

/// Starts the node on a thread of its own. The source says only what changes from [`Opened::update`] on. The thread ends
/// with [`Command::End`], or when handle and source are dropped. On error no thread or runtime can be had.
pub fn spawn(
    settings: Settings,
    opened: Opened,
    options: Options,
) -> io::Result<(Handle, TailnetSource)> {
    let (commands, inbox) = mpsc::unbounded_channel();
    let (discos, told_discos) = mpsc::channel(run::TOLD);
    let (updates, source) = mpsc::channel(run::WAITING);
    let (told, report) = watch::channel(Arc::default());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let node = run::Node::new(settings, options, opened, updates, told);
    node.publish();
    std::thread::Builder::new()
        .name("sluice-tailnet".to_owned())
        .spawn(move || runtime.block_on(node.run(inbox, told_discos)))?;
    let handle = Handle {
        commands,
        discos,
        report,
    };
    Ok((handle, TailnetSource { updates: source }))
}

/// The tailnet as a control source.
#[derive(Debug)]
pub struct TailnetSource {
    updates: mpsc::Receiver<Update>,
}

impl Source for TailnetSource {
    type Error = std::convert::Infallible;

    async fn next(&mut self) -> Result<Update, Self::Error> {
        match self.updates.recv().await {
            Some(update) => Ok(update),
            // The node has ended: what it said last stays.
            None => std::future::pending().await,
        }
    }
}

//! Asks the kernel whether packets to a peer leave by the interface that its own come in by.
//!
//! A thread of its own asks: the kernel may take its time, for it waits for whoever changes the
//! network (before Linux 6.13 a look at the IPv4 routes takes the lock of all of it, RTNL).

use std::sync::mpsc;

use tracing::info;

use crate::engine::forward::location::Way;
use crate::netlink::outgoing::Outgoing;

/// Questions that may wait. More are asked again later.
const WAITING: usize = 64;

/// Asks of one way.
pub(crate) struct Question {
    pub(crate) way: Way,
    /// Port (host byte order) and firewall mark that packets leave with.
    pub(crate) port: u16,
    pub(crate) mark: u32,
    /// Takes the answer if it is another one than [`Way::detour`].
    pub(crate) answer: Box<dyn FnOnce(Way) + Send>,
}

/// Starts the thread, for the network namespace of this one. It ends when nobody can ask any more.
pub(crate) fn start() -> std::io::Result<mpsc::SyncSender<Question>> {
    let (sender, questions) = mpsc::sync_channel::<Question>(WAITING);
    let run = move || {
        let mut outgoing = match Outgoing::open() {
            Ok(outgoing) => outgoing,
            Err(error) => return info!(%error, "changes of routes to peers are not seen"),
        };
        for Question {
            mut way,
            port,
            mark,
            answer,
        } in questions
        {
            // Without a route there is nothing to leave by: no news.
            let found = outgoing.interface(way.remote, way.local, port, mark);
            if let Ok(Some(interface)) = found
                && (interface != way.interface) != way.detour
            {
                way.detour = !way.detour;
                answer(way);
            }
        }
    };
    std::thread::Builder::new()
        .name("detours".to_owned())
        .spawn(run)?;
    Ok(sender)
}

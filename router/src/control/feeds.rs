//! Several sources at once: each is asked by a task of its own, so that none waits for another.

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{Source, Update};

/// Updates that wait; then their sources do.
const WAITING: usize = 16;

/// Asks sources, and hands on what they say.
#[derive(Debug)]
pub struct Feeds {
    sender: mpsc::Sender<(usize, Result<Update, String>)>,
    receiver: mpsc::Receiver<(usize, Result<Update, String>)>,
    tasks: JoinSet<()>,
}

impl Default for Feeds {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel(WAITING);
        Self {
            sender,
            receiver,
            tasks: JoinSet::new(),
        }
    }
}

impl Feeds {
    /// Asks `source` from now on, until this is dropped; `rank` is its place among the sources. Needs
    /// a runtime.
    pub fn add(&mut self, rank: usize, mut source: impl Source + 'static) {
        let sender = self.sender.clone();
        self.tasks.spawn(async move {
            loop {
                let said = source.next().await.map_err(|error| error.to_string());
                if sender.send((rank, said)).await.is_err() {
                    return;
                }
            }
        });
    }

    /// What the next of them says: its rank, and an update or why there is none. Cancel safe.
    pub async fn next(&mut self) -> (usize, Result<Update, String>) {
        match self.receiver.recv().await {
            Some(said) => said,
            // A sender is ours.
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Delta;
    use super::*;

    /// Says what it is given, then nothing.
    struct Script(Vec<Result<Update, std::fmt::Error>>);

    impl Source for Script {
        type Error = std::fmt::Error;

        async fn next(&mut self) -> Result<Update, std::fmt::Error> {
            match self.0.pop() {
                Some(said) => said,
                None => std::future::pending().await,
            }
        }
    }

    #[test]
    fn one_that_fails_or_is_silent_stops_no_other() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let said = runtime.block_on(async {
            let mut feeds = Feeds::default();
            let nothing = || Ok(Update::Delta(Delta::default()));
            feeds.add(1, Script(vec![nothing(), Err(std::fmt::Error)]));
            feeds.add(2, Script(Vec::new()));
            feeds.add(3, Script(vec![nothing()]));
            let mut said = Vec::new();
            for _ in 0..3 {
                let (rank, what) = feeds.next().await;
                said.push((rank, what.is_ok()));
            }
            said
        });
        let of = |rank| said.iter().filter(move |(by, _)| *by == rank);
        let of = |rank| of(rank).map(|(_, well)| *well).collect::<Vec<_>>();
        assert_eq!((of(1), of(3)), (vec![false, true], vec![true]));
    }
}

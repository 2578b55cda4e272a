//! Asks for the names of peers' endpoints.

use std::net::SocketAddr;
use std::time::Instant;

use tokio::task::JoinSet;

use crate::core::Names;
use crate::wireguard::keys::PublicKey;

/// A name, a port, and what they resolve to.
type Answer = (String, u16, Result<Vec<SocketAddr>, String>);

/// The names, and the questions that are on their way.
#[derive(Debug, Default)]
pub(super) struct Resolver {
    pub(super) names: Names,
    questions: JoinSet<Answer>,
}

impl Resolver {
    /// Asks for every name that is due.
    pub(super) fn ask(&mut self, now: Instant) {
        while let Some((host, port)) = self.names.poll_due(now) {
            self.questions.spawn(async move {
                let answer = tokio::net::lookup_host((host.as_str(), port)).await;
                let answer = answer
                    .map(Iterator::collect)
                    .map_err(|error| error.to_string());
                (host, port, answer)
            });
        }
    }

    /// Waits for an answer that moves peers, and tells which. Cancel safe.
    pub(super) async fn moved(&mut self) -> Vec<PublicKey> {
        loop {
            let Some(Ok((host, port, answer))) = self.questions.join_next().await else {
                // Without a question there is no answer.
                return std::future::pending().await;
            };
            if let Err(error) = &answer {
                tracing::warn!(
                    host,
                    error,
                    "the name of a peer's endpoint does not resolve"
                );
            }
            let moved = self
                .names
                .handle_answer(&host, port, answer, Instant::now());
            if !moved.is_empty() {
                return moved;
            }
        }
    }
}

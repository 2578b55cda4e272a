//! The status and metrics service on the local socket and on HTTP.

use std::path::Path;

/// Fetches the status document from a running daemon's socket.
pub fn fetch_status(socket: &Path) -> anyhow::Result<serde_json::Value> {
    anyhow::bail!("{}: no daemon", socket.display())
}

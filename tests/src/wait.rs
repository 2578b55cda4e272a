//! Waiting for a condition with a deadline; nothing in the lab sleeps and hopes.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::bail;

const PAUSE: Duration = Duration::from_millis(5);

/// How many times the usual a wait may take: `SLUICE_PATIENCE`, for machines that are slow.
fn patience() -> u32 {
    static PATIENCE: OnceLock<u32> = OnceLock::new();
    *PATIENCE.get_or_init(|| {
        let text = std::env::var("SLUICE_PATIENCE").ok();
        text.and_then(|text| text.parse().ok()).unwrap_or(1)
    })
}

/// Asks `probe` again and again until it yields something, at most for `timeout`. `what` completes
/// the sentence "waited 5s for …".
pub fn poll<T>(
    timeout: Duration,
    what: &str,
    mut probe: impl FnMut() -> Option<T>,
) -> anyhow::Result<T> {
    let timeout = timeout * patience();
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(found) = probe() {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            bail!("waited {timeout:?} in vain for {what}");
        }
        std::thread::sleep(PAUSE);
    }
}

/// Tries `attempt` again and again until it succeeds, at most for `timeout`; then its last error is the error.
pub fn retry<T>(
    timeout: Duration,
    what: &str,
    mut attempt: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let mut last = None;
    let outcome = poll(timeout, what, || {
        attempt().map_err(|error| last = Some(error)).ok()
    });
    outcome.map_err(|waited| match last {
        Some(error) => error.context(waited),
        None => waited,
    })
}

/// Waits until `condition` holds, at most for `timeout`.
pub fn wait_until(
    timeout: Duration,
    what: &str,
    mut condition: impl FnMut() -> bool,
) -> anyhow::Result<()> {
    poll(timeout, what, || condition().then_some(()))
}

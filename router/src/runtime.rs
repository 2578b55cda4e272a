//! Waits for events, feeds the core and carries out its actions.

use std::path::Path;

/// Runs the daemon with the configuration at `config` until it is told to stop.
pub fn run(config: &Path) -> anyhow::Result<()> {
    anyhow::bail!("{}: the daemon is not built yet", config.display())
}

//! Logs to standard error.

use std::io::{self, IsTerminal as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;

use anyhow::Context as _;
use tracing_subscriber::EnvFilter;

/// Variables that choose what is logged, the first that is set wins.
const VARIABLES: [&str; 2] = ["SLUICE_LOG", "RUST_LOG"];

/// boringtun logs each retry of each peer, without its name, from the threads that carry packets.
/// What an operator needs of it the engine counts; `boringtun=debug` brings the rest.
const QUIET: &str = "boringtun=off";

/// Starts logging at `level`, else as the environment says, else at `info`.
pub(super) fn start(level: Option<&str>) -> anyhow::Result<()> {
    let from_environment = || {
        let set = |name| Some((name, std::env::var(name).ok().filter(|v| !v.is_empty())?));
        VARIABLES.into_iter().find_map(set)
    };
    let (place, directives) = match level {
        Some(level) => ("--log", level.to_owned()),
        None => from_environment().unwrap_or(("", "info".to_owned())),
    };
    let all = if directives.contains("boringtun") {
        directives.clone()
    } else {
        format!("{directives},{QUIET}")
    };
    let filter = EnvFilter::try_new(all).with_context(|| {
        format!("{place}: {directives:?} is no log level; write error, warn, info, debug or trace")
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal());
    if to_journal() {
        builder.without_time().init();
    } else {
        builder.init();
    }
    Ok(())
}

/// Whether standard error goes to systemd's journal, which writes the time itself (systemd.exec(5),
/// JOURNAL_STREAM).
fn to_journal() -> bool {
    let stream = || {
        let stderr = std::fs::File::from(io::stderr().as_fd().try_clone_to_owned().ok()?);
        let metadata = stderr.metadata().ok()?;
        Some(format!("{}:{}", metadata.dev(), metadata.ino()))
    };
    std::env::var("JOURNAL_STREAM").is_ok_and(|journal| stream() == Some(journal))
}

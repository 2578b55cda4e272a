//! What the programs log of packets, by aya-log: for finding out what happens to single packets.
//!
//! The target is `packets`, the level trace. Whether it is wanted is decided when the programs are
//! loaded; where it is not, the verifier takes the logging out of them.

use std::io;

use aya_log::EbpfLogger;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::Level;

use super::{Error, failed};

/// The map of the log's records, named by aya-log.
pub(super) const RECORDS: &str = "AYA_LOGS";
/// Bytes of it while nothing is logged. aya makes a page of them, which is the least.
pub(super) const LEAST_ROOM: u32 = 1;
/// The level below which the programs log, named by aya-log.
pub(super) const LEVEL: &str = aya_log::LEVEL;
const TARGET: &str = "packets";

/// The level to load the programs with.
pub(super) fn level() -> u8 {
    if tracing::enabled!(target: TARGET, Level::TRACE) {
        aya_log::Level::Trace as u8
    } else {
        0
    }
}

/// Passes on what the programs log, for as long as the runtime lives, if they were loaded to.
pub(super) fn start(programs: &mut aya::Ebpf, level: u8) -> Result<(), Error> {
    if level == 0 {
        return Ok(());
    }
    let context = "read the log of the eBPF programs";
    let logger = EbpfLogger::init_with_logger(programs, Sink);
    let logger = logger.map_err(|error| failed(context, error))?;
    // SAFETY: the logger owns its map, whose descriptor stays what it is until both are dropped.
    let logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) };
    let mut logger = logger.map_err(|error| failed(context, io::Error::from(error)))?;
    tokio::spawn(async move {
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    });
    Ok(())
}

/// From the `log` crate, as aya-log speaks it, to `tracing`.
struct Sink;

impl log::Log for Sink {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        tracing::trace!(target: TARGET, "{}", record.args());
    }

    fn flush(&self) {}
}

//! The command line: argument parsing and the subcommands that are not the daemon.

/// Parses the command line and runs the subcommand it names.
pub fn main() -> anyhow::Result<()> {
    Ok(())
}

//! The `sluice` binary.

fn main() -> anyhow::Result<()> {
    router::cli::main()
}

//! The daemon's netlink code against the kernel.

mod configuration;
mod datapath;
mod leftovers;

use lab::Host;
use router::netlink::{Changes, Netlink};

/// Runs `work` with a netlink handle in the host's namespace.
fn connect<T: Send>(
    host: &Host,
    work: impl AsyncFnOnce(Netlink, Changes) -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    host.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let (netlink, changes) = Netlink::connect()?;
            work(netlink, changes).await
        })
    })?
}

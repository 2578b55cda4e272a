//! Beside Tailscale's own coordination server for tests, in Go (`tstest/integration/testcontrol`). Skipped where
//! there is no Go.

use anyhow::{Context as _, Result, ensure};
use lab::tailnet::KEY;
use lab::tailscaled::{self, Testcontrol};
use router::tailnet::netmap::NodeId;
use router::tailnet::session::Event;

use super::node::Node;

#[test]
fn joins_tailscales_own_server() -> Result<()> {
    if !tailscaled::are_here() {
        return Ok(());
    }
    let mut server = Testcontrol::start()?;
    let one = Node::join(server.url(), KEY, &["10.2.0.0/24"])?;
    let map = one.wait_connected()?;
    let own = map.own().context("no self")?;
    ensure!(!own.addresses.is_empty(), "{own:?}");
    let two = Node::join(server.url(), KEY, &[])?;
    let map = two.wait_map("the other node", |map| map.peers().count() == 1)?;
    let peer = map.peers().next().context("no peer")?;
    ensure!(peer.key == own.key, "{peer:?}");
    let id = map.own().map_or(NodeId(0), |own| own.id);
    one.wait_map("the other node's endpoint", |map| {
        map.peer(id).is_some_and(|peer| !peer.endpoints.is_empty())
    })?;

    // It is asked as the hosted server asks, through the session.
    let echo = server.ask(&format!("echo {}", own.key))?;
    ensure!(echo == "200 hello", "{echo}");

    let stranger = Node::join(server.url(), "tskey-auth-bad", &[])?;
    let refused = stranger.wait_event("the refusal", |event| matches!(event, Event::Refused(_)))?;
    ensure!(
        refused == Event::Refused("invalid authkey".to_owned()),
        "{refused:?}"
    );
    Ok(())
}

//! The router's relay client beside Tailscale's own relay, without root. Skipped where that is not built
//! (`cargo xtask setup --peers`).

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use router::tailnet::derp::{GoneReason, RelayEvent};
use router::tailnet::wire::DerpMap;
use serde_json::json;

use super::relay::{Client, run, tls};

/// A running derper. It ends when this is dropped.
struct Derper {
    child: Child,
    port: u16,
    pin: String,
    folder: tempfile::TempDir,
}

fn program() -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peers");
    let found = target.join("tailscale-1.102.5/derper");
    if !found.exists() {
        eprintln!("skipped: derper is not built; `cargo xtask setup --peers` builds it");
        return None;
    }
    Some(found)
}

impl Derper {
    fn start(program: &Path) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        Self::start_in(program, tempfile::tempdir()?, port)
    }

    /// With the keys that an earlier one has left in `folder`.
    fn start_in(program: &Path, folder: tempfile::TempDir, port: u16) -> Result<Self> {
        let mut child = Command::new(program)
            .args([
                "-hostname=127.0.0.1",
                "-certmode=manual",
                "-http-port=-1",
                "-stun=false",
            ])
            .arg(format!("-a=127.0.0.1:{port}"))
            .arg(format!("-certdir={}", folder.path().display()))
            .arg(format!("-c={}", folder.path().join("config").display()))
            .stderr(Stdio::piped())
            .spawn()?;
        let output = BufReader::new(child.stderr.take().context("no output")?);
        let mut derper = Self {
            child,
            port,
            pin: String::new(),
            folder,
        };
        let mut lines = output.lines();
        for line in &mut lines {
            let line = line?;
            if let Some(pin) = line.split('"').find(|word| word.starts_with("sha256-raw:")) {
                pin.clone_into(&mut derper.pin);
                break;
            }
        }
        ensure!(
            !derper.pin.is_empty(),
            "derper did not say its certificate's hash"
        );
        // It must not block on what nobody reads.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(derper)
    }

    fn map(&self) -> Result<DerpMap> {
        let node = json!({
            "Name": "1a", "HostName": "127.0.0.1", "DERPPort": self.port,
            "IPv4": "127.0.0.1", "IPv6": "none", "CertName": self.pin,
        });
        let map = json!({"Regions": {"1": {"RegionID": 1, "Nodes": [node]}}});
        Ok(serde_json::from_value(map)?)
    }

    fn restart(mut self, program: &Path) -> Result<Self> {
        self.end();
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir()?);
        Self::start_in(program, folder, self.port)
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Derper {
    fn drop(&mut self) {
        self.end();
    }
}

#[test]
fn derper_lets_the_client_in_and_carries_batches() -> Result<()> {
    let Some(program) = program() else {
        return Ok(());
    };
    let derper = Derper::start(&program)?;
    run(async {
        let map = derper.map()?;
        let mut a = Client::at_home(tls(None)?, &map, 1).await?;
        let mut b = Client::at_home(tls(None)?, &map, 1).await?;
        a.wait("an answer to a ping", |event| {
            matches!(event, RelayEvent::Latency { .. }).then_some(())
        })
        .await?;
        let text: String = (0..40)
            .map(|number| format!("datagram {number:03}"))
            .collect();
        let expected: Vec<String> = (0..40)
            .map(|number| format!("datagram {number:03}"))
            .collect();
        // derper keeps 32 packets for a client, and drops what is more.
        for (half, wanted) in [
            (&text[..240], &expected[..20]),
            (&text[240..], &expected[20..]),
        ] {
            a.send(1, &b, half, 12)?;
            let found = b.receive(&a.key, 20).await?;
            ensure!(found == wanted, "{found:?}");
        }
        let large = Bytes::from(vec![7; 16 << 10]);
        ensure!(b.relays.send(1, a.key, large.clone(), large.len()));
        ensure!(a.receive(&b.key, 1).await?[0].len() == large.len());

        let gone = b.key;
        drop(b);
        let nobody = |reason| RelayEvent::Gone {
            region: 1,
            peer: gone,
            reason,
        };
        let left = nobody(GoneReason::Disconnected);
        a.wait("that it has left", |event| (*event == left).then_some(()))
            .await?;
        Ok(())
    })
}

#[test]
fn derper_dies_and_comes_back() -> Result<()> {
    let Some(program) = program() else {
        return Ok(());
    };
    let derper = Derper::start(&program)?;
    run(async {
        let map = derper.map()?;
        let mut a = Client::at_home(tls(None)?, &map, 1).await?;
        let mut b = Client::at_home(tls(None)?, &map, 1).await?;
        let _derper = derper.restart(&program)?;
        for client in [&mut a, &mut b] {
            client.failure().await?;
            client.connected(1).await?;
        }
        a.send(1, &b, "again", 5)?;
        ensure!(b.receive(&a.key, 1).await? == ["again"]);
        Ok(())
    })
}

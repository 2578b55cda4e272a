//! Start, reload, stop and memory of the whole daemon.

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use lab::Lab;
use lab::sluice::Sluice;

use super::crowd::Crowd;
use crate::case::{Case, CaseId, Failure, Measurement, Outcome, Round};

const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon with a large configuration.
pub(super) struct Daemon {
    pub(super) id: CaseId,
    pub(super) crowd: Crowd,
}

impl Case for Daemon {
    fn id(&self) -> &CaseId {
        &self.id
    }

    fn run(&mut self, round: Round) -> Result<Outcome, Failure> {
        if round.warm_up {
            // Every run starts a process anew: there is nothing to warm up.
            return Ok(Outcome::default());
        }
        let lab = Lab::new()?;
        let (router, outside) = (lab.host("router")?, lab.host("outside")?);
        lab.link(
            router.port("eth0").address("192.0.2.2/24"),
            outside.port("eth0").address("192.0.2.1/24"),
        )?;
        router.route("default", "192.0.2.1")?;
        let path = lab.folder().join("notify");
        let socket = UnixDatagram::bind(&path).context("bind a notify socket")?;
        socket
            .set_read_timeout(Some(PATIENCE))
            .context("set a timeout")?;
        let mut config = self.crowd.config()?;
        config.notify = Some(path);

        let begin = Instant::now();
        let (ready, sluice) = std::thread::scope(|scope| {
            let ready = scope.spawn(|| await_ready(&socket));
            let sluice = router.sluice(&config);
            let ready = ready
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (ready, sluice)
        });
        // If it did not start, its own words say more than our waiting.
        let mut sluice = sluice?;
        let start = ready? - begin;
        self.check(&sluice)?;
        let resident = crate::host::resident(sluice.id()).context("read VmRSS")?;

        config.peers.pop();
        let begin = Instant::now();
        sluice.reload(&config)?;
        let reload = await_ready(&socket)? - begin;
        self.check_peers(&sluice, config.peers.len())?;

        let begin = Instant::now();
        sluice.stop()?;
        let stop = begin.elapsed();

        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        Ok(vec![
            Measurement::lower("start", "ms", ms(start)),
            Measurement::lower("reload", "ms", ms(reload)),
            Measurement::lower("stop", "ms", ms(stop)),
            Measurement::lower("resident", "MiB", resident as f64 / (1 << 20) as f64),
        ]
        .into())
    }
}

impl Daemon {
    /// Whether the daemon took the whole configuration.
    fn check(&self, sluice: &Sluice) -> Result<(), Failure> {
        let status = sluice.status()?;
        let routes = status["routes"].as_array().map_or(0, Vec::len);
        if routes != self.crowd.routes as usize {
            return Err(Failure::Wrong(format!("the status shows {routes} routes")));
        }
        self.check_peers(sluice, self.crowd.peers as usize)
    }

    fn check_peers(&self, sluice: &Sluice, expected: usize) -> Result<(), Failure> {
        let status = sluice.status()?;
        let peers = status["peers"].as_array().map_or(0, Vec::len);
        if peers != expected || status["problems"].as_array().is_none_or(|p| !p.is_empty()) {
            return Err(Failure::Wrong(format!(
                "{peers} peers instead of {expected}; problems: {}",
                status["problems"]
            )));
        }
        Ok(())
    }
}

/// Waits until the daemon says that all it wants is in force, and returns when it did.
fn await_ready(socket: &UnixDatagram) -> anyhow::Result<Instant> {
    let mut buffer = [0; 256];
    let deadline = Instant::now() + PATIENCE;
    loop {
        let length = socket.recv(&mut buffer).context("wait for READY=1")?;
        let now = Instant::now();
        let text = String::from_utf8_lossy(&buffer[..length]);
        if text.lines().any(|line| line == "READY=1") {
            return Ok(now);
        }
        ensure!(!text.contains("STOPPING=1"), "the daemon stopped");
        if now > deadline {
            bail!("the daemon was not ready within {PATIENCE:?}");
        }
    }
}

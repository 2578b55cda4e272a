//! The router beside AWS's own mock of the metadata service, so that our double and the router do not make one mistake
//! together. The mock knows of no group's name.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::metadata::ADDRESS;
use lab::site::{Arms, Site};
use lab::sluice::{Config, Route, Sluice};
use lab::{Host, Lab, Process, wait_until};
use serde_json::{Value, json};

use super::{SOON, on_aws, wait_problem, wait_routed};

/// Names the program, `github.com/aws/amazon-ec2-metadata-mock/cmd/ec2-metadata-mock`.
const PROGRAM: &str = "SLUICE_METADATA_MOCK";
/// Later than any test ends.
const NEVER: &str = "86400";

/// What differs from the mock's own instance.
fn spot_instance() -> Value {
    json!({"metadata": {"values": {
        "instance-life-cycle": "spot",
        "mac-vpc-ipv4-cidr-blocks": "10.20.0.0/16",
        "mac-vpc-ipv6-cidr-blocks": "2001:db8:20::/56",
    }}})
}

/// The mock, at the service's own address, for those who ask by version 2.
struct Mock {
    program: PathBuf,
    host: Host,
}

impl Mock {
    fn new(lab: &Lab, router: &Host, program: PathBuf) -> Result<Self> {
        let host = lab.host("imds")?;
        lab.link(
            host.port("eth0").address("169.254.169.254/24"),
            router.port("imds0").address("169.254.169.1/24"),
        )?;
        std::fs::write(host.folder().join("mock.json"), spot_instance().to_string())?;
        Ok(Self { program, host })
    }

    /// Starts it, so many seconds before the spot market's notice and the group's wish to end the instance.
    fn start(&self, spot: &str, end: &str) -> Result<Process> {
        let port = ADDRESS.port().to_string();
        let command = self
            .host
            .command([self.program.as_os_str()])
            .args(["--imdsv2", "--hostname", "169.254.169.254", "--port", &port])
            .args(["--mock-delay-sec", spot])
            .args(["--asg-termination-delay-sec", end])
            .arg("--config-file")
            .arg(self.host.folder().join("mock.json"))
            .env("HOME", self.host.folder());
        let mut mock = self.host.spawn("mock", command)?;
        mock.ready(SOON, "the mock to listen", || self.listens(ADDRESS))?;
        Ok(mock)
    }

    fn listens(&self, at: SocketAddr) -> bool {
        self.host.tcp_connect(at, Duration::from_secs(1)).is_ok()
    }
}

fn wait_status(sluice: &Sluice, what: &str, is_so: impl Fn(&Value) -> bool) -> Result<()> {
    let mut last = Value::Null;
    let waited = wait_until(SOON, what, || {
        last = sluice.status().unwrap_or_default();
        is_so(&last)
    });
    waited.with_context(|| format!("{} {}", last["cloud"], last["life"]))
}

#[test]
fn the_service_means_what_the_router_understands() {
    let Some(program) = std::env::var_os(PROGRAM).map(PathBuf::from) else {
        eprintln!("skipped: {PROGRAM} names no program; `cargo xtask image test` brings it");
        return;
    };
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        let mock = Mock::new(lab, &site.router, program.clone())?;
        let calm = mock.start(NEVER, NEVER)?;
        let mut config = Config::new()?;
        config.datapath = "kernel";
        config.addresses = vec!["100.64.0.1/24".to_owned()];
        config.cloud = vec![on_aws()];
        config.routes = vec![Route {
            cidr: "auto:vpc".to_owned(),
            snat: true,
            mode: "fast",
        }];
        let sluice = site.router.sluice(&config)?;
        wait_routed(&sluice, &["10.20.0.0/16", "2001:db8:20::/56"])?;
        // The recommendation is there from the start, and changes nothing.
        wait_status(&sluice, "the recommendation", |status| {
            status["cloud"]["rebalance"] == true && status["life"]["phase"] == "serving"
        })?;
        let status = sluice.status()?;
        let cloud = &status["cloud"];
        let instance = json!({
            "id": "i-1234567890abcdef0",
            "region": "us-east-1",
            "zone": "us-east-1a",
            "zone_id": "use1-az4",
            "kind": "m4.xlarge",
            "life": "spot",
            "mac": "0e:49:61:0f:c3:11",
            "interfaces": ["eni-0f95d3625f5c521cc"],
            "group": null,
            "name": "test-instance",
        });
        ensure!(cloud["instance"] == instance, "{cloud}");
        ensure!(cloud["target"] == "InService", "{cloud}");
        // Nor is there anybody else here to say it.
        wait_problem(
            &sluice,
            "cloud",
            "the name of the instance's group is not known",
        )?;
        let page = sluice.command(&["status"])?.stdout;
        ensure!(
            page.contains("notice    the spot market is likely to take this instance back"),
            "{page}"
        );

        // Another one knows no token of the first.
        drop(calm);
        let _grave = mock.start("0", "0")?;
        wait_status(&sluice, "the group's wish", |status| {
            status["cloud"]["target"] == "Terminated"
        })?;
        wait_status(&sluice, "the way out", |status| {
            let life = &status["life"];
            let is_leaving = ["draining", "leaving", "left"].map(Value::from);
            is_leaving.contains(&life["phase"])
                && (life["cause"] == "spot" || life["cause"] == "group")
        })?;
        wait_until(SOON, "the notice to be told", || {
            sluice
                .log()
                .contains("takes this instance back within two minutes")
        })?;
        Ok(())
    });
}

//! User data as a layer of the configuration.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::metadata::{Fault, Metadata};
use lab::site::{Arms, SERVER, Site, VPC};
use lab::sluice::Sluice;
use lab::{Keypair, Lab, Tunnel, http, wait_until};

use super::{ID, problems, routed, wait_problem, wait_routed};

const HERE: [(&str, &str); 2] = [
    (
        "AWS_EC2_METADATA_SERVICE_ENDPOINT",
        "http://169.254.169.254",
    ),
    ("RUST_LOG", "info,router=debug"),
];

struct Rig {
    site: Site,
    metadata: Metadata,
    laptop: Keypair,
    router: Keypair,
    toml: String,
}

impl Rig {
    fn new(lab: &Lab) -> Result<Self> {
        let site = Site::new(lab, Arms::Two)?;
        let metadata = Metadata::new(lab, &site.router, ID, &VPC)?;
        let (laptop, router) = (Keypair::generate()?, Keypair::generate()?);
        let key = site.router.folder().join("user-data.key");
        fs::write(&key, &router.private)?;
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
        let toml = format!(
            "[wireguard]\nprivate_key_file = {key:?}\naddresses = [\"100.64.0.1/24\"]\n[[peer]]\npublic_key = {:?}\n\
             allowed_ips = [\"100.64.0.2/32\"]\n[[route]]\ncidr = \"auto:vpc\"\n",
            laptop.public
        );
        Ok(Self {
            site,
            metadata,
            laptop,
            router,
            toml,
        })
    }

    fn start(&self) -> Result<Sluice> {
        self.site.router.sluice_without_file(&[], &HERE)
    }

    fn carries(&self) -> Result<()> {
        let _web = self.site.server.http_server(80)?;
        let tunnel = Tunnel::new(&self.laptop).address("100.64.0.2/32").peer(
            &self.router.public,
            lab::site::ENDPOINT,
            [VPC[0]],
        );
        let _tunnel = self.site.laptop.wireguard_go(&tunnel)?;
        wait_until(Duration::from_secs(20), "a page through the router", || {
            http::get(&self.site.laptop, (SERVER[0], 80).into(), "/").is_ok()
        })
    }
}

/// Nothing but user data says how to run.
#[test]
fn user_data_alone_makes_a_router() {
    lab::test(|lab| {
        let rig = Rig::new(lab)?;
        // Late, as early in a boot.
        rig.metadata.set_fault(Fault::Status(503));
        rig.metadata.set("user-data", rig.toml.clone());
        let sluice = std::thread::scope(|scope| {
            // A process ends with the thread that began it, so the other one sees to the service.
            let mended = scope.spawn(|| {
                let asked = || rig.metadata.asked("user-data") > 1;
                let what = "the user data to be asked for";
                let waited = wait_until(Duration::from_secs(15), what, asked);
                rig.metadata.set_fault(Fault::None);
                waited
            });
            let sluice = rig.start();
            mended.join().unwrap().and(sluice)
        })?;
        ensure!(routed(&sluice.status()?) == VPC);
        rig.carries()?;
        let shown = rig.site.router.folder().join("run/sluice/user-data.toml");
        let mode = fs::metadata(&shown)?.permissions().mode() & 0o777;
        ensure!(mode == 0o600, "{mode:o}");
        sluice.stop()
    });
}

#[test]
fn a_part_for_sluice_goes_together_with_others() {
    lab::test(|lab| {
        let rig = Rig::new(lab)?;
        let mime = format!(
            "Content-Type: multipart/mixed; boundary=\"//\"\nMIME-Version: 1.0\n\n--//\n\
             Content-Type: text/x-shellscript\n\n#!/bin/sh\necho hello\n--//\nContent-Type: text/x-sluice\n\n{}--//--\n",
            rig.toml
        );
        rig.metadata.set("user-data", mime);
        let sluice = rig.start()?;
        rig.carries()?;
        sluice.stop()
    });
}

#[test]
fn a_mistake_ends_the_start_with_its_place() {
    lab::test(|lab| {
        let rig = Rig::new(lab)?;
        let wrong = format!("{}[metrics]\nlisten = \"nowhere\"\n", rig.toml);
        let line = wrong.lines().count();
        rig.metadata.set("user-data", wrong);
        let output = rig.site.router.sluice_said_output(&[], &HERE)?;
        ensure!(!output.status.success(), "it started");
        let place = format!("user data:{line}:10: metrics.listen: ");
        ensure!(output.stderr.contains(&place), "{}", output.stderr);
        // A script is cloud-init's, and nothing says how to run then.
        fs::remove_file(rig.site.router.folder().join("run/sluice/user-data.toml"))?;
        rig.metadata.set("user-data", "#!/bin/sh\n");
        let output = rig.site.router.sluice_said_output(&[], &HERE)?;
        ensure!(
            output.stderr.contains("nothing says how to run"),
            "{}",
            output.stderr
        );
        Ok(())
    });
}

/// Beside user data there is a configuration, as an image has one.
fn beside(rig: &Rig) -> Result<Sluice> {
    let variables = [HERE[0], HERE[1], ("SLUICE_CONFIG", rig.toml.as_str())];
    let words = ["--config", "/etc/sluice/sluice.toml"];
    rig.site.router.sluice_without_file(&words, &variables)
}

#[test]
fn with_a_mistake_in_user_data_the_rest_is_in_force_and_says_so() {
    lab::test(|lab| {
        let rig = Rig::new(lab)?;
        let wrong = "[[route]]\ncidr = \"10.60.0.0/16\"\n[metrics]\nlisten = \"nowhere\"\n";
        rig.metadata.set("user-data", wrong);
        let sluice = beside(&rig)?;
        ensure!(routed(&sluice.status()?) == VPC, "a part of it is in force");
        let told = problems(&sluice, "user-data")?;
        ensure!(told.contains("user data:4:10: metrics.listen: "), "{told}");
        ensure!(
            sluice.log().contains("user data:4:10: "),
            "{}",
            sluice.log()
        );
        rig.carries()?;
        sluice.stop()
    });
}

#[test]
fn user_data_that_comes_late_is_taken_while_the_router_runs() {
    lab::test(|lab| {
        let rig = Rig::new(lab)?;
        rig.metadata
            .set("user-data", "[[route]]\ncidr = \"10.60.0.0/16\"\n");
        rig.metadata.set_fault(Fault::Status(503));
        let sluice = beside(&rig)?;
        wait_problem(&sluice, "cloud", "status 503")?;
        rig.metadata.set_fault(Fault::None);
        wait_routed(&sluice, &["10.60.0.0/16", VPC[0], VPC[1]])?;
        rig.carries()?;
        sluice.stop()
    });
}

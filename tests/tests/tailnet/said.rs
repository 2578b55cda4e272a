//! Who says a router's settings in a tailnet: commands, the environment, or a file; one rules. Needs root.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::control_server::ControlServer;
use lab::site::{Arms, Site, VPC};
use lab::sluice::{Config, Sluice};
use lab::tailnet::{CONTROL, KEY, control_host};
use lab::{Host, Lab, http, poll, wait_until};
use serde_json::json;

const SOON: Duration = Duration::from_secs(20);
const PORT: u16 = 8080;

/// A router's place, and a coordination server.
struct Rig {
    site: Site,
    control: ControlServer,
    _host: Host,
    state_dir: String,
}

impl Rig {
    fn new(lab: &Lab) -> Result<Self> {
        let site = Site::new(lab, Arms::Two)?;
        let host = control_host(lab, &site)?;
        let control = ControlServer::on(host.tcp_listener((CONTROL[0], PORT).into())?)?;
        let state_dir = site.router.folder().join("said");
        Ok(Self {
            state_dir: state_dir.to_string_lossy().into_owned(),
            site,
            control,
            _host: host,
        })
    }

    fn waiting(&self) -> Result<Sluice> {
        let words = ["--state-dir", &self.state_dir];
        self.site.router.sluice_without_file(&words, &[])
    }
}

fn state(sluice: &Sluice) -> String {
    let status = sluice.status().unwrap_or_default();
    status["BackendState"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

fn wait_state(sluice: &Sluice, wanted: &str) -> Result<()> {
    wait_until(SOON, wanted, || state(sluice) == wanted)
        .with_context(|| format!("it is {}; log:\n{}", state(sluice), sluice.log()))
}

fn works(sluice: &Sluice, words: &[&str]) -> Result<(String, String)> {
    let output = sluice.command(words)?;
    ensure!(
        output.status.success(),
        "{words:?}: {}{}\n{}",
        output.stdout,
        output.stderr,
        sluice.log()
    );
    Ok((output.stdout, output.stderr))
}

fn refused(sluice: &Sluice, words: &[&str], parts: &[&str]) -> Result<()> {
    let output = sluice.command(words)?;
    ensure!(!output.status.success(), "{words:?} works");
    for part in parts {
        ensure!(
            output.stderr.contains(part),
            "{words:?}: {part:?} is missing in {}",
            output.stderr
        );
    }
    Ok(())
}

#[test]
fn commands_join_change_and_leave() {
    lab::test(|lab| {
        let rig = Rig::new(lab)?;
        let sluice = rig.waiting()?;
        wait_state(&sluice, "NeedsLogin")?;
        ensure!(
            rig.control.requests().is_empty(),
            "it asks before it is told to"
        );
        let url = format!("--login-server={}", rig.control.url());
        let routes = format!("--advertise-routes={}", VPC.join(","));

        // What cannot be is told, and changes nothing.
        refused(
            &sluice,
            &["up", "--advertise-routes=nonsense"],
            &["--advertise-routes", "nonsense"],
        )?;
        refused(&sluice, &["up", "--ssh"], &["--ssh is not for Sluice"])?;
        refused(&sluice, &["set"], &["say what to set"])?;
        let bad = ["up", &url, "--auth-key=tskey-auth-bad", "--timeout=20s"];
        refused(&sluice, &bad, &["refuses this node"])?;

        let key = format!("--auth-key={KEY}");
        let up = [
            "up",
            &url,
            &key,
            &routes,
            "--hostname=gw",
            "--advertise-tags=router",
            "--timeout=20s",
        ];
        let (_, told) = works(&sluice, &up)?;
        wait_state(&sluice, "Running")?;
        let node = poll(SOON, "the node", || rig.control.nodes().pop())?;
        ensure!(node.hostinfo["Hostname"] == "gw", "{node:?}");
        ensure!(
            node.hostinfo["RequestTags"] == json!(["tag:router"]),
            "{node:?}"
        );
        ensure!(node.hostinfo["RoutableIPs"] == json!(VPC), "{node:?}");
        ensure!(told.contains("headscale nodes approve-routes"), "{told}");
        let kept = format!("{}/preferences.json", rig.state_dir);
        let mode = std::fs::metadata(&kept)?.permissions().mode();
        ensure!(mode & 0o777 == 0o600, "{mode:o}");
        ensure!(
            !std::fs::read_to_string(&kept)?.contains(KEY),
            "the key is kept"
        );

        rig.control.approve(node.id, &VPC);
        wait_until(SOON, "the routes to be approved", || {
            let status = sluice.status().unwrap_or_default();
            let routes = status["tailnet"]["routes"].as_array().cloned();
            routes.is_some_and(|all| all.iter().all(|route| route["approved"] == true))
        })?;
        let (page, _) = works(&sluice, &["status"])?;
        ensure!(
            page.contains("tailnet   Running: gw.tail.test 100.64.0.1"),
            "{page}"
        );
        ensure!(!page.contains("ROUTE "), "{page}");
        let (addresses, _) = works(&sluice, &["ip", "-4"])?;
        ensure!(addresses == "100.64.0.1\n", "{addresses}");
        let (who, _) = works(&sluice, &["whois", "100.64.0.1:80"])?;
        ensure!(who.contains("Name:          gw.tail.test"), "{who}");

        works(&sluice, &["set", "--advertise-routes="])?;
        wait_until(SOON, "the routes to be withdrawn", || {
            let node = rig.control.nodes().pop();
            node.is_some_and(|node| node.hostinfo["RoutableIPs"].is_null())
        })?;

        works(&sluice, &["down"])?;
        wait_state(&sluice, "Stopped")?;
        sluice.stop()?;
        let sluice = rig.waiting()?;
        wait_state(&sluice, "Stopped")?;
        works(&sluice, &["up", "--timeout=20s"])?;
        wait_state(&sluice, "Running")?;
        ensure!(rig.control.nodes().len() == 1, "it is another node");

        works(&sluice, &["logout"])?;
        wait_state(&sluice, "NeedsLogin")?;
        sluice.stop()
    });
}

#[test]
fn a_person_lets_it_in() {
    lab::test(|lab| {
        let rig = Rig::new(lab)?;
        rig.control.faults(|faults| faults.interactive = true);
        let sluice = rig.waiting()?;
        let url = format!("--login-server={}", rig.control.url());
        let mut up = sluice.command_in_background(&["up", &url, "--qr", "--timeout=60s"])?;
        let visit = poll(SOON, "the URL to visit", || {
            let status = sluice.status().ok()?;
            let url = status["AuthURL"].as_str()?.to_owned();
            (!url.is_empty()).then_some(url)
        })?;
        wait_until(SOON, "the URL to be told", || {
            let told = up.log();
            told.contains(&visit) && told.contains('█')
        })?;
        rig.control.authorize(&visit);
        let status = up.wait(SOON)?;
        ensure!(status.success(), "{}", up.log());
        ensure!(state(&sluice) == "Running");
        sluice.stop()
    });
}

#[test]
fn the_environment_is_enough() {
    lab::test(|lab| {
        let rig = Rig::new(lab)?;
        let arguments = format!(
            "--login-server={} --advertise-tags=tag:router",
            rig.control.url()
        );
        let routes = VPC.join(",");
        let set = [
            ("TS_AUTHKEY", KEY),
            ("TS_HOSTNAME", "box"),
            ("TS_ROUTES", routes.as_str()),
            ("TS_STATE_DIR", rig.state_dir.as_str()),
            ("TS_USERSPACE", "false"),
            ("TS_EXTRA_ARGS", arguments.as_str()),
            ("TS_ENABLE_HEALTH_CHECK", "true"),
            ("TS_ENABLE_METRICS", "true"),
            ("TS_LOCAL_ADDR_PORT", "127.0.0.1:9002"),
        ];
        let router = &rig.site.router;
        let sluice = router.sluice_without_file(&[], &set)?;
        wait_state(&sluice, "Running")?;
        let node = poll(SOON, "the node's routes", || {
            let node = rig.control.nodes().pop()?;
            (!node.hostinfo["RoutableIPs"].is_null()).then_some(node)
        })?;
        ensure!(node.hostinfo["Hostname"] == "box", "{node:?}");
        let page = |path| http::get(router, ([127, 0, 0, 1], 9002).into(), path);
        wait_until(SOON, "the router to be ready", || page("/readyz").is_ok())?;
        page("/healthz")?;
        let metrics = String::from_utf8(page("/metrics")?)?;
        let advertised = format!("tailscaled_advertised_routes {}", VPC.len());
        ensure!(metrics.lines().any(|line| line == advertised), "{metrics}");
        ensure!(page("/status").is_err(), "the status is not for everybody");
        refused(
            &sluice,
            &["up", "--hostname=other"],
            &["the environment (TS_"],
        )?;
        sluice.stop()?;

        let mut dest = set.to_vec();
        dest.push(("TS_DEST_IP", "10.0.0.7"));
        let output = router.sluice_said_output(&[], &dest)?;
        ensure!(!output.status.success());
        ensure!(output.stderr.contains("TS_DEST_IP"), "{}", output.stderr);
        ensure!(!output.stderr.contains(KEY), "{}", output.stderr);
        Ok(())
    });
}

#[test]
fn a_file_rules() {
    lab::test(|lab| {
        let rig = Rig::new(lab)?;
        let sluice = rig
            .site
            .router
            .sluice_unsettled(&Config::joining(&rig.control.url(), KEY)?)?;
        wait_until(SOON, "the router to answer", || state(&sluice) == "Running")?;
        let words = "configuration file rules";
        refused(&sluice, &["up", "--hostname=other"], &[words])?;
        refused(&sluice, &["set", "--hostname=other"], &[words])?;
        refused(&sluice, &["down"], &[words])?;
        // Logging in is no setting.
        works(
            &sluice,
            &["login", &format!("--auth-key={KEY}"), "--timeout=20s"],
        )?;
        works(&sluice, &["logout"])?;
        wait_state(&sluice, "NeedsLogin")?;
        sluice.stop()
    });
}

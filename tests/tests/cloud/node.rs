//! A node of a tailnet on EC2: its name, its key, its routes.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::control_server::{ControlServer, Node};
use lab::metadata::{Fault, Metadata};
use lab::site::{Arms, Site, VPC};
use lab::sluice::{Config, Route};
use lab::tailnet::{CONTROL, KEY, control_host};
use lab::{Host, Lab, poll, wait_until};
use serde_json::json;

use super::aws::{Api, PORT};
use super::{ID, SOON, on_aws, wait_problem};

/// What the router waits for before it joins.
const ASKED: &str = "asked first who this router is";
const NAME: &str = "routers-eu-central-1a-cdef0";

struct Rig {
    site: Site,
    metadata: Metadata,
    control: ControlServer,
    config: Config,
    _host: Host,
}

impl Rig {
    fn new(lab: &Lab) -> Result<Self> {
        let site = Site::new(lab, Arms::Two)?;
        let metadata = Metadata::new(lab, &site.router, ID, &VPC)?;
        metadata.set(
            "meta-data/tags/instance/aws:autoscaling:groupName",
            "routers",
        );
        let host = control_host(lab, &site)?;
        let control = ControlServer::on(host.tcp_listener((CONTROL[0], 8080).into())?)?;
        let mut config = Config::joining(&control.url(), KEY)?;
        config.datapath = "kernel";
        config.cloud = vec![on_aws()];
        config.routes = vec![Route {
            cidr: "auto:vpc".to_owned(),
            snat: true,
            mode: "fast",
        }];
        Ok(Self {
            site,
            metadata,
            control,
            config,
            _host: host,
        })
    }

    fn wait_node(&self, what: &str, is_so: impl Fn(&Node) -> bool) -> Result<Node> {
        poll(SOON, what, || self.control.nodes().pop().filter(&is_so))
    }

    fn names(&self) -> Vec<String> {
        let requests = self.control.requests();
        let registered = requests
            .iter()
            .filter(|(path, _)| path == "/machine/register");
        let names = registered.map(|(_, body)| {
            body["Hostinfo"]["Hostname"]
                .as_str()
                .unwrap_or("")
                .to_owned()
        });
        names.collect()
    }
}

#[test]
fn the_router_joins_by_the_name_of_its_group_and_place() {
    lab::test(|lab| {
        let rig = Rig::new(lab)?;
        // The name is known some time after the start.
        rig.metadata.set_fault(Fault::Status(500));
        let sluice = rig.site.router.sluice_unsettled(&rig.config)?;
        wait_until(
            Duration::from_secs(15),
            "the router to wait for its name",
            || {
                let unready = sluice.status().map(|status| status["unready"].to_string());
                unready.is_ok_and(|text| text.contains(ASKED))
            },
        )?;
        ensure!(rig.names().is_empty(), "it has joined already");
        rig.metadata.set_fault(Fault::None);
        let node = rig.wait_node("the VPC to be advertised", |node| {
            node.hostinfo["RoutableIPs"] == json!(VPC)
        })?;
        ensure!(node.hostinfo["Hostname"] == NAME, "{}", node.hostinfo);
        ensure!(rig.names() == [NAME], "{:?}", rig.names());

        rig.metadata.set_networks(&[VPC[0], VPC[1], "10.44.0.0/16"]);
        rig.wait_node("the new network to be advertised", |node| {
            node.hostinfo["RoutableIPs"]
                .to_string()
                .contains("10.44.0.0/16")
        })?;
        ensure!(rig.names().len() == 1, "it has registered again");
        sluice.stop()
    });
}

#[test]
fn a_name_that_somebody_gives_is_not_asked_for() {
    lab::test(|lab| {
        let mut rig = Rig::new(lab)?;
        rig.metadata.set_fault(Fault::Lost);
        let tailnet = rig.config.tailnet.as_mut().context("a tailnet")?;
        tailnet.hostname = Some("given".to_owned());
        let sluice = rig.site.router.sluice_unsettled(&rig.config)?;
        rig.wait_node("the node", |node| node.hostinfo["Hostname"] == "given")?;
        sluice.stop()
    });
}

#[test]
fn another_instance_with_the_same_state_is_another_node() {
    lab::test(|lab| {
        let rig = Rig::new(lab)?;
        let sluice = rig.site.router.sluice(&rig.config)?;
        let first = rig.wait_node("the node", |node| node.hostinfo["Hostname"] == NAME)?;
        sluice.stop()?;
        let again = rig.site.router.sluice(&rig.config)?;
        ensure!(
            rig.control.nodes().len() == 1,
            "the same instance is the same node"
        );
        again.stop()?;
        rig.metadata
            .set("meta-data/instance-id", "i-0fedcba9876543210");
        let clone = rig.site.router.sluice_unsettled(&rig.config)?;
        let second = rig.wait_node("another node", |node| {
            node.hostinfo["Hostname"] == "routers-eu-central-1a-43210"
        })?;
        ensure!(first.key != second.key, "the clone has its original's key");
        let log = clone.log();
        ensure!(log.contains("another instance of the cloud"), "{log}");
        clone.stop()
    });
}

/// The double's firmware tells no instance, as that of the Xen kind does not.
#[test]
fn a_clone_is_another_node_though_somebody_has_named_it() {
    lab::test(|lab| {
        let mut rig = Rig::new(lab)?;
        let tailnet = rig.config.tailnet.as_mut().context("a tailnet")?;
        tailnet.hostname = Some("given".to_owned());
        let sluice = rig.site.router.sluice(&rig.config)?;
        let first = rig.wait_node("the node", |node| node.hostinfo["Hostname"] == "given")?;
        sluice.stop()?;
        rig.metadata
            .set("meta-data/instance-id", "i-0fedcba9876543210");
        rig.metadata.set_fault(Fault::Status(500));
        let clone = rig.site.router.sluice_unsettled(&rig.config)?;
        wait_until(SOON, "the router to ask who it is", || {
            let unready = clone.status().map(|status| status["unready"].to_string());
            unready.is_ok_and(|text| text.contains(ASKED))
        })?;
        rig.metadata.set_fault(Fault::None);
        rig.wait_node("another node", |node| node.key != first.key)?;
        clone.stop()
    });
}

#[test]
fn what_is_said_before_the_name_is_known_is_not_lost() {
    lab::test(|lab| {
        let rig = Rig::new(lab)?;
        rig.metadata.set_fault(Fault::Status(500));
        let folder = rig.site.router.folder().join("said");
        let folder = folder.to_string_lossy();
        let here = (
            "AWS_EC2_METADATA_SERVICE_ENDPOINT",
            "http://169.254.169.254",
        );
        let words = ["--state-dir", folder.as_ref()];
        let sluice = rig.site.router.sluice_without_file(&words, &[here])?;
        let unready = sluice.status()?["unready"].to_string();
        ensure!(unready.contains(ASKED), "{unready}");
        let (url, key) = (
            format!("--login-server={}", rig.control.url()),
            format!("--auth-key={KEY}"),
        );
        let mut up = sluice.command_in_background(&["up", &url, &key, "--timeout=60s"])?;
        std::thread::sleep(Duration::from_secs(2));
        ensure!(rig.names().is_empty(), "it has joined already");
        rig.metadata.set_fault(Fault::None);
        let node = rig.wait_node("the node", |_| true)?;
        ensure!(node.hostinfo["Hostname"] == NAME, "{}", node.hostinfo);
        ensure!(up.wait(SOON)?.success(), "{}", sluice.log());
        sluice.stop()
    });
}

#[test]
fn a_key_of_the_parameter_store_lets_the_node_in_when_the_role_may() {
    lab::test(|lab| {
        let mut rig = Rig::new(lab)?;
        let api = Api::new(&rig.metadata)?;
        api.change(|state| {
            state.denied.insert("GetParameter".to_owned());
            state
                .parameters
                .insert("/sluice/key".to_owned(), KEY.to_owned());
        });
        rig.config.variables = vec![("AWS_ENDPOINT_URL", format!("http://169.254.169.254:{PORT}"))];
        let tailnet = rig.config.tailnet.as_mut().context("a tailnet")?;
        tailnet.auth_key = Some("ssm:/sluice/key".to_owned());
        let sluice = rig.site.router.sluice_unsettled(&rig.config)?;
        wait_until(Duration::from_secs(15), "the router to answer", || {
            sluice.status().is_ok()
        })?;
        let told = wait_problem(
            &sluice,
            "auth-key",
            "the role router may not call ssm:GetParameter",
        )?;
        ensure!(told.contains("/sluice/key"), "{told}");
        api.change(|state| state.denied.clear());
        rig.wait_node("the node", |node| node.hostinfo["Hostname"] == NAME)?;
        ensure!(!sluice.log().contains(KEY), "the key is in the log");
        ensure!(
            !sluice.status()?.to_string().contains(KEY),
            "the key is in the status"
        );
        sluice.stop()
    });
}

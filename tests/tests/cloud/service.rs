//! What may be wrong with the metadata service.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::metadata::{Fault, Metadata};
use lab::site::{Arms, Site, VPC, config};
use lab::sluice::Route;
use lab::{Lab, wait_until};

use super::{ID, SOON, on_aws, wait_problem, wait_routed};

/// Starts a router beside a service with a fault, which is told; without the fault all is well.
fn told(lab: &Lab, fault: Fault, part: &str, words: &str) -> Result<()> {
    let site = Site::new(lab, Arms::Two)?;
    let metadata = Metadata::new(lab, &site.router, ID, &VPC)?;
    metadata.set_fault(fault);
    let mut config = config(&[], "kernel", true)?;
    config.routes = vec![Route {
        cidr: "auto:vpc".to_owned(),
        snat: true,
        mode: "fast",
    }];
    config.cloud = vec![on_aws()];
    let sluice = site.router.sluice_unsettled(&config)?;
    wait_until(Duration::from_secs(15), "the router to answer", || {
        sluice.status().is_ok()
    })?;
    wait_problem(&sluice, part, words)?;
    wait_routed(&sluice, &[])?;
    metadata.set_fault(Fault::None);
    wait_routed(&sluice, &VPC)?;
    wait_until(SOON, "no problem", || {
        sluice
            .status()
            .is_ok_and(|status| status["problems"] == serde_json::json!([]))
    })?;
    sluice.stop()
}

#[test]
fn a_hop_limit_that_is_too_small_is_explained() {
    lab::test(|lab| told(lab, Fault::Lost, "cloud", "hop limit is at least 2"));
}

#[test]
fn version_one_is_never_used() {
    lab::test(|lab| told(lab, Fault::VersionOne, "cloud", "it knows version 1 only"));
}

#[test]
fn a_service_in_trouble_is_asked_again() {
    lab::test(|lab| told(lab, Fault::Status(503), "routes", "status 503"));
}

#[test]
fn a_slow_service_stops_nothing() {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        let metadata = Metadata::new(lab, &site.router, ID, &VPC)?;
        // All of what is asked takes longer than a start waits.
        metadata.set_fault(Fault::Slow(Duration::from_millis(400)));
        metadata.set(
            "meta-data/tags/instance/aws:autoscaling:groupName",
            "routers",
        );
        let mut config = config(&[], "kernel", true)?;
        config.routes = vec![Route {
            cidr: "auto:vpc".to_owned(),
            snat: true,
            mode: "fast",
        }];
        config.cloud = vec![on_aws()];
        let sluice = site.router.sluice_unsettled(&config)?;
        wait_until(Duration::from_secs(15), "the router to answer", || {
            sluice.status().is_ok()
        })?;
        wait_routed(&sluice, &VPC)?;
        let status = sluice.status()?;
        let cloud = &status["cloud"];
        ensure!(
            cloud["instance"]["id"] == ID && cloud["group"] == "routers",
            "{cloud}"
        );
        ensure!(cloud["instance"]["interfaces"][0] == "eni-own", "{cloud}");
        let page = sluice.command(&["status"])?.stdout;
        ensure!(
            page.contains("cloud     aws eu-central-1a (euc1-az2) i-0123456789abcdef0"),
            "{page}"
        );
        let metrics = sluice.metrics()?;
        let info =
            "sluice_cloud_info{provider=\"aws\",region=\"eu-central-1\",zone=\"eu-central-1a\"";
        ensure!(metrics.contains(info), "{metrics}");
        sluice.stop()
    });
}

#[test]
fn tokens_are_renewed() {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        let metadata = Metadata::new(lab, &site.router, ID, &VPC)?;
        let mut config = config(&[], "kernel", true)?;
        config.routes = vec![Route {
            cidr: "auto:vpc".to_owned(),
            snat: true,
            mode: "fast",
        }];
        config.cloud = vec![on_aws()];
        let sluice = site.router.sluice(&config)?;
        let before = metadata.tokens();
        metadata.forget_tokens();
        metadata.set_networks(&[VPC[0]]);
        wait_routed(&sluice, &[VPC[0]])?;
        ensure!(metadata.tokens() == before + 1, "one new token is enough");
        ensure!(sluice.status()?["problems"] == serde_json::json!([]));
        sluice.stop()
    });
}

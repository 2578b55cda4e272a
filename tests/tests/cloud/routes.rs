//! `auto:vpc` and `auto:connected`.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::metadata::{Fault, Metadata};
use lab::site::{Arms, Client, SERVER, Site, VPC, config};
use lab::sluice::{Config, Route};
use lab::{Flow, Lab, http, wait_until};

use super::{ID, SOON, on_aws, problems, routed, wait_problem, wait_routed};

const MORE: &str = "10.44.0.0/16";

fn auto(cidr: &str) -> Route {
    Route {
        cidr: cidr.to_owned(),
        snat: true,
        mode: "fast",
    }
}

fn router(lab: &Lab, datapath: &'static str, route: &str) -> Result<(Site, Client, Config)> {
    let site = Site::new(lab, Arms::Two)?;
    let client = Client::new("laptop", 2)?;
    let mut config = config(&[&client], datapath, true)?;
    config.routes = vec![auto(route)];
    config.cloud = vec![on_aws()];
    Ok((site, client, config))
}

/// The networks of the VPC are routed, follow the service, and stay when it falls silent; flows and peers do not
/// notice.
fn the_vpc_is_followed(datapath: &'static str) {
    lab::test(|lab| {
        let (site, client, config) = router(lab, datapath, "auto:vpc")?;
        let metadata = Metadata::new(lab, &site.router, ID, &VPC)?;
        let mut sluice = site.router.sluice(&config)?;
        ensure!(routed(&sluice.status()?) == VPC);
        let _tunnel = client.connect(&site.laptop, &config.key)?;
        let _web = site.server.http_server(80)?;
        for address in SERVER {
            http::get(&site.laptop, (address, 80).into(), "/")?;
        }
        let mut flow = Flow::open(&site.laptop, &site.server, SERVER[0])?;
        flow.works()?;

        metadata.set_networks(&[VPC[0], MORE, VPC[1]]);
        wait_routed(&sluice, &[VPC[0], MORE, VPC[1]])?;
        flow.works()?;

        // A poll that fails takes nothing away, and is told.
        metadata.set_fault(Fault::Lost);
        let told = wait_problem(&sluice, "cloud", "does not answer")?;
        ensure!(told.contains("hop limit"), "{told}");
        ensure!(routed(&sluice.status()?).len() == 3, "a network is gone");
        metadata.set_fault(Fault::None);
        // Nor does an answer that knows of none.
        metadata.set_networks(&[]);
        wait_problem(&sluice, "cloud", "no network of the VPC")?;
        ensure!(routed(&sluice.status()?).len() == 3, "a network is gone");
        flow.works()?;

        metadata.set_networks(&VPC);
        wait_routed(&sluice, &VPC)?;
        wait_until(SOON, "no problem", || {
            problems(&sluice, "cloud").is_ok_and(|told| told.is_empty())
        })?;
        flow.works()?;

        // The next daemon has the routes before it judges a flow, whether the service answers or not.
        for fault in [Fault::None, Fault::Lost] {
            metadata.set_fault(fault);
            sluice.hand_over()?;
            wait_routed(&sluice, &VPC)?;
            flow.works()?;
        }
        sluice.stop()
    });
}

#[test]
fn the_vpc_is_followed_fast() {
    the_vpc_is_followed("ebpf");
}

#[test]
fn the_vpc_is_followed_by_the_kernel() {
    the_vpc_is_followed("kernel");
}

#[test]
fn what_overlaps_the_overlay_is_left_out_and_told() {
    lab::test(|lab| {
        let (site, _, mut config) = router(lab, "kernel", "auto:vpc")?;
        let _metadata = Metadata::new(lab, &site.router, ID, &[VPC[0], "100.64.0.0/16"])?;
        config.routes.push(auto("10.50.0.0/16"));
        let sluice = site.router.sluice_unsettled(&config)?;
        let told = wait_problem_of_routes(&sluice)?;
        ensure!(
            told.contains("100.64.0.0/24, the tunnel's own network"),
            "{told}"
        );
        wait_routed(&sluice, &["10.50.0.0/16", VPC[0]])?;
        sluice.stop()
    });
}

fn wait_problem_of_routes(sluice: &lab::sluice::Sluice) -> Result<String> {
    wait_until(Duration::from_secs(15), "the router to answer", || {
        sluice.status().is_ok()
    })?;
    wait_problem(sluice, "routes", "100.64.0.0/16 is a network of auto:vpc")
}

#[test]
fn connected_networks_are_followed_without_a_cloud() {
    lab::test(|lab| {
        let (site, _, mut config) = router(lab, "kernel", "auto:connected")?;
        // Nobody is asked.
        config.cloud = Vec::new();
        let metadata = Metadata::new(lab, &site.router, ID, &VPC)?;
        let sluice = site.router.sluice(&config)?;
        let uplink = routed(&sluice.status()?);
        ensure!(
            uplink
                .iter()
                .all(|cidr| !cidr.starts_with("169.254.") && !cidr.starts_with("fe80"))
        );
        let wan = sluice.status()?["uplink"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        site.router
            .ip(&format!("address add 10.77.0.1/24 dev {wan}"))?;
        let has = |cidr: &str| {
            let status = sluice.status();
            status.is_ok_and(|status| routed(&status).iter().any(|known| known == cidr))
        };
        wait_until(SOON, "the new network", || has("10.77.0.0/24"))?;
        site.router
            .ip(&format!("address del 10.77.0.1/24 dev {wan}"))?;
        wait_until(SOON, "the network to go", || !has("10.77.0.0/24"))?;
        ensure!(routed(&sluice.status()?) == uplink);
        ensure!(metadata.tokens() == 0, "the metadata service was asked");
        ensure!(sluice.status()?["cloud"].is_null());
        sluice.stop()
    });
}

#[test]
fn elsewhere_a_route_to_the_vpc_is_told() {
    lab::test(|lab| {
        let (site, _, mut config) = router(lab, "kernel", "auto:vpc")?;
        config.cloud = vec![("provider", "\"none\"".to_owned())];
        let sluice = site.router.sluice_unsettled(&config)?;
        wait_until(Duration::from_secs(15), "the router to answer", || {
            sluice.status().is_ok()
        })?;
        wait_problem(&sluice, "routes", "no cloud is asked here")?;
        let status = sluice.status()?;
        let unready = status["unready"].to_string();
        ensure!(unready.contains("networks are not known"), "{unready}");
        sluice.stop()
    });
}

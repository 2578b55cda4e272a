//! The source/destination check, and routes of the VPC.

use anyhow::{Result, ensure};
use lab::metadata::Metadata;
use lab::site::{Arms, Client, Site, VPC, config};
use lab::sluice::{Config, Sluice};
use lab::tailnet::KEY;
use lab::{Lab, wait_until};

use super::aws::{Api, PORT};
use super::{ID, SOON, on_aws, problems, wait_problem};

const OVERLAY: &str = "100.64.0.0/24";

struct Rig {
    site: Site,
    api: Api,
    config: Config,
    metadata: Metadata,
}

impl Rig {
    fn new(lab: &Lab) -> Result<Self> {
        let site = Site::new(lab, Arms::Two)?;
        let metadata = Metadata::new(lab, &site.router, ID, &VPC)?;
        let api = Api::new(&metadata)?;
        let client = Client::new("laptop", 2)?;
        let mut config = config(&[&client], "kernel", false)?;
        config.variables = vec![("AWS_ENDPOINT_URL", format!("http://169.254.169.254:{PORT}"))];
        config.cloud = vec![
            on_aws(),
            ("vpc_route_tables", "[\"rtb-1\"]".to_owned()),
            ("vpc_routes", format!("[{OVERLAY:?}]")),
        ];
        Ok(Self {
            site,
            api,
            config,
            metadata,
        })
    }

    fn start(&self) -> Result<Sluice> {
        let sluice = self.site.router.sluice_unsettled(&self.config)?;
        wait_until(SOON, "the router to answer", || sluice.status().is_ok())?;
        Ok(sluice)
    }

    fn set(&self, to: &str, gone: bool) {
        self.api.change(|state| {
            let route = (to.to_owned(), gone);
            state.routes.insert(OVERLAY.to_owned(), route);
        });
    }

    fn leads(&self, cidr: &str) -> Option<String> {
        self.api
            .change(|state| state.routes.get(cidr).map(|(to, _)| to.clone()))
    }

    fn is_signed_well(&self) -> Result<()> {
        self.api.change(|state| {
            ensure!(state.forged.is_empty(), "{:?}", state.forged);
            ensure!(!state.calls.is_empty());
            Ok(())
        })
    }
}

fn is_quiet(sluice: &Sluice) -> bool {
    problems(sluice, "cloud").is_ok_and(|told| told.is_empty())
}

#[test]
fn the_check_is_turned_off_and_the_route_made() {
    lab::test(|lab| {
        let rig = Rig::new(lab)?;
        let sluice = rig.start()?;
        wait_until(SOON, "the route", || rig.leads(OVERLAY).is_some())?;
        ensure!(rig.leads(OVERLAY).as_deref() == Some("eni-own"));
        wait_until(SOON, "the check to be off", || {
            rig.api.change(|state| state.unchecked.contains("eni-own"))
        })?;
        wait_until(SOON, "no problem", || is_quiet(&sluice))?;
        rig.is_signed_well()?;
        let cloud = sluice.status()?["cloud"].clone();
        ensure!(cloud["routes"][0]["own"] == true, "{cloud}");
        ensure!(cloud["source_dest_check"][0]["on"] == false, "{cloud}");
        sluice.stop()
    });
}

#[test]
fn a_role_without_rights_is_told_with_the_command() {
    lab::test(|lab| {
        let rig = Rig::new(lab)?;
        rig.api.change(|state| {
            for action in ["ModifyNetworkInterfaceAttribute", "CreateRoute"] {
                state.denied.insert(action.to_owned());
            }
        });
        let sluice = rig.start()?;
        let told = wait_problem(&sluice, "cloud", "ec2:CreateRoute")?;
        ensure!(told.contains("the role router may not call"), "{told}");
        let told = wait_problem(&sluice, "cloud", "ec2:ModifyNetworkInterfaceAttribute")?;
        let command = "aws ec2 modify-network-interface-attribute --network-interface-id eni-own --no-source-dest-check";
        ensure!(told.contains(command), "{told}");
        // Somebody does it, and gives the right.
        rig.api.change(|state| {
            state.unchecked.insert("eni-own".to_owned());
            state.denied.clear();
        });
        wait_until(SOON, "no problem", || is_quiet(&sluice))?;
        sluice.stop()
    });
}

#[test]
fn a_route_of_somebody_else_survives_and_a_dead_one_is_taken_over() {
    lab::test(|lab| {
        let rig = Rig::new(lab)?;
        rig.set("eni-other", false);
        let sluice = rig.start()?;
        let told = wait_problem(&sluice, "cloud", "eni-other and not to this router")?;
        ensure!(
            told.contains("aws ec2 delete-route --route-table-id rtb-1"),
            "{told}"
        );
        ensure!(rig.leads(OVERLAY).as_deref() == Some("eni-other"));
        rig.set("eni-other", true);
        wait_until(SOON, "the route to lead here", || {
            rig.leads(OVERLAY).as_deref() == Some("eni-own")
        })?;
        wait_until(SOON, "no problem", || is_quiet(&sluice))?;
        rig.is_signed_well()?;
        sluice.stop()
    });
}

/// A router that cannot serve yet would have the VPC's packets end here.
#[test]
fn no_route_is_claimed_before_the_router_serves() {
    lab::test(|lab| {
        let mut rig = Rig::new(lab)?;
        // Nobody is there.
        let joining = Config::joining("http://203.0.113.99:8080", KEY)?;
        rig.config = Config {
            cloud: rig.config.cloud,
            variables: rig.config.variables,
            datapath: rig.config.datapath,
            ..joining
        };
        let sluice = rig.start()?;
        wait_until(SOON, "a look at the table", || {
            let status = sluice.status().unwrap_or_default();
            status["cloud"]["routes"][0]["own"] == false
        })?;
        let life = sluice.status()?["life"].clone();
        ensure!(life["phase"] == "starting", "{life}");
        ensure!(rig.leads(OVERLAY).is_none());
        sluice.stop()
    });
}

/// A gateway is no router of the group, and never goes by itself.
#[test]
fn a_group_waits_for_no_gateway() {
    lab::test(|lab| {
        let rig = Rig::new(lab)?;
        rig.metadata.set_group("InService");
        rig.set("nat-1", false);
        let sluice = rig.start()?;
        wait_problem(&sluice, "cloud", "something that is no interface")?;
        ensure!(rig.leads(OVERLAY).as_deref() == Some("nat-1"));
        sluice.stop()
    });
}

/// Whoever is drained by hand refuses what the VPC sends, so the route is another's to take.
#[test]
fn a_router_that_is_drained_by_hand_gives_its_route_up() {
    lab::test(|lab| {
        let rig = Rig::new(lab)?;
        rig.metadata.set_group("InService");
        let sluice = rig.start()?;
        wait_until(SOON, "the route", || rig.leads(OVERLAY).is_some())?;
        let drained = sluice.command(&["drain"])?;
        ensure!(drained.status.success(), "{drained:?}");
        wait_until(SOON, "the route to be gone", || {
            rig.leads(OVERLAY).is_none()
        })?;
        // It has looked at the table since then, and left it alone.
        let seen = || -> Result<bool> {
            let route = sluice.status()?["cloud"]["routes"][0].clone();
            Ok(route["own"] == false && route["waits"] == false)
        };
        wait_until(SOON, "a look at the table", || seen().unwrap_or(false))?;
        ensure!(rig.leads(OVERLAY).is_none());
        ensure!(is_quiet(&sluice), "{}", problems(&sluice, "cloud")?);

        rig.set("eni-other", false);
        let back = sluice.command(&["undrain"])?;
        ensure!(back.status.success(), "{back:?}");
        wait_until(SOON, "it to wait for the other router", || {
            let status = sluice.status().unwrap_or_default();
            let route = &status["cloud"]["routes"][0];
            route["interface"] == "eni-other" && route["waits"] == true
        })?;
        ensure!(rig.leads(OVERLAY).as_deref() == Some("eni-other"));
        rig.api.change(|state| state.routes.clear());
        wait_until(SOON, "the route to lead here", || {
            rig.leads(OVERLAY).as_deref() == Some("eni-own")
        })?;
        sluice.stop()
    });
}

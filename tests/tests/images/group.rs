//! The disk for EC2 as a router of a group, from its user data to its end. Beside it the group has a second router:
//! the daemon in a namespace, for a second guest takes more time than there is.

use anyhow::ensure;
use lab::metadata::Metadata;
use lab::site::{Arms, SERVER, VPC};
use lab::tailnet::{KEY, Tailnet};
use lab::vm::{Disk, Guest};
use lab::{Lab, retry, wait_until};
use serde_json::json;

use super::aws::{QUICK, START, end, plug, status, times};
use crate::cloud::ID;
use crate::cloud::aws::{Api, PORT};
use crate::cloud::group::{self, CLAIMED, FIRST, Old, STORY, Second};
use crate::router::serve;

/// Nothing but user data says how to run, and the metadata service what the VPC is and what the group wants.
pub(super) fn it_lives_in_a_group(lab: &Lab, disk: Disk) -> anyhow::Result<()> {
    let net = Tailnet::new(lab, Arms::One)?;
    let _servers = serve(&net.site.server)?;
    let metadata = Metadata::new(lab, &net.site.internet, ID, &VPC[..1])?;
    metadata.host.route("default", "169.254.169.1")?;
    let api = group::new_api(&metadata)?;
    let url = net.control.url();
    metadata.set(
        "user-data",
        format!(
            "[tailnet]\ncontrol_url = {url:?}\nauth_key = {KEY:?}\nephemeral = true\n[[route]]\ncidr = \
             \"auto:vpc\"\n[cloud]\nvpc_route_tables = [\"rtb-1\"]\nvpc_routes = {CLAIMED:?}\n"
        ),
    );
    let _dhcp = plug(&net.site.router)?;
    let mut guest = disk
        .ec2(ID)
        .variable(
            "AWS_ENDPOINT_URL",
            &format!("http://169.254.169.254:{PORT}"),
        )
        .nic("tap0")
        .boot(&net.site.router)?;
    let lived = lives(&mut guest, lab, &net, &metadata, &api);
    end(guest, lived)
}

fn lives(
    guest: &mut Guest,
    lab: &Lab,
    net: &Tailnet,
    metadata: &Metadata,
    api: &Api,
) -> anyhow::Result<()> {
    let offers = |routes: &[&str]| {
        retry(START, &format!("a node that offers {routes:?}"), || {
            let node = net.control.node(FIRST)?;
            let offered = &node.hostinfo["RoutableIPs"];
            ensure!(*offered == json!(routes), "it offers {offered}");
            Ok(node)
        })
    };
    let first = offers(&VPC[..1])?;
    net.control.approve(first.id, &VPC[..1]);
    let more = [VPC[0], "10.40.0.0/16"];
    metadata.set_networks(&more);
    offers(&more)?;
    group::wait_launched(api, START)?;
    group::wait_route(api, "eni-own", START)?;
    guest.wait_for("systemctl is-system-running", START)?;
    println!("{}", times(guest)?);
    let said = status(guest)?;
    ensure!(said["cloud"]["instance"]["id"] == ID, "{said:#}");
    let theirs = &said["cloud"]["routes"][1];
    ensure!(
        theirs["interface"] == "eni-other" && theirs["own"] == false,
        "{said:#}"
    );

    let two = Second::start(lab, net, api)?;
    two.waits()?;
    let laptop = net.join(&net.site.laptop, &[])?;
    wait_until(START, "ping through the router", || {
        let server = SERVER[0].to_string();
        net.site.laptop.pings(&server, &[]).unwrap_or(false)
    })?;
    let mut old = Old::open(net, &first)?;
    let drained = group::take_out(metadata, &mut old, START, || status(guest))?;
    two.carries(&laptop, &net.site.laptop)?;
    drop(old);
    wait_until(START, "it to have left", || {
        status(guest).is_ok_and(|said| said["life"]["phase"] == "left")
    })?;
    let told = group::story(&net.control, &first, api, drained);
    ensure!(told == STORY, "{told:?}");
    group::is_gone(&net.control, api)?;
    group::wait_route(api, "eni-second", QUICK)
}

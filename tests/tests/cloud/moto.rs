//! The same calls beside moto, which knows EC2 and the parameter store by AWS's own descriptions: so that our double
//! and the router do not make one mistake together. moto knows neither hooks' completion nor their heartbeats.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use lab::metadata::Metadata;
use lab::site::{Arms, Client, Site, VPC, config};
use lab::{Host, wait_until};
use serde_json::Value;

use super::aws::PORT;
use super::{ID, SOON, on_aws, problems};

/// Names the folder of a virtual environment's programs, with moto's server in it (`pip install 'moto[server]'`).
const FOLDER: &str = "SLUICE_MOTO";

const SET_UP: &str = r#"
import boto3, json
ec2 = boto3.client("ec2")
vpc = ec2.create_vpc(CidrBlock="10.20.0.0/16")["Vpc"]["VpcId"]
subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.20.0.0/24")["Subnet"]["SubnetId"]
eni = ec2.create_network_interface(SubnetId=subnet)["NetworkInterface"]["NetworkInterfaceId"]
table = ec2.create_route_table(VpcId=vpc)["RouteTable"]["RouteTableId"]
print(json.dumps({"eni": eni, "table": table}))
"#;
const LOOK: &str = r#"
import boto3, json, sys
ec2 = boto3.client("ec2")
eni, table = sys.argv[1:]
check = ec2.describe_network_interface_attribute(NetworkInterfaceId=eni, Attribute="sourceDestCheck")
routes = ec2.describe_route_tables(RouteTableIds=[table])["RouteTables"][0]["Routes"]
print(json.dumps({
    "check": check["SourceDestCheck"]["Value"],
    "routes": {r["DestinationCidrBlock"]: r.get("NetworkInterfaceId") for r in routes if "DestinationCidrBlock" in r},
}))
"#;

fn python(host: &Host, folder: &Path, script: &str, words: &[&str]) -> Result<Value> {
    let output = host
        .command([folder.join("python").as_os_str()])
        .args(["-c", script])
        .args(words)
        .env("AWS_ENDPOINT_URL", endpoint())
        .env("AWS_ACCESS_KEY_ID", "x")
        .env("AWS_SECRET_ACCESS_KEY", "x")
        .env("AWS_DEFAULT_REGION", "eu-central-1")
        .run()?;
    Ok(serde_json::from_str(&output)?)
}

fn endpoint() -> String {
    format!("http://169.254.169.254:{PORT}")
}

#[test]
fn ec2_understands_the_router() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else {
        eprintln!("skipped: {FOLDER} names no virtual environment with moto in it");
        return;
    };
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        let metadata = Metadata::new(lab, &site.router, ID, &VPC)?;
        metadata.set_role("ASIAX", "secret", "session");
        let port = PORT.to_string();
        let moto = metadata
            .host
            .command([folder.join("moto_server").as_os_str()])
            .args(["-H", "169.254.169.254", "-p", &port]);
        let mut moto = metadata.host.spawn("moto", moto)?;
        let at = std::net::SocketAddr::new(lab::metadata::ADDRESS.ip(), PORT);
        let second = std::time::Duration::from_secs(1);
        moto.ready(SOON, "moto to listen", || {
            metadata.host.tcp_connect(at, second).is_ok()
        })?;
        let made = python(&metadata.host, &folder, SET_UP, &[])?;
        let id = |name: &str| made[name].as_str().map(str::to_owned).context("an id");
        let (eni, table) = (id("eni")?, id("table")?);
        let mac = lab::metadata::MAC;
        let path = format!("meta-data/network/interfaces/macs/{mac}/interface-id");
        metadata.set(&path, eni.as_str());

        let client = Client::new("laptop", 2)?;
        let mut config = config(&[&client], "kernel", false)?;
        config.variables = vec![("AWS_ENDPOINT_URL", endpoint())];
        config.cloud = vec![
            on_aws(),
            ("vpc_route_tables", format!("[{table:?}]")),
            ("vpc_routes", "[\"100.64.0.0/24\"]".to_owned()),
        ];
        let sluice = site.router.sluice_unsettled(&config)?;
        let look = || python(&metadata.host, &folder, LOOK, &[&eni, &table]);
        let mut last = Value::Null;
        let waited = wait_until(SOON, "check and route", || {
            last = look().unwrap_or_default();
            last["check"] == false && last["routes"]["100.64.0.0/24"] == eni.as_str()
        });
        waited.with_context(|| format!("{last} {:?}", problems(&sluice, "cloud")))?;
        ensure!(problems(&sluice, "cloud")? == "");
        sluice.stop()
    });
}

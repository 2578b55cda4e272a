//! Two routers of a group. The first is taken out, and the second has all that was its.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use lab::control_server::{ControlServer, Node};
use lab::metadata::{MAC, Metadata};
use lab::site::{Arms, Client, ENDPOINT, SERVER, Site, VPC, config};
use lab::sluice::{Config, Route, Sluice};
use lab::tailnet::{KEY, Tailnet};
use lab::tailscaled::{self, Tailscaled};
use lab::{Flow, Host, Keypair, Lab, Stream, Tunnel, Wireguard, http, poll, retry, wait_until};
use serde_json::Value;

use super::aws::{Api, PORT};
use super::{ID, SOON, on_aws, problems, wait_problem};

/// What the first router calls itself, by its group, its zone and the end of its id.
pub(crate) const FIRST: &str = "routers-eu-central-1a-cdef0";
const SECOND: &str = "routers-eu-central-1a-43210";
const SECOND_ID: &str = "i-0fedcba9876543210";
/// The routes that routers claim, of which somebody else has the second.
pub(crate) const CLAIMED: [&str; 2] = ["100.64.0.0/10", "fd7a:115c:a1e0::/48"];
/// The hooks that hold an instance which begins and one which ends.
const HOOKS: [&str; 2] = ["sluice-launch", "sluice-termination"];
const HTTP: u16 = 80;
const ECHO: u16 = 7777;
/// Flows count for ten seconds after their last packet, and a machine may be busy.
const QUIET: Duration = Duration::from_secs(60);

/// A route table and a group as they are before any router.
pub(crate) fn new_api(metadata: &Metadata) -> Result<Api> {
    metadata.set_group("InService");
    let api = Api::new(metadata)?;
    api.change(|state| {
        state.holding = HOOKS.map(str::to_owned).into();
        let theirs = ("eni-other".to_owned(), false);
        state.routes = [(CLAIMED[1].to_owned(), theirs)].into();
    });
    Ok(api)
}

/// Waits until the group has heard that the first router serves.
pub(crate) fn wait_launched(api: &Api, within: Duration) -> Result<()> {
    wait_until(within, "the launch hook to be completed", || {
        api.change(|state| !state.holding.contains(HOOKS[0]))
    })
}

/// Waits until a route of the table leads to an interface, and nothing that was another's has moved.
pub(crate) fn wait_route(api: &Api, interface: &str, within: Duration) -> Result<()> {
    let leads = |cidr: &str| {
        api.change(|state| {
            let route = state.routes.get(cidr);
            route.map(|(interface, _)| interface.clone())
        })
    };
    let what = format!("the VPC's route to lead to {interface}");
    wait_until(within, &what, || {
        leads(CLAIMED[0]).as_deref() == Some(interface)
    })
    .with_context(|| format!("{:?}", leads(CLAIMED[0])))?;
    ensure!(leads(CLAIMED[1]).as_deref() == Some("eni-other"));
    Ok(())
}

/// A client of plain WireGuard, which sends by the first router whatever the coordination server says, and its flow.
pub(crate) struct Old {
    flow: Flow,
    _tunnel: Wireguard,
}

impl Old {
    /// Opens the flow by `router`.
    pub(crate) fn open(net: &Tailnet, router: &Node) -> Result<Self> {
        let key = Keypair::generate()?;
        let [v4, _] = net.control.introduce("phone", &key.public)?.addresses();
        let hex = router.key.strip_prefix("nodekey:").context("a node key")?;
        let bytes = (0..hex.len() / 2).map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16));
        let router = STANDARD.encode(bytes.collect::<Result<Vec<u8>, _>>()?);
        let tunnel =
            Tunnel::new(&key)
                .address(&format!("{v4}/32"))
                .peer(&router, ENDPOINT, [VPC[0]]);
        let phone = &net.site.phone;
        let tunnel = phone.wireguard_go(&tunnel)?;
        wait_until(SOON, "the server to answer the old client", || {
            phone.pings(&SERVER[0].to_string(), &[]).unwrap_or(false)
        })?;
        let mut flow = Flow::open(phone, &net.site.server, SERVER[0])?;
        flow.works()?;
        Ok(Self {
            flow,
            _tunnel: tunnel,
        })
    }
}

/// The group takes the first router out, and `old` goes on; `status` asks that router for its status, which says that it
/// drains at the time that is returned. `metadata` is its own.
pub(crate) fn take_out(
    metadata: &Metadata,
    old: &mut Old,
    within: Duration,
    mut status: impl FnMut() -> Result<Value>,
) -> Result<Instant> {
    // It needs a new one for what comes.
    metadata.forget_tokens();
    metadata.set_group("Terminated");
    retry(within, "the first router to wait for flows", || {
        // In a tailnet flows count for ten seconds after their last packet.
        old.flow.works()?;
        let life = status()?["life"].clone();
        let waits = life["phase"] == "draining" && life["flows"].as_u64() > Some(0);
        ensure!(waits && life["cause"] == "group", "{life}");
        old.flow.works()?;
        Ok(Instant::now())
    })
}

/// What others saw of a router on its way out, one behind the other, with its own word of `drained`.
pub(crate) fn story(
    control: &ControlServer,
    first: &Node,
    api: &Api,
    drained: Instant,
) -> Vec<&'static str> {
    let mut seen = vec![(drained, "drain")];
    let mut offered = false;
    for (at, path, body) in control.timed_requests() {
        if body["NodeKey"] != first.key.as_str() {
            continue;
        }
        let leaves = body["Expiry"].as_str().unwrap_or("").starts_with("1970-");
        let offers = body["Hostinfo"]["RoutableIPs"].is_array();
        match path.as_str() {
            "/machine/register" if leaves => seen.push((at, "leave")),
            "/machine/map" if body["Stream"] != true => {
                if offered && !offers {
                    seen.push((at, "withdraw"));
                }
                offered = offers;
            }
            _ => {}
        }
    }
    api.change(|state| {
        for (at, call) in &state.calls {
            match call.as_str() {
                "DeleteRoute 100.64.0.0/10" => seen.push((*at, "route")),
                "CompleteLifecycleAction sluice-termination" => seen.push((*at, "complete")),
                _ => {}
            }
        }
    });
    seen.sort_by_key(|(at, _)| *at);
    seen.into_iter().map(|(_, what)| what).collect()
}

/// The order in which it goes.
pub(crate) const STORY: [&str; 5] = ["withdraw", "drain", "leave", "route", "complete"];

/// That the first router is gone, by all who have to do with it.
pub(crate) fn is_gone(control: &ControlServer, api: &Api) -> Result<()> {
    ensure!(control.node(FIRST).is_err(), "it is still in the tailnet");
    api.change(|state| {
        ensure!(state.forged.is_empty(), "{:?}", state.forged);
        ensure!(state.holding.is_empty(), "{:?}", state.holding);
        let beats = "RecordLifecycleActionHeartbeat sluice-termination";
        ensure!(
            state.calls.iter().any(|(_, call)| call == beats),
            "{:?}",
            state.calls
        );
        Ok(())
    })
}

/// The second router of the group: the daemon in a namespace.
pub(crate) struct Second {
    pub(crate) sluice: Sluice,
    _metadata: Metadata,
    _api: Api,
}

impl Second {
    /// Starts it beside a first one that is in charge, and waits until its routes are offered.
    pub(crate) fn start(lab: &Lab, net: &Tailnet, api: &Api) -> Result<Self> {
        let host = net.second_router(lab)?;
        let metadata = Metadata::new(lab, &host, SECOND_ID, &VPC)?;
        metadata.set_group("InService");
        let path = format!("meta-data/network/interfaces/macs/{MAC}/interface-id");
        metadata.set(&path, "eni-second");
        let api = api.also_for(&metadata)?;
        let sluice = host.sluice_unsettled(&config_of_group(net)?)?;
        let node = poll(SOON, "the second router's routes", || {
            let node = net.control.node(SECOND).ok()?;
            node.hostinfo["RoutableIPs"].is_array().then_some(node)
        })
        .with_context(|| sluice.log())?;
        net.control.approve(node.id, &VPC);
        Ok(Self {
            sluice,
            _metadata: metadata,
            _api: api,
        })
    }

    /// It lets the first have what that has, and says so.
    pub(crate) fn waits(&self) -> Result<()> {
        wait_until(SOON, "the second router to wait", || {
            let status = self.sluice.status().unwrap_or_default();
            let routes = status["cloud"]["routes"].as_array().cloned();
            routes.is_some_and(|routes| {
                let is_theirs = |route: &Value| route["waits"] == true && route["own"] == false;
                routes.len() == CLAIMED.len() && routes.iter().all(is_theirs)
            })
        })?;
        let page = self.sluice.command(&["status"])?.stdout;
        let line =
            "100.64.0.0/10 leads to eni-own; if that is another router, this one has it 30 s";
        ensure!(page.contains(line), "{page}");
        ensure!(problems(&self.sluice, "cloud")?.is_empty());
        Ok(())
    }

    /// The clients' packets go by it, and new flows of `laptop` work.
    pub(crate) fn carries(&self, laptop: &Tailscaled, host: &Host) -> Result<()> {
        laptop.wait_peer(SECOND, "the routes", |peer| {
            peer["PrimaryRoutes"].to_string().contains(VPC[0])
        })?;
        let forwarded = || self.sluice.packets("from_overlay", "forwarded");
        let before = forwarded()?;
        http::download(host, (SERVER[0], HTTP).into(), 1 << 20)?;
        ensure!(forwarded()? > before, "the first still carries");
        Ok(())
    }
}

fn config_of_group(net: &Tailnet) -> Result<Config> {
    let mut config = Config::joining(&net.control.url(), KEY)?;
    let tailnet = config.tailnet.as_mut().context("a tailnet")?;
    tailnet.ephemeral = true;
    config.routes = vec![Route {
        cidr: "auto:vpc".to_owned(),
        snat: true,
        mode: "fast",
    }];
    config.variables = vec![("AWS_ENDPOINT_URL", format!("http://169.254.169.254:{PORT}"))];
    config.cloud = vec![
        on_aws(),
        ("vpc_route_tables", "[\"rtb-1\"]".to_owned()),
        ("vpc_routes", format!("{CLAIMED:?}")),
    ];
    Ok(config)
}

#[test]
fn a_router_that_its_group_takes_out_leaves_all_to_the_next() {
    tailscaled::test(|lab| {
        let net = Tailnet::new(lab, Arms::Two)?;
        let metadata = Metadata::new(lab, &net.site.router, ID, &VPC)?;
        let api = new_api(&metadata)?;
        // The role lacks a right, of which nothing depends but the hook.
        let deny = |state: &mut super::aws::State| {
            state.denied.insert("CompleteLifecycleAction".to_owned());
        };
        api.change(deny);
        let one = net.site.router.sluice_unsettled(&config_of_group(&net)?)?;
        let first = poll(SOON, "the first router's routes", || {
            let node = net.control.node(FIRST).ok()?;
            node.hostinfo["RoutableIPs"].is_array().then_some(node)
        })
        .with_context(|| one.log())?;
        net.control.approve(first.id, &VPC);
        let told = wait_problem(&one, "cloud", "goes on holding this instance")?;
        ensure!(
            told.contains("may not call autoscaling:CompleteLifecycleAction"),
            "{told}"
        );
        wait_route(&api, "eni-own", SOON)?;
        api.change(|state| state.denied.clear());
        wait_launched(&api, SOON)?;

        let two = Second::start(lab, &net, &api)?;
        two.waits()?;
        let laptop = net.join(&net.site.laptop, &[])?;
        let _servers = (
            net.site.server.http_server(HTTP)?,
            net.site.server.udp_echo(ECHO)?,
        );
        wait_until(SOON, "the server to answer", || {
            net.site
                .laptop
                .pings(&SERVER[0].to_string(), &[])
                .unwrap_or(false)
        })?;
        let mut old = Old::open(&net, &first)?;
        // A flow without connection goes on by the other, which translates it anew.
        let stream = Stream::start(&net.site.laptop, (SERVER[0], ECHO).into())?;
        stream.wait(100)?;

        let drained = take_out(&metadata, &mut old, SOON, || one.status())?;
        two.carries(&laptop, &net.site.laptop)?;
        stream.wait(100)?;
        let counted = stream.end()?;
        ensure!(counted.lost <= 100, "{counted:?}");
        drop(old);
        wait_until(QUIET, "the first router to have left", || {
            one.status()
                .is_ok_and(|status| status["life"]["phase"] == "left")
        })
        .with_context(|| one.log())?;
        let told = story(&net.control, &first, &api, drained);
        ensure!(told == STORY, "{told:?}");
        is_gone(&net.control, &api)?;
        wait_route(&api, "eni-second", SOON)?;
        ensure!(problems(&two.sluice, "cloud")?.is_empty());
        Ok(())
    });
}

/// What the spot market recommends is told and changes nothing; what it announces ends the router.
#[test]
fn the_spot_markets_notices_are_told_apart() {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        let metadata = Metadata::new(lab, &site.router, ID, &VPC)?;
        metadata.set("meta-data/instance-life-cycle", "spot");
        let client = Client::new("laptop", 2)?;
        let mut config = config(&[&client], "kernel", true)?;
        config.cloud = vec![on_aws()];
        let sluice = site.router.sluice(&config)?;
        let _tunnel = client.connect(&site.laptop, &config.key)?;
        let life = || Ok::<_, anyhow::Error>(sluice.status()?["life"].clone());

        metadata.set(
            "meta-data/events/recommendations/rebalance",
            r#"{"noticeTime": "2026-11-30T08:22:00Z"}"#,
        );
        wait_until(SOON, "the recommendation to be told", || {
            sluice
                .status()
                .is_ok_and(|status| status["cloud"]["rebalance"] == true)
        })?;
        let page = sluice.command(&["status"])?.stdout;
        ensure!(page.contains("likely to take this instance back"), "{page}");
        ensure!(life()?["phase"] == "serving", "{}", life()?);
        let mut flow = Flow::open(&site.laptop, &site.server, SERVER[0])?;
        flow.works()?;
        metadata.set(
            "meta-data/spot/instance-action",
            r#"{"action": "terminate", "time": "2026-11-30T08:24:00Z"}"#,
        );
        let mut last = Value::Null;
        wait_until(SOON, "it to drain", || {
            last = life().unwrap_or_default();
            last["phase"] == "draining" && last["cause"] == "spot" && last["flows"] == 1
        })
        .with_context(|| last.to_string())?;
        flow.works()?;
        drop(flow);
        wait_until(QUIET, "it to have left", || {
            life().is_ok_and(|life| life["phase"] == "left")
        })
    });
}

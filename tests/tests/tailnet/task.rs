//! The node as the daemon runs it, beside our own coordination server, without root: what it keeps, what it says to
//! the daemon, and what it reports.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use lab::control_server::ControlServer;
use lab::poll;
use router::control::{Combined, Route, RouteMode, Source as _, State};
use router::tailnet::node::{
    self, BackendState, Command, Handle, KeySource, Options, Report, Settings,
};
use serde_json::json;
use tokio::sync::oneshot;

use super::node::SOON;

const KEY: &str = "tskey-auth-good";

/// A node, and a daemon that takes what it says.
struct Task {
    node: Handle,
    state: tokio::sync::watch::Receiver<Arc<State>>,
    /// What the node said before the server had answered.
    first: State,
}

fn settings(server: &ControlServer, folder: &Path, key: Option<&str>) -> Settings {
    Settings {
        control_url: server.url(),
        auth_key: key.map(|key| KeySource::parse(key, folder)),
        state_dir: folder.to_owned(),
        ..Settings::default()
    }
}

impl Task {
    fn start(settings: Settings) -> Result<Self> {
        let opened = node::open(&settings, None)?;
        let mut combined = Combined::new(&["the tailnet"]);
        combined.apply(0, opened.update(&settings));
        let first = combined.state().clone();
        let (node, mut source) = node::spawn(settings, opened, Options::default())?;
        let (sender, state) = tokio::sync::watch::channel(Arc::new(first.clone()));
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        std::thread::spawn(move || {
            runtime.block_on(async {
                loop {
                    tokio::select! {
                        update = source.next() => match update {
                            Ok(update) => combined.apply(0, update),
                            Err(never) => match never {},
                        },
                        () = sender.closed() => return,
                    };
                    sender.send_replace(Arc::new(combined.state().clone()));
                }
            });
        });
        Ok(Self { node, state, first })
    }

    /// Waits until `wanted` holds of the report.
    fn wait(&self, what: &str, wanted: impl Fn(&Report) -> bool) -> Result<Arc<Report>> {
        let found = poll(SOON, what, || {
            Some(self.node.report()).filter(|r| wanted(r))
        });
        found.with_context(|| {
            let report = self.node.report();
            format!(
                "{:?} {:?} {:?}",
                report.state, report.auth_url, report.problems
            )
        })
    }

    fn wait_running(&self) -> Result<Arc<Report>> {
        self.wait("the node to run", |report| {
            report.state == BackendState::Running && report.connected.is_some()
        })
    }

    fn wait_state(&self, what: &str, wanted: impl Fn(&State) -> bool) -> Result<Arc<State>> {
        poll(SOON, what, || {
            Some(self.state.borrow().clone()).filter(|state| wanted(state))
        })
    }

    /// Ends it as a stop (`true`) or a hand-over does.
    fn end(self, stop: bool) -> Result<()> {
        let (done, ended) = oneshot::channel();
        self.node.send(Command::End { stop, done });
        Ok(ended.blocking_recv()?)
    }

    fn log_out(&self) -> Result<Result<(), String>> {
        let (done, out) = oneshot::channel();
        self.node.send(Command::LogOut { done });
        Ok(out.blocking_recv()?)
    }
}

fn registrations(server: &ControlServer) -> usize {
    let requests = server.requests();
    let registered = requests
        .iter()
        .filter(|(path, _)| path == "/machine/register");
    registered.count()
}

#[test]
fn what_it_says_follows_the_map() -> Result<()> {
    let (server, folder) = (ControlServer::start()?, tempfile::tempdir()?);
    server.invent(3);
    let task = Task::start(settings(&server, folder.path(), Some(KEY)))?;
    ensure!(task.first.peers.is_empty() && task.first.policy.rules.len() == 1);
    let report = task.wait_running()?;
    ensure!(report.problems.is_empty(), "{:?}", report.problems);
    ensure!(report.map.peers().count() == 3);
    task.wait_state("the map", |state| {
        state.peers.len() == 3 && state.addresses().len() == 2
    })?;
    server.set_filter(json!([]));
    task.wait_state("the filter", |state| {
        state
            .policy
            .rules
            .iter()
            .all(|rule| rule.sources.is_empty())
    })?;
    server.remove(2);
    task.wait_state("the removal", |state| state.peers.len() == 2)?;
    server.expire(3);
    task.wait_state("the end of a peer's key", |state| state.peers.len() == 1)?;
    ensure!(registrations(&server) == 1);
    Ok(())
}

#[test]
fn a_restart_is_the_same_node_and_begins_with_the_last_map() -> Result<()> {
    let (server, folder) = (ControlServer::start()?, tempfile::tempdir()?);
    server.invent(3);
    let wanted = settings(&server, folder.path(), Some(KEY));
    let task = Task::start(wanted.clone())?;
    let key = task.wait_running()?.key;
    task.end(false)?;
    let task = Task::start(wanted)?;
    ensure!(task.first.peers.len() == 3 && task.first.addresses().len() == 2);
    ensure!(task.wait_running()?.key == key);
    ensure!(registrations(&server) == 1 && server.nodes().len() == 1);
    Ok(())
}

#[test]
fn without_the_server_the_last_map_holds_and_the_problem_is_told() -> Result<()> {
    let (mut server, folder) = (ControlServer::start()?, tempfile::tempdir()?);
    server.invent(3);
    let wanted = settings(&server, folder.path(), Some(KEY));
    let task = Task::start(wanted.clone())?;
    task.wait_running()?;
    task.end(false)?;
    let address = server.url().trim_start_matches("http://").to_owned();
    server.pause();
    let task = Task::start(wanted)?;
    let report = task.wait("the problem", |report| !report.problems.is_empty())?;
    ensure!(report.state == BackendState::Running && report.connected.is_none());
    ensure!(
        report.problems[0].part == "control",
        "{:?}",
        report.problems
    );
    ensure!(task.first.peers.len() == 3);
    server.resume(lab::listen(address.parse()?)?)?;
    let report = task.wait("the problem to go", |report| report.problems.is_empty())?;
    ensure!(report.connected.is_some());
    ensure!(registrations(&server) == 1);
    Ok(())
}

#[test]
fn a_person_is_sent_to_a_url_and_it_is_told() -> Result<()> {
    let (server, folder) = (ControlServer::start()?, tempfile::tempdir()?);
    server.faults(|faults| faults.interactive = true);
    let task = Task::start(settings(&server, folder.path(), None))?;
    let report = task.wait("a URL", |report| report.auth_url.is_some())?;
    ensure!(report.state == BackendState::NeedsLogin);
    let url = report.auth_url.clone().unwrap_or_default();
    let told = report
        .problems
        .iter()
        .any(|problem| problem.text.contains(&url));
    ensure!(told, "{:?}", report.problems);
    server.authorize(&url);
    ensure!(task.wait_running()?.problems.is_empty());
    Ok(())
}

#[test]
fn a_refusal_is_told_until_a_better_key_comes() -> Result<()> {
    let (server, folder) = (ControlServer::start()?, tempfile::tempdir()?);
    let task = Task::start(settings(&server, folder.path(), Some("tskey-auth-bad")))?;
    let report = task.wait("the refusal", |report| {
        let mut problems = report.problems.iter();
        problems.any(|problem| problem.part == "refused" && problem.text.contains("invalid key"))
    })?;
    ensure!(report.state == BackendState::NeedsLogin);
    let file = folder.path().join("key");
    std::fs::write(&file, format!("{KEY}\n"))?;
    task.node.send(Command::LogIn {
        key: Some(KeySource::parse("file:key", folder.path())),
        fresh: false,
    });
    ensure!(task.wait_running()?.problems.is_empty());
    Ok(())
}

#[test]
fn logged_out_it_has_no_peers_until_it_logs_in() -> Result<()> {
    let (server, folder) = (ControlServer::start()?, tempfile::tempdir()?);
    server.invent(2);
    let wanted = settings(&server, folder.path(), Some(KEY));
    let task = Task::start(wanted.clone())?;
    let key = task.wait_running()?.key;
    task.wait_state("the map", |state| state.peers.len() == 2)?;
    ensure!(task.log_out()? == Ok(()));
    let report = task.wait("the log-out", |report| {
        report.state == BackendState::NeedsLogin
    })?;
    ensure!(report.map.own().is_none() && report.key != key);
    ensure!(
        report.problems[0].text.contains("logged out"),
        "{:?}",
        report.problems
    );
    task.wait_state("nobody", |state| {
        state.peers.is_empty()
            && state
                .policy
                .rules
                .iter()
                .all(|rule| rule.sources.is_empty())
    })?;
    task.node.send(Command::LogIn {
        key: None,
        fresh: false,
    });
    let report = task.wait_running()?;
    ensure!(report.key != key && report.problems.is_empty());
    task.wait_state("the map", |state| state.peers.len() == 2)?;
    Ok(())
}

#[test]
fn down_it_takes_no_part_and_stays_the_node() -> Result<()> {
    let (server, folder) = (ControlServer::start()?, tempfile::tempdir()?);
    server.invent(2);
    let task = Task::start(settings(&server, folder.path(), Some(KEY)))?;
    let key = task.wait_running()?.key;
    task.node.send(Command::Down);
    task.wait("it to be down", |report| {
        report.state == BackendState::Stopped
    })?;
    task.wait_state("nobody", |state| state.peers.is_empty())?;
    poll(SOON, "the server to miss it", || {
        server.nodes().iter().all(|node| !node.online).then_some(())
    })?;
    task.node.send(Command::Up);
    ensure!(task.wait_running()?.key == key);
    task.wait_state("the map", |state| state.peers.len() == 2)?;
    ensure!(registrations(&server) == 1);
    Ok(())
}

#[test]
fn routes_that_are_not_offered_are_still_served() -> Result<()> {
    let (server, folder) = (ControlServer::start()?, tempfile::tempdir()?);
    let mut wanted = settings(&server, folder.path(), Some(KEY));
    wanted.advertise_routes = vec![Route {
        cidr: "10.20.0.0/16".parse()?,
        snat: true,
        mode: RouteMode::Fast,
    }];
    let task = Task::start(wanted)?;
    task.wait_running()?;
    for offers in [false, true] {
        task.node.send(Command::Offer(offers));
        poll(SOON, "the server to hear of it", || {
            let nodes = server.nodes();
            let offered = nodes.first()?.hostinfo["RoutableIPs"].is_array();
            (offered == offers).then_some(())
        })?;
        let told = |report: &Report| report.advertised.is_empty() != offers;
        task.wait("it in the report", told)?;
        let state = task.state.borrow().clone();
        ensure!(state.routes.len() == 1, "{:?}", state.routes);
    }
    Ok(())
}

#[test]
fn an_ephemeral_node_leaves_at_a_stop_and_not_at_a_hand_over() -> Result<()> {
    let (server, folder) = (ControlServer::start()?, tempfile::tempdir()?);
    let mut wanted = settings(&server, folder.path(), Some(KEY));
    wanted.ephemeral = true;
    let task = Task::start(wanted.clone())?;
    task.wait_running()?;
    task.end(false)?;
    ensure!(server.nodes().len() == 1);
    let task = Task::start(wanted)?;
    task.wait_running()?;
    ensure!(registrations(&server) == 1);
    task.end(true)?;
    ensure!(server.nodes().is_empty(), "{:?}", server.nodes());
    Ok(())
}

#[test]
fn an_ended_key_is_replaced_and_peers_stay() -> Result<()> {
    let (server, folder) = (ControlServer::start()?, tempfile::tempdir()?);
    server.invent(2);
    let task = Task::start(settings(&server, folder.path(), Some(KEY)))?;
    let key = task.wait_running()?.key;
    let own = server.nodes()[0].id;
    // Whoever comes without a key is to send a person.
    server.faults(|faults| faults.interactive = true);
    server.expire(own);
    let report = task.wait("another key", |report| report.key != key)?;
    let new = report.key.context("a key")?;
    task.wait_state("the daemon to have it", |state| {
        state
            .identity
            .as_ref()
            .is_some_and(|own| own.private_key.public() == new.into())
            && state.peers.len() == 2
    })?;
    task.wait_running()?;
    ensure!(server.nodes().len() == 1);
    Ok(())
}

#[test]
fn the_end_of_the_key_is_told_a_day_before() -> Result<()> {
    let (server, folder) = (ControlServer::start()?, tempfile::tempdir()?);
    let task = Task::start(settings(&server, folder.path(), Some(KEY)))?;
    task.wait_running()?;
    let node = &server.nodes()[0];
    let ends = |hours: i64| {
        let now = router::tailnet::time::Timestamp::now();
        let at = router::tailnet::time::Timestamp(now.0 + hours * 3_600_000_000);
        json!({"ControlTime": now.to_string(), "Node": {
            "ID": node.id, "Key": node.key, "Name": "router.tail.test.", "MachineAuthorized": true,
            "Addresses": ["100.64.0.1/32"], "KeyExpiry": at.to_string(),
        }})
    };
    server.push(node.id, ends(48));
    let report = task.wait("the key's end", |report| report.key_expiry.is_some())?;
    ensure!(report.problems.is_empty(), "{:?}", report.problems);
    server.push(node.id, ends(23));
    let report = task.wait("the warning", |report| !report.problems.is_empty())?;
    ensure!(
        report.problems[0].part == "key-expiry",
        "{:?}",
        report.problems
    );
    Ok(())
}

#[test]
fn another_server_is_another_node_and_the_former_keys_stay_beside() -> Result<()> {
    let (one, two) = (ControlServer::start()?, ControlServer::start()?);
    let folder = tempfile::tempdir()?;
    let task = Task::start(settings(&one, folder.path(), Some(KEY)))?;
    let key = task.wait_running()?.key;
    task.end(false)?;
    let task = Task::start(settings(&two, folder.path(), Some(KEY)))?;
    ensure!(task.wait_running()?.key != key);
    ensure!(folder.path().join("node.json.former").exists());
    Ok(())
}

#[test]
fn what_the_settings_change_reaches_the_server_and_the_daemon() -> Result<()> {
    let (server, folder) = (ControlServer::start()?, tempfile::tempdir()?);
    let mut wanted = settings(&server, folder.path(), Some(KEY));
    let task = Task::start(wanted.clone())?;
    task.wait_running()?;
    wanted.hostname = Some("renamed".to_owned());
    wanted.static_endpoints = vec!["203.0.113.7:51820".parse()?];
    wanted.advertise_routes = vec![router::control::Route {
        cidr: "10.5.0.0/16".parse()?,
        snat: true,
        mode: router::control::RouteMode::Fast,
    }];
    task.node.send(Command::Set(Box::new(wanted)));
    task.wait_state("the route", |state| state.routes.len() == 1)?;
    poll(SOON, "the server to know", || {
        let node = server.nodes().pop()?;
        let knows = node.hostinfo["Hostname"] == "renamed"
            && node.hostinfo["RoutableIPs"] == json!(["10.5.0.0/16"])
            && node.endpoints == ["203.0.113.7:51820"];
        knows.then_some(())
    })?;
    task.wait("the report", |report| report.advertised.len() == 1)?;
    Ok(())
}

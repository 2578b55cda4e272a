//! What the router's life asks of the agent: hooks are completed, and routes taken away.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::metadata::Metadata;
use lab::site::{Arms, Site, VPC};
use lab::wait_until;
use router::cloud::agent::{self, Event, Handle, Settings};
use router::cloud::life::{Action, Seen, Target};

use super::ID;
use super::aws::{Api, PORT};

/// The agent asks from a namespace by what its process's environment says: this test is that process.
const INSIDE: &str = "cloud::hooks::inside_a_process_of_its_own";
const TARGET: &str = "meta-data/autoscaling/target-lifecycle-state";
/// A table that AWS does not show at first.
const HIDDEN: &str = "rtb-0";
/// How often a hook that does not hold the instance is tried again.
const REFUSED: u32 = 5;
const DROPPED: &str = "DeleteRoute 100.64.0.0/10";

#[test]
fn hooks_are_completed_and_routes_dropped() {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        let metadata = Metadata::new(lab, &site.router, ID, &VPC)?;
        metadata.set(
            "meta-data/tags/instance/aws:autoscaling:groupName",
            "routers",
        );
        metadata.set("meta-data/instance-life-cycle", "spot");
        metadata.set(TARGET, "Terminated");
        metadata.set(
            "meta-data/spot/instance-action",
            r#"{"action":"terminate"}"#,
        );
        let api = Api::new(&metadata)?;
        api.change(|state| {
            state.holding = ["up", "down"].map(str::to_owned).into();
            state.hidden.insert(HIDDEN.to_owned());
            state.routes = [
                ("100.64.0.0/10".to_owned(), ("eni-own".to_owned(), false)),
                ("192.168.0.0/24".to_owned(), ("eni-own".to_owned(), false)),
                (
                    "198.51.100.0/24".to_owned(),
                    ("eni-other".to_owned(), false),
                ),
            ]
            .into();
        });
        let program = std::env::current_exe()?;
        let command = site
            .router
            .command([program.as_os_str()])
            .args(["--exact", INSIDE, "--ignored", "--nocapture"])
            .env("AWS_ENDPOINT_URL", format!("http://169.254.169.254:{PORT}"))
            .timeout(Duration::from_secs(60));
        let output = std::thread::scope(|scope| {
            // A process ends with the thread that began it, so the other one sees to AWS.
            scope.spawn(|| {
                let calls = || api.change(|state| state.calls.clone());
                let dropped = || calls().iter().filter(|(_, call)| call == DROPPED).count();
                wait_until(Duration::from_secs(50), "two routes to be dropped", || {
                    dropped() == 2
                })?;
                api.change(|state| state.hidden.clear());
                anyhow::Ok(())
            });
            command.output()
        })?;
        ensure!(
            output.status.success(),
            "{}\n{}",
            output.stdout,
            output.stderr
        );
        ensure!(output.stdout.contains("1 passed"), "{}", output.stdout);
        api.change(|state| {
            ensure!(state.forged.is_empty(), "{:?}", state.forged);
            let calls: Vec<&str> = state.calls.iter().map(|(_, call)| call.as_str()).collect();
            let lifecycle: Vec<&str> = calls
                .iter()
                .copied()
                .filter(|call| call.contains("Lifecycle"))
                .collect();
            let mut wanted = vec!["CompleteLifecycleAction up"; 1 + usize::try_from(REFUSED)? + 1];
            wanted.extend([
                "RecordLifecycleActionHeartbeat down",
                "CompleteLifecycleAction down",
            ]);
            ensure!(lifecycle == wanted, "{calls:?}");
            let left: Vec<&str> = state.routes.keys().map(String::as_str).collect();
            ensure!(left == ["192.168.0.0/24", "198.51.100.0/24"], "{left:?}");
            Ok(())
        })
    });
}

#[test]
#[ignore = "hooks_are_completed_and_routes_dropped runs it as a process of its own"]
fn inside_a_process_of_its_own() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let settings = Settings {
        launch_hook: "up".to_owned(),
        termination_hook: "down".to_owned(),
        route_tables: vec!["rtb-1".to_owned()],
        overlay: vec!["100.64.0.0/10".parse().unwrap()],
        keeps_sources: false,
        user_data: None,
    };
    let outcome: Result<()> = runtime.block_on(async {
        let mut agent = agent::spawn(settings.clone(), 0)?;
        // What it sees by itself.
        let (mut target, mut spot) = (false, false);
        while !(target && spot) {
            match next(&mut agent).await? {
                Event::Seen(Seen::Target(Target::Terminated)) => target = true,
                Event::Seen(Seen::Spot) => spot = true,
                _ => {}
            }
        }
        is_done(&mut agent, Action::CompleteLaunch, true).await?;
        // The group may be late with its hook, so nothing is wrong; nor is with a restart, when none comes.
        for _ in 0..REFUSED {
            is_done(&mut agent, Action::CompleteLaunch, false).await?;
            ensure!(problems(&agent).is_empty(), "{}", problems(&agent));
        }
        is_done(&mut agent, Action::CompleteLaunch, true).await?;
        is_done(&mut agent, Action::Heartbeat, true).await?;

        // A table that cannot be looked at keeps no other from being cleared.
        let settings = |tables: &[&str]| Settings {
            route_tables: tables.iter().map(|&table| table.to_owned()).collect(),
            ..settings.clone()
        };
        agent.set(settings(&[HIDDEN, "rtb-1"]));
        is_done(&mut agent, Action::DropRoutes, false).await?;
        let kept = "may still lead to this router";
        wait(&mut agent, |report| report.contains(kept)).await?;
        // Who serves again wants the routes, and what could not be dropped is no fault any more.
        agent.claim(true);
        let serves = |report: &str| !report.contains(kept) && report.contains("own: true");
        wait(&mut agent, serves).await?;
        // A table out of the configuration is cleared, as soon as that can be.
        agent.set(settings(&[]));
        wait(&mut agent, |report| report.contains(kept)).await?;
        let is_clear = |report: &str| {
            report.contains("problems: []")
                && report.contains("routes: []")
                && !report.contains("route tables")
        };
        wait(&mut agent, is_clear).await?;
        is_done(&mut agent, Action::CompleteTermination, true).await
    });
    outcome.unwrap();
}

fn problems(agent: &Handle) -> String {
    agent.report().problems.join("\n")
}

/// Has the agent do something, which is to go so.
async fn is_done(agent: &mut Handle, action: Action, well: bool) -> Result<()> {
    agent.act(action);
    loop {
        if let Event::Done(done, went) = next(agent).await? {
            ensure!(
                (done, went) == (action, well),
                "{done:?} {went}: {}",
                problems(agent)
            );
            return Ok(());
        }
    }
}

/// Waits for a report like this.
async fn wait(agent: &mut Handle, is_like: impl Fn(&str) -> bool) -> Result<()> {
    loop {
        let report = format!("{:?}", agent.report());
        if is_like(&report) {
            return Ok(());
        }
        next(agent).await.context(report)?;
    }
}

async fn next(agent: &mut Handle) -> Result<Event> {
    let event = tokio::time::timeout(Duration::from_secs(20), agent.event()).await;
    event
        .context("the agent says nothing")?
        .context("the agent has ended")
}

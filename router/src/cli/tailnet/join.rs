//! `sluice up`, `set`, `login`, `logout` and `down`.

use std::collections::HashSet;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::Value;

use super::{Login, Set, Socket, Up, Waiting, qr};
use crate::api::{self, Order};
use crate::config::{self, Changes, UpFlags};

/// How often the daemon is asked how it stands.
const LOOK: Duration = Duration::from_millis(300);
/// The daemon's report follows what happens after a moment.
const SETTLED: Duration = Duration::from_secs(1);
/// Problems that somebody has to mend as a rule: nobody need wait for one to mend itself.
const FINAL: [&str; 2] = ["refused", "auth-key"];

pub(in super::super) fn up(args: &Up) -> anyhow::Result<()> {
    let order = Order::Up {
        changes: changes(&args.flags)?,
        reset: args.reset,
        login: secret(&args.flags)?,
        force: args.force_reauth,
    };
    send(&args.waiting, &order)
}

pub(in super::super) fn login(args: &Login) -> anyhow::Result<()> {
    let order = Order::Login {
        changes: changes(&args.flags)?,
        login: secret(&args.flags)?,
    };
    send(&args.waiting, &order)
}

pub(in super::super) fn set(args: &Set) -> anyhow::Result<()> {
    let changes = args.flags.changes().map_err(anyhow::Error::msg)?;
    if changes == Changes::default() {
        bail!(
            "say what to set, as `sluice set --advertise-routes=10.0.0.0/16`; `sluice set --help` lists it"
        );
    }
    Ok(api::order(&args.socket.socket, &Order::Set { changes })?)
}

pub(in super::super) fn logout(socket: &Socket) -> anyhow::Result<()> {
    Ok(api::order(&socket.socket, &Order::Logout)?)
}

pub(in super::super) fn down(socket: &Socket) -> anyhow::Result<()> {
    Ok(api::order(&socket.socket, &Order::Down)?)
}

fn changes(flags: &UpFlags) -> anyhow::Result<Changes> {
    let mut changes = flags.changes().map_err(anyhow::Error::msg)?;
    if let Some(ca) = &changes.ca {
        // The daemon is at home elsewhere.
        let path = std::path::absolute(ca).with_context(|| ca.clone())?;
        changes.ca = Some(path.to_string_lossy().into_owned());
    }
    Ok(changes)
}

/// What lets the router in. A file is read here, where its path means something.
fn secret(flags: &UpFlags) -> anyhow::Result<Option<config::Login>> {
    let Some(mut login) = flags.login().map_err(anyhow::Error::msg)? else {
        return Ok(None);
    };
    if let Some(path) = login.auth_key.strip_prefix("file:") {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("the key in {path} cannot be read"))?;
        text.trim().clone_into(&mut login.auth_key);
    }
    Ok(Some(login))
}

fn problems(status: &Value) -> Vec<(String, String)> {
    let all = status["problems"].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    all.iter()
        .map(|problem| (text(&problem["part"]), text(&problem["error"])))
        .collect()
}

/// Sends an order and waits until the router is in, telling what it waits for. What stood there before is no news.
fn send(waiting: &Waiting, order: &Order) -> anyhow::Result<()> {
    let socket = &waiting.socket.socket;
    let before = api::fetch_status(socket)?;
    let old: HashSet<String> = problems(&before)
        .into_iter()
        .map(|(_, text)| text)
        .collect();
    let old_url = before["AuthURL"].as_str().unwrap_or_default().to_owned();
    api::order(socket, order)?;
    let begun = Instant::now();
    let mut told: HashSet<String> = HashSet::new();
    loop {
        sleep(LOOK);
        let status = api::fetch_status(socket)?;
        let fresh = begun.elapsed() < SETTLED;
        let url = status["AuthURL"].as_str().unwrap_or_default();
        let known = fresh && url == old_url;
        if !url.is_empty() && !known && told.insert(url.to_owned()) {
            eprintln!("\nTo let this router in, visit:\n\n\t{url}\n");
            if let Some(code) = qr::code(url).filter(|_| waiting.qr) {
                eprintln!("{code}");
            }
        }
        for (part, text) in problems(&status) {
            if fresh && old.contains(&text) {
                continue;
            }
            if FINAL.contains(&part.as_str()) {
                bail!("{text}");
            }
            let ours = ["login", "control", "tailnet-lock"].contains(&part.as_str());
            // The URL has been told.
            if ours && url.is_empty() && told.insert(text.clone()) {
                eprintln!("{text}");
            }
        }
        let connected = status["tailnet"]["connected_since"].is_string();
        if status["BackendState"] == "Running" && connected && url.is_empty() && !fresh {
            tell_routes(&status);
            return Ok(());
        }
        if !waiting.timeout.is_zero() && begun.elapsed() > waiting.timeout {
            bail!(
                "the router is not in the tailnet after {:?}: {}; it goes on trying, see `sluice status`",
                waiting.timeout,
                status["BackendState"].as_str().unwrap_or("no state")
            );
        }
    }
}

/// What is still to be done before the routes serve.
fn tell_routes(status: &Value) {
    let routes = status["tailnet"]["routes"].as_array();
    for route in routes.into_iter().flatten() {
        if let Some(advice) = route["advice"].as_str() {
            eprintln!("{advice}");
        }
    }
}

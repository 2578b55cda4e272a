//! The router on EC2: a double of the metadata service at its real address, and one of AWS's calls beside it.

pub(crate) mod aws;
mod calls;
pub(crate) mod group;
mod hooks;
mod mock;
mod moto;
mod node;
mod routes;
mod service;
mod user_data;

use std::time::Duration;

use anyhow::Result;
use lab::poll;
use lab::sluice::Sluice;
use serde_json::Value;

pub(crate) const ID: &str = "i-0123456789abcdef0";
/// A poll, with the time that a silent service takes, and more of a busy machine's.
const SOON: Duration = Duration::from_secs(60);

/// Words for `[cloud]` of a machine that does not look like an instance.
fn on_aws() -> (&'static str, String) {
    ("provider", "\"aws\"".to_owned())
}

/// The problems of a part, one behind the other.
fn problems(sluice: &Sluice, part: &str) -> Result<String> {
    let status = sluice.status()?;
    let problems = status["problems"].as_array().into_iter().flatten();
    let of_part = problems.filter(|problem| problem["part"] == part);
    let told = of_part.filter_map(|problem| problem["error"].as_str());
    Ok(told.collect::<Vec<_>>().join("\n"))
}

/// Waits until a problem of this part has these words in it.
fn wait_problem(sluice: &Sluice, part: &str, words: &str) -> Result<String> {
    poll(SOON, &format!("a problem of {part} with {words:?}"), || {
        let told = problems(sluice, part).ok()?;
        told.contains(words).then_some(told)
    })
}

/// The CIDRs that are routed.
fn routed(status: &Value) -> Vec<String> {
    let routes = status["routes"].as_array().into_iter().flatten();
    let cidrs = routes.filter_map(|route| route["cidr"].as_str());
    cidrs.map(str::to_owned).collect()
}

/// Waits until just these CIDRs are routed.
fn wait_routed(sluice: &Sluice, cidrs: &[&str]) -> Result<()> {
    let mut last = Vec::new();
    let waited = poll(SOON, &format!("the routes {cidrs:?}"), || {
        last = sluice.status().map(|status| routed(&status)).ok()?;
        (last == cidrs).then_some(())
    });
    waited.map_err(|error| error.context(format!("{last:?}")))
}

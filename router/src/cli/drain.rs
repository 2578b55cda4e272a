//! `sluice drain` and `undrain`.

use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use anyhow::bail;
use serde_json::Value;

use crate::{api, config};

/// How often the daemon is asked how it stands.
const LOOK: Duration = Duration::from_millis(300);

/// `sluice drain`.
#[derive(Debug, clap::Args)]
pub(super) struct Drain {
    /// How long flows may take to end, e.g. 5m, instead of `drain.timeout` of the configuration.
    #[arg(long, value_name = "TIME", value_parser = config::duration)]
    timeout: Option<Duration>,
    /// Do not wait for them.
    #[arg(long)]
    no_wait: bool,
    /// The router's socket (`api.socket` in its configuration).
    #[arg(long, value_name = "PATH", default_value_os_t = config::default_socket(config::DEFAULT_DEVICE))]
    socket: PathBuf,
}

/// Has the router drain, and shows how it gets on until it has.
pub(super) fn drain(args: &Drain) -> anyhow::Result<()> {
    api::drain(&args.socket, args.timeout)?;
    if args.no_wait {
        return Ok(());
    }
    let mut told = String::new();
    loop {
        let life = &api::fetch_status(&args.socket)?["life"];
        match progress(life)? {
            Progress::Over(text) => return super::print(&text),
            Progress::Goes(text) if text != told => {
                super::print(&text)?;
                told = text;
            }
            Progress::Goes(_) => {}
        }
        sleep(LOOK);
    }
}

/// How far a router is.
#[derive(Debug, PartialEq, Eq)]
enum Progress {
    /// It waits, for what this line says.
    Goes(String),
    /// It has drained.
    Over(String),
}

/// What the part `life` of a status means for who waits; an error if it has not drained.
fn progress(life: &Value) -> anyhow::Result<Progress> {
    let flows = life["flows"].as_u64();
    let left = match flows {
        Some(1) => "1 flow is left".to_owned(),
        Some(flows) => format!("{flows} flows are left"),
        None => "flows are not counted yet".to_owned(),
    };
    Ok(match life["phase"].as_str().unwrap_or_default() {
        "draining" => match life["waits_for"].as_str() {
            Some(what) if what != "flows to end" => Progress::Goes(format!("waiting for {what}\n")),
            _ => Progress::Goes(format!("{left}\n")),
        },
        "drained" if flows == Some(0) => Progress::Over("drained: no flow is left\n".to_owned()),
        "drained" => {
            bail!("the time is up, and {left}: they go on until they end or the router stops")
        }
        "leaving" | "left" => {
            let reason = life["reason"].as_str().unwrap_or_default();
            Progress::Over(format!("the router leaves, for {reason}; {left}\n"))
        }
        _ => bail!("the router drains no more: somebody has undrained it"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn who_waits_is_told_what_is_left() {
        let goes = |text: &str| Progress::Goes(text.to_owned());
        for (life, wanted) in [
            (
                json!({"phase": "draining", "flows": null, "waits_for": "new flows to be refused"}),
                goes("waiting for new flows to be refused\n"),
            ),
            (
                json!({"phase": "draining", "flows": null, "waits_for": "flows to end"}),
                goes("flows are not counted yet\n"),
            ),
            (
                json!({"phase": "draining", "flows": 3, "waits_for": "flows to end"}),
                goes("3 flows are left\n"),
            ),
            (
                json!({"phase": "drained", "flows": 0}),
                Progress::Over("drained: no flow is left\n".to_owned()),
            ),
            (
                json!({"phase": "leaving", "flows": 1, "reason": "its group takes the instance out"}),
                Progress::Over(
                    "the router leaves, for its group takes the instance out; 1 flow is left\n"
                        .to_owned(),
                ),
            ),
        ] {
            assert_eq!(progress(&life).unwrap(), wanted, "{life}");
        }
        for (life, says) in [
            (json!({"phase": "drained", "flows": 2}), "2 flows are left"),
            (json!({"phase": "drained", "flows": null}), "not counted"),
            (json!({"phase": "serving", "flows": null}), "undrained"),
            (json!({}), "undrained"),
        ] {
            let error = progress(&life).unwrap_err().to_string();
            assert!(error.contains(says), "{life}: {error}");
        }
    }
}

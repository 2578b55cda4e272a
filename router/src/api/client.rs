//! The client of the local socket, for `sluice status`.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::cloud;
use super::flows::{self, Question};
use super::orders::Order;
use super::{denied, tailnet};

const TIMEOUT: Duration = Duration::from_secs(5);
/// For what the daemon asks others.
const PATIENCE: Duration = Duration::from_secs(30);

/// The daemon could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection, or it broke.
    #[error("{path}: {source}; is the daemon running, and is this its `api.socket`?")]
    Io {
        /// Path of the socket.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The daemon has no such answer, and says why.
    #[error("{reason}")]
    Refused {
        /// Its sentence.
        reason: String,
    },
    /// An answer that is no status document.
    #[error(
        "{path}: the answer is no status document ({reason}); is another program at this socket?"
    )]
    Answer {
        /// Path of the socket.
        path: PathBuf,
        /// What was wrong with it.
        reason: String,
    },
}

/// Asks a running daemon for flows and renders them: as JSON, or as a table for a person.
pub fn print_flows(socket: &Path, question: &Question, json: bool) -> Result<String, ClientError> {
    print_list(socket, "flows", question, json, flows::page)
}

/// The same for denied packets.
pub fn print_denied(socket: &Path, question: &Question, json: bool) -> Result<String, ClientError> {
    print_list(socket, "denied", question, json, denied::page)
}

fn print_list(
    socket: &Path,
    what: &str,
    question: &Question,
    json: bool,
    page: fn(&Value) -> String,
) -> Result<String, ClientError> {
    let body = get(socket, &format!("/{what}?{}", question.query()))?;
    let answer: Value = serde_json::from_str(&body).map_err(|error| ClientError::Answer {
        path: socket.to_owned(),
        reason: error.to_string(),
    })?;
    Ok(if json {
        format!("{answer:#}\n")
    } else {
        page(&answer)
    })
}

/// Fetches the status document from a running daemon's socket.
pub fn fetch_status(socket: &Path) -> Result<Value, ClientError> {
    let body = get(socket, "/status")?;
    serde_json::from_str(&body).map_err(|error| ClientError::Answer {
        path: socket.to_owned(),
        reason: error.to_string(),
    })
}

/// Asks a running daemon for a JSON document that takes it a while.
pub fn ask(socket: &Path, path: &str) -> Result<Value, ClientError> {
    let body = exchange(socket, "GET", path, "", PATIENCE)?;
    serde_json::from_str(&body).map_err(|error| ClientError::Answer {
        path: socket.to_owned(),
        reason: error.to_string(),
    })
}

/// Has a running daemon do something; what it refuses, it says why.
pub fn order(socket: &Path, order: &Order) -> Result<(), ClientError> {
    let body = serde_json::to_string(order).map_err(|error| ClientError::Answer {
        path: socket.to_owned(),
        reason: error.to_string(),
    })?;
    exchange(socket, "POST", "/tailnet", &body, PATIENCE).map(drop)
}

/// Has a running daemon make room for another router; `timeout` in the place of what was configured.
pub fn drain(socket: &Path, timeout: Option<Duration>) -> Result<(), ClientError> {
    let seconds = timeout.map(|timeout| timeout.as_secs_f64().ceil());
    let query = seconds.map(|seconds| format!("?timeout={seconds}"));
    let path = format!("/drain{}", query.unwrap_or_default());
    exchange(socket, "POST", &path, "", PATIENCE).map(drop)
}

/// Takes [`drain`] back.
pub fn undrain(socket: &Path) -> Result<(), ClientError> {
    exchange(socket, "POST", "/undrain", "", PATIENCE).map(drop)
}

fn get(socket: &Path, path: &str) -> Result<String, ClientError> {
    exchange(socket, "GET", path, "", TIMEOUT)
}

fn exchange(
    socket: &Path,
    method: &str,
    path: &str,
    body: &str,
    timeout: Duration,
) -> Result<String, ClientError> {
    let exchange = || -> io::Result<String> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: sluice\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = exchange().map_err(|source| ClientError::Io {
        path: socket.to_owned(),
        source,
    })?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.to_owned()),
        // The daemon's own sentence.
        Some((head, body)) if head.contains("text/plain") => Err(ClientError::Refused {
            reason: body.trim_end().to_owned(),
        }),
        _ => Err(ClientError::Answer {
            path: socket.to_owned(),
            reason: answer.lines().next().unwrap_or("empty").to_owned(),
        }),
    }
}

/// Fetches the status and renders it: as JSON, or as a page for a person.
pub fn print_status(socket: &Path, json: bool) -> Result<String, ClientError> {
    let status = fetch_status(socket)?;
    Ok(if json {
        format!("{status:#}\n")
    } else {
        page(&status)
    })
}

/// A page for a person. Works on JSON, not on our own types, so that it shows what it can of a
/// daemon of another version.
fn page(status: &Value) -> String {
    let mut out = String::new();
    let (tailnet, tailnet_peers) = tailnet::page(status);
    let device = &status["device"];
    let datapath = &status["datapath"];
    let _ = writeln!(
        out,
        "router    {} (sluice {}), up {}",
        text(&status["name"]),
        text(&status["version"]),
        duration(&status["uptime_seconds"])
    );
    out.push_str(&life(&status["life"]));
    let _ = writeln!(
        out,
        "device    {} mtu {} addresses {}",
        text(&device["name"]),
        text(&device["mtu"]),
        text(&device["addresses"])
    );
    let _ = writeln!(
        out,
        "wireguard public key {} port {}",
        text(&device["public_key"]),
        text(&device["listen_port"])
    );
    out.push_str(&tailnet);
    if status["changed_by_wg"] == true {
        let _ = writeln!(
            out,
            "changed   `wg` has changed peers, key or port: they differ from the file's until it is \
             read again"
        );
    }
    let _ = writeln!(
        out,
        "links     uplink {} subnet {}",
        text(&status["uplink"]),
        text(&status["subnet"])
    );
    let attach = datapath["attach"]
        .as_str()
        .map(|a| format!(" ({a})"))
        .unwrap_or_default();
    let _ = writeln!(
        out,
        "datapath  {}{attach}: {}",
        text(&datapath["active"]),
        text(&datapath["reason"])
    );
    if let Some(reason) = datapath["unkept"].as_str() {
        let _ = writeln!(out, "restart   flows end with the daemon: {reason}");
    }
    cloud::lines(&status["cloud"], &mut out);
    let guard = &status["uplink_guard"];
    if guard.is_object() {
        let _ = writeln!(
            out,
            "guard     {}: {}",
            text(&guard["interface"]),
            text(&guard["reason"])
        );
    }
    for (family, table) in flow_tables(&status["flows"]) {
        let _ = writeln!(
            out,
            "flows     {family} {} of {}{}",
            text(&table["flows"]),
            text(&table["capacity"]),
            if table["pressure"] == true {
                ", nearly full: idle ones end early"
            } else {
                ""
            }
        );
    }
    let _ = writeln!(
        out,
        "engine    {} worker(s), offloads {}",
        text(&status["engine"]["workers"]),
        text(&status["engine"]["features"])
    );
    for problem in list(&status["problems"]) {
        let _ = writeln!(
            out,
            "PROBLEM   {}: {}",
            text(&problem["part"]),
            text(&problem["error"])
        );
    }
    let _ = writeln!(out, "\nroutes");
    for route in list(&status["routes"]) {
        let why = route["reason"]
            .as_str()
            .map(|r| format!(" ({r})"))
            .unwrap_or_default();
        let snat = if route["snat"] == true {
            "snat"
        } else {
            "no snat"
        };
        let _ = writeln!(
            out,
            "  {:<24} {snat:<8} {} path{why}",
            text(&route["cidr"]),
            text(&route["path"])
        );
    }
    out.push_str(&tailnet_peers);
    // Those of the tailnet stand there already.
    let listed = list(&status["tailnet"]["peers"]);
    let listed: HashSet<&str> = listed
        .iter()
        .filter_map(|peer| peer["public_key"].as_str())
        .collect();
    let _ = writeln!(out, "\npeers");
    for peer in list(&status["peers"]) {
        let key = peer["public_key"].as_str();
        if key.is_some_and(|key| listed.contains(key)) {
            continue;
        }
        let label = peer["name"].as_str().unwrap_or_default();
        let _ = writeln!(out, "  {} {label}", text(&peer["public_key"]));
        let _ = writeln!(
            out,
            "    {}  handshake {}  received {} B  sent {} B  allowed {}",
            match (peer["relay"].as_u64(), peer["peer_relay"].as_str()) {
                (Some(relay), _) => format!("relay {relay}"),
                (None, Some(way)) => format!("peer relay {way}"),
                (None, None) => format!("endpoint {}", text(&peer["endpoint"])),
            },
            ago(&peer["last_handshake"]),
            text(&peer["rx_bytes"]),
            text(&peer["tx_bytes"]),
            text(&peer["allowed_ips"]),
        );
    }
    let _ = writeln!(
        out,
        "\npackets                                           packets            bytes"
    );
    for row in list(&status["packets"]) {
        if row["packets"].as_u64().unwrap_or(0) > 0 {
            let _ = writeln!(
                out,
                "  {:<14} {:<26} {:>14} {:>16}",
                text(&row["program"]),
                text(&row["verdict"]),
                text(&row["packets"]),
                text(&row["bytes"])
            );
        }
    }
    for (verdict, count) in guard["frames"].as_object().into_iter().flatten() {
        if count.as_u64().unwrap_or(0) > 0 {
            let _ = writeln!(out, "  {:<14} {verdict:<26} {count:>14}", "uplink_guard");
        }
    }
    let _ = writeln!(out, "\nengine counters");
    for (label, count) in status["engine"]["counters"]
        .as_object()
        .into_iter()
        .flatten()
    {
        if count.as_u64().unwrap_or(0) > 0 {
            let _ = writeln!(out, "  {label:<41} {count:>14}");
        }
    }
    out
}

/// A line about a router that does not just serve.
fn life(life: &Value) -> String {
    let phase = life["phase"].as_str().unwrap_or("serving");
    if phase == "serving" && life["waits_for"].is_null() {
        return String::new();
    }
    let mut line = format!("life      {phase}");
    if let Some(reason) = life["reason"].as_str() {
        let _ = write!(line, ", for {reason}");
    }
    match life["flows"].as_u64() {
        Some(1) => line.push_str("; 1 flow is left"),
        Some(flows) => {
            let _ = write!(line, "; {flows} flows are left");
        }
        None => {}
    }
    if let Some(what) = life["waits_for"].as_str() {
        let _ = write!(line, "; waits for {what}");
    }
    if let Some(seconds) = seconds_until(&life["until"]) {
        let _ = write!(line, ", at most {}", duration(&seconds.into()));
    }
    line + "\n"
}

/// The seconds from now until a Unix time.
fn seconds_until(epoch: &Value) -> Option<u64> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    Some(epoch.as_u64()?.saturating_sub(now.ok()?.as_secs()))
}

/// A value as a word, a list as words.
pub(super) fn text(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        Value::Null => "-".to_owned(),
        Value::Array(all) => all
            .iter()
            .map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned))
            .collect::<Vec<_>>()
            .join(" "),
        other => other.to_string(),
    }
}

pub(super) fn list(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}

/// The tables of the status' part about flows, by family.
fn flow_tables(flows: &Value) -> impl Iterator<Item = (&String, &Value)> {
    flows["tables"].as_object().into_iter().flatten()
}

fn duration(seconds: &Value) -> String {
    let s = seconds.as_u64().unwrap_or(0);
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{}s", s / 60, s % 60),
        3600..86400 => format!("{}h{}m", s / 3600, s / 60 % 60),
        _ => format!("{}d{}h", s / 86400, s / 3600 % 24),
    }
}

pub(super) fn ago(epoch: &Value) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    match (epoch.as_u64(), now) {
        (Some(then), Ok(now)) => {
            format!(
                "{} ago",
                duration(&Value::from(now.as_secs().saturating_sub(then)))
            )
        }
        _ => "never".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_page_shows_what_matters_and_survives_what_is_missing() {
        let status = json!({
            "name": "r1", "version": "0.1.0", "uptime_seconds": 3700,
            "changed_by_wg": true,
            "life": {"phase": "draining", "reason": "somebody has asked for it", "until": 0, "flows": 3,
                     "waits_for": "flows to end"},
            "problems": [{"part": "routes", "error": "no such device"}],
            "datapath": {"active": "kernel", "reason": "no CAP_BPF", "unkept": "no bpffs"},
            "uplink_guard": {"interface": "eth0", "reason": "attached", "frames": {"drop_index": 7}},
            "routes": [{"cidr": "10.0.0.0/16", "snat": true, "path": "slow", "reason": "source NAT"}],
            "packets": [{"program": "from_overlay", "verdict": "forwarded", "packets": 3, "bytes": 99}],
        });
        let page = page(&status);
        for part in [
            "r1",
            "up 1h1m",
            "life      draining, for somebody has asked for it; 3 flows are left; waits for flows to end, at most 0s\n",
            "changed   `wg` has changed",
            "PROBLEM   routes: no such device",
            "kernel: no CAP_BPF",
            "restart   flows end with the daemon: no bpffs",
            "guard     eth0: attached",
            "drop_index",
            "slow path (source NAT)",
            "from_overlay",
        ] {
            assert!(page.contains(part), "{part} is missing in:\n{page}");
        }
        let calm = super::page(&json!({"life": {"phase": "serving", "waits_for": null}}));
        assert!(calm.contains("router") && !calm.contains("life"), "{calm}");
        assert!(super::page(&json!({})).contains("router"));
    }

    #[test]
    fn no_daemon_is_said_plainly() {
        let missing = Path::new("/nonexistent/sluice.sock");
        let error = fetch_status(missing).unwrap_err().to_string();
        assert!(error.contains("is the daemon running"), "{error}");
    }
}

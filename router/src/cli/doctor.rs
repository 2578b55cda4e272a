//! `sluice doctor`: what this machine or container lacks to run the router, and what mends it.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::bail;
use serde_json::Value;

use crate::datapath::ebpf::Ebpf;
use crate::netlink::sysctl;
use crate::tailnet::node::default_state_dir;
use crate::{api, config, container, engine, runtime};

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Fine,
    /// Good to know, and nothing to mend.
    Note,
    Lack,
}

/// One line of the answer.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    state: State,
    what: String,
    text: String,
}

fn finding(state: State, what: &str, text: impl Into<String>) -> Finding {
    Finding {
        state,
        what: what.to_owned(),
        text: text.into(),
    }
}

/// Prints what is there and what is not; an error if something is missing.
pub(super) fn doctor(socket: &Path) -> anyhow::Result<()> {
    let mut findings = surroundings();
    findings.extend(match api::fetch_status(socket) {
        Ok(status) => of_daemon(&status),
        Err(error) => vec![finding(
            State::Lack,
            "router",
            why_not(Path::new(config::DEFAULT_FILE), &error.to_string()),
        )],
    });
    super::print(&page(&findings))?;
    let lacks = findings
        .iter()
        .filter(|finding| finding.state == State::Lack);
    match lacks.count() {
        0 => Ok(()),
        1 => bail!("one thing is to be mended: see the line MISSING"),
        count => bail!("{count} things are to be mended: see the lines MISSING"),
    }
}

/// What the kernel and whoever has made the container allow.
fn surroundings() -> Vec<Finding> {
    let tun = match engine::try_tun() {
        Ok(()) => finding(State::Fine, "TUN device", "/dev/net/tun can be used"),
        Err(error) => finding(State::Lack, "TUN device", error.to_string()),
    };
    let rights = if runtime::has_net_admin() {
        finding(State::Fine, "rights", "CAP_NET_ADMIN")
    } else {
        let error = runtime::Error::Rights.to_string();
        finding(State::Lack, "rights", error)
    };
    let forwarding = match sysctl::try_to_write() {
        Ok(()) => finding(State::Fine, "forwarding", "the router may switch it on"),
        Err(_) if sysctl::is_set("net/ipv4/ip_forward") => finding(
            State::Fine,
            "forwarding",
            "it is on, and the router may not change it",
        ),
        Err(error) => finding(
            State::Lack,
            "forwarding",
            format!("{error}; {}", container::sysctl_mend()),
        ),
    };
    let ebpf = match Ebpf::support() {
        Ok(()) => finding(State::Fine, "eBPF", "the kernel and the rights allow it"),
        Err(_) if container::is_unprivileged() => {
            finding(State::Note, "eBPF", container::WITHOUT_EBPF)
        }
        Err(error) => finding(
            State::Note,
            "eBPF",
            format!(
                "{error}; the kernel's own forwarding carries the packets, which takes more CPU"
            ),
        ),
    };
    vec![tun, rights, forwarding, ebpf]
}

/// What a running daemon says.
fn of_daemon(status: &Value) -> Vec<Finding> {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let datapath = &status["datapath"];
    let mut findings = vec![finding(
        State::Fine,
        "router",
        format!(
            "{} runs, with the {} datapath; `sluice status` tells more",
            text(&status["name"]),
            text(&datapath["active"])
        ),
    )];
    if let Some(reason) = datapath["unkept"].as_str() {
        let text = format!("flows end with the daemon: {reason}");
        findings.push(finding(State::Note, "restart", text));
    }
    let problems = list(&status["problems"]);
    findings.extend(problems.iter().map(|problem| {
        finding(
            State::Lack,
            &text(&problem["part"]),
            text(&problem["error"]),
        )
    }));
    // What is a problem too stands there already.
    let told = |reason: &str| {
        let mut errors = problems.iter().filter_map(|p| p["error"].as_str());
        errors.any(|error| reason.contains(error))
    };
    for reason in list(&status["unready"]) {
        let reason = text(&reason);
        if !told(&reason) {
            findings.push(finding(State::Lack, "not ready", reason));
        }
    }
    findings
}

/// Why no daemon answers.
fn why_not(file: &Path, error: &str) -> String {
    if !config::is_there(file) && !config::Preferences::exist(&default_state_dir()) {
        return format!(
            "nothing says yet how to run: `sluice init` writes {} (docs: configuration.md, tailnet.md), then \
             `systemctl start sluice`",
            file.display()
        );
    }
    match config::load(file) {
        Err(errors) if config::is_there(file) => {
            format!(
                "the configuration is refused: {errors}; mend it, then `systemctl restart sluice`"
            )
        }
        _ => format!(
            "it does not run ({error}): `systemctl restart sluice`, and `journalctl -u sluice` tells why it \
             has ended"
        ),
    }
}

fn page(findings: &[Finding]) -> String {
    let mut out = String::new();
    for Finding { state, what, text } in findings {
        let mark = match state {
            State::Fine => "ok",
            State::Note => "note",
            State::Lack => "MISSING",
        };
        // A configuration has a line for each problem.
        let text = text.trim_end().replace('\n', "\n                      ");
        let _ = writeln!(out, "{mark:<8} {what:<12} {text}");
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_daemons_problems_are_told_once() {
        let status = json!({
            "name": "gw",
            "datapath": { "active": "kernel", "unkept": null },
            "problems": [{ "part": "forwarding", "error": "cannot set it" }],
            "unready": ["forwarding: cannot set it", "tailnet: NeedsLogin, so no map is in force"],
        });
        let found = of_daemon(&status);
        let lacks: Vec<&str> = found
            .iter()
            .filter(|finding| finding.state == State::Lack)
            .map(|finding| finding.what.as_str())
            .collect();
        assert_eq!(lacks, ["forwarding", "not ready"]);
        let page = page(&found);
        assert!(page.starts_with("ok       router       gw runs, with the kernel datapath"));
        assert!(
            page.contains("\nMISSING  forwarding   cannot set it\n"),
            "{page}"
        );
        let well = json!({ "name": "gw", "datapath": { "active": "ebpf" }, "problems": [] });
        assert_eq!(of_daemon(&well).len(), 1);
    }

    #[test]
    fn what_a_daemon_lacks_to_run_is_told_with_its_mend() {
        let folder = config::tests::directory_with_keys();
        let file = folder.path().join("sluice.toml");
        let text = why_not(&file, "no socket");
        assert!(text.contains("sluice init"), "{text}");
        std::fs::write(&file, "nonsense = 1\n").unwrap();
        let text = why_not(&file, "no socket");
        assert!(
            text.contains("refused") && text.contains("nonsense"),
            "{text}"
        );
        std::fs::write(&file, config::tests::EXAMPLE).unwrap();
        let text = why_not(&file, "no socket");
        assert!(
            text.contains("journalctl") && text.contains("no socket"),
            "{text}"
        );
    }
}

//! The tailnet's part of the page that `sluice status` prints. Works on JSON, as the rest of it does.

use std::fmt::Write as _;

use serde_json::Value;

use super::super::client::{ago, list, text};

/// Lines for the head of the page, and the section of peers; nothing for a router without a tailnet.
pub(in super::super) fn page(status: &Value) -> (String, String) {
    let own = &status["tailnet"];
    if !own.is_object() {
        return Default::default();
    }
    (head(status, own), peers(own))
}

fn head(status: &Value, own: &Value) -> String {
    let mut out = String::new();
    let name = match own["name"].as_str().unwrap_or_default() {
        "" => text(&own["hostname"]),
        name => name.to_owned(),
    };
    let _ = writeln!(
        out,
        "tailnet   {}: {name} {} at {}",
        text(&own["state"]),
        text(&own["addresses"]),
        text(&own["control_url"]),
    );
    let mut more = Vec::new();
    more.push(match own["connected_since"].as_str() {
        Some(since) => format!("server connected since {since}"),
        None => "server not connected".to_owned(),
    });
    more.push(match own["key_expiry"].as_str() {
        Some(expiry) => format!("key expires {expiry}"),
        None => "key does not expire".to_owned(),
    });
    if let Some(relay) = own["home_relay"].as_str() {
        more.push(format!("home relay {relay}"));
    }
    if !list(&own["tags"]).is_empty() {
        more.push(text(&own["tags"]));
    }
    let _ = writeln!(out, "          {}", more.join(", "));
    if let Some(url) = own["auth_url"].as_str().filter(|url| !url.is_empty()) {
        let _ = writeln!(out, "LOGIN     to let this router in, visit {url}");
    }
    for route in list(&own["routes"]) {
        let cidr = text(&route["cidr"]);
        let _ = match (route["advice"].as_str(), route["approved"].as_bool()) {
            (Some(advice), _) => writeln!(out, "ROUTE     {advice}"),
            (None, Some(true)) if route["primary"] == true => {
                writeln!(
                    out,
                    "route     {cidr} approved, this router is in charge of it"
                )
            }
            (None, Some(true)) => writeln!(
                out,
                "route     {cidr} approved, another router is in charge of it or the server does not tell"
            ),
            _ => writeln!(
                out,
                "route     {cidr} advertised, the server has not answered yet"
            ),
        };
    }
    if own["relay_server"]["running"] == true {
        out.push_str(&relay_server(&own["relay_server"]));
    }
    for words in list(&status["Health"]) {
        let words = text(&words);
        let told = list(&status["problems"]);
        // The router's own are among its problems.
        if !told
            .iter()
            .any(|problem| problem["error"] == words.as_str())
        {
            let _ = writeln!(out, "HEALTH    the server says: {words}");
        }
    }
    out
}

/// The line of a router that is a peer relay.
fn relay_server(relay: &Value) -> String {
    let port = text(&relay["port"]);
    if relay["clients"] == 0 {
        return format!(
            "RELAY     UDP {port} serves nobody yet: grant nodes tailscale.com/cap/relay toward this router in the \
             tailnet's policy\n"
        );
    }
    format!(
        "relay     UDP {port} at {}: {} places open, {} connecting, {} packets and {} B carried, {} nodes may use it\n",
        text(&relay["addresses"]),
        text(&relay["open"]),
        text(&relay["connecting"]),
        text(&relay["packets"]),
        text(&relay["bytes"]),
        text(&relay["clients"]),
    )
}

fn peers(own: &Value) -> String {
    let mut out = "\ntailnet peers\n".to_owned();
    for peer in list(&own["peers"]) {
        let _ = writeln!(
            out,
            "  {:<32} {}",
            text(&peer["name"]),
            text(&peer["addresses"])
        );
        let mut words = vec![
            match (peer["online"].as_bool(), peer["expired"].as_bool()) {
                (_, Some(true)) => "key expired".to_owned(),
                (Some(true), _) => "online".to_owned(),
                (Some(false), _) => format!("offline, seen {}", text(&peer["last_seen"])),
                _ => "perhaps online".to_owned(),
            },
        ];
        let active = if peer["active"] == true {
            "active "
        } else {
            ""
        };
        match (peer["way"].as_str(), peer["latency_ms"].as_f64()) {
            (Some(way), Some(latency)) => words.push(format!("{active}{way} in {latency:.1} ms")),
            (Some(way), None) => words.push(format!("{active}{way}")),
            (None, _) => words.push("no path yet".to_owned()),
        }
        words.push(format!("handshake {}", ago(&peer["last_handshake"])));
        words.push(format!("received {} B", text(&peer["rx_bytes"])));
        words.push(format!("sent {} B", text(&peer["tx_bytes"])));
        let routes = text(&peer["routes"]);
        if !routes.is_empty() {
            words.push(format!("routes {routes}"));
        }
        let _ = writeln!(out, "    {}", words.join(", "));
        if let Some(why) = peer["why"].as_str() {
            let _ = writeln!(out, "    path: {why}");
        }
    }
    out
}

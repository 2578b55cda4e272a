//! Beside Tailscale's own coordination server for tests, in Go (`tstest/integration/testcontrol`). Skipped where
//! there is no Go, or its modules cannot be had.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use router::tailnet::netmap::NodeId;
use router::tailnet::session::Event;

use super::node::Node;

const MODULE: &str = "tailscale.com@v1.102.5";

/// A program of a dozen lines around the server: it tells its URL, and ends with its input.
const PROGRAM: &str = r#"package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"

	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/key"
)

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	url := "http://" + listener.Addr().String()
	server := &testcontrol.Server{
		Logf:            func(string, ...any) {},
		DERPMap:         &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{}},
		RequireAuthKey:  "tskey-auth-good",
		ExplicitBaseURL: url,
	}
	go http.Serve(listener, server)
	fmt.Println(url)
	// Each line names a node, which is asked to echo; what it answers is told.
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var node key.NodePublic
		if err := node.UnmarshalText(lines.Bytes()); err != nil {
			panic(err)
		}
		request, _ := http.NewRequest("POST", "/echo", strings.NewReader("hello"))
		err := server.SendC2N(node, request, func(response *http.Response) {
			body, _ := io.ReadAll(response.Body)
			fmt.Println(response.StatusCode, string(body))
		})
		if err != nil {
			fmt.Println(err)
		}
	}
}
"#;

/// The program, built once; `None` where it cannot be, which is said.
fn program() -> Option<PathBuf> {
    let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/testcontrol");
    let built = cache.join("server-1.102.5");
    if built.exists() {
        return Some(built);
    }
    let go = ["go", "/usr/local/go/bin/go"];
    let found = |go: &&&str| Command::new(go).arg("version").output().is_ok();
    let Some(go) = go.iter().find(found) else {
        eprintln!("skipped: there is no go");
        return None;
    };
    let make = || -> Result<()> {
        let folder = cache.join("source");
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("main.go"), PROGRAM)?;
        std::fs::write(folder.join("go.mod"), "module testcontrol\n\ngo 1.26\n")?;
        let run = |arguments: &[&str]| -> Result<()> {
            let output = Command::new(go)
                .args(arguments)
                .current_dir(&folder)
                // Nothing is left outside the target folder, and nothing there that `rm` cannot remove.
                .env("GOPATH", cache.join("path"))
                .env("GOCACHE", cache.join("cache"))
                .env("GOFLAGS", "-mod=mod -modcacherw")
                .output()?;
            let words = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(output.status.success(), "go {arguments:?}: {words}");
            Ok(())
        };
        run(&["get", MODULE])?;
        run(&["build", "-o", "../unfinished", "."])?;
        std::fs::rename(cache.join("unfinished"), &built)?;
        Ok(())
    };
    match make() {
        Ok(()) => Some(built),
        Err(error) => {
            eprintln!("skipped: Tailscale's testcontrol cannot be built: {error:#}");
            None
        }
    }
}

/// A running server.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn joins_tailscales_own_server() -> Result<()> {
    let Some(program) = program() else {
        return Ok(());
    };
    let child = Command::new(program)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut server = Running(child);
    let output = server.0.stdout.take().context("no output")?;
    let mut output = BufReader::new(output);
    let mut url = String::new();
    output.read_line(&mut url)?;

    let one = Node::join(url.trim(), "tskey-auth-good", &["10.2.0.0/24"])?;
    let map = one.wait_connected()?;
    let own = map.own().context("no self")?;
    ensure!(!own.addresses.is_empty(), "{own:?}");
    let two = Node::join(url.trim(), "tskey-auth-good", &[])?;
    let map = two.wait_map("the other node", |map| map.peers().count() == 1)?;
    let peer = map.peers().next().context("no peer")?;
    ensure!(peer.key == own.key, "{peer:?}");
    let id = map.own().map_or(NodeId(0), |own| own.id);
    one.wait_map("the other node's endpoint", |map| {
        map.peer(id).is_some_and(|peer| !peer.endpoints.is_empty())
    })?;

    // It is asked as the hosted server asks, through the session.
    let mut input = server.0.stdin.take().context("no input")?;
    writeln!(input, "{}", own.key)?;
    let mut echo = String::new();
    output.read_line(&mut echo)?;
    ensure!(echo.trim() == "200 hello", "{echo}");

    let stranger = Node::join(url.trim(), "tskey-auth-bad", &[])?;
    let refused = stranger.wait_event("the refusal", |event| matches!(event, Event::Refused(_)))?;
    ensure!(
        refused == Event::Refused("invalid authkey".to_owned()),
        "{refused:?}"
    );
    Ok(())
}

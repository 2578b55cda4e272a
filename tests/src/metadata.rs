//! A double of EC2's instance metadata service, version 2, at its real address in a network of the lab.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::http::{Request, answer};
use crate::server::Server;
use crate::topology::{Host, Lab};

/// Where the service is.
pub const ADDRESS: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)), 80);
/// The MAC address of the instance's first interface, as the service has it.
pub const MAC: &str = "02:00:00:00:00:01";

/// What is wrong with the service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// Answers do not arrive, as where the hop limit is too small.
    Lost,
    /// Version 1 only: there are no tokens, and all is told without.
    VersionOne,
    /// It answers so late.
    Slow(Duration),
    /// It answers to everything but tokens with this status.
    Status(u16),
}

/// The service; it ends when this is dropped.
#[derive(Debug)]
#[must_use = "the service ends when this is dropped"]
pub struct Metadata {
    /// The host that it runs on, on which other services of a cloud may run.
    pub host: Host,
    state: Arc<Mutex<State>>,
    _server: Server,
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<String, Vec<u8>>,
    fault: Fault,
    /// Tokens are numbered; those from this one on are good.
    good_from: u64,
    tokens: u64,
    /// What was asked for with a good token.
    asked: Vec<String>,
}

impl Metadata {
    /// Adds a service to `router`'s surroundings, which knows an on-demand instance in a VPC of `networks`.
    pub fn new(lab: &Lab, router: &Host, id: &str, networks: &[&str]) -> anyhow::Result<Self> {
        let host = lab.host(&format!("{}-imds", router.name()))?;
        lab.link(
            host.port("eth0").address("169.254.169.254/24"),
            router.port("imds0").address("169.254.169.1/24"),
        )?;
        let state = Arc::new(Mutex::new(State::default()));
        let serving = Arc::clone(&state);
        let server = host.tcp_server(ADDRESS, move |stream| serve(&stream, &serving))?;
        let service = Self {
            host,
            state,
            _server: server,
        };
        let interface = format!("meta-data/network/interfaces/macs/{MAC}/interface-id");
        for (path, text) in [
            ("meta-data/instance-id", id),
            ("meta-data/mac", MAC),
            ("meta-data/placement/region", "eu-central-1"),
            ("meta-data/placement/availability-zone", "eu-central-1a"),
            ("meta-data/placement/availability-zone-id", "euc1-az2"),
            ("meta-data/instance-type", "c7g.large"),
            ("meta-data/instance-life-cycle", "on-demand"),
            ("meta-data/services/domain", "amazonaws.com"),
            ("meta-data/network/interfaces/macs/", MAC),
            (&interface, "eni-own"),
        ] {
            service.set(path, text);
        }
        service.set_networks(networks);
        Ok(service)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has this stand at `path`, which begins behind `/latest/`.
    pub fn set(&self, path: &str, contents: impl Into<Vec<u8>>) {
        self.state()
            .entries
            .insert(path.to_owned(), contents.into());
    }

    /// Has nothing stand there.
    pub fn unset(&self, path: &str) {
        self.state().entries.remove(path);
    }

    /// The instance is in the group `routers`, which wants this state of it.
    pub fn set_group(&self, target: &str) {
        self.set(
            "meta-data/tags/instance/aws:autoscaling:groupName",
            "routers",
        );
        self.set("meta-data/autoscaling/target-lifecycle-state", target);
    }

    /// The VPC has these networks.
    pub fn set_networks(&self, networks: &[&str]) {
        for (family, is_own) in [("ipv4", false), ("ipv6", true)] {
            let own = networks.iter().filter(|net| net.contains(':') == is_own);
            let own: Vec<&str> = own.copied().collect();
            let path = format!("meta-data/network/interfaces/macs/{MAC}/vpc-{family}-cidr-blocks");
            match own.is_empty() {
                true => self.unset(&path),
                false => self.set(&path, own.join("\n")),
            }
        }
    }

    /// The instance has a role with these keys.
    pub fn set_role(&self, key: &str, secret: &str, session: &str) {
        const FOLDER: &str = "meta-data/iam/security-credentials/";
        let keys = serde_json::json!({
            "Code": "Success",
            "AccessKeyId": key,
            "SecretAccessKey": secret,
            "Token": session,
            "Expiration": "2099-01-01T00:00:00Z",
        });
        self.set(FOLDER, "router");
        self.set(&format!("{FOLDER}router"), keys.to_string());
    }

    /// Something is wrong from now on.
    pub fn set_fault(&self, fault: Fault) {
        self.state().fault = fault;
    }

    /// Tokens that were given are good no more.
    pub fn forget_tokens(&self) {
        let mut state = self.state();
        state.good_from = state.tokens + 1;
    }

    /// How many tokens were given.
    pub fn tokens(&self) -> u64 {
        self.state().tokens
    }

    /// How often this was asked for.
    pub fn asked(&self, path: &str) -> usize {
        let state = self.state();
        state.asked.iter().filter(|asked| *asked == path).count()
    }
}

fn serve(stream: &TcpStream, state: &Mutex<State>) {
    let Ok(request) = Request::read(stream) else {
        return;
    };
    let state = || state.lock().unwrap_or_else(PoisonError::into_inner);
    let fault = state().fault;
    match fault {
        // Until the client gives up.
        Fault::Lost => {
            let mut rest = [0];
            let _ = std::io::Read::read(&mut &*stream, &mut rest);
            return;
        }
        Fault::Slow(time) => std::thread::sleep(time),
        _ => {}
    }
    let (status, body) = state().answer(&request, fault);
    let status = match status {
        200 => "200 OK".to_owned(),
        other => format!("{other} No"),
    };
    let _ = answer(stream, &status, &body);
}

impl State {
    fn answer(&mut self, request: &Request, fault: Fault) -> (u16, Vec<u8>) {
        let path = request.path.strip_prefix("/latest/").unwrap_or_default();
        if path == "api/token" {
            if fault == Fault::VersionOne {
                return (404, Vec::new());
            }
            let life = request.header("x-aws-ec2-metadata-token-ttl-seconds");
            let life = life.and_then(|life| life.parse().ok());
            if request.method != "PUT" || !life.is_some_and(|life| (1..=21_600).contains(&life)) {
                return (400, Vec::new());
            }
            self.tokens += 1;
            return (200, format!("token-{}", self.tokens).into_bytes());
        }
        let token = request.header("x-aws-ec2-metadata-token");
        let number = token.and_then(|token| token.strip_prefix("token-")?.parse().ok());
        if fault != Fault::VersionOne && number.is_none_or(|number: u64| number < self.good_from) {
            return (401, Vec::new());
        }
        self.asked.push(path.to_owned());
        if let Fault::Status(status) = fault {
            return (status, Vec::new());
        }
        match self.entries.get(path) {
            Some(contents) => (200, contents.clone()),
            None => (404, Vec::new()),
        }
    }
}

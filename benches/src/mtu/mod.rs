//! The `mtu` suite: whether transfers pass, crawl or stall where segments are larger than the
//! tunnel, or packets than the path.

mod probe;
mod site;
mod transfer;

use std::cell::RefCell;
use std::ffi::OsString;
use std::rc::Rc;

use anyhow::Context as _;

use crate::case::{
    Case, CaseId, Context, Effort, Failure, Implementation, Measurement, Outcome, Round, Skipped,
    Suite, SuiteEntry, Verdict,
};
use crate::wireguard::programs::{self, Candidate, Program, REFERENCE};

use probe::{Flow, Watch, payload_of};
use site::{Plan, Site};
use transfer::Moved;

const SUITE: &str = "mtu";

/// The suite, for the command line.
pub const ENTRY: SuiteEntry = SuiteEntry {
    name: SUITE,
    about: "large segments through small tunnels and paths: pass, slow or stall",
    build,
};

/// Bytes of a transfer; a stream has half of them each way.
const TRANSFER: usize = 10_000_000;
/// Bytes of a transfer that must still run when the path shrinks.
const LONG_TRANSFER: usize = 20_000_000;
/// What a path shrinks to, in bytes: the smallest that IPv6 allows.
const SHRUNK: u16 = 1280;
/// Bytes that WireGuard adds to a packet over IPv4.
const OVERHEAD: u16 = 60;

/// Whether "fragmentation needed" arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Icmp {
    Delivered,
    Lost,
}

/// What is transferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// One HTTP response, with the sizes that pass.
    Http,
    /// A stream of small messages both ways.
    Stream,
    /// The same, and the underlay's path shrinks in mid-flow.
    ShrinkingUnderlay,
    /// The same, and the last hop to the server shrinks in mid-flow.
    ShrinkingSubnet,
}

/// One cell of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cell {
    kind: Kind,
    tunnel: u16,
    path: u16,
    icmp: Icmp,
}

impl Cell {
    fn name(self) -> String {
        let what = match self.kind {
            Kind::Http => "http",
            Kind::Stream => "grpc-like",
            Kind::ShrinkingUnderlay => "underlay-shrinks",
            Kind::ShrinkingSubnet => "subnet-shrinks",
        };
        let icmp = match self.icmp {
            Icmp::Delivered => "",
            Icmp::Lost => "-icmp-lost",
        };
        format!("{what}-tunnel-{}-path-{}{icmp}", self.tunnel, self.path)
    }

    fn shrinks(self) -> bool {
        matches!(self.kind, Kind::ShrinkingUnderlay | Kind::ShrinkingSubnet)
    }

    /// Whether tunnel packets fit the path, so that nothing may keep a transfer from its end.
    fn fits(self) -> bool {
        self.tunnel + OVERHEAD <= self.path
    }

    /// Whether they do to the end. Else the client is ours: wireguard-go loses what it sends in one piece
    /// (UDP GSO) once the kernel knows the path's MTU (EMSGSIZE), whatever the router is.
    fn goes_on_fitting(self) -> bool {
        self.fits() && self.kind != Kind::ShrinkingUnderlay
    }
}

fn cells(effort: Effort) -> Vec<Cell> {
    let cell = |kind, tunnel, path, icmp| Cell {
        kind,
        tunnel,
        path,
        icmp,
    };
    let mut cells = Vec::new();
    if effort != Effort::Full {
        cells.push(cell(Kind::Http, 1420, 1500, Icmp::Lost));
        if effort == Effort::Smoke {
            cells.extend([
                cell(Kind::ShrinkingSubnet, 1420, 1500, Icmp::Delivered),
                cell(Kind::Stream, 1280, 1500, Icmp::Lost),
            ]);
        }
        return cells;
    }
    for tunnel in [1280, 1420, 8920] {
        for path in [1280, 1500, 9001] {
            for icmp in [Icmp::Delivered, Icmp::Lost] {
                // Next to each other: they share a site.
                cells.push(cell(Kind::Http, tunnel, path, icmp));
                cells.push(cell(Kind::Stream, tunnel, path, icmp));
            }
        }
    }
    cells.push(cell(Kind::ShrinkingUnderlay, 1420, 1500, Icmp::Delivered));
    cells.push(cell(Kind::ShrinkingSubnet, 1420, 1500, Icmp::Delivered));
    cells
}

/// An implementation with what stands beside it.
#[derive(Clone, Debug)]
struct Subject {
    implementation: Implementation,
    program: Program,
    clamp: bool,
}

fn build(context: &Context) -> anyhow::Result<Suite> {
    let mut suite = Suite {
        reference: Some(REFERENCE.to_owned()),
        ..Suite::default()
    };
    let client = match programs::client() {
        Ok(client) => client,
        Err(why) => {
            let id = CaseId::new(SUITE, "all", Implementation::sluice(""));
            suite.skipped.push(Skipped {
                id,
                why: format!("the client: {why}"),
            });
            return Ok(suite);
        }
    };
    let mut subjects = Vec::new();
    for candidate in programs::candidates(context) {
        let Candidate {
            implementation,
            program,
        } = candidate;
        let program = match program {
            Ok(program) => program,
            Err(why) => {
                let id = CaseId::new(SUITE, "all", implementation);
                suite.skipped.push(Skipped { id, why });
                continue;
            }
        };
        // Without translation there is less that can go wrong: only a full run looks at it.
        let translates = !matches!(program, Program::Sluice { snat: false, .. });
        if !translates && context.effort != Effort::Full {
            continue;
        }
        let is_reference = implementation.name == REFERENCE;
        // One plain program stands for all: forwarding and clamping are the kernel's in each.
        if !is_reference && !matches!(program, Program::Sluice { .. }) {
            continue;
        }
        if is_reference {
            let name = format!("{REFERENCE} without clamp");
            subjects.push(Subject {
                implementation: Implementation::peer(name, &implementation.version),
                program: program.clone(),
                clamp: false,
            });
        }
        subjects.push(Subject {
            implementation,
            program,
            clamp: true,
        });
    }
    let client = Rc::new(client);
    let slots: Vec<Slot> = subjects.iter().map(|_| Rc::default()).collect();
    for cell in cells(context.effort) {
        // A path that shrinks is found out by ICMP: clamping has no part in it.
        // With a clamp rule the others do as we do: a quick run shows the stall without one.
        let wanted = |subject: &Subject| {
            let shown = context.effort != Effort::Quick || subject.implementation.ours;
            if subject.clamp {
                shown
            } else {
                !cell.shrinks()
            }
        };
        for (subject, slot) in subjects.iter().zip(&slots).filter(|(s, _)| wanted(s)) {
            suite.cases.push(Box::new(CellCase {
                id: CaseId::new(SUITE, cell.name(), subject.implementation.clone()),
                cell,
                subject: subject.clone(),
                client: Rc::clone(&client),
                slot: Rc::clone(slot),
            }));
        }
    }
    Ok(suite)
}

/// The site that a subject's last HTTP cell has left for the stream of the same cell.
type Slot = Rc<RefCell<Option<(Cell, Site)>>>;

struct CellCase {
    id: CaseId,
    cell: Cell,
    subject: Subject,
    client: Rc<Vec<OsString>>,
    slot: Slot,
}

impl Case for CellCase {
    fn id(&self) -> &CaseId {
        &self.id
    }

    fn run(&mut self, round: Round) -> Result<Outcome, Failure> {
        // A path has nothing that a first run would warm up, and its verdicts need no repeating.
        if round.warm_up {
            return Ok(Outcome::default());
        }
        let site = self.site()?;
        let mut measurements = Vec::new();
        let moved = match self.cell.kind {
            Kind::Http => self.http(&site, &mut measurements)?,
            Kind::Stream => transfer::stream(&site, TRANSFER / 2, || Ok(()))?,
            Kind::ShrinkingUnderlay => {
                transfer::stream(&site, LONG_TRANSFER / 2, || site.narrow_underlay(SHRUNK))?
            }
            Kind::ShrinkingSubnet => {
                transfer::stream(&site, LONG_TRANSFER / 2, || site.narrow_subnet(SHRUNK))?
            }
        };
        let verdict = moved.verdict();
        let megabytes = moved.bytes as f64 / 1e6;
        measurements.push(Measurement::fact("moved", "MB", megabytes));
        measurements.push(Measurement::fact("time", "s", moved.elapsed.as_secs_f64()));
        if self.cell.kind == Kind::Http {
            *self.slot.borrow_mut() = Some((self.cell, site));
        }
        if verdict == Verdict::Stall && self.id.implementation.ours && self.must_pass() {
            return Err(Failure::Wrong(format!(
                "the transfer stalled after {megabytes:.1} of {:.1} MB",
                moved.of as f64 / 1e6
            )));
        }
        Ok(Outcome {
            measurements,
            verdict: Some(verdict),
        })
    }
}

impl CellCase {
    fn must_pass(&self) -> bool {
        self.cell.fits() || self.cell.icmp == Icmp::Delivered
    }

    fn site(&self) -> anyhow::Result<Site> {
        let left = self.slot.borrow_mut().take();
        if let Some((cell, site)) = left
            && (Cell {
                kind: Kind::Stream,
                ..cell
            }) == self.cell
        {
            return Ok(site);
        }
        let own = [
            lab::sluice::binary()?.into(),
            "wireguard".into(),
            "-f".into(),
        ];
        Site::new(&Plan {
            program: &self.subject.program,
            client: if self.cell.goes_on_fitting() {
                &self.client
            } else {
                &own
            },
            clamp: self.subject.clamp,
            tunnel: self.cell.tunnel,
            path: self.cell.path,
            icmp: self.cell.icmp,
        })
        .context("build the site")
    }

    fn http(&self, site: &Site, measurements: &mut Vec<Measurement>) -> anyhow::Result<Moved> {
        let bytes = |metric, value: u32| Measurement::fact(metric, "bytes", f64::from(value));
        let flow = Flow::open(site)?;
        let (up, down) = flow.largest(payload_of(self.cell.tunnel))?;
        let (at_branch, at_server) = flow.discovered()?;
        let watch = Watch::new(site)?;
        let moved = transfer::http(site, TRANSFER)?;
        let (syn, syn_ack) = watch.mss()?;
        measurements.extend([
            bytes("mss-at-server", syn.into()),
            bytes("mss-at-client", syn_ack.into()),
            bytes("largest-udp-up", up.into()),
            bytes("largest-udp-down", down.into()),
            bytes("path-mtu-at-client", at_branch),
            bytes("path-mtu-at-server", at_server),
        ]);
        Ok(moved)
    }
}

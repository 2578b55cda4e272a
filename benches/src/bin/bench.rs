//! `cargo xtask bench`: runs suites, writes the report, compares it with an older one.
//!
//! Exit status: 0 all is well; 1 a result was wrong or something of ours broke; 2 the command line
//! was wrong; 3 `--compare` found something of ours worse beyond the noise.

use std::io::{IsTerminal as _, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use benches::case::{CaseId, Chart, Context, Effort, Failure, Outcome, Suite, SuiteEntry};
use benches::cpu::{self, Cores};
use benches::report::compare::Comparison;
use benches::report::{Report, chart, table};
use benches::run::{self, Progress, Step};
use clap::Parser;

/// Exit status when `--compare` found something of ours worse.
const WORSE: u8 = 3;

/// Measures Sluice beside its peers.
#[derive(Debug, Parser)]
#[command(name = "bench", bin_name = "cargo xtask bench")]
struct Arguments {
    /// Suites to run; all of them if none is named. `--list` names them.
    suites: Vec<String>,
    /// List the suites and their cases, and what cannot be measured here and why.
    #[arg(long)]
    list: bool,
    /// All suites in about three minutes, with less certain numbers.
    #[arg(long)]
    quick: bool,
    /// One tiny round of each case, without a warm-up: proves that they work, measures nothing.
    #[arg(long, conflicts_with_all = ["quick", "runs"])]
    smoke: bool,
    /// Only cases whose `case, implementation` contains this text, or ends so if the text ends in
    /// `$`. With several, those that match any.
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Rounds that count [default: 7, with --quick 3].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: Option<u16>,
    /// Where the report and the charts go.
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
    /// A report.json of an earlier run; prints what moved beyond the noise.
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// Clean up when this process has ended.
    #[arg(long, value_name = "PID", hide = true)]
    guard: Option<u32>,
}

impl Arguments {
    fn effort(&self) -> Effort {
        match (self.smoke, self.quick) {
            (true, _) => Effort::Smoke,
            (_, true) => Effort::Quick,
            _ => Effort::Full,
        }
    }

    fn rounds(&self) -> usize {
        match (self.runs, self.effort()) {
            (Some(runs), _) => usize::from(runs),
            (None, Effort::Smoke) => 1,
            (None, Effort::Quick) => 3,
            (None, Effort::Full) => 7,
        }
    }

    fn entries(&self) -> anyhow::Result<Vec<&'static SuiteEntry>> {
        if self.suites.is_empty() {
            return Ok(benches::SUITES.iter().collect());
        }
        let find = |name: &String| {
            let known = || benches::SUITES.iter().map(|s| s.name).collect::<Vec<_>>();
            benches::SUITES
                .iter()
                .find(|s| s.name == name)
                .with_context(|| format!("no suite {name}; there are: {}", known().join(", ")))
        };
        self.suites.iter().map(find).collect()
    }

    /// What is wanted of a suite.
    fn suite(&self, entry: &SuiteEntry, context: &Context) -> anyhow::Result<Suite> {
        let mut suite = (entry.build)(context).with_context(|| format!("suite {}", entry.name))?;
        let wanted = |id: &CaseId| {
            let title = title(id);
            let matches = |text: &String| match text.strip_suffix('$') {
                Some(end) => title.ends_with(end),
                None => title.contains(text),
            };
            self.only.is_empty() || self.only.iter().any(matches)
        };
        suite.cases.retain(|case| wanted(case.id()));
        suite.skipped.retain(|skipped| wanted(&skipped.id));
        Ok(suite)
    }

    fn list(&self, entries: &[&SuiteEntry], context: &Context) -> anyhow::Result<ExitCode> {
        let mut out = std::io::stdout().lock();
        for entry in entries {
            let suite = self.suite(entry, context)?;
            let cases = suite.cases.iter().map(|case| title(case.id()));
            let skipped = suite
                .skipped
                .iter()
                .map(|skipped| format!("{}: not here: {}", title(&skipped.id), skipped.why));
            let lines: String = cases
                .chain(skipped)
                .map(|line| format!("  {line}\n"))
                .collect();
            // A reader that has seen enough, such as `head`, is no error.
            if write!(out, "{}: {}\n{lines}", entry.name, entry.about).is_err() {
                break;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn title(id: &CaseId) -> String {
    format!("{}, {}", id.label(), id.implementation.name)
}

fn main() -> ExitCode {
    match bench(&Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    if let Some(pid) = arguments.guard {
        return guard(pid);
    }
    let entries = arguments.entries()?;
    let context = Context {
        effort: arguments.effort(),
        sluice: sluice()?,
        cores: Cores::choose()?,
    };
    cpu::adopt_orphans().context("become the parent of detached daemons")?;
    if arguments.list {
        return arguments.list(&entries, &context);
    }
    let compare = arguments.compare.as_deref().map(Report::read).transpose()?;
    std::fs::create_dir_all(&arguments.out)
        .with_context(|| format!("create {}", arguments.out.display()))?;

    let _guard = start_guard()?;
    let started = Instant::now();
    let mut report = run::start(&context, arguments.rounds());
    let mut charts = Vec::new();
    for entry in entries {
        let suite = arguments.suite(entry, &context)?;
        let mut progress = Console::new();
        let warm_up = !arguments.smoke;
        charts.extend(run::measure(suite, warm_up, &mut report, &mut progress));
    }
    report.seconds = started.elapsed().as_secs_f64();
    let drawn = write(&report, &charts, &arguments.out)?;
    print!("{}", table::text(&report));
    println!(
        "{}: report.json, report.md and {drawn} charts; {:.0} s",
        arguments.out.display(),
        report.seconds
    );

    let comparison = compare.map(|old| Comparison::of(&old, &report));
    if let Some(comparison) = &comparison {
        print!("\n{}", comparison.text());
    }
    let failures = report.failures().count();
    if failures > 0 {
        println!("{failures} cases are broken or wrong: the run fails");
        return Ok(ExitCode::FAILURE);
    }
    if comparison.is_some_and(|c| c.worse()) {
        return Ok(ExitCode::from(WORSE));
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes the report in all its forms; returns how many charts there are.
fn write(report: &Report, charts: &[Chart], out: &Path) -> anyhow::Result<usize> {
    report.write(&out.join("report.json"))?;
    let write = |name: &str, text: &str| {
        let path = out.join(name);
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    };
    let mut drawn = Vec::new();
    for chart in charts {
        if let Some(svg) = chart::svg(report, chart) {
            let file = format!("{}.svg", chart.name);
            write(&file, &svg)?;
            drawn.push((file, chart.title.clone()));
        }
    }
    write("report.md", &table::markdown(report, &drawn))?;
    Ok(drawn.len())
}

/// Starts the process that removes the labs should this one be killed. Its standard input ends with
/// us.
fn start_guard() -> anyhow::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["--guard", &std::process::id().to_string()])
        .stdin(Stdio::piped())
        .process_group(0);
    command.spawn().context("start the guard")
}

fn guard(pid: u32) -> anyhow::Result<ExitCode> {
    std::io::stdin().read_to_end(&mut Vec::new())?;
    if !lab::sweep_after(pid)?.is_empty() {
        eprintln!("bench: it was interrupted; its namespaces are removed");
    }
    Ok(ExitCode::SUCCESS)
}

/// The binary under test: `cargo xtask bench` builds it and says where it is.
fn sluice() -> anyhow::Result<PathBuf> {
    let Some(path) = std::env::var_os("SLUICE_BIN").map(PathBuf::from) else {
        bail!("SLUICE_BIN does not say where sluice is; `cargo xtask bench` sets it");
    };
    path.canonicalize()
        .with_context(|| format!("SLUICE_BIN is {}", path.display()))
}

/// Progress on standard error: one line that changes on a terminal, one line per run elsewhere.
struct Console {
    terminal: bool,
    started: Instant,
}

impl Console {
    fn new() -> Self {
        Self {
            terminal: std::io::stderr().is_terminal(),
            started: Instant::now(),
        }
    }

    fn line(step: &Step<'_>) -> String {
        let round = if step.round.warm_up {
            "warm-up".to_owned()
        } else {
            format!("round {}/{}", step.round.index + 1, step.rounds)
        };
        format!(
            "[{} {}/{}] {round}: {}",
            step.id.suite,
            step.index + 1,
            step.steps,
            title(step.id)
        )
    }
}

impl Progress for Console {
    fn begin(&mut self, step: &Step<'_>) {
        if self.terminal {
            eprint!("\r\x1b[K{}", Self::line(step));
            let _ = std::io::stderr().flush();
        }
    }

    fn end(&mut self, step: &Step<'_>, took: Duration, outcome: &Result<Outcome, Failure>) {
        let what = match outcome {
            Ok(outcome) => match outcome.measurements.first() {
                Some(m) => format!(
                    "{} {} {}",
                    m.metric,
                    benches::report::number(m.value),
                    m.unit
                ),
                None => "done".to_owned(),
            },
            Err(Failure::Unmeasured(why)) => format!("not measured: {why}"),
            Err(Failure::Wrong(why)) => format!("WRONG: {why}"),
            Err(Failure::Broken(error)) => format!("failed: {error:#}"),
        };
        let left = self.started.elapsed().as_secs_f64() / (step.index + 1) as f64
            * (step.steps - step.index - 1) as f64;
        let line = format!(
            "{}: {what} ({:.1} s, about {left:.0} s left)",
            Self::line(step),
            took.as_secs_f64()
        );
        // A failure stays on the screen.
        let (start, end) = match (self.terminal, outcome) {
            (false, _) => ("", "\n"),
            (true, Ok(_)) if step.index + 1 < step.steps => ("\r\x1b[K", ""),
            (true, _) => ("\r\x1b[K", "\n"),
        };
        eprint!("{start}{line}{end}");
        let _ = std::io::stderr().flush();
    }
}

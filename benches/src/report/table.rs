//! A report as tables: aligned text for a terminal, Markdown for `report.md`.

use std::fmt::Write as _;

use crate::case::{Effort, Implementation, Verdict};
use crate::report::{FOREIGN_LIMIT, Measured, MissingKind, Report, number};

/// Foreign load from which a case gets a row that tells it, in CPUs.
const FOREIGN_SHOWN: f64 = 0.01;

struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

/// The results of one suite: a row per case and metric, a column per implementation.
fn results(report: &Report, suite: &str) -> Option<Table> {
    let mut implementations: Vec<&Implementation> = Vec::new();
    // Cases and their metrics in the order in which they were measured.
    let mut cases: Vec<(String, Vec<(&str, &str)>)> = Vec::new();
    let results: Vec<&Measured> = report
        .results
        .iter()
        .filter(|r| r.id.suite == suite)
        .collect();
    let verdicts = report.verdicts.iter().filter(|v| v.id.suite == suite);
    for id in results
        .iter()
        .map(|r| &r.id)
        .chain(verdicts.clone().map(|v| &v.id))
    {
        if !implementations.contains(&&id.implementation) {
            implementations.push(&id.implementation);
        }
        if !cases.iter().any(|(label, _)| *label == id.label()) {
            cases.push((id.label(), Vec::new()));
        }
    }
    if cases.is_empty() {
        return None;
    }
    for result in &results {
        let (_, metrics) = cases.iter_mut().find(|(l, _)| *l == result.id.label())?;
        let metric = (result.metric.as_str(), result.unit.as_str());
        if !metrics.contains(&metric) {
            metrics.push(metric);
        }
    }

    let mut header = vec!["case".to_owned(), "metric".to_owned()];
    header.extend(
        implementations
            .iter()
            .map(|i| format!("{} {}", i.name, i.version).trim_end().to_owned()),
    );
    let mut rows = Vec::new();
    for (label, metrics) in &cases {
        let start = rows.len();
        let mut row = |name: String, cell: &dyn Fn(&Implementation) -> Option<String>| {
            let first = if rows.len() == start {
                label.as_str()
            } else {
                ""
            };
            let mut row = vec![first.to_owned(), name];
            row.extend(
                implementations
                    .iter()
                    .map(|&i| cell(i).unwrap_or_else(|| "–".to_owned())),
            );
            rows.push(row);
        };
        let of = |i: &Implementation| {
            let results = results.iter().copied();
            let i = i.clone();
            results.filter(move |r| r.id.implementation == i && r.id.label() == *label)
        };
        for &(metric, unit) in metrics {
            row(format!("{metric}, {unit}"), &|i| {
                of(i).find(|r| r.metric == metric).map(cell)
            });
        }
        let verdict = |i: &Implementation| {
            verdicts
                .clone()
                .find(|v| v.id.implementation == *i && v.id.label() == *label)
                .map(|v| word(v.worst).to_owned())
        };
        if implementations.iter().any(|i| verdict(i).is_some()) {
            row("verdict".to_owned(), &verdict);
        }
        let foreign = |i: &Implementation| of(i).next().map(|r| r.foreign);
        if implementations
            .iter()
            .any(|i| foreign(i).is_some_and(|f| f > FOREIGN_SHOWN))
        {
            row("other load, CPUs".to_owned(), &|i| foreign(i).map(number));
        }
    }
    Some(Table { header, rows })
}

fn cell(result: &Measured) -> String {
    let s = &result.summary;
    let mut cell = number(s.median);
    if s.min != s.max {
        let _ = write!(cell, " ({}–{})", number(s.min), number(s.max));
    }
    if let Some(ratio) = &result.ratio {
        let _ = write!(cell, " {}x", number(ratio.summary.median));
    }
    if result.foreign > FOREIGN_LIMIT {
        cell.push_str(" !");
    }
    cell
}

/// A verdict as a word.
pub(crate) fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Pass => "pass",
        Verdict::Slow => "slow",
        Verdict::Stall => "stall",
    }
}

impl Table {
    fn text(&self) -> String {
        let width = |column: usize| {
            std::iter::once(&self.header)
                .chain(&self.rows)
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.header.len()).map(width).collect();
        let mut out = String::new();
        for row in std::iter::once(&self.header).chain(&self.rows) {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                let _ = write!(line, "{cell:width$}  ");
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }

    fn markdown(&self) -> String {
        let line = |cells: &[String]| {
            let cells: Vec<String> = cells.iter().map(|c| c.replace('|', "\\|")).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        let mut out = line(&self.header);
        out.push_str(&format!("|{}\n", "---|".repeat(self.header.len())));
        for row in &self.rows {
            out.push_str(&line(row));
        }
        out
    }
}

/// Every suite of the report, in the order in which they ran.
fn suites(report: &Report) -> Vec<&str> {
    let results = report.results.iter().map(|r| &r.id);
    let verdicts = report.verdicts.iter().map(|v| &v.id);
    let missing = report.missing.iter().map(|m| &m.id);
    let mut suites: Vec<&str> = Vec::new();
    for id in results.chain(verdicts).chain(missing) {
        if !suites.contains(&id.suite.as_str()) {
            suites.push(&id.suite);
        }
    }
    suites
}

/// What has no numbers: a line per implementation and reason, with the cases that it holds for.
fn missing(report: &Report, suite: &str) -> Vec<String> {
    let mut groups: Vec<(&super::Missing, Vec<String>)> = Vec::new();
    for one in report.missing.iter().filter(|m| m.id.suite == suite) {
        let alike = |(other, _): &&mut (&super::Missing, Vec<String>)| {
            let same = |m: &super::Missing| (m.kind, m.id.implementation.clone(), m.why.clone());
            same(other) == same(one)
        };
        match groups.iter_mut().find(alike) {
            Some((_, cases)) => cases.push(one.id.label()),
            None => groups.push((one, vec![one.id.label()])),
        }
    }
    let line = |(m, cases): (&super::Missing, Vec<String>)| {
        let kind = match m.kind {
            MissingKind::Skipped | MissingKind::Unmeasured => "not measured",
            MissingKind::Broken => "BROKEN",
            MissingKind::Wrong => "WRONG",
        };
        // What a program said may have many lines.
        let why: Vec<&str> = m.why.split_whitespace().collect();
        let (name, cases) = (&m.id.implementation.name, cases.join(", "));
        format!("{name}: {kind}: {} ({cases})", why.join(" "))
    };
    groups.into_iter().map(line).collect()
}

/// What the cells mean, and what casts doubt on them.
fn legend(report: &Report) -> Vec<String> {
    let mut lines = vec![format!(
        "Median (min–max) of {} runs; 0.5x: beside the suite's reference, round by round.",
        report.rounds
    )];
    if report.effort == Effort::Smoke {
        lines.push("A smoke run: the numbers mean nothing.".to_owned());
    }
    if report.results.iter().any(|r| r.foreign > FOREIGN_LIMIT) {
        lines.push(format!(
            "!: other processes on the machine took more than {} of a CPU meanwhile; measure again when it is quiet.",
            number(FOREIGN_LIMIT)
        ));
    }
    lines
}

/// The report for a terminal.
pub fn text(report: &Report) -> String {
    let mut out = String::new();
    for suite in suites(report) {
        let _ = writeln!(out, "\n{suite}");
        if let Some(table) = results(report, suite) {
            out.push_str(&table.text());
        }
        for line in missing(report, suite) {
            let _ = writeln!(out, "{line}");
        }
    }
    let _ = writeln!(out, "\n{}", report.host.line());
    for line in legend(report) {
        let _ = writeln!(out, "{line}");
    }
    out
}

/// The report for a browser; `charts` are file names beside it and their titles.
pub fn markdown(report: &Report, charts: &[(String, String)]) -> String {
    let mut out = format!(
        "# Sluice bench\n\n{}, commit {}, {} runs ({:?}), {:.0} s\n\n{}\n",
        report.started,
        if report.commit.is_empty() {
            "unknown"
        } else {
            &report.commit
        },
        report.rounds,
        report.effort,
        report.seconds,
        report.host.line()
    );
    for nic in &report.host.nics {
        let on: Vec<&str> = nic
            .offloads
            .iter()
            .filter(|(_, on)| **on)
            .map(|(name, _)| name.as_str())
            .collect();
        let _ = writeln!(
            out,
            "\n{}: {}, MTU {}, offloads on: {}",
            nic.name,
            nic.driver,
            nic.mtu,
            if on.is_empty() {
                "none".to_owned()
            } else {
                on.join(", ")
            }
        );
    }
    out.push('\n');
    for line in legend(report) {
        let _ = writeln!(out, "{line}");
    }
    for (file, title) in charts {
        let _ = write!(out, "\n![{title}]({file})\n");
    }
    for suite in suites(report) {
        let _ = write!(out, "\n## {suite}\n\n");
        if let Some(table) = results(report, suite) {
            out.push_str(&table.markdown());
        }
        let missing = missing(report, suite);
        if !missing.is_empty() {
            out.push_str("\nWithout numbers:\n\n");
            for line in missing {
                let _ = writeln!(out, "- {line}");
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::sample;

    #[test]
    fn a_table_has_a_column_per_implementation_and_a_row_per_metric() {
        let table = results(&sample(), "clear").unwrap();
        assert_eq!(
            table.header,
            ["case", "metric", "sluice 0.1.0", "kernel 6.18"]
        );
        let first = &table.rows[0];
        assert_eq!(first[..2], ["small-up", "rate, packets/s"]);
        assert_eq!(first[2], "2,000,000 (1,900,000–2,100,000) 2.00x !");
        assert_eq!(first[3], "1,000,000 (950,000–1,050,000)");
        let text = text(&sample());
        assert!(text.contains("other load, CPUs"), "{text}");
        assert!(
            text.contains("kernel: not measured: no room (large-up)"),
            "{text}"
        );
        assert!(text.contains("measure again when it is quiet"), "{text}");
    }

    #[test]
    fn columns_line_up() {
        let text = results(&sample(), "clear").unwrap().text();
        let column = |line: &str| {
            line.char_indices()
                .nth(10)
                .map(|(i, _)| line[i..].to_owned())
        };
        let mut lines = text.lines();
        assert!(column(lines.next().unwrap()).unwrap().starts_with("metric"));
        assert!(column(lines.next().unwrap()).unwrap().starts_with("rate"));
    }

    #[test]
    fn markdown_has_charts_and_all_rows() {
        let report = sample();
        let text = markdown(&report, &[("clear.svg".to_owned(), "Rate".to_owned())]);
        assert!(text.contains("![Rate](clear.svg)"));
        assert!(text.contains("| mtu-1420 | verdict | stall |"), "{text}");
        assert!(text.contains("- kernel: not measured: no room (large-up)"));
    }
}

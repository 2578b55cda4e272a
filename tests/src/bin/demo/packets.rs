//! The router's packet counters, and where they say that packets went.

use std::collections::BTreeMap;

use anyhow::{Context, ensure};
use lab::sluice::Sluice;

/// Packets and bytes by program and verdict.
pub(crate) struct Packets(BTreeMap<(String, String), Count>);

#[derive(Clone, Copy, Default)]
struct Count {
    packets: u64,
    bytes: u64,
}

impl Packets {
    pub(crate) fn of(sluice: &Sluice) -> anyhow::Result<Self> {
        let status = sluice.status()?;
        let rows = status["packets"].as_array().context("no packet counters")?;
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let all = rows.iter().map(|row| {
            let count = Count {
                packets: row["packets"].as_u64().unwrap_or(0),
                bytes: row["bytes"].as_u64().unwrap_or(0),
            };
            ((text(&row["program"]), text(&row["verdict"])), count)
        });
        Ok(Self(all.collect()))
    }

    /// What has come since `before`.
    pub(crate) fn since(mut self, before: &Self) -> Self {
        for (key, count) in &mut self.0 {
            let old = before.0.get(key).copied().unwrap_or_default();
            count.packets = count.packets.saturating_sub(old.packets);
            count.bytes = count.bytes.saturating_sub(old.bytes);
        }
        self
    }

    /// Whether the fast path carried `bytes` toward the laptop, and the acknowledgements back.
    pub(crate) fn carried_fast(&self, bytes: usize) -> anyhow::Result<String> {
        let [up, down] = ["from_overlay", "from_subnet"].map(|program| self.forwarded(program));
        ensure!(up.packets > 0, "from_overlay forwarded nothing");
        ensure!(
            down.bytes >= bytes as u64,
            "from_subnet forwarded {} bytes of {bytes}",
            down.bytes
        );
        Ok(format!(
            "{} MB in {} packets to the laptop, {} packets from it",
            down.bytes / 1_000_000,
            grouped(down.packets),
            grouped(up.packets)
        ))
    }

    fn forwarded(&self, program: &str) -> Count {
        let key = (program.to_owned(), "forwarded".to_owned());
        self.0.get(&key).copied().unwrap_or_default()
    }

    /// A line for each verdict that was given, under a head.
    pub(crate) fn table(&self) -> Vec<String> {
        let line = |path: &str, program: &str, verdict: &str, packets: &str, bytes: &str| {
            format!("{path:<8} {program:<20} {verdict:<20} {packets:>12} {bytes:>16}")
        };
        let mut rows: Vec<(Path, String)> = self
            .0
            .iter()
            .filter(|(_, count)| count.packets > 0)
            .map(|((program, verdict), count)| {
                let path = Path::of(program, verdict);
                let (packets, bytes) = (grouped(count.packets), grouped(count.bytes));
                (path, line(path.label(), program, verdict, &packets, &bytes))
            })
            .collect();
        rows.sort();
        let head = line("path", "program", "verdict", "packets", "bytes");
        std::iter::once(head)
            .chain(rows.into_iter().map(|(_, row)| row))
            .collect()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Path {
    Fast,
    Slow,
    /// None of the router's: left to the stack.
    Other,
    Dropped,
}

impl Path {
    /// The slow path's own counters say what became of the packets that the programs handed to it.
    fn of(program: &str, verdict: &str) -> Self {
        if verdict.starts_with("drop") || verdict.starts_with("reject") {
            Self::Dropped
        } else if verdict.starts_with("pass") {
            Self::Other
        } else if verdict == "forwarded" && !program.starts_with("kernel") {
            Self::Fast
        } else {
            Self::Slow
        }
    }

    fn label(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Slow => "slow",
            Self::Other => "other",
            Self::Dropped => "dropped",
        }
    }
}

/// 1234567 as "1,234,567".
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_groups_by_path_and_leaves_out_what_never_happened() {
        let row = |program: &str, verdict: &str, packets| {
            let count = Count {
                packets,
                bytes: packets * 100,
            };
            ((program.to_owned(), verdict.to_owned()), count)
        };
        let packets = Packets(BTreeMap::from([
            row("from_subnet", "forwarded", 12_345_678),
            row("from_overlay", "forwarded", 999),
            row("from_overlay", "slow_snat", 1000),
            row("from_overlay", "drop_malformed", 0),
            row("kernel_from_overlay", "drop_policy", 2),
            row("kernel_from_overlay", "forwarded", 1000),
            row("from_subnet", "pass_unrelated", 3),
        ]));
        let table: Vec<Vec<String>> = packets
            .table()
            .iter()
            .map(|line| line.split_whitespace().map(str::to_owned).collect())
            .collect();
        assert_eq!(
            table,
            [
                ["path", "program", "verdict", "packets", "bytes"],
                ["fast", "from_overlay", "forwarded", "999", "99,900"],
                [
                    "fast",
                    "from_subnet",
                    "forwarded",
                    "12,345,678",
                    "1,234,567,800"
                ],
                ["slow", "from_overlay", "slow_snat", "1,000", "100,000"],
                [
                    "slow",
                    "kernel_from_overlay",
                    "forwarded",
                    "1,000",
                    "100,000"
                ],
                ["other", "from_subnet", "pass_unrelated", "3", "300"],
                ["dropped", "kernel_from_overlay", "drop_policy", "2", "200"],
            ]
        );
    }
}

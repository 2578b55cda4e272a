//! The nearest known word to a mistyped one.

/// The known word that `word` was probably meant to be.
pub(super) fn nearest<'k>(word: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    let plain = plain(word);
    known
        .into_iter()
        .map(|candidate| (cost(&plain, &self::plain(candidate)), candidate))
        .filter(|(cost, candidate)| *cost <= candidate.len().max(plain.len()).div_ceil(3))
        .min_by_key(|(cost, _)| *cost)
        .map(|(_, candidate)| candidate)
}

/// Spelling without case and separators: `AllowedIPs` and `allowed-ips` are `allowedips`.
fn plain(word: &str) -> String {
    word.chars()
        .filter(char::is_ascii_alphanumeric)
        .map(|c| c.to_ascii_lowercase())
        .take(64)
        .collect()
}

fn cost(a: &str, b: &str) -> usize {
    let (short, long) = if a.len() < b.len() { (a, b) } else { (b, a) };
    if short.len() >= 4 && long.contains(short) {
        return usize::from(short != long);
    }
    distance(a.as_bytes(), b.as_bytes())
}

/// Insertions, deletions, replacements and swaps of neighbours that turn `a` into `b` (optimal
/// string alignment).
fn distance(a: &[u8], b: &[u8]) -> usize {
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let replaced = last[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            row[j] = replaced.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(before[j - 2] + 1);
            }
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_was_meant() {
        let known = ["public_key", "allowed_ips", "endpoint", "keepalive"];
        for (word, meant) in [
            ("publickey", Some("public_key")),
            ("AllowedIPs", Some("allowed_ips")),
            ("alowed_ips", Some("allowed_ips")),
            ("enpdoint", Some("endpoint")),
            ("PersistentKeepalive", Some("keepalive")),
            ("colour", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, known), meant, "{word}");
        }
    }

    #[test]
    fn distance_counts_edits() {
        assert_eq!(distance(b"", b"abc"), 3);
        assert_eq!(distance(b"abcd", b"acbd"), 1);
        assert_eq!(distance(b"kitten", b"sitting"), 3);
    }
}

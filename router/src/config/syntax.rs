//! Syntax errors of the TOML parser in an operator's words, without those that follow from another.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::Problems;

/// Adds the syntax errors and marks the parts of the text that they spoil. Never shows the text at
/// fault: it may be a secret.
pub(super) fn report(
    source: &str,
    table: &Spanned<DeTable<'_>>,
    errors: &[toml::de::Error],
    problems: &mut Problems<'_>,
) {
    if errors.is_empty() {
        return;
    }
    let place = |error: &toml::de::Error| error.span().unwrap_or_default();
    let mut errors: Vec<_> = errors.iter().map(|e| (place(e), e.message())).collect();
    errors.sort_by_key(|(span, _)| span.start);

    let mut spoiled: Vec<Range<usize>> = Vec::new();
    // A list that is never closed swallows the rest of the file: only its start is of use.
    for (span, message) in &errors {
        let Some(closing) = closing(message) else {
            continue;
        };
        if spoiled.iter().any(|part| part.contains(&span.start)) {
            continue;
        }
        let Some(open) = outermost_around(table.get_ref(), span.start) else {
            continue;
        };
        let message = format!("this opens and is never closed; add the missing {closing}");
        problems.add(open.start, key(problems, open.start), message);
        spoiled.push(open.start..source.len() + 1);
    }
    for (span, message) in errors {
        let line = problems.lines.range(span.start);
        // The first error of a line is told; the others are mostly its echo.
        if spoiled
            .iter()
            .any(|part| part.contains(&span.start) || *part == line)
        {
            continue;
        }
        let at = span.start;
        problems.add(at, key(problems, at), translate(message, &span));
        spoiled.push(line);
    }
    problems.spoil(spoiled);
}

fn closing(message: &str) -> Option<&'static str> {
    // A = in a list is the next key, or one further down.
    if message.starts_with("unclosed array,") || message.starts_with("unexpected `=` in array") {
        Some("]")
    } else if message.starts_with("unclosed inline table") {
        Some("}")
    } else {
        None
    }
}

/// The key that the line at fault sets, if it sets one.
fn key(problems: &Problems<'_>, at: usize) -> String {
    let line = problems.lines.text(problems.lines.index(at));
    let key = line.split_once('=').map_or("", |(key, _)| key.trim());
    let plain = !key.is_empty() && key.len() <= 32;
    let plain = plain
        && key
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c));
    if plain {
        key.to_owned()
    } else {
        "syntax".to_owned()
    }
}

/// The outermost list or inline table that byte `at` is in, or at the end of.
fn outermost_around(table: &DeTable<'_>, at: usize) -> Option<Range<usize>> {
    let mut found: Option<Range<usize>> = None;
    let mut todo: Vec<&Spanned<DeValue<'_>>> = table.values().collect();
    while let Some(value) = todo.pop() {
        let span = value.span();
        let wider = found.as_ref().is_none_or(|found| span.start < found.start);
        match value.get_ref() {
            DeValue::Array(list) => todo.extend(list.iter()),
            DeValue::Table(table) => todo.extend(table.values()),
            _ => continue,
        }
        if span.start < at && at <= span.end && wider {
            found = Some(span);
        }
    }
    found
}

fn translate(message: &str, span: &Range<usize>) -> String {
    let what = message.split(", expected").next().unwrap_or(message);
    match what {
        "string values must be quoted" if span.is_empty() => {
            "no value; write one after the =".into()
        }
        "string values must be quoted" => "a text must stand in quotes".into(),
        "invalid basic string" | "invalid multi-line basic string" => {
            "this text has no closing \" or holds a character that it may not".into()
        }
        "invalid literal string" | "invalid multi-line literal string" => {
            "this text has no closing ' or holds a character that it may not".into()
        }
        "missing escaped value" => {
            r"a \ stands before a character that it cannot escape; write \\ for one \".into()
        }
        "invalid boolean" => {
            "a text must stand in quotes; only true and false stand without".into()
        }
        "duplicate key" => "given twice; keep one of the two".into(),
        "key with no value" | "missing assignment between key-value pairs" => {
            "a key without a value; write key = value".into()
        }
        "missing comma between array elements" => {
            "a comma is missing between two entries of a list".into()
        }
        "unexpected key or value" => "more than one value on a line; give each key a line".into(),
        "unclosed table" => "a section heading must end with ]".into(),
        "unclosed array table" => "a section heading of this kind must end with ]]".into(),
        _ => message.to_owned(),
    }
}

//! What is wrong with a configuration, in sentences that an operator can act on.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::layers::Layers;

/// A place in the configuration file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// Line, counted from 1.
    pub line: u32,
    /// Column in characters, counted from 1.
    pub column: u32,
}

/// One mistake: where it stands, what it is, and how to mend it. Never holds a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The configuration file, as its path was given.
    pub file: Arc<Path>,
    /// Where in the file; `None` for the file as a whole.
    pub position: Option<Position>,
    /// The key concerned, e.g. `peer.allowed_ips`; empty for the file as a whole.
    pub key: Cow<'static, str>,
    /// The value and the mend, in one line.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if let Some(Position { line, column }) = self.position {
            write!(f, "{line}:{column}:")?;
        }
        if !self.key.is_empty() {
            write!(f, " {}:", self.key)?;
        }
        write!(f, " {}", self.message)
    }
}

/// Every problem of a configuration file, in the order of the file. Displays one line each.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct ConfigErrors(pub Vec<Problem>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

/// Stands for the byte offset of what is in no file.
pub(super) const NOWHERE: usize = usize::MAX;

/// Translates byte offsets of the text of all layers to positions.
pub(super) struct Lines<'t> {
    text: &'t str,
    starts: Vec<usize>,
    /// Which line each layer begins with, counted from 0, and how it is called.
    files: Vec<(usize, Arc<Path>)>,
}

impl<'t> Lines<'t> {
    pub(super) fn new(layers: &'t Layers) -> Self {
        let text = layers.text();
        let after_newline = text.match_indices('\n').map(|(at, _)| at + 1);
        let mut lines = Self {
            text,
            starts: std::iter::once(0).chain(after_newline).collect(),
            files: Vec::new(),
        };
        let files = layers.starts().iter();
        lines.files = files
            .map(|(start, file)| (lines.index(*start), file.clone()))
            .collect();
        lines
    }

    /// The layer that holds byte `at`, by number.
    pub(super) fn layer(&self, at: usize) -> usize {
        let line = self.index(at);
        let after = self.files.partition_point(|(first, _)| *first <= line);
        after.saturating_sub(1)
    }

    /// The names of the layers.
    pub(super) fn files(&self) -> impl Iterator<Item = &Arc<Path>> {
        self.files.iter().map(|(_, file)| file)
    }

    /// Number of the line that holds byte `at` in its layer, counted from 1.
    fn number(&self, at: usize) -> usize {
        let first = self
            .files
            .get(self.layer(at))
            .map_or(0, |(first, _)| *first);
        self.index(at) + 1 - first
    }

    /// Number of the line that holds byte `at`, counted from 0.
    pub(super) fn index(&self, at: usize) -> usize {
        self.starts.partition_point(|start| *start <= at) - 1
    }

    /// The text of a line, without its end.
    pub(super) fn text(&self, index: usize) -> &'t str {
        let start = self.starts.get(index).copied();
        let rest = start.and_then(|start| self.text.get(start..));
        rest.and_then(|rest| rest.lines().next()).unwrap_or("")
    }

    /// The bytes of the line that holds byte `at`, with its end.
    pub(super) fn range(&self, at: usize) -> Range<usize> {
        let index = self.index(at);
        let next = self.starts.get(index + 1).copied();
        self.starts[index]..next.unwrap_or(self.text.len() + 1)
    }

    pub(super) fn position(&self, at: usize) -> Position {
        let line = self.index(at);
        let before = self.text.as_bytes().get(self.starts[line]..at);
        let column = before.map_or(0, |bytes| String::from_utf8_lossy(bytes).chars().count());
        Position {
            line: u32::try_from(self.number(at)).unwrap_or(u32::MAX),
            column: u32::try_from(column + 1).unwrap_or(u32::MAX),
        }
    }
}

/// Collects the problems of one configuration. Places are byte offsets into the text of its layers.
pub(super) struct Problems<'t> {
    /// The file that was asked for.
    file: Arc<Path>,
    pub(super) lines: Lines<'t>,
    found: Vec<(usize, Problem)>,
    /// Set when the syntax is broken: parts of the text, by byte offsets, whose reading is a guess.
    spoiled: Option<Vec<Range<usize>>>,
}

impl<'t> Problems<'t> {
    pub(super) fn new(layers: &'t Layers) -> Self {
        let lines = Lines::new(layers);
        let main = lines.files.get(lines.layer(layers.main()));
        Self {
            file: main.map_or_else(|| Path::new("").into(), |(_, file)| file.clone()),
            lines,
            found: Vec::new(),
            spoiled: None,
        }
    }

    pub(super) fn add(
        &mut self,
        at: usize,
        key: impl Into<Cow<'static, str>>,
        message: impl Into<String>,
    ) {
        let spoiled = self.spoiled.iter().flatten();
        if spoiled.into_iter().any(|range| range.contains(&at)) {
            return;
        }
        let holder = self.lines.files.get(self.lines.layer(at));
        let file = holder.filter(|_| at != NOWHERE).map(|(_, file)| file);
        let problem = Problem {
            file: file.unwrap_or(&self.file).clone(),
            position: (at != NOWHERE).then(|| self.lines.position(at)),
            key: key.into(),
            message: message.into(),
        };
        self.found.push((at, problem));
    }

    /// The line number of byte `at`, for a sentence that points to another place; with the layer, where there
    /// are several.
    pub(super) fn line(&self, at: usize) -> String {
        let number = self.lines.number(at);
        match self.lines.files.get(self.lines.layer(at)) {
            Some((_, file)) if self.lines.files.len() > 1 => {
                format!("{number} of {}", file.display())
            }
            _ => number.to_string(),
        }
    }

    /// The same in brackets, behind the name of what stands there; nothing where there is no file.
    pub(super) fn place(&self, at: usize) -> String {
        match at {
            NOWHERE => String::new(),
            at => format!(" (line {})", self.line(at)),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// Reports something that is not there, unless broken syntax may have hidden it.
    pub(super) fn missing(&mut self, at: usize, key: String, message: String) {
        if self.spoiled.is_none() {
            self.add(at, key, message);
        }
    }

    /// From now on problems in these parts of the text are passed over in silence, and so is what
    /// is missing.
    pub(super) fn spoil(&mut self, parts: Vec<Range<usize>>) {
        self.spoiled.get_or_insert_default().extend(parts);
    }

    pub(super) fn into_errors(mut self) -> ConfigErrors {
        self.found.sort_by_key(|(at, _)| *at);
        ConfigErrors(self.found.into_iter().map(|(_, problem)| problem).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_lines_and_characters_from_one() {
        let text = "a\nüb\n\nc";
        let layers = Layers::one(text, Path::new("a.toml"));
        let lines = Lines::new(&layers);
        let at = |needle: &str| {
            let Position { line, column } = lines.position(text.find(needle).unwrap());
            (line, column)
        };
        assert_eq!(at("a"), (1, 1));
        assert_eq!(at("b"), (2, 2));
        assert_eq!(at("c"), (4, 1));
        assert_eq!(lines.position(text.len()).line, 4);
        assert_eq!(lines.text(1), "üb");
        let empty = Layers::one("", Path::new("a.toml"));
        assert_eq!(Lines::new(&empty).position(0).line, 1);
    }
}

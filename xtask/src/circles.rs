//! No file needs another one that needs it: the check, over the paths that source files name.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};

/// Folders, from the workspace's root, whose files must not go in circles.
const FOLDERS: &[&str] = &["router-ebpf/src", "router/src/engine"];

/// Modules by path from the crate's root, which is empty, with their source.
type Sources = BTreeMap<Vec<String>, String>;

/// What a module's file says.
#[derive(Default)]
struct File {
    /// Modules that only tests have.
    for_tests: BTreeSet<String>,
    /// Names of items, but for those of tests.
    items: BTreeSet<String>,
    /// Paths of other items, as they stand there.
    paths: Vec<Vec<String>>,
    /// Paths of items that it only passes on, out of its own submodules.
    passed_on: Vec<Vec<String>>,
}

/// The files of `folder` that are in a circle, each with the way round.
fn circles(sources: &Sources, folder: &[String]) -> Vec<String> {
    let mut files: BTreeMap<&[String], File> = sources
        .iter()
        .map(|(module, source)| (module.as_slice(), read(source, &children(sources, module))))
        .collect();
    let for_tests: Vec<Vec<String>> = files
        .iter()
        .flat_map(|(module, file)| file.for_tests.iter().map(|name| join(module, name)))
        .collect();
    files.retain(|module, _| !for_tests.iter().any(|hidden| module.starts_with(hidden)));
    let edges: BTreeMap<&[String], BTreeSet<&[String]>> = files
        .iter()
        .map(|(module, file)| {
            let needs = file
                .paths
                .iter()
                .filter_map(|path| find(&files, module, path));
            (*module, needs.filter(|other| other != module).collect())
        })
        .collect();
    let names = |way: Vec<&[String]>| way.iter().map(|module| name(module)).collect::<Vec<_>>();
    edges
        .keys()
        .filter(|module| module.starts_with(folder))
        .filter_map(|module| Some(names(way_round(&edges, module)?).join(" > ")))
        .collect()
}

fn name(module: &[String]) -> String {
    match module {
        [] => "crate".to_owned(),
        _ => module.join("::"),
    }
}

fn join(module: &[String], name: &str) -> Vec<String> {
    [module, &[name.to_owned()]].concat()
}

/// Names of a module's own modules.
fn children(sources: &Sources, module: &[String]) -> BTreeSet<String> {
    sources
        .keys()
        .filter_map(|other| other.strip_prefix(module)?.first().cloned())
        .collect()
}

/// The shortest way from `start` back to it.
fn way_round<'a>(
    edges: &BTreeMap<&'a [String], BTreeSet<&'a [String]>>,
    start: &'a [String],
) -> Option<Vec<&'a [String]>> {
    let mut ways = VecDeque::from([vec![start]]);
    let mut seen = BTreeSet::new();
    while let Some(way) = ways.pop_front() {
        for next in edges.get(way.last()?)? {
            let longer = [&way[..], &[*next]].concat();
            if *next == start {
                return Some(longer);
            }
            if seen.insert(*next) {
                ways.push_back(longer);
            }
        }
    }
    None
}

/// The module that has what `path` in `module` names. What a module passes on is its submodule's.
fn find<'a>(
    files: &BTreeMap<&'a [String], File>,
    module: &[String],
    path: &[String],
) -> Option<&'a [String]> {
    let mut at = match path.first()?.as_str() {
        "crate" => Vec::new(),
        _ => module.to_vec(),
    };
    for segment in path {
        match segment.as_str() {
            "crate" | "self" => {}
            "super" => {
                at.pop();
            }
            item => {
                let below = join(&at, item);
                if files.contains_key(below.as_slice()) {
                    at = below;
                    continue;
                }
                let passed_on = &files.get(at.as_slice())?.passed_on;
                let from = passed_on.iter().find_map(|path| {
                    let (last, parents) = path.split_last()?;
                    let parent = [&at[..], parents].concat();
                    let has = match last.as_str() {
                        "*" => files.get(parent.as_slice())?.items.contains(item),
                        name => name == item,
                    };
                    has.then_some(parent)
                });
                at = from.unwrap_or(at);
                break;
            }
        }
    }
    files
        .get_key_value(at.as_slice())
        .map(|(module, _)| *module)
}

/// Reads a source file, whose own modules are `children`.
fn read(source: &str, children: &BTreeSet<String>) -> File {
    const ITEMS: [&str; 8] = [
        "fn", "struct", "enum", "trait", "const", "static", "type", "union",
    ];
    const TEST: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let tokens = tokens(source);
    let mut file = File::default();
    let mut at = 0;
    while at < tokens.len() {
        if tokens[at..].starts_with(&TEST.map(str::to_owned)) {
            let end = item_end(&tokens, at + TEST.len());
            if let Some(place) = tokens[at..end].iter().position(|token| token == "mod") {
                file.for_tests.extend(tokens.get(at + place + 1).cloned());
            }
            at = end;
            continue;
        }
        let token = tokens[at].as_str();
        let before = at.checked_sub(1).map(|before| tokens[before].as_str());
        if ITEMS.contains(&token) {
            file.items.extend(tokens.get(at + 1).cloned());
        }
        let starts = matches!(token, "crate" | "self" | "super") || children.contains(token);
        let goes_on = tokens.get(at + 1).is_some_and(|next| next == "::");
        if !starts || !goes_on || before == Some("::") {
            at += 1;
            continue;
        }
        let mut paths = Vec::new();
        let end = tree(&tokens, at, &[], &mut paths);
        let is_public =
            before == Some("use") && at >= 2 && (tokens[at - 2] == "pub" || tokens[at - 2] == ")");
        if is_public && children.contains(token) {
            file.passed_on.extend(paths);
        } else {
            file.paths.extend(paths);
        }
        at = end;
    }
    file
}

/// Reads the paths of a tree as `use` has it, and returns where it ends.
fn tree(tokens: &[String], start: usize, prefix: &[String], paths: &mut Vec<Vec<String>>) -> usize {
    let mut at = start;
    let mut path = prefix.to_vec();
    loop {
        match tokens.get(at).map(String::as_str) {
            Some("{") => {
                at += 1;
                while tokens.get(at).is_some_and(|token| token != "}") {
                    at = tree(tokens, at, &path, paths);
                    // An alias, and the comma.
                    while !matches!(tokens.get(at).map(String::as_str), Some("," | "}") | None) {
                        at += 1;
                    }
                    at += usize::from(tokens.get(at).is_some_and(|token| token == ","));
                }
                return at + 1;
            }
            Some(token) if token == "*" || token.starts_with(is_word) => {
                path.push(token.to_owned())
            }
            _ => break,
        }
        at += 1;
        if tokens.get(at).is_none_or(|token| token != "::") {
            break;
        }
        at += 1;
    }
    paths.push(path);
    at
}

/// Where the item ends that begins at `start`: behind its semicolon or its braces.
fn item_end(tokens: &[String], start: usize) -> usize {
    let mut depth = 0;
    for (at, token) in tokens.iter().enumerate().skip(start) {
        match token.as_str() {
            "{" => depth += 1,
            "}" if depth == 1 => return at + 1,
            "}" => depth -= 1,
            ";" if depth == 0 => return at + 1,
            _ => {}
        }
    }
    tokens.len()
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Words, double colons and single other characters; comments and literals left out.
fn tokens(source: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = source;
    while let Some(c) = rest.chars().next() {
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if c == '"' {
            literal(rest, '"').unwrap_or(rest.len())
        } else if c == '\'' {
            // A lifetime has no second quote.
            literal(rest, '\'').filter(|end| *end <= 12).unwrap_or(1)
        } else if is_word(c) {
            let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
            tokens.push(rest[..end].to_owned());
            end
        } else if rest.starts_with("::") {
            tokens.push("::".to_owned());
            2
        } else {
            if !c.is_whitespace() {
                tokens.push(c.to_string());
            }
            c.len_utf8()
        };
        rest = &rest[skipped..];
    }
    tokens
}

/// Where a literal ends that begins with a quote.
fn literal(text: &str, quote: char) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '\n' if quote == '\'' => return None,
            c if c == quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}

/// All source files of the crate that `folder` is of, and the folder's own module.
fn crate_of(folder: &Path) -> (Sources, Vec<String>) {
    let src = folder.ancestors().find(|path| path.ends_with("src"));
    let src = src.expect("a folder of a crate");
    let mut files = Vec::new();
    list(src, &mut files);
    let mut sources = Sources::new();
    for file in files {
        let module = module(file.strip_prefix(src).unwrap());
        // The library's root comes before that of a program beside it.
        sources
            .entry(module)
            .or_insert_with(|| fs::read_to_string(&file).unwrap());
    }
    (sources, module(folder.strip_prefix(src).unwrap()))
}

fn list(folder: &Path, files: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            list(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// The module of a file or folder of a crate.
fn module(path: &Path) -> Vec<String> {
    let parts = path.with_extension("");
    let mut module: Vec<String> = parts
        .iter()
        .map(|part| part.to_string_lossy().into_owned())
        .collect();
    let is_root = matches!(module.as_slice(), [name] if name == "lib" || name == "main");
    if is_root || module.last().is_some_and(|name| name == "mod") {
        module.pop();
    }
    module
}

#[test]
fn no_file_needs_one_that_needs_it() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for folder in FOLDERS {
        let (sources, module) = crate_of(&workspace.join(folder));
        assert!(sources.len() > 1, "no files in {folder}");
        let found = circles(&sources, &module);
        assert!(found.is_empty(), "{folder}:\n{}", found.join("\n"));
    }
}

/// The circles of a crate with these files.
fn found(files: &[(&str, &str)]) -> Vec<String> {
    let sources = files
        .iter()
        .map(|(file, source)| (module(Path::new(file)), (*source).to_owned()))
        .collect();
    circles(&sources, &[])
}

#[test]
fn a_circle_is_found_however_the_other_file_is_named() {
    let root = ("lib.rs", "mod a; mod b; mod c;");
    for (a, b, c) in [
        (
            "use crate::b;",
            "use crate::c::{self as d, E};",
            "use super::{b::F, a::*};",
        ),
        (
            "fn f() { crate::b::g() }",
            "use super::c::h;",
            "fn h(_: &crate::a::I) {}",
        ),
        (
            "use crate::{x::{y}, b::Z};",
            "use crate::c;",
            "/* */ const Q: char = '\"'; use crate::a;",
        ),
    ] {
        let found = found(&[root, ("a.rs", a), ("b.rs", b), ("c/mod.rs", c)]);
        assert_eq!(found.len(), 3, "{found:?}");
        assert_eq!(found[0], "a > b > c > a");
    }
}

#[test]
fn a_folder_passes_on_what_its_files_have_and_is_in_no_circle_by_that() {
    let parent = "mod one; mod two; pub use one::*; pub use two::{Two};";
    let child = "use super::one::One; pub struct Two;";
    let right = [("lib.rs", "mod a;"), ("a.rs", parent), ("a/two.rs", child)];
    let one = "pub struct One;";
    assert_eq!(found(&[&right[..], &[("a/one.rs", one)]].concat()), [""; 0]);
    // By the name that the folder passes on.
    for one in [
        "use crate::a::Two; pub struct One;",
        "use super::Two; pub struct One;",
    ] {
        let found = found(&[&right[..], &[("a/one.rs", one)]].concat());
        assert_eq!(
            found,
            ["a::one > a::two > a::one", "a::two > a::one > a::two"]
        );
    }
    // A parent that works with its child, which works with it.
    let parent = "mod b; fn f() { b::g() } pub fn h() {}";
    let found = found(&[
        ("lib.rs", "mod a;"),
        ("a.rs", parent),
        ("a/b.rs", "use super::h;"),
    ]);
    assert_eq!(found.len(), 2, "{found:?}");
}

#[test]
fn tests_comments_and_texts_are_no_circle() {
    let b = "use crate::a;";
    for a in [
        "#[cfg(test)] mod tests { fn f() { { crate::b::g() } } }",
        "#[cfg(test)]\n#[allow(x)]\nmod site;",
        "#[cfg(test)] use crate::b;",
        "// crate::b::c\n/// [`crate::b`]\n",
        "const A: &str = \"crate::b::c \\\" crate::b::c\";",
    ] {
        let files = [
            ("lib.rs", ""),
            ("a.rs", a),
            ("a/site.rs", "use crate::b;"),
            ("b.rs", b),
        ];
        assert_eq!(found(&files), [""; 0], "{a}");
    }
}

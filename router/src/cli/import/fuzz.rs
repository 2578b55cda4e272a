//! The import without files, for its fuzz target.

use super::conf;

/// What a file becomes.
#[derive(Debug)]
pub struct Imported {
    /// The text of `sluice.toml`.
    pub toml: String,
    /// What goes to key files.
    pub keys: Vec<String>,
    /// What is told of lines that were left out.
    pub notes: Vec<String>,
}

/// Imports a wg-quick file; the error tells what is wrong with it.
pub fn import(bytes: &[u8]) -> Result<Imported, Vec<String>> {
    let texts = |notes: Vec<super::Note>| notes.into_iter().map(|note| note.text).collect();
    let imported = conf::read(bytes, Some("wg0")).map_err(texts)?;
    let keys = imported.keys.iter().map(|(_, key)| key.to_string());
    Ok(Imported {
        toml: imported.toml,
        keys: keys.collect(),
        notes: texts(imported.notes),
    })
}

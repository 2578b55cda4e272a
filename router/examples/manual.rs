//! Writes the command line down as manual pages (`man/`) and completions of shells (`completions/`) into the
//! folder that is named: what `cargo xtask package deb` packs. No part of the binary, which is small.

use std::error::Error;
use std::fs;
use std::path::PathBuf;

use clap_complete::Shell;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).ok_or("name a folder")?;
    let [man, completions] = ["man", "completions"].map(|name| PathBuf::from(&folder).join(name));
    fs::create_dir_all(&man)?;
    fs::create_dir_all(&completions)?;
    clap_mangen::generate_to(router::cli::command(), &man)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let mut command = router::cli::command();
        clap_complete::generate_to(shell, &mut command, "sluice", &completions)?;
    }
    Ok(())
}

//! A URL as a QR code that a telephone reads off a terminal.

use std::fmt::Write as _;

use qrcode::{Color, EcLevel, QrCode};

/// Modules of light around it, which readers want.
const QUIET: usize = 2;

/// Two rows of modules in each line, light on dark as terminals are. `None` for a text that is too long.
pub(super) fn code(text: &str) -> Option<String> {
    let code = QrCode::with_error_correction_level(text, EcLevel::L).ok()?;
    let width = code.width();
    let colors = code.into_colors();
    let side = width + 2 * QUIET;
    let light = |x: usize, y: usize| {
        let inside = |at: usize| at.checked_sub(QUIET).filter(|at| *at < width);
        let module = inside(x).zip(inside(y));
        module.is_none_or(|(x, y)| colors.get(y * width + x) != Some(&Color::Dark))
    };
    let mut out = String::new();
    for y in (0..side).step_by(2) {
        for x in 0..side {
            let lower = y + 1 < side && light(x, y + 1);
            out.push(match (light(x, y), lower) {
                (true, true) => '█',
                (true, false) => '▀',
                (false, true) => '▄',
                (false, false) => ' ',
            });
        }
        let _ = writeln!(out);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_fits_a_terminal() {
        let shown = code("https://login.tailscale.com/a/0123456789abcdef").unwrap();
        let lines: Vec<&str> = shown.lines().collect();
        assert!(lines.len() <= 24, "{} lines", lines.len());
        let width = lines[0].chars().count();
        assert!(width <= 60);
        assert!(lines.iter().all(|line| line.chars().count() == width));
        // A finder pattern: a ring of seven dark modules behind the quiet zone.
        assert!(lines[1].starts_with("██ ▄▄▄▄▄ "), "{shown}");
        assert_eq!(code(&"x".repeat(8000)), None);
    }
}

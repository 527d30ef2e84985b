//! Figures: panels of curves over linear or logarithmic axes, with one legend, as SVG and PNG.
//!
//! [`figure`] says what is shown, [`axis`] where its ticks are, [`draw`] where its ink goes.

mod axis;
mod draw;
mod figure;

pub use axis::{Axis, Numerals, counts};
pub use figure::{Figure, Key, Mark, Panel, Style};

use std::path::Path;

use crate::failure::{Failure, Outcome};
use crate::output::{Staged, write_file};

/// Colours that stay apart for the colour-blind and in print (Paul Tol's vibrant scheme).
pub const COLORS: [&str; 6] = ["#0077bb", "#009988", "#ee7733", "#cc3311", "#aa3377", "#555555"];

/// Pixels of a PNG per unit of the drawing.
const PNG_SCALE: f32 = 2.0;

/// A figure as SVG text.
pub fn svg(figure: &Figure) -> String {
    let scene = draw::scene(figure);
    let text = kuva::backend::svg::SvgBackend::new().render_scene(&scene);
    // With a view box the picture scales with the page that shows it.
    let (width, height) = (scene.width, scene.height);
    text.replacen("<svg ", &format!("<svg viewBox=\"0 0 {width} {height}\" "), 1)
}

/// A figure as the bytes of a PNG.
///
/// # Errors
/// When it cannot be drawn, which for the program's own figures does not happen.
pub fn png(figure: &Figure) -> Outcome<Vec<u8>> {
    kuva::RasterBackend::new()
        .with_scale(PNG_SCALE)
        .render_scene(&draw::scene(figure))
        .map_err(|error| Failure::new(format!("drawing a PNG: {error}")))
}

/// Refuses, before any work, a file that [`write()`] would not write.
///
/// # Errors
/// For other extensions than `.svg` and `.png`, and folders that are not there.
pub fn check(path: &Path, argument: &str) -> Outcome {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("svg" | "png") => Staged::new(path, argument).map(drop),
        _ => Err(Failure::new(format!(
            "{argument} {}: the file must end in .svg or .png",
            path.display()
        ))),
    }
}

/// Writes a figure as the file's extension asks, `.svg` or `.png`.
///
/// # Errors
/// For other extensions, and what the system says.
pub fn write(figure: &Figure, path: &Path) -> Outcome {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("svg") => write_file(path, svg(figure).as_bytes()),
        Some("png") => write_file(path, &png(figure)?),
        _ => Err(Failure::new(format!(
            "--plot {}: the file must end in .svg or .png",
            path.display()
        ))),
    }
}

//! `--series`: taylor, power:P, or a file of coefficients.

use std::path::{Path, PathBuf};

use sata::Series;
use serde::Deserialize;

use crate::failure::{Failure, Outcome};
use crate::tensors::read_bytes;

/// What `--series` named; a file is read when it is needed.
#[derive(Clone, Debug, PartialEq)]
pub enum SeriesArg {
    /// taylor
    Taylor,
    /// power:P
    Power(usize),
    /// A JSON file.
    File(PathBuf),
}

/// What a file of coefficients may hold.
#[derive(Deserialize)]
#[serde(untagged)]
enum Coefficients {
    Bare(Vec<f64>),
    Named { coefficients: Vec<f64> },
}

/// Parses `--series`.
///
/// # Errors
/// A sentence that says what is accepted.
pub fn parse(text: &str) -> Result<SeriesArg, String> {
    if text == "taylor" {
        return Ok(SeriesArg::Taylor);
    }
    if let Some(exponent) = text.strip_prefix("power:") {
        let exponent = exponent.parse().map_err(|_| {
            format!("'{exponent}' is not an exponent: power:4 is x⁴ + 0.001, for example")
        })?;
        return Ok(SeriesArg::Power(exponent));
    }
    if text.ends_with(".json") {
        return Ok(SeriesArg::File(text.into()));
    }
    Err("it must be taylor, power:P, or a .json file of coefficients".into())
}

impl SeriesArg {
    /// The series itself.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn read(&self) -> Outcome<Series> {
        match self {
            SeriesArg::Taylor => Ok(Series::Taylor),
            SeriesArg::Power(exponent) => Ok(Series::power(*exponent)),
            SeriesArg::File(path) => read_file(path),
        }
    }
}

fn read_file(path: &Path) -> Outcome<Series> {
    let bytes = read_bytes(path).map_err(|failure| failure.context("--series"))?;
    match serde_json::from_slice(&bytes) {
        Ok(Coefficients::Bare(coefficients) | Coefficients::Named { coefficients }) => {
            Ok(Series::Fixed { coefficients })
        }
        Err(error) => Err(Failure::new(format!(
            "--series {}: it must hold [a_0, a_1, …] or {{\"coefficients\": [a_0, a_1, …]}}: {error}",
            path.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(parse("taylor"), Ok(SeriesArg::Taylor));
        assert_eq!(parse("power:4"), Ok(SeriesArg::Power(4)));
        assert_eq!(parse("a.json"), Ok(SeriesArg::File("a.json".into())));
        for wrong in ["power:", "power:x", "gauss", ""] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            SeriesArg::File(path.clone()).read()
        };
        let wants = Series::Fixed { coefficients: vec![1.0, 0.5] };
        assert_eq!(read("[1, 0.5]").unwrap(), wants);
        assert_eq!(read("{\"coefficients\": [1, 0.5]}").unwrap(), wants);
        for wrong in ["", "{}", "[1, \"x\"]", "[1, 1e999]", "{\"coefficients\": 1}"] {
            let message = read(wrong).unwrap_err().to_string();
            assert!(message.contains("a.json") && message.contains("coefficients"), "{message}");
        }
    }
}

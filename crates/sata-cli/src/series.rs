//! `--series`: taylor, gauss, hermite, power:P, or a file of coefficients.

use std::fmt;
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
    /// gauss
    Gauss,
    /// hermite, or hermite:τ
    Hermite(Option<f64>),
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

/// Parses one series.
///
/// # Errors
/// A sentence that says what is accepted.
pub fn parse(text: &str) -> Result<SeriesArg, String> {
    if let Some(exponent) = text.strip_prefix("power:") {
        let exponent = exponent.parse().map_err(|_| {
            format!("'{exponent}' is not an exponent: power:4 is x⁴ + 0.001, for example")
        })?;
        return Ok(SeriesArg::Power(exponent));
    }
    if let Some(tau) = text.strip_prefix("hermite:") {
        return match tau.parse::<f64>() {
            Ok(x) if x.is_finite() && x >= 0.0 => Ok(SeriesArg::Hermite(Some(x))),
            _ => Err(format!(
                "'{tau}' is no τ, which must be finite and at least 0: hermite:0.9 is what \
                 hermite alone means"
            )),
        };
    }
    match text {
        "taylor" => Ok(SeriesArg::Taylor),
        "gauss" => Ok(SeriesArg::Gauss),
        "hermite" => Ok(SeriesArg::Hermite(None)),
        _ if text.ends_with(".json") => Ok(SeriesArg::File(text.into())),
        _ => Err("it must be taylor, gauss, hermite, hermite:τ, power:P, or a .json file of \
                  coefficients"
            .into()),
    }
}

impl fmt::Display for SeriesArg {
    /// As it is written on the command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SeriesArg::Taylor => write!(f, "taylor"),
            SeriesArg::Gauss => write!(f, "gauss"),
            SeriesArg::Hermite(None) => write!(f, "hermite"),
            SeriesArg::Hermite(Some(tau)) => write!(f, "hermite:{tau}"),
            SeriesArg::Power(exponent) => write!(f, "power:{exponent}"),
            SeriesArg::File(path) => write!(f, "{}", path.display()),
        }
    }
}

impl SeriesArg {
    /// Whether the number of terms is another choice.
    pub fn takes_terms(&self) -> bool {
        !matches!(self, SeriesArg::Power(_) | SeriesArg::File(_))
    }

    /// The series itself.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn read(&self) -> Outcome<Series> {
        match self {
            SeriesArg::Taylor => Ok(Series::Taylor),
            SeriesArg::Gauss => Ok(Series::Gauss),
            SeriesArg::Hermite(None) => Ok(Series::hermite()),
            SeriesArg::Hermite(Some(tau)) => Ok(Series::Hermite { tau: *tau }),
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
        for (text, wants) in [
            ("taylor", SeriesArg::Taylor),
            ("gauss", SeriesArg::Gauss),
            ("hermite", SeriesArg::Hermite(None)),
            ("hermite:0.75", SeriesArg::Hermite(Some(0.75))),
            ("power:4", SeriesArg::Power(4)),
            ("a.json", SeriesArg::File("a.json".into())),
        ] {
            assert_eq!(parse(text).as_ref(), Ok(&wants));
            assert_eq!(wants.to_string(), text);
        }
        for wrong in
            ["", "power", "power:", "power:x", "hermite:", "hermite:-1", "hermite:inf", "x"]
        {
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

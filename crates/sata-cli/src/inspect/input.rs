//! Queries, keys and values of a model's layers, checked before any work.

use crate::failure::{Failure, Outcome};
use crate::tensors::{Dtype, SafeFile, Tensor, check_numbers, check_shapes};

/// One layer's activations.
#[derive(Debug)]
pub struct Layer {
    /// The name that its tensors begin with; empty for tensors q, k and v.
    pub prefix: String,
    /// `[batch, heads, tokens, dim]` of q, k and v.
    pub shapes: [[usize; 4]; 3],
    /// Queries, keys, values.
    pub tensors: [Tensor; 3],
}

/// Prefixes of all layers in a file, layer2 before layer10.
///
/// # Errors
/// When there is none.
pub fn prefixes(file: &SafeFile) -> Outcome<Vec<String>> {
    let names = file.names()?;
    let mut found: Vec<String> = names
        .iter()
        .filter_map(|name| match name.strip_suffix(".q") {
            Some(prefix) => Some(prefix.to_string()),
            None => (name == "q").then(String::new),
        })
        .collect();
    if found.is_empty() {
        let some: Vec<&str> = names.iter().take(12).map(String::as_str).collect();
        return Err(Failure::new(format!(
            "--input has no tensors PREFIX.q, PREFIX.k, PREFIX.v; it has {}",
            if some.is_empty() { "none at all".into() } else { some.join(", ") }
        )));
    }
    found.sort_by_key(|prefix| natural(prefix));
    Ok(found)
}

/// Text cut where digits begin and end; numbers compare as numbers.
fn natural(text: &str) -> Vec<(u128, String)> {
    let mut parts = vec![];
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, after) = rest.split_at(digits);
        let end = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let (words, after) = after.split_at(end);
        parts.push((number.parse().unwrap_or(0), words.to_string()));
        rest = after;
    }
    parts
}

impl Layer {
    /// Reads one layer and checks its shapes and numbers.
    ///
    /// # Errors
    /// Tensors that are missing, do not fit each other, or hold what is not finite in `dtype`.
    pub fn read(file: &SafeFile, prefix: &str, causal: bool, dtype: Dtype) -> Outcome<Self> {
        let name = |letter: &str| match prefix {
            "" => letter.to_string(),
            _ => format!("{prefix}.{letter}"),
        };
        let names = ["q", "k", "v"].map(name);
        let there = file.names()?;
        if let Some(missing) = names.iter().find(|name| !there.contains(name)) {
            return Err(Failure::new(format!(
                "--input has no tensor {missing}; a layer needs {}",
                names.join(", ")
            ))
            .hint("--prefixes names the layers to look at"));
        }
        let read = |name| file.tensor(name).map_err(|failure| failure.context("--input"));
        let tensors = [read(&names[0])?, read(&names[1])?, read(&names[2])?];
        let mut shapes = [[0; 4]; 3];
        for ((shape, tensor), name) in shapes.iter_mut().zip(&tensors).zip(&names) {
            *shape = tensor.shape4(name)?;
        }
        check_shapes(names.each_ref().map(String::as_str), shapes, causal)?;
        for ((tensor, shape), name) in tensors.iter().zip(shapes).zip(&names) {
            check_numbers(name, tensor, shape, dtype)?;
        }
        Ok(Layer { prefix: prefix.into(), shapes, tensors })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_names_sort_as_numbers() {
        let mut names = ["l10.a", "l2.b", "l2.a", "", "a1", "l", "10", "9"];
        names.sort_by_key(|name| natural(name));
        assert_eq!(names, ["", "a1", "l", "l2.a", "l2.b", "l10.a", "9", "10"]);
    }
}

//! Kernel sources, and what each is specialised by.

use std::fmt::{Display, Write};

macro_rules! headers {
    ($($file:literal),* $(,)?) => {
        &[$(($file, include_str!(concat!("../kernels/", $file)))),*]
    };
}

/// Headers that sources may include by name.
const HEADERS: &[(&str, &str)] = headers![
    "backward.cuh",
    "backward_pairs.cuh",
    "decode_finish.cuh",
    "decode_fold.cuh",
    "decode_past.cuh",
    "decode_sums.cuh",
    "decode_team.cuh",
    "decode_tokens.cuh",
    "decode_types.cuh",
    "generic.cuh",
    "hopper.cuh",
    "hopper_device.cuh",
    "hopper_emulated.cuh",
    "hopper_mma.cuh",
    "hopper_read.cuh",
    "mma.cuh",
    "matrix_backward.cuh",
    "prelude.cuh",
    "series.cuh",
    "stream.cuh",
    "stream_backward.cuh",
    "stream_backward_fetch.cuh",
    "stream_backward_pairs.cuh",
    "stream_backward_tables.cuh",
    "stream_hopper.cuh",
    "stream_scan.cuh",
    "stream_sixteen.cuh",
    "stream_types.cuh",
    "stream_wide.cuh",
];

/// A kernel file with its defines: what is compiled, loaded and cached as one.
///
/// Made by [`unit!`](crate::unit), and specialised by [`Unit::define`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Unit {
    file: &'static str,
    text: &'static str,
    defines: Vec<(&'static str, String)>,
    options: Vec<&'static str>,
    hot: bool,
    matrix: bool,
    least: u32,
}

/// The unit of a file of this crate's folder `kernels`, without defines: `unit!("fill.cu")`.
#[macro_export]
macro_rules! unit {
    ($file:literal) => {
        $crate::Unit::new(
            $file,
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/", $file)),
        )
    };
}

impl Unit {
    /// A source `text` that is named `file` in messages.
    pub const fn new(file: &'static str, text: &'static str) -> Self {
        Unit { file, text, defines: vec![], options: vec![], hot: false, matrix: false, least: 80 }
    }

    /// Defines a macro of the source.
    pub fn define(mut self, name: &'static str, value: impl Display) -> Self {
        self.defines.push((name, value.to_string()));
        self
    }

    /// Defines a macro as the size of `P`, to hold the source's own definition of it to.
    pub fn size_of<P>(self, name: &'static str) -> Self {
        self.define(name, size_of::<P>())
    }

    /// Gives the compiler of device code one more option.
    pub fn option(mut self, option: &'static str) -> Self {
        self.options.push(option);
        self
    }

    /// Its kernels are those that time is spent in: registers must not spill to memory.
    pub fn hot(mut self) -> Self {
        self.hot = true;
        self
    }

    /// Its kernels use the matrix units of sm_90a (and it needs one): their code must have HGMMA.
    pub fn matrix(mut self) -> Self {
        self.matrix = true;
        self.least(90)
    }

    /// The lowest architecture that it is written for: 80 for sm_80, which is the default.
    pub fn least(mut self, arch: u32) -> Self {
        self.least = arch;
        self
    }

    /// The file's name.
    pub fn file(&self) -> &'static str {
        self.file
    }

    /// Whether registers must not spill.
    pub fn is_hot(&self) -> bool {
        self.hot
    }

    /// Whether its code must have HGMMA.
    pub fn is_matrix(&self) -> bool {
        self.matrix
    }

    /// The lowest architecture, as in [`Unit::least`].
    pub fn least_arch(&self) -> u32 {
        self.least
    }

    /// More options of the compiler of device code.
    pub fn options(&self) -> &[&'static str] {
        &self.options
    }

    /// The file and the defines, for messages.
    pub fn title(&self) -> String {
        let mut title = self.file.to_string();
        for (name, value) in &self.defines {
            // A string takes whatever is written.
            let _ = write!(title, " {name}={value}");
        }
        title
    }

    /// The whole source: defines, and the file with what it includes.
    pub fn full_text(&self) -> String {
        let mut out = String::new();
        for (name, value) in &self.defines {
            let _ = writeln!(out, "#define {name} {value}");
        }
        expand(self.file, self.text, &mut vec![], &mut out);
        out
    }

    /// The names of the kernels that the file itself defines, in order.
    pub fn kernels(&self) -> Vec<&'static str> {
        self.text.split("__global__").skip(1).filter_map(kernel_name).collect()
    }
}

/// Puts each header in the place of its first `#include`, and takes the others out.
fn expand(file: &str, text: &'static str, done: &mut Vec<&'static str>, out: &mut String) {
    let _ = writeln!(out, "#line 1 \"{file}\"");
    for (i, line) in text.lines().enumerate() {
        let name = line.trim().strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'));
        let header = name.and_then(|name| HEADERS.iter().find(|(header, _)| *header == name));
        match header {
            Some(&(header, text)) => {
                if !done.contains(&header) {
                    done.push(header);
                    expand(header, text, done, out);
                }
                let _ = writeln!(out, "#line {} \"{file}\"", i + 2);
            }
            None if line.trim() == "#pragma once" => out.push('\n'),
            None => {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
}

/// The name in what follows `__global__`: the first word before a parenthesis that is no attribute.
fn kernel_name(after: &'static str) -> Option<&'static str> {
    let mut rest = after;
    loop {
        let open = rest.find('(')?;
        let name = rest[..open].split_whitespace().last()?;
        if !name.starts_with("__") {
            return Some(name);
        }
        // Past the attribute's own parentheses.
        let mut depth = 0;
        let close = rest[open..].find(|c| {
            depth += match c {
                '(' => 1,
                ')' => -1,
                _ => 0,
            };
            depth == 0
        })?;
        rest = &rest[open + close + 1..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_found_by_their_names() {
        let text = "extern \"C\" __global__ void __launch_bounds__(F(256), 2) one(const P p) {}\n\
                    extern \"C\" __global__ void\ntwo(P p) {}\n\
                    extern \"C\" __global__ __launch_bounds__(32) void three (P p) {}";
        assert_eq!(Unit::new("x.cu", text).kernels(), ["one", "two", "three"]);
    }

    #[test]
    fn a_header_is_put_in_once() {
        let text = "#include \"prelude.cuh\"\n#include \"prelude.cuh\"\nint x;\n";
        let full = Unit::new("x.cu", text).define("A", 1).full_text();
        assert!(full.starts_with("#define A 1\n#line 1 \"x.cu\"\n#line 1 \"prelude.cuh\"\n"));
        assert_eq!(full.matches("typedef float f32;").count(), 1);
        assert!(full.ends_with("#line 3 \"x.cu\"\nint x;\n"));
    }
}

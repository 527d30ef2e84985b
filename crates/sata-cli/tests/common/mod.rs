//! Running the program, and files for it.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use tempfile::TempDir;

/// A folder of its own for a test, and the program run in it.
pub struct Room {
    folder: TempDir,
}

/// What a run left.
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Room {
    pub fn new() -> Self {
        Room { folder: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    /// Names of the files there are.
    pub fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    pub fn command(&self, args: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sata"));
        command.current_dir(self.folder.path()).args(args.split_whitespace());
        command
    }

    pub fn run(&self, args: &str) -> Ran {
        Ran::from(self.command(args).output().unwrap())
    }

    /// Runs what must succeed.
    pub fn good(&self, args: &str) -> String {
        let ran = self.run(args);
        assert_eq!(ran.code, Some(0), "sata {args}\n{}", ran.stderr);
        assert_eq!(ran.stderr, "", "sata {args}");
        ran.stdout
    }

    /// Runs what must be refused with all of `words` on stderr, leaving every file as it was.
    pub fn bad(&self, args: &str, words: &[&str]) {
        let before: Vec<_> =
            self.files().into_iter().map(|name| (self.read(&name), name)).collect();
        let ran = self.run(args);
        assert_eq!(ran.code, Some(2), "sata {args}\n{}{}", ran.stdout, ran.stderr);
        assert_eq!(ran.stdout, "", "sata {args}");
        for word in words {
            assert!(ran.stderr.contains(word), "sata {args}: no '{word}' in\n{}", ran.stderr);
        }
        assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
        let after: Vec<_> = self.files().into_iter().map(|name| (self.read(&name), name)).collect();
        assert!(before == after, "sata {args} changed files: {:?}", self.files());
    }

    /// Tensors of a safetensors file, as f64.
    pub fn tensors(&self, name: &str) -> Vec<(String, Tensor)> {
        read_tensors(&self.path(name))
    }

    /// One tensor of a safetensors file.
    pub fn tensor(&self, file: &str, name: &str) -> Tensor {
        find(&self.tensors(file), name).clone()
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Ran {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// Numbers, their shape, and the type that a file holds them in.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<f64>,
}

impl Tensor {
    pub fn new(dtype: Dtype, shape: &[usize], data: Vec<f64>) -> Self {
        let bytes: Vec<u8> = data.iter().flat_map(|&x| encode(dtype, x)).collect();
        // What the file will hold, so that comparisons are with rounded numbers.
        Tensor { dtype, shape: shape.to_vec(), data: decode(dtype, &bytes) }
    }

    /// Numbers of N(0, 1).
    pub fn normal(dtype: Dtype, shape: &[usize], seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let data = (0..shape.iter().product()).map(|_| rng.sample(StandardNormal)).collect();
        Tensor::new(dtype, shape, data)
    }

    /// A `.npy` file of f4 or f8.
    pub fn npy(&self) -> Vec<u8> {
        let descr = if self.dtype == Dtype::F32 { "<f4" } else { "<f8" };
        let shape: Vec<String> = self.shape.iter().map(usize::to_string).collect();
        let header = format!(
            "{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}), }}\n",
            shape.join(", ")
        );
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.bytes());
        bytes.extend(self.bytes());
        bytes
    }

    /// Some tokens of `[heads, tokens]` or `[heads, tokens, dim]`.
    pub fn tokens(&self, range: std::ops::Range<usize>) -> Self {
        let [heads, tokens] = [self.shape[0], self.shape[1]];
        let dim = self.shape.get(2).copied().unwrap_or(1);
        let rows = (0..heads).flat_map(|h| {
            self.data[(h * tokens + range.start) * dim..(h * tokens + range.end) * dim].to_vec()
        });
        let mut shape = self.shape.clone();
        shape[1] = range.len();
        Tensor::new(self.dtype, &shape, rows.collect())
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.data.iter().flat_map(|&x| encode(self.dtype, x)).collect()
    }
}

fn encode(dtype: Dtype, x: f64) -> Vec<u8> {
    match dtype {
        Dtype::F64 => x.to_le_bytes().to_vec(),
        Dtype::F32 => (x as f32).to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f64(x).to_le_bytes().to_vec(),
        Dtype::BF16 => half::bf16::from_f64(x).to_le_bytes().to_vec(),
        Dtype::BOOL => vec![u8::from(x != 0.0)],
        Dtype::I64 => (x as i64).to_le_bytes().to_vec(),
        other => panic!("{other:?}"),
    }
}

fn decode(dtype: Dtype, bytes: &[u8]) -> Vec<f64> {
    match dtype {
        Dtype::F64 => bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
        Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b).into()).collect(),
        Dtype::F16 => {
            bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).into()).collect()
        }
        Dtype::BF16 => {
            bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).into()).collect()
        }
        Dtype::BOOL => bytes.iter().map(|&b| f64::from(b)).collect(),
        Dtype::I64 => bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
        other => panic!("{other:?}"),
    }
}

/// A safetensors file as bytes.
pub fn safe(tensors: &[(&str, &Tensor)]) -> Vec<u8> {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, tensor)| tensor.bytes()).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, tensor), bytes)| {
        (name.to_string(), TensorView::new(tensor.dtype, tensor.shape.clone(), bytes).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

/// All tensors of a safetensors file.
pub fn read_tensors(path: &Path) -> Vec<(String, Tensor)> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |view: &TensorView<'_>| Tensor {
        dtype: view.dtype(),
        shape: view.shape().to_vec(),
        data: decode(view.dtype(), view.data()),
    };
    file.iter().map(|(name, view)| (name.to_string(), tensor(&view))).collect()
}

/// The `__metadata__` entry of a safetensors file.
pub fn remark(path: &Path, key: &str) -> String {
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    header.metadata().as_ref().unwrap()[key].clone()
}

/// One of some tensors.
pub fn find<'a>(tensors: &'a [(String, Tensor)], name: &str) -> &'a Tensor {
    &tensors.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no tensor {name}")).1
}

/// A seed that is printed, or taken from `SATA_TEST_SEED`.
pub fn seed() -> u64 {
    let seed = match std::env::var("SATA_TEST_SEED") {
        Ok(seed) => seed.parse().expect("SATA_TEST_SEED is a number"),
        Err(_) => RandomState::new().build_hasher().finish() >> 8,
    };
    println!("SATA_TEST_SEED={seed}");
    seed
}

/// q, k and v of N(0, 1): heads, key/value heads, queries, keys, d_key, d_value.
pub fn qkv(dtype: Dtype, [heads, kv, queries, keys, d_key, d_value]: [usize; 6]) -> [Tensor; 3] {
    [
        Tensor::normal(dtype, &[heads, queries, d_key], 1),
        Tensor::normal(dtype, &[kv, keys, d_key], 2),
        Tensor::normal(dtype, &[kv, keys, d_value], 3),
    ]
}

/// Those three as a file.
pub fn file([q, k, v]: &[Tensor; 3]) -> Vec<u8> {
    safe(&[("q", q), ("k", k), ("v", v)])
}

/// √(Σ(got−want)² / Σwant²).
pub fn relative_rms(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let difference: f64 = got.iter().zip(want).map(|(g, w)| (g - w) * (g - w)).sum();
    let size: f64 = want.iter().map(|w| w * w).sum();
    (difference / size).sqrt()
}

/// The largest |got−want| over the largest |want|.
pub fn relative_largest(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let largest = |numbers: &mut dyn Iterator<Item = f64>| numbers.fold(0.0, f64::max);
    largest(&mut got.iter().zip(want).map(|(g, w)| (g - w).abs()))
        / largest(&mut want.iter().map(|w| w.abs()))
}

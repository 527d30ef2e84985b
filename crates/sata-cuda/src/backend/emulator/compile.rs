//! Compiling units for the CPU.

use std::ffi::{OsString, c_void};
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::Command;
use std::sync::{Arc, OnceLock};

use libloading::Library;

use super::super::{Entry, KernelProperties, Module};
use crate::cache::{Cache, Key, Loaded};
use crate::{Error, Unit};

const EMULATOR: &str = include_str!("../../../emulator/emu.hpp");

/// The system's C++ compiler.
#[derive(Debug)]
pub(super) struct Compiler {
    command: Vec<OsString>,
    version: String,
}

/// The one that `SATA_CXX` or `CXX` names, else the first that there is.
pub(super) fn compiler() -> Result<&'static Compiler, Error> {
    static COMPILER: OnceLock<Result<Compiler, String>> = OnceLock::new();
    let found = COMPILER.get_or_init(|| {
        let named = ["SATA_CXX", "CXX"].into_iter().find_map(|name| {
            let words: Vec<OsString> =
                std::env::var(name).ok()?.split_whitespace().map(OsString::from).collect();
            (!words.is_empty()).then_some(words)
        });
        let usual = || ["c++", "g++", "clang++"].map(|name| vec![OsString::from(name)]).to_vec();
        let mut tried = String::new();
        for command in named.map_or_else(usual, |named| vec![named]) {
            let output = Command::new(&command[0]).args(&command[1..]).arg("--version").output();
            match output {
                Ok(output) if output.status.success() => {
                    let version = String::from_utf8_lossy(&output.stdout).into_owned();
                    return Ok(Compiler { command, version });
                }
                Ok(output) => {
                    let _ = write!(tried, " {}: {};", command[0].display(), output.status);
                }
                Err(error) => {
                    let _ = write!(tried, " {}: {error};", command[0].display());
                }
            }
        }
        Err(format!("there is no C++ compiler (SATA_CXX or CXX may name one):{tried}"))
    });
    found.as_ref().map_err(|reason| Error::NoEmulator { reason: reason.clone() })
}

fn flags() -> Vec<&'static str> {
    let mut flags = vec![
        "-std=c++17",
        // More takes longer than it saves.
        "-O1",
        "-fPIC",
        "-shared",
        "-fno-strict-aliasing",
        "-fno-exceptions",
        "-fno-rtti",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fno-stack-protector",
        "-fcf-protection=none",
        "-fvisibility=hidden",
        "-w",
        "-DSATA_EMULATOR",
    ];
    #[cfg(not(target_arch = "x86_64"))]
    flags.retain(|flag| !flag.starts_with("-fcf"));
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
        flags.extend(["-mavx2", "-mfma"]);
    }
    flags
}

/// Compiled and loaded, once in this process.
pub(super) fn load(unit: &Unit) -> Result<Arc<dyn Module>, Error> {
    static LOADED: OnceLock<Loaded<Code>> = OnceLock::new();
    let compiler = compiler()?;
    let text = full_text(unit);
    let flags = flags();
    let parts = ["emulator", &compiler.version, &text];
    let key = Key::of(parts.into_iter().chain(flags.iter().copied()));
    let code = LOADED.get_or_init(Loaded::default).get_or(key, || {
        let object = Cache::usual().get_or(key, || compile(compiler, unit, &text, &flags))?;
        open(unit, &object)
    })?;
    Ok(code)
}

fn full_text(unit: &Unit) -> String {
    let mut text = format!("#line 1 \"emu.hpp\"\n{EMULATOR}\n{}", unit.full_text());
    for kernel in unit.kernels() {
        // A string takes whatever is written.
        let _ = writeln!(text, "SATA_EMU_ENTRY({kernel})");
    }
    text.replace("#pragma once", "")
}

fn compile(compiler: &Compiler, unit: &Unit, text: &str, flags: &[&str]) -> Result<Vec<u8>, Error> {
    let io = |doing, source| Error::Io { path: std::env::temp_dir(), doing, source };
    let folder = tempfile::tempdir().map_err(|e| io("making a folder to compile in", e))?;
    let (source, object) = (folder.path().join("kernel.cpp"), folder.path().join("kernel.so"));
    std::fs::write(&source, text).map_err(|e| io("writing a source", e))?;
    let output = Command::new(&compiler.command[0])
        .args(&compiler.command[1..])
        .args(flags)
        .arg(&source)
        .arg("-o")
        .arg(&object)
        .output()
        .map_err(|e| io("running the C++ compiler", e))?;
    if !output.status.success() {
        return Err(Error::Compile {
            kernel: unit.title(),
            arch: "the emulator".into(),
            log: String::from_utf8_lossy(&output.stderr).into_owned(),
        });
    }
    std::fs::read(&object).map_err(|e| io("reading compiled code", e))
}

/// Code in this process.
#[derive(Debug)]
struct Code {
    title: String,
    library: Library,
}

fn open(unit: &Unit, object: &[u8]) -> Result<Code, Error> {
    let title = unit.title();
    let io = |doing, source| Error::Io { path: std::env::temp_dir(), doing, source };
    let mut file = tempfile::NamedTempFile::new().map_err(|e| io("making a file to load", e))?;
    file.write_all(object).map_err(|e| io("writing code to load", e))?;
    // SAFETY: the library was compiled from our sources, and does nothing when it is loaded.
    let library = unsafe { Library::new(file.path()) };
    let library =
        library.map_err(|e| Error::NoEmulator { reason: format!("loading {title}: {e}") })?;
    Ok(Code { title, library })
}

impl Module for Code {
    fn entry(&self, name: &str) -> Result<(Entry, KernelProperties), Error> {
        let symbol = format!("sata_emu_{name}");
        // SAFETY: only its address is taken.
        let address = unsafe { self.library.get::<*mut c_void>(symbol.as_bytes()) };
        let address = address.map_err(|_| Error::Launch {
            kernel: name.into(),
            grid: [0; 3],
            block: [0; 3],
            shared: 0,
            reason: format!("{} has no such kernel", self.title),
        })?;
        let properties = KernelProperties { max_threads: 1024, ..Default::default() };
        Ok((Entry(*address), properties))
    }
}

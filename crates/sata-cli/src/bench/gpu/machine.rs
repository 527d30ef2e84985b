//! The GPU, its driver and compiler, and how fast it copies.

use std::process::Command;

use sata_cuda::Device;
use sata_cuda::nvrtc::Nvrtc;
use serde::Serialize;

use super::timer::copy_rate;
use crate::failure::Outcome;
use crate::table::{bytes, three};

/// What was measured on.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The GPU's name.
    pub name: String,
    /// What kernels are compiled for.
    pub arch: String,
    /// The driver's version, where the system says it.
    pub driver: Option<String>,
    /// The run-time compiler's version.
    pub nvrtc: Option<String>,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of the L2 cache.
    pub l2_bytes: usize,
    /// Bytes of memory.
    pub memory_bytes: usize,
    /// Bytes per second of a large copy on the device, bytes read and bytes written together.
    pub copy_bytes_per_second: f64,
}

impl Machine {
    /// Asks the device, and measures its copy.
    ///
    /// # Errors
    /// What the device says.
    pub fn of(device: &Device, copy_bytes: usize, runs: usize) -> Outcome<Self> {
        let properties = device.properties();
        let nvrtc = if device.is_emulated() { None } else { Nvrtc::get().ok() };
        Ok(Machine {
            name: properties.name.clone(),
            arch: properties.arch(),
            driver: driver(),
            nvrtc: nvrtc.map(Nvrtc::version).map(|(major, minor)| format!("{major}.{minor}")),
            multiprocessors: properties.multiprocessors,
            l2_bytes: properties.l2_bytes,
            memory_bytes: properties.memory,
            copy_bytes_per_second: copy_rate(device, copy_bytes, runs.max(7))?,
        })
    }

    /// In one line.
    pub fn line(&self) -> String {
        let version = |name: &str, version: &Option<String>| match version {
            Some(version) => format!(", {name} {version}"),
            None => String::new(),
        };
        format!(
            "{} ({}{}{}), {} multiprocessors, {} L2, {} memory; copy {} GB/s read and written",
            self.name,
            self.arch,
            version("driver", &self.driver),
            version("NVRTC", &self.nvrtc),
            self.multiprocessors,
            bytes(self.l2_bytes as u128),
            bytes(self.memory_bytes as u128),
            three(self.copy_bytes_per_second / 1e9),
        )
    }
}

/// The driver's version: from the kernel's module, or its own program.
pub fn driver() -> Option<String> {
    let module = std::fs::read_to_string("/proc/driver/nvidia/version").ok();
    module.as_deref().and_then(version).or_else(|| {
        let said = Command::new("nvidia-smi")
            .args(["--query-gpu=driver_version", "--format=csv,noheader"])
            .output()
            .ok()
            .filter(|said| said.status.success())?;
        version(&String::from_utf8_lossy(&said.stdout))
    })
}

/// The first word that looks like 580.159.04.
fn version(text: &str) -> Option<String> {
    let is_version =
        |word: &&str| word.contains('.') && word.split('.').all(|part| part.parse::<u32>().is_ok());
    text.split_whitespace().find(is_version).map(str::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        let module = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release";
        assert_eq!(version(module).as_deref(), Some("580.159.04"));
        assert_eq!(version("550.54.15\n").as_deref(), Some("550.54.15"));
        assert_eq!(version("no devices"), None);
    }
}

//! What runs kernels: the driver of a GPU, or the emulator.

pub(crate) mod driver;
#[cfg(all(feature = "emulator", unix))]
pub(crate) mod emulator;
#[cfg(all(feature = "emulator", unix))]
pub(crate) mod offline;

use std::ffi::c_void;
use std::sync::Arc;

use crate::{Error, Unit};

/// A stream, by the backend's own handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stream(pub *mut c_void);

// SAFETY: the handle of a stream may be used from any thread; the driver takes care of it.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Properties {
    /// Its name.
    pub name: String,
    /// Compute capability, such as (9, 0).
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Most bytes of shared memory that a block may ask for.
    pub shared_per_block: u32,
    /// Bytes of the L2 cache.
    pub l2_bytes: usize,
    /// Bytes of memory.
    pub memory: usize,
}

impl Properties {
    /// What code is compiled for: `sm_90a` on Hopper, `sm_XX` elsewhere.
    pub fn arch(&self) -> String {
        match self.capability {
            (9, 0) => "sm_90a".into(),
            (major, minor) => format!("sm_{major}{minor}"),
        }
    }
}

/// Blocks, threads, and shared memory of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y, z.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory per block.
    pub shared: u32,
}

impl Launch {
    /// `blocks` blocks of `threads` threads, without dynamic shared memory.
    pub fn linear(blocks: u32, threads: u32) -> Self {
        Launch { grid: [blocks, 1, 1], block: [threads, 1, 1], shared: 0 }
    }

    /// The same with dynamic shared memory.
    pub fn shared(mut self, bytes: u32) -> Self {
        self.shared = bytes;
        self
    }

    /// Threads of a block.
    pub fn threads(&self) -> u64 {
        self.block.iter().map(|&n| u64::from(n)).product()
    }

    /// Why no GPU takes it whose blocks have at most so many bytes of shared memory.
    #[cfg(all(feature = "emulator", unix))]
    pub(crate) fn fault(&self, most_shared: u32) -> Option<String> {
        let threads = self.threads();
        Some(if self.grid.contains(&0) || threads == 0 {
            "a size is 0".to_string()
        } else if threads > 1024 || self.block[2] > 64 {
            "a block has at most 1024 threads, 64 of them in z".to_string()
        } else if self.grid[0] > i32::MAX as u32 || self.grid[1].max(self.grid[2]) > 65_535 {
            "a grid has at most 2147483647, 65535 and 65535 blocks in x, y and z".to_string()
        } else if self.shared > most_shared {
            format!("a block has at most {most_shared} bytes of shared memory")
        } else {
            return None;
        })
    }
}

/// What the compiler and loader say of a kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelProperties {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of local memory of a thread, among them spilled registers.
    pub local_bytes: u32,
    /// Bytes of static shared memory of a block.
    pub static_shared: u32,
    /// Most threads of a block.
    pub max_threads: u32,
}

/// A kernel's entry point, by the backend's own handle.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry(pub *mut c_void);

// SAFETY: it names code, which any thread may launch.
unsafe impl Send for Entry {}
// SAFETY: as above.
unsafe impl Sync for Entry {}

/// Loaded code.
pub(crate) trait Module: Send + Sync + std::fmt::Debug {
    fn entry(&self, name: &str) -> Result<(Entry, KernelProperties), Error>;
}

/// Something that was recorded, to be run again.
pub(crate) trait Recorded: Send + Sync + std::fmt::Debug {
    fn run(&self, stream: Stream) -> Result<(), Error>;
}

/// A point in a stream's time.
pub(crate) trait Moment: Send + Sync + std::fmt::Debug {
    /// Seconds from `earlier`, which is of the same backend, to this, which is waited for.
    fn since(&self, earlier: &dyn Moment) -> Result<f64, Error>;
    fn as_any(&self) -> &dyn std::any::Any;
}

/// Memory and launches. Addresses are the device's, or the process's own in the emulator.
pub(crate) trait Backend: Send + Sync + std::fmt::Debug {
    fn properties(&self) -> &Properties;
    /// Bytes free and in all.
    fn memory(&self) -> Result<(usize, usize), Error>;
    fn compile(&self, unit: &Unit) -> Result<Arc<dyn Module>, Error>;
    /// The stream that a device begins with.
    fn stream(&self) -> Stream;
    fn is_emulated(&self) -> bool;

    /// At least 1 byte, aligned to 16 at least. What it holds is undefined.
    fn alloc(&self, bytes: usize, stream: Stream) -> Result<u64, Error>;
    /// # Safety
    /// `address` comes from `alloc` with the same `bytes`, and only what was enqueued before uses it.
    unsafe fn free(&self, address: u64, bytes: usize, stream: Stream);
    /// # Safety
    /// `bytes` bytes at `to` are allocated.
    unsafe fn fill(&self, to: u64, byte: u8, bytes: usize, stream: Stream) -> Result<(), Error>;
    /// Returns when `from` may change.
    /// # Safety
    /// As many bytes as `from` has are allocated at `to`.
    unsafe fn upload(&self, to: u64, from: &[u8], stream: Stream) -> Result<(), Error>;
    /// Returns when `to` holds the bytes; so it waits for all before it.
    /// # Safety
    /// As many bytes as `to` has are allocated at `from`.
    unsafe fn download(&self, to: &mut [u8], from: u64, stream: Stream) -> Result<(), Error>;
    /// # Safety
    /// `bytes` bytes are allocated at both, which do not overlap.
    unsafe fn copy(&self, to: u64, from: u64, bytes: usize, stream: Stream) -> Result<(), Error>;
    /// # Safety
    /// `arguments` are those of the kernel, by address, and what they point to may be used as the
    /// kernel does.
    unsafe fn launch(
        &self,
        kernel: &str,
        entry: Entry,
        launch: Launch,
        arguments: &mut [*mut c_void],
        sizes: &[usize],
        stream: Stream,
    ) -> Result<(), Error>;
    fn synchronize(&self, stream: Stream) -> Result<(), Error>;

    fn record(&self, stream: Stream) -> Result<Box<dyn Moment>, Error>;
    fn begin_capture(&self, stream: Stream) -> Result<(), Error>;
    fn end_capture(&self, stream: Stream) -> Result<Box<dyn Recorded>, Error>;
}

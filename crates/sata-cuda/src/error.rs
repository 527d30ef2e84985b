//! What can go wrong on the way to a GPU, one sentence each.

use std::path::PathBuf;

/// Everything that this crate refuses or fails at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The call, spec or state is not right, for the same reasons as on the CPU.
    #[error(transparent)]
    Call(#[from] sata::Error),
    /// There is no NVIDIA driver on this machine.
    #[error("no NVIDIA driver: {reason}")]
    NoDriver {
        /// What was looked for, or what the driver said.
        reason: String,
    },
    /// The driver has no such device.
    #[error("there is no GPU {ordinal}: the driver has {count}")]
    NoDevice {
        /// What was asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The GPU is older than any that the kernels are written for.
    #[error("{name} is sm_{major}{minor}; the kernels need sm_80 or later")]
    TooOld {
        /// The device's name.
        name: String,
        /// Its compute capability.
        major: u32,
        /// Likewise.
        minor: u32,
    },
    /// No compiler for the kernels was found.
    #[error(
        "no compiler for CUDA kernels (NVRTC): {reason}; install it (pip install \
         nvidia-cuda-nvrtc) and name libnvrtc in SATA_NVRTC, or put it on the loader's path"
    )]
    NoCompiler {
        /// What was tried.
        reason: String,
    },
    /// The emulator could not run: it needs a C++ compiler and a Unix.
    #[error("the emulator cannot run here: {reason}")]
    NoEmulator {
        /// Why not.
        reason: String,
    },
    /// A kernel did not compile. This is a fault of this crate or of the compiler's version.
    #[error("{kernel} does not compile for {arch}:\n{log}")]
    Compile {
        /// The kernel's file and defines.
        kernel: String,
        /// What it was compiled for.
        arch: String,
        /// The compiler's words.
        log: String,
    },
    /// The device's memory is not enough.
    #[error("{bytes} bytes were asked for on {device}, which has {free} of {total} free")]
    OutOfMemory {
        /// The device's name.
        device: String,
        /// What was asked for.
        bytes: usize,
        /// What was free.
        free: usize,
        /// What there is.
        total: usize,
    },
    /// A kernel could not be launched.
    #[error(
        "launching {kernel} with grid {grid:?}, block {block:?}, {shared} bytes shared: {reason}"
    )]
    Launch {
        /// The kernel.
        kernel: String,
        /// Blocks.
        grid: [u32; 3],
        /// Threads of a block.
        block: [u32; 3],
        /// Bytes of dynamic shared memory.
        shared: u32,
        /// What was wrong.
        reason: String,
    },
    /// The driver refused something, or reports what an earlier kernel did.
    #[error("{doing}: {reason} (CUDA error {code})")]
    Driver {
        /// What was being done.
        doing: &'static str,
        /// The driver's word.
        reason: String,
        /// Its number.
        code: u32,
    },
    /// Something is not done on GPUs.
    #[error("{what} is not supported on the GPU")]
    Unsupported {
        /// The feature asked for.
        what: String,
    },
    /// An argument lies on another device, or has another size than what it is copied to.
    #[error("{argument}: {reason}")]
    Argument {
        /// The argument at fault.
        argument: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The operating system refused a file operation.
    #[error("{}: {doing}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// The system's word.
        source: std::io::Error,
    },
}

impl Error {
    pub(crate) fn argument(argument: &'static str, reason: impl Into<String>) -> Self {
        Error::Argument { argument, reason: reason.into() }
    }
}

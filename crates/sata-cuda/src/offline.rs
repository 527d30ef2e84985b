//! Kernels without a GPU: what calls on a given device compile and launch, compiled by NVRTC and
//! looked at, with nothing run.
//!
//! A [`Target`] gives a [`Device`] that is not there. Calls on it choose and compile kernels as on
//! that GPU; launches are only checked for what the GPU would refuse; results are 0.

use std::sync::Arc;

use crate::backend::offline::Offline;
use crate::{Device, Error, Properties, Unit};

/// A GPU to compile for.
#[derive(Clone, Debug)]
pub struct Target {
    backend: Arc<Offline>,
}

impl Target {
    /// One of these properties.
    ///
    /// # Errors
    /// [`Error::NoCompiler`].
    pub fn new(properties: Properties) -> Result<Self, Error> {
        Ok(Target { backend: Arc::new(Offline::new(properties)?) })
    }

    /// NVIDIA's H100 (SXM): `sm_90a`.
    ///
    /// # Errors
    /// As for [`Target::new`].
    pub fn h100() -> Result<Self, Error> {
        Self::new(Properties {
            name: "H100".into(),
            capability: (9, 0),
            multiprocessors: 132,
            shared_per_block: 227 << 10,
            l2_bytes: 50 << 20,
            memory: 80 << 30,
        })
    }

    /// NVIDIA's A100: `sm_80`.
    ///
    /// # Errors
    /// As for [`Target::new`].
    pub fn a100() -> Result<Self, Error> {
        Self::new(Properties {
            name: "A100".into(),
            capability: (8, 0),
            multiprocessors: 108,
            shared_per_block: 163 << 10,
            l2_bytes: 40 << 20,
            memory: 80 << 30,
        })
    }

    /// The device.
    pub fn device(&self) -> Device {
        Device::of(self.backend.clone())
    }

    /// What has been compiled for it so far.
    pub fn compiled(&self) -> Vec<Arc<Compilation>> {
        self.backend.done()
    }
}

/// A unit that has been compiled.
#[derive(Clone, Debug)]
pub struct Compilation {
    /// The unit.
    pub unit: Unit,
    /// What it was compiled for.
    pub arch: String,
    /// Machine code, an ELF file.
    pub cubin: Vec<u8>,
    /// Its kernels.
    pub kernels: Vec<KernelReport>,
    /// How long it took, or how long it took to find it in the cache.
    pub seconds: f64,
}

/// What the assembler says of a kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelReport {
    /// Its name.
    pub name: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of a thread's stack: arrays that are not in registers.
    pub stack: u32,
    /// Bytes of instructions that write registers to memory for want of more.
    pub spill_stores: u32,
    /// Bytes of those that read them back.
    pub spill_loads: u32,
    /// Bytes of static shared memory.
    pub static_shared: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Buffer, Launch, unit};

    #[derive(Clone, Copy)]
    #[repr(C)]
    struct Fill {
        y: u64,
        x: u64,
        count: i64,
        value: f32,
    }

    /// Where there is no compiler there is nothing to see; `scripts/kernels` brings one.
    fn target() -> Option<Target> {
        match Target::h100() {
            Ok(target) => Some(target),
            Err(Error::NoCompiler { .. }) => None,
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn compiles_and_launches_nothing() {
        let Some(target) = target() else { return };
        let device = target.device();
        let unit = unit!("fill.cu").define("NUMBER", "bf16").size_of::<Fill>("FILL_BYTES");
        let kernel = device.kernel(&unit, "fill").unwrap();
        assert!(kernel.properties().registers > 0);
        let y = Buffer::<u16>::zeroed(&device, 8).unwrap();
        let p = Fill { y: y.address(), x: 0, count: 8, value: 1.0 };
        // SAFETY: nothing is run.
        unsafe { kernel.launch(Launch::linear(1, 256), &p) }.unwrap();
        assert_eq!(y.to_vec().unwrap(), [0; 8]);
        // SAFETY: as above.
        let refused = unsafe { kernel.launch(Launch::linear(1, 256).shared(228 << 10), &p) };
        assert!(matches!(refused, Err(Error::Launch { .. })));
        device.kernel(&unit, "add_scaled").unwrap();
        let compiled = target.compiled();
        assert_eq!(compiled.len(), 1);
        assert_eq!(compiled[0].arch, "sm_90a");
        assert!(compiled[0].cubin.starts_with(b"\x7fELF"));
        assert_eq!(compiled[0].kernels.len(), 2);
        assert!(matches!(device.kernel(&unit, "fil"), Err(Error::Launch { .. })));
    }

    #[test]
    fn what_does_not_compile_is_told_with_its_log() {
        let Some(target) = target() else { return };
        let unit = unit!("fill.cu").define("NUMBER", "bf16").define("FILL_BYTES", 3);
        match target.device().kernel(&unit, "fill") {
            Err(Error::Compile { arch, log, .. }) => {
                assert_eq!(arch, "sm_90a");
                assert!(log.contains("fill.cu(16)"), "{log}");
                assert!(log.contains("Fill differs from its definition in Rust"), "{log}");
            }
            other => panic!("{other:?}"),
        }
    }
}

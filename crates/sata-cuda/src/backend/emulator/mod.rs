//! Kernels on the CPU: compiled from the same sources by the system's C++ compiler, each CUDA thread
//! a fiber (`emulator/emu.hpp`). For tests: memory is guarded and begins as NaN.

mod compile;
mod memory;
mod run;

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::{Backend, Entry, Launch, Module, Moment, Properties, Recorded, Stream};
use crate::{Error, Unit};

/// The CPU as a device.
#[derive(Debug)]
pub(crate) struct Emulator {
    properties: Properties,
    /// What is being recorded.
    recording: Mutex<Option<Vec<Step>>>,
}

/// Something to do again.
#[derive(Debug)]
enum Step {
    Fill { to: u64, byte: u8, bytes: usize },
    Copy { to: u64, from: u64, bytes: usize },
    Launch { kernel: String, entry: Entry, launch: Launch, arguments: Vec<Vec<u64>> },
}

impl Emulator {
    /// In place of a GPU of this compute capability.
    pub(crate) fn new(capability: (u32, u32)) -> Result<Self, Error> {
        compile::compiler()?;
        let properties = Properties {
            name: "emulated".into(),
            capability,
            multiprocessors: run::threads() as u32,
            shared_per_block: run::MOST_SHARED,
            l2_bytes: 1 << 20,
            memory: 1 << 34,
        };
        Ok(Emulator { properties, recording: Mutex::new(None) })
    }

    /// Keeps the step if there is a recording, else does it.
    fn step(&self, step: Step) -> Result<(), Error> {
        let mut recording = self.recording.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *recording {
            Some(steps) => {
                steps.push(step);
                Ok(())
            }
            None => {
                drop(recording);
                step.run()
            }
        }
    }

    fn refuse_in_recording(&self, doing: &'static str) -> Result<(), Error> {
        match &*self.recording.lock().unwrap_or_else(PoisonError::into_inner) {
            None => Ok(()),
            Some(_) => {
                let reason = "operation not permitted when stream is capturing".into();
                Err(Error::Driver { doing, reason, code: 900 })
            }
        }
    }
}

impl Step {
    fn run(&self) -> Result<(), Error> {
        match self {
            // SAFETY: whoever enqueued the step promised that this memory is there.
            &Step::Fill { to, byte, bytes } => unsafe {
                std::ptr::write_bytes(to as *mut u8, byte, bytes);
            },
            // SAFETY: as above, and that the two do not overlap.
            &Step::Copy { to, from, bytes } => unsafe {
                std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes);
            },
            Step::Launch { kernel, entry, launch, arguments } => {
                let mut copies = arguments.clone();
                let mut pointers: Vec<*mut c_void> =
                    copies.iter_mut().map(|bytes| bytes.as_mut_ptr().cast()).collect();
                // SAFETY: the arguments are copies of those that the launch was promised to fit.
                unsafe { run::run(kernel, *entry, *launch, &mut pointers) }?;
            }
        }
        Ok(())
    }
}

impl Backend for Emulator {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn memory(&self) -> Result<(usize, usize), Error> {
        Ok((self.properties.memory, self.properties.memory))
    }

    fn compile(&self, unit: &Unit) -> Result<Arc<dyn Module>, Error> {
        compile::load(unit)
    }

    fn stream(&self) -> Stream {
        Stream(std::ptr::null_mut())
    }

    fn is_emulated(&self) -> bool {
        true
    }

    fn alloc(&self, bytes: usize, _: Stream) -> Result<u64, Error> {
        self.refuse_in_recording("allocating memory")?;
        memory::alloc(bytes).ok_or_else(|| Error::OutOfMemory {
            device: self.properties.name.clone(),
            bytes,
            free: self.properties.memory,
            total: self.properties.memory,
        })
    }

    unsafe fn free(&self, address: u64, bytes: usize, _: Stream) {
        // SAFETY: promised by the caller.
        unsafe { memory::free(address, bytes) };
    }

    unsafe fn fill(&self, to: u64, byte: u8, bytes: usize, _: Stream) -> Result<(), Error> {
        self.step(Step::Fill { to, byte, bytes })
    }

    unsafe fn upload(&self, to: u64, from: &[u8], _: Stream) -> Result<(), Error> {
        self.refuse_in_recording("copying to the device")?;
        Step::Copy { to, from: from.as_ptr() as u64, bytes: from.len() }.run()
    }

    unsafe fn download(&self, to: &mut [u8], from: u64, _: Stream) -> Result<(), Error> {
        self.refuse_in_recording("copying from the device")?;
        Step::Copy { to: to.as_mut_ptr() as u64, from, bytes: to.len() }.run()
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize, _: Stream) -> Result<(), Error> {
        self.step(Step::Copy { to, from, bytes })
    }

    unsafe fn launch(
        &self,
        kernel: &str,
        entry: Entry,
        launch: Launch,
        arguments: &mut [*mut c_void],
        sizes: &[usize],
        _: Stream,
    ) -> Result<(), Error> {
        run::check(kernel, launch)?;
        let copy = |(&from, &bytes): (&*mut c_void, &usize)| {
            let mut words = vec![0u64; bytes.div_ceil(8).max(1)];
            // SAFETY: `from` points to an argument of `bytes` bytes, by the caller's promise.
            unsafe {
                std::ptr::copy_nonoverlapping(from.cast::<u8>(), words.as_mut_ptr().cast(), bytes);
            }
            words
        };
        let arguments = arguments.iter().zip(sizes).map(copy).collect();
        self.step(Step::Launch { kernel: kernel.to_string(), entry, launch, arguments })
    }

    fn synchronize(&self, _: Stream) -> Result<(), Error> {
        self.refuse_in_recording("waiting for the device")
    }

    fn record(&self, _: Stream) -> Result<Box<dyn Moment>, Error> {
        Ok(Box::new(Instant::now()))
    }

    fn begin_capture(&self, _: Stream) -> Result<(), Error> {
        self.refuse_in_recording("beginning a capture")?;
        *self.recording.lock().unwrap_or_else(PoisonError::into_inner) = Some(vec![]);
        Ok(())
    }

    fn end_capture(&self, _: Stream) -> Result<Box<dyn Recorded>, Error> {
        let steps = self.recording.lock().unwrap_or_else(PoisonError::into_inner).take();
        match steps {
            Some(steps) => Ok(Box::new(Steps(steps))),
            None => {
                let reason = "the stream is not capturing".into();
                Err(Error::Driver { doing: "ending a capture", reason, code: 901 })
            }
        }
    }
}

/// A recording.
#[derive(Debug)]
struct Steps(Vec<Step>);

impl Recorded for Steps {
    fn run(&self, _: Stream) -> Result<(), Error> {
        self.0.iter().try_for_each(Step::run)
    }
}

impl Moment for Instant {
    fn since(&self, earlier: &dyn Moment) -> Result<f64, Error> {
        let earlier = earlier.as_any().downcast_ref::<Instant>();
        let earlier =
            earlier.ok_or_else(|| Error::argument("moment", "it is of another device"))?;
        Ok(self.saturating_duration_since(*earlier).as_secs_f64())
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

//! A device that is not there: kernels are compiled for it and nothing runs. What calls would
//! compile and launch on it can be looked at, on a machine without any.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::{
    Backend, Entry, KernelProperties, Launch, Module, Moment, Properties, Recorded, Stream,
};
use crate::cache::{Cache, Key, Loaded};
use crate::nvrtc::Nvrtc;
use crate::offline::{Compilation, KernelReport};
use crate::{Error, Unit};

/// Registers of a multiprocessor, and so of a block at most.
const REGISTERS: u64 = 65_536;

/// See the module's page.
#[derive(Debug)]
pub(crate) struct Offline {
    properties: Properties,
    loaded: Loaded<Code>,
    done: Mutex<Vec<Arc<Compilation>>>,
}

impl Offline {
    pub(crate) fn new(properties: Properties) -> Result<Self, Error> {
        Nvrtc::get()?;
        Ok(Offline { properties, loaded: Loaded::default(), done: Mutex::default() })
    }

    /// What has been compiled so far.
    pub(crate) fn done(&self) -> Vec<Arc<Compilation>> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn load(&self, unit: &Unit) -> Result<Code, Error> {
        let arch = self.properties.arch();
        let nvrtc = Nvrtc::get()?;
        let (major, minor) = nvrtc.version();
        let version = format!("nvrtc {major}.{minor}");
        let (text, options) = (unit.full_text(), Nvrtc::options(unit, &arch));
        let parts = ["offline", version.as_str(), &text];
        let key = Key::of(parts.into_iter().chain(options.iter().map(String::as_str)));
        let start = Instant::now();
        // The log's length, the log, the code.
        let both = Cache::usual().get_or(key, || {
            let compiled = nvrtc.compile(unit, &arch, true)?;
            let len = (compiled.log.len() as u64).to_le_bytes();
            Ok([&len[..], compiled.log.as_bytes(), &compiled.cubin].concat())
        })?;
        let torn = || Error::NoCompiler { reason: "its cached log is torn".into() };
        let (len, rest) = both.split_first_chunk::<8>().ok_or_else(torn)?;
        let len = usize::try_from(u64::from_le_bytes(*len)).ok();
        let (log, cubin) = len.and_then(|len| rest.split_at_checked(len)).ok_or_else(torn)?;
        let kernels = reports(&String::from_utf8_lossy(log));
        let compilation = Arc::new(Compilation {
            unit: unit.clone(),
            arch,
            cubin: cubin.to_vec(),
            kernels,
            seconds: start.elapsed().as_secs_f64(),
        });
        self.done.lock().unwrap_or_else(PoisonError::into_inner).push(compilation.clone());
        Ok(Code(compilation))
    }
}

/// What the assembler's log tells of each kernel.
fn reports(log: &str) -> Vec<KernelReport> {
    let mut reports: Vec<KernelReport> = vec![];
    let number = |text: &str, before: &str| {
        let at = text.find(before)?;
        text[..at].trim_end().rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let name = rest.split('\'').next().unwrap_or("").to_string();
            reports.push(KernelReport { name, ..KernelReport::default() });
        }
        let Some(report) = reports.last_mut() else {
            continue;
        };
        for (before, to) in [
            (" bytes stack frame", &mut report.stack),
            (" bytes spill stores", &mut report.spill_stores),
            (" bytes spill loads", &mut report.spill_loads),
            (" registers", &mut report.registers),
            (" bytes smem", &mut report.static_shared),
        ] {
            if let Some(x) = number(line, before) {
                *to = x;
            }
        }
    }
    reports
}

/// Compiled code.
#[derive(Debug)]
struct Code(Arc<Compilation>);

impl Module for Code {
    fn entry(&self, name: &str) -> Result<(Entry, KernelProperties), Error> {
        let report = self.0.kernels.iter().find(|report| report.name == name);
        let report = report.ok_or_else(|| Error::Launch {
            kernel: name.into(),
            grid: [0; 3],
            block: [0; 3],
            shared: 0,
            reason: format!("{} has no such kernel", self.0.unit.title()),
        })?;
        let properties = KernelProperties {
            registers: report.registers,
            local_bytes: report.stack,
            static_shared: report.static_shared,
            max_threads: 1024,
        };
        // Its report, which lives as long as the module.
        Ok((Entry(std::ptr::from_ref(report).cast_mut().cast()), properties))
    }
}

impl Backend for Offline {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn memory(&self) -> Result<(usize, usize), Error> {
        Ok((self.properties.memory, self.properties.memory))
    }

    fn compile(&self, unit: &Unit) -> Result<Arc<dyn Module>, Error> {
        let arch = self.properties.arch();
        let text = unit.full_text();
        let options = Nvrtc::options(unit, &arch);
        let key = Key::of([text.as_str()].into_iter().chain(options.iter().map(String::as_str)));
        Ok(self.loaded.get_or(key, || self.load(unit))?)
    }

    fn stream(&self) -> Stream {
        Stream(std::ptr::null_mut())
    }

    fn is_emulated(&self) -> bool {
        false
    }

    fn alloc(&self, bytes: usize, _: Stream) -> Result<u64, Error> {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_NORESERVE,
        );
        // SAFETY: a new mapping of our own, of which only what is written takes memory.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes.max(1), protection, flags, -1, 0) };
        if base == libc::MAP_FAILED || bytes > self.properties.memory {
            let (device, total) = (self.properties.name.clone(), self.properties.memory);
            return Err(Error::OutOfMemory { device, bytes, free: total, total });
        }
        Ok(base as u64)
    }

    unsafe fn free(&self, address: u64, bytes: usize, _: Stream) {
        // SAFETY: the whole mapping that `alloc` made.
        unsafe { libc::munmap(address as *mut c_void, bytes.max(1)) };
    }

    unsafe fn fill(&self, to: u64, byte: u8, bytes: usize, _: Stream) -> Result<(), Error> {
        // New memory is 0, and large arrays are of no interest.
        if bytes <= 1 << 20 {
            // SAFETY: promised by the caller.
            unsafe { std::ptr::write_bytes(to as *mut u8, byte, bytes) };
        }
        Ok(())
    }

    unsafe fn upload(&self, to: u64, from: &[u8], _: Stream) -> Result<(), Error> {
        // SAFETY: promised by the caller.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len()) };
        Ok(())
    }

    unsafe fn download(&self, to: &mut [u8], from: u64, _: Stream) -> Result<(), Error> {
        // SAFETY: promised by the caller.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize, _: Stream) -> Result<(), Error> {
        if bytes <= 1 << 20 {
            // SAFETY: promised by the caller.
            unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        }
        Ok(())
    }

    unsafe fn launch(
        &self,
        kernel: &str,
        entry: Entry,
        launch: Launch,
        _: &mut [*mut c_void],
        _: &[usize],
        _: Stream,
    ) -> Result<(), Error> {
        // SAFETY: entries are reports of modules that are held by whoever launches.
        let report = unsafe { &*entry.0.cast::<KernelReport>() };
        let Launch { grid, block, shared } = launch;
        let most = self.properties.shared_per_block;
        // Registers go to warps in portions of 256.
        let each = u64::from((report.registers * 32).next_multiple_of(256));
        let registers = launch.threads().div_ceil(32) * each;
        let reason = if let Some(reason) = launch.fault(most) {
            reason
        } else if shared + report.static_shared > most {
            format!("{} bytes of static shared memory are too much beside it", report.static_shared)
        } else if registers > REGISTERS {
            format!("{} registers a thread are too many", report.registers)
        } else {
            return Ok(());
        };
        Err(Error::Launch { kernel: kernel.into(), grid, block, shared, reason })
    }

    fn synchronize(&self, _: Stream) -> Result<(), Error> {
        Ok(())
    }

    fn record(&self, _: Stream) -> Result<Box<dyn Moment>, Error> {
        Ok(Box::new(Instant::now()))
    }

    fn begin_capture(&self, _: Stream) -> Result<(), Error> {
        Ok(())
    }

    fn end_capture(&self, _: Stream) -> Result<Box<dyn Recorded>, Error> {
        Ok(Box::new(Nothing))
    }
}

/// A recording of nothing.
#[derive(Debug)]
struct Nothing;

impl Recorded for Nothing {
    fn run(&self, _: Stream) -> Result<(), Error> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_assemblers_log_is_read() {
        let log = "ptxas info    : 12 bytes gmem\n\
            ptxas info    : Compiling entry function 'one' for 'sm_90a'\n\
            ptxas info    : Function properties for one\n\
            ptxas         .     16 bytes stack frame, 8 bytes spill stores, 24 bytes spill loads\n\
            ptxas info    : Used 255 registers, used 3 barriers, 16 bytes cumulative stack size, 4096 bytes smem\n\
            ptxas info    : Compiling entry function 'two' for 'sm_90a'\n\
            ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Used 10 registers, used 0 barriers\n";
        let one = KernelReport {
            name: "one".into(),
            registers: 255,
            stack: 16,
            spill_stores: 8,
            spill_loads: 24,
            static_shared: 4096,
        };
        let two = KernelReport { name: "two".into(), registers: 10, ..KernelReport::default() };
        assert_eq!(reports(log), [one, two]);
    }
}

//! A GPU, or the emulator in its place.

use std::ffi::c_void;
use std::sync::Arc;

use crate::backend::driver::{self, Driver};
use crate::backend::{Backend, Entry, Module, Recorded, Stream};
use crate::{Error, KernelProperties, Launch, Properties, Unit};

/// A device and a stream of it: where memory is and work is done, in order. Cloning it gives
/// another handle of the same two.
#[derive(Clone, Debug)]
pub struct Device {
    backend: Arc<dyn Backend>,
    stream: Stream,
}

impl Device {
    /// GPU `ordinal`, with a stream of its own in the context that all CUDA programs share.
    ///
    /// # Errors
    /// [`Error::NoDriver`], [`Error::NoDevice`], [`Error::TooOld`], [`Error::Driver`].
    pub fn new(ordinal: usize) -> Result<Self, Error> {
        Ok(Self::of(Arc::new(Driver::new(ordinal)?)))
    }

    /// How many GPUs there are.
    ///
    /// # Errors
    /// [`Error::NoDriver`] when there is no driver to have any.
    pub fn count() -> Result<usize, Error> {
        driver::count()
    }

    /// The CPU in place of a GPU: it runs the same kernels, thread by thread, as the system's C++
    /// compiler makes them. For tests: it is slow, memory that is not set holds NaN, and a kernel
    /// that goes beyond a buffer stops the program.
    ///
    /// # Errors
    /// [`Error::NoEmulator`] when there is no C++ compiler.
    #[cfg(all(feature = "emulator", unix))]
    pub fn emulated() -> Result<Self, Error> {
        Ok(Self::of(Arc::new(crate::backend::emulator::Emulator::new((8, 0))?)))
    }

    /// The same in place of a Hopper GPU: with the kernels for its matrix unit, which is emulated
    /// too, and so slower still.
    ///
    /// # Errors
    /// As for [`Device::emulated`].
    #[cfg(all(feature = "emulator", unix))]
    pub fn emulated_hopper() -> Result<Self, Error> {
        Ok(Self::of(Arc::new(crate::backend::emulator::Emulator::new((9, 0))?)))
    }

    /// GPU `ordinal` with a stream of another library (a `CUstream` or `cudaStream_t`; null for the
    /// default stream), in the context that all CUDA programs share. Work is then in order with
    /// that library's own.
    ///
    /// # Safety
    /// `stream` is a stream of that GPU's primary context, and outlives the device, its clones and
    /// all that was made with them.
    ///
    /// # Errors
    /// As for [`Device::new`].
    pub unsafe fn from_stream(ordinal: usize, stream: *mut c_void) -> Result<Self, Error> {
        // SAFETY: promised by the caller.
        Ok(Self::of(Arc::new(unsafe { Driver::with_stream(ordinal, Stream(stream)) }?)))
    }

    /// A context of the caller's own (a `CUcontext`) and a stream of it.
    ///
    /// # Safety
    /// Both are there and outlive the device, its clones and all that was made with them; the
    /// stream is one of the context, or null.
    ///
    /// # Errors
    /// As for [`Device::new`].
    pub unsafe fn from_context(context: *mut c_void, stream: *mut c_void) -> Result<Self, Error> {
        // SAFETY: promised by the caller.
        Ok(Self::of(Arc::new(unsafe { Driver::with_context(context, Stream(stream)) }?)))
    }

    /// The same device, with its kernels and memory, on another stream. Nothing orders work on the
    /// two, nor the freeing of buffers, which happens on the stream they were made with: wait
    /// ([`Device::synchronize`]) where one needs what the other made.
    ///
    /// # Safety
    /// As for [`Device::from_stream`], in this device's context.
    pub unsafe fn on_stream(&self, stream: *mut c_void) -> Self {
        Device { backend: self.backend.clone(), stream: Stream(stream) }
    }

    pub(crate) fn of(backend: Arc<dyn Backend>) -> Self {
        Device { stream: backend.stream(), backend }
    }

    /// What it is.
    pub fn properties(&self) -> &Properties {
        self.backend.properties()
    }

    /// Whether it is the emulator.
    pub fn is_emulated(&self) -> bool {
        self.backend.is_emulated()
    }

    /// Whether both are handles of one device, opened once.
    pub fn is_same(&self, other: &Device) -> bool {
        Arc::ptr_eq(&self.backend, &other.backend)
    }

    /// The stream's handle.
    pub fn raw_stream(&self) -> *mut c_void {
        self.stream.0
    }

    /// Bytes of memory free and in all.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn memory(&self) -> Result<(usize, usize), Error> {
        self.backend.memory()
    }

    /// Waits for all work of the stream; an error of an earlier kernel shows here.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn synchronize(&self) -> Result<(), Error> {
        self.backend.synchronize(self.stream)
    }

    /// A kernel of a unit, compiled at its first use on this machine and loaded at its first use by
    /// this device. Asking again costs a hash of the source: keep it where it is used.
    ///
    /// # Errors
    /// [`Error::NoCompiler`], [`Error::Compile`], [`Error::Launch`] when the unit has no such
    /// kernel, [`Error::Unsupported`] when the device is too old for it.
    pub fn kernel(&self, unit: &Unit, name: &'static str) -> Result<Kernel, Error> {
        let (major, minor) = self.properties().capability;
        let fits = major * 10 + minor >= unit.least_arch() && (!unit.is_matrix() || major == 9);
        if !fits && !self.is_emulated() {
            let arch = self.properties().arch();
            return Err(Error::Unsupported { what: format!("{} for {arch}", unit.file()) });
        }
        let module = self.backend.compile(unit)?;
        let (entry, properties) = module.entry(name)?;
        Ok(Kernel { device: self.clone(), module, entry, name, properties })
    }

    /// A point in the stream's time.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn record(&self) -> Result<Moment, Error> {
        Ok(Moment(self.backend.record(self.stream)?))
    }

    /// Records what `work` launches, copies on the device and fills, without doing it: a CUDA graph.
    /// The work may not allocate, wait, or copy to or from the host, and what it uses must outlive
    /// the graph. A stream that is the default one cannot be captured.
    ///
    /// # Safety
    /// All memory that `work` hands to kernels is still there whenever the graph is launched.
    ///
    /// # Errors
    /// What `work` fails with; [`Error::Driver`] when it does what a graph cannot.
    pub unsafe fn capture<E: From<Error>>(
        &self,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<Graph, E> {
        self.backend.begin_capture(self.stream)?;
        let done = work();
        let recorded = self.backend.end_capture(self.stream);
        done?;
        Ok(Graph { device: self.clone(), recorded: recorded? })
    }

    pub(crate) fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        self.backend.alloc(bytes, self.stream)
    }

    /// # Safety
    /// As for [`Backend::free`].
    pub(crate) unsafe fn free(&self, address: u64, bytes: usize) {
        // SAFETY: promised by the caller.
        unsafe { self.backend.free(address, bytes, self.stream) };
    }

    /// # Safety
    /// As for [`Backend::fill`].
    pub(crate) unsafe fn fill(&self, to: u64, byte: u8, bytes: usize) -> Result<(), Error> {
        // SAFETY: promised by the caller.
        unsafe { self.backend.fill(to, byte, bytes, self.stream) }
    }

    /// # Safety
    /// As for [`Backend::upload`].
    pub(crate) unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), Error> {
        // SAFETY: promised by the caller.
        unsafe { self.backend.upload(to, from, self.stream) }
    }

    /// # Safety
    /// As for [`Backend::download`].
    pub(crate) unsafe fn download(&self, to: &mut [u8], from: u64) -> Result<(), Error> {
        // SAFETY: promised by the caller.
        unsafe { self.backend.download(to, from, self.stream) }
    }

    /// # Safety
    /// As for [`Backend::copy`].
    pub(crate) unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: promised by the caller.
        unsafe { self.backend.copy(to, from, bytes, self.stream) }
    }
}

/// Compiled and loaded code that can be launched.
#[derive(Clone, Debug)]
pub struct Kernel {
    device: Device,
    /// Held so that the code stays loaded.
    #[allow(dead_code)]
    module: Arc<dyn Module>,
    entry: Entry,
    name: &'static str,
    properties: KernelProperties,
}

impl Kernel {
    /// Its name in the source.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Registers, local and shared memory.
    pub fn properties(&self) -> KernelProperties {
        self.properties
    }

    /// Enqueues it on the stream of the device that it was made with; `parameters` is its one
    /// argument.
    ///
    /// # Safety
    /// `P` is laid out as the kernel's own parameter type (see [`Unit::size_of`]); every address in
    /// it is of this device and stays valid until the kernel has run; and the kernel keeps within
    /// what they point to for this launch's sizes.
    ///
    /// # Errors
    /// [`Error::Launch`] for sizes the device does not take; in the emulator for whatever the
    /// kernel does wrong as well.
    pub unsafe fn launch<P: Copy>(&self, launch: Launch, parameters: &P) -> Result<(), Error> {
        // SAFETY: promised by the caller.
        unsafe { self.launch_on(&self.device, launch, parameters) }
    }

    /// The same on another stream of the same device.
    ///
    /// # Safety
    /// As for [`Kernel::launch`].
    ///
    /// # Errors
    /// As for [`Kernel::launch`]; [`Error::Argument`] for another device.
    pub unsafe fn launch_on<P: Copy>(
        &self,
        device: &Device,
        launch: Launch,
        parameters: &P,
    ) -> Result<(), Error> {
        if !device.is_same(&self.device) {
            return Err(Error::argument("device", "the kernel was loaded for another one"));
        }
        let mut arguments = [std::ptr::from_ref(parameters).cast_mut().cast::<c_void>()];
        // SAFETY: promised by the caller; the parameters are only read.
        unsafe {
            device.backend.launch(
                self.name,
                self.entry,
                launch,
                &mut arguments,
                &[size_of::<P>()],
                device.stream,
            )
        }
    }
}

/// A point in a stream's time.
#[derive(Debug)]
pub struct Moment(Box<dyn crate::backend::Moment>);

impl Moment {
    /// Seconds that the device took from `earlier` to this; waits for it.
    ///
    /// # Errors
    /// [`Error::Driver`]; [`Error::Argument`] for moments of different kinds of devices.
    pub fn since(&self, earlier: &Moment) -> Result<f64, Error> {
        self.0.since(&*earlier.0)
    }
}

/// Work that was recorded, to be launched as one and as often as wanted.
#[derive(Debug)]
pub struct Graph {
    device: Device,
    recorded: Box<dyn Recorded>,
}

impl Graph {
    /// Enqueues it on the stream that it was captured on.
    ///
    /// # Errors
    /// [`Error::Driver`]; in the emulator what its kernels do wrong.
    pub fn launch(&self) -> Result<(), Error> {
        self.recorded.run(self.device.stream)
    }
}

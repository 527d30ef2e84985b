//! A GPU through NVIDIA's driver, which is found and loaded when it is first asked for.

use std::any::Any;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute};

use super::{
    Backend, Entry, KernelProperties, Launch, Module, Moment, Properties, Recorded, Stream,
};
use crate::cache::{Cache, Key, Loaded};
use crate::nvrtc::Nvrtc;
use crate::{Error, Unit};

/// Most bytes of shared memory, static and dynamic, that a kernel has without asking.
const SHARED_UNASKED: u32 = 48 << 10;

/// A device's context.
#[derive(Debug)]
pub(crate) struct Driver {
    context: Arc<Context>,
    properties: Properties,
    stream: Stream,
    /// Whether `stream` is ours to destroy.
    owned: bool,
    pools: bool,
    loaded: Loaded<Code>,
    /// The largest dynamic shared memory that each kernel was allowed so far.
    allowed: Mutex<HashMap<usize, u32>>,
}

/// A context that is given back.
#[derive(Debug)]
struct Context {
    raw: sys::CUcontext,
    /// The device, when the context is its primary one, retained by us.
    retained: Option<sys::CUdevice>,
}

// SAFETY: the handle of a context may be used from any thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Makes it the calling thread's own, which it stays if the thread had none; another library's is
    /// the thread's again when what is given back is dropped.
    fn enter(&self) -> Result<Entered, Error> {
        let before = result::ctx::get_current().map_err(failed("asking for the context"))?;
        if before == Some(self.raw) {
            return Ok(Entered { before: None });
        }
        // SAFETY: a context that is still there, since we hold it or were promised so.
        unsafe { result::ctx::set_current(self.raw) }.map_err(failed("entering the context"))?;
        Ok(Entered { before })
    }
}

/// A context that a thread is in, and which one it was in before.
#[must_use]
struct Entered {
    before: Option<sys::CUcontext>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            // SAFETY: it was the thread's own a moment ago.
            let _ = unsafe { result::ctx::set_current(before) };
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if let Some(device) = self.retained {
            // SAFETY: retained once by us.
            let _ = unsafe { result::primary_ctx::release(device) };
        }
    }
}

fn failed(doing: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| {
        let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
        let reason = text.unwrap_or_else(|_| format!("{:?}", error.0));
        Error::Driver { doing, reason, code: error.0 as u32 }
    }
}

/// Whether the driver's library can be loaded: cudarc panics where it cannot.
fn is_there() -> bool {
    let names: &[&str] =
        if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so", "libcuda.so.1"] };
    // SAFETY: loads NVIDIA's driver, if there is one, which is what is wanted.
    names.iter().any(|&name| unsafe { libloading::Library::new(name) }.is_ok())
}

/// Loads the driver and starts it, once.
fn start() -> Result<(), Error> {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    let started = STARTED.get_or_init(|| {
        if !is_there() {
            return Err("its library (libcuda) was not found".into());
        }
        result::init().map_err(|error| {
            let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
            text.unwrap_or_else(|_| format!("{:?}", error.0))
        })
    });
    started.as_ref().map_err(|reason| Error::NoDriver { reason: reason.clone() }).copied()
}

/// How many devices the driver has.
pub(crate) fn count() -> Result<usize, Error> {
    start()?;
    let count = result::device::get_count().map_err(failed("counting devices"))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

fn properties(device: sys::CUdevice) -> Result<(Properties, bool), Error> {
    let attribute = |which| -> Result<u32, Error> {
        // SAFETY: a device that the driver gave.
        let value = unsafe { result::device::get_attribute(device, which) };
        Ok(value.map_err(failed("asking what the device is"))?.unsigned_abs())
    };
    let name = result::device::get_name(device).map_err(failed("asking the device's name"))?;
    // SAFETY: as above.
    let memory = unsafe { result::device::total_mem(device) };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let shared = Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    let properties = Properties {
        name,
        capability: (major, minor),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_per_block: attribute(shared)?,
        l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        memory: memory.map_err(failed("asking for the device's memory"))?,
    };
    if major < 8 {
        return Err(Error::TooOld { name: properties.name, major, minor });
    }
    let pools = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? != 0;
    Ok((properties, pools))
}

fn device(ordinal: usize) -> Result<sys::CUdevice, Error> {
    let count = count()?;
    if ordinal >= count {
        return Err(Error::NoDevice { ordinal, count });
    }
    result::device::get(ordinal as i32).map_err(failed("opening the device"))
}

impl Driver {
    /// The device's primary context and a stream of our own.
    pub(crate) fn new(ordinal: usize) -> Result<Self, Error> {
        let device = device(ordinal)?;
        let (properties, pools) = properties(device)?;
        let context = Self::primary(device)?;
        let _entered = context.enter()?;
        if pools {
            keep_memory(device);
        }
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking);
        let stream = stream.map_err(failed("making a stream"))?;
        Ok(Self::with(context, properties, pools, Stream(stream.cast()), true))
    }

    /// The device's primary context and somebody's stream in it.
    ///
    /// # Safety
    /// `stream` is one of that context, or null, and stays so.
    pub(crate) unsafe fn with_stream(ordinal: usize, stream: Stream) -> Result<Self, Error> {
        let device = device(ordinal)?;
        let (properties, pools) = properties(device)?;
        let context = Self::primary(device)?;
        Ok(Self::with(context, properties, pools, stream, false))
    }

    /// Somebody's context and stream.
    ///
    /// # Safety
    /// `context` is one, `stream` is one of it or null, and both stay so.
    pub(crate) unsafe fn with_context(context: *mut c_void, stream: Stream) -> Result<Self, Error> {
        start()?;
        let context = Arc::new(Context { raw: context.cast(), retained: None });
        let _entered = context.enter()?;
        let mut device = 0;
        // SAFETY: a place for a device; the context is the current one.
        unsafe { sys::cuCtxGetDevice(&mut device) }
            .result()
            .map_err(failed("asking for the context's device"))?;
        let (properties, pools) = properties(device)?;
        Ok(Self::with(context, properties, pools, stream, false))
    }

    fn primary(device: sys::CUdevice) -> Result<Arc<Context>, Error> {
        // SAFETY: a device that the driver gave.
        let raw = unsafe { result::primary_ctx::retain(device) };
        let raw = raw.map_err(failed("opening the device's context"))?;
        Ok(Arc::new(Context { raw, retained: Some(device) }))
    }

    fn with(
        context: Arc<Context>,
        properties: Properties,
        pools: bool,
        stream: Stream,
        owned: bool,
    ) -> Self {
        let (loaded, allowed) = Default::default();
        Driver { context, properties, stream, owned, pools, loaded, allowed }
    }

    fn enter(&self) -> Result<Entered, Error> {
        self.context.enter()
    }

    /// Lets a kernel have so much dynamic shared memory, once per size.
    fn allow(&self, entry: Entry, shared: u32) -> Result<(), DriverError> {
        if shared == 0 {
            return Ok(());
        }
        let mut allowed = self.allowed.lock().unwrap_or_else(PoisonError::into_inner);
        let most = allowed.entry(entry.0 as usize).or_insert(SHARED_UNASKED / 2);
        if shared > *most {
            let attribute =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: an entry is a function of a module that is loaded.
            unsafe {
                result::function::set_function_attribute(entry.0.cast(), attribute, shared as i32)?;
            }
            *most = shared;
        }
        Ok(())
    }

    fn out_of_memory(&self, bytes: usize, error: DriverError) -> Error {
        if error.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return failed("allocating memory")(error);
        }
        let (free, total) = result::mem_get_info().unwrap_or((0, self.properties.memory));
        Error::OutOfMemory { device: self.properties.name.clone(), bytes, free, total }
    }
}

/// Memory that is freed stays with the device's pool instead of going back to the system.
fn keep_memory(device: sys::CUdevice) {
    // SAFETY: a device that has pools, and a number where the attribute takes one. If it fails,
    // only speed is lost.
    unsafe {
        if let Ok(pool) = result::device::get_default_mem_pool(device) {
            let mut most = u64::MAX;
            let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            let _ = sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut most).cast());
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.owned
            && let Ok(_entered) = self.enter()
        {
            // SAFETY: made by us, and nobody has it any more. What is under way in it goes on.
            let _ = unsafe { result::stream::destroy(self.stream.0.cast()) };
        }
    }
}

impl Backend for Driver {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn memory(&self) -> Result<(usize, usize), Error> {
        let _entered = self.enter()?;
        result::mem_get_info().map_err(failed("asking for free memory"))
    }

    fn compile(&self, unit: &Unit) -> Result<Arc<dyn Module>, Error> {
        let arch = self.properties.arch();
        let nvrtc = Nvrtc::get()?;
        let (major, minor) = nvrtc.version();
        let version = format!("nvrtc {major}.{minor}");
        let (text, options) = (unit.full_text(), Nvrtc::options(unit, &arch));
        let parts = [version.as_str(), &text];
        let key = Key::of(parts.into_iter().chain(options.iter().map(String::as_str)));
        let code = self.loaded.get_or(key, || {
            let compile = || Ok(nvrtc.compile(unit, &arch, false)?.cubin);
            let cubin = Cache::usual().get_or(key, compile)?;
            let _entered = self.enter()?;
            // SAFETY: machine code for this device, made by its compiler, as the digest says.
            let raw = unsafe { result::module::load_data(cubin.as_ptr().cast()) };
            let raw = raw.map_err(failed("loading a kernel"))?;
            Ok(Code { context: self.context.clone(), raw, title: unit.title() })
        })?;
        Ok(code)
    }

    fn stream(&self) -> Stream {
        self.stream
    }

    fn is_emulated(&self) -> bool {
        false
    }

    fn alloc(&self, bytes: usize, stream: Stream) -> Result<u64, Error> {
        let _entered = self.enter()?;
        let bytes = bytes.max(1);
        // SAFETY: the stream is one of the context; what the memory holds is for others to set.
        let address = unsafe {
            if self.pools {
                result::malloc_async(stream.0.cast(), bytes)
            } else {
                result::malloc_sync(bytes)
            }
        };
        address.map_err(|error| self.out_of_memory(bytes, error))
    }

    unsafe fn free(&self, address: u64, _: usize, stream: Stream) {
        let Ok(_entered) = self.enter() else {
            return;
        };
        // SAFETY: it was allocated so, and whatever was enqueued before comes first. A failure says
        // that the context is lost, and the memory with it.
        let _ = unsafe {
            if self.pools {
                result::free_async(address, stream.0.cast())
            } else {
                result::free_sync(address)
            }
        };
    }

    unsafe fn fill(&self, to: u64, byte: u8, bytes: usize, stream: Stream) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        let _entered = self.enter()?;
        // SAFETY: promised by the caller.
        unsafe { result::memset_d8_async(to, byte, bytes, stream.0.cast()) }
            .map_err(failed("filling memory"))
    }

    unsafe fn upload(&self, to: u64, from: &[u8], stream: Stream) -> Result<(), Error> {
        if from.is_empty() {
            return Ok(());
        }
        let _entered = self.enter()?;
        // SAFETY: promised by the caller. Memory that is not pinned has been read when it returns.
        unsafe { result::memcpy_htod_async(to, from, stream.0.cast()) }
            .map_err(failed("copying to the device"))?;
        // Unless it is pinned, which a slice does not tell.
        self.synchronize(stream)
    }

    unsafe fn download(&self, to: &mut [u8], from: u64, stream: Stream) -> Result<(), Error> {
        if to.is_empty() {
            return self.synchronize(stream);
        }
        let _entered = self.enter()?;
        // SAFETY: promised by the caller; `to` is borrowed until the stream has been waited for.
        unsafe { result::memcpy_dtoh_async(to, from, stream.0.cast()) }
            .map_err(failed("copying from the device"))?;
        self.synchronize(stream)
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize, stream: Stream) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        let _entered = self.enter()?;
        // SAFETY: promised by the caller.
        unsafe { result::memcpy_dtod_async(to, from, bytes, stream.0.cast()) }
            .map_err(failed("copying on the device"))
    }

    unsafe fn launch(
        &self,
        kernel: &str,
        entry: Entry,
        launch: Launch,
        arguments: &mut [*mut c_void],
        _: &[usize],
        stream: Stream,
    ) -> Result<(), Error> {
        let _entered = self.enter()?;
        let Launch { grid, block, shared } = launch;
        let mut run = || -> Result<(), DriverError> {
            self.allow(entry, shared)?;
            // SAFETY: the entry is a function of a loaded module, and the caller promises that the
            // arguments are those it takes.
            unsafe {
                result::launch_kernel(
                    entry.0.cast(),
                    grid.into(),
                    block.into(),
                    shared,
                    stream.0.cast(),
                    arguments,
                )
            }
        };
        run().map_err(|error| {
            let reason = failed("launching")(error).to_string();
            Error::Launch { kernel: kernel.into(), grid, block, shared, reason }
        })
    }

    fn synchronize(&self, stream: Stream) -> Result<(), Error> {
        let _entered = self.enter()?;
        // SAFETY: the stream is one of the context.
        unsafe { result::stream::synchronize(stream.0.cast()) }
            .map_err(failed("waiting for the device"))
    }

    fn record(&self, stream: Stream) -> Result<Box<dyn Moment>, Error> {
        let _entered = self.enter()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let event = event.map_err(failed("making an event"))?;
        let event = Event { context: self.context.clone(), raw: event };
        // SAFETY: an event and a stream of the context.
        unsafe { result::event::record(event.raw, stream.0.cast()) }
            .map_err(failed("recording an event"))?;
        Ok(Box::new(event))
    }

    fn begin_capture(&self, stream: Stream) -> Result<(), Error> {
        let _entered = self.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is one of the context.
        unsafe { result::stream::begin_capture(stream.0.cast(), mode) }
            .map_err(failed("beginning a capture"))
    }

    fn end_capture(&self, stream: Stream) -> Result<Box<dyn Recorded>, Error> {
        let _entered = self.enter()?;
        // SAFETY: the stream is one of the context.
        let graph = unsafe { result::stream::end_capture(stream.0.cast()) };
        let graph = graph.map_err(failed("ending a capture"))?;
        let mut graph =
            Graph { context: self.context.clone(), raw: graph, ready: std::ptr::null_mut() };
        let flags = sys::CUgraphInstantiate_flags_enum(0);
        // SAFETY: the graph that was just captured.
        let ready = unsafe { result::graph::instantiate(graph.raw, flags) };
        graph.ready = ready.map_err(failed("making a graph ready"))?;
        Ok(Box::new(graph))
    }
}

/// Loaded code.
#[derive(Debug)]
struct Code {
    context: Arc<Context>,
    raw: sys::CUmodule,
    title: String,
}

// SAFETY: the handle of a module may be used from any thread.
unsafe impl Send for Code {}
// SAFETY: as above.
unsafe impl Sync for Code {}

impl Drop for Code {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: loaded by us; kernels hold it while they may be launched.
            let _ = unsafe { result::module::unload(self.raw) };
        }
    }
}

impl Module for Code {
    fn entry(&self, name: &str) -> Result<(Entry, KernelProperties), Error> {
        let _entered = self.context.enter()?;
        let c_name = CString::new(name)
            .map_err(|_| Error::argument("kernel", "its name has a zero byte"))?;
        // SAFETY: a module that is loaded.
        let function = unsafe { result::module::get_function(self.raw, c_name) };
        let function = function.map_err(|error| Error::Launch {
            kernel: name.into(),
            grid: [0; 3],
            block: [0; 3],
            shared: 0,
            reason: format!("{} has no such kernel ({:?})", self.title, error.0),
        })?;
        use sys::CUfunction_attribute_enum as Of;
        let attribute = |which| {
            // SAFETY: the function that was just found.
            let value = unsafe { result::function::get_function_attribute(function, which) };
            value.map(i32::unsigned_abs).map_err(failed("asking what a kernel needs"))
        };
        let properties = KernelProperties {
            registers: attribute(Of::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            local_bytes: attribute(Of::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            static_shared: attribute(Of::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
            max_threads: attribute(Of::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        };
        Ok((Entry(function.cast()), properties))
    }
}

/// A captured graph.
#[derive(Debug)]
struct Graph {
    context: Arc<Context>,
    raw: sys::CUgraph,
    ready: sys::CUgraphExec,
}

// SAFETY: the driver lets any thread launch a graph; ours is never changed.
unsafe impl Send for Graph {}
// SAFETY: launching one at the same time from two threads is for the streams to order.
unsafe impl Sync for Graph {}

impl Recorded for Graph {
    fn run(&self, stream: Stream) -> Result<(), Error> {
        let _entered = self.context.enter()?;
        // SAFETY: the graph was made ready, and the stream is one of the context.
        unsafe { result::graph::launch(self.ready, stream.0.cast()) }
            .map_err(failed("launching a graph"))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let Ok(_entered) = self.context.enter() else {
            return;
        };
        // SAFETY: both were made by us, if they were.
        unsafe {
            if !self.ready.is_null() {
                let _ = result::graph::exec_destroy(self.ready);
            }
            let _ = result::graph::destroy(self.raw);
        }
    }
}

/// An event.
#[derive(Debug)]
struct Event {
    context: Arc<Context>,
    raw: sys::CUevent,
}

// SAFETY: the handle of an event may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Moment for Event {
    fn since(&self, earlier: &dyn Moment) -> Result<f64, Error> {
        let earlier = earlier.as_any().downcast_ref::<Event>();
        let earlier =
            earlier.ok_or_else(|| Error::argument("moment", "it is of another device"))?;
        let _entered = self.context.enter()?;
        // SAFETY: both were recorded; the later is waited for first.
        let milliseconds = unsafe {
            result::event::synchronize(self.raw).map_err(failed("waiting for an event"))?;
            result::event::elapsed(earlier.raw, self.raw).map_err(failed("comparing events"))?
        };
        Ok(f64::from(milliseconds) * 1e-3)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: made by us.
            let _ = unsafe { result::event::destroy(self.raw) };
        }
    }
}

//! The past, as a Python object.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::{PyOSError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::cuda::Slopes;
use crate::spec::{Inner, Spec};
use crate::{errors, threads};

/// Where a state is, and what it is of.
#[derive(Debug)]
pub enum Kept {
    F32(sata::State<f32>),
    F64(sata::State<f64>),
    Device(Box<OnDevice>),
}

/// One on a GPU: device, stream that it was made on, and slopes of its steps.
#[derive(Debug)]
pub struct OnDevice {
    pub state: sata_cuda::State,
    pub place: (usize, usize),
    pub slopes: Slopes,
}

/// The past of some sequences: `sata.State` is made of it.
///
/// Work on it is one call at a time: another thread's waits.
#[pyclass(frozen, module = "sata._native")]
#[derive(Debug)]
pub struct State {
    pub spec: Arc<Inner>,
    kept: Mutex<Kept>,
}

/// Header sizes beyond which a file is none of ours.
const MAX_HEADER: u64 = 1 << 24;

impl State {
    fn of(spec: Arc<Inner>, kept: Kept) -> Self {
        State { spec, kept: Mutex::new(kept) }
    }

    /// Waits for its turn. Never with the interpreter's lock held: its holder may need that.
    pub fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with what is kept, while other threads of Python run.
    fn with<R: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut Kept) -> PyResult<R> + Send,
    ) -> PyResult<R> {
        py.detach(|| {
            let mut kept = self.lock();
            let kept = &mut *kept;
            threads::run(|| work(kept))
        })
    }
}

/// What a file's header says: its spec, and whether its sums are f64.
fn look(path: &Path) -> PyResult<Option<(sata::Spec, bool)>> {
    let failed = |error: std::io::Error| match error.raw_os_error() {
        Some(code) => PyOSError::new_err((code, error.to_string(), path.as_os_str().to_owned())),
        None => PyOSError::new_err(format!("{}: {error}", path.display())),
    };
    let mut file = File::open(path).map_err(failed)?;
    let mut size = [0; 8];
    let Ok(()) = file.read_exact(&mut size) else { return Ok(None) };
    let size = u64::from_le_bytes(size);
    if size > MAX_HEADER {
        return Ok(None);
    }
    let mut header = vec![];
    file.take(size).read_to_end(&mut header).map_err(failed)?;
    let Ok(header) = serde_json::from_slice::<serde_json::Value>(&header) else { return Ok(None) };
    let spec = header["__metadata__"]["spec"].as_str().map(serde_json::from_str);
    let is_f64 = header["sums"]["dtype"] == "F64";
    Ok(match spec {
        Some(Ok(spec)) => Some((spec, is_f64)),
        _ => None,
    })
}

fn different(what: &str, own: &str, other: &str) -> PyErr {
    PyValueError::new_err(format!("next: the state has {what} = {own}, but next has {other}"))
}

#[pymethods]
impl State {
    #[new]
    #[pyo3(signature = (spec, sequences, kv_heads, is_f64, device))]
    fn new(
        py: Python<'_>,
        spec: PyRef<'_, Spec>,
        sequences: usize,
        kv_heads: usize,
        is_f64: bool,
        device: Option<(usize, usize)>,
    ) -> PyResult<Self> {
        let spec = spec.inner.clone();
        py.detach(|| {
            let kept = match device {
                Some(place) => {
                    if is_f64 {
                        let text = "dtype is float64, but states on a GPU are float32";
                        return Err(PyTypeError::new_err(text));
                    }
                    let plan = spec.device_plan(place)?;
                    let state = sata_cuda::State::new(&plan, sequences, kv_heads);
                    let state = state.map_err(errors::of_device)?;
                    Kept::Device(Box::new(OnDevice { state, place, slopes: Slopes::default() }))
                }
                None if is_f64 => {
                    let state = sata::State::new(&*spec.plan()?, sequences, kv_heads);
                    Kept::F64(state.map_err(errors::of_call)?)
                }
                None => {
                    let state = sata::State::new(&*spec.plan()?, sequences, kv_heads);
                    Kept::F32(state.map_err(errors::of_call)?)
                }
            };
            Ok(State::of(spec, kept))
        })
    }

    /// From a file; the spec is the file's own unless one is named that it must serve.
    #[staticmethod]
    #[pyo3(signature = (path, spec=None))]
    fn load(py: Python<'_>, path: PathBuf, spec: Option<PyRef<'_, Spec>>) -> PyResult<Self> {
        let wanted = spec.map(|spec| spec.inner.clone());
        py.detach(|| {
            let seen = look(&path)?;
            let is_f64 = seen.as_ref().is_some_and(|(_, is_f64)| *is_f64);
            let spec = match (wanted, seen) {
                (Some(spec), _) => spec,
                (None, Some((spec, _))) => Arc::new(Inner::new(spec)),
                // The library says what is wrong with it.
                (None, None) => {
                    let any = sata::Spec::new(1, 1).build().map_err(errors::of_call)?;
                    Arc::new(Inner::new(any))
                }
            };
            let plan = spec.plan()?;
            let kept = if is_f64 {
                Kept::F64(sata::State::load(&plan, &path).map_err(errors::of_call)?)
            } else {
                Kept::F32(sata::State::load(&plan, &path).map_err(errors::of_call)?)
            };
            // A file may hold more orders than the spec asks for.
            let own = match &kept {
                Kept::F32(state) => state.spec().clone(),
                Kept::F64(state) => state.spec().clone(),
                Kept::Device(on) => on.state.spec().clone(),
            };
            let spec = if own == spec.spec { spec } else { Arc::new(Inner::new(own)) };
            Ok(State::of(spec, kept))
        })
    }

    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        let spec = self.spec.clone();
        self.with(py, |kept| {
            match kept {
                Kept::F32(state) => state.save(&path),
                Kept::F64(state) => state.save(&path),
                Kept::Device(on) => {
                    let plan = spec.device_plan(on.place)?;
                    let host = on.state.to_host(&plan).map_err(errors::of_device)?;
                    host.save(&path)
                }
            }
            .map_err(errors::of_call)
        })
    }

    fn fork(&self, py: Python<'_>) -> PyResult<Self> {
        let kept = self.with(py, |kept| {
            Ok(match kept {
                Kept::F32(state) => Kept::F32(state.fork()),
                Kept::F64(state) => Kept::F64(state.fork()),
                Kept::Device(on) => Kept::Device(Box::new(OnDevice {
                    state: on.state.fork().map_err(errors::of_device)?,
                    place: on.place,
                    slopes: Slopes::default(),
                })),
            })
        })?;
        Ok(State::of(self.spec.clone(), kept))
    }

    fn merge(&self, py: Python<'_>, next: PyRef<'_, State>) -> PyResult<()> {
        let (spec, of_next) = (self.spec.clone(), next.spec.clone());
        let next: &State = &next;
        py.detach(|| {
            // One lock at a time: what is appended is copied first.
            let other = {
                let kept = next.lock();
                match &*kept {
                    Kept::F32(state) => Kept::F32(state.clone()),
                    Kept::F64(state) => Kept::F64(state.clone()),
                    Kept::Device(on) => {
                        let plan = of_next.device_plan(on.place)?;
                        let host = on.state.to_host(&plan).map_err(errors::of_device)?;
                        Kept::F32(host)
                    }
                }
            };
            let mut kept = self.lock();
            match (&mut *kept, &other) {
                (Kept::F32(state), Kept::F32(other)) => state.merge(other),
                (Kept::F64(state), Kept::F64(other)) => state.merge(other),
                (Kept::Device(on), Kept::F32(other)) => {
                    let plan = spec.device_plan(on.place)?;
                    let mut host = on.state.to_host(&plan).map_err(errors::of_device)?;
                    host.merge(other).map_err(errors::of_call)?;
                    let merged = sata_cuda::State::from_host_with(&plan, &host, on.state.storage());
                    on.state = merged.map_err(errors::of_device)?;
                    Ok(())
                }
                (Kept::F64(_), _) => return Err(different("dtype", "float64", "float32")),
                (_, _) => return Err(different("dtype", "float32", "float64")),
            }
            .map_err(errors::of_call)
        })
    }

    /// A copy on another device, or on the CPU.
    #[pyo3(signature = (device))]
    fn to(&self, py: Python<'_>, device: Option<(usize, usize)>) -> PyResult<Self> {
        let spec = self.spec.clone();
        let kept = self.with(py, |kept| {
            let host = match kept {
                Kept::F32(state) => state.clone(),
                Kept::F64(state) => match device {
                    None => return Ok(Kept::F64(state.clone())),
                    Some(_) => {
                        let text = "the state's dtype is float64, but states on a GPU are float32";
                        return Err(PyTypeError::new_err(text));
                    }
                },
                Kept::Device(on) => {
                    let plan = spec.device_plan(on.place)?;
                    on.state.to_host(&plan).map_err(errors::of_device)?
                }
            };
            let Some(place) = device else {
                return Ok(Kept::F32(host));
            };
            let plan = spec.device_plan(place)?;
            let state = sata_cuda::State::from_host(&plan, &host).map_err(errors::of_device)?;
            Ok(Kept::Device(Box::new(OnDevice { state, place, slopes: Slopes::default() })))
        })?;
        Ok(State::of(self.spec.clone(), kept))
    }

    fn reset(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, |kept| {
            match kept {
                Kept::F32(state) => state.reset(),
                Kept::F64(state) => state.reset(),
                Kept::Device(on) => on.state.reset().map_err(errors::of_device)?,
            }
            Ok(())
        })
    }

    /// Tokens that each sequence has seen.
    fn positions(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        self.with(py, |kept| match kept {
            Kept::F32(state) => Ok((0..state.sequences()).map(|n| state.position(n)).collect()),
            Kept::F64(state) => Ok((0..state.sequences()).map(|n| state.position(n)).collect()),
            Kept::Device(on) => {
                let all = 0..on.state.sequences();
                let all = all.map(|n| on.state.position(n).map_err(errors::of_device));
                all.collect()
            }
        })
    }

    #[getter]
    fn nbytes(&self, py: Python<'_>) -> PyResult<usize> {
        self.with(py, |kept| {
            Ok(match kept {
                Kept::F32(state) => state.bytes(),
                Kept::F64(state) => state.bytes(),
                Kept::Device(on) => on.state.bytes(),
            })
        })
    }

    #[getter]
    fn sequences(&self, py: Python<'_>) -> PyResult<usize> {
        self.with(py, |kept| {
            Ok(match kept {
                Kept::F32(state) => state.sequences(),
                Kept::F64(state) => state.sequences(),
                Kept::Device(on) => on.state.sequences(),
            })
        })
    }

    #[getter]
    fn kv_heads(&self, py: Python<'_>) -> PyResult<usize> {
        self.with(py, |kept| {
            Ok(match kept {
                Kept::F32(state) => state.kv_heads(),
                Kept::F64(state) => state.kv_heads(),
                Kept::Device(on) => on.state.kv_heads(),
            })
        })
    }

    #[getter]
    fn is_f64(&self, py: Python<'_>) -> PyResult<bool> {
        self.with(py, |kept| Ok(matches!(kept, Kept::F64(_))))
    }

    /// The GPU's number, or none on the CPU.
    #[getter]
    fn device(&self, py: Python<'_>) -> PyResult<Option<usize>> {
        self.with(py, |kept| {
            Ok(match kept {
                Kept::Device(on) => Some(on.place.0),
                _ => None,
            })
        })
    }

    #[getter]
    fn spec(&self) -> Spec {
        Spec { inner: self.spec.clone() }
    }

    /// As bytes, as a file holds it.
    fn to_bytes(&self, py: Python<'_>) -> PyResult<Vec<u8>> {
        let spec = self.spec.clone();
        self.with(py, |kept| {
            Ok(match kept {
                Kept::F32(state) => state.to_bytes(),
                Kept::F64(state) => state.to_bytes(),
                Kept::Device(on) => {
                    let plan = spec.device_plan(on.place)?;
                    on.state.to_host(&plan).map_err(errors::of_device)?.to_bytes()
                }
            })
        })
    }

    #[staticmethod]
    fn from_bytes(
        py: Python<'_>,
        spec: PyRef<'_, Spec>,
        is_f64: bool,
        bytes: &[u8],
    ) -> PyResult<Self> {
        let spec = spec.inner.clone();
        py.detach(|| {
            let plan = spec.plan()?;
            let kept = if is_f64 {
                let state = sata::State::from_bytes(&plan, bytes, "bytes");
                Kept::F64(state.map_err(errors::of_call)?)
            } else {
                let state = sata::State::from_bytes(&plan, bytes, "bytes");
                Kept::F32(state.map_err(errors::of_call)?)
            };
            Ok(State::of(spec, kept))
        })
    }
}

impl Kept {
    /// Why a call of this type on this device cannot go on with it.
    pub fn other(&self, wants: &str) -> PyErr {
        let own = match self {
            Kept::F32(_) => "float32 sums on the CPU (for float32, float16 and bfloat16 inputs)",
            Kept::F64(_) => "float64 sums on the CPU (for float64 inputs)",
            Kept::Device(_) => "its sums on a GPU",
        };
        PyRuntimeError::new_err(format!("state has {own}, but the call is {wants}"))
    }
}

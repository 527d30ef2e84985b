//! What an attention is, as a Python object that holds its plans.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple};
use sata::{Decay, Near, Plan, Series, cost};

use crate::{cuda, errors};

/// Plans for streams of devices that are kept: more are seldom in use at a time.
const MOST_PLANS: usize = 64;

/// What an attention is: sizes, terms, series, near blocks, sinks, decay, scale.
///
/// Spec(d_key, d_value=None, *, terms=None, series="taylor", near=0, block=64, sinks=0, decay=None,
///      scale=None)
///
/// It is checked once, when it is made (ValueError, TypeError), and never changes. `d_value` is
/// `d_key` where it is not said, `terms` is 4 unless the series itself says how many, `scale` is
/// 1/sqrt(d_key). See `sata.attention` for the others; `decay` is None, "slopes" or "gates".
#[pyclass(frozen, module = "sata")]
#[derive(Debug)]
pub struct Spec {
    pub inner: Arc<Inner>,
}

/// A spec and what is made for it when it is first needed.
#[derive(Debug)]
pub struct Inner {
    pub spec: sata::Spec,
    host: OnceLock<Arc<Plan>>,
    on_devices: Mutex<HashMap<(usize, usize), Arc<sata_cuda::Plan>>>,
}

impl Inner {
    pub fn new(spec: sata::Spec) -> Self {
        Inner { spec, host: OnceLock::new(), on_devices: Mutex::default() }
    }

    /// Its plan for the CPU.
    pub fn plan(&self) -> PyResult<Arc<Plan>> {
        if let Some(plan) = self.host.get() {
            return Ok(plan.clone());
        }
        let plan = Arc::new(Plan::new(&self.spec).map_err(errors::of_call)?);
        Ok(self.host.get_or_init(|| plan).clone())
    }

    /// Its plan for a stream of a GPU.
    pub fn device_plan(&self, place: (usize, usize)) -> PyResult<Arc<sata_cuda::Plan>> {
        let mut plans = self.on_devices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&place) {
            return Ok(plan.clone());
        }
        let device = cuda::device(place)?;
        let plan = sata_cuda::Plan::new(&device, &self.spec).map_err(errors::of_device)?;
        let plan = Arc::new(plan);
        if plans.len() >= MOST_PLANS {
            plans.clear();
        }
        plans.insert(place, plan.clone());
        Ok(plan)
    }
}

/// `near` as Python has it: 0 for nothing, "own" for a query's own block, n for it and n before.
fn near_of(near: Option<&Bound<'_, PyAny>>) -> PyResult<Near> {
    let Some(near) = near else {
        return Ok(Near::None);
    };
    if near.is_instance_of::<PyString>() {
        return match near.extract::<String>()?.as_str() {
            "own" => Ok(Near::Blocks(0)),
            other => Err(PyValueError::new_err(format!(
                "near is '{other}', but it must be 0 (nothing), 'own' (a query's own block) or how \
                 many blocks before it are near as well"
            ))),
        };
    }
    match near.extract::<i64>() {
        Ok(0) => Ok(Near::None),
        Ok(n) if n > 0 => Ok(Near::Blocks(usize::try_from(n).unwrap_or(usize::MAX))),
        Ok(n) => Err(PyValueError::new_err(format!("near is {n}, but it must be at least 0"))),
        Err(_) => Err(PyTypeError::new_err(format!(
            "near is of type {}, but it must be a number of blocks or 'own'",
            near.get_type().name()?
        ))),
    }
}

fn series_of(series: &Bound<'_, PyAny>) -> PyResult<Series> {
    if !series.is_instance_of::<PyString>() {
        return match series.extract::<Vec<f64>>() {
            Ok(coefficients) => Ok(Series::Fixed { coefficients }),
            Err(_) => Err(PyTypeError::new_err(format!(
                "series is of type {}, but it must be a name or a sequence of coefficients",
                series.get_type().name()?
            ))),
        };
    }
    let text = series.extract::<String>()?;
    let bad = || {
        PyValueError::new_err(format!(
            "series is '{text}', but it must be 'taylor', 'gauss', 'hermite', 'hermite:TAU', \
             'power:P', 'power:P:FLOOR' or a sequence of coefficients"
        ))
    };
    let mut parts = text.split(':');
    let name = parts.next().unwrap_or_default();
    let arguments: Vec<&str> = parts.collect();
    match (name, arguments.as_slice()) {
        ("taylor", []) => Ok(Series::Taylor),
        ("gauss", []) => Ok(Series::Gauss),
        ("hermite", []) => Ok(Series::hermite()),
        ("hermite", [tau]) => Ok(Series::Hermite { tau: tau.parse().map_err(|_| bad())? }),
        ("power", [exponent]) => Ok(Series::power(exponent.parse().map_err(|_| bad())?)),
        ("power", [exponent, floor]) => Ok(Series::Power {
            exponent: exponent.parse().map_err(|_| bad())?,
            floor: floor.parse().map_err(|_| bad())?,
        }),
        _ => Err(bad()),
    }
}

fn decay_of(decay: Option<&str>) -> PyResult<Decay> {
    match decay {
        None | Some("none") => Ok(Decay::None),
        Some("slopes") => Ok(Decay::Slopes),
        Some("gates") => Ok(Decay::Gates),
        Some(other) => Err(PyValueError::new_err(format!(
            "decay is '{other}', but it must be None, 'slopes' or 'gates'"
        ))),
    }
}

impl Spec {
    pub fn of(spec: sata::Spec) -> Self {
        Spec { inner: Arc::new(Inner::new(spec)) }
    }

    fn spec(&self) -> &sata::Spec {
        &self.inner.spec
    }

    fn json(&self) -> PyResult<String> {
        serde_json::to_string(self.spec()).map_err(|e| PyValueError::new_err(e.to_string()))
    }
}

#[pymethods]
impl Spec {
    #[new]
    #[pyo3(signature = (d_key, d_value=None, *, terms=None, series=None, near=None, block=64,
                        sinks=0, decay=None, scale=None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        d_key: i64,
        d_value: Option<i64>,
        terms: Option<i64>,
        series: Option<&Bound<'_, PyAny>>,
        near: Option<&Bound<'_, PyAny>>,
        block: i64,
        sinks: i64,
        decay: Option<&str>,
        scale: Option<f64>,
    ) -> PyResult<Self> {
        let size = |name: &str, n: i64| {
            usize::try_from(n).map_err(|_| {
                PyValueError::new_err(format!("{name} is {n}, but it must not be negative"))
            })
        };
        let d_key = size("d_key", d_key)?;
        let d_value = d_value.map_or(Ok(d_key), |n| size("d_value", n))?;
        let mut builder = sata::Spec::new(d_key, d_value)
            .near(near_of(near)?)
            .block(size("block", block)?)
            .sinks(size("sinks", sinks)?)
            .decay(decay_of(decay)?);
        if let Some(series) = series {
            builder = builder.series(series_of(series)?);
        }
        if let Some(terms) = terms {
            builder = builder.terms(size("terms", terms)?);
        }
        if let Some(scale) = scale {
            builder = builder.scale(scale);
        }
        Ok(Spec::of(builder.build().map_err(errors::of_call)?))
    }

    /// The spec that `to_json` wrote.
    #[staticmethod]
    fn from_json(text: &str) -> PyResult<Self> {
        let spec = serde_json::from_str(text);
        Ok(Spec::of(spec.map_err(|e| PyValueError::new_err(format!("spec: {e}")))?))
    }

    /// As JSON: what state files and the programs' models hold.
    fn to_json(&self) -> PyResult<String> {
        self.json()
    }

    /// Elements of a query or key.
    #[getter]
    fn d_key(&self) -> usize {
        self.spec().d_key()
    }

    /// Elements of a value.
    #[getter]
    fn d_value(&self) -> usize {
        self.spec().d_value()
    }

    /// How many terms the series has: one more than its highest order.
    #[getter]
    fn terms(&self) -> usize {
        self.spec().terms()
    }

    /// The name of the series, or its coefficients.
    #[getter]
    fn series<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let name = match self.spec().series() {
            Series::Taylor => "taylor".to_string(),
            Series::Gauss => "gauss".into(),
            Series::Hermite { tau } if *tau == 0.9 => "hermite".into(),
            Series::Hermite { tau } => format!("hermite:{tau}"),
            Series::Power { exponent, floor } if *floor == 1e-3 => format!("power:{exponent}"),
            Series::Power { exponent, floor } => format!("power:{exponent}:{floor}"),
            Series::Fixed { coefficients } => {
                return Ok(PyTuple::new(py, coefficients)?.into_any());
            }
            other => format!("{other:?}"),
        };
        Ok(name.into_pyobject(py)?.into_any())
    }

    /// What is exact: 0 for nothing, "own" for a query's own block, n for it and the n before.
    #[getter]
    fn near<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        Ok(match self.spec().near() {
            Near::None => 0usize.into_pyobject(py)?.into_any(),
            Near::Blocks(0) => "own".into_pyobject(py)?.into_any(),
            Near::Blocks(n) => n.into_pyobject(py)?.into_any(),
        })
    }

    /// Tokens in a block.
    #[getter]
    fn block(&self) -> usize {
        self.spec().block()
    }

    /// First tokens that stay near for ever.
    #[getter]
    fn sinks(&self) -> usize {
        self.spec().sinks()
    }

    /// None, "slopes" or "gates".
    #[getter]
    fn decay(&self) -> Option<&'static str> {
        match self.spec().decay() {
            Decay::None => None,
            Decay::Slopes => Some("slopes"),
            Decay::Gates => Some("gates"),
        }
    }

    /// What q·k is multiplied by.
    #[getter]
    fn scale(&self) -> f64 {
        self.spec().scale()
    }

    /// The orders whose features a state holds.
    #[getter]
    fn orders(&self) -> Vec<usize> {
        self.spec().orders()
    }

    /// Sizes and FLOPs per token and head, as a dict: see `sata.cost`.
    fn cost<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let spec = self.spec();
        let (d_key, d_value, orders) = (spec.d_key(), spec.d_value(), spec.orders());
        let terms = spec.terms();
        let counts = PyDict::new(py);
        let state = |bytes| cost::state_bytes(d_key, d_value, &orders, bytes, bytes == 4);
        for (name, count) in [
            ("features", sata::basis::features(d_key, &orders)),
            ("state_elements", cost::state_elements(d_key, d_value, &orders)),
            ("state_bytes", state(4)),
            ("state_bytes_f64", state(8)),
            ("flops", cost::useful_flops(d_key, d_value, &orders)),
            ("paper_flops", cost::paper_flops(d_key, d_value, terms)),
            ("corrected_flops", cost::corrected_flops(d_key, d_value, terms)),
            ("softmax_flops_per_key", cost::conventional_flops(d_key, d_value, 1)),
            ("cache_elements_per_token", cost::cache_elements(d_key, d_value, 1)),
            ("break_even_memory_tokens", cost::break_even_memory(d_key, d_value, &orders)),
            ("break_even_flops_tokens", cost::break_even_flops(d_key, d_value, terms)),
        ] {
            counts.set_item(name, count)?;
        }
        Ok(counts)
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, (String,))> {
        Ok((slf.get_type().getattr("from_json")?, (slf.get().json()?,)))
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<Spec>().is_ok_and(|other| other.get().spec() == self.spec())
    }

    fn __hash__(&self) -> PyResult<u64> {
        let mut hasher = DefaultHasher::new();
        self.json()?.hash(&mut hasher);
        Ok(hasher.finish())
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let spec = self.spec();
        let decay = self.decay().map_or("None".into(), |name| format!("'{name}'"));
        Ok(format!(
            "sata.Spec({}, {}, terms={}, series={}, near={}, block={}, sinks={}, decay={decay}, \
             scale={})",
            spec.d_key(),
            spec.d_value(),
            spec.terms(),
            self.series(py)?.repr()?,
            self.near(py)?.repr()?,
            spec.block(),
            spec.sinks(),
            spec.scale()
        ))
    }
}

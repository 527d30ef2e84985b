//! Attention as one node of candle's graph.

#[cfg(feature = "cuda")]
mod gpu;

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, WithDType};
use sata::{Call, Decay, Gradients, Plan, View, ViewMut};

use crate::error;
use crate::float::Float;
use crate::storage::{by_type, check_float, check_type, read, slice, tensor};

const OP: &str = "attention";

/// What an attention is besides its spec, queries, keys and values.
///
/// Causal, every key there, one sequence per batch entry, no decay, strict: as [`Options::causal`]
/// leaves it.
#[derive(Clone, Debug)]
pub struct Options {
    causal: bool,
    strict: bool,
    key_mask: Option<Arc<[bool]>>,
    packed: Option<[Arc<[usize]>; 2]>,
    decay: Option<(Decay, Tensor)>,
    constant: Option<Arc<[f64]>>,
}

impl Options {
    /// Query t attends to keys 0 … t.
    pub fn causal() -> Self {
        Options {
            causal: true,
            strict: true,
            key_mask: None,
            packed: None,
            decay: None,
            constant: None,
        }
    }

    /// Every query attends to all keys.
    pub fn full() -> Self {
        Options { causal: false, ..Options::causal() }
    }

    /// Whether a denominator that is not positive and finite is an error, which it is unless said
    /// otherwise: a graph has no other place to tell of it.
    pub fn strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }

    /// Which keys exist, `[batch, keys]` row-major: `false` marks padding.
    pub fn key_mask(mut self, mask: impl Into<Arc<[bool]>>) -> Self {
        self.key_mask = Some(mask.into());
        self
    }

    /// Sequences of different lengths side by side in a batch of one, as
    /// [`Call::packed`](sata::Call::packed) takes them.
    pub fn packed(
        mut self,
        cu_queries: impl Into<Arc<[usize]>>,
        cu_keys: impl Into<Arc<[usize]>>,
    ) -> Self {
        self.packed = Some([cu_queries.into(), cu_keys.into()]);
        self
    }

    /// Logarithms of the forget gates, `[batch, keys, kv_heads]`, each at most 0, for a spec with
    /// [`Decay::Gates`]. They are rounded to f32. Takes the place of slopes.
    pub fn log_gates(mut self, log_gates: &Tensor) -> Self {
        self.decay = Some((Decay::Gates, log_gates.clone()));
        self
    }

    /// Slopes, `[kv_heads]`, each at least 0, for a spec with [`Decay::Slopes`]. Takes the place
    /// of gates.
    pub fn slopes(mut self, slopes: &Tensor) -> Self {
        self.decay = Some((Decay::Slopes, slopes.clone()));
        self
    }

    /// Slopes that have no gradient, one for each key/value head, for a spec with
    /// [`Decay::Slopes`]. [`Options::slopes`] and [`Options::log_gates`] go before them.
    pub fn constant_slopes(mut self, slopes: impl Into<Arc<[f64]>>) -> Self {
        self.constant = Some(slopes.into());
        self
    }
}

/// Attention of queries, keys and values in one packed projection: qkv
/// `[batch, tokens, heads·d_key + kv_heads·(d_key + d_value)]` holds each token's queries, then
/// keys, then values, head by head. The result is `[batch, tokens, heads·d_value]`. Nothing is
/// copied or transposed on the way.
///
/// # Errors
/// Sizes or types that do not fit, wrapped [`sata::Error`]s.
pub fn attention_packed(
    plan: &Arc<Plan>,
    qkv: &Tensor,
    heads: usize,
    kv_heads: usize,
    options: &Options,
) -> Result<Tensor> {
    check_float(OP, "qkv", qkv)?;
    let [batch, tokens, width] = *qkv.dims() else {
        return Err(error::shape(OP, "qkv", qkv.dims(), "it must be [batch, tokens, width]"));
    };
    let (d_key, d_value) = (plan.spec().d_key(), plan.spec().d_value());
    let wanted = |heads: usize, kv_heads: usize| {
        let keys = heads.checked_add(kv_heads)?.checked_mul(d_key)?;
        keys.checked_add(kv_heads.checked_mul(d_value)?)
    };
    if wanted(heads, kv_heads) != Some(width) {
        let expected = format!(
            "{heads} heads and {kv_heads} key/value heads of d_key {d_key} and d_value {d_value} \
             need a width of {:?}",
            wanted(heads, kv_heads)
        );
        return Err(error::shape(OP, "qkv", qkv.dims(), expected));
    }
    let sizes = Sizes { batch, heads, kv_heads, queries: tokens, keys: tokens, d_key, d_value };
    apply(plan, qkv, sizes, true, options)
}

/// Attention of q `[batch, heads, queries, d_key]`, k `[batch, kv_heads, keys, d_key]` and v
/// `[batch, kv_heads, keys, d_value]`: `[batch, heads, queries, d_value]`. They may be strided;
/// they are copied once. Query head h reads key/value head h / (heads / kv_heads).
///
/// # Errors
/// Sizes or types that do not fit, wrapped [`sata::Error`]s.
pub fn attention(
    plan: &Arc<Plan>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &Options,
) -> Result<Tensor> {
    check_float(OP, "q", q)?;
    let four = |argument, x: &Tensor| match *x.dims() {
        [a, b, c, d] => Ok([a, b, c, d]),
        _ => {
            let expected = "it must be [batch, heads, tokens, dim]";
            Err(error::shape(OP, argument, x.dims(), expected))
        }
    };
    let ([batch, heads, queries, d_key], [_, kv_heads, keys, _], [.., d_value]) =
        (four("q", q)?, four("k", k)?, four("v", v)?);
    for (argument, x, wants) in
        [("k", k, [batch, kv_heads, keys, d_key]), ("v", v, [batch, kv_heads, keys, d_value])]
    {
        if x.dims() != wants {
            let expected = format!("the other arguments need {wants:?}");
            return Err(error::shape(OP, argument, x.dims(), expected));
        }
        check_type(OP, argument, x, q.dtype())?;
    }
    let sizes = Sizes { batch, heads, kv_heads, queries, keys, d_key, d_value };
    let flat = Tensor::cat(&[q.flatten_all()?, k.flatten_all()?, v.flatten_all()?], 0)?;
    apply(plan, &flat, sizes, false, options)
}

fn apply(
    plan: &Arc<Plan>,
    x: &Tensor,
    sizes: Sizes,
    packed: bool,
    options: &Options,
) -> Result<Tensor> {
    let Sizes { batch, kv_heads, keys, .. } = sizes;
    let decay = match &options.decay {
        Some((decay, tensor)) => {
            let (argument, wants) = match decay {
                Decay::Gates => ("log_gates", vec![batch, keys, kv_heads]),
                _ => ("slopes", vec![kv_heads]),
            };
            if tensor.dims() != wants {
                let expected = format!("it must be {wants:?}");
                return Err(error::shape(OP, argument, tensor.dims(), expected));
            }
            check_type(OP, argument, tensor, x.dtype())?;
            Some((*decay, tensor.contiguous()?))
        }
        None => None,
    };
    let op = Op {
        plan: plan.clone(),
        sizes,
        packed,
        options: Options { decay: None, ..options.clone() },
        decay: decay.as_ref().map(|(decay, _)| *decay),
    };
    match decay {
        Some((_, decay)) => x.contiguous()?.apply_op2(&decay, op),
        None => x.contiguous()?.apply_op1(op),
    }
}

#[derive(Clone, Copy, Debug)]
struct Sizes {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    queries: usize,
    keys: usize,
    d_key: usize,
    d_value: usize,
}

impl Sizes {
    fn q(&self) -> [usize; 4] {
        [self.batch, self.heads, self.queries, self.d_key]
    }
    fn k(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.keys, self.d_key]
    }
    fn v(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.keys, self.d_value]
    }
    fn y(&self) -> [usize; 4] {
        [self.batch, self.heads, self.queries, self.d_value]
    }
    fn gates(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.keys, 1]
    }
    fn gate_strides(&self) -> [usize; 3] {
        [self.keys * self.kv_heads, 1, self.kv_heads]
    }
}

/// One attention over a tensor that holds queries, keys and values, token by token in one row
/// (packed) or one after the other.
struct Op {
    plan: Arc<Plan>,
    sizes: Sizes,
    packed: bool,
    options: Options,
    decay: Option<Decay>,
}

/// Gates and slopes as [`Call`] takes them.
enum Fade {
    None,
    Gates(Vec<f32>),
    Slopes(Vec<f64>),
}

impl Op {
    fn fade<T: Float>(&self, decay: Option<&[T]>) -> Fade {
        match (self.decay, decay) {
            (Some(Decay::Gates), Some(x)) => {
                Fade::Gates(x.iter().map(|&x| WithDType::to_f64(x) as f32).collect())
            }
            (_, Some(x)) => Fade::Slopes(x.iter().map(|&x| WithDType::to_f64(x)).collect()),
            (_, None) => match &self.options.constant {
                Some(slopes) => Fade::Slopes(slopes.to_vec()),
                None => Fade::None,
            },
        }
    }

    fn call<'a, T: Float>(
        &'a self,
        x: &'a [T],
        fade: &'a Fade,
    ) -> std::result::Result<Call<'a, 'static, T>, sata::Error> {
        let s = self.sizes;
        let (q, k, v) = if self.packed {
            let (queries, keys) = (s.heads * s.d_key, s.kv_heads * s.d_key);
            let token = queries + keys + s.kv_heads * s.d_value;
            let part = |at: usize, shape: [usize; 4]| {
                let x = &x[at.min(x.len())..];
                View::strided(x, shape, [token * s.keys, shape[3], token])
            };
            (part(0, s.q())?, part(queries, s.k())?, part(queries + keys, s.v())?)
        } else {
            let (q, k) = x.split_at(s.q().iter().product());
            let (k, v) = k.split_at(s.k().iter().product());
            (View::new(q, s.q())?, View::new(k, s.k())?, View::new(v, s.v())?)
        };
        let mut call =
            if self.options.causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
        if let Some(mask) = &self.options.key_mask {
            call = call.key_mask(mask);
        }
        if let Some([cu_queries, cu_keys]) = &self.options.packed {
            call = call.packed(cu_queries, cu_keys);
        }
        Ok(match fade {
            Fade::None => call,
            Fade::Gates(x) => call.log_gates(View::strided(x, s.gates(), s.gate_strides())?),
            Fade::Slopes(x) => call.slopes(x),
        })
    }

    /// The output's shape.
    fn shape(&self) -> Shape {
        let s = self.sizes;
        match self.packed {
            true => (s.batch, s.queries, s.heads * s.d_value).into(),
            false => s.y().to_vec().into(),
        }
    }

    /// Strides of the outputs.
    fn y_strides(&self) -> [usize; 3] {
        let s = self.sizes;
        let head = if self.packed { s.d_value } else { s.queries * s.d_value };
        let token = if self.packed { s.heads * s.d_value } else { s.d_value };
        [s.heads * s.queries * s.d_value, head, token]
    }

    fn forward<T: Float>(
        &self,
        x: &[T],
        decay: Option<&[T]>,
    ) -> std::result::Result<Vec<T>, sata::Error> {
        let fade = self.fade(decay);
        let shape = self.sizes.y();
        let mut y = vec![T::default(); shape.iter().product()];
        let out = ViewMut::strided(&mut y, shape, self.y_strides())?;
        self.plan.run(self.call(x, &fade)?.strict(self.options.strict), out)?;
        Ok(y)
    }

    /// The gradients of the tensor and of gates or slopes.
    fn backward<T: Float>(
        &self,
        x: &[T],
        decay: Option<&[T]>,
        dy: &[T],
    ) -> std::result::Result<(Vec<T>, Option<Vec<T>>), sata::Error> {
        let s = self.sizes;
        let fade = self.fade(decay);
        let mut dx = vec![T::default(); x.len()];
        let (queries, keys, values) = (s.q(), s.k(), s.v());
        let (q, k, v) = if self.packed {
            let token = s.heads * s.d_key + s.kv_heads * (s.d_key + s.d_value);
            let all = ViewMut::new(&mut dx, [s.batch, 1, s.keys, token])?;
            let (q, rest) = all.split_rows(s.heads * s.d_key)?;
            let (k, v) = rest.split_rows(s.kv_heads * s.d_key)?;
            (q.into_heads(s.heads)?, k.into_heads(s.kv_heads)?, v.into_heads(s.kv_heads)?)
        } else {
            let (q, rest) = dx.split_at_mut(queries.iter().product());
            let (k, v) = rest.split_at_mut(keys.iter().product());
            (ViewMut::new(q, queries)?, ViewMut::new(k, keys)?, ViewMut::new(v, values)?)
        };
        let dy = View::strided(dy, s.y(), self.y_strides())?;
        let gradients = Gradients::new(q, k, v);
        let call = self.call(x, &fade)?;
        let d_decay = match &fade {
            Fade::None => {
                self.plan.backward(call, dy, gradients)?;
                None
            }
            Fade::Gates(gates) => {
                let mut d_gates = vec![T::default(); gates.len()];
                let view = ViewMut::strided(&mut d_gates, s.gates(), s.gate_strides())?;
                self.plan.backward(call, dy, gradients.log_gates(view))?;
                Some(d_gates)
            }
            Fade::Slopes(slopes) => {
                let mut d_slopes = vec![0.0; slopes.len()];
                self.plan.backward(call, dy, gradients.slopes(&mut d_slopes))?;
                Some(d_slopes.into_iter().map(T::of).collect())
            }
        };
        Ok((dx, d_decay))
    }

    fn gradients(
        &self,
        x: &Tensor,
        decay: Option<&Tensor>,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return self.device_backward(x, decay, &dy);
        }
        by_type!(OP, x.dtype(), T => {
            let (dx, d_decay) = read::<T, _>(OP, x, |x| read::<T, _>(OP, &dy, |dy| {
                let both = match decay {
                    Some(decay) => {
                        read::<T, _>(OP, decay, |decay| Ok(self.backward(x, Some(decay), dy)))?
                    }
                    None => self.backward(x, None, dy),
                };
                both.map_err(candle_core::Error::wrap)
            }))?;
            let d_decay = decay.zip(d_decay).map(|(decay, data)| tensor(data, decay));
            Ok((Some(tensor(dx, x)?), d_decay.transpose()?))
        })
    }

    fn run(
        &self,
        x: (&CpuStorage, &Layout),
        decay: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        let shape = self.shape();
        by_type!(OP, candle_core::backend::BackendStorage::dtype(x.0), T => {
            let decay = match decay {
                Some((storage, layout)) => Some(slice::<T>(OP, storage, layout)?),
                None => None,
            };
            let y = self.forward(slice::<T>(OP, x.0, x.1)?, decay);
            Ok((T::to_cpu_storage_owned(y.map_err(candle_core::Error::wrap)?), shape))
        })
    }
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run((x, layout), None)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.device_forward((x, layout), None)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.gradients(x, None, dy)?.0)
    }
}

impl CustomOp2 for Op {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        decay: &CpuStorage,
        decay_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.run((x, layout), Some((decay, decay_layout)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
        decay: &candle_core::CudaStorage,
        decay_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.device_forward((x, layout), Some((decay, decay_layout)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        decay: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.gradients(x, Some(decay), dy)
    }
}

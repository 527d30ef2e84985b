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

/// Heads of one projection that compute the same.
#[derive(Clone, Debug)]
pub struct HeadGroup {
    /// What they compute, and how.
    pub plan: Arc<Plan>,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads, of which `heads` is a multiple.
    pub kv_heads: usize,
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
    attention_groups(&[HeadGroup { plan: plan.clone(), heads, kv_heads }], qkv, options)
}

/// The same of a mixture: the first heads are those of the first group, the next those of the
/// second, and so on, of queries, keys, values, gates and slopes alike. Plans agree in d_key and
/// d_value. Still nothing is copied: each group reads and writes its part of the rows.
///
/// # Errors
/// Sizes or types that do not fit, wrapped [`sata::Error`]s.
pub fn attention_groups(groups: &[HeadGroup], qkv: &Tensor, options: &Options) -> Result<Tensor> {
    check_float(OP, "qkv", qkv)?;
    let [batch, tokens, width] = *qkv.dims() else {
        return Err(error::shape(OP, "qkv", qkv.dims(), "it must be [batch, tokens, width]"));
    };
    let dims = |group: &HeadGroup| (group.plan.spec().d_key(), group.plan.spec().d_value());
    let Some((d_key, d_value)) = groups.first().map(dims) else {
        return Err(error::value(OP, "groups", "empty", "there must be at least one"));
    };
    if let Some(i) = groups.iter().position(|group| dims(group) != (d_key, d_value)) {
        let (got, expected) = (dims(&groups[i]), (d_key, d_value));
        let got = format!("{got:?} in group {i} (d_key and d_value)");
        return Err(error::value(OP, "groups", got, format!("{expected:?} in the first")));
    }
    let sum = |of: fn(&HeadGroup) -> usize| {
        groups.iter().try_fold(0usize, |sum, group| sum.checked_add(of(group)))
    };
    let all = sum(|group| group.heads).zip(sum(|group| group.kv_heads));
    let wanted = all.and_then(|(heads, kv_heads)| {
        let keys = heads.checked_add(kv_heads)?.checked_mul(d_key)?;
        keys.checked_add(kv_heads.checked_mul(d_value)?)
    });
    let (heads, kv_heads) = match all {
        Some(all) if wanted == Some(width) => all,
        _ => {
            let heads: Vec<_> = groups.iter().map(|g| (g.heads, g.kv_heads)).collect();
            let expected = format!(
                "heads and key/value heads {heads:?} of d_key {d_key} and d_value {d_value} need a \
                 width of {wanted:?}"
            );
            return Err(error::shape(OP, "qkv", qkv.dims(), expected));
        }
    };
    let sizes = Sizes { batch, heads, kv_heads, queries: tokens, keys: tokens, d_key, d_value };
    let (mut query, mut kv) = (0, 0);
    let part = |group: &HeadGroup| {
        let HeadGroup { plan, heads, kv_heads } = group.clone();
        let part = Part { plan, sizes: Sizes { heads, kv_heads, ..sizes }, query, kv };
        (query, kv) = (query + heads, kv + kv_heads);
        part
    };
    apply(groups.iter().map(part).collect(), qkv, sizes, true, options)
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
    apply(vec![Part { plan: plan.clone(), sizes, query: 0, kv: 0 }], &flat, sizes, false, options)
}

fn apply(
    parts: Vec<Part>,
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
        None => {
            if let Some(slopes) = options.constant.as_ref().filter(|x| x.len() != kv_heads) {
                let expected = format!("it must be [{kv_heads}]");
                return Err(error::shape(OP, "slopes", &[slopes.len()], expected));
            }
            None
        }
    };
    let op = Op {
        parts,
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

/// Some of the heads, and what they compute.
struct Part {
    plan: Arc<Plan>,
    /// Those of the whole, but with these heads alone.
    sizes: Sizes,
    /// The first of its query heads.
    query: usize,
    /// The first of its key/value heads.
    kv: usize,
}

/// One attention over a tensor that holds queries, keys and values, token by token in one row
/// (packed) or one after the other. Only where it is packed there may be several parts.
struct Op {
    parts: Vec<Part>,
    sizes: Sizes,
    packed: bool,
    options: Options,
    decay: Option<Decay>,
}

impl Part {
    /// Its slopes among all.
    fn slopes<'a>(&self, all: &'a [f64]) -> &'a [f64] {
        &all[self.kv..self.kv + self.sizes.kv_heads]
    }

    fn slopes_mut<'a>(&self, all: &'a mut [f64]) -> &'a mut [f64] {
        &mut all[self.kv..self.kv + self.sizes.kv_heads]
    }
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

    /// Where a part's queries, keys and values begin in a token's row, and the row's elements.
    fn row(&self, part: &Part) -> ([usize; 3], usize) {
        let s = self.sizes;
        let (queries, keys) = (s.heads * s.d_key, s.kv_heads * s.d_key);
        let starts = [
            part.query * s.d_key,
            queries + part.kv * s.d_key,
            queries + keys + part.kv * s.d_value,
        ];
        (starts, queries + keys + s.kv_heads * s.d_value)
    }

    fn call<'a, T: Float>(
        &'a self,
        part: &'a Part,
        x: &'a [T],
        fade: &'a Fade,
    ) -> std::result::Result<Call<'a, 'static, T>, sata::Error> {
        let s = part.sizes;
        let (q, k, v) = if self.packed {
            let (starts, token) = self.row(part);
            let view = |at: usize, shape: [usize; 4]| {
                let x = &x[at.min(x.len())..];
                View::strided(x, shape, [token * s.keys, shape[3], token])
            };
            (view(starts[0], s.q())?, view(starts[1], s.k())?, view(starts[2], s.v())?)
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
            Fade::Gates(x) => {
                let strides = self.sizes.gate_strides();
                call.log_gates(View::strided(&x[part.kv.min(x.len())..], s.gates(), strides)?)
            }
            Fade::Slopes(x) => call.slopes(part.slopes(x)),
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
        let mut y = vec![T::default(); self.sizes.y().iter().product()];
        for part in &self.parts {
            let first = (part.query * self.sizes.d_value).min(y.len());
            let out = ViewMut::strided(&mut y[first..], part.sizes.y(), self.y_strides())?;
            part.plan.run(self.call(part, x, &fade)?.strict(self.options.strict), out)?;
        }
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
        let (mut d_gates, mut d_slopes) = match &fade {
            Fade::None => (vec![], vec![]),
            Fade::Gates(gates) => (vec![T::default(); gates.len()], vec![]),
            Fade::Slopes(slopes) => (vec![], vec![0.0; slopes.len()]),
        };
        for (part, [q, k, v]) in self.parts.iter().zip(self.gradient_views(&mut dx)?) {
            let first = (part.query * s.d_value).min(dy.len());
            let dy = View::strided(&dy[first..], part.sizes.y(), self.y_strides())?;
            let (call, gradients) = (self.call(part, x, &fade)?, Gradients::new(q, k, v));
            let gradients = match &fade {
                Fade::None => gradients,
                Fade::Gates(_) => {
                    let first = part.kv.min(d_gates.len());
                    let (shape, strides) = (part.sizes.gates(), s.gate_strides());
                    let view = ViewMut::strided(&mut d_gates[first..], shape, strides)?;
                    gradients.log_gates(view)
                }
                Fade::Slopes(_) => gradients.slopes(part.slopes_mut(&mut d_slopes)),
            };
            part.plan.backward(call, dy, gradients)?;
        }
        let d_decay = match &fade {
            Fade::None => None,
            Fade::Gates(_) => Some(d_gates),
            Fade::Slopes(_) => Some(d_slopes.into_iter().map(T::of).collect()),
        };
        Ok((dx, d_decay))
    }

    /// Where the gradients of each part's queries, keys and values are written.
    fn gradient_views<'a, T: Float>(
        &self,
        dx: &'a mut [T],
    ) -> std::result::Result<Vec<[ViewMut<'a, T>; 3]>, sata::Error> {
        let s = self.sizes;
        if !self.packed {
            let [queries, keys, values] = [s.q(), s.k(), s.v()];
            let (q, rest) = dx.split_at_mut(queries.iter().product());
            let (k, v) = rest.split_at_mut(keys.iter().product());
            let views =
                [ViewMut::new(q, queries)?, ViewMut::new(k, keys)?, ViewMut::new(v, values)?];
            return Ok(vec![views]);
        }
        let token = s.heads * s.d_key + s.kv_heads * (s.d_key + s.d_value);
        let mut rest = ViewMut::new(dx, [s.batch, 1, s.keys, token])?;
        // A row has every part's queries, then every part's keys, then every part's values.
        let mut views = vec![];
        for of in [Sizes::q, Sizes::k, Sizes::v] {
            for part in &self.parts {
                let [_, heads, _, d] = of(&part.sizes);
                let (first, others) = rest.split_rows(heads * d)?;
                views.push(first.into_heads(heads)?);
                rest = others;
            }
        }
        let values = views.split_off(2 * self.parts.len());
        let keys = views.split_off(self.parts.len());
        Ok(views.into_iter().zip(keys).zip(values).map(|((q, k), v)| [q, k, v]).collect())
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

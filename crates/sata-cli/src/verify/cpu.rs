//! Cases on the CPU engine.

use std::any::Any;
use std::ops::Range;

use sata::{Call, Decay, Diagnostics, Gradients, Plan, Spec, State, StateGradient, View, ViewMut};
use sata_cuda::Element;

use super::inputs::{Inputs, Sizes, len};
use super::machine::{ByInputs, How, Machine};
use crate::failure::Outcome;

/// A case's inputs.
pub struct OnCpu<'c, E> {
    plan: Plan,
    inputs: &'c Inputs<E>,
    causal: bool,
    state: Option<State<f32>>,
    y: Vec<E>,
}

impl<'c, E: Element> OnCpu<'c, E> {
    /// Makes the plan.
    ///
    /// # Errors
    /// What the library refuses.
    pub fn new(spec: &Spec, inputs: &'c Inputs<E>, causal: bool, how: How) -> Outcome<Self> {
        let plan = Plan::new(spec)?;
        let plan = match how.form {
            Some(form) => plan.with_form(form),
            None => plan,
        };
        let y = vec![E::from_compute(f32::NAN); len(inputs.sizes.y())];
        Ok(OnCpu { plan, inputs, causal, state: None, y })
    }
}

/// Some tokens of a tensor.
fn part<T: sata::Element>(
    x: &[T],
    [batch, heads, all, dim]: [usize; 4],
    tokens: Range<usize>,
) -> Outcome<View<'_, T>> {
    let strides = [heads * all * dim, all * dim, dim];
    let from = (tokens.start * dim).min(x.len());
    Ok(View::strided(&x[from..], [batch, heads, tokens.len(), dim], strides)?)
}

fn part_mut<T: sata::Element>(
    x: &mut [T],
    [batch, heads, all, dim]: [usize; 4],
    tokens: Range<usize>,
) -> Outcome<ViewMut<'_, T>> {
    let strides = [heads * all * dim, all * dim, dim];
    let from = (tokens.start * dim).min(x.len());
    Ok(ViewMut::strided(&mut x[from..], [batch, heads, tokens.len(), dim], strides)?)
}

/// Some queries of all sequences and some of their keys.
struct Tokens<'c, E> {
    inputs: &'c Inputs<E>,
    queries: Range<usize>,
    keys: Range<usize>,
    /// Of these keys, sequence by sequence.
    mask: Option<Vec<bool>>,
}

impl<'c, E: Element> Tokens<'c, E> {
    fn new(inputs: &'c Inputs<E>, queries: Range<usize>, keys: Range<usize>) -> Self {
        let all = inputs.sizes.keys.max(1);
        let cut = |mask: &Vec<bool>| {
            mask.chunks(all).flat_map(|row| row[keys.clone()].to_vec()).collect()
        };
        Tokens { mask: inputs.mask.as_ref().map(cut), inputs, queries, keys }
    }

    fn call(&self, causal: bool) -> Outcome<Call<'_, '_, E>> {
        let (inputs, s) = (self.inputs, self.inputs.sizes);
        let q = part(&inputs.q, s.q(), self.queries.clone())?;
        let k = part(&inputs.k, s.k(), self.keys.clone())?;
        let v = part(&inputs.v, s.v(), self.keys.clone())?;
        let mut call = if causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
        if let Some(mask) = &self.mask {
            call = call.key_mask(mask);
        }
        if let Some(slopes) = &inputs.slopes {
            call = call.slopes(slopes);
        }
        if let Some(gates) = &inputs.gates {
            call = call.log_gates(part(gates, s.gates(), self.keys.clone())?);
        }
        Ok(call)
    }
}

impl<E: Element> Machine<E> for OnCpu<'_, E> {
    fn poison(&mut self) -> Outcome {
        self.y.fill(E::from_compute(f32::NAN));
        Ok(())
    }

    fn whole(&mut self, cu: Option<&[usize]>) -> Outcome<Diagnostics> {
        let s = self.inputs.sizes;
        let tokens = Tokens::new(self.inputs, 0..s.queries, 0..s.keys);
        let mut call = tokens.call(self.causal)?;
        if let Some(cu) = cu {
            call = call.packed(cu, cu);
        }
        Ok(self.plan.run(call, ViewMut::new(&mut self.y, s.y())?)?)
    }

    fn begin(&mut self) -> Outcome {
        let s = self.inputs.sizes;
        self.state = Some(State::new(&self.plan, s.batch, s.kv_heads)?);
        Ok(())
    }

    fn feed(&mut self, tokens: Range<usize>) -> Outcome<Diagnostics> {
        let s = self.inputs.sizes;
        let fed = Tokens::new(self.inputs, tokens.clone(), tokens.clone());
        let mut call = fed.call(true)?;
        if let Some(state) = &mut self.state {
            call = call.state(state);
        }
        Ok(self.plan.run(call, part_mut(&mut self.y, s.y(), tokens)?)?)
    }

    fn read(&mut self, cut: usize) -> Outcome<Diagnostics> {
        let s = self.inputs.sizes;
        let mut state = State::new(&self.plan, s.batch, s.kv_heads)?;
        let nobody = Sizes { queries: 0, ..s };
        let tokens = Tokens::new(self.inputs, 0..0, 0..cut);
        let call = tokens.call(false)?.state(&mut state);
        self.plan.run(call, ViewMut::new(&mut [], nobody.y())?)?;
        let tokens = Tokens::new(self.inputs, 0..s.queries, cut..s.keys);
        let call = tokens.call(false)?.state(&mut state);
        Ok(self.plan.run(call, ViewMut::new(&mut self.y, s.y())?)?)
    }

    fn is_lockstep(&self) -> bool {
        true
    }

    fn step(&mut self, tokens: &[(usize, usize)]) -> Outcome {
        let token = tokens.first().map_or(0, |first| first.1);
        debug_assert_eq!(tokens.len(), self.inputs.sizes.batch);
        self.feed(token..token + 1).map(drop)
    }

    fn move_state(&mut self) -> Outcome {
        if let Some(state) = &mut self.state {
            *state = State::from_bytes(&self.plan, &state.to_bytes(), "the state")?;
        }
        Ok(())
    }

    fn y(&mut self) -> Outcome<Vec<E>> {
        Ok(self.y.clone())
    }

    fn backward(&mut self, dy: &[E], cut: Option<usize>) -> Outcome<Option<ByInputs>> {
        // The CPU engine has it in its own types alone.
        let inputs: &dyn Any = &Held(self.inputs.clone());
        let dy: &dyn Any = &dy.to_vec();
        match (inputs.downcast_ref::<Held<f32>>(), dy.downcast_ref::<Vec<f32>>()) {
            (Some(inputs), Some(dy)) => {
                backward(&self.plan, &inputs.0, self.causal, dy, cut).map(Some)
            }
            _ => Ok(None),
        }
    }
}

/// Inputs of a type that is looked at.
struct Held<E>(Inputs<E>);

fn backward(
    plan: &Plan,
    inputs: &Inputs<f32>,
    causal: bool,
    dy: &[f32],
    cut: Option<usize>,
) -> Outcome<ByInputs> {
    let s = inputs.sizes;
    let nan = |n: usize| vec![f32::NAN; n];
    let (mut dq, mut dk, mut dv) = (nan(len(s.q())), nan(len(s.k())), nan(len(s.v())));
    let (mut by_gates, mut by_slopes) = (nan(len(s.gates())), vec![0.0; s.kv_heads]);
    let decay = plan.spec().decay();
    let mut by_state = StateGradient::new(plan, s.batch, s.kv_heads)?;
    // The state that the second call began with.
    let mut middle = State::new(plan, s.batch, s.kv_heads)?;
    let mut parts = vec![(0..s.queries, 0..s.keys, false)];
    if let Some(cut) = cut {
        let mut y = nan(len(s.y()));
        let tokens = Tokens::new(inputs, 0..cut, 0..cut);
        plan.run(tokens.call(true)?.state(&mut middle), part_mut(&mut y, s.y(), 0..cut)?)?;
        parts = vec![(cut..s.queries, cut..s.keys, true), (0..cut, 0..cut, false)];
    }
    for (queries, keys, goes_on) in parts {
        let mut out = Gradients::new(
            part_mut(&mut dq, s.q(), queries.clone())?,
            part_mut(&mut dk, s.k(), keys.clone())?,
            part_mut(&mut dv, s.v(), keys.clone())?,
        );
        let mut slopes = vec![f64::NAN; s.kv_heads];
        match decay {
            Decay::None => (),
            Decay::Slopes => out = out.slopes(&mut slopes),
            Decay::Gates => {
                out = out.log_gates(part_mut(&mut by_gates, s.gates(), keys.clone())?);
            }
        }
        let tokens = Tokens::new(inputs, queries.clone(), keys);
        let mut call = tokens.call(causal)?;
        if goes_on {
            call = call.state(&mut middle);
        }
        if cut.is_some() {
            out = out.state(&mut by_state);
        }
        plan.backward(call, part(dy, s.y(), queries)?, out)?;
        if decay == Decay::Slopes {
            by_slopes.iter_mut().zip(slopes).for_each(|(sum, x)| *sum += x);
        }
    }
    let wide = super::inputs::wide::<f32>;
    Ok(ByInputs {
        q: wide(&dq),
        k: wide(&dk),
        v: wide(&dv),
        log_gates: if decay == Decay::Gates { wide(&by_gates) } else { vec![] },
        slopes: if decay == Decay::Slopes { by_slopes } else { vec![] },
    })
}

//! Cases on the CPU engine.

use std::any::Any;
use std::ops::Range;

use sata::{Call, Decay, Diagnostics, Gradients, Plan, Spec, State, View, ViewMut};
use sata_cuda::Element;

use super::inputs::{Inputs, len};
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

/// The masks of some tokens of every sequence, side by side.
fn mask<E>(inputs: &Inputs<E>, tokens: &Range<usize>) -> Option<Vec<bool>> {
    let keys = inputs.sizes.keys.max(1);
    let mask = inputs.mask.as_ref()?;
    Some(mask.chunks(keys).flat_map(|row| row[tokens.clone()].to_vec()).collect())
}

impl<E: Element> Machine<E> for OnCpu<'_, E> {
    fn poison(&mut self) -> Outcome {
        self.y.fill(E::from_compute(f32::NAN));
        Ok(())
    }

    fn whole(&mut self, cu: Option<&[usize]>) -> Outcome<Diagnostics> {
        let inputs = self.inputs;
        let s = inputs.sizes;
        let (q, k, v) = (
            View::new(&inputs.q, s.q())?,
            View::new(&inputs.k, s.k())?,
            View::new(&inputs.v, s.v())?,
        );
        let mut call = if self.causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
        if let Some(cu) = cu {
            call = call.packed(cu, cu);
        }
        if let Some(mask) = &inputs.mask {
            call = call.key_mask(mask);
        }
        if let Some(slopes) = &inputs.slopes {
            call = call.slopes(slopes);
        }
        if let Some(gates) = &inputs.gates {
            call = call.log_gates(View::new(gates, s.gates())?);
        }
        Ok(self.plan.run(call, ViewMut::new(&mut self.y, s.y())?)?)
    }

    fn begin(&mut self) -> Outcome {
        let s = self.inputs.sizes;
        self.state = Some(State::new(&self.plan, s.batch, s.kv_heads)?);
        Ok(())
    }

    fn feed(&mut self, tokens: Range<usize>) -> Outcome<Diagnostics> {
        let (inputs, s) = (self.inputs, self.inputs.sizes);
        let mask = mask(inputs, &tokens);
        let mut call = Call::causal(
            part(&inputs.q, s.q(), tokens.clone())?,
            part(&inputs.k, s.k(), tokens.clone())?,
            part(&inputs.v, s.v(), tokens.clone())?,
        );
        if let Some(mask) = &mask {
            call = call.key_mask(mask);
        }
        if let Some(slopes) = &inputs.slopes {
            call = call.slopes(slopes);
        }
        if let Some(gates) = &inputs.gates {
            call = call.log_gates(part(gates, s.gates(), tokens.clone())?);
        }
        if let Some(state) = &mut self.state {
            call = call.state(state);
        }
        Ok(self.plan.run(call, part_mut(&mut self.y, s.y(), tokens)?)?)
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

    fn backward(&mut self, dy: &[E]) -> Outcome<Option<ByInputs>> {
        // The CPU engine has it in its own types alone.
        let inputs: &dyn Any = &Held(self.inputs.clone());
        let dy: &dyn Any = &dy.to_vec();
        match (inputs.downcast_ref::<Held<f32>>(), dy.downcast_ref::<Vec<f32>>()) {
            (Some(inputs), Some(dy)) => backward(&self.plan, &inputs.0, self.causal, dy).map(Some),
            _ => Ok(None),
        }
    }
}

/// Inputs of a type that is looked at.
struct Held<E>(Inputs<E>);

fn backward(plan: &Plan, inputs: &Inputs<f32>, causal: bool, dy: &[f32]) -> Outcome<ByInputs> {
    let s = inputs.sizes;
    let nan = |n: usize| vec![f32::NAN; n];
    let (mut dq, mut dk, mut dv) = (nan(len(s.q())), nan(len(s.k())), nan(len(s.v())));
    let (mut by_gates, mut by_slopes) = (nan(len(s.gates())), vec![f64::NAN; s.kv_heads]);
    let (q, k, v) =
        (View::new(&inputs.q, s.q())?, View::new(&inputs.k, s.k())?, View::new(&inputs.v, s.v())?);
    let mut call = if causal { Call::causal(q, k, v) } else { Call::full(q, k, v) };
    if let Some(mask) = &inputs.mask {
        call = call.key_mask(mask);
    }
    if let Some(slopes) = &inputs.slopes {
        call = call.slopes(slopes);
    }
    if let Some(gates) = &inputs.gates {
        call = call.log_gates(View::new(gates, s.gates())?);
    }
    let mut out = Gradients::new(
        ViewMut::new(&mut dq, s.q())?,
        ViewMut::new(&mut dk, s.k())?,
        ViewMut::new(&mut dv, s.v())?,
    );
    let decay = plan.spec().decay();
    match decay {
        Decay::None => (),
        Decay::Slopes => out = out.slopes(&mut by_slopes),
        Decay::Gates => out = out.log_gates(ViewMut::new(&mut by_gates, s.gates())?),
    }
    plan.backward(call, View::new(dy, s.y())?, out)?;
    let wide = super::inputs::wide::<f32>;
    Ok(ByInputs {
        q: wide(&dq),
        k: wide(&dk),
        v: wide(&dv),
        log_gates: if decay == Decay::Gates { wide(&by_gates) } else { vec![] },
        slopes: if decay == Decay::Slopes { by_slopes } else { vec![] },
    })
}

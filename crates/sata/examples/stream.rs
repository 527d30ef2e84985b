//! A past of any length in a state of one size: prefill, a few steps, save, load, go on.

use sata::{Plan, Spec, State, View, ViewMut};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (heads, d) = (2, 16);
    let plan = Plan::new(&Spec::new(d, d).terms(3).build()?)?;
    let mut state = State::<f32>::new(&plan, 1, heads)?;
    println!("state: {} bytes", state.bytes());

    // Any numbers stand for the output of a projection here.
    let wave = |n: usize, phase: f32| -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.37 + phase).sin()).collect()
    };
    for tokens in [1000, 1, 1, 1] {
        let shape = [1, heads, tokens, d];
        let n = heads * tokens * d;
        let (q, k, v) = (wave(n, 0.0), wave(n, 1.0), wave(n, 2.0));
        let mut y = vec![0.0; n];
        plan.extend(
            &mut state,
            View::new(&q, shape)?,
            View::new(&k, shape)?,
            View::new(&v, shape)?,
            ViewMut::new(&mut y, shape)?,
        )?;
        println!("after {} tokens: y[0] = {:.6}", state.position(0), y[n - d]);
    }

    let file = tempfile::NamedTempFile::new()?;
    state.save(file.path())?;
    let resumed = State::<f32>::load(&plan, file.path())?;
    println!("loaded at token {}, still {} bytes", resumed.position(0), resumed.bytes());
    Ok(())
}

//! What is tried: every series, number of terms and near window, and each window alone.

use sata::{Element, Near, Real, Series, Spec};
use serde::{Serialize, Serializer};

use crate::failure::{Failure, Outcome};
use crate::series::SeriesArg;

/// How the near window is cut.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Window {
    /// Tokens in a block.
    pub block: usize,
    /// First tokens that stay near for ever, where anything is near.
    pub sinks: usize,
}

impl Window {
    /// The keys before token `t` that are near it besides the sinks begin here.
    pub fn begin(&self, near: usize, t: usize) -> usize {
        (t / self.block).saturating_sub(near).saturating_mul(self.block)
    }
}

/// What weighs the far past.
#[derive(Clone, Debug, PartialEq)]
pub struct Far {
    /// What it is called.
    name: String,
    series: Series,
    /// How many, for a series that leaves it open.
    terms: Option<usize>,
}

impl Far {
    /// A series of so many terms, named as the argument names it.
    pub fn with_terms(arg: &SeriesArg, series: &Series, terms: usize) -> Self {
        Far { name: format!("{arg} P={terms}"), series: series.clone(), terms: Some(terms) }
    }
}

/// One attention that might stand in for softmax.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// What weighs the far past; nothing does where it is dropped.
    pub far: Option<Far>,
    /// Blocks before a query's own that are exact.
    pub near: Option<usize>,
}

impl Candidate {
    /// What it is called everywhere.
    pub fn name(&self) -> String {
        let far = self.far.as_ref().map_or("window", |far| &far.name);
        match self.near {
            None => far.into(),
            Some(n) => format!("{far}, near {n}"),
        }
    }

    /// The library's description of it; `None` where the far past is dropped.
    ///
    /// # Errors
    /// Sizes that the library refuses.
    pub fn spec(
        &self,
        [d_key, d_value]: [usize; 2],
        scale: Option<f64>,
        window: Window,
    ) -> Result<Option<Spec>, sata::Error> {
        let Some(far) = &self.far else { return Ok(None) };
        let builder = Spec::new(d_key, d_value).block(window.block).series(far.series.clone());
        let builder = match far.terms {
            None => builder,
            Some(terms) => builder.terms(terms),
        };
        let builder = match self.near {
            None => builder,
            Some(n) => builder.near(Near::Blocks(n)).sinks(window.sinks),
        };
        let builder = match scale {
            None => builder,
            Some(scale) => builder.scale(scale),
        };
        builder.build().map(Some)
    }

    /// Bytes of the whole state of one key/value head for inputs of type `E`: far sums with what
    /// rounding took from them, and keys and values of the open blocks and the sinks.
    pub fn state_bytes<E: Element>(
        &self,
        spec: Option<&Spec>,
        [d_key, d_value]: [usize; 2],
        window: Window,
    ) -> u128 {
        let width = size_of::<E::Compute>();
        let sums = spec.map_or(0, |spec| {
            let compensated = <E::Compute as Real>::COMPENSATED;
            sata::cost::state_bytes(d_key, d_value, &spec.orders(), width, compensated)
        });
        let block = window.block as u128;
        let raw = match self.near {
            // The block that is filling.
            None => block,
            Some(n) => block.saturating_mul(n as u128 + 1).saturating_add(window.sinks as u128),
        };
        let token = (d_key as u128 + d_value as u128) * width as u128;
        sums.saturating_add(raw.saturating_mul(token))
    }
}

impl Serialize for Candidate {
    /// As its name: what reports list it under.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.name())
    }
}

/// All candidates: each near setting with each series that can have so many terms, and each window
/// alone.
///
/// # Errors
/// When the lists leave nothing to try, or hold a series that cannot be.
pub fn candidates(
    series: &[SeriesArg],
    terms: &[usize],
    near: &[Option<usize>],
) -> Outcome<Vec<Candidate>> {
    let mut far = vec![];
    for arg in series {
        let series = arg.read()?;
        if arg.takes_terms() {
            // Gauss has two terms a node.
            let fits = |p: usize| *arg != SeriesArg::Gauss || p.is_multiple_of(2);
            let terms = terms.iter().filter(|&&p| fits(p));
            far.extend(terms.map(|&p| Far::with_terms(arg, &series, p)));
        } else {
            far.push(Far { name: arg.to_string(), series, terms: None });
        }
    }
    if far.is_empty() {
        return Err(Failure::new(format!(
            "--series gauss needs an even number of terms, but --terms has only {terms:?}"
        )));
    }
    let mut all: Vec<Candidate> = vec![];
    for &near in near {
        let alone = near.map(|_| Candidate { far: None, near });
        let series = far.iter().map(|far| Candidate { far: Some(far.clone()), near });
        for candidate in alone.into_iter().chain(series) {
            // What does not depend on the sizes of heads is refused now.
            candidate
                .spec([1, 1], None, Window { block: 1, sinks: 0 })
                .map_err(|error| Failure::from(error).context("--series, --terms"))?;
            if !all.contains(&candidate) {
                all.push(candidate);
            }
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use sata::{Plan, State};

    use super::*;

    #[test]
    fn every_setting_once_and_gauss_with_even_terms_only() {
        let hermite = SeriesArg::Hermite(Some(0.8));
        let series = [SeriesArg::Taylor, SeriesArg::Gauss, hermite, SeriesArg::Power(2)];
        let all = candidates(&series, &[3, 4, 3], &[None, Some(1)]).unwrap();
        let names: Vec<String> = all.iter().map(Candidate::name).collect();
        let far = [
            "taylor P=3",
            "taylor P=4",
            "gauss P=4",
            "hermite:0.8 P=3",
            "hermite:0.8 P=4",
            "power:2",
        ];
        let near = far.map(|name| format!("{name}, near 1"));
        assert_eq!(names[..6], far);
        assert_eq!(names[6], "window, near 1");
        assert_eq!(names[7..], near);
        assert!(candidates(&[SeriesArg::Gauss], &[3], &[None]).is_err());
        assert!(candidates(&[SeriesArg::Power(3)], &[3], &[None]).is_err());
    }

    #[test]
    fn sizes_are_those_of_a_state_less_its_padding() {
        let window = Window { block: 64, sinks: 4 };
        for (d, terms) in [(32, 4), (16, 3), (8, 5)] {
            let candidate = &candidates(&[SeriesArg::Taylor], &[terms], &[None]).unwrap()[0];
            let spec = candidate.spec([d, d], None, window).unwrap().unwrap();
            let counted = candidate.state_bytes::<f32>(Some(&spec), [d, d], window) as f64;
            let plan = Plan::new(&spec).unwrap();
            let held = State::<f32>::new(&plan, 1, 1).unwrap().bytes() as f64;
            assert!((held / counted - 1.0).abs() < 0.1, "d = {d}: {counted}, {held}");
        }
    }

    #[test]
    fn windows_begin_at_blocks() {
        let window = Window { block: 64, sinks: 4 };
        assert_eq!([0, 63, 64, 128, 200].map(|t| window.begin(1, t)), [0, 0, 0, 64, 128]);
        assert_eq!(window.begin(0, 200), 192);
        assert_eq!(window.begin(usize::MAX, 200), 0);
    }
}

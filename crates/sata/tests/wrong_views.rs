//! Views that reach too far, outputs that overlap, and what softmax does not take.

use sata::{Error, View, ViewMut, conventional};

#[test]
fn slices_that_are_too_short_are_refused() {
    let data = [0.0f32; 24];
    let view = |shape| View::new(&data, shape);
    view([1, 2, 3, 4]).unwrap();
    for shape in
        [[2, 2, 3, 4], [1, 2, 3, 5], [5, 5, 1, 1], [1 << 32, 1 << 32, 1, 1], [usize::MAX; 4]]
    {
        let mut out = data;
        for error in [view(shape).unwrap_err(), ViewMut::new(&mut out, shape).unwrap_err()] {
            match error {
                Error::View { shape: found, needs, len: 24, .. } => {
                    assert_eq!(found, shape);
                    assert!(needs > 24);
                }
                other => panic!("{other:?}"),
            }
        }
    }
    let strided = |shape, strides| View::strided(&data, shape, strides).map(|_| ());
    strided([2, 2, 2, 4], [8, 4, 8]).unwrap();
    strided([1, 1, 6, 4], [usize::MAX, usize::MAX, 4]).unwrap();
    strided([9, 9, 9, 24], [0, 0, 0]).unwrap();
    for (shape, strides) in [
        ([2, 2, 2, 5], [12, 4, 8]),
        ([2, 1, 6, 4], [1, 0, 4]),
        ([2, 1, 1, 1], [24, 0, 0]),
        ([1, 2, 1, 1], [0, usize::MAX, 0]),
        ([1, 3, 2, 1], [0, usize::MAX, usize::MAX]),
        ([1, 1, 1, 25], [0, 0, 0]),
    ] {
        let error = strided(shape, strides).unwrap_err();
        assert!(matches!(error, Error::View { len: 24, .. }), "{shape:?} {strides:?} {error:?}");
        let mut out = data;
        let error = ViewMut::strided(&mut out, shape, strides).unwrap_err();
        assert!(matches!(error, Error::View { argument: "out", .. }), "{error:?}");
    }
    // Parts of a view.
    let view = view([2, 1, 3, 4]).unwrap();
    for (batch, tokens) in [(0, 0..3), (1, 1..3), (1, 3..3), (0, 0..0)] {
        assert_eq!(view.slice(batch, tokens.clone()).unwrap().shape(), [1, 1, tokens.len(), 4]);
    }
    #[allow(clippy::reversed_empty_ranges)]
    for (batch, tokens) in [(2, 0..1), (0, 0..4), (0, 2..1), (1, 4..4), (usize::MAX, 0..0)] {
        let error = view.slice(batch, tokens).unwrap_err();
        assert!(matches!(error, Error::Shape { argument: "tokens", .. }), "{error:?}");
    }
}

#[test]
fn outputs_that_overlap_are_refused() {
    let mut y = [0.0f64; 64];
    for (shape, strides, fits) in [
        ([2, 2, 2, 4], [16, 8, 4], true),
        ([2, 2, 2, 4], [4, 8, 16], true),
        ([2, 2, 2, 4], [8, 4, 16], true),
        ([1, 1, 4, 4], [0, 0, 5], true),
        ([1, 1, 4, 4], [0, 0, 4], true),
        ([1, 2, 2, 4], [0, 9, 5], true),
        ([1, 2, 2, 4], [0, 8, 5], false),
        // One and the same row for all.
        ([1, 1, 2, 4], [0, 0, 0], false),
        ([1, 2, 1, 4], [0, 0, 0], false),
        ([2, 1, 1, 4], [0, 0, 0], false),
        // Rows that reach into the next.
        ([1, 1, 4, 4], [0, 0, 3], false),
        ([1, 2, 2, 4], [0, 6, 4], false),
        ([1, 2, 2, 4], [0, 4, 6], false),
        ([2, 2, 2, 4], [12, 8, 4], false),
        ([2, 2, 2, 4], [4, 4, 16], false),
    ] {
        match ViewMut::strided(&mut y, shape, strides) {
            Ok(_) if fits => {}
            Err(Error::Shape { argument: "out", got, expected }) if !fits => {
                assert_eq!(got, shape);
                assert!(expected.contains("overlap"), "{expected}");
            }
            other => panic!("{shape:?} {strides:?}: {other:?}"),
        }
    }
    // Nothing overlaps where there is nothing.
    for shape in [[0, 2, 2, 4], [2, 0, 2, 4], [2, 2, 0, 4], [2, 2, 2, 0]] {
        ViewMut::strided(&mut y, shape, [0, 0, 0]).unwrap();
        ViewMut::strided(&mut y, shape, [usize::MAX; 3]).unwrap();
    }
}

#[test]
fn softmax_names_what_does_not_fit_too() {
    let x = [0.5f64; 64];
    let view = |shape| View::new(&x, shape).unwrap();
    let run = |q, k, v, out, causal, offset| {
        let mut y = [-7.0; 64];
        let out = ViewMut::new(&mut y, out).unwrap();
        let result = conventional::attention(view(q), view(k), view(v), 1.0, causal, offset, out);
        assert!(result.is_ok() || y == [-7.0; 64]);
        result
    };
    let good = [1, 2, 3, 4];
    run(good, good, good, good, true, 0).unwrap();
    for (q, k, v, out, causal, offset, name) in [
        ([2, 2, 3, 4], good, good, [2, 2, 3, 4], false, 0, "k"),
        (good, [1, 2, 3, 5], good, good, false, 0, "k"),
        (good, [1, 2, 2, 4], good, good, false, 0, "k"),
        ([1, 3, 3, 4], good, good, [1, 3, 3, 4], false, 0, "q"),
        (good, [1, 0, 3, 4], [1, 0, 3, 4], good, false, 0, "q"),
        (good, good, good, [1, 2, 3, 3], false, 0, "out"),
        (good, good, good, good, true, 1, "k"),
        (good, good, good, good, true, usize::MAX, "k"),
        (good, [1, 2, 0, 4], [1, 2, 0, 4], good, false, 0, "k"),
    ] {
        match run(q, k, v, out, causal, offset) {
            Err(Error::Shape { argument, .. }) => assert_eq!(argument, name),
            other => panic!("{other:?}"),
        }
    }
    let mut bad = x;
    bad[7] = f64::NAN;
    let mut y = [0.0; 24];
    let bad = View::new(&bad, good).unwrap();
    let out = ViewMut::new(&mut y, good).unwrap();
    let error =
        conventional::attention(bad, view(good), view(good), 1.0, false, 0, out).unwrap_err();
    assert!(
        matches!(error, Error::NonFinite { argument: "q", index: [0, 0, 1, 3], .. }),
        "{error:?}"
    );
}

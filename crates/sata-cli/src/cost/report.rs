//! The numbers of `sata cost`, as data and as tables.

use sata::cost;
use serde::Serialize;

use crate::plot::counts;
use crate::table::{bytes, grouped, table, three};

/// What was asked for.
#[derive(Clone, Debug, Serialize)]
pub struct Cost {
    /// One entry per head size and number of terms.
    pub heads: Vec<Head>,
    /// Conventional attention, one entry per head size and context length.
    pub conventional: Vec<Conventional>,
}

/// Fixed costs, per head and, for FLOPs, per token.
#[derive(Clone, Debug, Serialize)]
pub struct Head {
    /// Elements of a key.
    pub d_key: usize,
    /// Elements of a value.
    pub d_value: usize,
    /// P.
    pub terms: usize,
    /// D.
    pub features: u128,
    /// (1) and (13).
    pub state_elements: u128,
    /// The same in f32.
    pub state_bytes_f32: u128,
    /// With the compensation that f32 sums carry.
    pub state_bytes_f32_compensated: u128,
    /// (2) and (15) as printed.
    pub flops_paper: u128,
    /// The same algorithm counted again.
    pub flops_corrected: u128,
    /// 4·D·(d_V + 1): the products with the state alone.
    pub flops_useful: u128,
    /// Tokens from which a KV cache has more elements.
    pub break_even_tokens_memory: u128,
    /// Tokens from which a conventional decode step takes more FLOPs, by the paper's counts.
    pub break_even_tokens_flops: u128,
}

/// Growing costs of conventional attention, per head and, for FLOPs, per token.
#[derive(Clone, Debug, Serialize)]
pub struct Conventional {
    /// Elements of a key.
    pub d_key: usize,
    /// Elements of a value.
    pub d_value: usize,
    /// Tokens in context.
    pub tokens: u64,
    /// n(d_K + d_V).
    pub cache_elements: u128,
    /// The same in f32.
    pub cache_bytes_f32: u128,
    /// n(2·d_K + 2·d_V + 3), the paper's text.
    pub flops_paper_text: u128,
    /// 6·n·d, the paper's public code; for d_K = d_V only.
    pub flops_public_code: Option<u128>,
    /// For each number of terms: cache elements over state elements.
    pub memory_ratios: Vec<Ratio>,
    /// For each number of terms: these FLOPs (the text's) over (15).
    pub flops_ratios: Vec<Ratio>,
}

/// Conventional over constant, for one number of terms.
#[derive(Clone, Debug, Serialize)]
pub struct Ratio {
    /// P.
    pub terms: usize,
    /// Above 1: the constant cost is lower.
    pub ratio: f64,
}

impl Head {
    /// Costs of one head size and number of terms.
    pub fn new(d_key: usize, d_value: usize, terms: usize) -> Self {
        let orders: Vec<usize> = (0..terms).collect();
        Head {
            d_key,
            d_value,
            terms,
            features: sata::basis::features(d_key, &orders),
            state_elements: cost::state_elements(d_key, d_value, &orders),
            state_bytes_f32: cost::state_bytes(d_key, d_value, &orders, 4, false),
            state_bytes_f32_compensated: cost::state_bytes(d_key, d_value, &orders, 4, true),
            flops_paper: cost::paper_flops(d_key, d_value, terms),
            flops_corrected: cost::corrected_flops(d_key, d_value, terms),
            flops_useful: cost::state_elements(d_key, d_value, &orders).saturating_mul(4),
            break_even_tokens_memory: cost::break_even_memory(d_key, d_value, &orders),
            break_even_tokens_flops: cost::break_even_flops(d_key, d_value, terms),
        }
    }
}

impl Conventional {
    fn new(d_key: usize, d_value: usize, tokens: u64, heads: &[Head]) -> Self {
        let n = u128::from(tokens);
        let cache_elements = cost::cache_elements(d_key, d_value, n);
        let flops = cost::conventional_flops(d_key, d_value, n);
        let ratios = |growing: u128, fixed: fn(&Head) -> u128| {
            let ratio = |head: &Head| Ratio {
                terms: head.terms,
                ratio: growing as f64 / fixed(head) as f64,
            };
            heads.iter().map(ratio).collect()
        };
        Conventional {
            d_key,
            d_value,
            tokens,
            cache_elements,
            cache_bytes_f32: cache_elements.saturating_mul(4),
            flops_paper_text: flops,
            flops_public_code: (d_key == d_value)
                .then(|| cost::conventional_flops_of_public_code(d_key, n)),
            memory_ratios: ratios(cache_elements, |head| head.state_elements),
            flops_ratios: ratios(flops, |head| head.flops_paper),
        }
    }
}

impl Cost {
    /// Costs of all combinations.
    pub fn new(sizes: &[(usize, usize)], terms: &[usize], tokens: &[u64]) -> Self {
        let mut cost = Cost { heads: vec![], conventional: vec![] };
        for &(d_key, d_value) in sizes {
            let heads: Vec<Head> =
                terms.iter().map(|&terms| Head::new(d_key, d_value, terms)).collect();
            for &n in tokens {
                cost.conventional.push(Conventional::new(d_key, d_value, n, &heads));
            }
            cost.heads.extend(heads);
        }
        cost
    }

    /// Tables with their captions.
    pub fn text(&self) -> String {
        format!(
            "Fixed costs, per head; FLOPs per token. State: (d_V+1)·D elements, the paper's (1) \
             and (13);\nin f32, and with the compensation that f32 sums carry. FLOPs: the paper's \
             (2) and (15); the same\nalgorithm counted again (the paper has 2 per feature too \
             many); and 4·D·(d_V+1), the products with\nthe state alone. The last two columns: \
             tokens from which conventional attention costs more.\n\n{}\n\n\
             Conventional attention, per head: its KV cache, n(d_K+d_V) elements, and FLOPs for a \
             token that\nsees n, as the paper's text counts them, n(2d_K+2d_V+3), and as its \
             public code does, 6nd. Then, for\neach number of terms P, cache over state and FLOPs \
             (the text's) over (15).\n\n{}",
            self.fixed_table(),
            self.growing_table()
        )
    }

    fn fixed_table(&self) -> String {
        let row = |h: &Head| {
            vec![
                format!("{}", h.d_key),
                format!("{}", h.d_value),
                format!("{}", h.terms),
                grouped(h.features),
                grouped(h.state_elements),
                bytes(h.state_bytes_f32),
                bytes(h.state_bytes_f32_compensated),
                grouped(h.flops_paper),
                grouped(h.flops_corrected),
                grouped(h.flops_useful),
                grouped(h.break_even_tokens_memory),
                grouped(h.break_even_tokens_flops),
            ]
        };
        let headings = [
            "d_K",
            "d_V",
            "P",
            "D",
            "state",
            "f32",
            "compens.",
            "FLOPs (15)",
            "corrected",
            "4D(d_V+1)",
            "> memory",
            "> FLOPs",
        ];
        table(&headings, &self.heads.iter().map(row).collect::<Vec<_>>())
    }

    fn growing_table(&self) -> String {
        let mut headings: Vec<String> =
            ["d_K", "d_V", "tokens", "cache", "f32", "FLOPs, text", "FLOPs, code"]
                .map(String::from)
                .to_vec();
        if let Some(first) = self.conventional.first() {
            headings.extend(first.memory_ratios.iter().map(|r| format!("mem P={}", r.terms)));
            headings.extend(first.flops_ratios.iter().map(|r| format!("FLOP P={}", r.terms)));
        }
        let row = |c: &Conventional| {
            let mut cells = vec![
                format!("{}", c.d_key),
                format!("{}", c.d_value),
                counts(c.tokens as f64),
                grouped(c.cache_elements),
                bytes(c.cache_bytes_f32),
                grouped(c.flops_paper_text),
                c.flops_public_code.map_or("–".into(), grouped),
            ];
            let ratios = c.memory_ratios.iter().chain(&c.flops_ratios);
            cells.extend(ratios.map(|r| format!("{}×", three(r.ratio))));
            cells
        };
        let headings: Vec<&str> = headings.iter().map(String::as_str).collect();
        table(&headings, &self.conventional.iter().map(row).collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_papers_sizes() {
        let cost = Cost::new(&[(8, 8), (64, 64)], &[4], &[1_000]);
        assert_eq!(cost.heads[0].features, 165);
        assert_eq!(cost.heads[1].state_elements, 65 * 47_905);
        assert_eq!(cost.conventional[0].flops_public_code, Some(48_000));
        assert_eq!(cost.conventional[0].flops_paper_text, 35_000);
        assert!(cost.text().contains("47,905"));
    }

    #[test]
    fn sizes_beyond_128_bits_do_not_panic() {
        let cost = Cost::new(&[(1 << 40, 3)], &[60], &[u64::MAX]);
        assert_eq!(cost.heads[0].features, u128::MAX);
        assert!(cost.text().contains("> 10^38"));
        assert!(serde_json::to_string(&cost).is_ok());
    }
}

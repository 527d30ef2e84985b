//! The model once more, one number at a time, in f64.

use sata_lm::{Config, HeadGroup, Kernel, Position};

use super::Tensor;

/// Finds tensors by name.
struct Model<'a> {
    config: &'a Config,
    tensors: &'a [Tensor],
}

fn norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter().zip(weight).map(|(x, w)| x / (mean + eps).sqrt() * w).collect()
}

fn times(matrix: &[f64], x: &[f64]) -> Vec<f64> {
    matrix.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

impl Model<'_> {
    fn get(&self, name: &str) -> &[f64] {
        &self.tensors.iter().find(|(n, _, _)| n == name).unwrap_or_else(|| panic!("{name}")).2
    }

    fn layer(&self, i: usize, name: &str) -> &[f64] {
        self.get(&format!("layers.{i}.{name}"))
    }

    /// The group that a head belongs to, and the group's first head.
    fn group(&self, head: usize) -> (HeadGroup, usize) {
        let a = &self.config.attention;
        let Kernel::Mixture { groups } = &a.kernel else {
            let (heads, kernel) = (a.heads, a.kernel.clone());
            return (HeadGroup { heads, kernel, near: a.near, sinks: a.sinks }, 0);
        };
        let mut first = 0;
        for group in groups {
            if head < first + group.heads {
                return (group.clone(), first);
            }
            first += group.heads;
        }
        panic!("no group has head {head}")
    }

    /// Weight of key s for query t, without decay.
    fn weight(&self, group: &HeadGroup, t: usize, s: usize, x: f64) -> f64 {
        let block = self.config.attention.block;
        let near = match (&group.kernel, group.near) {
            (Kernel::Softmax, _) => true,
            (_, None) => s < group.sinks,
            (_, Some(n)) => s < group.sinks || t / block <= s / block + n,
        };
        match group.kernel {
            _ if near => x.exp(),
            Kernel::Softmax | Kernel::Window => 0.0,
            Kernel::Taylor { terms } => {
                let term = |p: usize| x.powi(p as i32) / (1..=p).map(|i| i as f64).product::<f64>();
                (0..terms).map(term).sum()
            }
            Kernel::Power { exponent } => x.powi(exponent as i32) + 1e-3,
            Kernel::Mixture { .. } => panic!("a mixture in a mixture"),
        }
    }

    fn attention(&self, i: usize, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let a = &self.config.attention;
        let (d, kv, eps) = (a.head_dim, a.kv_heads(), self.config.norm_eps);
        let qkv: Vec<Vec<f64>> =
            x.iter().map(|x| times(self.layer(i, "attn.qkv.weight"), x)).collect();
        let head = |t: usize, first: usize, weight: Option<&str>| {
            let mut row = qkv[t][first * d..(first + 1) * d].to_vec();
            let Some(weight) = weight else { return row };
            if a.qk_norm {
                row = norm(&row, self.layer(i, weight), eps);
            }
            if a.position == Position::Rotary {
                for c in 0..d / 2 {
                    let angle = t as f64 * 10_000f64.powf(-2.0 * c as f64 / d as f64);
                    let (p, q) = (row[c], row[c + d / 2]);
                    row[c] = p * angle.cos() - q * angle.sin();
                    row[c + d / 2] = q * angle.cos() + p * angle.sin();
                }
            }
            row
        };
        let mut out = vec![vec![0.0; a.heads * d]; x.len()];
        for h in 0..a.heads {
            let share = a.heads / kv;
            let group = h / share;
            let (of, first) = self.group(h);
            let log_decay = |t: usize| match a.position {
                Position::None | Position::Rotary => 0.0,
                Position::Slopes => -sata::alibi_slopes(of.heads / share)[group - first / share],
                Position::Gates => {
                    let row = &self.layer(i, "attn.gate.weight")[group * x[t].len()..];
                    let z = row.iter().zip(&x[t]).map(|(w, x)| w * x).sum::<f64>()
                        + self.layer(i, "attn.gate.bias")[group];
                    -(1.0 + (-z).exp()).ln()
                }
            };
            for (t, out) in out.iter_mut().enumerate() {
                let q = head(t, h, Some("attn.q_norm.weight"));
                let (mut total, mut g) = (0.0, 0.0);
                for s in (0..=t).rev() {
                    let k = head(s, a.heads + group, Some("attn.k_norm.weight"));
                    let logit: f64 = q.iter().zip(&k).map(|(q, k)| q * k).sum();
                    let w = self.weight(&of, t, s, logit / (d as f64).sqrt()) * f64::exp(g);
                    total += w;
                    let v = head(s, a.heads + kv + group, None);
                    for (out, v) in out[h * d..(h + 1) * d].iter_mut().zip(v) {
                        *out += w * v;
                    }
                    g += log_decay(s);
                }
                out[h * d..(h + 1) * d].iter_mut().for_each(|x| *x /= total);
            }
        }
        out.iter().map(|row| times(self.layer(i, "attn.out.weight"), row)).collect()
    }
}

/// Logits after every token.
pub fn logits(config: &Config, tensors: &[Tensor], tokens: &[u32]) -> Vec<Vec<f64>> {
    let model = Model { config, tensors };
    let (w, eps) = (config.width, config.norm_eps);
    let embed = model.get("embed.weight");
    let mut x: Vec<Vec<f64>> =
        tokens.iter().map(|&t| embed[t as usize * w..(t as usize + 1) * w].to_vec()).collect();
    let add = |x: &mut Vec<Vec<f64>>, y: Vec<Vec<f64>>| {
        for (x, y) in x.iter_mut().flatten().zip(y.into_iter().flatten()) {
            *x += y;
        }
    };
    for i in 0..config.layers {
        let normed = |x: &[Vec<f64>], name: &str| -> Vec<Vec<f64>> {
            x.iter().map(|x| norm(x, model.layer(i, name), eps)).collect()
        };
        let y = model.attention(i, &normed(&x, "attn.norm.weight"));
        add(&mut x, y);
        let mlp = |x: &Vec<f64>| {
            let up = times(model.layer(i, "mlp.up.weight"), x);
            let (gate, up) = up.split_at(config.mlp);
            let h: Vec<f64> =
                gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            times(model.layer(i, "mlp.down.weight"), &h)
        };
        let y = normed(&x, "mlp.norm.weight").iter().map(mlp).collect();
        add(&mut x, y);
    }
    x.iter().map(|x| times(embed, &norm(x, model.get("norm.weight"), eps))).collect()
}

//! One query head with the key/value head that it reads, in one sequence.

/// Rows of one query head and of its keys and values.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a, E> {
    /// `[queries][d_key]`.
    pub q: &'a [E],
    /// `[keys][d_key]`.
    pub k: &'a [E],
    /// `[keys][d_value]`.
    pub v: &'a [E],
    /// Queries, keys, d_key, d_value.
    pub sizes: [usize; 4],
}

impl<'a, E> Head<'a, E> {
    /// Head `head` of sequence `batch` of tensors with these shapes.
    pub fn of(
        [q, k, v]: [&'a [E]; 3],
        [q_shape, k_shape, v_shape]: [[usize; 4]; 3],
        [batch, head]: [usize; 2],
    ) -> Self {
        let kv_head = head / (q_shape[1] / k_shape[1]);
        let part = |data: &'a [E], [_, heads, tokens, dim]: [usize; 4], head: usize| {
            &data[(batch * heads + head) * tokens * dim..][..tokens * dim]
        };
        Head {
            q: part(q, q_shape, head),
            k: part(k, k_shape, kv_head),
            v: part(v, v_shape, kv_head),
            sizes: [q_shape[2], k_shape[2], q_shape[3], v_shape[3]],
        }
    }
}

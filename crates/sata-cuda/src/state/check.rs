//! Whether a state serves a call.

use sata::{Error as CallError, Spec};

use super::State;
use crate::Error;

/// Tokens that a sequence can count, as in files.
const MAX_POSITION: u64 = i64::MAX as u64;

fn differs(field: &'static str, state: impl ToString, call: impl ToString) -> Error {
    Error::Call(CallError::State { field, state: state.to_string(), call: call.to_string() })
}

/// Refuses a call whose sums would not be those of the state. A state serves every series whose
/// orders it holds, and any scale, since neither is part of its sums.
pub(crate) fn check_layout(
    state: &Spec,
    call: &Spec,
    holds: &[usize],
    needs: &[usize],
) -> Result<(), Error> {
    let fields = [
        ("d_key", state.d_key().to_string(), call.d_key().to_string()),
        ("d_value", state.d_value().to_string(), call.d_value().to_string()),
        ("block", state.block().to_string(), call.block().to_string()),
        ("near", format!("{:?}", state.near()), format!("{:?}", call.near())),
        ("sinks", state.sinks().to_string(), call.sinks().to_string()),
        ("decay", format!("{:?}", state.decay()), format!("{:?}", call.decay())),
    ];
    for (field, state, call) in fields {
        if state != call {
            return Err(differs(field, state, call));
        }
    }
    if needs.iter().all(|p| holds.contains(p)) {
        return Ok(());
    }
    Err(differs("orders", format!("{holds:?}"), format!("{needs:?}")))
}

impl State {
    /// Refuses a call of `spec` over `sequences` and `kv_heads` that this state cannot serve.
    pub(crate) fn check(
        &self,
        spec: &Spec,
        sequences: usize,
        kv_heads: usize,
    ) -> Result<(), Error> {
        if self.sequences != sequences {
            return Err(differs("sequences", self.sequences, sequences));
        }
        if self.kv_heads != kv_heads {
            return Err(differs("kv_heads", self.kv_heads, kv_heads));
        }
        check_layout(&self.spec, spec, &self.orders, &spec.orders())
    }

    /// Refuses `keys` more tokens than a sequence at `position` can count.
    pub(crate) fn check_room(position: u64, keys: usize) -> Result<(), Error> {
        let room = MAX_POSITION.saturating_sub(position);
        if u64::try_from(keys).is_ok_and(|keys| keys <= room) {
            return Ok(());
        }
        Err(differs("position", position, format!("{keys} more tokens")))
    }
}

// One head's past as a step sees it: the open tokens, the new one last among them, and the sinks.
#pragma once
#include "decode_team.cuh"

struct Past {
    const Decode* p;
    const Team* team;
    // Its slot, and where its open tokens lie in rings of CAPACITY: token 0, the first of a block, at `start`.
    u32 slot;
    int start;
    int open;      // tokens, with the new one
    u64 position;  // of the new token
    f64 new_log;   // the logarithm of its decay
    Mark mark;     // of the far sums

    // Whether the new token is one of the sinks, which have no weight among the open tokens.
    DEVICE bool is_sink() const { return SINKS > 0 && position < u64(largest(SINKS, 1)); }
    // Whether this step fills a block that is far then.
    DEVICE bool folds() const { return open == CAPACITY; }
    // Whether there are far tokens: in the sums, or still open.
    DEVICE bool has_far() const { return mark.count != 0 || (NEAR == NEAR_NONE && !is_sink()); }

    DEVICE bool is_new(int token) const { return token == open - 1; }
    DEVICE i64 place(int token) const {
        int at = start + token;
        return i64(slot) * CAPACITY + (at >= CAPACITY ? at - CAPACITY : at);
    }
    DEVICE const f32* old_key(int token) const { return p->open_keys + place(token) * D_KEY; }
    DEVICE const f32* old_value(int token) const { return p->open_values + place(token) * D_VALUE; }
    // Loads from them; the new token's are in shared memory.
    DEVICE float4 key4(int token, int i) const {
        return is_new(token) ? load4(team->new_key + i) : load4(old_key(token) + i);
    }
    DEVICE f32 key(int token, int i) const { return is_new(token) ? team->new_key[i] : old_key(token)[i]; }
    DEVICE Vec values(int token, int i) const {
        return is_new(token) ? load(team->new_value + i) : load(old_value(token) + i);
    }
    DEVICE f32 value(int token, int i) const { return is_new(token) ? team->new_value[i] : old_value(token)[i]; }
    DEVICE f32 weight(int token) const {
        return is_new(token) ? (is_sink() ? 0.0f : 1.0f) : p->open_weights[place(token)];
    }
    DEVICE f64 log(int token) const { return is_new(token) ? new_log : p->open_fading[place(token)]; }
};

// e^log of what is summed, or 0 where that is nothing beside 1.
DEVICE f32 faded(f64 log) { return log < -60.0 ? 0.0f : expf(f32(log)); }

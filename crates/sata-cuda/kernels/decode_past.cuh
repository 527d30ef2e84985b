// One head's past as a step sees it: the open tokens, the new one last among them, and the sinks.
#pragma once
#include "decode_types.cuh"

struct Past {
    // The slot's open tokens, [CAPACITY] in a ring: token 0, the first of a block, lies at `start`.
    const f32* keys;
    const f32* values;
    const f32* weights;
    const f64* fading;
    int start;
    // Open tokens with the new one; its key and value in shared memory, and the logarithm of its decay.
    int open;
    const f32* new_key;
    const f32* new_value;
    f64 new_log;
    // Whether the new token is one of the sinks, which have no weight among the open tokens.
    bool is_sink;
    u64 position;  // of the new token
    // The far sums' mark.
    Mark mark;

    DEVICE bool is_new(int token) const { return token == open - 1; }
    DEVICE int place(int token) const {
        int at = start + token;
        return at >= CAPACITY ? at - CAPACITY : at;
    }
    DEVICE const f32* key(int token) const { return is_new(token) ? new_key : keys + i64(place(token)) * D_KEY; }
    DEVICE const f32* value(int token) const {
        return is_new(token) ? new_value : values + i64(place(token)) * D_VALUE;
    }
    DEVICE f32 weight(int token) const {
        return is_new(token) ? (is_sink ? 0.0f : 1.0f) : weights[place(token)];
    }
    DEVICE f64 log(int token) const { return is_new(token) ? new_log : fading[place(token)]; }

    // Whether this step fills a block that is far then.
    DEVICE bool folds() const { return open == CAPACITY; }
    // Whether there are far tokens: in the sums, or still open.
    DEVICE bool has_far() const { return mark.count != 0 || (NEAR == NEAR_NONE && !is_sink); }
};

// e^log of what is summed, or 0 where that is nothing beside 1.
DEVICE f32 faded(f64 log) { return log < -60.0 ? 0.0f : expf(f32(log)); }

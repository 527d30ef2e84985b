// Warps that work on one head together.
#pragma once
#include "decode_types.cuh"

// Warps that serve one head, and their shared memory.
struct Team {
    int warp, thread;
    f32* queries;       // [PASSES][D_KEY + 1][G], scaled; the last row is 1
    f32* new_key;       // [D_KEY]
    f32* new_value;     // [D_VALUE]
    f32* far;           // [PLANES][HEADS][ROW]
    f32* parts;         // [TEAM][G][ROW], what each warp has
    f32* levels;        // [TEAM][G], its maxima
    f32* coefficients;  // [G][TERMS]
    f32* scales;        // [TEAM + 2][G]
    u32* flag;
    f32* fold;          // a block's tokens, see decode_fold.cuh
    f32* weights;       // the warp's own
    DEVICE void sync() const {
#if TEAM == 1
        __syncwarp();
#else
        __syncthreads();
#endif
    }
    DEVICE const f32* queries_of(int pass) const { return queries + pass * (D_KEY + 1) * G; }
    DEVICE f32* far_of(int plane, int pass) const { return far + (plane * HEADS + pass * G) * ROW; }
};
constexpr int TEAM_THREADS = TEAM * 32;

// Derivatives of the sums of ones, for matrix_backward_far: element l of a feature block's row is what a query's feature
// is multiplied by for its derivative by element l.
//
// Grid: blocks of 256 elements, places, units. `table` has where each comes from, times 4, and how many times it counts.
// Bytes: 4 gathered, 2 written per element of D_KEY (features of order 2 and less).
#include "backward.cuh"
namespace hopper {
#include "hopper.cuh"
}

struct Slopes {
    const u16* sums;   // [unit][place][feature block][NP / 8][8 features][8]
    u16* slopes;       // [unit][place][count]
    const i32* table;  // [count], or -1
    i64 count;
};
SAME_SIZE(Slopes, SLOPES_BYTES);

extern "C" __global__ void __launch_bounds__(256) matrix_backward_slopes(const __grid_constant__ Slopes p) {
    using namespace hopper;
    const i64 i = i64(blockIdx.x) * 256 + threadIdx.x;
    if (i >= p.count) return;
    const i64 place = i64(blockIdx.z) * gridDim.y + blockIdx.y;
    const i32 from = p.table[i];
    u16 x = 0;
    if (from >= 0) {
        const int feature = from / 4;
        const u16 z = p.sums[place * (BLOCKS * 8 * NP) + ((feature / 8 * (NP / 8) + D_VALUE / 8) * 8 + feature % 8) * 8 + D_VALUE % 8];
        x = to_bf16(of_bf16(z) * (from % 4));
    }
    p.slopes[place * p.count + i] = x;
}

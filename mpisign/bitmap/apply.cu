// A step of SGD on parameters, with the +1, -1 and 0 of a decision as their gradients: p <- p - rate (s + decay p).
//
// As torch computes it: s <- fma(decay, p, s) if there is a decay, then fma(-rate, s, p), each rounded to the
// parameter's format; 16-bit ones are computed with as floats.

// To the nearest, of two the even one. What is NaN stays NaN.
template <int FORMAT>
__device__ __forceinline__ typename Float<FORMAT>::Bits narrowed(typename Float<FORMAT>::Real value) {
    const auto wide = bits(value);
    if constexpr (FORMAT == BFLOAT16) {
        return (u16)((wide & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16);
    } else if constexpr (FORMAT == FLOAT16) {
        const u32 sign = wide >> 16 & 0x8000, magnitude = wide & 0x7fffffff;
        if (magnitude >= 0x477ff000) return (u16)(sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00));
        if (magnitude >= 0x38800000)
            return (u16)(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13);
        // Below the least normal number: the sum with 0.5 has the rounded value in its last bits.
        return (u16)(sign | (bits(multiply_add(real(magnitude), 1.0f, 0.5f)) - 0x3f000000));
    } else {
        return wide;
    }
}

template <int FORMAT> struct Step {
    typedef typename Float<FORMAT>::Bits Bits;
    typedef typename Float<FORMAT>::Real Real;
    Real minus_rate, decay;
    bool decays;

    __device__ __forceinline__ Bits operator()(Bits parameter, u32 negative, u32 moves) const {
        const Real p = widened<FORMAT>(parameter);
        Real s = moves & 1 ? (negative & 1 ? (Real)-1 : (Real)1) : (Real)0;
        if (decays) s = widened<FORMAT>(narrowed<FORMAT>(multiply_add(decay, p, s)));
        return narrowed<FORMAT>(multiply_add(minus_rate, s, p));
    }
};

__device__ __forceinline__ void split(const uint4& group, u16 (&values)[8]) {
    const u32 four[4] = {group.x, group.y, group.z, group.w};
#pragma unroll
    for (u32 i = 0; i < 8; ++i) values[i] = (u16)(four[i / 2] >> 16 * (i % 2));
}
__device__ __forceinline__ uint4 join(const u16 (&values)[8]) {
    u32 four[4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) four[i] = values[2 * i] | (u32)values[2 * i + 1] << 16;
    return make_uint4(four[0], four[1], four[2], four[3]);
}

template <int FORMAT>
__device__ __forceinline__ void apply(const Job& job, void* tensor, const u32* moved, double minus_rate, double decay) {
    typedef typename Float<FORMAT>::Bits Bits;
    typedef typename Float<FORMAT>::Real Real;
    constexpr u32 E = PER_LOAD<FORMAT>, GROUP = 32 / E, AT_ONCE = 4;
    const Step<FORMAT> step = {(Real)minus_rate, (Real)decay, decay != 0.0};
    Bits* parameters = (Bits*)tensor + job.start;
    const bool aligned = (u64)parameters % 16 == 0;
    const u32 lane = threadIdx.x % 32;
#pragma unroll 1
    for (u32 at = threadIdx.x / 32 * TILE; at < job.elements; at += WARPS * TILE) {
        const u32 left = job.elements - at, words = min((left + 31) / 32, TILE / 32), mine = at / 32 + lane;
        const u32 negative = lane < words ? ~job.words[mine] : 0;
        const u32 moves = lane < words && moved ? moved[mine] : ALL;
        if (aligned && left >= TILE) {
            uint4* groups = (uint4*)(parameters + at) + lane;
#pragma unroll 1
            for (u32 batch = 0; batch < LOADS<FORMAT> / AT_ONCE; ++batch) {
                uint4 loaded[AT_ONCE];
#pragma unroll
                for (u32 k = 0; k < AT_ONCE; ++k) loaded[k] = groups[(batch * AT_ONCE + k) * 32];
#pragma unroll
                for (u32 k = 0; k < AT_ONCE; ++k) {
                    const u32 word = (batch * AT_ONCE + k) * E + lane / GROUP, bit = lane % GROUP * E;
                    const u32 n = __shfl_sync(ALL, negative, word) >> bit, m = __shfl_sync(ALL, moves, word) >> bit;
                    Bits values[E];
                    split(loaded[k], values);
#pragma unroll
                    for (u32 i = 0; i < E; ++i) values[i] = step(values[i], n >> i, m >> i);
                    groups[(batch * AT_ONCE + k) * 32] = join(values);
                }
            }
        } else {
            for (u32 word = 0; word < words; ++word) {
                const u32 n = __shfl_sync(ALL, negative, word) >> lane, m = __shfl_sync(ALL, moves, word) >> lane;
                if (word * 32 + lane >= left) break;  // the last word
                Bits& parameter = parameters[at + word * 32 + lane];
                parameter = step(parameter, n, m);
            }
        }
    }
}

// `moved`: for each tensor a bitmap with a 0 where the decision is 0, instead of the job's second plane; or null.
extern "C" __global__ void __launch_bounds__(THREADS, 3) apply_many(
    const __grid_constant__ HalfTensors tensors, const __grid_constant__ HalfTensors moved, const Job* jobs,
    double minus_rate, double decay) {
    const Job job = jobs[blockIdx.x];
    const u32 place = job.tensor % MOMENTUM_CAPACITY;
    void* tensor = tensors.at[place];
    if (!tensor) return;
    const u32* moves = moved.at[place] ? (const u32*)moved.at[place] + job.start / 32 : job.nonzero;
    switch (tensors.format[place]) {
    case FLOAT32: return apply<FLOAT32>(job, tensor, moves, minus_rate, decay);
    case FLOAT64: return apply<FLOAT64>(job, tensor, moves, minus_rate, decay);
    case FLOAT16: return apply<FLOAT16>(job, tensor, moves, minus_rate, decay);
    case BFLOAT16: return apply<BFLOAT16>(job, tensor, moves, minus_rate, decay);
    }
}

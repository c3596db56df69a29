// Unpacking: words to a tensor of +1 and -1, and 0 where nothing moves.

// Bits 0, 1, ... of `negative` and `moves` as floats: 16 bytes of them.
template <int FORMAT> __device__ __forceinline__ uint4 to_floats(u32 negative, u32 moves) {
    u32 four[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (FORMAT == FLOAT64) {
            four[i] = i % 2 ? (Float<FORMAT>::ONE | (negative >> i / 2) << 31) & (0 - (moves >> i / 2 & 1)) : 0;
        } else if constexpr (FORMAT == FLOAT32) {
            four[i] = (Float<FORMAT>::ONE | (negative >> i) << 31) & (0 - (moves >> i & 1));
        } else {
            const u32 signs = (negative >> 2 * i & 1) << 15 | (negative >> (2 * i + 1)) << 31;
            const u32 kept = (moves >> 2 * i & 1) * 0xffff | (moves >> (2 * i + 1) & 1) * 0xffff0000;
            four[i] = (Float<FORMAT>::ONE | signs) & kept;
        }
    }
    return make_uint4(four[0], four[1], four[2], four[3]);
}

template <int FORMAT> __device__ __forceinline__ void unpack(const Job& job, void* tensor) {
    typedef typename Float<FORMAT>::Bits Bits;
    constexpr u32 E = PER_LOAD<FORMAT>, GROUP = 32 / E;
    Bits* values = (Bits*)tensor + job.start;
    const bool aligned = (u64)values % 16 == 0;
    const u32 lane = threadIdx.x % 32;
#pragma unroll 1
    for (u32 at = threadIdx.x / 32 * TILE; at < job.elements; at += WARPS * TILE) {
        const u32 left = job.elements - at, words = min((left + 31) / 32, TILE / 32), mine = at / 32 + lane;
        const u32 negative = lane < words ? ~job.words[mine] : 0;
        const u32 moves = lane < words && job.nonzero ? job.nonzero[mine] : ALL;
        if (aligned && left >= TILE) {
            uint4* out = (uint4*)(values + at) + lane;
#pragma unroll
            for (u32 k = 0; k < LOADS<FORMAT>; ++k) {
                const u32 word = k * E + lane / GROUP, bit = lane % GROUP * E;
                const u32 n = __shfl_sync(ALL, negative, word) >> bit, m = __shfl_sync(ALL, moves, word) >> bit;
                __stcs(out + k * 32, to_floats<FORMAT>(n, m));
            }
        } else {
            for (u32 word = 0; word < words; ++word) {
                const u32 n = __shfl_sync(ALL, negative, word) >> lane, m = __shfl_sync(ALL, moves, word) >> lane;
                const uint4 floats = to_floats<FORMAT>(n, m);
                if (word * 32 + lane >= left) break;  // the last word
                Bits& value = values[at + word * 32 + lane];
                if constexpr (FORMAT == FLOAT64)
                    value = (u64)floats.y << 32;
                else
                    value = (Bits)floats.x;
            }
        }
    }
}

__device__ __forceinline__ void unpack_any(const Job& job, void* tensor, u32 format) {
    switch (format) {
    case FLOAT32: return unpack<FLOAT32>(job, tensor);
    case FLOAT64: return unpack<FLOAT64>(job, tensor);
    case FLOAT16: return unpack<FLOAT16>(job, tensor);
    case BFLOAT16: return unpack<BFLOAT16>(job, tensor);
    }
}

extern "C" __global__ void STREAMING unpack_one(void* tensor, u32 format, u64 elements, u32* words, u32* nonzero) {
    unpack_any(job_of_one(words, nonzero, 0, elements), tensor, format);
}

extern "C" __global__ void STREAMING unpack_many(const __grid_constant__ Tensors tensors, const Job* jobs) {
    const Job job = jobs[blockIdx.x];
    void* tensor = tensors.at[job.tensor];
    if (tensor) unpack_any(job, tensor, tensors.format[job.tensor]);
}

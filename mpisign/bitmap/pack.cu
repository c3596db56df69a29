// Packing: the signs of a tensor's values, as words.

// A lane's 32 bits are PER_LOAD from each of its loads. Lanes that share words exchange them, a matrix transposed in
// log2 steps, until lane g of a group of G = 32 / PER_LOAD has the whole word that the group met in load g.
template <u32 PER_LOAD> __device__ __forceinline__ u32 transpose(u32 bits, u32 lane) {
#pragma unroll
    for (u32 distance = 16; distance >= PER_LOAD; distance /= 2) {
        const u32 lower = ALL / ((1u << distance) + 1);  // 0x0000ffff, 0x00ff00ff, ...
        const u32 partner = distance / PER_LOAD;
        const u32 other = __shfl_xor_sync(ALL, bits, partner);
        bits = lane & partner ? (bits & ~lower) | ((other >> distance) & lower)
                              : (bits & lower) | ((other << distance) & ~lower);
    }
    return bits;
}

// After a full tile: makes words of each lane's bits, and returns which of the tile's words this lane has.
template <u32 PER_LOAD> __device__ __forceinline__ u32 words_of_tile(u32 lane, u32& negative, u32& nonzero) {
    negative = transpose<PER_LOAD>(negative, lane);
    nonzero = transpose<PER_LOAD>(nonzero, lane);
    constexpr u32 GROUP = 32 / PER_LOAD;
    return lane % GROUP * PER_LOAD + lane / GROUP;
}

// A full tile from 16-byte aligned memory.
template <int FORMAT>
__device__ __forceinline__ u32 read_tile(const uint4* tile, u32 lane, u32& negative, u32& nonzero, u32& bad) {
    constexpr u32 AT_ONCE = LOADS<FORMAT> < 8 ? LOADS<FORMAT> : 8;
#pragma unroll 1
    for (int batch = LOADS<FORMAT> / AT_ONCE - 1; batch >= 0; --batch) {  // the last element is pushed first
        uint4 loaded[AT_ONCE];
#pragma unroll
        for (int k = 0; k < (int)AT_ONCE; ++k) loaded[k] = __ldcs(tile + (batch * AT_ONCE + k) * 32 + lane);
#pragma unroll
        for (int k = AT_ONCE - 1; k >= 0; --k) {
            const u32 four[4] = {loaded[k].x, loaded[k].y, loaded[k].z, loaded[k].w};
            if constexpr (FORMAT == FLOAT64) {
#pragma unroll
                for (int i = 3; i > 0; i -= 2) {
                    push(nonzero, look<FORMAT>(four[i], four[i - 1], bad));
                    push(negative, four[i]);
                }
            } else {
#pragma unroll
                for (int i = 3; i >= 0; --i) {
                    const u32 flags = look<FORMAT>(four[i], 0, bad);
                    push(nonzero, flags);
                    push(negative, four[i]);
                    if constexpr (PER_LOAD<FORMAT> == 8) {
                        push(nonzero, flags << 16);
                        push(negative, four[i] << 16);
                    }
                }
            }
        }
    }
    return words_of_tile<PER_LOAD<FORMAT>>(lane, negative, nonzero);
}

// The first `elements` of a tile anywhere in memory, an element a lane at a time; ballots are the words.
template <int FORMAT>
__device__ __forceinline__ void vote_tile(
    const typename Float<FORMAT>::Bits* tile, u32 elements, u32 lane, u32& negative, u32& nonzero, u32& bad) {
    const u32 words = min((elements + 31) / 32, TILE / 32);
#pragma unroll 8
    for (u32 word = 0; word < words; ++word) {
        const u32 place = word * 32 + lane;
        const typename Float<FORMAT>::Bits value = place < elements ? __ldcs(tile + place) : 0;
        u32 high, low = 0;
        if constexpr (FORMAT == FLOAT64) {
            high = (u32)(value >> 32);
            low = (u32)value;
        } else {
            high = (u32)value << (32 - 8 * sizeof(value));
        }
        const u32 flag = look<FORMAT>(high, low, bad);
        const u32 votes_no = __ballot_sync(ALL, high >> 31);
        const u32 votes = __ballot_sync(ALL, flag >> 31);
        if (lane == word) {
            negative = votes_no;
            nonzero = votes;
        }
    }
}

// The values of a tensor, to be packed.
template <int FORMAT_> struct Values {
    static constexpr int FORMAT = FORMAT_;
    const typename Float<FORMAT>::Bits* values;

    __device__ __forceinline__ bool aligned() const { return (u64)values % 16 == 0; }
    __device__ __forceinline__ u32 tile(u32 at, u32 lane, u32& negative, u32& nonzero, u32& bad) const {
        return read_tile<FORMAT>((const uint4*)(values + at), lane, negative, nonzero, bad);
    }
    __device__ __forceinline__ void part(u32 at, u32 elements, u32 lane, u32& negative, u32& nonzero, u32& bad) const {
        vote_tile<FORMAT>(values + at, elements, lane, negative, nonzero, bad);
    }
};

// Returns whether a value this thread has seen is NaN or Inf.
template <class Source>
__device__ __forceinline__ bool pack(const Job& job, const Source& source, u64 key, u32 zeros) {
    const bool aligned = source.aligned();
    const u32 lane = threadIdx.x % 32;
    u32 bad = 0;
#pragma unroll 1
    for (u32 at = threadIdx.x / 32 * TILE; at < job.elements; at += WARPS * TILE) {
        const u32 left = job.elements - at;
        u32 negative = 0, nonzero = 0, word = lane;
        if (aligned && left >= TILE)
            word = source.tile(at, lane, negative, nonzero, bad);
        else
            source.part(at, left, lane, negative, nonzero, bad);
        if (word * 32 < left) {
            const u32 exists = left - word * 32 < 32 ? (1u << left % 32) - 1 : ALL;
            const u32 zero = ~nonzero & exists;
            u32 signs = nonzero & ~negative;
            word += at / 32;
            if (zeros & ZEROS_POSITIVE) signs |= zero;
            if (zeros & ZEROS_COIN && zero) signs |= zero & coin(key, job.first_word + word);
            job.words[word] = signs;
            if (zeros & ZEROS_ABSTAIN && job.nonzero) job.nonzero[word] = nonzero;
        }
    }
    return is_bad<Source::FORMAT>(bad);
}

template <int FORMAT> __device__ __forceinline__ Values<FORMAT> values_of(const Job& job, const void* tensor) {
    return {(const typename Float<FORMAT>::Bits*)tensor + job.start};
}

__device__ __forceinline__ bool pack_any(const Job& job, const void* tensor, u32 format, u64 key, u32 zeros) {
    switch (format) {
    case FLOAT32: return pack(job, values_of<FLOAT32>(job, tensor), key, zeros);
    case FLOAT64: return pack(job, values_of<FLOAT64>(job, tensor), key, zeros);
    case FLOAT16: return pack(job, values_of<FLOAT16>(job, tensor), key, zeros);
    case BFLOAT16: return pack(job, values_of<BFLOAT16>(job, tensor), key, zeros);
    }
    return false;
}

extern "C" __global__ void STREAMING pack_one(
    const void* tensor, u32 format, u64 elements, u32* words, u32* nonzero, u64 first_word, u64 key, u32 zeros,
    u8* finite) {
    if (pack_any(job_of_one(words, nonzero, first_word, elements), tensor, format, key, zeros)) *finite = 0;
}

// `base`: the number of the first of `tensors`; `bad`: the number of the first in which something was not finite.
extern "C" __global__ void STREAMING
pack_many(const __grid_constant__ Tensors tensors, const Job* jobs, u32 base, u64 key, u32 zeros, u32* bad) {
    const Job job = jobs[blockIdx.x];
    const void* tensor = tensors.at[job.tensor];
    if (tensor && pack_any(job, tensor, tensors.format[job.tensor], key, zeros))
        atomicMin(bad, base + jobs[blockIdx.x].tensor);  // read again: no register waits for a NaN
}

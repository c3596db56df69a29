// NaN and infinity: whether vectors have any.

template <int FORMAT>
__device__ __forceinline__ bool any_bad(const void* vector, u64 start, u32 elements) {
    typedef typename Float<FORMAT>::Bits Bits;
    const Bits* values = (const Bits*)vector + start;
    constexpr u32 AT_ONCE = 8, STEP = AT_ONCE * THREADS * PER_LOAD<FORMAT>;
    u32 bad = 0, done = 0;
    if ((u64)values % 16 == 0) {
#pragma unroll 1
        for (; done + STEP <= elements; done += STEP) {
            const uint4* at = (const uint4*)(values + done) + threadIdx.x;
            uint4 loaded[AT_ONCE];
#pragma unroll
            for (u32 k = 0; k < AT_ONCE; ++k) loaded[k] = __ldcs(at + k * THREADS);
#pragma unroll
            for (u32 k = 0; k < AT_ONCE; ++k) {
                look<FORMAT>(loaded[k].y, 0, bad);
                look<FORMAT>(loaded[k].w, 0, bad);
                if constexpr (FORMAT != FLOAT64) {
                    look<FORMAT>(loaded[k].x, 0, bad);
                    look<FORMAT>(loaded[k].z, 0, bad);
                }
            }
        }
    }
#pragma unroll 8
    for (u32 place = done + threadIdx.x; place < elements; place += THREADS) {
        const Bits value = __ldcs(values + place);
        look<FORMAT>(FORMAT == FLOAT64 ? (u32)((u64)value >> 32) : (u32)value, 0, bad);
    }
    return is_bad<FORMAT>(bad);
}

// `base`: the number of the first of `vectors`; `first`: the number of the first that has one.
extern "C" __global__ void STREAMING
first_bad(const __grid_constant__ Vectors vectors, u32 count, u32 base, u32* first) {
    u32 vector = 0, end = count;  // the last vector whose first block is not after this one
    while (end - vector > 1) {
        const u32 middle = (vector + end) / 2;
        if (vectors.first_block[middle] <= blockIdx.x)
            vector = middle;
        else
            end = middle;
    }
    const u64 start = (u64)(blockIdx.x - vectors.first_block[vector]) * JOB_ELEMENTS;
    const u64 left = vectors.elements[vector] - start;
    const u32 elements = left < JOB_ELEMENTS ? left : JOB_ELEMENTS;
    const void* at = vectors.at[vector];
    bool bad = false;
    switch (vectors.format[vector]) {
    case FLOAT32: bad = any_bad<FLOAT32>(at, start, elements); break;
    case FLOAT64: bad = any_bad<FLOAT64>(at, start, elements); break;
    case FLOAT16: bad = any_bad<FLOAT16>(at, start, elements); break;
    case BFLOAT16: bad = any_bad<BFLOAT16>(at, start, elements); break;
    }
    if (bad) atomicMin(first, base + vector);
}

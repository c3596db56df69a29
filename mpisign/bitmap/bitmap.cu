// The bit arithmetic of bitmap/host.py on CUDA, bit for bit. Compiled by bitmap/kernels.py, called by bitmap/cuda.py.
//
// Speed. Every kernel moves its bytes once and computes less than the memory system leaves time for, so all that
// counts is bytes in flight: an H100 wants about 20 KB of them on every multiprocessor at all times. Where memory is
// aligned, a thread issues up to eight 16-byte loads before it uses the first; blocks are small and many, so that
// four or more share a multiprocessor and some load while others compute. Nothing is staged in shared memory.
//
// Numbers. Floats are looked at as integers throughout: what is asked about them (sign, zero, NaN) are questions about
// bits, denormals count, and whoever compiles with flush-to-zero (as CuPy does) must get the same answers.
//
// THREADS, JOB_ELEMENTS, the capacities and the names of formats and policies are macros that kernels.py defines.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Kernels that read and write tensors: up to 64 registers a thread, enough to hold eight loads.
#define STREAMING __launch_bounds__(THREADS, 4)

constexpr u32 ALL = 0xffffffffu;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 TILE = 1024;  // elements a warp takes at once: 32 words, one a lane, whatever the format

// A piece of a tensor, the work of one block: `elements` (at most JOB_ELEMENTS) from element `start` on.
struct Job {
    u32* words;    // of the piece's first element
    u32* nonzero;  // the second plane, or null
    u64 first_word;
    u64 start;
    u32 tensor;  // modulo TENSOR_CAPACITY
    u32 elements;
};

// Kernel parameters by value: they need no buffer, no copy and no event, and a launch may hold 4 KB of them.
template <int CAPACITY> struct Some {
    void* at[CAPACITY];  // null: left out
    u8 format[CAPACITY];
};
typedef Some<TENSOR_CAPACITY> Tensors;
typedef Some<MOMENTUM_CAPACITY> HalfTensors;
struct Vectors {
    const void* at[VECTOR_CAPACITY];
    u64 elements[VECTOR_CAPACITY];
    u32 first_block[VECTOR_CAPACITY];
    u8 format[VECTOR_CAPACITY];
};
struct Bitmaps {
    const u32* at[BITMAP_CAPACITY];
};

// ----------------------------------------------------------------------------------------------------- formats

// The 32-bit register that has an element's sign and exponent; 16-bit formats have two elements in it. Adding
// TO_INFINITY to the magnitude carries into the sign bit if the element is NaN or Inf.
template <int FORMAT> struct Float;
template <> struct Float<FLOAT32> {
    typedef u32 Bits;
    typedef float Real;  // what it is averaged in
    typedef uint4 Group;  // as many as there are of those in 16 bytes
    static constexpr u32 MAGNITUDE = 0x7fffffff, TO_INFINITY = 0x00800000, ONE = 0x3f800000;
};
template <> struct Float<FLOAT64> {
    typedef u64 Bits;
    typedef double Real;
    typedef uint4 Group;
    static constexpr u32 MAGNITUDE = 0x7fffffff, TO_INFINITY = 0x00100000, ONE = 0x3ff00000;
};
template <> struct Float<FLOAT16> {
    typedef u16 Bits;
    typedef float Real;
    typedef uint2 Group;
    static constexpr u32 MAGNITUDE = 0x7fff7fff, TO_INFINITY = 0x04000400, ONE = 0x3c003c00;
};
template <> struct Float<BFLOAT16> {
    typedef u16 Bits;
    typedef float Real;
    typedef uint2 Group;
    static constexpr u32 MAGNITUDE = 0x7fff7fff, TO_INFINITY = 0x00800080, ONE = 0x3f803f80;
};

template <int FORMAT> constexpr u32 PER_LOAD = 16 / sizeof(typename Float<FORMAT>::Bits);  // elements in 16 bytes
template <int FORMAT> constexpr u32 LOADS = TILE / 32 / PER_LOAD<FORMAT>;  // 16-byte loads of a lane for a tile

// Returns a register whose sign bits say "not zero"; sets sign bits of `bad` where the element is NaN or Inf.
// `low` is the lower half of a double.
template <int FORMAT> __device__ __forceinline__ u32 look(u32 high, u32 low, u32& bad) {
    u32 magnitude = high & Float<FORMAT>::MAGNITUDE;
    bad |= magnitude + Float<FORMAT>::TO_INFINITY;
    if constexpr (FORMAT == FLOAT64) magnitude |= low != 0;
    return magnitude + Float<FORMAT>::MAGNITUDE;  // carries into the sign bit unless 0
}

template <int FORMAT> __device__ __forceinline__ bool is_bad(u32 bad) {
    return (bad & ~Float<FORMAT>::MAGNITUDE) != 0;
}

__device__ __forceinline__ void push(u32& bits, u32 flag) {  // the sign bit of `flag` becomes bit 0
    bits = __funnelshift_l(flag, bits, 1);
}

// --------------------------------------------------------------------------------------------------------- coin

// bitmap/coin.py: SplitMix64 at the word's pair.
__device__ __forceinline__ u32 coin(u64 key, u64 word) {
    u64 z = key + ((word >> 1) + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    return (u32)(word & 1 ? z >> 32 : z);
}

// ------------------------------------------------------------------------------------------------------ packing

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

template <class Source>
__device__ __forceinline__ void pack(const Job& job, const Source& source, u64 key, u32 zeros, u8* finite) {
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
            if (zeros == ZEROS_POSITIVE) signs |= zero;
            if (zeros == ZEROS_COIN && zero) signs |= zero & coin(key, job.first_word + word);
            job.words[word] = signs;
            if (zeros == ZEROS_ABSTAIN && job.nonzero) job.nonzero[word] = nonzero;
        }
    }
    if (is_bad<Source::FORMAT>(bad)) *finite = 0;
}

template <int FORMAT> __device__ __forceinline__ Values<FORMAT> values_of(const Job& job, const void* tensor) {
    return {(const typename Float<FORMAT>::Bits*)tensor + job.start};
}

__device__ __forceinline__ void
pack_any(const Job& job, const void* tensor, u32 format, u64 key, u32 zeros, u8* finite) {
    switch (format) {
    case FLOAT32: return pack(job, values_of<FLOAT32>(job, tensor), key, zeros, finite);
    case FLOAT64: return pack(job, values_of<FLOAT64>(job, tensor), key, zeros, finite);
    case FLOAT16: return pack(job, values_of<FLOAT16>(job, tensor), key, zeros, finite);
    case BFLOAT16: return pack(job, values_of<BFLOAT16>(job, tensor), key, zeros, finite);
    }
}

// The block's job where there is one tensor.
__device__ __forceinline__ Job job_of_one(u32* words, u32* nonzero, u64 first_word, u64 elements) {
    const u64 start = (u64)blockIdx.x * JOB_ELEMENTS, word = start / 32;
    const u64 left = elements - start;
    return {words + word, nonzero ? nonzero + word : nonzero, first_word + word, start, 0,
            (u32)(left < JOB_ELEMENTS ? left : JOB_ELEMENTS)};
}

extern "C" __global__ void STREAMING pack_one(
    const void* tensor, u32 format, u64 elements, u32* words, u32* nonzero, u64 first_word, u64 key, u32 zeros,
    u8* finite) {
    pack_any(job_of_one(words, nonzero, first_word, elements), tensor, format, key, zeros, finite);
}

extern "C" __global__ void STREAMING
pack_many(const __grid_constant__ Tensors tensors, const Job* jobs, u64 key, u32 zeros, u8* finite) {
    const Job job = jobs[blockIdx.x];
    const void* tensor = tensors.at[job.tensor];
    if (tensor) pack_any(job, tensor, tensors.format[job.tensor], key, zeros, finite);
}

// --------------------------------------------------------------------------------------------- packing momentum

// Arithmetic that no compiler's option changes: rounded once, and denormals count.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return __fmaf_ieee_rn(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }

// torch.lerp
template <class Real> __device__ __forceinline__ Real lerp(Real from, Real to, Real weight) {
    const bool near = weight < (Real)0.5;
    return multiply_add(near ? weight : weight - 1, multiply_add(from, (Real)-1, to), near ? from : to);
}

__device__ __forceinline__ float real(u32 bits) { return __uint_as_float(bits); }
__device__ __forceinline__ double real(u64 bits) { return __longlong_as_double((long long)bits); }
__device__ __forceinline__ u32 bits(float real) { return __float_as_uint(real); }
__device__ __forceinline__ u64 bits(double real) { return (u64)__double_as_longlong(real); }
__device__ __forceinline__ u32 high(u32 bits) { return bits; }
__device__ __forceinline__ u32 high(u64 bits) { return (u32)(bits >> 32); }
__device__ __forceinline__ u32 low(u32) { return 0; }
__device__ __forceinline__ u32 low(u64 bits) { return (u32)bits; }

template <int FORMAT>
__device__ __forceinline__ typename Float<FORMAT>::Real widened(typename Float<FORMAT>::Bits value) {
    if constexpr (FORMAT == BFLOAT16) {
        return real((u32)value << 16);
    } else if constexpr (FORMAT == FLOAT16) {  // its exponent is 112 less, but that of NaN and Inf is the largest
        const u32 magnitude = bits(multiply_add(real((value & 0x7fffu) << 13), 0x1p112f, 0.0f));
        return real(magnitude | ((value & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0) | (value & 0x8000u) << 16);
    } else {
        return real(value);
    }
}

__device__ __forceinline__ void split(const uint4& group, u32 (&values)[4]) {
    values[0] = group.x, values[1] = group.y, values[2] = group.z, values[3] = group.w;
}
__device__ __forceinline__ void split(const uint4& group, u64 (&values)[2]) {
    values[0] = (u64)group.y << 32 | group.x, values[1] = (u64)group.w << 32 | group.z;
}
__device__ __forceinline__ void split(const uint2& group, u16 (&values)[4]) {
    values[0] = (u16)group.x, values[1] = group.x >> 16, values[2] = (u16)group.y, values[3] = group.y >> 16;
}
__device__ __forceinline__ uint4 join(const u32 (&values)[4]) {
    return make_uint4(values[0], values[1], values[2], values[3]);
}
__device__ __forceinline__ uint4 join(const u64 (&values)[2]) {
    return make_uint4(low(values[0]), high(values[0]), low(values[1]), high(values[1]));
}

// What happens to a gradient g and its momentum m: g is multiplied by `unscale`, the sign of lerp(m, g, sent) is
// packed, and m becomes lerp(m, g, kept), unless g is NaN or Inf.
template <class Real> struct Rates {
    Real unscale, sent, kept;
};

// Gradients and momenta, of which the former are taken into the latter while the signs are packed. Momenta are doubles
// if the gradients are, else floats.
template <int GRADIENT> struct Momentum {
    static constexpr int FORMAT = GRADIENT == FLOAT64 ? FLOAT64 : FLOAT32;
    typedef typename Float<GRADIENT>::Bits Gradient;
    typedef typename Float<GRADIENT>::Group Group;
    typedef typename Float<FORMAT>::Bits Bits;
    typedef typename Float<FORMAT>::Real Real;
    static constexpr u32 E = PER_LOAD<FORMAT>;

    const Gradient* __restrict__ gradients;
    Bits* __restrict__ momenta;
    Rates<Real> rates;

    __device__ __forceinline__ bool aligned() const {
        return (u64)gradients % sizeof(Group) == 0 && (u64)momenta % 16 == 0;
    }

    __device__ __forceinline__ void
    take_in(Gradient value, Bits& momentum, u32& negative, u32& nonzero, u32& bad) const {
        const Real gradient = multiply_add(widened<GRADIENT>(value), rates.unscale, (Real)-0.0);
        const Real before = real(momentum);
        const Bits sent = bits(lerp(before, gradient, rates.sent));  // NaN or Inf if the gradient is
        u32 infinite = 0;
        look<FORMAT>(high(bits(gradient)), 0, infinite);
        if (!is_bad<FORMAT>(infinite)) momentum = bits(lerp(before, gradient, rates.kept));
        push(nonzero, look<FORMAT>(high(sent), low(sent), bad));
        push(negative, high(sent));
    }

    // A full tile, if all is aligned.
    __device__ __forceinline__ u32 tile(u32 at, u32 lane, u32& negative, u32& nonzero, u32& bad) const {
        constexpr int AT_ONCE = 4;
        const Group* from = (const Group*)(gradients + at) + lane;
        uint4* to = (uint4*)(momenta + at) + lane;
#pragma unroll 1
        for (int batch = LOADS<FORMAT> / AT_ONCE - 1; batch >= 0; --batch) {  // the last element is pushed first
            Group news[AT_ONCE];
            uint4 olds[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) {
                news[k] = __ldcs(from + (batch * AT_ONCE + k) * 32);
                olds[k] = __ldcs(to + (batch * AT_ONCE + k) * 32);
            }
#pragma unroll
            for (int k = AT_ONCE - 1; k >= 0; --k) {
                Gradient gradient[E];
                Bits momentum[E];
                split(news[k], gradient);
                split(olds[k], momentum);
#pragma unroll
                for (int i = E - 1; i >= 0; --i) take_in(gradient[i], momentum[i], negative, nonzero, bad);
                __stcs(to + (batch * AT_ONCE + k) * 32, join(momentum));
            }
        }
        return words_of_tile<E>(lane, negative, nonzero);
    }

    __device__ __forceinline__ void part(u32 at, u32 elements, u32 lane, u32& negative, u32& nonzero, u32& bad) const {
        const u32 words = min((elements + 31) / 32, TILE / 32);
#pragma unroll 4
        for (u32 word = 0; word < words; ++word) {
            const u32 place = word * 32 + lane;
            u32 votes_no = 0, votes = 0;
            if (place < elements) {
                Bits momentum = __ldcs(momenta + at + place);
                take_in(__ldcs(gradients + at + place), momentum, votes_no, votes, bad);
                __stcs(momenta + at + place, momentum);
            }
            votes_no = __ballot_sync(ALL, votes_no);
            votes = __ballot_sync(ALL, votes);
            if (lane == word) {
                negative = votes_no;
                nonzero = votes;
            }
        }
    }
};

template <int GRADIENT>
__device__ __forceinline__ Momentum<GRADIENT>
momentum_of(const Job& job, const void* gradients, void* momenta, double unscale, double sent, double kept) {
    typedef Momentum<GRADIENT> Source;
    typedef typename Source::Real Real;
    return {(const typename Source::Gradient*)gradients + job.start,
            (typename Source::Bits*)momenta + job.start,
            {(Real)unscale, (Real)sent, (Real)kept}};
}

// Twice the loads want more registers: three blocks share a multiprocessor.
extern "C" __global__ void __launch_bounds__(THREADS, 3) pack_momentum(
    const __grid_constant__ HalfTensors gradients, const __grid_constant__ HalfTensors momenta, const Job* jobs,
    double unscale, double sent, double kept, u64 key, u32 zeros, u8* finite) {
    const Job job = jobs[blockIdx.x];
    const u32 tensor = job.tensor % MOMENTUM_CAPACITY;
    const void* from = gradients.at[tensor];
    void* to = momenta.at[tensor];
    if (!from) return;
    switch (gradients.format[tensor]) {
    case FLOAT32: return pack(job, momentum_of<FLOAT32>(job, from, to, unscale, sent, kept), key, zeros, finite);
    case FLOAT64: return pack(job, momentum_of<FLOAT64>(job, from, to, unscale, sent, kept), key, zeros, finite);
    case FLOAT16: return pack(job, momentum_of<FLOAT16>(job, from, to, unscale, sent, kept), key, zeros, finite);
    case BFLOAT16: return pack(job, momentum_of<BFLOAT16>(job, from, to, unscale, sent, kept), key, zeros, finite);
    }
}

// ---------------------------------------------------------------------------------------------------- unpacking

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

// ---------------------------------------------------------------------------------------------- NaN and infinity

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

extern "C" __global__ void STREAMING all_finite(const __grid_constant__ Vectors vectors, u32 count, u8* finite) {
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
    if (bad) *finite = 0;
}

// ----------------------------------------------------------------------------------------------------- counting

// Adds the block's sum of each of `mine` to `totals`: one atomic operation a block, as thousands of blocks share them.
template <int N> __device__ __forceinline__ void add_up(u32 (&mine)[N], u64* totals) {
    __shared__ u32 partial[N][WARPS];
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (u32 distance = 16; distance > 0; distance /= 2) mine[n] += __shfl_xor_sync(ALL, mine[n], distance);
        if (threadIdx.x % 32 == 0) partial[n][threadIdx.x / 32] = mine[n];
    }
    __syncthreads();
    if (threadIdx.x < N) {
        u32 sum = 0;
        for (u32 warp = 0; warp < WARPS; ++warp) sum += partial[threadIdx.x][warp];
        if (sum) atomicAdd(totals + threadIdx.x, (u64)sum);
    }
}

// The four words of a thread: next to each other where every bitmap is 16-byte aligned (`wide`), else as far apart
// as the block is wide; a warp's loads are coalesced either way.
constexpr u32 WORDS = 4;
struct Span {
    u64 first, words;
    u32 step;
    bool wide;

    __device__ __forceinline__ Span(u64 words, bool wide)
        : first((u64)blockIdx.x * THREADS * WORDS + threadIdx.x * (wide ? WORDS : 1)),
          words(words),
          step(wide ? 1 : THREADS),
          wide(wide && first + WORDS <= words) {}
    __device__ __forceinline__ u64 place(u32 i) const { return first + i * step; }
    __device__ __forceinline__ bool has(u32 i) const { return place(i) < words; }
    __device__ __forceinline__ void load(const u32* bitmap, u32 (&out)[WORDS]) const {
        if (wide) {
            const uint4 four = __ldcs((const uint4*)(bitmap + first));
            out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
        } else {
#pragma unroll
            for (u32 i = 0; i < WORDS; ++i) out[i] = has(i) ? __ldcs(bitmap + place(i)) : 0;
        }
    }
    __device__ __forceinline__ void store(u32* bitmap, const u32 (&in)[WORDS]) const {
        if (wide) {
            __stcs((uint4*)(bitmap + first), make_uint4(in[0], in[1], in[2], in[3]));
        } else {
#pragma unroll
            for (u32 i = 0; i < WORDS; ++i)
                if (has(i)) bitmap[place(i)] = in[i];
        }
    }
};

// Bit-sliced counters for a thread's words: plane p holds bit p of how many of the added bits were 1.
template <int PLANES> struct Counter {
    u32 plane[PLANES][WORDS] = {};

    // Adds four bits to every counter: three full adders, then the carry ripples up.
    __device__ __forceinline__ void add(const u32 (&bits)[4][WORDS]) {
#pragma unroll
        for (u32 i = 0; i < WORDS; ++i) {
            const u32 twos = full_add(plane[0][i], bits[0][i], bits[1][i]);
            const u32 more_twos = full_add(plane[0][i], bits[2][i], bits[3][i]);
            u32 carry = full_add(plane[1][i], twos, more_twos);
#pragma unroll
            for (int p = 2; p < PLANES; ++p) {
                const u32 next = plane[p][i] & carry;
                plane[p][i] ^= carry;
                carry = next;
            }
        }
    }

    // a becomes the sum's low bit; returns the carry.
    __device__ __forceinline__ static u32 full_add(u32& a, u32 b, u32 c) {
        const u32 carry = (a & b) | (a & c) | (b & c);
        a ^= b ^ c;
        return carry;
    }

    __device__ __forceinline__ void compare(u32 limit, u32 i, u32& above, u32& equal) const {
        above = 0;
        equal = ALL;
#pragma unroll
        for (int p = PLANES - 1; p >= 0; --p) {
            const u32 bit = 0 - (limit >> p & 1);
            above |= equal & plane[p][i] & ~bit;
            equal &= ~(plane[p][i] ^ bit);
        }
    }
};

// A list of bitmaps: by value while they fit into the parameters, else in device memory.
__device__ __forceinline__ const u32* bitmap_of(const Bitmaps& few, const u32* const* many, u32 i) {
    return many ? many[i] : few.at[i];
}

// Reads four bitmaps from number `from` on, nothing beyond `count`; all loads are issued before any is used.
__device__ __forceinline__ void load_four(
    const Span& span, const Bitmaps& few, const u32* const* many, u32 from, u32 count, u32 (&bits)[4][WORDS]) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        if (from + i < count) {
            span.load(bitmap_of(few, many, from + i), bits[i]);
        } else {
#pragma unroll
            for (u32 j = 0; j < WORDS; ++j) bits[i][j] = 0;
        }
    }
}

// Everybody votes: +1 where more than half of `voters` have a 1.
//
// With abstentions, the list holds each voter's signs and then its nonzero plane, and a voter adds two bits: its sign
// s, and "not against", ~(s ^ nonzero). That is 2 for, 1 abstaining, 0 against, so the sum is above, at or below the
// number of voters where the votes for are more, as many or fewer than those against: one counter does for both.
template <int PLANES, bool ABSTAIN>
__device__ __forceinline__ void decide(
    const Bitmaps& few, const u32* const* many, u32 voters, u64 words, u32* out, u32* out_nonzero, u64 key,
    u64 first_word, u32 ties, bool wide, u64* tied) {
    const Span span(words, wide);
    Counter<PLANES> counter;
    u32 voted[WORDS], bits[4][WORDS];
#pragma unroll
    for (u32 i = 0; i < WORDS; ++i) voted[i] = ABSTAIN ? 0 : ALL;
    const u32 bitmaps = ABSTAIN ? 2 * voters : voters;
    for (u32 from = 0; from < bitmaps; from += 4) {
        load_four(span, few, many, from, bitmaps, bits);
        if constexpr (ABSTAIN) {
#pragma unroll
            for (u32 pair = 0; pair < 4; pair += 2)
#pragma unroll
                for (u32 i = 0; i < WORDS; ++i) {
                    voted[i] |= bits[pair + 1][i];
                    bits[pair + 1][i] = from + pair < bitmaps ? ~(bits[pair][i] ^ bits[pair + 1][i]) : 0;
                }
        }
        counter.add(bits);
    }
    const bool can_tie = ABSTAIN || voters % 2 == 0;
    u32 signs[WORDS], mine[1] = {0};
#pragma unroll
    for (u32 i = 0; i < WORDS; ++i) {
        u32 equal;
        counter.compare(ABSTAIN ? voters : voters / 2, i, signs[i], equal);
        equal = can_tie ? equal & voted[i] : 0;  // words that do not exist have no votes, and cannot tie
        mine[0] += __popc(equal);
        if (ties == TIES_POSITIVE) signs[i] |= equal;
        if (ties == TIES_ZERO) voted[i] &= ~equal;
        if (ties == TIES_COIN && equal) signs[i] |= equal & coin(key, first_word + span.place(i));
    }
    span.store(out, signs);
    if (out_nonzero) span.store(out_nonzero, voted);
    if (can_tie) add_up(mine, tied);
}

template <int PLANES>
__device__ __forceinline__ void count(
    const Bitmaps& few, const u32* const* many, u32 bitmaps, u64 words, u32* out, u64 stride, u32 planes, bool wide) {
    const Span span(words, wide);
    Counter<PLANES> counter;
    u32 bits[4][WORDS];
    for (u32 from = 0; from < bitmaps; from += 4) {
        load_four(span, few, many, from, bitmaps, bits);
        counter.add(bits);
    }
#pragma unroll
    for (u32 p = 0; p < PLANES; ++p)
        if (p < planes) span.store(out + p * stride, counter.plane[p]);
}

#define COUNTING(PLANES)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) majority_##PLANES(                                          \
        const __grid_constant__ Bitmaps few, const u32* const* many, u32 voters, u64 words, u32* out,                 \
        u32* out_nonzero, u64 key, u64 first_word, u32 ties, u32 wide, u64* tied) {                                   \
        decide<PLANES, false>(few, many, voters, words, out, out_nonzero, key, first_word, ties, wide, tied);         \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS) majority_abstain_##PLANES(                                  \
        const __grid_constant__ Bitmaps few, const u32* const* many, u32 voters, u64 words, u32* out,                 \
        u32* out_nonzero, u64 key, u64 first_word, u32 ties, u32 wide, u64* tied) {                                   \
        decide<PLANES, true>(few, many, voters, words, out, out_nonzero, key, first_word, ties, wide, tied);          \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS) count_##PLANES(                                             \
        const __grid_constant__ Bitmaps few, const u32* const* many, u32 bitmaps, u64 words, u32* out, u64 stride,    \
        u32 planes, u32 wide) {                                                                                       \
        count<PLANES>(few, many, bitmaps, words, out, stride, planes, wide);                                          \
    }
// Few sizes, as each takes a second to compile and a plane too many costs next to nothing.
COUNTING(2)
COUNTING(3)
COUNTING(4)
COUNTING(6)
COUNTING(8)
COUNTING(16)

// ---------------------------------------------------------------------------------------------------- agreement

extern "C" __global__ void __launch_bounds__(THREADS)
agreement(const u32* ballot, const u32* decision, u64 elements, const u32* nonzero, const u32* moved, u64* counts) {
    const Span span((elements + 31) / 32, false);
    u32 mine[2] = {0, 0};
#pragma unroll
    for (u32 i = 0; i < WORDS; ++i) {
        if (span.has(i)) {
            const u64 word = span.place(i), left = elements - word * 32;
            u32 both = left < 32 ? (1u << left) - 1 : ALL;
            if (nonzero) both &= nonzero[word];
            if (moved) both &= moved[word];
            mine[0] += __popc(~(ballot[word] ^ decision[word]) & both);
            mine[1] += __popc(both);
        }
    }
    add_up(mine, counts);
}

// Packing momentum: gradients are taken into it, and its signs packed, in one go. pack.cu does the rest.

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
    local_update(Gradient value, Bits& momentum, u32& negative, u32& nonzero, u32& bad) const {
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
                for (int i = E - 1; i >= 0; --i) local_update(gradient[i], momentum[i], negative, nonzero, bad);
                __stcs(to + (batch * AT_ONCE + k) * 32, join(momentum));
            }
        }
        return words_of_tile<E>(lane, negative, nonzero);
    }

    // The first `elements` of a tile anywhere in memory: several words are loaded before the first is voted on, and
    // lanes behind the end take 0 into 0, so that no branch stands between a load and the next.
    __device__ __forceinline__ void part(u32 at, u32 elements, u32 lane, u32& negative, u32& nonzero, u32& bad) const {
        constexpr u32 AT_ONCE = 32 / sizeof(Bits);
        const u32 words = min((elements + 31) / 32, TILE / 32);
#pragma unroll 1
        for (u32 first = 0; first < words; first += AT_ONCE) {
            const u32 place = first * 32 + lane;
            Gradient news[AT_ONCE];
            Bits olds[AT_ONCE];
#pragma unroll
            for (u32 k = 0; k < AT_ONCE; ++k) {
                const bool exists = place + k * 32 < elements;
                news[k] = exists ? __ldcs(gradients + at + place + k * 32) : 0;
                olds[k] = exists ? __ldcs(momenta + at + place + k * 32) : 0;
            }
#pragma unroll
            for (u32 k = 0; k < AT_ONCE; ++k) {
                u32 votes_no = 0, votes = 0;
                local_update(news[k], olds[k], votes_no, votes, bad);
                if (place + k * 32 < elements) __stcs(momenta + at + place + k * 32, olds[k]);
                votes_no = __ballot_sync(ALL, votes_no);
                votes = __ballot_sync(ALL, votes);
                if (lane == first + k) {
                    negative = votes_no;
                    nonzero = votes;
                }
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
    u32 base, double unscale, double sent, double kept, u64 key, u32 zeros, u32* bad) {
    const Job job = jobs[blockIdx.x];
    const u32 tensor = job.tensor % MOMENTUM_CAPACITY;
    const void* from = gradients.at[tensor];
    void* to = momenta.at[tensor];
    if (!from) return;
    bool found = false;
    switch (gradients.format[tensor]) {
    case FLOAT32: found = pack(job, momentum_of<FLOAT32>(job, from, to, unscale, sent, kept), key, zeros); break;
    case FLOAT64: found = pack(job, momentum_of<FLOAT64>(job, from, to, unscale, sent, kept), key, zeros); break;
    case FLOAT16: found = pack(job, momentum_of<FLOAT16>(job, from, to, unscale, sent, kept), key, zeros); break;
    case BFLOAT16: found = pack(job, momentum_of<BFLOAT16>(job, from, to, unscale, sent, kept), key, zeros); break;
    }
    if (found) atomicMin(bad, base + jobs[blockIdx.x].tensor % MOMENTUM_CAPACITY);  // as in pack.cu
}

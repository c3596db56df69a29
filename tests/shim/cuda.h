// As much of CUDA as the kernels use, on the host: the threads of a block are fibers that run until they meet in a
// warp-wide operation or at a barrier. What a GPU would not forgive is an error here: lanes that meet in different
// operations or not at all, and 16-byte accesses to memory that is not 16-byte aligned.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another

struct Index {
    unsigned x;
};
extern Index threadIdx, blockIdx;

namespace shim {
enum class Meeting { none, ballot, shuffle, barrier };

// Called by a fiber: waits until its warp (its block, at a barrier) is here, and returns what `lane` brought.
void meet(Meeting kind, unsigned mask, unsigned brought);
unsigned brought_by(unsigned lane);

[[noreturn]] void fail(const char* what);

template <class T> T* aligned(T* address) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) fail("access to misaligned memory");
    return address;
}
}  // namespace shim

struct uint4 {
    unsigned x, y, z, w;
};
struct uint2 {
    unsigned x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
template <class T> T __ldcs(const T* address) {
    return *shim::aligned(address);
}
template <class T> void __stcs(T* address, T value) {
    *shim::aligned(address) = value;
}

template <class To, class From> To reinterpret(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To same;
    std::memcpy(&same, &value, sizeof same);
    return same;
}
inline float __uint_as_float(unsigned bits) {
    return reinterpret<float>(bits);
}
inline unsigned __float_as_uint(float value) {
    return reinterpret<unsigned>(value);
}
inline double __longlong_as_double(long long bits) {
    return reinterpret<double>(bits);
}
inline long long __double_as_longlong(double value) {
    return reinterpret<long long>(value);
}
inline float __fmaf_ieee_rn(float a, float b, float c) {
    return std::fma(a, b, c);
}
inline double __fma_rn(double a, double b, double c) {
    return std::fma(a, b, c);
}

inline unsigned min(unsigned a, unsigned b) {
    return a < b ? a : b;
}
inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    shift %= 32;
    return shift ? high << shift | low >> (32 - shift) : high;
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
    const unsigned long long before = *address;
    *address += value;
    return before;
}

inline unsigned atomicMin(unsigned* address, unsigned value) {
    const unsigned before = *address;
    if (value < before) *address = value;
    return before;
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    shim::meet(shim::Meeting::ballot, mask, predicate != 0);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane) votes |= shim::brought_by(lane) << lane;
    return votes;
}
inline unsigned __shfl_sync(unsigned mask, unsigned value, unsigned lane) {
    shim::meet(shim::Meeting::shuffle, mask, value);
    return shim::brought_by(lane % 32);
}
inline unsigned __shfl_xor_sync(unsigned mask, unsigned value, unsigned distance) {
    return __shfl_sync(mask, value, threadIdx.x % 32 ^ distance);
}
inline void __syncthreads() {
    shim::meet(shim::Meeting::barrier, ~0u, 0);
}

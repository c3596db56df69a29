// What the kernels share: sizes, the structures they take, the four formats of floats, the coin.
//
// The .cu files are the bit arithmetic of bitmap/host.py on CUDA, bit for bit. They are one program: bitmap/kernels.py
// joins them in the order of its SOURCES, this one first, and compiles that; bitmap/cuda.py and batch.py call it. So no
// file includes another, and each may use what those before it define.
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

// The block's job where there is one tensor.
__device__ __forceinline__ Job job_of_one(u32* words, u32* nonzero, u64 first_word, u64 elements) {
    const u64 start = (u64)blockIdx.x * JOB_ELEMENTS, word = start / 32;
    const u64 left = elements - start;
    return {words + word, nonzero ? nonzero + word : nonzero, first_word + word, start, 0,
            (u32)(left < JOB_ELEMENTS ? left : JOB_ELEMENTS)};
}

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

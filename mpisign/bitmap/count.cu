// Counting: words of many voters to a decision or to their counts, how far two of them agree, and words without a 1.

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

    __device__ __forceinline__ void store(const Span& span, u32* out, u64 stride, u32 planes) const {
#pragma unroll
        for (u32 p = 0; p < PLANES; ++p)
            if (p < planes) span.store(out + p * stride, plane[p]);
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

// Decides a word where `equal` has a 1. Returns the number of those.
__device__ __forceinline__ u32 break_ties(u32 equal, u32& signs, u32& voted, u32 ties, u64 key, u64 word) {
    if (ties == TIES_POSITIVE) signs |= equal;
    if (ties == TIES_ZERO) voted &= ~equal;
    if (ties == TIES_COIN && equal) signs |= equal & coin(key, word);
    return __popc(equal);
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
        mine[0] += break_ties(equal, signs[i], voted[i], ties, key, first_word + span.place(i));
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
    counter.store(span, out, stride, planes);
}

// Adds counts up: the list holds `per` planes of each, the least significant first.
template <int PLANES>
__device__ __forceinline__ void add_counts(
    const Bitmaps& few, const u32* const* many, u32 counts, u32 per, u64 words, u32* out, u64 stride, u32 planes,
    bool wide) {
    const Span span(words, wide);
    Counter<PLANES> sum;
    for (u32 c = 0; c < counts; ++c) {
        u32 carry[WORDS] = {}, bits[WORDS];
#pragma unroll
        for (u32 p = 0; p < PLANES; ++p) {
            if (p < per) {
                span.load(bitmap_of(few, many, c * per + p), bits);
            } else {
#pragma unroll
                for (u32 i = 0; i < WORDS; ++i) bits[i] = 0;
            }
#pragma unroll
            for (u32 i = 0; i < WORDS; ++i) carry[i] = sum.full_add(sum.plane[p][i], bits[i], carry[i]);
        }
    }
    sum.store(span, out, stride, planes);
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
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS) add_counts_##PLANES(                                        \
        const __grid_constant__ Bitmaps few, const u32* const* many, u32 counts, u32 per, u64 words, u32* out,        \
        u64 stride, u32 planes, u32 wide) {                                                                           \
        add_counts<PLANES>(few, many, counts, per, words, out, stride, planes, wide);                                 \
    }
// Few sizes, as each takes a second to compile and a plane too many costs next to nothing.
COUNTING(2)
COUNTING(3)
COUNTING(4)
COUNTING(6)
COUNTING(8)
COUNTING(16)

// +1 where twice the count of votes for it is above that of all votes, a tie where they are equal and there are any.
//
// The list holds the planes of the votes for +1 and then, if there are any, those of all votes; else there are `voters`
// everywhere. Compared from the most significant bit down.
extern "C" __global__ void __launch_bounds__(THREADS) decide_counts(
    const __grid_constant__ Bitmaps few, u32 yes_planes, u32 voted_planes, u32 voters, u64 words, u32* out,
    u32* out_nonzero, u64 key, u64 first_word, u32 ties, u32 wide, u64* tied) {
    const Span span(words, wide);
    u32 signs[WORDS] = {}, equal[WORDS], voted[WORDS], twice[WORDS], all[WORDS], mine[1] = {0};
#pragma unroll
    for (u32 i = 0; i < WORDS; ++i) equal[i] = ALL, voted[i] = voted_planes ? 0 : ALL;
    const u32 above = voted_planes ? voted_planes : 32;
    for (u32 bit = yes_planes + 1 > above ? yes_planes + 1 : above; bit-- > 0;) {
        const bool has_twice = bit > 0 && bit <= yes_planes, has_all = bit < voted_planes;
        if (has_twice) span.load(few.at[bit - 1], twice);
        if (has_all) span.load(few.at[yes_planes + bit], all);
        const u32 constant = voted_planes || bit > 31 ? 0 : 0 - (voters >> bit & 1);
#pragma unroll
        for (u32 i = 0; i < WORDS; ++i) {
            const u32 a = has_twice ? twice[i] : 0, b = has_all ? all[i] : constant;
            if (has_all) voted[i] |= b;
            signs[i] |= equal[i] & a & ~b;
            equal[i] &= ~(a ^ b);
        }
    }
    const bool can_tie = voted_planes || voters % 2 == 0;
#pragma unroll
    for (u32 i = 0; i < WORDS; ++i) {
        const u32 tie = can_tie ? equal[i] & voted[i] : 0;
        mine[0] += break_ties(tie, signs[i], voted[i], ties, key, first_word + span.place(i));
    }
    span.store(out, signs);
    if (out_nonzero) span.store(out_nonzero, voted);
    if (can_tie) add_up(mine, tied);
}

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

// ------------------------------------------------------------------------------------------------------- zeros

// Whether a word has no 1 at all.
extern "C" __global__ void __launch_bounds__(THREADS) any_zero(const u32* bitmap, u64 words, u32 wide, u8* found) {
    const Span span(words, wide);
    u32 mine[WORDS];
    span.load(bitmap, mine);
    bool zero = false;
#pragma unroll
    for (u32 i = 0; i < WORDS; ++i) zero |= span.has(i) && !mine[i];
    if (zero) *found = 1;
}

// The loops of native.c, which includes this file once for each generation of processors: they are functions of
// `GENERATION(name)`, compiled for it. All of them work on one part of one tensor, or of one bitmap.

// ------------------------------------------------------------------------------------------------------------ coin

// The coins of some words, in pairs: bitmap/coin.py's SplitMix64. The first is at heads[returned].
INLINE u32 GENERATION(toss)(u64 key, u64 first_word, u32 words, u32 *restrict heads) {
    const u32 odd = first_word & 1, pairs = (words + odd + 1) / 2;
    for (u32 i = 0; i < pairs; ++i) {
        u64 z = key + ((first_word >> 1) + i + 1) * 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        z ^= z >> 31;
        heads[2 * i] = (u32)z;
        heads[2 * i + 1] = (u32)(z >> 32);
    }
    return odd;
}

// --------------------------------------------------------------------------------------------------------- packing

// What exact zeros vote: `zero` has a 1 for each. Before, they have 0 in `words` and 1 in `nonzero`.
INLINE void GENERATION(settle)(
    u32 *restrict words, u32 *restrict nonzero, const u32 *restrict zero, u32 count, Zeros zeros, u64 first_word) {
    if (zeros.policy & ZEROS_POSITIVE) {
        for (u32 w = 0; w < count; ++w) words[w] |= zero[w];
    }
    if (zeros.policy & ZEROS_COIN) {
        u32 heads[BLOCK_WORDS + 2];
        const u32 *from = heads + GENERATION(toss)(zeros.key, first_word, count, heads);
        for (u32 w = 0; w < count; ++w) words[w] |= zero[w] & from[w];
    }
    if (nonzero) {
        for (u32 w = 0; w < count; ++w) nonzero[w] ^= zero[w];
    }
}

INLINE void GENERATION(ones)(u32 *restrict words, u32 elements) {
    for (u32 w = 0; w < elements / 32; ++w) words[w] = 0xffffffff;
    if (elements % 32) words[elements / 32] = ((u32)1 << elements % 32) - 1;
}

// Packs at most BLOCK values. Returns whether all were finite.
#if defined(__AVX512F__) && defined(__AVX512BW__)

// Of 32 values or the first `n`: which are positive, which are zero; others than the first n are neither.
INLINE u32 GENERATION(look32)(const u32 *x, u32 n, u32 infinity, u32 *positive, u32 *zero) {
    const u32 have = n < 32 ? ((u32)1 << n) - 1 : 0xffffffff;
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), least_bad = _mm512_set1_epi32((int)infinity);
    u32 bad = 0;
    *positive = *zero = 0;
    for (u32 half = 0; half < 2; ++half) {
        const __mmask16 mine = (__mmask16)(have >> 16 * half);
        const __m512i value = _mm512_maskz_loadu_epi32(mine, x + 16 * half);
        *positive |= (u32)_mm512_cmpgt_epi32_mask(value, _mm512_setzero_si512()) << 16 * half;
        *zero |= (u32)_mm512_mask_testn_epi32_mask(mine, value, magnitude) << 16 * half;
        bad |= _mm512_cmpge_epi32_mask(_mm512_and_si512(value, magnitude), least_bad);
    }
    return bad;
}

INLINE u32 GENERATION(look16)(const u16 *x, u32 n, u16 infinity, u32 *positive, u32 *zero) {
    const u32 have = n < 32 ? ((u32)1 << n) - 1 : 0xffffffff;
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    const __m512i value = _mm512_maskz_loadu_epi16(have, x);
    *positive = _mm512_cmpgt_epi16_mask(value, _mm512_setzero_si512());
    *zero = _mm512_mask_testn_epi16_mask(have, value, magnitude);
    return _mm512_cmpge_epi16_mask(_mm512_and_si512(value, magnitude), _mm512_set1_epi16((short)infinity));
}

INLINE u32 GENERATION(look64)(const u64 *x, u32 n, u64 infinity, u32 *positive, u32 *zero) {
    const u32 have = n < 32 ? ((u32)1 << n) - 1 : 0xffffffff;
    const __m512i magnitude = _mm512_set1_epi64(0x7fffffffffffffff), least_bad = _mm512_set1_epi64((long long)infinity);
    u32 bad = 0;
    *positive = *zero = 0;
    for (u32 part = 0; part < 4; ++part) {
        const __mmask8 mine = (__mmask8)(have >> 8 * part);
        const __m512i value = _mm512_maskz_loadu_epi64(mine, x + 8 * part);
        *positive |= (u32)_mm512_cmpgt_epi64_mask(value, _mm512_setzero_si512()) << 8 * part;
        *zero |= (u32)_mm512_mask_testn_epi64_mask(mine, value, magnitude) << 8 * part;
        bad |= _mm512_cmpge_epi64_mask(_mm512_and_si512(value, magnitude), least_bad);
    }
    return bad;
}

#define PACK(WIDTH, SIGNED)                                                                                           \
    INLINE bool GENERATION(pack##WIDTH)(                                                                              \
        const u##WIDTH *restrict x, u32 elements, u##WIDTH infinity, u32 *restrict words, u32 *restrict nonzero,      \
        Zeros zeros, u64 first_word) {                                                                                \
        const u32 count = (elements + 31) / 32;                                                                       \
        u32 zero[BLOCK_WORDS], any = 0, bad = 0;                                                                      \
        for (u32 w = 0; w < elements / 32; ++w) {                                                                     \
            bad |= GENERATION(look##WIDTH)(x + 32 * (size_t)w, 32, infinity, words + w, zero + w);                    \
            any |= zero[w];                                                                                           \
        }                                                                                                             \
        if (elements % 32) {                                                                                          \
            const u32 w = elements / 32;                                                                              \
            bad |= GENERATION(look##WIDTH)(x + 32 * (size_t)w, elements % 32, infinity, words + w, zero + w);         \
            any |= zero[w];                                                                                           \
        }                                                                                                             \
        if (nonzero) GENERATION(ones)(nonzero, elements);                                                             \
        if (any) GENERATION(settle)(words, nonzero, zero, count, zeros, first_word);                                  \
        return !bad;                                                                                                  \
    }

#else

// Bit i says whether the condition holds for i, of at most 32. Where a shift is the same for all lanes of a vector,
// flags are gathered from bytes, eight by a product that brings them together.
#ifdef __AVX2__
#define FLAGS(N, CONDITION)                                                                                           \
    u32 bits = 0;                                                                                                     \
    for (u32 i = 0; i < (N); ++i) bits |= (u32)(CONDITION) << i;                                                      \
    return bits;
#else
#define FLAGS(N, CONDITION)                                                                                           \
    u8 flags[32] = {0};                                                                                               \
    for (u32 i = 0; i < (N); ++i) flags[i] = (CONDITION);                                                             \
    u32 bits = 0;                                                                                                     \
    for (u32 part = 0; part < 4; ++part) {                                                                            \
        u64 eight = 0;                                                                                                \
        for (u32 i = 0; i < 8; ++i) eight |= (u64)flags[8 * part + i] << 8 * i;                                       \
        bits |= (u32)(eight * 0x0102040810204080u >> 56) << 8 * part;                                                 \
    }                                                                                                                 \
    return bits;
#endif

#define PACK(WIDTH, SIGNED)                                                                                           \
    INLINE u32 GENERATION(positive##WIDTH)(const u##WIDTH *restrict x, u32 n) {                                       \
        FLAGS(n, (SIGNED)x[i] > 0)                                                                                    \
    }                                                                                                                 \
    INLINE u32 GENERATION(zero##WIDTH)(const u##WIDTH *restrict x, u32 n) {                                           \
        FLAGS(n, (u##WIDTH)(x[i] << 1) == 0)                                                                          \
    }                                                                                                                 \
    INLINE bool GENERATION(pack##WIDTH)(                                                                              \
        const u##WIDTH *restrict x, u32 elements, u##WIDTH infinity, u32 *restrict words, u32 *restrict nonzero,      \
        Zeros zeros, u64 first_word) {                                                                                \
        const u32 whole = elements / 32, rest = elements % 32, count = whole + (rest != 0);                           \
        const u##WIDTH magnitude = (u##WIDTH)((u##WIDTH)~(u##WIDTH)0 >> 1);                                           \
        u##WIDTH largest = 0, smallest = magnitude;                                                                   \
        for (u32 i = 0; i < elements; ++i) {                                                                          \
            const u##WIDTH m = x[i] & magnitude;                                                                      \
            largest = m > largest ? m : largest;                                                                      \
            smallest = m < smallest ? m : smallest;                                                                   \
        }                                                                                                             \
        for (u32 w = 0; w < whole; ++w) words[w] = GENERATION(positive##WIDTH)(x + 32 * (size_t)w, 32);               \
        if (rest) words[whole] = GENERATION(positive##WIDTH)(x + 32 * (size_t)whole, rest);                           \
        if (nonzero) GENERATION(ones)(nonzero, elements);                                                             \
        if (elements && smallest == 0) {                                                                              \
            u32 zero[BLOCK_WORDS];                                                                                    \
            for (u32 w = 0; w < whole; ++w) zero[w] = GENERATION(zero##WIDTH)(x + 32 * (size_t)w, 32);                \
            if (rest) zero[whole] = GENERATION(zero##WIDTH)(x + 32 * (size_t)whole, rest);                            \
            GENERATION(settle)(words, nonzero, zero, count, zeros, first_word);                                       \
        }                                                                                                             \
        return largest < infinity;                                                                                    \
    }

#endif

PACK(16, int16_t)
PACK(32, int32_t)
PACK(64, int64_t)
#undef PACK
#undef FLAGS

// One block of any format; `first_word` is that of the block.
INLINE bool GENERATION(pack_block)(
    u32 format, const void *x, u32 elements, u32 *words, u32 *nonzero, Zeros zeros, u64 first_word) {
    switch (format) {
    case FLOAT32: return GENERATION(pack32)(x, elements, 0x7f800000, words, nonzero, zeros, first_word);
    case FLOAT64: return GENERATION(pack64)(x, elements, (u64)0x7ff << 52, words, nonzero, zeros, first_word);
    case FLOAT16: return GENERATION(pack16)(x, elements, 0x7c00, words, nonzero, zeros, first_word);
    default: return GENERATION(pack16)(x, elements, 0x7f80, words, nonzero, zeros, first_word);
    }
}

static bool GENERATION(pack_part)(const Packing *task, Part part) {
    const u32 format = task->formats[part.tensor];
    const char *values = (const char *)task->values[part.tensor] + part.start * size_of(format);
    u32 *words = task->words[part.tensor] + part.start / 32, *nonzero = task->nonzeros[part.tensor];
    const u64 first_word = task->first_words[part.tensor] + part.start / 32;
    nonzero = nonzero && task->zeros.policy & ZEROS_SPOKEN ? nonzero + part.start / 32 : NULL;
    bool finite = true;
    for (u64 at = 0; at < part.elements; at += BLOCK)
        finite &= GENERATION(pack_block)(
            format, values + at * size_of(format), (u32)least(BLOCK, part.elements - at), words + at / 32,
            nonzero ? nonzero + at / 32 : NULL, task->zeros, first_word + at / 32);
    return finite;
}

// -------------------------------------------------------------------------------------------------------- momentum

// Copies what nobody reads soon past the caches, so that the lines it goes to need not be read first. FENCE comes after
// the last of them.
INLINE void GENERATION(stream)(void *to, const void *from, u64 bytes) {
#if defined(__AVX512F__)
    if (((uintptr_t)to | bytes) % 64 == 0) {
        for (u64 at = 0; at < bytes; at += 64)
            _mm512_stream_si512((void *)((char *)to + at), _mm512_loadu_si512((const char *)from + at));
        return;
    }
#elif GENERATIONS > 1
    if (((uintptr_t)to | bytes) % 16 == 0) {
        for (u64 at = 0; at < bytes; at += 16)
            _mm_stream_si128((__m128i *)((char *)to + at), _mm_loadu_si128((const __m128i *)((const char *)from + at)));
        return;
    }
#endif
    memcpy(to, from, bytes);
}

// Takes `n` gradients into averages (m <- lerp(from, g, kept), unless g is NaN or Inf), and writes what is sent of them
// (lerp(from, g, sent)). torch.lerp: m + w (g - m), or, from a half on, g - (1 - w) (g - m); the last two are one fma.
#define AVERAGE(NAME, REAL, FMA, ISFINITE)                                                                            \
    INLINE bool GENERATION(NAME)(                                                                                     \
        const REAL *restrict g, const REAL *from, REAL *m, REAL *restrict out, u32 n, REAL sent, REAL kept) {         \
        const bool sent_near = sent < (REAL)0.5, kept_near = kept < (REAL)0.5;                                        \
        const REAL s = sent_near ? sent : sent - 1, k = kept_near ? kept : kept - 1;                                  \
        u32 bad = 0;                                                                                                  \
        if (sent_near && sent == kept) {                                                                              \
            for (u32 i = 0; i < n; ++i) {                                                                             \
                const REAL was = from[i], is = FMA(s, g[i] - was, was);                                               \
                const u32 finite = ISFINITE(g[i]);                                                                    \
                m[i] = finite ? is : was;                                                                             \
                out[i] = is;                                                                                          \
                bad |= !finite;                                                                                       \
            }                                                                                                         \
        } else {                                                                                                      \
            for (u32 i = 0; i < n; ++i) {                                                                             \
                const REAL was = from[i], difference = g[i] - was;                                                    \
                const u32 finite = ISFINITE(g[i]);                                                                    \
                const REAL is = FMA(k, difference, kept_near ? was : g[i]);                                           \
                out[i] = FMA(s, difference, sent_near ? was : g[i]);                                                  \
                m[i] = finite ? is : was;                                                                             \
                bad |= !finite;                                                                                       \
            }                                                                                                         \
        }                                                                                                             \
        return !bad;                                                                                                  \
    }                                                                                                                 \
    /* The same where averages go elsewhere: in small parts past the caches, between which others are read. */        \
    INLINE bool GENERATION(NAME##_away)(                                                                              \
        const REAL *restrict g, const REAL *from, REAL *to, REAL *restrict out, u32 n, REAL sent, REAL kept) {        \
        REAL average[STREAMED];                                                                                       \
        bool finite = true;                                                                                           \
        for (u32 at = 0; at < n; at += STREAMED) {                                                                    \
            const u32 k = (u32)least(STREAMED, n - at);                                                               \
            finite &= GENERATION(NAME)(g + at, from + at, average, out + at, k, sent, kept);                          \
            GENERATION(stream)(to + at, average, k * sizeof *to);                                                     \
        }                                                                                                             \
        return finite;                                                                                                \
    }
AVERAGE(average32, float, fmaf, finite32)
AVERAGE(average64, double, fma, finite64)
#undef AVERAGE

// Gradients of any format, times `unscale`, as the floats or doubles they are averaged in.
INLINE const float *GENERATION(wide32)(u32 format, const void *values, u32 n, float unscale, float *restrict wide) {
    const u16 *halves = values;
    if (format == FLOAT16) {
        for (u32 i = 0; i < n; ++i) wide[i] = widened16(halves[i]) * unscale;
    } else if (format == BFLOAT16) {
        for (u32 i = 0; i < n; ++i) wide[i] = real32((u32)halves[i] << 16) * unscale;
    } else {
        const float *floats = values;
        if (unscale == 1.0f) return floats;
        for (u32 i = 0; i < n; ++i) wide[i] = floats[i] * unscale;
    }
    return wide;
}

static bool GENERATION(average_part)(const Packing *task, Part part) {
    const u32 format = task->formats[part.tensor], size = (u32)size_of(format);
    const char *values = (const char *)task->values[part.tensor] + part.start * size;
    u32 *words = task->words[part.tensor] + part.start / 32, *nonzero = task->nonzeros[part.tensor];
    const u64 first_word = task->first_words[part.tensor] + part.start / 32;
    nonzero = nonzero && task->zeros.policy & ZEROS_SPOKEN ? nonzero + part.start / 32 : NULL;
    union {
        float of32[BLOCK];
        double of64[BLOCK];
    } wide, sent;
    const u32 wide_size = format == FLOAT64 ? sizeof(double) : sizeof(float);
    const char *before = task->before ? (const char *)task->before[part.tensor] + part.start * wide_size : NULL;
    bool finite = true;
    for (u64 at = 0; at < part.elements; at += BLOCK) {
        const u32 n = (u32)least(BLOCK, part.elements - at);
        if (format == FLOAT64) {
            const double *g = (const double *)values + at;
            double *kept = (double *)task->averages[part.tensor] + part.start + at;
            if (task->unscale != 1.0) {
                for (u32 i = 0; i < n; ++i) wide.of64[i] = g[i] * task->unscale;
                g = wide.of64;
            }
            if (before) {  // calls of their own, as a compiler must see what overlaps to use vectors
                finite &= GENERATION(average64_away)(
                    g, (const double *)before + at, kept, sent.of64, n, task->sent, task->kept);
            } else {
                finite &= GENERATION(average64)(g, kept, kept, sent.of64, n, task->sent, task->kept);
            }
        } else {
            const float *g = GENERATION(wide32)(format, values + at * size, n, (float)task->unscale, wide.of32);
            float *kept = (float *)task->averages[part.tensor] + part.start + at;
            if (before) {
                finite &= GENERATION(average32_away)(
                    g, (const float *)before + at, kept, sent.of32, n, (float)task->sent, (float)task->kept);
            } else {
                finite &= GENERATION(average32)(g, kept, kept, sent.of32, n, (float)task->sent, (float)task->kept);
            }
        }
        finite &= GENERATION(pack_block)(
            format == FLOAT64 ? FLOAT64 : FLOAT32, &sent, n, words + at / 32, nonzero ? nonzero + at / 32 : NULL,
            task->zeros, first_word + at / 32);
    }
    if (before) FENCE();
    return finite;
}

// ------------------------------------------------------------------------------------------------ unpack and apply

// The floats of a word's bits: +1, -1, or 0 where `some` has none.
#define SIGNS(NAME, BITS, ONE)                                                                                        \
    INLINE void GENERATION(NAME)(u32 word, u32 some, BITS *restrict out) {                                            \
        const u32 no = ~word, top = 8 * sizeof(BITS) - 1;                                                             \
        for (u32 i = 0; i < 32; ++i)                                                                                  \
            out[i] = (BITS)((ONE) | (BITS)((BITS)(no >> i & 1) << top)) & (BITS)(0 - (BITS)(some >> i & 1));          \
    }
SIGNS(signs32, u32, 0x3f800000u)
SIGNS(signs64, u64, (u64)0x3ff << 52)
SIGNS(signs_fp16, u16, 0x3c00)
SIGNS(signs_bf16, u16, 0x3f80)
#undef SIGNS

#define UNPACK(NAME, BITS, SIGNS)                                                                                     \
    INLINE void GENERATION(NAME)(const u32 *restrict words, const u32 *restrict nonzero, u64 n, BITS *restrict out) { \
        for (u64 w = 0; w < n / 32; ++w)                                                                              \
            GENERATION(SIGNS)(words[w], nonzero ? nonzero[w] : 0xffffffff, out + 32 * w);                             \
        if (n % 32) {                                                                                                 \
            const u64 w = n / 32;                                                                                     \
            BITS last[32];                                                                                            \
            GENERATION(SIGNS)(words[w], nonzero ? nonzero[w] : 0xffffffff, last);                                     \
            memcpy(out + 32 * w, last, n % 32 * sizeof *last);                                                        \
        }                                                                                                             \
    }
UNPACK(unpack32, u32, signs32)
UNPACK(unpack64, u64, signs64)
UNPACK(unpack_fp16, u16, signs_fp16)
UNPACK(unpack_bf16, u16, signs_bf16)
#undef UNPACK

static void GENERATION(unpack_part)(const Unpacking *task, Part part) {
    const u32 format = task->formats[part.tensor];
    void *out = (char *)task->outs[part.tensor] + part.start * size_of(format);
    const u32 *words = task->words[part.tensor] + part.start / 32, *nonzero = task->nonzeros[part.tensor];
    if (nonzero) nonzero += part.start / 32;
    switch (format) {
    case FLOAT32: GENERATION(unpack32)(words, nonzero, part.elements, out); break;
    case FLOAT64: GENERATION(unpack64)(words, nonzero, part.elements, out); break;
    case FLOAT16: GENERATION(unpack_fp16)(words, nonzero, part.elements, out); break;
    default: GENERATION(unpack_bf16)(words, nonzero, part.elements, out);
    }
}


// p <- p - rate (sign + decay p), as torch's SGD computes it: g = fma(decay, p, sign), if there is a decay, and then
// fma(-rate, g, p), each rounded to the parameter's format. It computes with 16-bit ones as floats, after it has rounded
// rate and decay to their format, too.
#define APPLY(NAME, BITS, REAL, FMA, SIGNS, LOAD, STORE)                                                              \
    INLINE void GENERATION(NAME##_word)(u32 word, u32 some, REAL rate, REAL decay, u32 n, BITS *restrict parameter) { \
        BITS sign[32];                                                                                                \
        GENERATION(SIGNS)(word, some, sign);                                                                          \
        if (decay != 0) {                                                                                             \
            for (u32 i = 0; i < n; ++i) sign[i] = STORE(FMA(LOAD(parameter[i]), decay, LOAD(sign[i])));               \
        }                                                                                                             \
        for (u32 i = 0; i < n; ++i) parameter[i] = STORE(FMA(LOAD(sign[i]), -rate, LOAD(parameter[i])));              \
    }                                                                                                                 \
    INLINE void GENERATION(NAME)(                                                                                     \
        const u32 *restrict words, const u32 *restrict nonzero, u64 n, REAL rate, REAL decay,                         \
        BITS *restrict parameter) {                                                                                   \
        for (u64 w = 0; w < n / 32; ++w)                                                                              \
            GENERATION(NAME##_word)                                                                                   \
            (words[w], nonzero ? nonzero[w] : 0xffffffff, rate, decay, 32, parameter + 32 * w);                       \
        if (n % 32) {                                                                                                 \
            const u64 w = n / 32;                                                                                     \
            GENERATION(NAME##_word)                                                                                   \
            (words[w], nonzero ? nonzero[w] : 0xffffffff, rate, decay, n % 32, parameter + 32 * w);                   \
        }                                                                                                             \
    }
APPLY(apply32, u32, float, fmaf, signs32, real32, bits32)
APPLY(apply64, u64, double, fma, signs64, real64, bits64)
APPLY(apply_fp16, u16, float, fmaf, signs_fp16, widened16, narrowed16)
APPLY(apply_bf16, u16, float, fmaf, signs_bf16, widened_bf16, narrowed_bf16)
#undef APPLY

static void GENERATION(apply_part)(const Unpacking *task, Part part) {
    const u32 format = task->formats[part.tensor];
    void *parameter = (char *)task->outs[part.tensor] + part.start * size_of(format);
    const u32 *words = task->words[part.tensor] + part.start / 32, *nonzero = task->nonzeros[part.tensor];
    const double rate = task->rates[part.tensor], decay = task->decays[part.tensor];
    const u64 n = part.elements;
    if (nonzero) nonzero += part.start / 32;
    switch (format) {
    case FLOAT32: GENERATION(apply32)(words, nonzero, n, (float)rate, (float)decay, parameter); break;
    case FLOAT64: GENERATION(apply64)(words, nonzero, n, rate, decay, parameter); break;
    case FLOAT16:
        GENERATION(apply_fp16)
        (words, nonzero, n, widened16(narrowed16((float)rate)), widened16(narrowed16((float)decay)), parameter);
        break;
    default:
        GENERATION(apply_bf16)
        (words, nonzero, n, widened_bf16(narrowed_bf16((float)rate)), widened_bf16(narrowed_bf16((float)decay)),
         parameter);
    }
}

// --------------------------------------------------------------------------------------------------------- deciding

// Counts of so many words, bit-sliced: planes[i] has bit i of them. `used` planes may be other than 0.
typedef struct {
    u32 used;
    u32 planes[MOST_PLANES][WORDS_BLOCK];
} GENERATION(Counter);

// Adds `carry`, 0 or 1 times 2^from, and leaves it changed.
INLINE void GENERATION(add)(GENERATION(Counter) * counter, u32 *restrict carry, u32 words, u32 from) {
    for (u32 i = from; i < MOST_PLANES; ++i) {
        u32 *restrict plane = counter->planes[i];
        if (i >= counter->used) {
            counter->used = i + 1;
            memcpy(plane, carry, words * sizeof *plane);
            return;
        }
        u32 any = 0;
        for (u32 w = 0; w < words; ++w) {
            const u32 both = plane[w] & carry[w];
            plane[w] ^= carry[w];
            carry[w] = both;
            any |= both;
        }
        if (!any) return;
    }
}

// Settles ties and returns how many there were. Before, `decided` has 0 for them, and `voted` is written to `moved`.
INLINE u64 GENERATION(break_ties)(
    const u32 *restrict tie, const u32 *restrict voted, u32 *restrict decided, u32 *restrict moved, u32 words,
    Ties ties, u64 first_word) {
    u64 tied = 0;
    u32 any = 0;
    for (u32 w = 0; w < words; ++w) any |= tie[w];
    if (moved) memcpy(moved, voted, words * sizeof *moved);
    if (!any) return 0;
    for (u32 w = 0; w < words; ++w) tied += (u32)__builtin_popcount(tie[w]);
    if (ties.policy == TIES_COIN) {
        u32 heads[WORDS_BLOCK + 2];
        const u32 *from = heads + GENERATION(toss)(ties.key, first_word, words, heads);
        for (u32 w = 0; w < words; ++w) decided[w] |= tie[w] & from[w];
    } else if (ties.policy == TIES_POSITIVE) {
        for (u32 w = 0; w < words; ++w) decided[w] |= tie[w];
    } else {
        for (u32 w = 0; w < words; ++w) moved[w] &= ~tie[w];
    }
    return tied;
}

// Writes a decision, and returns how many were tied: those that are `equal` and have been voted on.
INLINE u64 GENERATION(finish)(
    const Deciding *task, u64 start, u32 words, u32 *restrict equal, const u32 *restrict voted,
    u32 *restrict decided, bool can_tie) {
    for (u32 w = 0; w < words; ++w) equal[w] = can_tie ? equal[w] & voted[w] : 0;
    u32 *moved = task->moved ? task->moved + start : NULL;
    const u64 tied =
        GENERATION(break_ties)(equal, voted, decided, moved, words, task->ties, task->first_word + start);
    memcpy(task->out + start, decided, words * sizeof *decided);
    return tied;
}

// Counts up to 15 ballots, two at a time.
INLINE void GENERATION(count_few)(GENERATION(Counter) * counter, const Deciding *task, u64 start, u32 words) {
    static const u32 nobody[WORDS_BLOCK];
    u32 *restrict ones = counter->planes[0], *restrict twos = counter->planes[1];
    u32 *restrict fours = counter->planes[2], *restrict eights = counter->planes[3];
    counter->used = 4;
    for (u32 i = 0; i < 4; ++i) memset(counter->planes[i], 0, words * sizeof *ones);
    for (u64 v = 0; v < task->ballots; v += 2) {
        const u32 *a = task->rows[v] + start, *b = v + 1 < task->ballots ? task->rows[v + 1] + start : nobody;
        for (u32 w = 0; w < words; ++w) {
            const u32 either = a[w] ^ b[w], two = (a[w] & b[w]) | (ones[w] & either);
            ones[w] ^= either;
            const u32 four = twos[w] & two;
            twos[w] ^= two;
            eights[w] ^= fours[w] & four;
            fours[w] ^= four;
        }
    }
}

static u64 GENERATION(majority_part)(const Deciding *task, u64 start, u32 words) {
    GENERATION(Counter) yes, no;
    u32 carry[WORDS_BLOCK], equal[WORDS_BLOCK], voted[WORDS_BLOCK], decided[WORDS_BLOCK];
    const bool abstain = task->nonzeros != NULL;
    yes.used = no.used = 0;
    for (u32 w = 0; w < words; ++w) equal[w] = 0xffffffff, decided[w] = 0, voted[w] = abstain ? 0 : 0xffffffff;
    const bool few = !abstain && task->ballots < 16;
    if (few) GENERATION(count_few)(&yes, task, start, words);
    for (u64 v = few ? task->ballots : 0; v < task->ballots; ++v) {
        const u32 *restrict ballot = task->rows[v] + start;
        memcpy(carry, ballot, words * sizeof *carry);
        GENERATION(add)(&yes, carry, words, 0);
        if (abstain) {
            const u32 *restrict spoke = task->nonzeros[v] + start;
            for (u32 w = 0; w < words; ++w) {
                carry[w] = ballot[w] ^ spoke[w];
                voted[w] |= spoke[w];
            }
            GENERATION(add)(&no, carry, words, 0);
        }
    }
    const u64 half = task->ballots / 2;
    for (u32 i = MOST_PLANES; i-- > 0;) {  // from the top: which is more, and where are they still alike
        const u32 constant = i < 32 && !abstain && half >> i & 1 ? 0xffffffff : 0;
        if (i >= yes.used && i >= no.used && !constant) continue;
        const u32 *restrict a = yes.planes[i], *restrict b = no.planes[i];
        const bool has_a = i < yes.used, has_b = i < no.used;
        for (u32 w = 0; w < words; ++w) {
            const u32 more = has_a ? a[w] : 0, less = has_b ? b[w] : constant;
            decided[w] |= equal[w] & more & ~less;
            equal[w] &= ~(more ^ less);
        }
    }
    return GENERATION(finish)(task, start, words, equal, voted, decided, abstain || task->ballots % 2 == 0);
}

// Counts bitmaps (`per` is 1), or adds counts of `per` planes each, into the task's planes.
static u64 GENERATION(count_part)(const Deciding *task, u64 start, u32 words) {
    GENERATION(Counter) sum;
    u32 carry[WORDS_BLOCK];
    sum.used = 0;
    for (u64 v = 0; v < task->ballots; ++v) {
        for (u32 i = 0; i < task->per; ++i) {
            memcpy(carry, task->rows[v * task->per + i] + start, words * sizeof *carry);
            while (sum.used < i) memset(sum.planes[sum.used++], 0, words * sizeof *carry);
            GENERATION(add)(&sum, carry, words, i);
        }
    }
    for (u32 i = 0; i < task->planes; ++i) {
        u32 *row = task->out + i * task->stride + start;
        if (i < sum.used)
            memcpy(row, sum.planes[i], words * sizeof *row);
        else
            memset(row, 0, words * sizeof *row);
    }
    return 0;
}

// +1 where twice the count of votes for it (the first `per` rows) is above that of all votes (the next rows, or
// `voters` everywhere), a tie where they are equal and there are any.
static u64 GENERATION(decide_counts_part)(const Deciding *task, u64 start, u32 words) {
    u32 equal[WORDS_BLOCK], voted[WORDS_BLOCK], decided[WORDS_BLOCK];
    const u32 yes = task->per, all = task->planes;
    for (u32 w = 0; w < words; ++w) equal[w] = 0xffffffff, decided[w] = 0, voted[w] = all ? 0 : 0xffffffff;
    for (u32 i = 64; i-- > 0;) {
        const bool has_a = i > 0 && i <= yes, has_b = i < all;
        const u32 constant = !all && task->ballots >> i & 1 ? 0xffffffff : 0;
        if (!has_a && !has_b && !constant) continue;
        const u32 *restrict a = has_a ? task->rows[i - 1] + start : NULL;
        const u32 *restrict b = has_b ? task->rows[yes + i] + start : NULL;
        for (u32 w = 0; w < words; ++w) {
            const u32 twice = has_a ? a[w] : 0, every = has_b ? b[w] : constant;
            if (has_b) voted[w] |= every;
            decided[w] |= equal[w] & twice & ~every;
            equal[w] &= ~(twice ^ every);
        }
    }
    return GENERATION(finish)(task, start, words, equal, voted, decided, all || task->ballots % 2 == 0);
}

static const Loops GENERATION(loops) = {
    GENERATION(pack_part),     GENERATION(average_part), GENERATION(unpack_part),       GENERATION(apply_part),
    GENERATION(majority_part), GENERATION(count_part),   GENERATION(decide_counts_part),
};

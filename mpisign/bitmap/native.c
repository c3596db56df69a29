// The bit arithmetic of host.py in C, bit for bit: many tensors a call, on several threads. native.py loads it.
//
// Tensors are cut into pieces that threads take one after the other. A piece is done in blocks that stay in the first
// cache, by loops (native_loops.h) that compilers turn into vector instructions; they are compiled for several
// generations of processors, and the best that runs here is chosen once. Floats are looked at as integers wherever
// the question is one of bits. Only averages and apply compute with them, and round as torch does.

#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define GENERATIONS 3
#else
#define GENERATIONS 1
#endif

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32, FLOAT64, FLOAT16, BFLOAT16 };                   // kernels.FORMATS
enum { ZEROS_COIN = 1, ZEROS_POSITIVE = 2, ZEROS_SPOKEN = 4 };  // kernels.ZEROS
enum { TIES_COIN, TIES_POSITIVE, TIES_ZERO };                   // kernels.TIES
enum { PIECE = 1 << 16, BLOCK = 1024, BLOCK_WORDS = BLOCK / 32 };  // elements
enum { STREAMED = 256 };  // elements that go past the caches at once
enum { WORDS_PIECE = 1 << 14, WORDS_BLOCK = 512 };              // words
enum { MOST_PLANES = 33, MOST_THREADS = 256, LEAST_PIECES = 4 };  // of a thread: less is done before it has begun

INLINE u64 least(u64 a, u64 b) { return a < b ? a : b; }

// ----------------------------------------------------------------------------------------------------------- floats

INLINE u64 size_of(u32 format) { return format == FLOAT64 ? 8 : format == FLOAT32 ? 4 : 2; }

INLINE float real32(u32 bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
INLINE double real64(u64 bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
INLINE u32 bits32(float x) {
    u32 bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
INLINE u64 bits64(double x) {
    u64 bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
INLINE u32 finite32(float x) { return (bits32(x) & 0x7fffffff) < 0x7f800000; }
INLINE u32 finite64(double x) { return (bits64(x) & ~((u64)1 << 63)) < (u64)0x7ff << 52; }

// No arithmetic on denormals, which a processor may be told to take for 0.
INLINE float widened16(u32 value) {
    const u32 magnitude = value & 0x7fff;
    const u32 small = bits32((float)(int32_t)magnitude * 0x1p-24f);
    const u32 normal = (magnitude << 13) + (112u << 23) + (magnitude >= 0x7c00 ? 112u << 23 : 0);
    return real32((magnitude < 0x400 ? small : normal) | (value & 0x8000) << 16);
}
INLINE float widened_bf16(u32 value) { return real32(value << 16); }

// To the nearest, of two the even one. What is NaN stays NaN.
INLINE u16 narrowed16(float x) {
    const u32 sign = bits32(x) >> 16 & 0x8000, magnitude = bits32(x) & 0x7fffffff;
    // Below the least normal number: the sum with 0.5 has the rounded value in its last bits.
    const u32 small = bits32(real32(magnitude < 0x38800000 ? magnitude : 0) + 0.5f) - 0x3f000000;
    const u32 normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    const u32 large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    return (u16)(sign | (magnitude < 0x38800000 ? small : magnitude < 0x477ff000 ? normal : large));
}
INLINE u16 narrowed_bf16(float x) {
    const u32 bits = bits32(x);
    return (u16)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// After the last of what went past the caches.
#if GENERATIONS > 1
#define FENCE() _mm_sfence()
#else
#define FENCE()
#endif

// ------------------------------------------------------------------------------------------------------------ tasks

// Of T tensors: those before the i-th have pieces[i] pieces, and all have pieces[T].
typedef struct {
    u64 tensors;
    const u64 *pieces, *elements;
} Tensors;

typedef struct {
    u64 tensor, start, elements;
} Part;

typedef struct {
    u32 policy;
    u64 key;
} Zeros, Ties;

typedef struct {
    Tensors all;
    const void *const *values;  // null: left out
    const u8 *formats;
    u32 *const *words, *const *nonzeros;  // of the second any may be null
    const u64 *first_words;
    Zeros zeros;
    void *const *averages;
    const void *const *before;  // where averages are taken from; null: from where they are
    double unscale, sent, kept;
} Packing;

typedef struct {
    Tensors all;
    const u32 *const *words, *const *nonzeros;  // of the second any may be null
    void *const *outs;                          // null: left out
    const u8 *formats;
    const double *rates, *decays;  // of apply
} Unpacking;

typedef struct {
    u64 ballots, words;
    const u32 *const *rows, *const *nonzeros;  // the second may be null
    u32 per, planes;
    u32 *out, *moved;  // the second may be null
    u64 stride, first_word;
    Ties ties;
} Deciding;

typedef struct {
    bool (*pack)(const Packing *, Part), (*average)(const Packing *, Part);
    void (*unpack)(const Unpacking *, Part), (*apply)(const Unpacking *, Part);
    u64 (*majority)(const Deciding *, u64, u32), (*count)(const Deciding *, u64, u32),
        (*decide_counts)(const Deciding *, u64, u32);
} Loops;

// ------------------------------------------------------------------------------------------------------ generations

#define GENERATION(name) name##_base
#include "native_loops.h"
#undef GENERATION

#if GENERATIONS > 1


#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#define GENERATION(name) name##_avx2
#include "native_loops.h"
#undef GENERATION
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt")
#define GENERATION(name) name##_avx512
#include "native_loops.h"
#undef GENERATION
#pragma GCC pop_options

static u32 best(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    const bool wide = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    return wide && __builtin_cpu_supports("avx512vl") ? 2 : 1;
}
static const Loops *const generations[] = {&loops_base, &loops_avx2, &loops_avx512};
static const char *const names[] = {"x86-64", "AVX2", "AVX-512"};
#else
static u32 best(void) { return 0; }
static const Loops *const generations[] = {&loops_base};
static const char *const names[] = {"baseline"};
#endif

// What it was compiled from, so that nobody calls another.
EXPORT u32 mpisign_sources(void) { return SOURCES; }

static u32 chosen;

// Chooses the loops: the best generation that runs here, or an earlier one. Returns its name.
EXPORT const char *mpisign_choose(u32 most) {
    chosen = (u32)least(most, best());
    return names[chosen];
}

// ---------------------------------------------------------------------------------------------------------- threads

typedef struct Work Work;
struct Work {
    void (*piece)(Work *work, u64 piece);
    u64 pieces;
    atomic_ullong next, found;  // the next piece to be done; what pieces have found: the least place, or a sum
    const void *task;
};

static void *take_pieces(void *argument) {
    Work *work = argument;
    for (u64 piece; (piece = atomic_fetch_add(&work->next, 1)) < work->pieces;) work->piece(work, piece);
    return NULL;
}

// Does all pieces, on fewer threads than asked for where the system gives no more.
static u64 run(void (*piece)(Work *, u64), u64 pieces, u32 threads, u64 found, const void *task) {
    Work work = {piece, pieces, 0, found, task};
    pthread_t others[MOST_THREADS];
    u32 started = 0;
    const u32 wanted = (u32)least(least(threads, MOST_THREADS), pieces / LEAST_PIECES);
    if (wanted > 1) {
        sigset_t all, before;  // signals are for the threads of the program
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        while (started + 1 < wanted && !pthread_create(&others[started], NULL, take_pieces, &work)) ++started;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    take_pieces(&work);
    for (u32 i = 0; i < started; ++i) pthread_join(others[i], NULL);
    return work.found;
}

static void found_at(Work *work, u64 place) {
    unsigned long long first = atomic_load(&work->found);
    while (place < first && !atomic_compare_exchange_weak(&work->found, &first, place)) {
    }
}

static Part part_of(const Tensors *all, u64 piece) {
    u64 low = 0, high = all->tensors;
    while (high - low > 1) {
        const u64 middle = (low + high) / 2;
        if (all->pieces[middle] <= piece)
            low = middle;
        else
            high = middle;
    }
    const u64 start = (piece - all->pieces[low]) * PIECE;
    return (Part){low, start, least(PIECE, all->elements[low] - start)};
}

// ----------------------------------------------------------------------------------------------------- many tensors

static void pack_piece(Work *work, u64 piece) {
    const Packing *task = work->task;
    const Part part = part_of(&task->all, piece);
    if (!task->values[part.tensor]) return;
    const Loops *loops = generations[chosen];
    if (!(task->averages ? loops->average : loops->pack)(task, part)) found_at(work, part.tensor);
}

// Packs the signs of T tensors. Returns the first in which a value is not finite, or a larger number.
EXPORT u64 mpisign_pack(
    u64 tensors, const u64 *pieces, const u64 *elements, const void *const *values, const u8 *formats,
    u32 *const *words, u32 *const *nonzeros, const u64 *first_words, u32 zeros, u64 key, u32 threads) {
    const Packing task = {{tensors, pieces, elements}, values, formats, words, nonzeros, first_words, {zeros, key},
                          NULL, NULL, 1, 1, 1};
    return run(pack_piece, pieces[tensors], threads, tensors, &task);
}

// Takes gradients into averages, which are doubles if the gradients are, else floats, and packs the signs of what is
// sent; averages come from `before`, if it is not null. Returns the first tensor in which something is not finite, or a larger number.
EXPORT u64 mpisign_pack_average(
    u64 tensors, const u64 *pieces, const u64 *elements, const void *const *gradients, const u8 *formats,
    void *const *averages, const void *const *before, double unscale, double sent, double kept, u32 *const *words,
    u32 *const *nonzeros, const u64 *first_words, u32 zeros, u64 key, u32 threads) {
    const Packing task = {{tensors, pieces, elements}, gradients, formats, words, nonzeros, first_words, {zeros, key},
                          averages, before, unscale, sent, kept};
    return run(pack_piece, pieces[tensors], threads, tensors, &task);
}

static void unpack_piece(Work *work, u64 piece) {
    const Unpacking *task = work->task;
    const Part part = part_of(&task->all, piece);
    if (!task->outs[part.tensor]) return;
    const Loops *loops = generations[chosen];
    (task->rates ? loops->apply : loops->unpack)(task, part);
}

// Writes +1 or -1 for each bit, and 0 where there is a second plane and it has a 0.
EXPORT void mpisign_unpack(
    u64 tensors, const u64 *pieces, const u64 *elements, const u32 *const *words, const u32 *const *nonzeros,
    void *const *outs, const u8 *formats, u32 threads) {
    const Unpacking task = {{tensors, pieces, elements}, words, nonzeros, outs, formats, NULL, NULL};
    run(unpack_piece, pieces[tensors], threads, 0, &task);
}

// Takes a step of SGD on parameters, with those numbers as their gradients.
EXPORT void mpisign_apply(
    u64 tensors, const u64 *pieces, const u64 *elements, const u32 *const *words, const u32 *const *nonzeros,
    void *const *parameters, const u8 *formats, const double *rates, const double *decays, u32 threads) {
    const Unpacking task = {{tensors, pieces, elements}, words, nonzeros, parameters, formats, rates, decays};
    run(unpack_piece, pieces[tensors], threads, 0, &task);
}

// --------------------------------------------------------------------------------------------------------- deciding

typedef struct {
    Deciding task;
    u64 (*part)(const Deciding *, u64, u32);
} DecidingBy;

static void decide_piece(Work *work, u64 piece) {
    const DecidingBy *by = work->task;
    const u64 stop = least((piece + 1) * WORDS_PIECE, by->task.words);
    u64 tied = 0;
    for (u64 at = piece * WORDS_PIECE; at < stop; at += WORDS_BLOCK)
        tied += by->part(&by->task, at, (u32)least(WORDS_BLOCK, stop - at));
    if (tied) atomic_fetch_add(&work->found, tied);
}

static u64 decide(DecidingBy by, u32 threads) {
    return run(decide_piece, (by.task.words + WORDS_PIECE - 1) / WORDS_PIECE, threads, 0, &by);
}

// Decides every bit of V ballots by majority. Returns the number of ties.
EXPORT u64 mpisign_majority(
    u64 ballots, const u32 *const *signs, const u32 *const *nonzeros, u64 words, u32 *out, u32 *moved, u32 ties,
    u64 key, u64 first_word, u32 threads) {
    const Deciding task = {ballots, words, signs, nonzeros, 0, 0, out, moved, 0, first_word, {ties, key}};
    return decide((DecidingBy){task, generations[chosen]->majority}, threads);
}

// Adds C counts of `per` planes each, whose rows follow each other in the list, into `planes` rows of `out`.
EXPORT void mpisign_count(
    u64 counts, u32 per, const u32 *const *rows, u64 words, u32 *out, u64 stride, u32 planes, u32 threads) {
    const Deciding task = {counts, words, rows, NULL, per, planes, out, NULL, stride, 0, {0, 0}};
    decide((DecidingBy){task, generations[chosen]->count}, threads);
}

// Decides as mpisign_majority from counts: the rows of `yes`, then those of `voted`, or `voters` where there are none.
EXPORT u64 mpisign_decide_counts(
    u32 yes, u32 voted, u64 voters, const u32 *const *rows, u64 words, u32 *out, u32 *moved, u32 ties, u64 key,
    u64 first_word, u32 threads) {
    const Deciding task = {voters, words, rows, NULL, yes, voted, out, moved, 0, first_word, {ties, key}};
    return decide((DecidingBy){task, generations[chosen]->decide_counts}, threads);
}

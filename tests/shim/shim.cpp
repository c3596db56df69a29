// Runs mpisign's kernels on the host: see cuda.h for what a thread can do, and __init__.py for who calls this.

#include <setjmp.h>
#include <ucontext.h>

#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda.h"

#include BITMAP_CU

Index threadIdx, blockIdx;

namespace shim {
namespace {

constexpr size_t STACK = 64 * 1024;

struct Fiber {
    std::vector<char> stack = std::vector<char>(STACK);
    ucontext_t start;
    jmp_buf here;
    bool started = false, done = true;
    Meeting waits_for = Meeting::none;
    unsigned brought[2];  // by turns, as the first lane goes on to the next meeting before the last has read this one
    unsigned meetings = 0;
};

std::vector<Fiber> fibers(THREADS);
std::function<void()> kernel;
std::string failure;
jmp_buf scheduler;
Fiber* running;

// A fiber outlives the block: it does one thread after another, so that its stack is set up once.
void work() {
    for (;;) {
        kernel();
        running->done = true;
        if (!_setjmp(running->here)) _longjmp(scheduler, 1);
    }
}

void resume(unsigned thread) {
    threadIdx.x = thread;
    running = &fibers[thread];
    if (_setjmp(scheduler)) return;
    if (running->started) _longjmp(running->here, 1);
    running->started = true;
    getcontext(&running->start);
    running->start.uc_stack.ss_sp = running->stack.data();
    running->start.uc_stack.ss_size = STACK;
    running->start.uc_link = nullptr;
    makecontext(&running->start, work, 0);
    setcontext(&running->start);
}

// Runs a warp until all of its threads are done or wait at a barrier.
void run_warp(unsigned first) {
    for (;;) {
        unsigned done = 0;
        for (unsigned thread = first; thread < first + 32 && failure.empty(); ++thread) {
            if (!fibers[thread].done) resume(thread);
            done += fibers[thread].done;
        }
        if (!failure.empty()) return;
        if (done == 32) return;
        if (done) return void(failure = "lanes of a warp have ended while others wait for them");
        for (unsigned thread = first; thread < first + 32; ++thread)
            if (fibers[thread].waits_for != fibers[first].waits_for)
                return void(failure = "lanes of a warp wait in different operations");
        if (fibers[first].waits_for == Meeting::barrier) return;
    }
}

void run_block(unsigned threads) {
    for (unsigned thread = 0; thread < threads; ++thread) fibers[thread].done = false;
    for (;;) {
        unsigned done = 0;
        for (unsigned warp = 0; warp < threads; warp += 32) {
            run_warp(warp);
            if (!failure.empty()) return;
            done += fibers[warp].done;
        }
        if (done == threads / 32) return;
        if (done) return void(failure = "warps of a block have ended while others wait at a barrier");
    }
}

// A kernel's argument as the CUDA driver takes it: as many bytes as the parameter has, from an address.
template <class T> T argument(void** addresses, const size_t* sizes, size_t i) {
    if (sizes[i] != sizeof(T))
        throw std::invalid_argument(
            "argument " + std::to_string(i) + " has " + std::to_string(sizes[i]) + " bytes instead of " +
            std::to_string(sizeof(T)));
    T value;
    std::memcpy(static_cast<void*>(&value), addresses[i], sizeof(T));
    return value;
}

using Call = std::function<std::function<void()>(void**, const size_t*, size_t)>;

template <class... P, size_t... I> Call callable(void (*function)(P...), std::index_sequence<I...>) {
    return [function](void** addresses, const size_t* sizes, size_t count) {
        if (count != sizeof...(P)) throw std::invalid_argument("another number of arguments");
        std::tuple<P...> arguments{argument<P>(addresses, sizes, I)...};
        return std::function<void()>([function, arguments] { std::apply(function, arguments); });
    };
}
template <class... P> Call callable(void (*function)(P...)) {
    return callable(function, std::index_sequence_for<P...>());
}

#define KERNEL(name) {#name, callable(name)}
#define COUNTERS(planes) \
    KERNEL(majority_##planes), KERNEL(majority_abstain_##planes), KERNEL(count_##planes), KERNEL(add_counts_##planes)
const std::map<std::string, Call> kernels = {
    KERNEL(pack_one), KERNEL(pack_many), KERNEL(pack_momentum), KERNEL(unpack_one), KERNEL(unpack_many), KERNEL(apply_many),
    KERNEL(first_bad), KERNEL(agreement), KERNEL(any_zero), KERNEL(decide_counts),
    COUNTERS(2), COUNTERS(3), COUNTERS(4), COUNTERS(6), COUNTERS(8), COUNTERS(16),
};

}  // namespace

void fail(const char* what) {
    failure = what;
    _longjmp(scheduler, 1);
}

void meet(Meeting kind, unsigned mask, unsigned brought) {
    if (mask != ~0u) fail("a mask without all lanes");
    Fiber& me = *running;
    me.waits_for = kind;
    me.brought[++me.meetings % 2] = brought;
    if (!_setjmp(me.here)) _longjmp(scheduler, 1);
}

unsigned brought_by(unsigned lane) {
    return fibers[threadIdx.x / 32 * 32 + lane].brought[running->meetings % 2];
}
}  // namespace shim

// Runs a kernel to its end. Returns null, or what went wrong.
extern "C" const char* launch(
    const char* name, unsigned blocks, unsigned threads, void** addresses, const size_t* sizes, size_t count) {
    using namespace shim;
    failure.clear();
    try {
        if (!blocks || threads != THREADS) throw std::invalid_argument("no launch of this shape is possible");
        kernel = kernels.at(name)(addresses, sizes, count);
        for (blockIdx.x = 0; blockIdx.x < blocks && failure.empty(); ++blockIdx.x) run_block(threads);
    } catch (const std::out_of_range&) {
        failure = "no such kernel in shim.cpp's list";
    } catch (const std::invalid_argument& wrong) {
        failure = wrong.what();
    }
    if (failure.empty()) return nullptr;
    for (Fiber& fiber : fibers) fiber = Fiber();  // they hang somewhere in a kernel
    failure = std::string(name) + ": " + failure;
    return failure.c_str();
}

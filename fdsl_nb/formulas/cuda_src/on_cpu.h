// Makes a .cu file compile as C++20 and run on a CPU: blocks one after the other, the threads of a
// block as threads of the system, __syncthreads as a barrier. Included before the .cu file.
//
// For checks, not for speed: the pixels are those of the GPU's arithmetic, and ThreadSanitizer sees
// what the threads of a block do to one another.

#pragma once
#include <barrier>
#include <cmath>
#include <thread>
#include <vector>

typedef unsigned char u8;
typedef long long i64;

struct Index {
    unsigned x;
};

static thread_local Index threadIdx, blockIdx;
static Index blockDim, gridDim;
static std::barrier<> *block_barrier;

#define __global__
#define __device__ static
#define __shared__ static  // one block at a time
#define STORE(place, value) __atomic_store_n(place, value, __ATOMIC_RELAXED)

static void __syncthreads()
{
    if (block_barrier)
        block_barrier->arrive_and_wait();
}

[[maybe_unused]] static void atomicMax(unsigned *place, unsigned value)
{
    unsigned old = __atomic_load_n(place, __ATOMIC_RELAXED);
    while (old < value && !__atomic_compare_exchange_n(
                              place, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        ;
}

[[maybe_unused]] static void atomicAdd(unsigned *place, unsigned value)
{
    __atomic_fetch_add(place, value, __ATOMIC_RELAXED);
}

// Runs `kernel()` in every thread of every block.
template <class Kernel> static void on_cpu(unsigned blocks, unsigned threads, Kernel kernel)
{
    blockDim.x = threads, gridDim.x = blocks;
    std::barrier<> barrier(threads);
    block_barrier = threads > 1 ? &barrier : nullptr;
    auto body = [&](unsigned thread) {
        threadIdx.x = thread;
        for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
            kernel();
            __syncthreads();
        }
    };
    std::vector<std::thread> others;
    for (unsigned t = 1; t < threads; t++)
        others.emplace_back(body, t);
    body(0);
    for (auto &thread : others)
        thread.join();
}

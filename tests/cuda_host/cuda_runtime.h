// A host that runs CUDA kernels thread by thread: found in the place of CUDA's own header, it lets
// g++ compile a .cuh, and its .cu launcher, as plain C++.
//
// A block's threads are fibers, and blocks run one after the other. A fiber runs until it meets a
// barrier, and a warp as far as it comes without the others, so a run is deterministic, and what a
// kernel leaves out shows:
// - a missing barrier: threads run first to last, or last to first (cuda_host_order), and a kernel
//   that reads what no barrier has ordered gives other results in one of the two;
// - a barrier that not all threads reach: std::logic_error;
// - shared memory read before it is written: dynamic shared memory starts as NaN;
// - a write past dynamic shared memory: std::logic_error;
// - a copy that is not waited for: it is made when its thread waits, and not before.
// Left out on purpose: atomicAdd, for a sum in no fixed order has no fixed bits.
//
// __shared__ is thread_local, which at block scope is static and may be extern: dynamic shared
// memory is declared as extern __shared__ __align__(32) unsigned char dynamic_shared[] in lorakern.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ thread_local
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace lorakern {
// a block's most on sm_90
constexpr size_t kMostShared = 227 * 1024, kGuard = 64;
__attribute__((aligned(32))) inline thread_local unsigned char dynamic_shared[kMostShared + kGuard];
}  // namespace lorakern

using std::max;
using std::min;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_host {

constexpr size_t kStack = 256 * 1024;
constexpr unsigned char kUnwritten = 0xFF;

// threads first to last, or last to first
inline bool reversed = false;

struct Barrier {
  int members = 0, arrived = 0;
  uint64_t passed = 0;
};

struct Warp {
  Barrier barrier;
  // two rounds of values: a lane may be one exchange ahead of another
  unsigned char values[2][32][16];
};

struct Copy {
  void* to;
  // null for zeros
  const void* from;
};

// A fiber: it runs the body of one block after another, and stays where it is in between
struct Thread {
  jmp_buf context;
  std::unique_ptr<char[]> stack;
  dim3 index;
  uint64_t exchanges = 0;
  // copies to shared memory that it has not waited for, in groups; the last is not ended
  std::vector<std::vector<Copy>> copies;
  bool done = false;
};

struct Block {
  jmp_buf scheduler;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  int current = 0;
  // did any thread pass a barrier, or end, in this round
  bool moved = false;
  // what a thread threw
  std::exception_ptr thrown;
  std::function<void()> body;
};

inline Block block;

inline void switch_to_scheduler() {
  if (!_setjmp(block.threads[block.current].context)) _longjmp(block.scheduler, 1);
}

inline void wait(Barrier& barrier) {
  const uint64_t mine = barrier.passed;
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.passed;
    block.moved = true;
    return;
  }
  while (barrier.passed == mine) switch_to_scheduler();
  block.moved = true;
}

inline void run_thread() {
  for (;;) {
    try {
      block.body();
    } catch (const std::logic_error&) {
      block.thrown = std::current_exception();
    }
    block.threads[block.current].done = true;
    block.moved = true;
    switch_to_scheduler();
  }
}

// The current thread until its next barrier, or its end
inline void resume() {
  Thread& thread = block.threads[block.current];
  threadIdx = thread.index;
  if (_setjmp(block.scheduler)) return;
  if (thread.stack) _longjmp(thread.context, 1);
  thread.stack.reset(new char[kStack]);
  ucontext_t fresh;
  getcontext(&fresh);
  fresh.uc_stack.ss_sp = thread.stack.get();
  fresh.uc_stack.ss_size = kStack;
  makecontext(&fresh, run_thread, 0);
  setcontext(&fresh);
}

// The current block until all of its threads are done
inline void run_block(int count) {
  block.barrier = {count, 0, 0};
  block.warps.assign((count + 31) / 32, {});
  for (int w = 0; w * 32 < count; ++w) block.warps[w].barrier.members = min(32, count - w * 32);
  for (int t = 0; t < count; ++t) {
    Thread& thread = block.threads[t];
    thread.index = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
    thread.exchanges = 0;
    thread.copies.assign(1, {});
    thread.done = false;
  }
  const int warps = static_cast<int>(block.warps.size());
  for (int left = count; left > 0;) {
    bool moved = false;
    for (int w = 0; w < warps; ++w) {
      const int first = (reversed ? warps - 1 - w : w) * 32, size = min(32, count - first);
      // as far as this warp comes without the others
      do {
        block.moved = false;
        for (int t = 0; t < size; ++t) {
          block.current = first + (reversed ? size - 1 - t : t);
          if (!block.threads[block.current].done) resume();
        }
        moved |= block.moved;
      } while (block.moved);
    }
    left = 0;
    for (int t = 0; t < count; ++t) left += !block.threads[t].done;
    if (block.thrown || (left > 0 && !moved)) {
      // they stay where they are: the next block gets new fibers
      block.threads.clear();
      if (block.thrown) std::rethrow_exception(std::exchange(block.thrown, nullptr));
      throw std::logic_error("a barrier that not all threads reach");
    }
  }
}

// Every block of the grid; shared in bytes
inline void run_grid(dim3 grid, dim3 threads, size_t shared, std::function<void()> body) {
  using lorakern::dynamic_shared;
  if (shared > lorakern::kMostShared) throw std::logic_error("more shared memory than a block has");
  const unsigned count = threads.x * threads.y * threads.z;
  if (count == 0 || count > 1024) throw std::logic_error("want 1 to 1024 threads in a block");
  gridDim = grid;
  blockDim = threads;
  block.body = std::move(body);
  if (block.threads.size() < count) block.threads.resize(count);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        std::memset(dynamic_shared, kUnwritten, shared + lorakern::kGuard);
        run_block(static_cast<int>(count));
        for (size_t n = shared; n < shared + lorakern::kGuard; ++n)
          if (dynamic_shared[n] != kUnwritten)
            throw std::logic_error("a write past the end of shared memory");
      }
}

// What every lane gives in this exchange of the warp, by lane; read before the next exchange. Every
// lane takes part
template <typename T>
auto publish(T value) {
  static_assert(sizeof(T) <= 16);
  Thread& thread = block.threads[block.current];
  Warp& warp = block.warps[block.current / 32];
  auto* const values = warp.values[thread.exchanges++ % 2];
  std::memcpy(values[block.current % 32], &value, sizeof(T));
  wait(warp.barrier);
  return [values](int lane) {
    T given;
    std::memcpy(&given, values[lane], sizeof(T));
    return given;
  };
}

template <typename T>
T exchange(T value, int from) {
  return publish(value)(from);
}

inline int lane() { return block.current % 32; }

}  // namespace cuda_host

// read through the C interface, so that a test sets it by ctypes
extern "C" __attribute__((used)) inline void cuda_host_order(bool reversed) {
  cuda_host::reversed = reversed;
}

inline void __syncthreads() { cuda_host::wait(cuda_host::block.barrier); }

inline void __syncwarp(unsigned = 0xFFFFFFFF) {
  cuda_host::wait(cuda_host::block.warps[cuda_host::block.current / 32].barrier);
}

template <typename T>
T __shfl_sync(unsigned, T value, int from, int width = warpSize) {
  return cuda_host::exchange(value, cuda_host::lane() / width * width + from % width);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_host::exchange(value, cuda_host::lane() ^ mask);
}

template <typename T>
T __shfl_down_sync(unsigned, T value, int by, int width = warpSize) {
  const int lane = cuda_host::lane(), last = lane / width * width + width - 1;
  return cuda_host::exchange(value, lane + by <= last ? lane + by : lane);
}

// The part of the runtime that launchers use

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  cuda_host::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                      [&] { kernel(args...); });
  return cudaSuccess;
}

#include "instructions.h"

"""The host that runs CUDA kernels, judged: it computes as a GPU does, and finds what is wrong."""

import ctypes

import cuda_aot
import pytest
import torch

KERNELS = """
#include <cuda_runtime.h>

#include "cuda/mma.h"

namespace lorakern {

// out = in reversed within each block, by static and by dynamic shared memory
template <bool kBarrier>
__global__ void reverse(float* __restrict__ out, const float* __restrict__ in) {
  __shared__ float fixed[64];
  extern __shared__ __align__(32) unsigned char dynamic_shared[];
  float* const dynamic = reinterpret_cast<float*>(dynamic_shared);
  const int t = threadIdx.x, first = blockIdx.x * blockDim.x;
  fixed[t] = dynamic[t] = in[first + t];
  if (kBarrier) __syncthreads();
  out[first + t] = (fixed[blockDim.x - 1 - t] + dynamic[blockDim.x - 1 - t]) / 2;
}

// as reverse, block after block in the same shared memory; a warp is told of by an exchange alone
__global__ void overtaking(float* __restrict__ out, const float* __restrict__ in) {
  __shared__ float fixed[64];
  const int t = threadIdx.x;
  for (int first = 0; first < 192; first += 64) {
    fixed[t] = in[first + t];
    __syncthreads();
    out[first + t] = fixed[63 - t];
    __shfl_xor_sync(0xFFFFFFFF, t, 1);
  }
}

// sums of 32 in three ways
__global__ void warp_sums(float* out, const float* in) {
  float by_xor = in[threadIdx.x], by_down = by_xor;
  for (int by = 16; by > 0; by /= 2) {
    by_xor += __shfl_xor_sync(0xFFFFFFFF, by_xor, by);
    by_down += __shfl_down_sync(0xFFFFFFFF, by_down, by);
  }
  out[threadIdx.x] = by_xor;
  out[threadIdx.x + blockDim.x] = __shfl_sync(0xFFFFFFFF, by_down, 0);
  __shared__ float sums[64];
  sums[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  float sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += sums[threadIdx.x / 32 * 32 + lane];
  out[threadIdx.x + 2 * blockDim.x] = sum;
}

// which thread of which block wrote each place
__global__ void places(float* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] = block * threads + thread;
}

__global__ void unreached_barrier() {
  if (threadIdx.x > 0) __syncthreads();
}

__global__ void past_the_end() {
  extern __shared__ __align__(32) unsigned char dynamic_shared[];
  dynamic_shared[64 + threadIdx.x] = 0;
}

__global__ void unwritten(float* out) {
  extern __shared__ __align__(32) unsigned char dynamic_shared[];
  out[threadIdx.x] = reinterpret_cast<float*>(dynamic_shared)[threadIdx.x];
}

// a b and a b^T of 16 x 16 matrices, whose rows are 24 apart in shared memory
template <bool kBf16>
__global__ void matrix_products(float* out, const uint16_t* a, const uint16_t* b) {
  __shared__ __align__(16) uint16_t a_s[16 * 24], b_s[16 * 24];
  for (int n = threadIdx.x; n < 256; n += 32) {
    a_s[n / 16 * 24 + n % 16] = a[n];
    b_s[n / 16 * 24 + n % 16] = b[n];
  }
  __syncthreads();
  uint32_t of_a[4], of_b[4];
  load_tile<false>(of_a, a_s, 24);
  for (int transposed = 0; transposed < 2; ++transposed) {
    if (transposed) load_rows(of_b, b_s, 24);
    else load_tile<true>(of_b, b_s, 24);
    for (int half = 0; half < 2; ++half) {
      float sums[4] = {1, 1, 1, 1};
      multiply_add<kBf16>(sums, of_a, of_b[2 * half], of_b[2 * half + 1]);
      for (int i = 0; i < 4; ++i) {
        const int row = threadIdx.x / 4 + i / 2 * 8, col = half * 8 + threadIdx.x % 4 * 2 + i % 2;
        out[transposed * 256 + row * 16 + col] = sums[i];
      }
    }
  }
}

__global__ void odd_address() {
  extern __shared__ __align__(32) unsigned char dynamic_shared[];
  uint32_t words[4];
  load_matrices<false>(words, dynamic_shared + 2 * threadIdx.x);
}

}  // namespace lorakern

template <typename... Params, typename... Args>
bool runs(dim3 grid, dim3 block, void (*kernel)(Params...), Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = 256;
  try {
    return cudaLaunchKernelEx(&config, kernel, args...) == cudaSuccess;
  } catch (const std::logic_error&) {
    return false;
  }
}

using namespace lorakern;
extern "C" {
bool run_reverse(float* out, const float* in) { return runs(3, 64, reverse<true>, out, in); }
bool run_racing(float* out, const float* in) { return runs(3, 64, reverse<false>, out, in); }
bool run_overtaking(float* out, const float* in) { return runs(1, 64, overtaking, out, in); }
bool run_warp_sums(float* out, const float* in) { return runs(1, 64, warp_sums, out, in); }
bool run_places(float* out) { return runs(dim3(2, 3, 2), dim3(5, 2, 3), places, out); }
bool run_unreached_barrier() { return runs(1, 40, unreached_barrier); }
bool run_float_products(float* out, const uint16_t* a, const uint16_t* b) {
  return runs(1, 32, matrix_products<false>, out, a, b);
}
bool run_bfloat_products(float* out, const uint16_t* a, const uint16_t* b) {
  return runs(1, 32, matrix_products<true>, out, a, b);
}
bool run_odd_address() { return runs(1, 32, odd_address); }
bool run_past_the_end() { return runs(1, 256, past_the_end); }
bool run_unwritten(float* out) { return runs(1, 32, unwritten, out); }
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    (folder / "kernels.cpp").write_text(KERNELS)
    library = cuda_aot.host_compile(folder / "kernels.cpp", folder / "kernels.so")
    yield library
    library.cuda_host_order(ctypes.c_bool(False))


def run(host, name, *tensors):
    function = getattr(host, f"run_{name}")
    function.restype = ctypes.c_bool
    return function(*(ctypes.c_void_p(t.data_ptr()) for t in tensors))


@pytest.mark.parametrize("backwards", [False, True])
def test_barriers_and_shared_memory(host, backwards):
    host.cuda_host_order(ctypes.c_bool(backwards))
    given, out = torch.randn(3, 64), torch.empty(3, 64)
    assert run(host, "reverse", out, given)
    assert torch.equal(out, given.flip(1))


@pytest.mark.parametrize("wrong", ["racing", "overtaking"])
def test_a_missing_barrier_shows_in_one_of_the_two_orders(wrong, host):
    given, outs = torch.randn(3, 64), []
    for backwards in (False, True):
        host.cuda_host_order(ctypes.c_bool(backwards))
        outs.append(torch.empty(3, 64))
        assert run(host, wrong, outs[-1], given)
    assert not torch.equal(*outs)


@pytest.mark.parametrize("backwards", [False, True])
def test_warps(host, backwards):
    host.cuda_host_order(ctypes.c_bool(backwards))
    given, out = torch.arange(64.0), torch.empty(3, 2, 32)
    assert run(host, "warp_sums", out, given)
    assert torch.equal(out, given.view(2, 32).sum(1)[None, :, None].expand(3, 2, 32))


def test_every_thread_of_every_block_runs(host):
    out = torch.empty(12 * 30)
    assert run(host, "places", out)
    assert torch.equal(out, torch.arange(360.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backwards", [False, True])
def test_matrix_instructions(dtype, backwards, host):
    host.cuda_host_order(ctypes.c_bool(backwards))
    a, b = (torch.randn(16, 16).to(dtype) for _ in range(2))
    out = torch.empty(2, 16, 16)
    assert run(host, f"{str(dtype).removeprefix('torch.').removesuffix('16')}_products", out, a, b)
    want = torch.stack([1 + a.double() @ b.double(), 1 + a.double() @ b.double().T])
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", ["unreached_barrier", "past_the_end", "odd_address"])
def test_what_would_hang_or_overrun_is_an_error(host, wrong):
    assert not run(host, wrong)
    # and the next kernel runs
    test_barriers_and_shared_memory(host, False)


def test_shared_memory_that_was_not_written_is_nan(host):
    out = torch.zeros(32)
    assert run(host, "unwritten", out)
    assert out.isnan().all()

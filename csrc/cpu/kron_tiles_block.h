// What kron_linear does with a block of rows where AMX tiles multiply bfloat16 (kron_tiles.h): what
// kron_block.h does, with every product in tiles. What lies between two of them is rounded to
// bfloat16, as the spec's products in it are; the update's last product is made in the sums.

#pragma once

#include <numeric>

#include "block_product.h"
#include "kron_tiles.h"

#if defined(LORAKERN_AMX)

namespace lorakern {

// floats of a run's sums, which stay in cache
constexpr int64_t kRunFloats = 1 << 14;

struct KronTilesForward : Block<at::BFloat16, true> {
  static constexpr bool kStarts = true;
  const KronTiles& f;
  float scale;

  void start(int64_t, int64_t row, int64_t rows, float* sums, int64_t ld) {
    const int64_t a_row = KronTiles::stripes(f.B, f.P);
    const int64_t run = std::clamp<int64_t>(kRunFloats / a_row, 1, rows);
    const at::Tensor room = scratch<float>(run * a_row, p.options);
    float* const h = room.mutable_data_ptr<float>();
    amx::Shapes shapes;
    for (int64_t from = 0; from < rows; from += run) {
      const int64_t count = std::min(run, rows - from);
      f.by_d(shapes, h, p.a + (row + from) * f.B * f.Q, count);
      f.finish(shapes, sums + from * ld, ld, h, count, scale);
    }
  }
};

}  // namespace lorakern

#endif

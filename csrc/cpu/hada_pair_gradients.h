// The gradients of a Hadamard update's four factors in AMX tiles, from tiles of dyᵀ x (outer_tiles.h).
//
// A product's gradient is that tile times the other product. It is rounded to bfloat16, as the inputs
// of every product are, and meets the other factor as it is; sums are in float32.

#pragma once

#include "hada_pairs.h"
#include "outer_tiles.h"

#if defined(LORAKERN_AMX)

namespace lorakern {

// In parts, as HadaGradients has them: of an up for each run of columns, of a down for each of rows.
class HadaPairGradients {
 public:
  // gain: [O] or null
  HadaPairGradients(const HadaPairs& h, const Tiles& tiles, const float* gain)
      : h_(h), gain_(gain), O_all_(up_to(h.O, kPairRows)), I_all_(up_to(h.I, kPairRows)) {
    for (int k = 0; k < 2; ++k) {
      const auto options = h.factors[k].held.options();
      const int64_t R = h.factors[k].rows;
      up_parts_[k] = at::empty({tiles.i_count, O_all_, R}, options);
      down_parts_[k] = at::empty({tiles.o_count, R, I_all_}, options);
    }
  }

  // g[rows, ld]: rows of dyᵀ x from o and `cols` columns from i, both whole tiles but for the last
  void add(int64_t o_tile, int64_t i_tile, int64_t o, int64_t rows, int64_t i, int64_t cols,
           const float* g, int64_t ld) const {
    amx::Shapes shapes;
    Parts parts;
    std::array<std::vector<float>, 2> right;
    for (int64_t c = 0; c < cols; c += kPairRows) {
      HadaPanel products(h_, false, i + c, kPairRows);
      for (int k = 0; k < 2; ++k) turn_down(right[k], h_.factors[k], i + c);
      for (int64_t row = 0; row < rows; row += kRun) {
        const int64_t run = std::min(kRun, rows - row), all = up_to(run, kPairRows);
        for (int64_t r = 0; r < run; r += kPairRows) {
          products.make(shapes, o + row + r);
          split(parts, r, g + (row + r) * ld + c, ld, o + row + r,
                std::min(kPairRows, run - r), std::min(kPairRows, cols - c), products);
        }
        for (int k = 0; k < 2; ++k) {
          const PairFactors& f = h_.factors[k];
          float* const ddown = down_parts_[k].mutable_data_ptr<float>();
          float* const dup = up_parts_[k].mutable_data_ptr<float>();
          const Term<float> down_term{f.up_RO + (o + row) / 2, O_all_ / 2, parts.of_rows[k],
                                      kPairRows, all / 2};
          amx::multiply_panel<false>(shapes, ddown + o_tile * f.rows * I_all_ + i + c, I_all_,
                                     row > 0, f.rows, true, down_term, {});
          for (int64_t r = 0; r < f.rows; r += kPairRows) {
            const int64_t width = std::min(kPairRows, f.rows - r);
            const Term<float> up_term{parts.of_columns[k], kLanes, right[k].data() + r * kLanes,
                                      width, kLanes};
            amx::multiply_panel<false>(shapes, dup + (i_tile * O_all_ + o + row) * f.rows + r,
                                       f.rows, c > 0, all, width == kPairRows, up_term, {});
          }
        }
      }
    }
  }

  // (down1, up1, down2, up2), each in bfloat16 where it is wanted, else empty
  std::array<at::Tensor, 4> total(const bool* needs) const {
    std::array<at::Tensor, 4> grads;
    for (int k = 0; k < 2; ++k) {
      const auto finish = [&](bool need, const at::Tensor& parts, int64_t rows, int64_t cols) {
        if (!need) return at::empty({0}, parts.options().dtype(at::kBFloat16));
        at::Tensor sum = parts[0].mul(h_.scale);
        for (int64_t part = 1; part < parts.size(0); ++part) sum.add_(parts[part], h_.scale);
        return sum.narrow(0, 0, rows).narrow(1, 0, cols).to(at::kBFloat16).contiguous();
      };
      const int64_t R = h_.factors[k].R;
      grads[2 * k] = finish(needs[2 * k], down_parts_[k], R, h_.I);
      grads[2 * k + 1] = finish(needs[2 * k + 1], up_parts_[k], h_.O, R);
    }
    return grads;
  }

 private:
  static constexpr int64_t kRun = 128, kLanes = amx::kSide;
  // of one panel's columns, what the two products get: pairs along a row, and pairs of rows
  struct Parts {
    alignas(64) float of_columns[2][kRun * kLanes], of_rows[2][kRun / 2 * kPairRows];
  };

  // right[16 lanes, rank] in panels: a down's columns from i in pairs
  void turn_down(std::vector<float>& right, const PairFactors& f, int64_t i) const {
    right.resize(f.rows * kLanes);
    for (int64_t r = 0; r < f.rows; r += kPairRows) {
      const int64_t width = std::min(kPairRows, f.rows - r);
      pack_transposed(right.data() + r * kLanes, width, f.down_RI + r * I_all_ / 2 + i / 2,
                      I_all_ / 2, width, kLanes);
    }
  }

  // rows [row, row + kPairRows) of parts: g times the other product, zeros beyond `rows` and `cols`
  void split(Parts& parts, int64_t row, const float* g, int64_t ld, int64_t o, int64_t rows,
             int64_t cols, const HadaPanel& products) const {
    const auto left = static_cast<__mmask16>((uint64_t(1) << std::min<int64_t>(16, cols)) - 1);
    const auto right = static_cast<__mmask16>((uint64_t(1) << std::max<int64_t>(0, cols - 16)) - 1);
    for (int64_t i = 0; i < kPairRows; i += 2) {
      __m512 of_g[2][2];
      for (int64_t j = 0; j < 2; ++j) {
        const bool within = i + j < rows;
        const float* const from = g + (within ? (i + j) * ld : 0);
        const __m512 by = _mm512_set1_ps(gain_ && within ? gain_[o + i + j] : 1.0f);
        of_g[j][0] = _mm512_mul_ps(by, _mm512_maskz_loadu_ps(within ? left : 0, from));
        of_g[j][1] = _mm512_mul_ps(by, _mm512_maskz_loadu_ps(within ? right : 0, from + 16));
      }
      for (int k = 0; k < 2; ++k) {
        at::BFloat16* const lines[2] = {
            reinterpret_cast<at::BFloat16*>(parts.of_columns[k] + (row + i) * kLanes),
            reinterpret_cast<at::BFloat16*>(parts.of_columns[k] + (row + i + 1) * kLanes)};
        for (int64_t j = 0; j < 2; ++j) {
          const float* const other = products.made[1 - k] + (i + j) * kPairRows;
          const __m512 low = _mm512_mul_ps(of_g[j][0], _mm512_load_ps(other));
          const __m512 high = _mm512_mul_ps(of_g[j][1], _mm512_load_ps(other + 16));
          _mm512_storeu_si512(lines[j], std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
        }
        interleave(reinterpret_cast<at::BFloat16*>(parts.of_rows[k] + (row + i) / 2 * kPairRows),
                   lines[0], lines[1], kPairRows);
      }
    }
  }

  const HadaPairs& h_;
  const float* gain_;
  int64_t O_all_, I_all_;
  std::array<at::Tensor, 2> up_parts_, down_parts_;
};

}  // namespace lorakern

#endif

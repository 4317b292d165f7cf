// The two products of a Hadamard update in AMX tiles, where they are used: factors of bfloat16 are
// multiplied as they are, in pairs along the rank, with sums in float32. hada_tile.h has the others.

#pragma once

#include <bit>

#include "amx_pairs.h"
#include "linear.h"

#if defined(LORAKERN_AMX)

namespace lorakern {

constexpr int64_t kPairRows = 2 * amx::kSide;

inline int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// 16 pairs of bfloat16 of float32 values, and the values of pairs
inline __m512i pairs_of(__m512 even, __m512 odd) {
  alignas(64) static constexpr auto kOrder = [] {
    std::array<int16_t, 32> order{};
    for (int16_t i = 0; i < 32; ++i) order[i] = static_cast<int16_t>(i / 2 + 16 * (i % 2));
    return order;
  }();
  const auto both = std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder.data()), both);
}
inline __m512i evens(__m512i pairs) { return _mm512_slli_epi32(pairs, 16); }
inline __m512i odds(__m512i pairs) {
  return _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
}

// high: what is nearest to the values; low: to what that leaves out, nothing of an infinity
inline void split(__m512 even, __m512 odd, __m512i& high, __m512i& low) {
  const auto rest = [](__m512 value, __m512i near) {
    const __m512 taken = _mm512_castsi512_ps(near);
    const __mmask16 finite = ~_mm512_fpclass_ps_mask(taken, 0x18);
    return _mm512_maskz_sub_ps(finite, value, taken);
  };
  high = pairs_of(even, odd);
  low = pairs_of(rest(even, evens(high)), rest(odd, odds(high)));
}

// One low-rank product up[O, R] down[R, I], each factor with pairs along either side, and zeros up to
// whole tiles: up_OR has pairs along R, down_RI pairs along I.
struct PairFactors {
  int64_t R, lanes, rows;
  at::Tensor held;
  float *up_OR, *up_RO, *down_IR, *down_RI;

  PairFactors(const at::Tensor& down, const at::Tensor& up)
      : R(down.size(0)), lanes(up_to(R, kPairRows) / 2), rows(up_to(R, amx::kSide)) {
    const int64_t O = up.size(0), I = down.size(1);
    const int64_t O_all = up_to(O, kPairRows), I_all = up_to(I, kPairRows);
    held = at::zeros({(lanes + rows / 2) * (O_all + I_all)}, wide_options(up));
    up_OR = held.mutable_data_ptr<float>();
    up_RO = up_OR + O_all * lanes;
    down_IR = up_RO + rows * O_all / 2;
    down_RI = down_IR + I_all * lanes;
    const auto* const u = up.const_data_ptr<at::BFloat16>();
    const auto* const d = down.const_data_ptr<at::BFloat16>();
    for (int64_t o = 0; o < O; ++o) std::memcpy(up_OR + o * lanes, u + o * R, R * sizeof(*u));
    for (int64_t r = 0; r < R; ++r)
      std::memcpy(down_RI + r * I_all / 2, d + r * I, I * sizeof(*d));
    pack_turned_pairs(up_RO, O_all / 2, u, R, R, O);
    pack_turned_pairs(down_IR, lanes, d, I, I, R);
  }
};

struct HadaPairs {
  int64_t O, I;
  std::array<PairFactors, 2> factors;
  float scale;

  HadaPairs(const at::Tensor& down1, const at::Tensor& up1, const at::Tensor& down2,
            const at::Tensor& up2, double scale)
      : O(up1.size(0)), I(down1.size(1)),
        factors{PairFactors(down1.contiguous(), up1.contiguous()),
                PairFactors(down2.contiguous(), up2.contiguous())},
        scale(static_cast<float>(scale)) {}
};

// The two products of a panel's columns from `first`, kPairRows rows at a time. transposed: rows are
// columns of the update, and the panel is of its rows.
class HadaPanel {
 public:
  HadaPanel(const HadaPairs& h, bool transposed, int64_t first, int64_t width) : width_(width) {
    for (int k = 0; k < 2; ++k) {
      const PairFactors& f = h.factors[k];
      const float* const right = (transposed ? f.up_OR : f.down_IR) + first * f.lanes;
      right_[k].resize(f.lanes * width);
      pack_transposed(right_[k].data(), width, right, f.lanes, width, f.lanes);
      left_[k] = {transposed ? f.down_IR : f.up_OR, f.lanes, right_[k].data(), width, f.lanes};
    }
  }
  // one and two [kPairRows, width]
  void make(amx::Shapes& shapes, int64_t row) {
    for (int k = 0; k < 2; ++k) {
      Term<float> term = left_[k];
      term.a += row * term.lda;
      amx::multiply_panel<false>(shapes, made[k], width_, false, kPairRows,
                                 width_ == kPanel<float>, term, Term<float>{});
    }
    amx::written();
  }
  alignas(64) float made[2][kPairRows * kPanel<float>];

 private:
  int64_t width_;
  std::array<std::vector<float>, 2> right_;
  std::array<Term<float>, 2> left_;
};

// Panels of W + ΔW as the sum of two bfloat16: what is left out is 2^-9 of the smaller of ΔW and what
// one leaves out. A tile of a meets both.
struct PairProduct : Block<at::BFloat16, true> {
  using Base = Block<at::BFloat16, true>;
  const HadaPairs& h;

  // of a panel: both parts of 16 lanes, one after the other
  int64_t lanes() const { return 2 * up_to(Base::lanes(), amx::kSide); }

  void pack(float* panel, int64_t first, int64_t width) const {
    std::vector<float> weight(lanes() / 2 * width);
    Base::pack(weight.data(), first, width);
    HadaPanel delta(h, p.transposed, first, width);
    amx::Shapes shapes;
    for (int64_t row = 0; row < p.K; row += kPairRows) {
      delta.make(shapes, row);
      const int64_t rows = std::min(kPairRows, p.K - row);
      split_sums(panel + row * width, weight.data() + row / 2 * width, delta, row, rows, width);
    }
  }

  // panel: 16 lanes of both parts
  void split_sums(float* panel, const float* weight, const HadaPanel& delta, int64_t row,
                  int64_t rows, int64_t width) const {
    const float* const gain = p.transposed ? nullptr : p.gain;
    const auto sum = [&](__m512i w, int64_t i, int64_t c) {
      const __m512 one = _mm512_load_ps(delta.made[0] + i * width + c);
      const __m512 two = _mm512_load_ps(delta.made[1] + i * width + c);
      const __m512 scaled = _mm512_mul_ps(_mm512_set1_ps(h.scale), one);
      const __m512 value = _mm512_fmadd_ps(scaled, two, _mm512_castsi512_ps(w));
      return gain ? _mm512_mul_ps(value, _mm512_set1_ps(gain[row + i])) : value;
    };
    for (int64_t i = 0; i < kPairRows; i += 2) {
      for (int64_t c = 0; c < width; c += amx::kSide) {
        float* const to = panel + i / 2 * width + c;
        __m512i high = _mm512_setzero_si512(), low = high;
        if (i < rows) {
          const __m512i pairs = _mm512_loadu_si512(weight + i / 2 * width + c);
          split(sum(evens(pairs), i, c), sum(odds(pairs), i + 1, c), high, low);
        }
        _mm512_storeu_si512(to, high);
        _mm512_storeu_si512(to + amx::kSide * width, low);
      }
    }
  }

  Lanes<float> pass(int64_t i, const float* a, int64_t row, int64_t rows) const {
    Lanes<float> lanes = Base::pass(i, a, row, rows);
    lanes.from *= 2;
    return lanes;
  }
  void multiply(float* c, int64_t ldc, bool add, int64_t rows, bool wide, const Term<float>& product,
                const Term<float>&) const {
    amx::multiply_parts(c, ldc, add, rows, wide, product);
  }
};

}  // namespace lorakern

#endif

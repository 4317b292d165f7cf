// c[rows, 16 or 32] (+)= a b + a2 b2 of bfloat16 pairs in AMX tiles, where a machine has them.
//
// A tile is up to 16 rows of 16 lanes: 16 sums in float32, or 16 pairs that one instruction
// multiplies and adds to them. Sums stay in tiles 0-3 for all of k: two tiles of rows by two of
// columns, the left operand in 4 and 5, the right in 6 and 7. Panels are laid out as tile.h has
// them, for a panel's rows of pairs are what the right operand wants. The lanes of k that do not
// fill a tile, its tail, are copied among zeros on both sides.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "../vec.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512) && \
    defined(__linux__)
#define LORAKERN_AMX

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace lorakern::amx {

constexpr int kSide = 16;

// Linux keeps the state of tiles for a process that has asked for it
inline bool ready() {
  constexpr long kRequest = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}

// the compiler does not know that a tile is loaded from memory: what was written before is there
inline void written() { asm volatile("" ::: "memory"); }

// The shapes of all tiles while it lives: `upper` and `lower` rows of sums and of a, `lanes` of k and
// `cols` columns. No other of a thread may be used while it lives. To set one costs hundreds of cycles.
class Shapes {
 public:
  Shapes() = default;
  Shapes(const Shapes&) = delete;
  Shapes& operator=(const Shapes&) = delete;
  ~Shapes() {
    if (set_[0]) _tile_release();
  }
  void set(int upper, int lower, int lanes = kSide, int cols = kSide) {
    // no lower rows use no lower tiles
    if (set_ == std::array{upper, lower ? lower : set_[1], lanes, cols}) return;
    set_ = {upper, lower, lanes, cols};
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const int rows[8] = {upper, upper, lower, lower, upper, lower, lanes, lanes};
    for (int i = 0; i < 8; ++i) {
      config.rows[i] = static_cast<uint8_t>(rows[i]);
      config.bytes[i] = rows[i] ? 4 * (i == 4 || i == 5 ? lanes : cols) : 0;
    }
    written();
    _tile_loadconfig(&config);
  }

 private:
  std::array<int, 4> set_{};
};

// to[16 or fewer rows, 16] = from[rows, lanes] and zeros beyond them
inline void copy_lanes(float* to, int64_t to_ld, const float* from, int64_t ld, int64_t rows,
                       int64_t lanes) {
  const auto some = static_cast<__mmask16>((1u << lanes) - 1);
  for (int64_t i = 0; i < rows; ++i)
    _mm512_storeu_ps(to + i * to_ld, _mm512_maskz_loadu_ps(some, from + i * ld));
}

// square[rows, 16] = `lanes` lanes of k of `rows` rows of a column-major operand
inline void turn(float* square, const float* a, int64_t lda, int rows, int64_t lanes) {
  if (rows == kSide && lanes == kSide)
    return at::vec::transpose_mxn<float, kSide, kSide>(a, lda, square, kSide);
  alignas(64) float lines[kSide * kSide] = {};
  copy_lanes(lines, kSide, a, lda, lanes, rows);
  at::vec::transpose_mxn<float, kSide, kSide>(lines, kSide, square, kSide);
}

// The last lanes of k of a panel of the right operand, with zeros below.
class Tail {
 public:
  static constexpr int64_t kLanes = 2 * kSide;

  template <typename Term>
  Tail(const Term& term, bool wide) : lanes(term.k % kSide) {
    if (lanes == 0) return;
    const float* const from = term.b + (term.k - lanes) * term.ldb;
    for (int64_t half = 0; half <= int64_t(wide); ++half) {
      copy_lanes(rows + half * kSide, kLanes, from + half * kSide, term.ldb, lanes, kSide);
      for (int64_t k = lanes; k < kSide; ++k)
        _mm512_storeu_ps(rows + k * kLanes + half * kSide, _mm512_setzero_ps());
    }
  }

  int64_t lanes;
  alignas(64) float rows[kSide * kLanes];
};

// sums[upper + lower rows, 16 or 32] += a b of what is in the tiles
template <bool kTall, bool kWide>
inline void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kWide) _tile_dpbf16ps(1, 4, 7);
  if constexpr (kTall) _tile_dpbf16ps(2, 5, 6);
  if constexpr (kTall && kWide) _tile_dpbf16ps(3, 5, 7);
}

// sums += a b over `lanes` lanes of k
template <bool kColumnMajor, bool kTall, bool kWide>
inline void step(int upper, int lower, const float* a, int64_t lda, const float* b, int64_t ldb,
                 int64_t lanes) {
  alignas(64) float square[2][kSide * kSide];
  _tile_loadd(6, b, ldb * 4);
  if constexpr (kWide) _tile_loadd(7, b + kSide, ldb * 4);
  if (kColumnMajor || lanes < kSide) {
    if constexpr (kColumnMajor) {
      turn(square[0], a, lda, upper, lanes);
      if constexpr (kTall) turn(square[1], a + kSide, lda, lower, lanes);
    } else {
      copy_lanes(square[0], kSide, a, lda, upper, lanes);
      if constexpr (kTall) copy_lanes(square[1], kSide, a + kSide * lda, lda, lower, lanes);
    }
    written();
    _tile_loadd(4, square[0], 64);
    if constexpr (kTall) _tile_loadd(5, square[1], 64);
  } else {
    _tile_loadd(4, a, lda * 4);
    if constexpr (kTall) _tile_loadd(5, a + kSide * lda, lda * 4);
  }
  multiply_tiles<kTall, kWide>();
}

template <typename Term, bool kColumnMajor, bool kTall, bool kWide>
inline void accumulate(int upper, int lower, const Term& term, const Tail& tail) {
  const int64_t whole = term.k - tail.lanes, by = kColumnMajor ? term.lda : 1;
  for (int64_t k = 0; k < whole; k += kSide)
    step<kColumnMajor, kTall, kWide>(upper, lower, term.a + k * by, term.lda,
                                     term.b + k * term.ldb, term.ldb, kSide);
  if (tail.lanes > 0)
    step<kColumnMajor, kTall, kWide>(upper, lower, term.a + whole * by, term.lda, tail.rows,
                                     Tail::kLanes, tail.lanes);
}

template <bool kTall, bool kWide>
inline void load_sums(const float* c, int64_t ldc, bool add) {
  const float* const c_low = c + kSide * ldc;
  if (add) {
    _tile_loadd(0, c, ldc * 4);
    if constexpr (kWide) _tile_loadd(1, c + kSide, ldc * 4);
    if constexpr (kTall) _tile_loadd(2, c_low, ldc * 4);
    if constexpr (kTall && kWide) _tile_loadd(3, c_low + kSide, ldc * 4);
  } else {
    _tile_zero(0);
    if constexpr (kWide) _tile_zero(1);
    if constexpr (kTall) _tile_zero(2);
    if constexpr (kTall && kWide) _tile_zero(3);
  }
}

template <bool kTall, bool kWide>
inline void store_sums(float* c, int64_t ldc) {
  float* const c_low = c + kSide * ldc;
  _tile_stored(0, c, ldc * 4);
  if constexpr (kWide) _tile_stored(1, c + kSide, ldc * 4);
  if constexpr (kTall) _tile_stored(2, c_low, ldc * 4);
  if constexpr (kTall && kWide) _tile_stored(3, c_low + kSide, ldc * 4);
}

template <typename Term, bool kColumnMajor, bool kTall, bool kWide>
void tiles(float* c, int64_t ldc, bool add, int upper, int lower, const Term& first,
           const Term& second, const std::array<Tail, 2>& tails) {
  load_sums<kTall, kWide>(c, ldc, add);
  accumulate<Term, kColumnMajor, kTall, kWide>(upper, lower, first, tails[0]);
  accumulate<Term, kColumnMajor, kTall, kWide>(upper, lower, second, tails[1]);
  store_sums<kTall, kWide>(c, ldc);
}

// c[rows, 32 if wide, else 16] (+)= a b + a2 b2
template <bool kColumnMajor, typename Term>
void multiply_panel(Shapes& shapes, float* c, int64_t ldc, bool add, int64_t rows, bool wide,
                    Term first, Term second) {
  const std::array<Tail, 2> tails{Tail(first, wide), Tail(second, wide)};
  written();
  for (int64_t row = 0; row < rows; row += 2 * kSide) {
    const int upper = static_cast<int>(std::min<int64_t>(kSide, rows - row));
    const int lower = static_cast<int>(std::clamp<int64_t>(rows - row - kSide, 0, kSide));
    shapes.set(upper, lower);
    const auto run = lower  ? wide ? tiles<Term, kColumnMajor, true, true>
                                   : tiles<Term, kColumnMajor, true, false>
                     : wide ? tiles<Term, kColumnMajor, false, true>
                            : tiles<Term, kColumnMajor, false, false>;
    run(c + row * ldc, ldc, add, upper, lower, first, second, tails);
    for (Term* term : {&first, &second}) term->a += 2 * kSide * (kColumnMajor ? 1 : term->lda);
  }
}

template <bool kColumnMajor, typename Term>
void multiply_panel(float* c, int64_t ldc, bool add, int64_t rows, bool wide, const Term& first,
                    const Term& second) {
  Shapes shapes;
  multiply_panel<kColumnMajor>(shapes, c, ldc, add, rows, wide, first, second);
}

}  // namespace lorakern::amx

#endif

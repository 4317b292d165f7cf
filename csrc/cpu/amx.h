// c[rows, 16 or 32] (+)= a b + a2 b2 of bfloat16 pairs in AMX tiles, where a machine has them.
//
// A tile is up to 16 rows of 16 lanes: 16 sums in float32, or 16 pairs that one instruction
// multiplies and adds to them. Sums stay in tiles 0-3 for all of k: two tiles of rows by two of
// columns, the left operand in 4 and 5, the right in 6 and 7. Panels are laid out as tile.h has
// them, for a panel's rows of pairs are what the right operand wants.

#pragma once

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

// the shapes of all tiles while it lives: `upper` and `lower` rows of sums and of a
class Shapes {
 public:
  Shapes() = default;
  Shapes(const Shapes&) = delete;
  Shapes& operator=(const Shapes&) = delete;
  ~Shapes() {
    if (upper_) _tile_release();
  }
  void set(int upper, int lower) {
    if (upper == upper_ && lower == lower_) return;
    upper_ = upper;
    lower_ = lower;
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const int rows[8] = {upper, upper, lower, lower, upper, lower, kSide, kSide};
    for (int i = 0; i < 8; ++i) {
      config.rows[i] = static_cast<uint8_t>(rows[i]);
      config.bytes[i] = rows[i] ? 64 : 0;
    }
    written();
    _tile_loadconfig(&config);
  }

 private:
  int upper_ = 0, lower_ = 0;
};

// square[rows, 16] = 16 lanes of k of `rows` rows of a column-major operand
inline void turn(float* square, const float* a, int64_t lda, int rows) {
  if (rows == kSide) return at::vec::transpose_mxn<float, kSide, kSide>(a, lda, square, kSide);
  for (int k = 0; k < kSide; ++k)
    for (int i = 0; i < rows; ++i) square[i * kSide + k] = a[k * lda + i];
}

template <typename Term, bool kColumnMajor, bool kTall, bool kWide>
inline void accumulate(int upper, int lower, const Term& term) {
  alignas(64) float square[2][kSide * kSide];
  for (int64_t k = 0; k < term.k; k += kSide) {
    const float* const b = term.b + k * term.ldb;
    _tile_loadd(6, b, term.ldb * 4);
    if constexpr (kWide) _tile_loadd(7, b + kSide, term.ldb * 4);
    if constexpr (kColumnMajor) {
      const float* const a = term.a + k * term.lda;
      turn(square[0], a, term.lda, upper);
      if constexpr (kTall) turn(square[1], a + kSide, term.lda, lower);
      written();
      _tile_loadd(4, square[0], 64);
      if constexpr (kTall) _tile_loadd(5, square[1], 64);
    } else {
      _tile_loadd(4, term.a + k, term.lda * 4);
      if constexpr (kTall) _tile_loadd(5, term.a + kSide * term.lda + k, term.lda * 4);
    }
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kWide) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTall) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kTall && kWide) _tile_dpbf16ps(3, 5, 7);
  }
}

template <typename Term, bool kColumnMajor, bool kTall, bool kWide>
void tiles(float* c, int64_t ldc, bool add, int upper, int lower, const Term& first,
           const Term& second) {
  float* const c_low = c + kSide * ldc;
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
  accumulate<Term, kColumnMajor, kTall, kWide>(upper, lower, first);
  accumulate<Term, kColumnMajor, kTall, kWide>(upper, lower, second);
  _tile_stored(0, c, ldc * 4);
  if constexpr (kWide) _tile_stored(1, c + kSide, ldc * 4);
  if constexpr (kTall) _tile_stored(2, c_low, ldc * 4);
  if constexpr (kTall && kWide) _tile_stored(3, c_low + kSide, ldc * 4);
}

// c[rows, 32 if wide, else 16] (+)= a b + a2 b2; each k is a multiple of kSide
template <bool kColumnMajor, typename Term>
void multiply_panel(float* c, int64_t ldc, bool add, int64_t rows, bool wide, Term first,
                    Term second) {
  Shapes shapes;
  written();
  for (int64_t row = 0; row < rows; row += 2 * kSide) {
    const int upper = static_cast<int>(std::min<int64_t>(kSide, rows - row));
    const int lower = static_cast<int>(std::clamp<int64_t>(rows - row - kSide, 0, kSide));
    shapes.set(upper, lower);
    const auto run = lower  ? wide ? tiles<Term, kColumnMajor, true, true>
                                   : tiles<Term, kColumnMajor, true, false>
                     : wide ? tiles<Term, kColumnMajor, false, true>
                            : tiles<Term, kColumnMajor, false, false>;
    run(c + row * ldc, ldc, add, upper, lower, first, second);
    for (Term* term : {&first, &second}) term->a += 2 * kSide * (kColumnMajor ? 1 : term->lda);
  }
}

}  // namespace lorakern::amx

#endif

// Products of small fp32 matrices, for kernels that multiply tiles which lie in the caches:
//
//   multiply<ADD>(a, b, c, M, N, K)      c (M, N) = or += a (M, K) b (K, N)
//   multiply_panel<ADD>(a, b, c, M, K, ..)   the same for N = PANEL, at full speed for any M
//
// `a` may have any strides (a transposed matrix is one); b and c are dense along N. An element's sum
// runs over K in order, one fused step after another, wherever it stands in the tile: its bits
// depend on its row of a and its column of b alone.
#pragma once

#ifdef FASTRLHF_ISA

#include "tiles.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

struct Matrix {  // element (i, j) is p[i * row + j * column]
  const float* p;
  int64_t row, column;
};

struct Tile {  // element (i, j) is p[i * row + j]
  float* p;
  int64_t row;
};

// Rows by two vectors that are summed in registers: 32 with 64 bytes, else 16.
constexpr int MAX_M = VEC_BYTES == 64 ? 12 : 4;

// M rows by NV vectors, or by one of which `k` lanes are there.
template <int M, int NV, bool ADD>
FASTRLHF_INLINE void multiply_block(const Matrix& a, Matrix b, Tile c, int64_t K, int k) {
  constexpr int W = lanes<vf>;
  vf sums[M][NV];
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      sums[i][j] = !ADD ? vf{} : NV == 1 ? load_k(c.p + i * c.row, k) : load(c.p + i * c.row + j * W);
    }
  }
  const float* x = a.p;
  for (int64_t step = 0; step < K; ++step, x += a.column, b.p += b.row) {
    vf y[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) y[j] = NV == 1 ? load_k(b.p, k) : load(b.p + j * W);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const vf scale = splat<vf>(x[i * a.row]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) sums[i][j] = vfma(scale, y[j], sums[i][j]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      if (NV == 1) {
        store_k(c.p + i * c.row, sums[i][j], k);
      } else {
        store(c.p + i * c.row + j * W, sums[i][j]);
      }
    }
  }
}

template <int M, bool ADD>
void multiply_rows(const Matrix& a, const Matrix& b, const Tile& c, int64_t N, int64_t K) {
  constexpr int W = lanes<vf>;
  int64_t n = 0;
  for (; n + 2 * W <= N; n += 2 * W) {
    multiply_block<M, 2, ADD>(a, {b.p + n, b.row, 1}, {c.p + n, c.row}, K, W);
  }
  for (; n < N; n += W) {
    const int k = static_cast<int>(min_of<int64_t>(W, N - n));
    multiply_block<M, 1, ADD>(a, {b.p + n, b.row, 1}, {c.p + n, c.row}, K, k);
  }
}

template <int M, bool ADD>
void multiply_last(const Matrix& a, const Matrix& b, const Tile& c, int64_t rows, int64_t N,
                   int64_t K) {
  if constexpr (M > 0) {
    if (rows == M) {
      multiply_rows<M, ADD>(a, b, c, N, K);
    } else {
      multiply_last<M - 1, ADD>(a, b, c, rows, N, K);
    }
  }
}

template <bool ADD>
void multiply(Matrix a, const Matrix& b, Tile c, int64_t M, int64_t N, int64_t K) {
  for (; M >= MAX_M; M -= MAX_M, a.p += MAX_M * a.row, c.p += MAX_M * c.row) {
    multiply_rows<MAX_M, ADD>(a, b, c, N, K);
  }
  multiply_last<MAX_M - 1, ADD>(a, b, c, M, N, K);
}

constexpr int64_t PANEL = 64;                 // columns
constexpr int PANEL_M = VEC_BYTES == 64 ? 6 : 2;  // rows that are summed over PANEL_NV vectors
constexpr int PANEL_NV = 4;

template <int M, bool ADD>
void multiply_panel_rows(const Matrix& a, const Matrix& b, const Tile& c, int64_t rows,
                         int64_t K) {
  if constexpr (M > 0) {
    if (rows < M) return multiply_panel_rows<M - 1, ADD>(a, b, c, rows, K);
    constexpr int W = lanes<vf>;
    for (int64_t n = 0; n < PANEL; n += PANEL_NV * W) {
      multiply_block<M, PANEL_NV, ADD>(a, {b.p + n, b.row, 1}, {c.p + n, c.row}, K, W);
    }
  }
}

// Four vectors a row, since the sums of two in one or two rows would wait for one another. `next`,
// `lines` cache lines, is what will be read after this, and is fetched meanwhile.
template <bool ADD>
void multiply_panel(Matrix a, const Matrix& b, Tile c, int64_t M, int64_t K, const float* next,
                    int64_t lines) {
  for (int64_t blocks = (M + PANEL_M - 1) / PANEL_M; blocks > 0; --blocks) {
    const int64_t rows = (M + blocks - 1) / blocks;
    for (int64_t stop = lines - lines / blocks; lines > stop; --lines, next += 16) {
      __builtin_prefetch(next, 0, 2);
    }
    multiply_panel_rows<PANEL_M, ADD>(a, b, c, rows, K);
    M -= rows, a.p += rows * a.row, c.p += rows * c.row;
  }
}

}  // namespace
}  // namespace fastrlhf::FASTRLHF_ISA
#endif

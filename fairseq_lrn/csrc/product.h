// Products of float matrices in the processor's cache.
#pragma once

#include <algorithm>

#include "simd.h"

namespace lrn {

constexpr int64_t kTileRows = 6;

// A matrix of any strides.
struct Strided {
  const float* data;
  int64_t row, column;
};

// c = init + a b, for the first kTileRows of `rows` rows of a and c, and kVectors vectors of a row
// of b and c, which stay in registers. Where there are fewer, the last one is computed in place of
// the others. `init` may be null, for zeros.
template <int kLanes, int kVectors>
LRN_HD void multiply_tile(Strided a, const float* b, int64_t b_row, float* c, int64_t c_row,
                          int64_t rows, int64_t depth, const float* init, int64_t init_row) {
  typedef Floats<kLanes> V;
  const float* from[kTileRows] = {a.data};
  for (int i = 1; i < kTileRows; ++i) {
    from[i] = from[i - 1] + (i < rows ? a.row : 0);
  }
  for (int i = 0; i < kTileRows; ++i) {
    for (int j = 0; i < rows && j < kVectors; ++j) {
      __builtin_prefetch(c + i * c_row + j * kLanes, 1);
    }
  }
  // Looks ahead in a's columns, each of which may be another page, or else to the next tile's rows.
  const bool flat = a.column == 1;
  const float* const ahead =
      flat ? a.data + kTileRows * a.row : from[kTileRows - 1] + 16 * a.column;
  const int64_t step = flat ? kTileRows : a.column;
  V sums[kTileRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(ahead + k * step);
    V x[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      x[j] = load<kLanes>(b + k * b_row + j * kLanes);
    }
    for (int i = 0; i < kTileRows; ++i) {
      for (int j = 0; j < kVectors; ++j) {
        sums[i][j] += from[i][k * a.column] * x[j];
      }
    }
  }
#pragma GCC unroll 6  // early, or else the sums pass through memory
  for (int i = 0; i < kTileRows; ++i) {
    if (i < rows) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        V sum = sums[i][j];
        if (init != nullptr) {
          sum += load<kLanes>(init + i * init_row + j * kLanes);
        }
        store(c + i * c_row + j * kLanes, sum);
      }
    }
  }
}

// c = a b, or c += a b, of any number of rows, and of columns in whole vectors.
template <int kLanes>
LRN_HD void multiply(Strided a, const float* b, int64_t b_row, float* c, int64_t c_row,
                     int64_t rows, int64_t depth, int64_t columns, bool add = false) {
  for (int64_t i = 0; i < rows; i += kTileRows) {
    const Strided from{a.data + i * a.row, a.row, a.column};
    int64_t j = 0;
    for (; j + 2 * kLanes <= columns; j += 2 * kLanes) {
      float* const to = c + i * c_row + j;
      multiply_tile<kLanes, 2>(from, b + j, b_row, to, c_row, rows - i, depth, add ? to : nullptr,
                               c_row);
    }
    if (j < columns) {
      float* const to = c + i * c_row + j;
      multiply_tile<kLanes, 1>(from, b + j, b_row, to, c_row, rows - i, depth, add ? to : nullptr,
                               c_row);
    }
  }
}

}  // namespace lrn

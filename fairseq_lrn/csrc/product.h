// Products of float matrices: tiles in registers, small matrices in the processor's cache, and
// large ones block by block.
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

constexpr int64_t kDepth = 512;    // of a block of the second matrix, which stays in the second
constexpr int64_t kColumns = 256;  // cache with as many rows of the first

// A tile has as many vectors in a row as there are registers for.
template <int kLanes>
constexpr int kVectors = kLanes == 16 ? 4 : 2;
template <int kLanes>
constexpr int64_t kPanel = kVectors<kLanes> * kLanes;

struct Matrices {
  Strided a, b;       // (rows, depth), (columns, depth)
  const float* bias;  // may be null
  float* c;           // (rows, columns)
  int64_t c_row;      // from one of its rows to the next
  int64_t rows, columns, depth;
};

// Transposes in steps, each of which interleaves the first half of the rows with the second.
template <int kLanes>
LRN_HD void transpose(Floats<kLanes> (&x)[kLanes]) {
  for (int step = 1; step < kLanes; step *= 2) {
    Floats<kLanes> y[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      interleave<kLanes>(x[i], x[i + kLanes / 2], y[2 * i], y[2 * i + 1]);
    }
    for (int i = 0; i < kLanes; ++i) {
      x[i] = y[i];
    }
  }
}

// Copies `columns` rows of b as columns of whole vectors, with zeros beyond the last.
template <int kLanes>
LRN_HD void pack(const Strided& b, int64_t columns, int64_t depth, float* to) {
  typedef Floats<kLanes> V;
  const int64_t width = (columns + kLanes - 1) / kLanes * kLanes;
  if (b.row == 1 && columns == width) {
    for (int64_t k = 0; k < depth; ++k) {
      const float* const from = b.data + k * b.column;
      for (int64_t j = 0; j < width; j += kLanes) {
        __builtin_prefetch(from + 16 * b.column + j);
        std::memcpy(to + k * width + j, from + j, sizeof(V));
      }
    }
    return;
  }
  for (int64_t j = 0; j < width; j += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, columns - j);
    for (int64_t k = 0; k < depth; k += kLanes) {
      const int64_t end = std::min(k + kLanes, depth);
      const float* from = b.data + j * b.row + k * b.column;
      float* const start = to + k * width + j;
      if (b.column == 1 && count == kLanes && end == k + kLanes) {
        V x[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          x[i] = load<kLanes>(from + i * b.row);
        }
        transpose<kLanes>(x);
        for (int64_t i = 0; i < kLanes; ++i) {
          store(start + i * width, x[i]);
        }
      } else {
        for (int64_t i = 0; i < end - k; ++i) {
          for (int64_t lane = 0; lane < kLanes; ++lane) {
            start[i * width + lane] = lane < count ? from[lane * b.row + i * b.column] : 0;
          }
        }
      }
    }
  }
}

// Copies rows, each of which is apart in memory, next to each other: all tiles of a block read
// them.
LRN_HD void copy_rows(const Strided& a, int64_t rows, int64_t depth, float* to) {
  for (int64_t k = 0; k < depth; ++k) {
    const float* const from = a.data + k * a.column;
    __builtin_prefetch(from + 16 * a.column);
    if (a.row == 1 && rows == kTileRows) {
      std::memcpy(to + k * kTileRows, from, kTileRows * sizeof(float));
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        to[k * kTileRows + i] = from[i * a.row];
      }
    }
  }
}

// A part of c in kPanel columns or fewer: c += a b if `add`, or else c = a b + bias.
struct Tile {
  Strided a;
  const float *b, *bias;  // b in rows of whole vectors
  float* c;
  int64_t c_row, rows, columns, depth;
  bool add;
};

// Where the columns are no whole vectors, kCount of them, the result is made aside.
template <int kLanes, int kCount = kVectors<kLanes>>
LRN_HD void multiply_columns(const Tile& t) {
  if constexpr (kCount > 1) {
    if (t.columns <= (kCount - 1) * kLanes) {
      return multiply_columns<kLanes, kCount - 1>(t);
    }
  }
  float aside[kTileRows * kPanel<kLanes>];
  const bool whole = t.columns == kCount * kLanes;
  float* const to = whole ? t.c : aside;
  const int64_t to_row = whole ? t.c_row : kPanel<kLanes>;
  for (int64_t i = 0; i < t.rows && t.add && !whole; ++i) {
    std::memcpy(aside + i * to_row, t.c + i * t.c_row, t.columns * sizeof(float));
  }
  multiply_tile<kLanes, kCount>(t.a, t.b, kCount * kLanes, to, to_row, t.rows, t.depth,
                                t.add ? to : t.bias, t.add ? to_row : 0);
  for (int64_t i = 0; i < t.rows && !whole; ++i) {
    std::memcpy(t.c + i * t.c_row, aside + i * to_row, t.columns * sizeof(float));
  }
}

// c = a b^T + bias. `packed` has room for a block of b, in whole vectors; `multiply` computes a
// tile.
template <int kLanes>
LRN_HD void multiply_blocks(const Matrices& m, float* packed, void (*multiply)(const Tile&)) {
  const int64_t parts = (m.depth + kDepth - 1) / kDepth, most = (m.depth + parts - 1) / parts;
  for (int64_t block = 0; block < m.columns; block += kColumns) {
    const int64_t end = std::min(block + kColumns, m.columns);
    float bias[kColumns] = {}, copied[kTileRows * kDepth];
    if (m.bias != nullptr) {
      std::memcpy(bias, m.bias + block, (end - block) * sizeof(float));
    }
    for (int64_t first = 0; first < m.depth; first += most) {
      const int64_t depth = std::min(most, m.depth - first);
      for (int64_t j = block; j < end; j += kPanel<kLanes>) {
        const Strided b{m.b.data + j * m.b.row + first * m.b.column, m.b.row, m.b.column};
        pack<kLanes>(b, std::min(kPanel<kLanes>, end - j), depth, packed + (j - block) * depth);
      }
      for (int64_t i = 0; i < m.rows; i += kTileRows) {
        const int64_t rows = std::min(kTileRows, m.rows - i);
        Strided a{m.a.data + i * m.a.row + first * m.a.column, m.a.row, m.a.column};
        if (a.column != 1 && kLanes < 16) {  // narrow tiles would read it too often
          copy_rows(a, rows, depth, copied);
          a = {copied, 1, kTileRows};
        }
        for (int64_t j = block; j < end; j += kPanel<kLanes>) {
          multiply({a, packed + (j - block) * depth, bias + j - block, m.c + i * m.c_row + j,
                    m.c_row, rows, std::min(kPanel<kLanes>, end - j), depth, first > 0});
        }
      }
    }
  }
}

}  // namespace lrn

// What a translator computes, on rows of floats. Each function is compiled once per instruction
// set.
//
// Features are padded with zeros to whole vectors. Rows of floats begin at multiples of kPanel. A
// row's results do not depend on what other rows there are: its sums have one order.
#pragma once

#include <cstdint>
#include <vector>

namespace lrn {

constexpr int64_t kPanel = 64;    // outputs whose weights are next to each other
constexpr int64_t kPad = 16;      // the longest vector
constexpr int64_t kTileRows = 6;  // with them and the tile's vectors, sums fill the registers

inline int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

struct Rows {
  float* data;
  int64_t stride;

  float* operator[](int64_t row) const { return data + row * stride; }
  Rows from(int64_t row) const { return {data + row * stride, stride}; }
};

// The type of the numbers that products multiply. They add float32, or int32 where it is int8; a
// row of features and one of weights have a scale each, by which their largest int8 is 127.
enum class ComputeType { kFloat32, kBfloat16, kInt8 };

// 32 bits, a unit, hold one feature, two or four. Rows of int8 have 128 added to each byte, as VNNI
// takes them, and their scale behind them, with room for it up to the next 16 bytes.
inline int64_t units(ComputeType type, int64_t features) {
  return type == ComputeType::kFloat32 ? features
         : type == ComputeType::kInt8  ? features / 4
                                       : features / 2;
}
inline int64_t unit_stride(ComputeType type, int64_t features) {
  return units(type, features) + (type == ComputeType::kInt8 ? 4 : 0);
}

// Writes rows of floats as rows of that type.
void convert(ComputeType type, Rows x, int64_t rows, int64_t size, Rows y);

// y = W x + b. A panel holds kPanel outputs, in rows of a number for each output:
//
//   float32, bfloat16: bias | unit 0 | unit 1 | ...
//   int8:              what takes the features' 128 away | unit 0 | unit 1 | ... | scale | bias
struct PackedLinear {
  ComputeType type;
  int64_t in, out;
  float* data;

  int64_t panels() const { return (out + kPanel - 1) / kPanel; }
  int64_t panel_size() const {
    return (units(type, in) + (type == ComputeType::kInt8 ? 3 : 1)) * kPanel;
  }
};

// Writes the weights of one output.
void pack(const PackedLinear& layer, int64_t output, const float* row, float bias);

// x has the layer's type.
void linear(const PackedLinear& layer, Rows x, int64_t rows, Rows y, bool add = false);

struct Norm {
  int64_t size;
  const float *weight, *bias;  // padded
  float eps;
};

void normalize(const Norm& norm, Rows x, int64_t rows, Rows y);

enum class Activation { kIdentity, kRelu, kGelu, kGeluTanh, kTanh };

void activate(Activation activation, Rows x, int64_t rows, int64_t size);

struct Cell {
  int64_t size;  // padded
  bool tanh, output_gate;

  int64_t parts() const { return output_gate ? 4 : 3; }
};

// The next states of rows whose projections are q | k | v (| o), given each row's last one.
void cell_step(const Cell& cell, Rows projections, int64_t rows, const float* const* states,
               Rows next);

// All states of one sentence, in both directions; projections and output are forward | backward,
// and the first states zeros.
void cell_scan(const Cell& cell, Rows projections, int64_t steps, const float* zeros, Rows output);

// The keys (heads * head, length) and values (length, heads * head) of a sentence. A feature's keys
// begin at multiples of kPad.
struct KeysValues {
  const float *keys, *values;
  int64_t length;

  static int64_t floats(int64_t length, int64_t width) {
    return width * (round_up(length, kPad) + length);
  }
};

void store_keys_values(Rows keys_values, int64_t length, int64_t width, float* to);

// Queries of one sentence look for its values; weights (rows, length), the mean of the first
// weight_heads heads', may be null. The query is scaled already.
struct Attention {
  int64_t heads, head_size;
  int64_t weight_heads;
  float* buffer;  // (kTileRows, length), of which rows begin at multiples of kPad
};

void attend(const Attention& attention, const KeysValues& sentence, Rows query, int64_t rows,
            Rows output, float* weights);

// The log-probabilities of each row's best words and of some given ones.
struct WordChoice {
  int64_t width;                  // how many of the best
  std::vector<int64_t> excluded;  // which are not among them
  const int64_t* extra;           // (rows, extras), words that are given
  int64_t extras;
  float temperature;
};

// features have the projection's type. Writes (rows, width + extras) of each; where there is no
// word, or a score is NaN, the log-probability is minus infinity. buffer has
// best_words_floats(width) for each row.
int64_t best_words_floats(int64_t width);
void best_words(const PackedLinear& projection, Rows features, int64_t rows,
                const WordChoice& choice, float* buffer, float* log_probs, int64_t* words);

}  // namespace lrn

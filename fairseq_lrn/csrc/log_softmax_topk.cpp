// The greatest log-probabilities of each row of scores, for beam search on the CPU: the row is read
// once from memory and its log-probabilities are not written.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "isa.h"
#include "library.h"
#include "lrn.h"
#include "lrn_cell.h"

namespace {

using at::Tensor;

constexpr int64_t kLanes = 64;  // several vectors: compilers unroll shorter loops instead
constexpr int64_t kDepth = 64;  // elements of a class, kLanes apart
constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Arguments {
  const float* scores;
  int64_t stride, size, k;
  at::IntArrayRef exclude;
  float* values;
  int64_t* indices;
};

// The maximum of each class of a row, kLanes classes to a block.
LRN_HD void class_maxima(const float* __restrict row, int64_t size, float* __restrict maxima) {
  for (int64_t begin = 0; begin < size; begin += kLanes * kDepth, maxima += kLanes) {
    const int64_t end = std::min(size, begin + kLanes * kDepth);
    std::fill_n(maxima, kLanes, kNone);
    int64_t j = begin;
    for (; j + kLanes <= end; j += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        maxima[lane] = row[j + lane] > maxima[lane] ? row[j + lane] : maxima[lane];
      }
    }
    for (int64_t lane = 0; j + lane < end; ++lane) {
      maxima[lane] = row[j + lane] > maxima[lane] ? row[j + lane] : maxima[lane];
    }
  }
}

LRN_HD float sum_of_exp(const float* __restrict row, int64_t size, float maximum) {
  float sums[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= size; j += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sums[lane] += lrn::exp_of_negative(row[j + lane] - maximum);
    }
  }
  float sum = 0;
  for (; j < size; ++j) {
    sum += lrn::exp_of_negative(row[j] - maximum);
  }
  for (const float lane : sums) {
    sum += lane;
  }
  return sum;
}

LRN_HD void top_rows(const Arguments& a, int64_t begin, int64_t end) {
  const int64_t block = kLanes * kDepth, classes = (a.size + block - 1) / block * kLanes;
  const int64_t needed = a.k + static_cast<int64_t>(a.exclude.size());
  std::vector<float> maxima(classes), sorted(classes);
  std::vector<std::pair<float, int64_t>> found;
  for (int64_t i = begin; i < end; ++i) {
    const float* row = a.scores + i * a.stride;
    class_maxima(row, a.size, maxima.data());
    // As many elements as are needed are no smaller than the maximum of the class of that rank.
    float threshold = kNone;
    sorted = maxima;
    if (needed <= classes) {
      std::nth_element(sorted.begin(), sorted.begin() + needed - 1, sorted.end(),
                       std::greater<float>());
      threshold = sorted[needed - 1];
    }
    const float maximum = *std::max_element(maxima.begin(), maxima.end());
    const float log_sum = std::log(sum_of_exp(row, a.size, maximum));

    found.clear();
    for (int64_t c = 0; c < classes; ++c) {
      if (maxima[c] < threshold) {
        continue;
      }
      const int64_t first = c / kLanes * block + c % kLanes;
      for (int64_t j = first; j < std::min(a.size, first + block); j += kLanes) {
        if (row[j] >= threshold &&
            std::find(a.exclude.begin(), a.exclude.end(), j) == a.exclude.end()) {
          found.emplace_back(-row[j], j);
        }
      }
    }
    const int64_t count = std::min<int64_t>(a.k, found.size());
    std::partial_sort(found.begin(), found.begin() + count, found.end());
    for (int64_t j = 0; j < a.k; ++j) {
      const float value = j < count ? -found[j].first - maximum - log_sum : kNone;
      a.values[i * a.k + j] = value == value ? value : kNone;
      a.indices[i * a.k + j] = j < count ? found[j].second : 0;
    }
  }
}

#define TOP_ROWS(suffix, attribute)                                                  \
  attribute void top_rows_##suffix(const Arguments& a, int64_t begin, int64_t end) { \
    top_rows(a, begin, end);                                                         \
  }
LRN_EACH_ISA(TOP_ROWS)

void check(const Tensor& scores, int64_t k, at::IntArrayRef exclude) {
  TORCH_CHECK(scores.dim() == 2 && scores.scalar_type() == at::kFloat,
              "log_softmax_topk: scores must be a float32 matrix");
  TORCH_CHECK(k > 0, "log_softmax_topk: k must be at least 1, but is ", k);
  TORCH_SYM_CHECK(scores.sym_size(1).sym_ge(k + static_cast<int64_t>(exclude.size())),
                  "log_softmax_topk: k and exclude must leave columns of scores, but are ", k,
                  " and ", exclude, " of ", scores.sym_size(1));
}

std::tuple<Tensor, Tensor> top_cpu(const Tensor& scores, int64_t k, at::IntArrayRef exclude) {
  check(scores, k, exclude);
  const Tensor input = lrn::rows_contiguous(scores);
  const Tensor values = at::empty({input.size(0), k}, input.options());
  const Tensor indices = at::empty({input.size(0), k}, input.options().dtype(at::kLong));
  const Arguments a{input.data_ptr<float>(),
                    input.stride(0),
                    input.size(1),
                    k,
                    exclude,
                    values.data_ptr<float>(),
                    indices.data_ptr<int64_t>()};
  const int64_t grain = std::max<int64_t>(1, 65536 / input.size(1));
  at::parallel_for(0, input.size(0), grain,
                   [&](int64_t begin, int64_t end) { LRN_PICK(top_rows, )(a, begin, end); });
  return {values, indices};
}

std::tuple<Tensor, Tensor> top_meta(const Tensor& scores, int64_t k, at::IntArrayRef exclude) {
  check(scores, k, exclude);
  const Tensor values = scores.new_empty_symint({scores.sym_size(0), k});
  return {values, at::empty_symint(values.sym_sizes(), values.options().dtype(at::kLong))};
}

}  // namespace

LRN_LIBRARY(m) {
  m.def("log_softmax_topk(Tensor scores, int k, int[] exclude=[]) -> (Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
}

LRN_LIBRARY_IMPL(CPU, m) { m.impl("log_softmax_topk", top_cpu); }

LRN_LIBRARY_IMPL(Meta, m) { m.impl("log_softmax_topk", top_meta); }

LRN_LIBRARY_IMPL(Autograd, m) {
  m.impl("log_softmax_topk", torch::autograd::autogradNotImplementedFallback());
}

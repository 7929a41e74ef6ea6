// Label-smoothed cross entropy of rows of scores on the CPU, and its gradient in their place: a row
// stays in the processor's cache from its maximum to its gradient.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "isa.h"
#include "library.h"
#include "lrn_cell.h"

namespace {

using at::Tensor;

constexpr int64_t kLanes = 64;  // several vectors: compilers unroll shorter loops instead

struct Arguments {
  float* scores;
  const int64_t* target;
  int64_t stride, size;
  double smoothing;
  double *losses, *nlls;  // of each row
};

template <typename F>
LRN_HD void each_lane(int64_t size, const F& f) {
  int64_t j = 0;
  for (; j + kLanes <= size; j += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      f(j + lane, lane);
    }
  }
  for (int64_t lane = 0; j + lane < size; ++lane) {
    f(j + lane, lane);
  }
}

LRN_HD void loss_row(const Arguments& a, int64_t row) {
  float* __restrict x = a.scores + row * a.stride;
  const float right = x[a.target[row]];
  float maxima[kLanes], sums[kLanes] = {}, totals[kLanes] = {};
  int32_t nans[kLanes] = {};
  std::fill_n(maxima, kLanes, -std::numeric_limits<float>::infinity());
  each_lane(a.size, [&](int64_t j, int64_t lane) __attribute__((always_inline)) {
    maxima[lane] = x[j] > maxima[lane] ? x[j] : maxima[lane];
    nans[lane] |= x[j] != x[j];
  });
  const float maximum = *std::max_element(maxima, maxima + kLanes);
  each_lane(a.size, [&](int64_t j, int64_t lane) __attribute__((always_inline)) {
    const float below = x[j] - maximum;
    sums[lane] += below;
    x[j] = lrn::exp_of_negative(below);
    totals[lane] += x[j];
  });
  double sum = 0, total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sum += sums[lane];
    total += totals[lane];
  }
  const bool nan = std::any_of(nans, nans + kLanes, [](int32_t found) { return found != 0; });
  if (nan || std::isinf(maximum)) {  // the exponential is always finite
    total = std::numeric_limits<double>::quiet_NaN();
  }
  // Each wrong word has the probability each, the right one 1 - smoothing.
  const double size = static_cast<double>(a.size), each = a.smoothing / (size - 1);
  const double nll = std::log(total) - (static_cast<double>(right) - maximum);
  a.nlls[row] = nll;
  a.losses[row] = a.smoothing == 0
                      ? nll
                      : (1 - a.smoothing - each) * nll + each * (size * std::log(total) - sum);
  const float scale = static_cast<float>(1 / total), shift = static_cast<float>(each);
  each_lane(a.size, [&](int64_t j, int64_t)
                        __attribute__((always_inline)) { x[j] = x[j] * scale - shift; });
  x[a.target[row]] -= static_cast<float>(1 - a.smoothing - each);
}

LRN_HD void loss_rows(const Arguments& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    loss_row(a, row);
  }
}

#define LOSS_ROWS(suffix, attribute)                                                  \
  attribute void loss_rows_##suffix(const Arguments& a, int64_t begin, int64_t end) { \
    loss_rows(a, begin, end);                                                         \
  }
LRN_EACH_ISA(LOSS_ROWS)

void check(const Tensor& scores, const Tensor& target) {
  TORCH_CHECK(scores.dim() == 2 && scores.scalar_type() == at::kFloat,
              "cross_entropy_: scores must be a float32 matrix");
  TORCH_SYM_CHECK(scores.sym_stride(1).sym_eq(1),
                  "cross_entropy_: rows of scores must be contiguous");
  TORCH_CHECK(target.dim() == 1 && target.scalar_type() == at::kLong,
              "cross_entropy_: target must be an int64 vector");
  TORCH_CHECK(target.device() == scores.device(), "cross_entropy_: target must be on ",
              scores.device(), ", got ", target.device());
  TORCH_SYM_CHECK(target.sym_size(0).sym_eq(scores.sym_size(0)),
                  "cross_entropy_: target must have a word for each row of scores");
  TORCH_SYM_CHECK(scores.sym_size(1).sym_ge(2),
                  "cross_entropy_: scores must have at least 2 columns");
  TORCH_SYM_CHECK(
      scores.sym_size(0).sym_le(1).sym_or(scores.sym_stride(0).sym_ge(scores.sym_size(1))),
      "cross_entropy_: rows of scores must not overlap");
}

std::tuple<Tensor, Tensor> cross_entropy_cpu(Tensor& scores, const Tensor& target,
                                             double smoothing) {
  check(scores, target);
  const Tensor words = target.contiguous();
  const int64_t rows = scores.size(0), size = scores.size(1);
  std::vector<double> losses(rows), nlls(rows);
  const Arguments a{scores.data_ptr<float>(),
                    words.const_data_ptr<int64_t>(),
                    scores.stride(0),
                    size,
                    smoothing,
                    losses.data(),
                    nlls.data()};
  for (int64_t row = 0; row < rows; ++row) {
    TORCH_CHECK_INDEX(0 <= a.target[row] && a.target[row] < size,
                      "cross_entropy_: target must be from 0 to ", size - 1, ", got ",
                      a.target[row]);
  }
  const int64_t grain = std::max<int64_t>(1, 65536 / size);
  at::parallel_for(0, rows, grain,
                   [&](int64_t begin, int64_t end) { LRN_PICK(loss_rows, )(a, begin, end); });
  const auto sum = [&scores](const std::vector<double>& values) {
    double total = 0;
    for (const double value : values) {
      total += value;
    }
    return at::empty({}, scores.options()).fill_(total);
  };
  return {sum(losses), sum(nlls)};
}

std::tuple<Tensor, Tensor> cross_entropy_meta(Tensor& scores, const Tensor& target, double) {
  check(scores, target);
  return {at::empty({}, scores.options()), at::empty({}, scores.options())};
}

// Tells autograd that the scores have changed; PyTorch's fallback does if they are returned.
std::tuple<Tensor, Tensor> cross_entropy_autograd(Tensor& scores, const Tensor& target,
                                                  double smoothing) {
  TORCH_CHECK(!(at::GradMode::is_enabled() && scores.requires_grad()),
              "cross_entropy_: scores must not require a gradient, which takes their place");
  static const auto op = lrn::op<decltype(cross_entropy_autograd)>("fairseq_lrn::cross_entropy_");
  const at::AutoDispatchBelowADInplaceOrView guard;
  auto result = op.call(scores, target, smoothing);
  if (!scores.is_inference()) {
    scores.unsafeGetTensorImpl()->bump_version();
  }
  return result;
}

}  // namespace

LRN_LIBRARY(m) {
  m.def(
      "cross_entropy_(Tensor(a!) scores, Tensor target, float label_smoothing) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

LRN_LIBRARY_IMPL(CPU, m) { m.impl("cross_entropy_", cross_entropy_cpu); }

LRN_LIBRARY_IMPL(Meta, m) { m.impl("cross_entropy_", cross_entropy_meta); }

LRN_LIBRARY_IMPL(Autograd, m) { m.impl("cross_entropy_", cross_entropy_autograd); }

#include "beam_search.h"

#include <ATen/ops/empty.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <utility>

#include "library.h"

namespace lrn {

constexpr float kDead = -std::numeric_limits<float>::infinity();

void BeamSearch::start(const SearchOptions& options, int64_t sentences,
                       std::vector<int64_t> prefix) {
  options_ = options;
  prefix_ = std::move(prefix);
  prefix_length_ = sentences == 0 ? 0 : static_cast<int64_t>(prefix_.size()) / sentences;
  step_ = first_row_ = previous_first_row_ = 0;
  going_.resize(sentences);
  for (int64_t i = 0; i < sentences; ++i) {
    going_[i] = i;
  }
  rows_.assign(sentences, {-1, options.bos, 0});
  ended_count_.assign(sentences, 0);
  ended_.clear();
  plan_candidates();
}

// The word that a sentence's hypotheses must go on with, or -1.
int64_t BeamSearch::forced_word(int64_t sentence) const {
  if (step_ >= options_.max_length) {
    return options_.eos;
  }
  if (step_ < prefix_length_) {
    const int64_t word = prefix_[sentence * prefix_length_ + step_];
    return word == options_.pad ? -1 : word;
  }
  return -1;
}

// Says which candidates the next step needs.
void BeamSearch::plan_candidates() {
  const bool last = step_ >= options_.max_length, in_prefix = !last && step_ < prefix_length_;
  width_ = last ? 0 : most_words();
  forces_ = last || in_prefix;
  excluded_.assign({options_.pad});
  if (step_ < options_.min_length && !in_prefix) {
    excluded_.push_back(options_.eos);
  }
  if (penalizes_unk()) {  // it may be among the best only without its penalty
    excluded_.push_back(options_.unk);
  }
  extra_words_.clear();
  for (const int64_t sentence : going_) {
    const int64_t word = forced_word(sentence);
    for (int64_t row = 0; row < rows_per_sentence(); ++row) {
      if (penalizes_unk()) {
        extra_words_.push_back(options_.unk);
      }
      if (forces_) {
        extra_words_.push_back(word < 0 ? options_.pad : word);
      }
    }
  }
}

// Sets candidates_ to those of the sentence going_[place], the best 2 * beam_size first.
void BeamSearch::collect(int64_t place, const float* log_probs, const int64_t* words) {
  const int64_t per = rows_per_sentence(), columns = width_ + extras_per_row();
  const int64_t forced = forced_word(going_[place]);
  // The last column has words that are forced. As fairseq does, a prefix that ends the sentence
  // copies its first row over the others.
  const int64_t begin = forced < 0 ? 0 : columns - 1;
  const int64_t end = forces_ && forced < 0 ? columns - 1 : columns;
  const bool copies_first = forced == options_.eos && step_ < options_.max_length;
  candidates_.clear();
  for (int64_t i = place * per; i < (place + 1) * per; ++i) {
    const int64_t row = copies_first ? place * per : i;
    for (int64_t column = begin; column < end; ++column) {
      const int64_t word = words[row * columns + column];
      float log_prob = log_probs[row * columns + column];
      if (word == options_.unk) {
        log_prob -= static_cast<float>(options_.unk_penalty);
      }
      const float total = rows_[first_row_ + row].total + log_prob;
      if (total > kDead) {
        const int64_t order = candidates_.size();
        candidates_.push_back({total, word, first_row_ + row, order});
      }
    }
  }
  const size_t count = std::min<size_t>(candidates_.size(), 2 * options_.beam_size);
  std::partial_sort(candidates_.begin(), candidates_.begin() + count, candidates_.end(),
                    [](const Candidate& a, const Candidate& b) {
                      return a.total != b.total ? a.total > b.total : a.order < b.order;
                    });
  candidates_.resize(count);
}

void BeamSearch::advance(const float* log_probs, const int64_t* words) {
  const int64_t beam = options_.beam_size, places = going_.size();
  const int64_t next = rows_.size();
  const float norm =
      options_.normalize_scores
          ? static_cast<float>(std::pow(static_cast<double>(step_ + 1), options_.length_penalty))
          : 1.0f;
  int64_t kept = 0;
  for (int64_t place = 0; place < places; ++place) {
    const int64_t sentence = going_[place];
    collect(place, log_probs, words);
    const int64_t count = candidates_.size();
    const auto ends = [&](const Candidate& c) { return c.word == options_.eos; };

    // only the best beam_size of the candidates can end a hypothesis
    for (int64_t i = 0; i < std::min(beam, count); ++i) {
      const Candidate& c = candidates_[i];
      if (ends(c) && ended_count_[sentence] < beam) {
        ended_.push_back({sentence, c.row, c.total, step_ + 1, c.total / norm});
        ++ended_count_[sentence];
      }
    }
    if (ended_count_[sentence] == beam || step_ >= options_.max_length) {
      continue;
    }
    // the best beam_size of the others go on
    const int64_t rows_before = rows_.size();
    for (const Candidate& c : candidates_) {
      if (!ends(c) && static_cast<int64_t>(rows_.size()) - rows_before < beam) {
        rows_.push_back({c.row, c.word, c.total});
      }
    }
    if (static_cast<int64_t>(rows_.size()) == rows_before) {
      continue;  // there is none
    }
    // dead rows fill up, so that each sentence has beam_size
    rows_.resize(rows_before + beam,
                 {first_row_ + place * rows_per_sentence(), options_.pad, kDead});
    going_[kept++] = sentence;
  }
  going_.resize(kept);
  previous_first_row_ = first_row_;
  first_row_ = next;
  ++step_;
  if (!done()) {
    plan_candidates();
  }
}

Hypotheses BeamSearch::hypotheses() const {
  std::vector<const Ended*> order;
  int64_t size = 0;
  for (const Ended& ended : ended_) {
    order.push_back(&ended);
    size += ended.length;
  }
  std::stable_sort(order.begin(), order.end(), [](const Ended* a, const Ended* b) {
    return a->sentence != b->sentence ? a->sentence < b->sentence : a->score > b->score;
  });
  Hypotheses result;
  result.counts = ended_count_;
  result.words.resize(size);
  result.log_probs.resize(size);
  result.rows.resize(size);
  int64_t end = 0;
  for (const Ended* ended : order) {
    result.lengths.push_back(ended->length);
    result.scores.push_back(ended->score);
    end += ended->length;
    int64_t row = ended->row, word = options_.eos;
    float total = ended->total;
    for (int64_t i = end - 1; row >= 0; --i) {
      const Row& before = rows_[row];
      result.words[i] = word;
      result.log_probs[i] = total - before.total;
      result.rows[i] = row;
      word = before.word;
      total = before.total;
      row = before.parent;
    }
  }
  return result;
}

}  // namespace lrn

namespace {

using at::Tensor;

template <typename T>
Tensor to_tensor(const std::vector<T>& values) {
  const int64_t size = values.size();
  const Tensor result = at::empty({size}, c10::CppTypeToScalarType<T>::value);
  std::copy_n(values.data(), size, result.template data_ptr<T>());
  return result;
}

// The search for steps that PyTorch makes; see fairseq_lrn/inference/generator.py.
struct BeamSearchHolder : torch::CustomClassHolder {
  BeamSearchHolder(int64_t sentences, int64_t beam_size, int64_t min_length, int64_t max_length,
                   int64_t bos, int64_t pad, int64_t eos, int64_t unk, double unk_penalty,
                   double length_penalty, bool normalize_scores,
                   const std::optional<Tensor>& prefix) {
    TORCH_CHECK(sentences >= 0 && beam_size > 0 && min_length >= 0 && min_length <= max_length,
                "BeamSearch: sentences, beam_size and lengths must not be negative, and min_length "
                "must not be above max_length");
    constexpr int64_t kMost = int64_t{1} << 31;
    TORCH_CHECK(beam_size < kMost && sentences < kMost / beam_size,
                "BeamSearch: sentences times beam_size must be less than ", kMost, ", got ",
                sentences, " and ", beam_size);
    std::vector<int64_t> words;
    if (prefix) {
      TORCH_CHECK(prefix->dim() == 2 && prefix->size(0) == sentences,
                  "BeamSearch: prefix must be (sentences, length)");
      const Tensor p = prefix->to(at::kCPU, at::kLong).contiguous();
      words.assign(p.const_data_ptr<int64_t>(), p.const_data_ptr<int64_t>() + p.numel());
    }
    search.start({beam_size, min_length, max_length, bos, pad, eos, unk, unk_penalty,
                  length_penalty, normalize_scores},
                 sentences, std::move(words));
  }

  bool advance(const Tensor& log_probs, const Tensor& words) {
    const int64_t columns = search.width() + search.extras_per_row();
    TORCH_CHECK(log_probs.sizes() == at::IntArrayRef({search.rows(), columns}) &&
                    words.sizes() == log_probs.sizes(),
                "BeamSearch.advance: log_probs and words must be (", search.rows(), ", ", columns,
                "), got ", log_probs.sizes(), " and ", words.sizes());
    const Tensor p = log_probs.to(at::kCPU, at::kFloat).contiguous();
    const Tensor w = words.to(at::kCPU, at::kLong).contiguous();
    search.advance(p.const_data_ptr<float>(), w.const_data_ptr<int64_t>());
    return !search.done();
  }

  // Of the rows of this step the words and, for all but the first step, the rows that they follow.
  std::tuple<Tensor, Tensor> rows() const {
    const Tensor words = at::empty({search.rows()}, at::kLong);
    const Tensor parents = at::empty({search.rows()}, at::kLong);
    for (int64_t i = 0; i < search.rows(); ++i) {
      words.data_ptr<int64_t>()[i] = search.row()[i].word;
      parents.data_ptr<int64_t>()[i] = search.row()[i].parent - search.previous_first_row();
    }
    return {words, parents};
  }

  // beam_size, and the most best words, extra words and excluded words of any step.
  std::tuple<int64_t, int64_t, int64_t, int64_t> sizes() const {
    return {search.beam_size(), search.most_words(), lrn::BeamSearch::kMostExtras,
            lrn::BeamSearch::kMostExcluded};
  }

  Tensor extra() const {
    return to_tensor(search.extra_words()).view({search.rows(), search.extras_per_row()});
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> hypotheses() const {
    const lrn::Hypotheses h = search.hypotheses();
    return {to_tensor(h.counts), to_tensor(h.lengths),   to_tensor(h.scores),
            to_tensor(h.words),  to_tensor(h.log_probs), to_tensor(h.rows)};
  }

  lrn::BeamSearch search;
};

}  // namespace

LRN_LIBRARY(m) {
  m.class_<BeamSearchHolder>("BeamSearch")
      .def(torch::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                       double, double, bool, const std::optional<Tensor>&>())
      .def("advance", &BeamSearchHolder::advance)
      .def("rows", &BeamSearchHolder::rows)
      .def("sizes", &BeamSearchHolder::sizes)
      .def("width",
           [](const c10::intrusive_ptr<BeamSearchHolder>& self) { return self->search.width(); })
      .def("excluded",
           [](const c10::intrusive_ptr<BeamSearchHolder>& self) { return self->search.excluded(); })
      .def("extra", &BeamSearchHolder::extra)
      .def("hypotheses", &BeamSearchHolder::hypotheses);
}

// Beam search over candidates: it knows words and their scores, but no model.
//
// A step of the search has rows: one hypothesis each, those of a sentence next to each other. At
// first a sentence has one row, then beam_size of them. For each row the caller finds candidates,
// the best next words; advance() takes them and picks the rows of the next step.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace lrn {

struct SearchOptions {
  int64_t beam_size;
  int64_t min_length, max_length;  // of a hypothesis without its </s>
  int64_t bos, pad, eos, unk;
  double unk_penalty, length_penalty;
  bool normalize_scores;  // by the length to the power of length_penalty
};

// A row that the search has seen, numbered from 0 over all steps.
struct Row {
  int64_t parent;  // the row of the step before that it continues, -1 at first
  int64_t word;    // the last word, which the model reads next
  float total;     // sum of the log-probabilities; of a dead row minus infinity
};

// Of hypotheses, a sentence's next to each other and the best first.
struct Hypotheses {
  std::vector<int64_t> counts;   // of each sentence
  std::vector<int64_t> lengths;  // of each hypothesis, with </s>, and its score
  std::vector<float> scores;
  std::vector<int64_t> words;  // of each position, with the row that it came from
  std::vector<float> log_probs;
  std::vector<int64_t> rows;
};

class BeamSearch {
 public:
  // Begins to search. prefix has the first words of each sentence's hypotheses, (sentences, its
  // length), padded on the right. Memory of an earlier search is used again.
  void start(const SearchOptions& options, int64_t sentences, std::vector<int64_t> prefix = {});

  bool done() const { return going_.empty(); }
  int64_t beam_size() const { return options_.beam_size; }

  // The sentences that have rows in this step, by their numbers.
  const std::vector<int64_t>& going() const { return going_; }
  int64_t rows_per_sentence() const { return step_ == 0 ? 1 : options_.beam_size; }
  // The rows of this step, and the numbers of the first of them and of the first of the step
  // before.
  int64_t rows() const { return static_cast<int64_t>(rows_.size()) - first_row_; }
  const Row* row() const { return rows_.data() + first_row_; }
  int64_t first_row() const { return first_row_; }
  int64_t previous_first_row() const { return previous_first_row_; }

  // The most that width, extras_per_row and excluded can be at any step. With one row its best word
  // is enough: if that is </s>, the sentence is done.
  int64_t most_words() const { return options_.beam_size == 1 ? 1 : 2 * options_.beam_size; }
  static constexpr int64_t kMostExtras = 2, kMostExcluded = 3;

  // The candidates of each row: its `width` best words, without those `excluded`, then as many of
  // the `extra_words`, which are given row by row.
  int64_t width() const { return width_; }
  const std::vector<int64_t>& excluded() const { return excluded_; }
  int64_t extras_per_row() const { return (penalizes_unk() ? 1 : 0) + (forces_ ? 1 : 0); }
  const std::vector<int64_t>& extra_words() const { return extra_words_; }

  // Takes the candidates, (rows, width + extras_per_row). Those with a log-probability of minus
  // infinity or NaN are none.
  void advance(const float* log_probs, const int64_t* words);

  Hypotheses hypotheses() const;

 private:
  struct Candidate {
    float total;
    int64_t word, row, order;
  };
  struct Ended {
    int64_t sentence, row;
    float total;
    int64_t length;
    float score;
  };

  bool penalizes_unk() const { return options_.unk_penalty != 0 && width_ > 0; }
  int64_t forced_word(int64_t sentence) const;
  void plan_candidates();
  void collect(int64_t place, const float* log_probs, const int64_t* words);

  SearchOptions options_{};
  std::vector<int64_t> prefix_;
  int64_t prefix_length_ = 0;

  int64_t step_ = 0, first_row_ = 0, previous_first_row_ = 0;
  std::vector<int64_t> going_;
  std::vector<Row> rows_;  // of all steps
  std::vector<int64_t> ended_count_;
  std::vector<Ended> ended_;

  int64_t width_ = 0;
  bool forces_ = false;  // at least one row is given its next word
  std::vector<int64_t> excluded_, extra_words_;
  std::vector<Candidate> candidates_;
};

}  // namespace lrn

// Translates with a trained model `lrn` on the CPU: the encoder, the decoder's step, and both in a
// beam search without anything but arithmetic between its steps.
#pragma once

#include <ATen/core/Dict.h>
#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "beam_search.h"
#include "translator_kernels.h"

namespace lrn {

// Weights by their names in the model's state_dict, a Linear's or LayerNorm's as those of a module.
using Weights = c10::Dict<std::string, at::Tensor>;

class Packer;

// KeysValues at addresses that vectors like, in huge pages; it grows and keeps nothing.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();

  float* floats(int64_t size);

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

struct Embedding {
  at::Tensor weight;  // (words, width)
  float scale;
};

struct FeedForward {
  Norm norm;
  PackedLinear fc1, fc2;
};

struct EncoderLayer {
  Norm rnn_norm;
  PackedLinear rnn, rnn_out;
  FeedForward ffn;
};

struct DecoderLayer {
  Norm rnn_norm;
  PackedLinear rnn, rnn_out;
  Norm attention_norm;
  PackedLinear query, keys_values, attention_out;
  FeedForward ffn;
};

// Sentences without their padding, one after another.
struct Sentences {
  std::vector<int64_t> words;
  std::vector<int64_t> places;     // of each word in the padded sentence
  std::vector<int64_t> begins{0};  // of each sentence, and the end of the last

  int64_t count() const { return static_cast<int64_t>(begins.size()) - 1; }
  int64_t length(int64_t i) const { return begins[i + 1] - begins[i]; }
  void add(const Sentences& others, int64_t i);
};

// Keys and values of a sentence, of all layers.
struct SentenceKeysValues {
  const float* data;
  int64_t layer_stride, length;

  KeysValues layer(int64_t index, int64_t width) const {
    const float* keys = data + index * layer_stride;
    return {keys, keys + width * round_up(length, kPad), length};
  }
};

// One step of the decoder for the rows of some sentences, `beams` rows each.
struct DecoderStep {
  int64_t beams;
  std::vector<const SentenceKeysValues*> keys_values;  // of the sentences
  std::vector<int64_t> words;                          // of the rows, which are read
  const float* states = nullptr;                       // (layers, old rows, state), zeros if null
  int64_t old_rows = 0;
  std::vector<int64_t> parents;  // of each row the old one
  float* next = nullptr;         // (layers, rows, state)

  // whose attention to keep: of each row a place for its weights, or none
  int64_t attention_layer = -1, attention_heads = 0;
  std::vector<float*> attention;

  int64_t rows() const { return static_cast<int64_t>(words.size()); }
};

// Buffers of one thread.
struct Scratch {
  Buffer x, normed, wide, narrow, attention, units;
  std::vector<const float*> states;
  std::vector<float> zeros;
};

class Translator;

// Searches for the translations of some sentences, with buffers that other work may borrow: it
// encodes them, then goes step by step.
class Worker {
 public:
  Scratch& scratch() { return scratch_; }
  void start(const Translator* translator, const SearchOptions& options, Sentences sentences,
             std::vector<int64_t> prefix, float temperature);
  bool done() const { return encoded_ && search_.done(); }
  void advance();

  const BeamSearch& search() const { return search_; }
  const Sentences& sentences() const { return sentences_; }
  // Attention of a row that the search has seen, to the words of its sentence.
  const float* attention(int64_t row) const { return attention_.data() + attention_begin_[row]; }

 private:
  void encode();
  void step();
  void prepare_step();

  const Translator* translator_ = nullptr;
  Sentences sentences_;
  BeamSearch search_;
  bool encoded_ = false;

  std::vector<SentenceKeysValues> keys_values_;
  DecoderStep step_;
  WordChoice choice_;
  std::vector<float> log_probs_, attention_;
  std::vector<int64_t> words_, attention_begin_;
  Buffer keys_values_buffer_, states_[2], features_, best_;
  bool odd_ = false;  // which states the last step wrote
  Scratch scratch_;
};

// The search of a batch.
class Translation : public torch::CustomClassHolder {
 public:
  Translation(c10::intrusive_ptr<Translator> translator, const SearchOptions& options,
              const at::Tensor& src_tokens, const std::optional<at::Tensor>& prefix,
              double temperature);
  ~Translation() override;

  // Of sentences the number of hypotheses; of these the lengths and scores, the best of a sentence
  // first; of their words the ids, log-probabilities and attention (words, source length).
  using Found = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

  // Goes on until the end or for some seconds, but not within a step; returns what it found, or
  // nothing if there is more to do.
  std::optional<Found> advance(double seconds);

 private:
  Found hypotheses() const;

  c10::intrusive_ptr<Translator> translator_;
  int64_t sentences_, length_;
  std::vector<std::unique_ptr<Worker>> workers_;  // worker i % workers has sentence i
  std::mutex mutex_;                              // threads advance one after the other
};

struct TranslatorSettings {
  std::string activation, activation_fn;  // of the recurrence, of the feed-forward layers
  bool output_gate;
  int64_t heads;
  double encoder_scale, decoder_scale;  // of the embeddings
  int64_t pad;
  int64_t attention_layer, attention_heads;  // whose attention hypotheses have, the heads' mean
  std::string compute_type;                  // of the products
};

class Translator : public torch::CustomClassHolder {
 public:
  Translator(const Weights& weights, const TranslatorSettings& settings);

  int64_t layers() const { return static_cast<int64_t>(decoder_.size()); }
  int64_t target_words() const { return target_.weight.size(0); }

  // As the model's encoder: (sentences, length) to (length, sentences, width), zeros at padding.
  at::Tensor encode(const at::Tensor& src_tokens) const;

  // Keys and values that step() takes, (layers, 1, sentences, floats), of the encoder's output and
  // its padding.
  at::Tensor project(const at::Tensor& encoder_out,
                     const std::optional<at::Tensor>& padding_mask) const;

  // As the model's decoder for one word of each row (rows), those of a sentence next to each other.
  // states are (layers, rows, padded width), none at first. Returns features (rows, width), states,
  // and one layer's attention, the mean of some heads', (rows, length).
  std::tuple<at::Tensor, at::Tensor, std::optional<at::Tensor>> step(
      const at::Tensor& words, const at::Tensor& keys_values,
      const std::optional<at::Tensor>& padding_mask, int64_t length,
      const std::optional<at::Tensor>& states, int64_t layer, int64_t heads) const;

  Sentences read(const at::Tensor& src_tokens) const;

  // The encoder's output of all words.
  Rows encode(const Sentences& sentences, Scratch& scratch) const;

  // Keys and values of a sentence, from its rows of the encoder's output.
  int64_t keys_values_floats(int64_t length) const;
  void project(Rows encoder_out, int64_t length, float* keys_values, int64_t layer_stride,
               Scratch& scratch) const;

  // Features of the rows of sentences [begin, end).
  void decode(const DecoderStep& step, int64_t begin, int64_t end, Rows features,
              Scratch& scratch) const;

  // Rows of a product's features in its type: x itself, or in the scratch's units.
  Rows convert(Rows x, int64_t rows, int64_t size, Scratch& scratch) const;

  const PackedLinear& projection() const { return projection_; }
  int64_t state_size() const { return decoder_cell_.size; }
  int64_t width() const { return decoder_norm_.size; }
  int64_t attention_layer() const { return attention_layer_; }
  int64_t attention_heads() const { return attention_heads_; }

  std::unique_ptr<Worker> take_worker() const;
  void give_back(std::unique_ptr<Worker> worker) const;

 private:
  void encode_block(const EncoderLayer& layer, const Sentences& sentences, int64_t begin,
                    int64_t end, Rows x, Scratch& scratch) const;
  void decode_block(int64_t layer, const DecoderStep& step, int64_t begin, int64_t end, Rows x,
                    Scratch& scratch) const;
  void feed_forward(const FeedForward& layer, Rows x, int64_t rows, Scratch& scratch) const;
  template <typename F>
  void for_each_part(int64_t count, const F& f) const;

  ComputeType compute_type_;
  Activation activation_fn_;
  int64_t heads_, head_size_, pad_, attention_layer_, attention_heads_;
  Cell encoder_cell_, decoder_cell_;
  Embedding source_, target_;
  std::vector<EncoderLayer> encoder_;
  Norm encoder_norm_;
  std::vector<DecoderLayer> decoder_;
  Norm decoder_norm_;
  PackedLinear projection_;
  std::vector<std::unique_ptr<Buffer>> packed_;

  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Worker>> workers_;  // that wait for sentences
};

// One of the products alone, to test and to time.
class Product : public torch::CustomClassHolder {
 public:
  Product(const at::Tensor& weight, const at::Tensor& bias, const std::string& compute_type);

  // (rows, in) to (rows, out)
  at::Tensor forward(const at::Tensor& x) const;

 private:
  int64_t in_, out_;
  std::vector<std::unique_ptr<Buffer>> packed_;
  PackedLinear layer_;
};

}  // namespace lrn

#include "translator.h"

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <new>
#include <set>
#include <utility>

#include "library.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lrn {

using at::Tensor;

constexpr int64_t kBlock = 60;         // rows that stay in the nearest caches through a layer
constexpr int64_t kWorkerRows = 1024;  // of a worker: a step takes part of a second
constexpr int64_t kWorkerWords = 4096;
constexpr int64_t kHugePage = 1 << 21;

namespace {

int64_t row_stride(int64_t size) { return round_up(size, kPanel); }

Rows rows_of(Buffer& buffer, int64_t rows, int64_t size) {
  return {buffer.floats(rows * row_stride(size)), row_stride(size)};
}

// Writes embeddings of words, padded with zeros.
void embed(const Embedding& embedding, const int64_t* words, int64_t rows, Rows x) {
  const int64_t size = embedding.weight.size(1);
  const float* weight = embedding.weight.const_data_ptr<float>();
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = weight + words[row] * size;
    float* to = x[row];
    for (int64_t i = 0; i < size; ++i) {
      to[i] = from[i] * embedding.scale;
    }
    std::fill(to + size, to + round_up(size, kPad), 0.0f);
  }
}

// Asks for the keys and values of a sentence, which are read after those of the one before.
void prefetch(const KeysValues& sentence, int64_t width) {
  const float* end = sentence.keys + KeysValues::floats(sentence.length, width);
  for (const float* line = sentence.keys; line < end; line += 16) {
    __builtin_prefetch(line);
  }
}

}  // namespace

Buffer::~Buffer() { ::operator delete(data_, std::align_val_t(kHugePage)); }

float* Buffer::floats(int64_t size) {
  if (size > size_) {
    ::operator delete(data_, std::align_val_t(kHugePage));
    data_ = nullptr;
    size_ = 0;
    const int64_t bytes = round_up(size * sizeof(float) * 5 / 4, 64);
    data_ = static_cast<float*>(::operator new(bytes, std::align_val_t(kHugePage)));
    size_ = bytes / static_cast<int64_t>(sizeof(float));
#if defined(__linux__)
    madvise(data_, bytes, MADV_HUGEPAGE);
#endif
  }
  return data_;
}

void Sentences::add(const Sentences& others, int64_t i) {
  const int64_t begin = others.begins[i], end = others.begins[i + 1];
  words.insert(words.end(), others.words.begin() + begin, others.words.begin() + end);
  places.insert(places.end(), others.places.begin() + begin, others.places.begin() + end);
  begins.push_back(words.size());
}

// Takes weights by name, checks them and packs them.
class Packer {
 public:
  // `count` times `size` features, each time padded for itself: gates, directions, heads.
  struct Parts {
    int64_t count, size;

    int64_t total() const { return count * size; }
    int64_t padded() const { return count * round_up(size, kPad); }
    int64_t place(int64_t i) const { return i / size * round_up(size, kPad) + i % size; }
  };

  Packer(const Weights& weights, ComputeType type, std::vector<std::unique_ptr<Buffer>>& packed)
      : weights_(weights), type_(type), packed_(packed) {}

  bool has(const std::string& name) const { return weights_.contains(name); }

  Tensor take(const std::string& name, at::IntArrayRef sizes) {
    const Tensor weight = find(name, sizes.size());
    TORCH_CHECK_VALUE(weight.sizes() == sizes, "Translator: ", name, " must have shape ", sizes,
                      ", got ", weight.sizes());
    return weight;
  }

  Tensor find(const std::string& name, int64_t dim) {
    TORCH_CHECK_VALUE(has(name), "Translator: weights must have ", name);
    const Tensor weight = weights_.at(name).detach();
    TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat && weight.device().is_cpu(),
                     "Translator: ", name, " must be float32 on the CPU, got ",
                     weight.scalar_type(), " on ", weight.device());
    TORCH_CHECK_VALUE(weight.dim() == dim, "Translator: ", name, " must have ", dim,
                      " dimensions, got ", weight.dim());
    taken_.insert(name);
    return weight.contiguous();
  }

  Norm norm(const std::string& name, int64_t size) {
    Norm norm{size, nullptr, nullptr, take(name + ".eps", at::IntArrayRef{}).item<float>()};
    norm.weight = padded(take(name + ".weight", {size}));
    norm.bias = padded(take(name + ".bias", {size}));
    return norm;
  }

  // One layer of Linear modules that read the same features. Outputs that only fill the last panel
  // have filling_bias: words that there are not score minus infinity.
  PackedLinear linear(const std::vector<std::string>& names, Parts out, Parts in, float scale = 1,
                      const std::string& suffix = "", float filling_bias = 0) {
    const int64_t count = names.size();
    PackedLinear layer{type_, in.padded(), count * out.padded(), nullptr};
    // 128 * 127 * 2^17 < 2^31: no sum overflows
    TORCH_CHECK_VALUE(type_ != ComputeType::kInt8 || layer.in <= 1 << 17, "Translator: ", names[0],
                      " must have at most 131072 inputs for int8, got ", layer.in);
    layer.data = memory(layer.panels() * layer.panel_size());
    std::vector<float> row(layer.in);
    for (int64_t i = 0; filling_bias != 0 && i < layer.panels() * kPanel; ++i) {
      pack(layer, i, row.data(), filling_bias);
    }
    for (int64_t part = 0; part < count; ++part) {
      const Tensor weight = take(names[part] + ".weight" + suffix, {out.total(), in.total()});
      const std::string bias_name = names[part] + ".bias" + suffix;
      Tensor bias;
      if (has(bias_name)) {
        bias = take(bias_name, {out.total()});
      }
      const float* from = weight.const_data_ptr<float>();
      for (int64_t i = 0; i < out.total(); ++i) {
        for (int64_t j = 0; j < in.total(); ++j) {
          row[in.place(j)] = *from++ * scale;
        }
        pack(layer, part * out.padded() + out.place(i), row.data(),
             bias.defined() ? bias.const_data_ptr<float>()[i] * scale : 0);
      }
    }
    return layer;
  }

  void finish() const {
    for (const auto& item : weights_) {
      TORCH_CHECK_VALUE(taken_.count(item.key()) > 0, "Translator: weights must not have ",
                        item.key());
    }
  }

 private:
  // Zeros, next to what was taken before.
  float* memory(int64_t size) {
    size = round_up(size, kPad);
    if (size > left_) {
      left_ = std::max<int64_t>(size, kHugePage);
      packed_.push_back(std::make_unique<Buffer>());
      next_ = packed_.back()->floats(left_);
    }
    float* result = next_;
    next_ += size;
    left_ -= size;
    std::fill_n(result, size, 0.0f);
    return result;
  }

  const float* padded(const Tensor& x) {
    float* result = memory(x.numel());
    std::copy_n(x.const_data_ptr<float>(), x.numel(), result);
    return result;
  }

  const Weights& weights_;
  ComputeType type_;
  std::vector<std::unique_ptr<Buffer>>& packed_;
  std::set<std::string> taken_;
  float* next_ = nullptr;
  int64_t left_ = 0;
};

namespace {

Activation parse_activation(const std::string& name) {
  const std::pair<const char*, Activation> known[] = {{"linear", Activation::kIdentity},
                                                      {"relu", Activation::kRelu},
                                                      {"gelu", Activation::kGelu},
                                                      {"gelu_accurate", Activation::kGeluTanh},
                                                      {"tanh", Activation::kTanh}};
  for (const auto& [word, activation] : known) {
    if (name == word) {
      return activation;
    }
  }
  TORCH_CHECK_VALUE(false,
                    "Translator: activation_fn must be linear, relu, gelu, gelu_accurate or ",
                    "tanh, got ", name);
}

ComputeType parse_compute_type(const std::string& name) {
  const std::pair<const char*, ComputeType> known[] = {{"float32", ComputeType::kFloat32},
                                                       {"bfloat16", ComputeType::kBfloat16},
                                                       {"int8", ComputeType::kInt8}};
  for (const auto& [word, type] : known) {
    if (name == word) {
      return type;
    }
  }
  TORCH_CHECK_VALUE(false, "compute_type must be float32, bfloat16 or int8, got ", name);
}

}  // namespace

Translator::Translator(const Weights& weights, const TranslatorSettings& settings)
    : compute_type_(parse_compute_type(settings.compute_type)),
      activation_fn_(parse_activation(settings.activation_fn)),
      heads_(settings.heads),
      pad_(settings.pad),
      attention_layer_(settings.attention_layer),
      attention_heads_(settings.attention_heads) {
  TORCH_CHECK_VALUE(settings.activation == "tanh" || settings.activation == "identity",
                    "Translator: activation must be tanh or identity, got ", settings.activation);
  using Parts = Packer::Parts;
  Packer packer(weights, compute_type_, packed_);
  source_ = {packer.find("encoder.embed_tokens.weight", 2),
             static_cast<float>(settings.encoder_scale)};
  target_ = {packer.find("decoder.embed_tokens.weight", 2),
             static_cast<float>(settings.decoder_scale)};
  const int64_t encoder_width = source_.weight.size(1), width = target_.weight.size(1);
  TORCH_CHECK_VALUE(heads_ > 0 && width % heads_ == 0, "Translator: heads must divide the width, ",
                    width, ", got ", heads_);
  const Parts whole{1, width}, heads{heads_, width / heads_}, encoder_whole{1, encoder_width};
  head_size_ = heads.padded() / heads_;
  const bool tanh = settings.activation == "tanh", gate = settings.output_gate;
  encoder_cell_ = {round_up(encoder_width, kPad), tanh, gate};
  decoder_cell_ = {round_up(width, kPad), tanh, gate};

  const auto feed_forward = [&](const std::string& name, Parts features) {
    const Parts inner{1, packer.find(name + "ffn.fc1.weight", 2).size(0)};
    return FeedForward{packer.norm(name + "final_layer_norm", features.size),
                       packer.linear({name + "ffn.fc1"}, inner, features),
                       packer.linear({name + "ffn.fc2"}, features, inner)};
  };
  for (int64_t i = 0;; ++i) {
    const std::string name = "encoder.layers." + std::to_string(i) + ".";
    if (!packer.has(name + "rnn.weight_ih_l0")) {
      break;
    }
    const Parts gates{2 * encoder_cell_.parts(), encoder_width}, directions{2, encoder_width};
    encoder_.push_back({packer.norm(name + "rnn_layer_norm", encoder_width),
                        packer.linear({name + "rnn"}, gates, encoder_whole, 1, "_ih_l0"),
                        packer.linear({name + "out_proj"}, encoder_whole, directions),
                        feed_forward(name, encoder_whole)});
  }
  encoder_norm_ = packer.norm("encoder.layer_norm", encoder_width);
  for (int64_t i = 0;; ++i) {
    const std::string name = "decoder.layers." + std::to_string(i) + ".";
    if (!packer.has(name + "rnn.weight_ih_l0")) {
      break;
    }
    const std::string attention = name + "encoder_attn.";
    const float scale = 1 / std::sqrt(static_cast<float>(heads.size));
    decoder_.push_back(
        {packer.norm(name + "rnn_layer_norm", width),
         packer.linear({name + "rnn"}, {decoder_cell_.parts(), width}, whole, 1, "_ih_l0"),
         packer.linear({name + "out_proj"}, whole, whole),
         packer.norm(name + "encoder_attn_layer_norm", width),
         packer.linear({attention + "q_proj"}, heads, whole, scale),
         packer.linear({attention + "k_proj", attention + "v_proj"}, heads, encoder_whole),
         packer.linear({attention + "out_proj"}, whole, heads), feed_forward(name, whole)});
  }
  TORCH_CHECK_VALUE(!encoder_.empty() && !decoder_.empty(),
                    "Translator: weights must have layers of the encoder and of the decoder");
  TORCH_CHECK_VALUE(0 <= attention_layer_ && attention_layer_ < layers() && 0 < attention_heads_ &&
                        attention_heads_ <= heads_,
                    "Translator: attention_layer must be from 0 to ", layers() - 1,
                    " and attention_heads from 1 to ", heads_, ", got ", attention_layer_, " and ",
                    attention_heads_);
  decoder_norm_ = packer.norm("decoder.layer_norm", width);
  projection_ = packer.linear({"decoder.output_projection"}, {1, target_.weight.size(0)}, whole, 1,
                              "", -std::numeric_limits<float>::infinity());
  packer.finish();
}

std::unique_ptr<Worker> Translator::take_worker() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (workers_.empty()) {
    return std::make_unique<Worker>();
  }
  std::unique_ptr<Worker> worker = std::move(workers_.back());
  workers_.pop_back();
  return worker;
}

void Translator::give_back(std::unique_ptr<Worker> worker) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  workers_.push_back(std::move(worker));
}

Rows Translator::convert(Rows x, int64_t rows, int64_t size, Scratch& scratch) const {
  if (compute_type_ == ComputeType::kFloat32) {
    return x;
  }
  const int64_t stride = unit_stride(compute_type_, size);
  const Rows y{scratch.units.floats(rows * stride), stride};
  lrn::convert(compute_type_, x, rows, size, y);
  return y;
}

// x + fc2(activation(fc1(norm(x))))
void Translator::feed_forward(const FeedForward& layer, Rows x, int64_t rows,
                              Scratch& scratch) const {
  const Rows normed = rows_of(scratch.normed, rows, layer.fc1.in);
  const Rows inner = rows_of(scratch.wide, rows, layer.fc1.out);
  normalize(layer.norm, x, rows, normed);
  linear(layer.fc1, convert(normed, rows, layer.fc1.in, scratch), rows, inner);
  activate(activation_fn_, inner, rows, layer.fc1.out);
  linear(layer.fc2, convert(inner, rows, layer.fc2.in, scratch), rows, x, true);
}

// One layer for sentences [begin, end), whose words are the rows of x.
void Translator::encode_block(const EncoderLayer& layer, const Sentences& sentences, int64_t begin,
                              int64_t end, Rows x, Scratch& scratch) const {
  const int64_t first = sentences.begins[begin], rows = sentences.begins[end] - first;
  const Rows normed = rows_of(scratch.normed, rows, layer.rnn.in);
  const Rows gates = rows_of(scratch.wide, rows, layer.rnn.out);
  const Rows states = rows_of(scratch.narrow, rows, layer.rnn_out.in);
  normalize(layer.rnn_norm, x, rows, normed);
  linear(layer.rnn, convert(normed, rows, layer.rnn.in, scratch), rows, gates);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = sentences.begins[i] - first;
    cell_scan(encoder_cell_, gates.from(row), sentences.length(i), scratch.zeros.data(),
              states.from(row));
  }
  linear(layer.rnn_out, convert(states, rows, layer.rnn_out.in, scratch), rows, x, true);
  feed_forward(layer.ffn, x, rows, scratch);
}

Rows Translator::encode(const Sentences& sentences, Scratch& scratch) const {
  const int64_t rows = sentences.begins.back();
  const Rows x = rows_of(scratch.x, rows, encoder_norm_.size);
  scratch.zeros.resize(std::max(encoder_cell_.size, decoder_cell_.size));
  embed(source_, sentences.words.data(), rows, x);
  for (const EncoderLayer& layer : encoder_) {
    for (int64_t begin = 0, end; begin < sentences.count(); begin = end) {
      const int64_t first = sentences.begins[begin];
      end = begin + 1;
      while (end < sentences.count() && sentences.begins[end + 1] - first <= kBlock) {
        ++end;
      }
      encode_block(layer, sentences, begin, end, x.from(first), scratch);
    }
  }
  normalize(encoder_norm_, x, rows, x);
  return x;
}

int64_t Translator::keys_values_floats(int64_t length) const {
  return KeysValues::floats(length, heads_ * head_size_);
}

void Translator::project(Rows encoder_out, int64_t length, float* keys_values, int64_t layer_stride,
                         Scratch& scratch) const {
  const Rows input = convert(encoder_out, length, decoder_[0].keys_values.in, scratch);
  for (int64_t i = 0; i < layers(); ++i) {
    const PackedLinear& layer = decoder_[i].keys_values;
    const Rows projections = rows_of(scratch.wide, length, layer.out);
    linear(layer, input, length, projections);
    store_keys_values(projections, length, heads_ * head_size_, keys_values + i * layer_stride);
  }
}

// One layer for the rows of sentences [begin, end), which are in x.
void Translator::decode_block(int64_t index, const DecoderStep& step, int64_t begin, int64_t end,
                              Rows x, Scratch& scratch) const {
  const DecoderLayer& layer = decoder_[index];
  const int64_t beams = step.beams, first = begin * beams, rows = (end - begin) * beams;
  const int64_t state_size = decoder_cell_.size, all_rows = step.rows();

  // recurrence: x + out(cell(norm(x)))
  const Rows normed = rows_of(scratch.normed, rows, layer.rnn.in);
  const Rows gates = rows_of(scratch.wide, rows, layer.rnn.out);
  const Rows states{step.next + (index * all_rows + first) * state_size, state_size};
  normalize(layer.rnn_norm, x, rows, normed);
  linear(layer.rnn, convert(normed, rows, layer.rnn.in, scratch), rows, gates);
  scratch.states.resize(rows);
  for (int64_t i = 0; i < rows; ++i) {
    scratch.states[i] =
        step.states == nullptr
            ? scratch.zeros.data()
            : step.states + (index * step.old_rows + step.parents[first + i]) * state_size;
  }
  cell_step(decoder_cell_, gates, rows, scratch.states.data(), states);
  linear(layer.rnn_out, convert(states, rows, layer.rnn_out.in, scratch), rows, x, true);

  // attention over the encoder: x + out(attend(query(norm(x))))
  const Rows queries = rows_of(scratch.wide, rows, layer.query.out);
  const Rows found = rows_of(scratch.narrow, rows, layer.attention_out.in);
  normalize(layer.attention_norm, x, rows, normed);
  linear(layer.query, convert(normed, rows, layer.query.in, scratch), rows, queries);
  for (int64_t i = begin; i < end; ++i) {
    const KeysValues sentence = step.keys_values[i]->layer(index, heads_ * head_size_);
    if (i + 1 < end) {
      prefetch(step.keys_values[i + 1]->layer(index, heads_ * head_size_), heads_ * head_size_);
    }
    const int64_t row = (i - begin) * beams;
    const Attention attention{
        heads_, head_size_, step.attention_heads,
        scratch.attention.floats(kTileRows * round_up(sentence.length, kPad))};
    float* weights = index == step.attention_layer ? step.attention[i] : nullptr;
    attend(attention, sentence, queries.from(row), beams, found.from(row), weights);
  }
  linear(layer.attention_out, convert(found, rows, layer.attention_out.in, scratch), rows, x, true);

  feed_forward(layer.ffn, x, rows, scratch);
}

void Translator::decode(const DecoderStep& step, int64_t begin, int64_t end, Rows features,
                        Scratch& scratch) const {
  const int64_t beams = step.beams, first = begin * beams, rows = (end - begin) * beams;
  const int64_t block = std::max<int64_t>(1, kBlock / beams);
  const Rows x = rows_of(scratch.x, rows, decoder_norm_.size);
  scratch.zeros.resize(std::max(encoder_cell_.size, decoder_cell_.size));
  embed(target_, step.words.data() + first, rows, x);
  for (int64_t layer = 0; layer < layers(); ++layer) {
    for (int64_t i = begin; i < end; i += block) {
      decode_block(layer, step, i, std::min(end, i + block), x.from(i * beams - first), scratch);
    }
  }
  normalize(decoder_norm_, x, rows, features.from(first));
}

void Worker::start(const Translator* translator, const SearchOptions& options, Sentences sentences,
                   std::vector<int64_t> prefix, float temperature) {
  translator_ = translator;
  sentences_ = std::move(sentences);
  search_.start(options, sentences_.count(), std::move(prefix));
  encoded_ = false;
  choice_.temperature = temperature;
  attention_.clear();
  attention_begin_.clear();
  step_.states = nullptr;
}

void Worker::advance() { encoded_ ? step() : encode(); }

void Worker::encode() {
  const Rows encoder_out = translator_->encode(sentences_, scratch_);
  const int64_t layers = translator_->layers();
  int64_t size = 0;
  for (int64_t i = 0; i < sentences_.count(); ++i) {
    size += layers * translator_->keys_values_floats(sentences_.length(i));
  }
  float* next = keys_values_buffer_.floats(size);
  keys_values_.clear();
  for (int64_t i = 0; i < sentences_.count(); ++i) {
    const int64_t length = sentences_.length(i), stride = translator_->keys_values_floats(length);
    translator_->project(encoder_out.from(sentences_.begins[i]), length, next, stride, scratch_);
    keys_values_.push_back({next, stride, length});
    next += layers * stride;
  }
  encoded_ = true;
}

// Says what the decoder reads, and where it writes.
void Worker::prepare_step() {
  const int64_t rows = search_.rows(), sentences = search_.going().size();
  const int64_t beams = search_.rows_per_sentence();
  const int64_t first_row = search_.first_row();
  step_.beams = beams;
  step_.words.resize(rows);
  step_.parents.resize(rows);
  for (int64_t i = 0; i < rows; ++i) {
    step_.words[i] = search_.row()[i].word;
    step_.parents[i] = search_.row()[i].parent - search_.previous_first_row();
  }
  step_.keys_values.resize(sentences);
  int64_t attention = attention_.size();
  for (int64_t i = 0; i < sentences; ++i) {
    step_.keys_values[i] = &keys_values_[search_.going()[i]];
    for (int64_t beam = 0; beam < beams; ++beam) {
      attention_begin_.push_back(attention);
      attention += step_.keys_values[i]->length;
    }
  }
  attention_.resize(attention);  // which may move it
  step_.attention.resize(sentences);
  for (int64_t i = 0; i < sentences; ++i) {
    step_.attention[i] = attention_.data() + attention_begin_[first_row + i * beams];
  }
  step_.attention_layer = translator_->attention_layer();
  step_.attention_heads = translator_->attention_heads();
  odd_ = !odd_;
  step_.next = states_[odd_].floats(translator_->layers() * rows * translator_->state_size());
}

void Worker::step() {
  prepare_step();
  const int64_t rows = search_.rows(), sentences = search_.going().size();
  const Rows features = rows_of(features_, rows, translator_->width());
  translator_->decode(step_, 0, sentences, features, scratch_);
  step_.states = step_.next;
  step_.old_rows = rows;

  choice_.width = search_.width();
  choice_.excluded = search_.excluded();
  choice_.extra = search_.extra_words().data();
  choice_.extras = search_.extras_per_row();
  const int64_t columns = choice_.width + choice_.extras;
  log_probs_.resize(rows * columns);
  words_.resize(rows * columns);
  const Rows converted =
      translator_->convert(features, rows, translator_->projection().in, scratch_);
  best_words(translator_->projection(), converted, rows, choice_,
             best_.floats(rows * best_words_floats(choice_.width)), log_probs_.data(),
             words_.data());
  search_.advance(log_probs_.data(), words_.data());
}

Sentences Translator::read(const Tensor& src_tokens) const {
  TORCH_CHECK_VALUE(src_tokens.dim() == 2, "src_tokens must be (sentences, length), got ",
                    src_tokens.sizes());
  TORCH_CHECK_TYPE(at::isIntegralType(src_tokens.scalar_type(), false),
                   "src_tokens must be integers, got ", src_tokens.scalar_type());
  const Tensor tokens = src_tokens.to(at::kCPU, at::kLong).contiguous();
  const int64_t words = source_.weight.size(0), length = tokens.size(1);
  const int64_t* data = tokens.const_data_ptr<int64_t>();
  Sentences sentences;
  for (int64_t i = 0; i < tokens.size(0); ++i) {
    for (int64_t place = 0; place < length; ++place) {
      const int64_t word = *data++;
      TORCH_CHECK_INDEX(0 <= word && word < words, "src_tokens must be from 0 to ", words - 1,
                        ", but sentence ", i, " has ", word);
      if (word != pad_) {
        sentences.words.push_back(word);
        sentences.places.push_back(place);
      }
    }
    sentences.begins.push_back(sentences.words.size());
  }
  return sentences;
}

// Calls f(begin, end, scratch) for all of [0, count), in as many parts as there are threads.
template <typename F>
void Translator::for_each_part(int64_t count, const F& f) const {
  const int64_t part =
      std::max<int64_t>(1, (count + at::get_num_threads() - 1) / at::get_num_threads());
  at::parallel_for(0, count, part, [&](int64_t begin, int64_t end) {
    std::unique_ptr<Worker> worker = take_worker();
    f(begin, end, worker->scratch());
    give_back(std::move(worker));
  });
}

Tensor Translator::encode(const Tensor& src_tokens) const {
  const Sentences all = read(src_tokens);
  const int64_t width = encoder_norm_.size, count = all.count();
  const Tensor output = at::zeros({src_tokens.size(1), count, width}, at::kFloat);
  float* data = output.data_ptr<float>();
  for_each_part(count, [&](int64_t begin, int64_t end, Scratch& scratch) {
    Sentences sentences;
    for (int64_t i = begin; i < end; ++i) {
      sentences.add(all, i);
    }
    const Rows x = encode(sentences, scratch);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = sentences.begins[i - begin]; j < sentences.begins[i - begin + 1]; ++j) {
        std::copy_n(x[j], width, data + (sentences.places[j] * count + i) * width);
      }
    }
  });
  return output;
}

namespace {

// Where each sentence's words are in a padded batch; padding_mask is (sentences, length).
std::vector<std::vector<int64_t>> find_places(const std::optional<Tensor>& padding_mask,
                                              int64_t sentences, int64_t length) {
  Tensor mask;
  if (padding_mask) {
    TORCH_CHECK_VALUE(padding_mask->sizes() == at::IntArrayRef({sentences, length}) &&
                          padding_mask->scalar_type() == at::kBool,
                      "padding_mask must be bool of shape (", sentences, ", ", length, "), got ",
                      padding_mask->scalar_type(), " of ", padding_mask->sizes());
    mask = padding_mask->contiguous();
  }
  std::vector<std::vector<int64_t>> places(sentences);
  for (int64_t i = 0; i < sentences; ++i) {
    for (int64_t j = 0; j < length; ++j) {
      if (!mask.defined() || !mask.const_data_ptr<bool>()[i * length + j]) {
        places[i].push_back(j);
      }
    }
  }
  return places;
}

void check_float(const char* name, const Tensor& x, int64_t dim) {
  TORCH_CHECK_VALUE(x.dim() == dim && x.scalar_type() == at::kFloat && x.device().is_cpu(), name,
                    " must be float32 on the CPU with ", dim, " dimensions, got ", x.scalar_type(),
                    " on ", x.device(), " with ", x.dim());
}

}  // namespace

Tensor Translator::project(const Tensor& encoder_out,
                           const std::optional<Tensor>& padding_mask) const {
  check_float("encoder_out", encoder_out, 3);
  const int64_t length = encoder_out.size(0), count = encoder_out.size(1);
  const int64_t width = encoder_norm_.size;
  TORCH_CHECK_VALUE(encoder_out.size(2) == width, "encoder_out must have ", width,
                    " features, got ", encoder_out.size(2));
  const auto places = find_places(padding_mask, count, length);
  const Tensor input = encoder_out.contiguous();
  const int64_t floats = keys_values_floats(length);
  const Tensor keys_values = at::empty({layers(), 1, count, floats}, at::kFloat);
  for_each_part(count, [&](int64_t begin, int64_t end, Scratch& scratch) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t words = places[i].size();
      const Rows x = rows_of(scratch.x, words, width);
      for (int64_t j = 0; j < words; ++j) {
        std::fill_n(x[j], round_up(width, kPad), 0.0f);
        std::copy_n(input.const_data_ptr<float>() + (places[i][j] * count + i) * width, width,
                    x[j]);
      }
      project(x, words, keys_values.data_ptr<float>() + i * floats, count * floats, scratch);
    }
  });
  return keys_values;
}

std::tuple<Tensor, Tensor, std::optional<Tensor>> Translator::step(
    const Tensor& words, const Tensor& keys_values, const std::optional<Tensor>& padding_mask,
    int64_t length, const std::optional<Tensor>& states, int64_t layer, int64_t heads) const {
  check_float("keys_values", keys_values, 4);
  const int64_t rows = words.numel(), count = keys_values.size(2),
                floats = keys_values_floats(length);
  TORCH_CHECK_VALUE(keys_values.sizes() == at::IntArrayRef({layers(), 1, count, floats}),
                    "keys_values must have shape (", layers(), ", 1, sentences, ", floats,
                    "), got ", keys_values.sizes());
  TORCH_CHECK_VALUE(count > 0 && rows > 0 && rows % count == 0,
                    "there must be as many words for each of the ", count, " sentences, got ",
                    rows);
  TORCH_CHECK_VALUE(0 < heads && heads <= heads_, "alignment_heads must be from 1 to ", heads_,
                    ", got ", heads);
  const auto places = find_places(padding_mask, count, length);
  const Tensor all = keys_values.contiguous(), ids = words.to(at::kLong).contiguous();
  Tensor old;
  DecoderStep step;
  step.beams = rows / count;
  step.words.assign(ids.const_data_ptr<int64_t>(), ids.const_data_ptr<int64_t>() + rows);
  for (const int64_t word : step.words) {
    TORCH_CHECK_INDEX(0 <= word && word < target_words(), "words must be from 0 to ",
                      target_words() - 1, ", got ", word);
  }
  if (states) {
    check_float("states", *states, 3);
    TORCH_CHECK_VALUE(states->sizes() == at::IntArrayRef({layers(), rows, state_size()}),
                      "states must have shape (", layers(), ", ", rows, ", ", state_size(),
                      "), got ", states->sizes());
    old = states->contiguous();
    step.states = old.const_data_ptr<float>();
    step.old_rows = rows;
    for (int64_t i = 0; i < rows; ++i) {
      step.parents.push_back(i);
    }
  }
  const Tensor next = at::empty({layers(), rows, state_size()}, at::kFloat);
  step.next = next.data_ptr<float>();
  std::vector<SentenceKeysValues> sentences;
  std::vector<float> attention(rows * length);
  for (int64_t i = 0; i < count; ++i) {
    sentences.push_back({all.const_data_ptr<float>() + i * floats, count * floats,
                         static_cast<int64_t>(places[i].size())});
    step.attention.push_back(attention.data() + i * step.beams * length);
  }
  for (const SentenceKeysValues& one : sentences) {  // whose addresses no longer change
    step.keys_values.push_back(&one);
  }
  step.attention_layer = layer;
  step.attention_heads = heads;
  const Tensor features = at::empty({rows, row_stride(width())}, at::kFloat);
  for_each_part(count, [&](int64_t begin, int64_t end, Scratch& scratch) {
    decode(step, begin, end, {features.data_ptr<float>(), features.size(1)}, scratch);
  });
  if (layer < 0 || layer >= layers()) {
    return {features.slice(1, 0, width()), next, std::nullopt};
  }
  const Tensor weights = at::zeros({rows, length}, at::kFloat);
  for (int64_t row = 0; row < rows; ++row) {
    const auto& columns = places[row / step.beams];
    const int64_t size = columns.size();
    const float* from = step.attention[row / step.beams] + row % step.beams * size;
    for (int64_t i = 0; i < size; ++i) {
      weights.data_ptr<float>()[row * length + columns[i]] = from[i];
    }
  }
  return {features.slice(1, 0, width()), next, weights};
}

namespace {

// The words of prefix, (sentences, length), which may be there.
std::vector<int64_t> read_prefix(const std::optional<Tensor>& prefix, int64_t sentences,
                                 int64_t words) {
  if (!prefix) {
    return {};
  }
  TORCH_CHECK_VALUE(prefix->dim() == 2 && prefix->size(0) == sentences, "prefix_tokens must be (",
                    sentences, ", length), got ", prefix->sizes());
  const Tensor ids = prefix->to(at::kCPU, at::kLong).contiguous();
  const int64_t* data = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    TORCH_CHECK_INDEX(0 <= data[i] && data[i] < words, "prefix_tokens must be from 0 to ",
                      words - 1, ", got ", data[i]);
  }
  return {data, data + ids.numel()};
}

}  // namespace

Translation::Translation(c10::intrusive_ptr<Translator> translator, const SearchOptions& options,
                         const Tensor& src_tokens, const std::optional<Tensor>& prefix,
                         double temperature)
    : translator_(std::move(translator)) {
  const Sentences all = translator_->read(src_tokens);
  const int64_t words = translator_->target_words();
  sentences_ = all.count();
  length_ = src_tokens.size(1);
  TORCH_CHECK_VALUE(
      0 < options.beam_size && options.beam_size <= words && options.min_length >= 0 &&
          options.min_length <= options.max_length && temperature > 0,
      "beam_size must be from 1 to the number of words, temperature positive, and "
      "min_length from 0 to max_length, got ",
      options.beam_size, ", ", temperature, ", ", options.min_length, " and ", options.max_length);
  for (const int64_t word : {options.bos, options.pad, options.eos, options.unk}) {
    TORCH_CHECK_INDEX(0 <= word && word < words, "words must be from 0 to ", words - 1, ", got ",
                      word);
  }
  std::vector<int64_t> first_words = read_prefix(prefix, sentences_, words);

  const int64_t needed = std::max((sentences_ * options.beam_size - 1) / kWorkerRows,
                                  (all.begins.back() - 1) / kWorkerWords) +
                         1;
  const int64_t count = std::min(sentences_, std::max<int64_t>(needed, at::get_num_threads()));
  const int64_t prefix_length = sentences_ == 0 ? 0 : first_words.size() / sentences_;
  for (int64_t i = 0; i < count; ++i) {
    Sentences sentences;
    std::vector<int64_t> prefix_part;
    for (int64_t j = i; j < sentences_; j += count) {
      sentences.add(all, j);
      const auto begin = first_words.begin() + j * prefix_length;
      prefix_part.insert(prefix_part.end(), begin, begin + prefix_length);
    }
    workers_.push_back(translator_->take_worker());
    workers_.back()->start(translator_.get(), options, std::move(sentences), std::move(prefix_part),
                           static_cast<float>(temperature));
  }
}

Translation::~Translation() {
  for (auto& worker : workers_) {
    translator_->give_back(std::move(worker));
  }
}

std::optional<Translation::Found> Translation::advance(double seconds) {
  const std::lock_guard<std::mutex> lock(mutex_);
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  at::parallel_for(0, workers_.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      while (!workers_[i]->done() && Clock::now() < end) {
        workers_[i]->advance();
      }
    }
  });
  const bool done =
      std::all_of(workers_.begin(), workers_.end(),
                  [](const std::unique_ptr<Worker>& worker) { return worker->done(); });
  return done ? std::optional<Found>(hypotheses()) : std::nullopt;
}

Translation::Found Translation::hypotheses() const {
  std::vector<Hypotheses> found;
  int64_t total = 0, positions = 0;
  for (const auto& worker : workers_) {
    found.push_back(worker->search().hypotheses());
    total += found.back().lengths.size();
    positions += found.back().words.size();
  }
  const Tensor counts = at::empty({sentences_}, at::kLong);
  const Tensor lengths = at::empty({total}, at::kLong), scores = at::empty({total}, at::kFloat);
  const Tensor words = at::empty({positions}, at::kLong);
  const Tensor log_probs = at::empty({positions}, at::kFloat);
  const Tensor attention = at::zeros({positions, length_}, at::kFloat);
  std::vector<size_t> next(found.size()), next_position(found.size());
  int64_t hypothesis = 0, position = 0;
  for (int64_t i = 0; i < sentences_; ++i) {
    const int64_t part = i % found.size(), local = i / found.size();
    const Hypotheses& h = found[part];
    const Worker& worker = *workers_[part];
    const int64_t begin = worker.sentences().begins[local], size = worker.sentences().length(local);
    const int64_t* places = worker.sentences().places.data() + begin;
    counts.data_ptr<int64_t>()[i] = h.counts[local];
    for (int64_t j = 0; j < h.counts[local]; ++j, ++hypothesis) {
      const int64_t length = h.lengths[next[part]];
      lengths.data_ptr<int64_t>()[hypothesis] = length;
      scores.data_ptr<float>()[hypothesis] = h.scores[next[part]++];
      for (int64_t k = 0; k < length; ++k, ++position) {
        const size_t from = next_position[part]++;
        words.data_ptr<int64_t>()[position] = h.words[from];
        log_probs.data_ptr<float>()[position] = h.log_probs[from];
        const float* weights = worker.attention(h.rows[from]);
        float* to = attention.data_ptr<float>() + position * length_;
        for (int64_t s = 0; s < size; ++s) {
          to[places[s]] = weights[s];
        }
      }
    }
  }
  return {counts, lengths, scores, words, log_probs, attention};
}

Product::Product(const Tensor& weight, const Tensor& bias, const std::string& compute_type)
    : in_(weight.size(-1)), out_(weight.size(0)) {
  Weights weights;
  weights.insert("layer.weight", weight);
  weights.insert("layer.bias", bias);
  layer_ = Packer(weights, parse_compute_type(compute_type), packed_)
               .linear({"layer"}, {1, out_}, {1, in_});
}

Tensor Product::forward(const Tensor& x) const {
  check_float("x", x, 2);
  TORCH_CHECK_VALUE(x.size(1) == in_, "x must have ", in_, " features, got ", x.size(1));
  Tensor input = at::constant_pad_nd(x, {0, layer_.in - in_}).contiguous();
  const int64_t rows = x.size(0);
  if (layer_.type != ComputeType::kFloat32) {
    const Tensor units = at::empty({rows, unit_stride(layer_.type, layer_.in)}, at::kFloat);
    convert(layer_.type, {input.data_ptr<float>(), layer_.in}, rows, layer_.in,
            {units.data_ptr<float>(), units.size(1)});
    input = units;
  }
  const Tensor y = at::empty({rows, row_stride(out_)}, at::kFloat);
  linear(layer_, {input.data_ptr<float>(), input.size(1)}, rows, {y.data_ptr<float>(), y.size(1)});
  return y.slice(1, 0, out_);
}

}  // namespace lrn

LRN_LIBRARY(m) {
  using c10::intrusive_ptr;
  using lrn::Translation;
  using lrn::Translator;
  using Optional = std::optional<at::Tensor>;
  m.class_<Translation>("Translation").def("advance", &Translation::advance);
  m.class_<Translator>("Translator")
      .def(torch::init([](lrn::Weights weights, std::string activation, std::string activation_fn,
                          bool output_gate, int64_t heads, double encoder_scale,
                          double decoder_scale, int64_t pad, int64_t attention_layer,
                          int64_t attention_heads, std::string compute_type) {
        return c10::make_intrusive<Translator>(
            weights, lrn::TranslatorSettings{activation, activation_fn, output_gate, heads,
                                             encoder_scale, decoder_scale, pad, attention_layer,
                                             attention_heads, compute_type});
      }))
      .def("encode", [](const intrusive_ptr<Translator>& self,
                        const at::Tensor& src_tokens) { return self->encode(src_tokens); })
      .def("project",
           [](const intrusive_ptr<Translator>& self, const at::Tensor& encoder_out,
              const Optional& padding_mask) { return self->project(encoder_out, padding_mask); })
      .def("step", &Translator::step)
      // A method of the translator: as an argument, an object of this class takes longer.
      .def("translation",
           [](const intrusive_ptr<Translator>& self, const at::Tensor& src_tokens,
              int64_t beam_size, int64_t min_length, int64_t max_length, int64_t bos, int64_t pad,
              int64_t eos, int64_t unk, double unk_penalty, double length_penalty,
              bool normalize_scores, const Optional& prefix, double temperature) {
             return c10::make_intrusive<Translation>(
                 self,
                 lrn::SearchOptions{beam_size, min_length, max_length, bos, pad, eos, unk,
                                    unk_penalty, length_penalty, normalize_scores},
                 src_tokens, prefix, temperature);
           });
  m.class_<lrn::Product>("Product")
      .def(torch::init<at::Tensor, at::Tensor, std::string>())
      .def("forward", &lrn::Product::forward);
}

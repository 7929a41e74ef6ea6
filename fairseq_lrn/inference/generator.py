"""fairseq's generator with a native beam search, for every translation model of this package."""

import itertools
from typing import Any, Dict, List, Optional, Tuple

import torch
from fairseq.search import BeamSearch
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator, SequenceGeneratorWithAlignment
from torch import Tensor

from ..models.deepnmt import DeepNMTModel
from ..models.lrn import LRNModel
from ..ops import log_softmax_topk
from ..ops._library import loaded
from .reading import replaced_method
from .translator import Translator

Hypothesis = Dict[str, Tensor]
_NET_INPUT = {"src_tokens", "src_lengths", "prev_output_tokens"}


class BeamSearchGenerator(SequenceGenerator):
    """fairseq's generator, with a faster way to the same hypotheses for one model of this package.

    The search is native. A step gives it the best ``2 * beam_size`` words of each hypothesis, and finished
    hypotheses are read from its history. If a :class:`Translator` knows the model, the steps are native too.
    Otherwise the model's modules run them, on any device. On a GPU the translator's graphs do, if they know
    the model. Ensembles, other models, adaptive softmax, sampling and other searches, constraints, a language
    model, and n-grams that may not repeat use fairseq's search.
    """

    def __init__(self, models, tgt_dict, compute_type="float32", **kwargs):
        """Take the arguments of fairseq's generator, and ``compute_type``.

        Args:
            compute_type: see :class:`Translator`. Translating raises ValueError if it is not float32 and the
                translator does not run the steps.
        """
        super().__init__(models, tgt_dict, **kwargs)
        self.compute_type = compute_type
        self.translator = Translator.of(self.model.single_model)

    def _generate(
        self,
        sample: Dict[str, Any],
        prefix_tokens: Optional[Tensor] = None,
        constraints: Optional[Tensor] = None,
        bos_token: Optional[int] = None,
    ) -> List[List[Hypothesis]]:
        plain = (
            loaded
            and self.model.models_size == 1
            and type(self.search) is BeamSearch
            and self.beam_size <= self.vocab_size - 2
            and constraints is None
            and self.lm_model is None
            and self.repeat_ngram_blocker is None
            and self.token_indices_to_suppress is None
            and not self.match_source_len
            and sample["net_input"].keys() <= _NET_INPUT
            and not any(hasattr(EnsembleModel, name) for name in vars(self.model))
        )
        if self.translator is None:  # a copy has none
            self.translator = Translator.of(self.model.single_model)
        autocast = torch._C._is_any_autocast_enabled()
        native = self.translator.native(self.compute_type) if plain and not autocast else None
        if native is None and self.compute_type != "float32":
            reason = "autocast is on" if autocast else self.translator.reason
            raise ValueError(
                f"compute_type is {self.compute_type}, but must be float32 where PyTorch's modules "
                f"translate, as here: {reason if plain else 'this is no plain beam search with one model'}"
            )
        if native is None and not (plain and is_unchanged(self.model.single_model)):
            return _check(sample, super()._generate(sample, prefix_tokens, constraints, bos_token))
        src_tokens = sample["net_input"]["src_tokens"]
        max_len = min(int(self.max_len_a * src_tokens.size(1) + self.max_len_b), self.max_len - 1)
        if self.min_len > max_len:
            raise ValueError(f"--min-len is {self.min_len}, but must not be above the longest, {max_len}")
        options = (
            self.beam_size,
            self.min_len,
            max_len,
            self.eos if bos_token is None else bos_token,
            self.pad,
            self.eos,
            self.unk,
            float(self.unk_penalty),
            float(self.len_penalty),
            self.normalize_scores,
            prefix_tokens,
        )
        if native is not None:
            found = self.translator.search(native, src_tokens, *options, float(self.temperature))
        else:
            search = torch.classes.fairseq_lrn.BeamSearch(len(src_tokens), *options)
            graphs, net_input = self.translator.graphs, sample["net_input"]
            graphed = None if autocast else graphs.search(net_input, search, self.temperature)
            found = graphed or self._search(net_input, search)
        return _check(sample, _split(*found))

    def _search(self, net_input: Dict[str, Tensor], search: Any) -> Tuple[Tensor, ...]:
        """Search with the model's modules. Returns the same as :meth:`Translator.search`."""
        encoder, decoder = self.model.single_model.encoder, self.model.single_model.decoder
        device = net_input["src_tokens"].device
        sentences, source_length = net_input["src_tokens"].shape
        encoder_out = encoder.forward_torchscript(net_input)
        state: Dict[str, Dict[str, Optional[Tensor]]] = {}
        rows = sentences
        attention: List[Tensor] = []
        while sentences > 0:
            tokens, order = search.rows()
            if len(attention) == 1 and self.beam_size > 1:  # sentences had one row each and get several
                left = order[:: self.beam_size]
                if len(left) < rows:
                    decoder.reorder_incremental_state_scripting(state, left.to(device))
                    encoder_out = encoder.reorder_encoder_out(encoder_out, left.to(device))
                order = torch.arange(len(left)).repeat_interleave(self.beam_size)
            if attention and not torch.equal(order, torch.arange(rows)):
                decoder.reorder_incremental_state_scripting(state, order.to(device))
                if len(order) != rows:
                    encoder_out = encoder.reorder_encoder_out(encoder_out, order.to(device))
            tokens, rows = tokens.to(device), len(order)
            features, extra = decoder.forward(
                tokens.unsqueeze(1), encoder_out, incremental_state=state, features_only=True
            )
            scores = decoder.output_layer(features)[:, -1] / self.temperature
            attn = extra["attn"][0]
            attention.append(scores.new_empty(rows, 0) if attn is None else attn[:, -1].float())
            if not search.advance(*_candidates(scores, search)):
                break
        *found, ancestors = search.hypotheses()
        found = [x.to(device) for x in found]
        attended = torch.cat(attention or [torch.empty(0, source_length)])
        return (*found, attended.index_select(0, ancestors.to(attended.device)))


class BeamSearchGeneratorWithAlignment(SequenceGeneratorWithAlignment, BeamSearchGenerator):
    """fairseq's generator for ``--print-alignment``, with the search of :class:`BeamSearchGenerator`."""


def is_unchanged(model: Any) -> bool:
    """Whether ``model`` is one of this package, and no method of it or its parts was replaced."""
    if type(model) not in (DeepNMTModel, LRNModel) or model.decoder.output_projection is None:
        return False
    parts = {model.encoder: model.encoder_class, model.decoder: model.decoder_class}
    return (
        "get_normalized_probs" not in vars(model)
        and replaced_method() is None
        and all(
            type(part) is kind and not any(hasattr(kind, name) for name in vars(part))
            for part, kind in parts.items()
        )
    )


def _candidates(scores: Tensor, search: Any) -> Tuple[Tensor, Tensor]:
    """The log-probabilities and ids of the words that ``search`` needs, from scores (N, V)."""
    log_probs, words = scores.new_empty(len(scores), 0), search.extra().to(scores.device)
    excluded = search.excluded()
    width = min(search.width(), scores.size(1) - len(excluded))
    if words.numel() > 0:
        log_probs = scores.float().log_softmax(1).gather(1, words)
    if width > 0:
        best, best_words = log_softmax_topk(scores, width, excluded)
        missing = (0, search.width() - width)
        best = torch.nn.functional.pad(best, missing, value=-torch.inf)
        best_words = torch.nn.functional.pad(best_words, missing)
        log_probs, words = torch.cat([best, log_probs], 1), torch.cat([best_words, words], 1)
    return log_probs, words


def _split(
    counts: Tensor,
    lengths: Tensor,
    scores: Tensor,
    tokens: Tensor,
    positional_scores: Tensor,
    attention: Tensor,
) -> List[List[Hypothesis]]:
    """Return the hypotheses of each sentence in fairseq's form."""
    sizes, empty = lengths.tolist(), torch.empty(0)
    hypotheses = (
        {
            "tokens": words,
            "score": score,
            "attention": attn.t(),  # (S, T)
            "alignment": empty,
            "positional_scores": positional,
        }
        for words, score, attn, positional in zip(
            tokens.split(sizes), scores.unbind(), attention.split(sizes), positional_scores.split(sizes)
        )
    )
    return [list(itertools.islice(hypotheses, count)) for count in counts.tolist()]


def _check(sample: Dict[str, Any], found: List[List[Hypothesis]]) -> List[List[Hypothesis]]:
    """Return ``found``, the hypotheses of each sentence. Raise ValueError if a sentence has none."""
    for i, beam in enumerate(found):
        if not beam:
            name = sample["id"][i].item() if "id" in sample else i
            raise FloatingPointError(
                f"no translation of sentence {name} has a finite score: the model's scores are NaN, or minus "
                "infinity for </s>"
            )
    return found

"""Translation whose beam search asks the softmax for its best words only: task ``lrn_translation``."""

from typing import Any, Dict, List, Optional

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.search import BeamSearch
from fairseq.sequence_generator import SequenceGenerator, SequenceGeneratorWithAlignment
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from torch import Tensor

from ..models import DeepNMTModel, LRNModel
from ..models.encoder_decoder import EncoderDecoderModel
from ..ops import log_softmax_topk

Hypothesis = Dict[str, Tensor]


def is_unchanged(model: Any) -> bool:
    """Whether ``model`` is one of this package, with all the methods of its class and its parts' classes."""
    if type(model) not in (DeepNMTModel, LRNModel):
        return False
    parts = {model.encoder: model.encoder_class, model.decoder: model.decoder_class}
    return "get_normalized_probs" not in vars(model) and all(
        type(part) is kind and not any(hasattr(kind, name) for name in vars(part))
        for part, kind in parts.items()
    )


class BeamSearchGenerator(SequenceGenerator):
    """fairseq's generator, with a shorter way to the same hypotheses for one model of this package.

    fairseq's search writes and reads several arrays of all words' probabilities for each new word, and copies
    whatever belongs to a hypothesis as it is reordered. Here a step keeps the best ``2 * beam_size`` words of
    each hypothesis, where they came from, and nothing else; hypotheses are read off these once they end.
    All else goes fairseq's way: ensembles, other models, adaptive softmax, sampling and other searches,
    prefixes, constraints, a language model, temperature, penalties for unknown words, n-grams that may not
    repeat. A sentence that would have no hypothesis is an error, a ValueError that names it.
    """

    src_dict: Optional[Dictionary] = None  # to name sentences with

    def _generate(
        self,
        sample: Dict[str, Any],
        prefix_tokens: Optional[Tensor] = None,
        constraints: Optional[Tensor] = None,
        bos_token: Optional[int] = None,
    ) -> List[List[Hypothesis]]:
        model = self.model.single_model
        plain = (
            self.model.models_size == 1
            and is_unchanged(model)
            and model.decoder.output_projection is not None
            and type(self.search) is BeamSearch
            and 2 * self.beam_size <= self.vocab_size - 2
            and prefix_tokens is None
            and constraints is None
            and self.lm_model is None
            and self.temperature == 1
            and self.unk_penalty == 0
            and self.repeat_ngram_blocker is None
            and self.token_indices_to_suppress is None
            and not self.match_source_len
        )
        if plain:
            return self._search(model, sample, self.eos if bos_token is None else bos_token)
        found = super()._generate(sample, prefix_tokens, constraints, bos_token)
        for row, hypotheses in enumerate(found):
            if not hypotheses:
                raise self._describe_loss(sample, row, "the search has found no end of any hypothesis")
        return found

    def _describe_loss(self, sample: Dict[str, Any], row: int, cause: str) -> ValueError:
        ids, tokens = sample.get("id"), sample["net_input"]["src_tokens"][row]
        name = f"sentence {row} of the batch" if ids is None else f"sentence {int(ids[row])}"
        if self.src_dict is not None:
            name += f", {self.src_dict.string(tokens[tokens.ne(self.src_dict.pad())])!r},"
        return ValueError(f"{name} has no translation: {cause}")

    def _search(
        self, model: EncoderDecoderModel, sample: Dict[str, Any], first: int
    ) -> List[List[Hypothesis]]:
        net_input, decoder, beam = sample["net_input"], model.decoder, self.beam_size
        sentences, source_length = net_input["src_tokens"].shape
        max_len = min(int(self.max_len_a * source_length + self.max_len_b), self.max_len - 1)
        if self.min_len > max_len:
            raise ValueError(f"--min-len is {self.min_len}, but must not be above the longest, {max_len}")

        order = torch.arange(sentences, device=net_input["src_tokens"].device).repeat_interleave(beam)
        encoder_out = model.encoder.reorder_encoder_out(model.encoder.forward_torchscript(net_input), order)
        incremental_state: Dict[str, Dict[str, Optional[Tensor]]] = {}
        tokens = torch.full_like(order, first)
        finished: List[List[Hypothesis]] = [[] for _ in range(sentences)]
        going = np.arange(sentences)  # the sentence of each group of `beam` rows
        totals = np.zeros((sentences, beam), np.float32)
        history = _History()

        for step in range(max_len + 1):
            features, extra = decoder.forward(
                tokens.unsqueeze(1), encoder_out, incremental_state=incremental_state, features_only=True
            )
            scores = decoder.output_layer(features)[:, -1]
            if step < max_len:
                exclude = [self.pad, self.eos] if step < self.min_len else [self.pad]
                log_probs, words = log_softmax_topk(scores, 2 * beam, exclude)
            else:
                log_probs = scores.float().log_softmax(1)[:, self.eos, None]
                words = torch.full_like(log_probs, self.eos, dtype=torch.long)

            # of all words after a sentence's hypotheses, the best; all hypotheses are the same at first
            shape = (len(going), beam, -1)
            sums = log_probs.cpu().numpy().reshape(shape) + totals[:, :, None]
            words = words.cpu().numpy().reshape(shape)
            if step == 0:
                sums, words = sums[:, :1], words[:, :1]
            width = sums.shape[2]
            sums, words = sums.reshape(len(going), -1), words.reshape(len(going), -1)
            group = np.arange(len(going))[:, None]
            best = np.argsort(-sums, axis=1, kind="stable")[:, : 2 * beam]
            sums, words, parents = sums[group, best], words[group, best], best // width + group * beam
            lost = np.flatnonzero(~(sums[:, 0] > -np.inf))
            if len(lost) > 0:
                raise self._describe_loss(
                    sample,
                    going[lost[0]],
                    "the model's scores of all next words are NaN or minus infinity, as after training that "
                    "diverged, or where float16 overflows",
                )

            attn = extra["attn"][0]
            if attn is not None:
                history.attn.append(attn[:, -1].float().cpu().numpy())
            ends = (words == self.eos) & (sums > -np.inf)
            if ends.any():
                group, column = np.nonzero(ends[:, :beam])
                ended = history.read(parents[group, column], sums[group, column], self.eos, order.device)
                for i, hypothesis in zip(group, ended):
                    if self.normalize_scores:
                        hypothesis["score"] /= (step + 1) ** self.len_penalty
                    if len(finished[going[i]]) < beam:
                        finished[going[i]].append(hypothesis)
                keep = np.array([len(finished[i]) < beam for i in going])
                # those that did not end go on, the best first
                group = np.flatnonzero(keep)[:, None]
                column = np.argsort(ends[keep], axis=1, kind="stable")
                sums, words, parents = (x[group, column] for x in (sums, words, parents))
                going = going[keep]
            if step == max_len or len(going) == 0:
                break

            totals = sums[:, :beam]
            history.parents.append(parents[:, :beam].reshape(-1))
            history.words.append(words[:, :beam].reshape(-1))
            history.totals.append(totals.reshape(-1))
            tokens = torch.from_numpy(history.words[-1]).to(order.device)
            rows, order = order.size(0), torch.from_numpy(history.parents[-1]).to(order.device)
            if not np.array_equal(history.parents[-1], np.arange(rows)):
                decoder.reorder_incremental_state_scripting(incremental_state, order)
            if order.size(0) < rows:
                encoder_out = model.encoder.reorder_encoder_out(encoder_out, order)

        return [sorted(hypotheses, key=lambda x: -float(x["score"])) for hypotheses in finished]


class AlignedBeamSearchGenerator(SequenceGeneratorWithAlignment, BeamSearchGenerator):
    """fairseq's generator of alignments, over that search."""


class _History:
    """Of each step and row: the row it came from, its word, its total score; and the step's attention."""

    def __init__(self) -> None:
        self.parents: List[np.ndarray] = []
        self.words: List[np.ndarray] = []
        self.totals: List[np.ndarray] = []
        self.attn: List[np.ndarray] = []

    def read(self, rows: np.ndarray, totals: np.ndarray, eos: int, device: torch.device) -> List[Hypothesis]:
        """Return the hypotheses that end now, after ``rows``, with ``totals``; scores are not normalized."""
        words, sums, paths = [np.full_like(rows, eos)], [totals], [rows]
        for step in range(len(self.parents) - 1, -1, -1):
            words.append(self.words[step][rows])
            sums.append(self.totals[step][rows])
            rows = self.parents[step][rows]
            paths.append(rows)
        tokens = torch.from_numpy(np.stack(words[::-1], 1)).to(device)
        positional = torch.from_numpy(np.diff(np.stack(sums[::-1], 1), axis=1, prepend=np.float32(0)))
        positional, scores = positional.to(device), torch.from_numpy(totals.copy()).to(device)
        attn = torch.empty(len(totals), 0)
        if self.attn:
            steps = [x[path] for x, path in zip(self.attn, paths[::-1])]
            attn = torch.from_numpy(np.stack(steps, 2)).to(device)
        return [
            {
                "tokens": tokens[i],
                "score": scores[i],
                "attention": attn[i],  # (S, T)
                "alignment": torch.empty(0),
                "positional_scores": positional[i],
            }
            for i in range(len(totals))
        ]


@register_task("lrn_translation", dataclass=TranslationConfig)
class LRNTranslationTask(TranslationTask):
    """fairseq's ``translation`` with :class:`BeamSearchGenerator`: sooner; in float32 the same results."""

    def build_generator(self, models, args, seq_gen_cls=None, **kwargs):
        """As fairseq's task does, with :class:`BeamSearchGenerator` where it takes ``SequenceGenerator``."""
        if seq_gen_cls is None:
            seq_gen_cls = BeamSearchGenerator
            alignment = getattr(args, "print_alignment", False)
            if alignment:
                seq_gen_cls = AlignedBeamSearchGenerator
                kwargs["extra_gen_cls_kwargs"] = {
                    **(kwargs.get("extra_gen_cls_kwargs") or {}),
                    "print_alignment": alignment,
                }
        generator = super().build_generator(models, args, seq_gen_cls, **kwargs)
        if isinstance(generator, BeamSearchGenerator):
            generator.src_dict = self.source_dictionary
        return generator

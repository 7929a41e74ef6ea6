"""Beam search on a GPU with an ``lrn``: a step of the decoder is one CUDA graph.

A decoder's state has a fixed size, so one captured step serves every length of the translation. A step
reorders the states for the beam, runs the decoder's modules and finds the best next words. The search is
native and runs on the host. Each step copies once each way, through pinned memory.
"""

import logging
import threading
from collections import OrderedDict
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from ..ops.log_softmax_topk import topk
from .reading import Snapshot, Unknown, read

logger = logging.getLogger(__name__)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_GRAPHS = 32  # at most; those not used for longest go first
_EXTRAS = 2  # words beside the best that a search may ask for: <unk> and one that is forced
_EXCLUDED = 3  # words that it may exclude: padding, </s> and <unk>


class StepGraphs:
    """The decoder's steps for the native search, each a CUDA graph for some number of rows and source length.

    A graph reads the weights in place, so training in place changes its results. Graphs are dropped when
    modules, parameters, their memory or settings were replaced. Searches of one generator take turns.

    Args:
        model: any fairseq model
        device_type: "cuda"; "cpu" runs the same steps without graphs
    """

    def __init__(self, model: torch.nn.Module, device_type: str = "cuda") -> None:
        self._model, self._device_type = model, device_type
        self._snapshot: Optional[Snapshot] = None
        self._weight: Any = None  # one of the model's, if its steps are known
        self._lock = threading.Lock()
        self._captures = device_type == "cuda"
        self._stream: Optional[torch.cuda.Stream] = None
        self._clear()

    def __reduce__(self) -> Tuple[Any, ...]:
        """A copy starts without graphs."""
        return type(self), (self._model, self._device_type)

    def _clear(self) -> None:
        self._steps: OrderedDict[Tuple[Any, ...], _Step] = OrderedDict()
        self._memory: Optional[Tensor] = None  # of keys and values: one step at a time needs them
        self._pool: Any = None  # of the graphs' memory

    def serve(self, beam_size: int) -> bool:
        """Whether the model is a known ``lrn`` on a device of the given type."""
        with self._lock:
            if self._snapshot is None or not self._snapshot.same():
                self._weight, snapshot = None, Snapshot(self._model)
                if any(parameter.device.type == self._device_type for parameter in snapshot.parameters):
                    self._read()
                self._snapshot = snapshot
        words = self._model.decoder.embed_tokens.num_embeddings if self._weight is not None else 0
        return _width(beam_size) <= words

    def _read(self) -> None:
        self._clear()
        try:
            weights, _ = read(self._model, self._device_type, _DTYPES)
            if any("forward" in vars(module) for module in self._model.modules()):
                raise Unknown("checkpointed activations read the state of the random numbers")
        except Unknown as error:
            logger.info("the model translates without CUDA graphs: %s", error)
            return
        if len({(weight.dtype, weight.device) for weight in weights.values() if weight.dim() > 0}) == 1:
            self._weight = self._model.decoder.embed_tokens.weight

    def search(
        self, net_input: Dict[str, Tensor], search: Any, beam_size: int, temperature: float
    ) -> Tuple[Tensor, ...]:
        """Translate a batch.

        Args:
            net_input: with ``src_tokens`` (B, S), on the model's device
            search: a new native search of B sentences with ``beam_size``
            beam_size: hypotheses of a sentence
            temperature: divides the scores

        Returns:
            as :meth:`~fairseq_lrn.inference.translator.Translator.search`
        """
        device = self._weight.device
        context = torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()
        # what a step keeps must be usable outside inference mode too
        with self._lock, context, torch.inference_mode(False), torch.no_grad():
            encoder_out = self._model.encoder.forward_torchscript(net_input)
            memory = encoder_out["encoder_out"][0]
            length, sentences, _ = memory.shape
            kept: List[Tensor] = []  # attention of all rows of each step's graph
            places: List[Tensor] = []  # where in these the rows of the search are
            offset = 0
            rows = torch.arange(sentences) * beam_size  # at first one row a sentence
            if sentences > 0:
                step = self._step(sentences, length, beam_size, temperature)
                step.begin(encoder_out)
                going = True
                while going:
                    tokens, order = search.rows()
                    parents = rows[order] if kept else rows
                    if len(kept) == 1 or len(tokens) != len(rows):
                        groups = parents[::beam_size] // beam_size
                        rows = (groups[:, None] * beam_size + torch.arange(beam_size)).flatten()
                        if 4 * len(groups) <= step.sentences:
                            state = step.state(parents, groups)
                            step = self._step(len(groups), length, beam_size, temperature)
                            step.set_state(*state)
                            rows = parents = torch.arange(len(tokens))
                    going = search.advance(*step.run(search, rows, tokens, parents))
                    places.append(rows + offset)
                    kept.append(step.attention.clone())
                    offset += len(kept[-1])
            *found, ancestors = search.hypotheses()
            found = [x.to(device) for x in found]
            if not kept:
                return (*found, torch.empty(0, length, device=device))
            attended = torch.cat(kept)[:, :length].index_select(0, torch.cat(places)[ancestors].to(device))
            return (*found, attended.float())

    def _step(self, sentences: int, length: int, beam_size: int, temperature: float) -> "_Step":
        """Return a step for at least this many sentences and source positions."""
        shape = (_round_up(sentences, 1), _round_up(length, 16), beam_size)
        key = (*shape, temperature)
        step = self._steps.pop(key, None)
        if step is None:
            memory = self._keys_values(shape[0] * shape[1])
            while len(self._steps) >= _GRAPHS:
                self._steps.popitem(last=False)
            step = _Step(self._model.decoder, memory, *shape, temperature)
            if self._captures:
                self._capture(step)
        self._steps[key] = step
        return step

    def _keys_values(self, positions: int) -> Tensor:
        """Return memory for keys and values of this many positions. New memory drops all graphs."""
        layers, width = len(self._model.decoder.layers), self._model.decoder.embed_tokens.embedding_dim
        size = layers * 2 * width
        if self._memory is None or len(self._memory) < size * positions:
            self._clear()
            self._memory = self._weight.new_zeros(size << (positions - 1).bit_length())
        return self._memory[: size * positions]

    def _capture(self, step: "_Step") -> None:
        current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # one, so that graphs share memory
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                step.compute()  # libraries allocate and choose kernels at their first call
            self._stream.synchronize()
            # what other threads do meanwhile, such as reading ahead, does not matter
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                step.compute()
            step.graph = graph
        except RuntimeError as error:
            self._captures = False
            torch.cuda.set_stream(current)
            logger.warning("no CUDA graph can be captured, kernels are launched one by one: %s", error)


class _Step:
    """One step of a decoder. All its inputs and outputs have fixed places in memory.

    It has room for a number of sentences with ``beam_size`` rows each. Finished sentences stay in it.
    """

    def __init__(
        self,
        decoder: Any,
        keys_values: Tensor,
        sentences: int,
        length: int,
        beam_size: int,
        temperature: float,
    ) -> None:
        weight = decoder.embed_tokens.weight
        device, rows = weight.device, sentences * beam_size
        heads = weight.size(1) // decoder.layers[0].encoder_attn.head_dim
        pinned = device.type == "cuda"
        self.decoder, self.temperature, self.width = decoder, temperature, _width(beam_size)
        self.sentences = sentences
        self.graph: Any = None
        self.keys_values = keys_values.view(len(decoder.layers), 2, sentences, heads, length, -1)
        self.padding_mask = torch.zeros(sentences, length, dtype=torch.bool, device=device)
        self.states = weight.new_zeros(len(decoder.layers), rows, weight.size(1))
        self.attention = weight.new_zeros(rows, length)
        # of each row the token, the row that it follows and extra words; then what is excluded
        self.host_input = torch.zeros((2 + _EXTRAS) * rows + _EXCLUDED, dtype=torch.int64, pin_memory=pinned)
        self.input = torch.zeros_like(self.host_input, device=device)
        # log-probabilities and words of the candidates
        self.host_found = torch.zeros(2, rows, self.width + _EXTRAS, pin_memory=pinned)
        self.found = torch.zeros_like(self.host_found, device=device)

    def _parts(self, inputs: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens (N), parents (N), extra words (N, 2) and excluded ones (3)."""
        rows = self.states.size(1)
        tokens, parents, extra, excluded = inputs.split([rows, rows, _EXTRAS * rows, _EXCLUDED])
        return tokens, parents, extra.view(rows, _EXTRAS), excluded

    def compute(self) -> None:
        """The captured part: from the tokens of all rows to their candidates, attention and states."""
        decoder = self.decoder
        tokens, parents, extra, excluded = self._parts(self.input)
        encoder_out = {"encoder_out": [self.states], "encoder_padding_mask": [self.padding_mask]}
        state: Dict[str, Dict[str, Optional[Tensor]]] = {}
        before = {"states": self.states.index_select(1, parents), "keys_values": self.keys_values}
        decoder.set_incremental_state(state, "states", before)
        features, more = decoder.forward(
            tokens[:, None], encoder_out, incremental_state=state, features_only=True
        )
        self.states.copy_(decoder.get_incremental_state(state, "states")["states"])
        self.attention.copy_(more["attn"][0][:, -1])
        scores = decoder.output_layer(features)[:, -1]
        if self.temperature != 1:
            scores = scores / self.temperature
        log_probs = scores.log_softmax(1, dtype=torch.float32)
        best, words = topk(scores.index_fill_(1, excluded, -torch.inf), self.width)
        words = torch.cat([words, extra], 1)
        chosen = log_probs.gather(1, words)
        # excluded words are among the best where there are few others
        chosen[:, : self.width].masked_fill_(best == -torch.inf, -torch.inf)
        self.found[0].copy_(chosen)
        self.found[1].view(torch.int32).copy_(words)

    def begin(self, encoder_out: Dict[str, List[Tensor]]) -> None:
        """Copy the encoder's result for the first sentences."""
        memory = encoder_out["encoder_out"][0]  # (S, B, C)
        length, sentences, _ = memory.shape
        layers = self.decoder.layers
        keys_values = torch.stack([layer.encoder_attn.project(memory) for layer in layers])
        mask = next(iter(encoder_out["encoder_padding_mask"]), None)
        if mask is None:
            mask = self.padding_mask.new_zeros(sentences, length)
        self.set_state(self.states.new_zeros(len(layers), 0, self.states.size(2)), keys_values, mask)

    def state(self, rows: Tensor, sentences: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Return copies of the states of ``rows``, and of keys, values and padding of ``sentences``."""
        device = self.states.device
        rows, sentences = rows.to(device), sentences.to(device)
        return (
            self.states.index_select(1, rows),
            self.keys_values.index_select(2, sentences),
            self.padding_mask.index_select(0, sentences),
        )

    def set_state(self, states: Tensor, keys_values: Tensor, padding_mask: Tensor) -> None:
        """Write these to the first rows and sentences. Reset the others to the beginning of a search."""
        sentences, length = padding_mask.shape
        self.states.zero_()
        self.states[:, : states.size(1)] = states
        self.keys_values.zero_()  # where nothing is looked for, a weight of zero times infinity would be NaN
        self.keys_values[:, :, :sentences, :, :length] = keys_values
        self.padding_mask.zero_()  # what looks nowhere would be NaN
        self.padding_mask[:sentences, length:] = True
        self.padding_mask[:sentences, :length] = padding_mask

    def run(self, search: Any, rows: Tensor, tokens: Tensor, parents: Tensor) -> Tuple[Tensor, Tensor]:
        """Run a step. The search's rows are at ``rows`` and follow the rows ``parents`` of the last step.

        Returns:
            log-probabilities and words for ``search``, on the host
        """
        all_tokens, all_parents, all_extra, all_excluded = self._parts(self.host_input)
        all_tokens[rows] = tokens
        all_parents[rows] = parents
        extra, excluded = search.extra(), search.excluded()
        if extra.size(1) > 0:
            all_extra[rows, : extra.size(1)] = extra
        all_excluded.copy_(torch.tensor((excluded * _EXCLUDED)[:_EXCLUDED]))

        self.input.copy_(self.host_input, non_blocking=True)
        if self.graph is None:
            self.compute()
        else:
            self.graph.replay()
        self.host_found.copy_(self.found, non_blocking=True)
        if self.found.is_cuda:
            torch.cuda.current_stream().synchronize()
        columns = slice(self.width - search.width(), self.width + extra.size(1))
        log_probs, words = self.host_found[0], self.host_found[1].view(torch.int32)
        return log_probs[rows, columns], words[rows, columns]


def _width(beam_size: int) -> int:
    """Number of best words that a search needs."""
    return 1 if beam_size == 1 else 2 * beam_size


def _round_up(size: int, least: int) -> int:
    """Round a size up by at most a quarter, or to a multiple of ``least``: few graphs serve all sizes."""
    step = max(least, 1 << max(0, size.bit_length() - 3))
    return -(-size // step) * step

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
_STEPS = 32  # at most; those not used for longest go first
_CAPTURING = threading.Lock()  # a process may capture one graph at a time


class StepGraphs:
    """The decoder's steps for the native search, each a CUDA graph for some number of rows and source length.

    A shape's second use captures its graph. At the first use kernels are launched one by one. Graphs are
    dropped when modules, parameters, their values or settings were replaced, and by :meth:`clear`. Switches
    of PyTorch, as for TF32, count as they were at the capture. Searches of one model take turns.

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
        self._stream: Any = None  # graphs that share memory are captured on one
        self._clear()

    def clear(self) -> None:
        """Free all memory, after a search that is running."""
        with self._lock:
            self._clear()

    def _clear(self, memory: Optional[Tensor] = None) -> None:
        self._steps: OrderedDict[Tuple[Any, ...], _Step] = OrderedDict()
        self._memory = memory  # of keys and values: one step at a time needs them

    def _known(self) -> bool:
        """Whether the model is a known ``lrn`` on a device of the given type."""
        if self._snapshot is None or not self._snapshot.same():
            self._clear()
            self._weight, snapshot = None, Snapshot(self._model)
            if any(parameter.device.type == self._device_type for parameter in snapshot.parameters):
                self._read()
            self._snapshot = snapshot
        return self._weight is not None

    def _read(self) -> None:
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
        self, net_input: Dict[str, Tensor], search: Any, temperature: float
    ) -> Optional[Tuple[Tensor, ...]]:
        """Translate a batch.

        Args:
            net_input: with ``src_tokens`` (B, S), on the model's device
            search: a new native search of B sentences
            temperature: divides the scores

        Returns:
            as :meth:`~fairseq_lrn.inference.translator.Translator.search`, or None if the model is no known
            ``lrn`` on a device of the given type, or has fewer words than a step of the search may need
        """
        with self._lock:
            _, width, _, _ = search.sizes()
            if not self._known() or width > len(self._weight):
                return None
            # what a step keeps must be usable outside inference mode too
            with torch.cuda.device_of(self._weight), torch.inference_mode(False), torch.no_grad():
                return self._search(net_input, search, temperature)

    def _search(self, net_input: Dict[str, Tensor], search: Any, temperature: float) -> Tuple[Tensor, ...]:
        encoder_out = self._model.encoder.forward_torchscript(net_input)
        memory = encoder_out["encoder_out"][0]
        length, sentences, _ = memory.shape
        sizes = search.sizes()
        beam_size = sizes[0]
        # Row i of the search is row rows[i] of the step. At first a sentence has one row.
        rows = torch.arange(sentences) * beam_size
        index = _index(rows)
        kept: List[Tensor] = []  # attention of all rows, of each step
        places: List[Tensor] = []  # of the search's rows in these, one after the other
        offset = 0
        going = sentences > 0
        if going:
            step = self._step(sentences, length, sizes, temperature)
            step.begin(encoder_out)
        while going:
            tokens, order = search.rows()
            parents = rows if not kept else order if isinstance(index, slice) else rows[order]
            count = tokens.size(0)
            if len(kept) == 1 or count != rows.size(0):  # sentences have all their rows now, or some ended
                left = parents[::beam_size] // beam_size  # places of sentences in the step
                rows = (left[:, None] * beam_size + torch.arange(beam_size)).flatten()
                if 4 * len(left) <= step.sentences:  # they move to the beginning of a smaller step
                    state = step.state(parents, left)
                    step = self._step(len(left), length, sizes, temperature)
                    step.set_state(*state)
                    rows = parents = torch.arange(count)
                index = _index(rows)
            log_probs, words, attention = step.run(search, index, tokens, parents)
            going = search.advance(log_probs, words)
            places.append(rows + offset)
            kept.append(attention)
            offset += attention.size(0)
        *found, ancestors = search.hypotheses()
        found = [x.to(memory.device) for x in found]
        if not kept:
            return (*found, torch.empty(0, length, device=memory.device))
        attended = torch.cat(kept)[:, :length].index_select(0, torch.cat(places)[ancestors].to(memory.device))
        return (*found, attended.float())

    def _step(self, sentences: int, length: int, sizes: Tuple[int, ...], temperature: float) -> "_Step":
        """Return a step for at least this many sentences and source positions."""
        shape = (_round_up(sentences, 1), _round_up(length, 16))
        key = (*shape, sizes, temperature)
        step = self._steps.pop(key, None)
        if step is None:
            memory = self._keys_values(shape[0] * shape[1])
            while len(self._steps) >= _STEPS:
                self._steps.popitem(last=False)
            step = _Step(self._model.decoder, memory, *shape, sizes, temperature)
        elif step.graph is None and self._captures:
            self._capture(step)
        self._steps[key] = step
        return step

    def _keys_values(self, positions: int) -> Tensor:
        """Return memory for keys and values of this many positions. New memory drops all graphs."""
        layers, width = len(self._model.decoder.layers), self._weight.size(1)
        size = layers * 2 * width
        if self._memory is None or len(self._memory) < size * positions:
            self._clear()
            self._memory = self._weight.new_zeros(size * _round_up(positions, 256))
        return self._memory[: size * positions]

    def _capture(self, step: "_Step") -> None:
        """Capture a graph of ``step`` if possible."""
        for _ in range(2):
            try:
                step.graph = self._graph(step)
                return
            except RuntimeError as error:
                if "out of memory" not in str(error):
                    self._captures = False
                    logger.warning(
                        "no CUDA graph can be captured, kernels are launched one by one: %s", error
                    )
                    return
            for other in self._steps.values():
                other.graph = None  # a search may still hold the step that it leaves
            self._clear(self._memory)
        logger.info("there is too little memory for a CUDA graph, kernels are launched one by one")

    def _graph(self, step: "_Step") -> Any:
        """Return a graph whose ``replay()`` does what ``step.compute()`` does."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        others = [other.graph for other in self._steps.values() if other.graph is not None]
        if not others:
            self._stream = torch.cuda.Stream()
        with _CAPTURING:
            # Libraries load kernels at their first call. Only captures use the other stream: so its workspace
            # of cuBLAS is in the graphs' memory and lives as long, whoever clears PyTorch's workspaces.
            step.compute()
            try:
                # what other threads do meanwhile, such as reading ahead, does not matter
                pool = others[0].pool() if others else None
                with torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"):
                    step.compute()
            finally:
                torch.cuda.set_stream(current)  # PyTorch leaves the other one if capturing fails
        return graph


class _Step:
    """One step of a decoder. All its inputs and outputs have fixed places in memory.

    It has room for a number of sentences with ``beam_size`` rows each. Finished sentences stay in it.

    Args:
        decoder: of a known ``lrn``
        keys_values: memory for them, as many elements as they have
        sentences, length: for how many sentences and source positions it has room
        sizes: of the search, from its ``sizes()``
        temperature: divides the scores
    """

    def __init__(
        self,
        decoder: Any,
        keys_values: Tensor,
        sentences: int,
        length: int,
        sizes: Tuple[int, ...],
        temperature: float,
    ) -> None:
        weight = decoder.embed_tokens.weight
        beam_size, self.width, self.extras, self.excluded = sizes
        device, rows = weight.device, sentences * beam_size
        heads = weight.size(1) // decoder.layers[0].encoder_attn.head_dim
        pinned = device.type == "cuda"
        self.decoder, self.temperature, self.sentences = decoder, temperature, sentences
        self.graph: Any = None
        self.keys_values = keys_values.view(len(decoder.layers), 2, sentences, heads, length, -1)
        self.padding_mask = torch.zeros(sentences, length, dtype=torch.bool, device=device)
        self.states = weight.new_zeros(len(decoder.layers), rows, weight.size(1))
        self.attention = weight.new_zeros(rows, length)
        # of each row the token, the row that it follows and extra words; then what is excluded
        inputs = (2 + self.extras) * rows + self.excluded
        self.host_input = torch.zeros(inputs, dtype=torch.int64, pin_memory=pinned)
        self.input = torch.zeros_like(self.host_input, device=device)
        self.host_parts, self.parts = self._parts(self.host_input), self._parts(self.input)
        self.excluding: Any = None  # the words that host_input excludes
        # log-probabilities and words of the candidates
        self.host_found = torch.zeros(2, rows, self.width + self.extras, pin_memory=pinned)
        self.found = torch.zeros_like(self.host_found, device=device)
        self.host_log_probs, self.host_words = self.host_found[0], self.host_found[1].view(torch.int32)

    def _parts(self, inputs: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens (N), parents (N), extra words (N, extras) and excluded ones (excluded)."""
        rows = self.states.size(1)
        tokens, parents, extra, excluded = inputs.split([rows, rows, self.extras * rows, self.excluded])
        return tokens, parents, extra.view(rows, self.extras), excluded

    def compute(self) -> None:
        """The captured part: from the tokens of all rows to their candidates, attention and states."""
        decoder = self.decoder
        tokens, parents, extra, excluded = self.parts
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

    def run(self, search: Any, rows: Any, tokens: Tensor, parents: Tensor) -> Tuple[Tensor, ...]:
        """Run a step. The search's rows are at ``rows`` and follow the rows ``parents`` of the last step.

        Returns:
            log-probabilities and words for ``search``, on the host, and attention of all rows
        """
        all_tokens, all_parents, all_extra, all_excluded = self.host_parts
        all_tokens[rows] = tokens
        all_parents[rows] = parents
        extra, excluded = search.extra(), search.excluded()
        extras = extra.size(1)
        if extras > 0:
            all_extra[rows, :extras] = extra
        if excluded != self.excluding:
            all_excluded.copy_(torch.tensor((excluded * self.excluded)[: self.excluded]))
            self.excluding = excluded

        self.input.copy_(self.host_input, non_blocking=True)
        if self.graph is None:
            self.compute()
        else:
            self.graph.replay()
        self.host_found.copy_(self.found, non_blocking=True)
        attention = self.attention.clone()
        if self.found.is_cuda:
            torch.cuda.current_stream().synchronize()
        columns = slice(self.width - search.width(), self.width + extras)
        return self.host_log_probs[rows, columns], self.host_words[rows, columns], attention


def _index(rows: Tensor) -> Any:
    """Return what picks increasing ``rows`` fastest: a slice, if they are the first ones."""
    count = rows.size(0)
    return slice(count) if count > 0 and int(rows[-1]) == count - 1 else rows


def _round_up(size: int, least: int) -> int:
    """Round a size up by at most a quarter, or to a multiple of ``least``: few graphs serve all sizes."""
    step = max(least, 1 << max(0, size.bit_length() - 3))
    return -(-size // step) * step

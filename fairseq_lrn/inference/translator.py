"""The native translator of a model: for its beam search, and for fairseq's search."""

import logging
import threading
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from ..models.base import find_padding
from ..ops._library import loaded
from .cuda_graph import StepGraphs
from .reading import Snapshot, Unknown, read

logger = logging.getLogger(__name__)
COMPUTE_TYPES = ["float32", "bfloat16", "int8"]
_SECONDS = 0.2  # after which Python may handle a signal


class Translator:
    """Translates as a model ``lrn`` does, with its weights packed for the CPU.

    Weights are packed when they are first needed. They are packed again when modules, parameters or settings
    were replaced, when weights were written to in place, and after the model's ``train()``, ``eval()`` and
    ``load_state_dict()``. After writing by ``.data``, call :meth:`refresh`. A model that is not exactly known
    translates with its modules; the log says why.

    Products with weights use one of the :data:`COMPUTE_TYPES`. All else is float32.

    - ``float32``, as the model computes them
    - ``bfloat16``: weights and features are rounded to it, and sums are float32
    - ``int8``: each row of weights and of features is scaled, so that its largest absolute value is 127, and
      rounded. Sums of products are exact.

    Args:
        model: any fairseq model
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._packed: Optional[Tuple[Snapshot, Dict[str, Any]]] = None  # native translators by compute type
        self._lock = threading.Lock()
        self.reason: Optional[str] = None
        self.graphs = StepGraphs(model)  # for where the model is on a GPU

    @classmethod
    def of(cls, model: torch.nn.Module) -> "Translator":
        """Return the translator of ``model``, and make one if there is none. It packs the weights again."""
        translator = getattr(model, "translator", None) or cls(model)
        if hasattr(model, "translator"):
            model.translator = translator
        translator.refresh()
        return translator

    def __reduce__(self) -> Tuple[Any, ...]:
        """A copy of a model has no translator: this one has the weights of the original."""
        return type(None), ()

    def refresh(self) -> None:
        """Pack the weights again before the next use."""
        self._packed = None

    def owns(self, part: torch.nn.Module) -> bool:
        """Whether ``part`` is the model's encoder or decoder."""
        return part is self._model.encoder or part is self._model.decoder

    def native(self, compute_type: str = "float32") -> Any:
        """Return the native translator of the model as it is now, or None; :attr:`reason` then says why.

        Args:
            compute_type: one of the :data:`COMPUTE_TYPES`
        """
        packed = self._packed
        if packed is None or compute_type not in packed[1] or not packed[0].same():
            with self._lock:
                packed = self._packed
                if packed is None or not packed[0].same():
                    packed = Snapshot(self._model), {}
                if compute_type not in packed[1]:
                    packed[1][compute_type] = self._pack(compute_type)
                self._packed = packed
        return packed[1][compute_type]

    def _pack(self, compute_type: str) -> Any:
        native, reason = None, None
        try:
            if not loaded:
                raise Unknown("the compiled operators are missing")
            weights, settings = read(self._model)
            native = torch.classes.fairseq_lrn.Translator(weights, *settings.values(), compute_type)
        except (Unknown, ValueError) as error:
            reason = str(error)
        if reason is not None and reason != self.reason:
            logger.info("the model translates with PyTorch's modules: %s", reason)
        self.reason = reason
        return native

    def search(self, native: Any, src_tokens: Tensor, *arguments: Any) -> Tuple[Tensor, ...]:
        """Translate a batch with what :meth:`native` returned.

        Args:
            native: that translator
            src_tokens: (B, S)
            arguments: of the native search

        Returns:
            numbers of hypotheses of the B sentences; lengths and scores of the hypotheses, the best of a
            sentence first; ids, log-probabilities and attention (words, S) of all their words, one hypothesis
            after the other
        """
        translation = native.translation(src_tokens, *arguments)
        found = None
        while found is None:
            found = translation.advance(_SECONDS)
        return found

    def encode(self, native: Any, src_tokens: Tensor) -> Dict[str, List[Tensor]]:
        """As :meth:`~fairseq_lrn.models.lrn_encoder.LRNEncoder.forward`; at padding the output is zeros."""
        padding_mask = find_padding(src_tokens, self._model.encoder.padding_idx)
        return {
            "encoder_out": [native.encode(src_tokens)],
            "encoder_padding_mask": [] if padding_mask is None else [padding_mask],
            "encoder_states": [],
        }

    def extract_features(
        self,
        native: Any,
        prev_output_tokens: Tensor,
        encoder_out: Dict[str, List[Tensor]],
        incremental_state: Dict[str, Dict[str, Optional[Tensor]]],
        alignment_layer: Optional[int],
        alignment_heads: Optional[int],
    ) -> Tuple[Tensor, Dict[str, List[Optional[Tensor]]]]:
        """As :meth:`~fairseq_lrn.models.lrn_decoder.LRNDecoder.extract_features`, word by word."""
        decoder = self._model.decoder
        encoder_x = encoder_out["encoder_out"][0]
        padding_mask = next(iter(encoder_out["encoder_padding_mask"]), None)
        saved = decoder.get_incremental_state(incremental_state, "states")
        if saved is None:
            saved = {"states": None, "keys_values": native.project(encoder_x, padding_mask)}
        heads = decoder.embed_tokens.embedding_dim // decoder.layers[0].encoder_attn.head_dim
        features, states, attn = native.step(
            prev_output_tokens[:, -1],
            saved["keys_values"],
            padding_mask,
            encoder_x.size(0),
            saved["states"],
            decoder.alignment_layer if alignment_layer is None else alignment_layer,
            min(heads, decoder.alignment_heads if alignment_heads is None else alignment_heads),
        )
        decoder.set_incremental_state(
            incremental_state, "states", {"states": states, "keys_values": saved["keys_values"]}
        )
        return features.unsqueeze(1), {
            "attn": [None if attn is None else attn.unsqueeze(1)],
            "inner_states": [],
        }

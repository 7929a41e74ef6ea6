"""Translating from Python: fairseq's hub interface with the task ``lrn_translation``."""

import copy
from typing import Any, Dict, Iterator, List, Optional

import torch
from fairseq import hub_utils, utils
from fairseq.tasks.translation import TranslationTask
from omegaconf import open_dict
from torch import Tensor

from ..inference import COMPUTE_TYPES
from .translation import LRNTranslationTask


class TranslationHub(hub_utils.GeneratorHubInterface):
    """fairseq's hub interface, which keeps its generator from call to call.

    If you change the weights otherwise than by ``load_state_dict``, call ``refresh()`` of the model's
    ``translator``.
    """

    def __init__(self, cfg, task, models) -> None:
        super().__init__(cfg, task, models)
        self._kept: Any = None  # what the generator was made for, and the generator

    def generate(
        self,
        tokenized_sentences,
        beam: int = 5,
        verbose: bool = False,
        skip_invalid_size_inputs: bool = False,
        inference_step_args: Optional[Dict[str, Any]] = None,
        prefix_allowed_tokens_fn: Any = None,
        **kwargs,
    ):
        """As fairseq's: the hypotheses of each sentence, in order. Batches are formed by length."""
        one = torch.is_tensor(tokenized_sentences) and tokenized_sentences.dim() == 1
        if one or verbose or prefix_allowed_tokens_fn is not None:
            rest = (skip_invalid_size_inputs, inference_step_args, prefix_allowed_tokens_fn)
            return super().generate(tokenized_sentences, beam, verbose, *rest, **kwargs)
        generator = self._generator(beam, kwargs)
        found: Dict[int, List[Dict[str, Tensor]]] = {}
        for batch in self._build_batches(tokenized_sentences, skip_invalid_size_inputs):
            batch = utils.apply_to_sample(lambda x: x.to(self.device), batch)
            hypotheses = self.task.inference_step(generator, self.models, batch, **inference_step_args or {})
            found.update(zip(batch["id"].tolist(), hypotheses))
        return [found[i] for i in sorted(found)]

    def _generator(self, beam: int, options: Dict[str, Any]) -> Any:
        """Return the generator of the last call if it had the same options, or else a new one."""
        compute_type = getattr(self.task.cfg, "compute_type", None)
        wanted = (beam, options, self.cfg.generation, compute_type, list(map(id, self.models)))
        if self._kept is None or self._kept[0] != wanted:
            arguments = copy.deepcopy(self.cfg.generation)
            with open_dict(arguments):
                arguments.beam = beam
                for name, value in options.items():
                    setattr(arguments, name, value)
            generator = self.task.build_generator(self.models, arguments)
            self._kept = (copy.deepcopy(wanted), generator)
        return self._kept[1]

    def _build_batches(
        self, tokens: List[Tensor], skip_invalid_size_inputs: bool
    ) -> Iterator[Dict[str, Any]]:
        lengths = [len(sentence) for sentence in tokens]
        if max(lengths, default=0) > self.max_positions[0]:  # which fairseq raises for, or leaves out
            yield from super()._build_batches(tokens, skip_invalid_size_inputs)
            return
        dataset = self.task.build_dataset_for_inference(tokens, lengths)
        max_tokens = self.cfg.dataset.max_tokens or float("inf")
        max_sentences = self.cfg.dataset.batch_size or len(tokens)
        batch: List[int] = []
        for i in sorted(range(len(tokens)), key=lengths.__getitem__):
            if batch and (len(batch) == max_sentences or (len(batch) + 1) * lengths[i] > max_tokens):
                yield dataset.collater([dataset[j] for j in batch])
                batch = []
            batch.append(i)
        if batch:
            yield dataset.collater([dataset[j] for j in batch])


def from_pretrained(
    model_class: Any, path, checkpoint_file, data, compute_type: Optional[str] = None, **kwargs: Any
) -> TranslationHub:
    """Load as fairseq's ``from_pretrained`` does; a model of task ``translation`` gets ``lrn_translation``.

    Args:
        model_class: its ``hub_models()`` may name the path
        path, checkpoint_file, data, kwargs: as in fairseq; with ``task`` the task stays as it is
        compute_type: ``float32``, ``bfloat16`` or ``int8``, see :class:`~fairseq_lrn.inference.Translator`.
            None means the checkpoint's, which is ``float32`` unless training used another.

    Raises:
        ValueError: compute_type is another value, or the task is not ``lrn_translation``
    """
    if compute_type not in (None, *COMPUTE_TYPES):
        raise ValueError(f"compute_type is {compute_type!r}, but must be one of {', '.join(COMPUTE_TYPES)}")
    found = hub_utils.from_pretrained(
        path, checkpoint_file, data, archive_map=model_class.hub_models(), **kwargs
    )
    task = found["task"]
    if type(task) is TranslationTask and "task" not in kwargs:
        with open_dict(task.cfg):
            task.cfg.compute_type = "float32"
        task = LRNTranslationTask(task.cfg, task.src_dict, task.tgt_dict)
    if compute_type is not None:
        if not isinstance(task, LRNTranslationTask):
            kind = type(task).__name__
            raise ValueError(f"compute_type needs the task lrn_translation, but the task is a {kind}")
        task.cfg.compute_type = compute_type
    return TranslationHub(found["args"], task, found["models"])

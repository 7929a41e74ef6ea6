"""Shared by all models of this package: the unit's options and checks, embeddings, architectures."""

import os
from dataclasses import dataclass, field, make_dataclass
from typing import Any, Callable, Dict, Iterable, List, Optional

import torch
import torch.nn as nn
from fairseq import utils
from fairseq.data import Dictionary
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.file_io import PathManager
from fairseq.models import (
    ARCH_MODEL_NAME_REGISTRY,
    MODEL_DATACLASS_REGISTRY,
    register_model_architecture,
)
from fairseq.models.transformer import Embedding
from fairseq.modules import AdaptiveSoftmax, FairseqDropout
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ..modules import CELLS
from ..ops import dropout

Activation = ChoiceEnum(["tanh", "identity"])


@dataclass
class CellConfig(FairseqDataclass):
    """Options of every model."""

    checkpoint = None  # fairseq's options of loading, where one of its commands builds the model

    cell: ChoiceEnum(CELLS) = field(
        default="lrn", metadata={"help": "recurrent unit; olrn is lrn with an output gate"}
    )
    cell_activation: Activation = field(
        default="tanh",
        metadata={
            "help": "activation g of lrn and olrn (tanh, as in the authors' models except for translation)"
        },
    )
    dropout: float = field(default=0.1, metadata={"help": "dropout probability"})

    @classmethod
    def from_namespace(cls, args: Any) -> "CellConfig":
        """As :meth:`FairseqDataclass.from_namespace`, and keep the other groups of a whole configuration."""
        config = super().from_namespace(args)
        if isinstance(args, DictConfig):
            config.checkpoint = OmegaConf.select(args._get_root(), "checkpoint")
        return config


@dataclass
class AdaptiveSoftmaxConfig(FairseqDataclass):
    """Options of models whose softmax may be fairseq's adaptive one, named as the Transformer's."""

    adaptive_softmax_cutoff: Optional[List[int]] = field(
        default=None,
        metadata={
            "help": "list of adaptive softmax cutoff points. Must be used with adaptive_loss criterion"
        },
    )
    adaptive_softmax_dropout: float = field(
        default=0.0, metadata={"help": "sets adaptive softmax dropout for the tail projections"}
    )
    adaptive_softmax_factor: float = field(default=4, metadata={"help": "adaptive input factor"})


class Dropout(FairseqDropout):
    """fairseq's dropout, by :func:`~fairseq_lrn.ops.dropout`."""

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """Return ``x`` with elements dropped while training, and later too with ``--retain-dropout``."""
        if self.p > 0 and (self.training or self.apply_during_inference):
            return dropout(x, self.p)
        return x


class NoTorchScript:
    """A base of models that TorchScript cannot compile."""

    def __prepare_scriptable__(self) -> nn.Module:
        """Raise TypeError, before ``torch.jit.script`` fails at the first line that it cannot read."""
        raise TypeError(
            f"{type(self).__name__} is not written for TorchScript: use torch.compile or torch.export"
        )


def build_adaptive_softmax(
    cfg: AdaptiveSoftmaxConfig, dictionary: Dictionary, embed_dim: int
) -> AdaptiveSoftmax:
    """Make fairseq's adaptive softmax of ``dictionary`` over features of width ``embed_dim``."""
    return AdaptiveSoftmax(
        len(dictionary),
        embed_dim,
        cfg.adaptive_softmax_cutoff,
        dropout=cfg.adaptive_softmax_dropout,
        factor=cfg.adaptive_softmax_factor,
    )


def check_cell(cfg: CellConfig) -> None:
    """Raise ValueError if ``cfg`` gives an activation to a unit that does not take one."""
    if cfg.cell not in ("lrn", "olrn") and cfg.cell_activation not in (None, "tanh"):
        raise ValueError(
            f"--cell-activation {cfg.cell_activation} is for lrn and olrn, but --cell is {cfg.cell}"
        )


def check_positive(cfg: Any, names: Iterable[str]) -> None:
    """Raise ValueError if one of the options ``names`` is given and not positive."""
    for name in names:
        if getattr(cfg, name, 1) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}, but must be positive")


def refuse_full_context(full_context_alignment: bool) -> None:
    """Raise ValueError for ``full_context_alignment``, which fairseq's Transformer has."""
    if full_context_alignment:
        raise ValueError("full_context_alignment must be False: a recurrent decoder reads no later words")


def prepared(part: Any) -> Any:
    """Return the native part of an encoder's or decoder's ``translator`` if it replaces ``forward``.

    It does if it was made for a model that still has this part, and there are no gradients. Otherwise return
    None.
    """
    translator = part.translator
    if translator is None or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    if torch._C._is_any_autocast_enabled() or not translator.owns(part):
        return None
    return translator.native()


def find_padding(tokens: Tensor, padding_idx: int, compiled: bool = False) -> Optional[Tensor]:
    """Return where ``tokens`` (B, T) are padding, a bool mask of that shape, or None if none is.

    A graph that ``torch.compile`` or ``torch.export`` traces must fit every batch. So there, and for layers
    that are ``compiled``, it is always a mask.
    """
    mask = tokens.eq(padding_idx)
    if compiled or torch.compiler.is_compiling() or bool(mask.any()):
        return mask
    return None


def pick_sentences(new_order: Tensor, rows: int, sentences: int) -> Optional[Tensor]:
    """Find the sentences to keep for new rows; a sentence is kept once for all its neighbouring rows.

    Args:
        new_order: (N'), the old row of each new row
        rows: N, number of old rows, a multiple of B
        sentences: B

    Returns:
        the sentence of each new row, or of each group of rows if the number of rows a sentence stays the
        same; None if the B sentences can stay as they are
    """
    beams = rows // sentences
    picked = torch.div(new_order, beams, rounding_mode="floor")
    if beams == 1:
        beams = max(new_order.size(0) // sentences, 1)
        same = torch.arange(sentences, device=new_order.device).repeat_interleave(beams)
        return None if torch.equal(picked, same) else picked
    if new_order.size(0) % beams == 0:
        groups = picked.view(-1, beams)
        first = groups[:, 0]
        if torch.equal(groups, first.unsqueeze(1).expand_as(groups)):
            same = torch.arange(sentences, device=new_order.device)
            return None if torch.equal(first, same) else first
    return picked


def reorder_sentences(encoder_out: Dict[str, List[Tensor]], new_order: Tensor) -> Dict[str, List[Tensor]]:
    """Return ``encoder_out`` with its sentences picked and ordered by ``new_order`` (N').

    If ``new_order`` repeats each sentence equally often, as beam search does, the result has each sentence
    once, and an empty tensor of N' rows in ``rows``. From then on ``new_order`` picks rows.
    """
    sentences = encoder_out["encoder_out"][0].size(1)
    rows = encoder_out["rows"][0].size(0) if "rows" in encoder_out else sentences
    picked = pick_sentences(new_order, rows, sentences)
    result = encoder_out.copy()
    if picked is not None:
        for name, parts in encoder_out.items():
            if name != "rows":
                dim = 0 if name == "encoder_padding_mask" else 1
                result[name] = [x.index_select(dim, picked) for x in parts]
    result["rows"] = [new_order.new_empty(new_order.size(0), 0)]
    return result


def build_embedding(
    dictionary: Dictionary, embed_dim: int, cfg: Optional[CellConfig] = None, option: str = ""
) -> nn.Embedding:
    """Make an embedding; words in fairseq's text file ``cfg.option`` get the vectors from there."""
    embedding = Embedding(len(dictionary), embed_dim, dictionary.pad())
    if cfg is not None:
        read_vectors(
            embedding,
            cfg,
            option,
            lambda path: utils.load_embedding(utils.parse_embedding(path), dictionary, embedding),
        )
    return embedding


def read_vectors(embedding: nn.Embedding, cfg: CellConfig, option: str, read: Callable[[str], None]) -> None:
    """Call ``read`` with the path ``cfg.option``, if one is given, to fill ``embedding`` before training.

    A model that loads a checkpoint needs no file, but fairseq does not say whether it will load one. So
    fairseq's commands do not read the file if there is a checkpoint to continue from. A fault of the file
    becomes a ValueError when training uses the embedding and no checkpoint was loaded.
    """
    path = getattr(cfg, option)
    if not path:
        return
    if cfg.checkpoint is None:
        read(path)
        return
    problem = "was not read, since there was a checkpoint to go on from, which then was not loaded"
    if not is_restored(cfg.checkpoint):
        try:
            read(path)
            return
        except Exception as error:
            problem = f"cannot be read: {error}"
    Refusal(embedding, f"--{option.replace('_', '-')} {path} {problem}")


class Refusal:
    """Raises ValueError when ``embedding`` is used in training before it is loaded."""

    def __init__(self, embedding: nn.Embedding, message: str) -> None:
        self.message = message
        self.hook = embedding.register_forward_pre_hook(self.refuse)
        embedding.register_load_state_dict_post_hook(self.forget)

    def refuse(self, embedding: nn.Module, inputs: Any) -> None:
        """Raise ValueError if ``embedding`` is training."""
        if embedding.training:
            raise ValueError(self.message)

    def forget(self, embedding: nn.Module, incompatible_keys: Any) -> None:
        """Let ``embedding`` be used."""
        self.hook.remove()


def is_restored(checkpoint: Any) -> bool:
    """Whether fairseq-train, with the options ``checkpoint``, finds a checkpoint to start from."""
    path, others = checkpoint.restore_file, []
    if path == "checkpoint_last.pt":
        path = os.path.join(checkpoint.save_dir, path)
        others = [checkpoint.get(name) for name in ("continue_once", "finetune_from_model")]
    path = path.replace(".pt", f"{checkpoint.checkpoint_suffix or ''}.pt")
    return any(name and PathManager.isfile(name) for name in (path, *others))


def build_output_projection(embed_tokens: nn.Embedding, shared: bool) -> nn.Linear:
    """Return the layer from features to scores, with the weights of ``embed_tokens`` if ``shared``."""
    projection = nn.Linear(embed_tokens.embedding_dim, embed_tokens.num_embeddings, bias=False)
    if shared:
        projection.weight = embed_tokens.weight
    else:
        nn.init.normal_(projection.weight, mean=0, std=embed_tokens.embedding_dim**-0.5)
    return projection


def architecture(model: str, name: str, **values: Any) -> None:
    """Register architecture ``name``: ``model`` with the defaults of its options, except for ``values``.

    fairseq calls the function for ``--arch``. A YAML file's ``_name`` selects the dataclass; values in the
    file replace its defaults.
    """

    @register_model_architecture(model, name)
    def apply(cfg: Any) -> None:
        for option, value in values.items():
            if not hasattr(cfg, option):
                setattr(cfg, option, value)

    config = MODEL_DATACLASS_REGISTRY[model]
    options = [
        (option, config.__dataclass_fields__[option].type, field(default=value))
        for option, value in values.items()
    ]
    config = make_dataclass(name, options, bases=(config,))
    node = config()
    node._name = name
    MODEL_DATACLASS_REGISTRY[name] = config
    ARCH_MODEL_NAME_REGISTRY[name] = name  # where fairseq looks for the dataclass
    ConfigStore.instance().store(name=name, group="model", node=node, provider="fairseq_lrn")

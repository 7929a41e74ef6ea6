"""Reads a model into the names and settings of the native translator, or says why it cannot."""

import functools
import itertools
import operator
import types
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from fairseq.modules import LayerDropModuleList, gelu, gelu_accurate
from fairseq.modules.checkpoint_activations import _checkpointed_forward
from fairseq.modules.quant_noise import quant_noise
from fairseq.utils import get_activation_fn
from torch import Tensor
from torch.nn.modules import module as modules

from ..models.base import Dropout
from ..models.deepnmt import DeepNMTModel
from ..models.lrn import LRNModel
from ..models.lrn_decoder import LRNDecoder
from ..models.lrn_encoder import LRNEncoder
from ..models.lrn_layers import EncoderAttention, FeedForward, LRNDecoderLayer, LRNEncoderLayer, WordDropout
from ..modules import LRN

_LINEAR, _NORM, _DROPOUT = (nn.Linear,), (nn.LayerNorm,), (Dropout,)
_ENDS = {
    "embed_tokens": (nn.Embedding,),
    "dropout_module": (Dropout, WordDropout),
    "layers": (nn.ModuleList, LayerDropModuleList),
    "layer_norm": _NORM,
}
_BLOCK = {
    "dropout_module": _DROPOUT,
    "rnn_layer_norm": _NORM,
    "rnn": (LRN,),
    "out_proj": _LINEAR,
    "final_layer_norm": _NORM,
    "ffn": (FeedForward,),
}
# Of each module that the translator knows: the modules inside it, and the attributes that count.
CHILDREN: Dict[type, Mapping[str, Tuple[type, ...]]] = {
    LRNModel: {"encoder": (LRNEncoder,), "decoder": (LRNDecoder,)},
    LRNEncoder: _ENDS,
    LRNDecoder: {**_ENDS, "output_projection": _LINEAR},
    LRNEncoderLayer: _BLOCK,
    LRNDecoderLayer: {**_BLOCK, "encoder_attn_layer_norm": _NORM, "encoder_attn": (EncoderAttention,)},
    FeedForward: {"fc1": _LINEAR, "fc2": _LINEAR, "activation_dropout_module": _DROPOUT},
    EncoderAttention: {
        **dict.fromkeys(("k_proj", "v_proj", "q_proj", "out_proj"), _LINEAR),
        "dropout_module": _DROPOUT,
    },
    **{kind: {} for kind in (nn.Linear, nn.LayerNorm, nn.Embedding, LRN, Dropout, WordDropout)},
}
LAYERS = {LRNEncoder: LRNEncoderLayer, LRNDecoder: LRNDecoderLayer}
SETTINGS: Dict[type, Tuple[str, ...]] = {
    LRNEncoder: ("embed_scale", "padding_idx"),
    LRNDecoder: ("embed_scale", "num_layers", "alignment_layer", "alignment_heads"),
    FeedForward: ("activation_fn",),
    EncoderAttention: ("head_dim",),
    LRN: ("activation", "output_gate", "bidirectional", "num_layers", "layer_norm", "batch_first", "bias"),
    nn.LayerNorm: ("eps",),
    nn.Embedding: ("max_norm",),
    Dropout: ("apply_during_inference", "p"),
    WordDropout: ("apply_during_inference", "p"),
}
_FORWARD, _VERSION, _DTYPE = map(operator.attrgetter, ("forward", "_version", "dtype"))
_ACTIVATIONS = {F.relu: "relu", torch.tanh: "tanh", gelu: "gelu", gelu_accurate: "gelu_accurate"}
_LINEAR_CODE = get_activation_fn("linear").__code__  # a new function each time
_GLOBAL_HOOKS = (modules._global_forward_hooks, modules._global_forward_pre_hooks)


def _methods(kind: type) -> Dict[str, Callable]:
    """Return the methods of a class, except special ones: torch.compile replaces Module.__init__."""
    return {
        name: value for name, value in vars(kind).items() if callable(value) and not name.startswith("__")
    }


# What these classes were when this file was read: nobody had changed a method yet.
_METHODS = {
    kind: _methods(kind)
    for known in (*CHILDREN, DeepNMTModel)
    for kind in known.__mro__
    if kind is not object
}


class Unknown(Exception):
    """What the translator does not know about a model, in one sentence."""


class Snapshot:
    """All that a model's results depend on, except the weights' values. It is compared before each use.

    It detects added, removed and replaced modules, hooks, parameters and settings. It detects weights that
    were written to in place, but not by ``.data``. It makes few calls: a sentence may take less than a
    millisecond.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self.states = list(map(vars, self.modules))
        self.owners, self.hooks, self.getters = [], list(_GLOBAL_HOOKS), []
        for module, state in zip(self.modules, self.states):
            self.owners += [module._modules, module._parameters]
            self.hooks += [module._forward_hooks, module._forward_pre_hooks]
            names = ("training", "forward", *SETTINGS.get(type(module), ()))
            self.getters.append(operator.itemgetter(*(name for name in names if name in state)))
        self.owners = list(filter(None, self.owners))
        self.owned = list(self._owned())  # kept, so that no other object gets their ids
        self.parameters = [value for value in self.owned if isinstance(value, Tensor)]
        self.versioned = [value for value in self.parameters if not value.is_inference()]
        self.was = self._now()

    def _owned(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(map(dict.values, self.owners))

    def _now(self) -> List[List[Any]]:
        return [
            list(map(type, self.modules)),
            list(map(len, self.states)),
            list(map(len, self.hooks)),
            list(map(id, self._owned())),
            list(map(Tensor.data_ptr, self.parameters)),
            list(map(_DTYPE, self.parameters)),  # memory of one may be used again for another
            list(map(Tensor.is_contiguous, self.parameters)),
            list(map(_VERSION, self.versioned)),
            list(map(_FORWARD, CHILDREN)),
            [get(state) for get, state in zip(self.getters, self.states)],
        ]

    def same(self) -> bool:
        """Whether all is as it was."""
        try:
            return self._now() == self.was
        except KeyError:  # an attribute is gone
            return False


def replaced_method() -> Optional[str]:
    """Return the name of a method of the models' classes that was replaced, or None."""
    for kind, methods in _METHODS.items():
        for name, now in _methods(kind).items():
            if now is not methods.get(name):
                return f"{kind.__name__}.{name}"
    return None


def read(
    model: nn.Module, device_type: str = "cpu", dtypes: Tuple[torch.dtype, ...] = (torch.float32,)
) -> Tuple[Dict[str, Tensor], Dict[str, Any]]:
    """Return the weights of ``model`` by their names, with each LayerNorm's eps, and the other settings.

    Raises:
        Unknown: the results do not follow from these alone, or the weights have another type of device or
            dtype
    """
    if any(_GLOBAL_HOOKS):
        raise Unknown("hooks on all modules are registered")
    if type(model) is not LRNModel:
        raise Unknown(f"the model is a {type(model).__name__}")
    replaced = replaced_method()
    if replaced is not None:
        raise Unknown(f"{replaced} was replaced")
    weights: Dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        _check(name or "the model", module)
        for parameter, value in module._parameters.items():
            if value is not None:
                weights[f"{name}.{parameter}"] = value.detach()
                _check_weight(f"{name}.{parameter}", value, device_type, dtypes)
        if type(module) is nn.LayerNorm:
            weights[f"{name}.eps"] = torch.tensor(float(module.eps))

    layers = [*_children(model.encoder.layers), *_children(model.decoder.layers)]
    for layer in layers:
        rnn, both = layer.rnn, type(layer) is LRNEncoderLayer
        if (rnn.num_layers, rnn.bidirectional, rnn.layer_norm, rnn.batch_first) != (1, both, False, False):
            raise Unknown(f"a recurrence is {rnn}")
    if model.decoder.num_layers != len(model.decoder.layers):
        raise Unknown(f"the decoder's num_layers is {model.decoder.num_layers}")
    head_dim = _same("head_dim", [layer.encoder_attn for layer in _children(model.decoder.layers)])
    width = model.decoder.embed_tokens.embedding_dim
    if head_dim <= 0 or width % head_dim != 0:
        raise Unknown(f"head_dim, {head_dim}, does not divide the decoder's width, {width}")
    return weights, {
        "activation": _same("activation", [layer.rnn for layer in layers]),
        "activation_fn": _same("activation_fn", [layer.ffn for layer in layers], _activation),
        "output_gate": _same("output_gate", [layer.rnn for layer in layers]),
        "heads": width // head_dim,
        "encoder_scale": float(model.encoder.embed_scale),
        "decoder_scale": float(model.decoder.embed_scale),
        "pad": model.encoder.padding_idx,
        "attention_layer": model.decoder.alignment_layer,
        "attention_heads": min(model.decoder.alignment_heads, width // head_dim),
    }


def _children(layers: nn.Module) -> List[nn.Module]:
    return list(layers._modules.values())  # iterating, LayerDropModuleList draws random numbers


def _check(name: str, module: nn.Module) -> None:
    kind = type(module)
    if kind in (nn.ModuleList, LayerDropModuleList):
        return
    if kind not in CHILDREN:
        raise Unknown(f"{name} is a {kind.__module__}.{kind.__name__}")
    children = {child: type(value) for child, value in module._modules.items() if value is not None}
    if children.keys() != CHILDREN[kind].keys():
        raise Unknown(f"{name} has other modules than a {kind.__name__}: {', '.join(children)}")
    for child, child_kind in children.items():
        if child_kind not in CHILDREN[kind][child]:
            raise Unknown(f"{name}.{child} is a {child_kind.__module__}.{child_kind.__name__}")
    if kind in LAYERS and {type(layer) for layer in _children(module.layers)} != {LAYERS[kind]}:
        raise Unknown(f"{name}.layers are not {LAYERS[kind].__name__} alone")
    if module.training:
        raise Unknown(f"{name} is in training mode")
    if getattr(module, "apply_during_inference", False) and module.p > 0:
        raise Unknown(f"{name} drops out while it translates")
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if not all(map(_is_quantization_noise, hooks)):
        raise Unknown(f"{name} has a hook")
    tensors = [attribute for attribute, value in vars(module).items() if isinstance(value, Tensor)]
    if module._buffers or tensors:
        raise Unknown(f"{name}.{[*module._buffers, *tensors][0]} is no parameter")
    if kind is LRN and module.bias != (module._parameters.get("bias_ih_l0") is not None):
        raise Unknown(f"{name} has a bias that does not count")
    harmless = {"train", "_compiled_call_impl"}
    own = [attribute for attribute in vars(module).keys() - harmless if hasattr(kind, attribute)]
    if own and not (own == ["forward"] and _is_checkpointed(module)):
        raise Unknown(f"{name} has a {own[0]} of its own")
    if kind is nn.LayerNorm and None in (module.weight, module.bias):
        raise Unknown(f"{name} has no weight or no bias")
    if kind is nn.Embedding and module.max_norm is not None:
        raise Unknown(f"{name} has a max_norm")


def _is_quantization_noise(hook: Callable) -> bool:
    # fairseq's, which does nothing but in training
    return isinstance(hook, types.FunctionType) and hook.__code__ in quant_noise.__code__.co_consts


def _is_checkpointed(module: nn.Module) -> bool:
    forward = vars(module)["forward"]
    return (
        isinstance(forward, functools.partial)
        and forward.func is _checkpointed_forward
        and forward.args[0] == types.MethodType(type(module).forward, module)
    )


def _check_weight(name: str, value: Tensor, device_type: str, dtypes: Tuple[torch.dtype, ...]) -> None:
    if type(value) is not nn.Parameter:
        raise Unknown(f"{name} is a {type(value).__name__}")
    if value.dtype not in dtypes or value.device.type != device_type:
        raise Unknown(f"{name} is {value.dtype} on {value.device}")


def _same(name: str, owners: List[nn.Module], read: Callable = lambda value: value) -> Any:
    values = {read(getattr(owner, name)) for owner in owners}
    if len(values) != 1:
        raise Unknown(f"layers have more than one {name}")
    return values.pop()


def _activation(function: Callable) -> str:
    if getattr(function, "__code__", None) is _LINEAR_CODE:
        return "linear"
    if function not in _ACTIVATIONS:
        raise Unknown(f"the activation function is {getattr(function, '__name__', function)}")
    return _ACTIVATIONS[function]

"""Draw what a trained lrn model remembers, and where it looks, while it translates a sentence.

python plot.py CHECKPOINT DATA-BIN SPM.MODEL "A sentence." --output FOLDER
"""

import argparse
import logging
import os
from pathlib import Path
from typing import List, Tuple

import matplotlib
import torch
from torch import Tensor

from fairseq_lrn.models import LRNModel

matplotlib.use("Agg")
from matplotlib import pyplot

MOST_TOKENS = 100  # a picture grows with the square of their number


def unroll(projections: Tensor, states: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Unroll the recurrence of one sentence: the weight of each value in each state.

    Let c = i * v + f * h and h' = s * c. s is 1 for g = identity and tanh(c) / c for g = tanh, times the
    output gate in oLRN. Then h_t is the sum over k <= t of i_k * s_k * (the product over k < l <= t of f_l *
    s_l) * v_k. With g = identity this is the paper's view of LRN as attention. It is exact with any g.

    Args:
        projections: (T, 3·D), q | k | v, or (T, 4·D) with an output gate
        states: (T, D), the recurrence's states from a zero state

    Returns:
        input gates (T, D), forget gates (T, D), and weights (T, T, D). The weight at [t, k] is that of the
        value at step k in the state at step t, zero for k > t.
    """
    steps, size = states.shape
    q, k, v = projections.split(size, 1)[:3]
    previous = torch.cat([states.new_zeros(1, size), states[:-1]])
    i, f = torch.sigmoid(k + previous), torch.sigmoid(q - previous)
    cell = i * v + f * previous
    scale = torch.where(cell == 0, torch.ones_like(cell), states / cell)
    weights = states.new_zeros(steps, steps, size)
    for t in range(steps):
        if t > 0:
            weights[t] = weights[t - 1] * f[t] * scale[t]
        weights[t, t] = i[t] * scale[t]
    return i, f, weights


def look(
    hub, sentence: str, side: str, layer: int
) -> Tuple[List[str], List[str], Tensor, Tensor, Tensor, Tensor]:
    """Translate ``sentence`` and look into layer ``layer`` of the model's encoder or decoder.

    Returns:
        source tokens (S), target tokens (T), attention (T, S), and the results of :func:`unroll` for the
        forward recurrence over the tokens of ``side``

    Raises:
        ValueError: the recurrence is neither LRN nor oLRN, there is no such layer, or too many tokens
    """
    # Not torch.no_grad(): with it the encoder's layers are operators, which call no hooks.
    model = hub.models[0].requires_grad_(False)
    if model.cfg.cell not in ("lrn", "olrn"):
        raise ValueError(f"the model's cell is {model.cfg.cell}, but only lrn and olrn can be unrolled")
    layers = (model.encoder if side == "encoder" else model.decoder).layers
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer is {layer}, but the {side} has layers 0 to {len(layers) - 1}")
    rnn = layers[layer].rnn
    seen = []
    hook = rnn.register_forward_hook(lambda module, inputs, outputs: seen.append((inputs[0], outputs[0])))
    source = hub.encode(sentence)
    if len(source) > MOST_TOKENS:
        raise ValueError(f"the sentence has {len(source)} tokens, but a picture shows at most {MOST_TOKENS}")
    target = hub.generate(source, max_len_b=MOST_TOKENS - 1)[0]["tokens"].to(source.device)
    seen.clear()
    shifted = torch.cat([target[-1:], target[:-1]])
    _, extra = model(source[None].to(hub.device), None, shifted[None].to(hub.device))
    hook.remove()
    ((input, output),) = seen
    size = rnn.hidden_size
    rows = (4 if rnn.output_gate else 3) * size  # of the first direction
    projections = torch.nn.functional.linear(input[:, 0], rnn.weight_ih_l0[:rows], rnn.bias_ih_l0[:rows])
    return (
        [hub.src_dict[token] for token in source],
        [hub.tgt_dict[token] for token in target],
        extra["attn"][0][0],
        *unroll(projections, output[:, 0, :size]),
    )


def heatmap(axes, values: Tensor, rows: List[str], columns: List[str]) -> None:
    """Show ``values`` (rows, columns) with a label at each row and column."""
    image = axes.imshow(values.cpu(), cmap="viridis", vmin=0, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)


def draw_memory(tokens: List[str], i: Tensor, f: Tensor, weights: Tensor, title: str):
    """Return a figure of the paper's two views: each token's weight in each state, and the gates."""
    size = 2 + 0.32 * len(tokens)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(1.7 * size + 2, size), layout="constrained", width_ratios=[3, 2]
    )
    heatmap(left, weights.abs().mean(2), tokens, tokens)
    left.set(title="what the state holds of each token", xlabel="token k", ylabel="state after token t")
    heatmap(right, torch.stack([i.mean(1), f.mean(1)], 1), tokens, ["input gate", "forget gate"])
    right.set(title="gates, mean of the units")
    figure.suptitle(title)
    return figure


def draw_attention(source: List[str], target: List[str], attention: Tensor):
    """Return a figure of the attention (T, S) of each target token over the source."""
    figure, axes = pyplot.subplots(
        figsize=(2.5 + 0.32 * len(source), 2 + 0.32 * len(target)), layout="constrained"
    )
    heatmap(axes, attention, target, source)
    axes.set(title="attention, mean of the heads", xlabel="source", ylabel="target")
    return figure


def main() -> None:
    """Read the command line, write memory and attention as pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="checkpoint of an lrn model")
    parser.add_argument("data", type=Path, help="folder with the dictionaries")
    parser.add_argument("sentencepiece_model", type=Path)
    parser.add_argument("sentence")
    parser.add_argument("--output", type=Path, default=Path(), help="folder to write to (default: .)")
    parser.add_argument("--format", choices=["png", "svg"], default="png")
    parser.add_argument("--side", choices=["encoder", "decoder"], default="encoder", help="draw its memory")
    parser.add_argument("--layer", type=int, default=0, help="draw its memory; from 0")
    args = parser.parse_args()
    for path in (args.checkpoint, args.data, args.sentencepiece_model):
        if not path.exists():
            parser.error(f"there is no {path}")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output is {args.output}, a file, but must be a folder")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # fairseq makes every logger tell all
    hub = LRNModel.from_pretrained(
        str(args.checkpoint.parent),
        args.checkpoint.name,
        data_name_or_path=os.path.abspath(args.data),
        bpe="sentencepiece",
        sentencepiece_model=str(args.sentencepiece_model),
    )
    try:
        source, target, attention, i, f, weights = look(hub, args.sentence, args.side, args.layer)
    except ValueError as error:
        parser.error(str(error))
    tokens = source if args.side == "encoder" else ["</s>", *target[:-1]]
    args.output.mkdir(parents=True, exist_ok=True)
    for name, figure in (
        ("memory", draw_memory(tokens, i, f, weights, f"{args.side}, layer {args.layer}")),
        ("attention", draw_attention(source, target, attention)),
    ):
        path = args.output / f"{name}.{args.format}"
        figure.savefig(path, dpi=110)
        print(path)


if __name__ == "__main__":
    main()

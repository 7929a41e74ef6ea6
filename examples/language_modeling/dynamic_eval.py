"""Perplexity of a text under a language model that learns from it (Krause et al., ICML 2018).

python dynamic_eval.py DATA-BIN --user-dir PATH/fairseq_lrn --path CHECKPOINT --gen-subset test

Each block of ``--tokens-per-sample`` words is scored first. Then the model makes one step down the gradient g
of the block's mean loss, and its weights w decay to the trained ones, w0::

    sgd:  w += decay * (w0 - w) - learning_rate * g
    rms:  w += decay * r * (w0 - w) - learning_rate * g / (s + epsilon)

s is the root mean square of such gradients over the training text, which is read as ``--batch-size`` streams.
r is s / mean(s), cut at 1 / decay. The text itself is one stream, and its state is carried.
"""

import argparse
import ast
import math
import sys
from typing import Any, Dict, Iterator, List, Tuple

import torch
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from torch import Tensor
from torch.nn import functional as F


def score(model, sample: Dict[str, Any]) -> Tuple[Tensor, int]:
    """Return the summed loss of a batch and its number of words."""
    net_output = model(**sample["net_input"])
    target, pad = sample["target"].view(-1), model.decoder.dictionary.pad()
    if model.decoder.adaptive_softmax is None:
        log_probs = model.get_normalized_probs(net_output, log_probs=True).flatten(0, 1)
        loss = F.nll_loss(log_probs, target, ignore_index=pad, reduction="sum")
    else:  # fairseq's adaptive_loss leaves out one word of each cluster but the first, as if it were padding
        logits, targets = model.decoder.adaptive_softmax(net_output[0], target)
        loss = F.cross_entropy(logits[0], targets[0], ignore_index=pad, reduction="sum")
        for scores, words in zip(logits[1:], targets[1:]):
            if words is not None:
                loss = loss + F.cross_entropy(scores, words, reduction="sum")
    return loss, sample["ntokens"]


def gradients(model, batches, device) -> Iterator[Tuple[float, int, Tuple[Tensor, ...]]]:
    """Yield each batch's summed loss, its number of words and the gradients of its mean loss.

    Raises:
        FloatingPointError: a loss is NaN, or too large for a perplexity
    """
    parameters = list(model.parameters())
    for number, sample in enumerate(batches, 1):
        sample = utils.move_to_cuda(sample, device) if device.type == "cuda" else sample
        loss, words = score(model, sample)
        if not loss.item() / words < 700:
            raise FloatingPointError(
                f"the loss of a word in block {number} is {loss.item() / words}: the model diverged"
            )
        yield loss.item(), words, torch.autograd.grad(loss / words, parameters, materialize_grads=True)


def root_mean_squares(model, batches, device) -> List[Tensor]:
    """Return the root mean square of the batches' gradients, a tensor for each of the model's parameters."""
    sums, count = [torch.zeros_like(parameter) for parameter in model.parameters()], 0
    for _, _, grads in gradients(model, batches, device):
        count += 1
        for total, grad in zip(sums, grads):
            total.addcmul_(grad, grad)
    return [(total / count).sqrt() for total in sums]


def evaluate(model, batches, device, learning_rate, decay, epsilon=None, roots=None) -> Tuple[float, int]:
    """Score the batches and learn from each. Return the summed loss and the number of words.

    Args:
        learning_rate, decay, epsilon: as in the formulas above
        roots: s for each of the model's parameters; None: the formula of ``sgd``
    """
    trained = [parameter.detach().clone() for parameter in model.parameters()]
    rates = [decay] * len(trained)
    if roots is not None:
        mean = sum(s.sum() for s in roots) / sum(s.numel() for s in roots)
        rates = [(decay * s / mean).clamp(max=1) for s in roots]
    loss_sum = words_sum = 0
    for loss, words, grads in gradients(model, batches, device):
        loss_sum, words_sum = loss_sum + loss, words_sum + words
        with torch.no_grad():
            for i, (w, g) in enumerate(zip(model.parameters(), grads)):
                step = g if roots is None else g / (roots[i] + epsilon)
                w.add_(rates[i] * (trained[i] - w) - learning_rate * step)
    return loss_sum, words_sum


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program if arguments are out of range, or have no meaning here."""
    if args.task != "truncated_bptt_lm":
        parser.error(f"--task is {args.task}, but must be truncated_bptt_lm, which carries the state")
    if args.path is None:
        parser.error("--path, a checkpoint, is not given, but must be")
    for option, value, right, bounds in (
        ("--learning-rate", args.learning_rate, args.learning_rate >= 0, "0 or positive"),
        ("--decay", args.decay, 0 <= args.decay <= 1, "from 0 to 1"),
        ("--epsilon", args.epsilon, args.epsilon > 0, "positive"),
    ):
        if not right:
            parser.error(f"{option} is {value}, but must be {bounds}")
    for name in ("fp16", "bf16", "post_process", "output_word_probs", "output_word_stats"):
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is given, but dynamic evaluation does not know it")


def main() -> None:
    """Read the arguments, evaluate and print as ``fairseq-eval-lm`` does."""
    parser = options.get_eval_lm_parser(default_task="truncated_bptt_lm")
    parser.add_argument("--update", choices=["rms", "sgd"], default="rms", help="formula of the update")
    parser.add_argument("--learning-rate", type=float, default=0.002, help="learning rate")
    parser.add_argument("--decay", type=float, default=0.02, help="decay to the trained weights")
    parser.add_argument(
        "--epsilon", type=float, default=0.002, help="added to the root mean squares, for rms"
    )
    args = options.parse_args_and_arch(parser)
    check(parser, args)
    cfg = convert_namespace_to_omegaconf(args)
    utils.import_user_module(cfg.common)
    task = tasks.setup_task(cfg.task)
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task(
        [cfg.common_eval.path], ast.literal_eval(cfg.common_eval.model_overrides), task=task
    )
    device = torch.device("cuda" if torch.cuda.is_available() and not cfg.common.cpu else "cpu")
    model.to(device).eval()

    task.load_dataset(cfg.dataset.gen_subset)
    text = task.eval_lm_dataloader(
        task.dataset(cfg.dataset.gen_subset),
        num_shards=max(cfg.dataset.num_shards, cfg.distributed_training.distributed_world_size),
        context_window=cfg.eval_lm.context_window,
    )
    with torch.backends.cudnn.flags(enabled=False):  # cuDNN's recurrences have no backward pass in eval mode
        roots = None
        if args.update == "rms":
            task.load_dataset("train")
            streams = cfg.dataset.batch_size or 1
            batches = task.get_batch_iterator(task.dataset("train"), max_sentences=streams)
            roots = root_mean_squares(model, batches.next_epoch_itr(shuffle=False), device)
        loss, words = evaluate(model, text, device, args.learning_rate, args.decay, args.epsilon, roots)
    print(f"Evaluated {words:,} tokens")
    print(f"Loss (base 2): {loss / words / math.log(2):.4f}, Perplexity: {math.exp(loss / words):.2f}")


if __name__ == "__main__":
    try:
        main()
    except FloatingPointError as error:
        sys.exit(str(error))

"""The criterion that makes scores of a few words at a time, beside fairseq's."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from batches import SMALL, SMALL_OPTIONS, sentences, task
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.distributed import ModuleProxyWrapper
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from fairseq_lrn.criterions import ChunkedCriterion
from fairseq_lrn.models import DeepNMTModel, LRNModel

ROOT = Path(__file__).resolve().parents[2]


def build(model_class=LRNModel):
    torch.manual_seed(0)
    sizes = {k: v for k, v in SMALL.items() if k in model_class.config.__dataclass_fields__}
    return model_class.build_model(model_class.config(**sizes, dropout=0.0), task())


def losses(model, criterion_class, sentence_avg=False, reduce=True, **options):
    """What both criteria return, and the gradients."""
    words = task().target_dictionary
    criterion = criterion_class(
        TranslationTask(TranslationConfig(), words, words), sentence_avg, 0.1, **options
    )
    pad = words.pad()
    target = sentences([4, 6, 2], pad, seed=2)
    sample = {
        "net_input": {
            "src_tokens": sentences([5, 9, 2], pad, left=True),
            "src_lengths": torch.tensor([5, 9, 2]),
            "prev_output_tokens": target.roll(1, 1),
        },
        "target": target,
        "ntokens": 12,
    }
    model.zero_grad()
    loss, size, log = criterion(model, sample, reduce)
    loss.sum().backward()
    return loss, size, log, [parameter.grad for parameter in model.parameters()]


def hooked(model):
    model.decoder.output_projection.register_forward_hook(lambda _, x, y: y / 2)


def adapter(model):
    model.decoder.output_projection = nn.Sequential(model.decoder.output_projection, nn.Tanh())


def other_output_layer(model):
    layer = model.decoder.output_layer
    model.decoder.output_layer = lambda features: layer(features).sin()


def decoder_hook(model):
    model.decoder.register_forward_hook(lambda _, x, y: (y[0].sin(), y[1]))


def model_hook(model):
    model.register_forward_hook(lambda _, x, y: (y[0].sin(), y[1]))


def other_probabilities(model):
    model.decoder.get_normalized_probs = lambda net_output, *_: net_output[0].sin().log_softmax(2)


class Halved(LRNModel):
    def get_normalized_probs(self, net_output, log_probs, sample=None):
        return super().get_normalized_probs((net_output[0] / 2, net_output[1]), log_probs, sample)


def subclass(model):
    model.__class__ = Halved


@pytest.mark.parametrize("sentence_avg", [False, True])
@pytest.mark.parametrize("model_class", [LRNModel, DeepNMTModel])
def test_is_fairseqs(model_class, sentence_avg):
    model = build(model_class)
    assert ChunkedCriterion.weight(model) is model.decoder.output_projection.weight
    found = losses(model, ChunkedCriterion, sentence_avg)
    expected = losses(model, LabelSmoothedCrossEntropyCriterion, sentence_avg)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [hooked, adapter, other_output_layer, decoder_hook, model_hook, other_probabilities, subclass],
)
def test_changed_models_are_followed(change):
    model = build()
    before = losses(model, ChunkedCriterion)[0]
    change(model)
    assert ChunkedCriterion.weight(model) is None
    found = losses(model, ChunkedCriterion)
    assert abs(found[0] - before) > 1e-3
    torch.testing.assert_close(found, losses(model, LabelSmoothedCrossEntropyCriterion))


@pytest.mark.parametrize("options", [{"report_accuracy": True}, {"ignore_prefix_size": 2}, {"reduce": False}])
def test_options_are_fairseqs(options):
    model = build()
    found = losses(model, ChunkedCriterion, **options)
    torch.testing.assert_close(found, losses(model, LabelSmoothedCrossEntropyCriterion, **options))


@pytest.mark.parametrize("find_unused", [False, True])
def test_several_processes(find_unused):
    """DDP that looks for unused parameters finds those of forward() alone, and then fairseq's serves."""
    model = build()
    expected = losses(model, LabelSmoothedCrossEntropyCriterion)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
        wrapped = ModuleProxyWrapper(ddp)
        assert (ChunkedCriterion.weight(wrapped) is None) == find_unused
        for _ in range(2):
            torch.testing.assert_close(losses(wrapped, ChunkedCriterion), expected, rtol=1e-4, atol=1e-4)
    finally:
        torch.distributed.destroy_process_group()


def test_float16_and_autocast_are_fairseqs():
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        assert ChunkedCriterion.weight(model) is None
    assert ChunkedCriterion.weight(model.half()) is None
    assert ChunkedCriterion.weight(model.bfloat16()) is not None


def test_trains_to_the_same_loss(run, data, tmp_path):
    """Through fairseq-train, with validation."""
    words = [
        "--arch",
        "lrn",
        *SMALL_OPTIONS,
        "--dropout",
        0,
        "--optimizer",
        "adam",
        "--lr",
        0.01,
        "--seed",
        1,
    ]
    words += "--share-all-embeddings --label-smoothing 0.1 --max-tokens 400 --max-update 6 --cpu".split()
    words += "--log-format simple --no-save --num-workers 0".split()
    found = []
    for criterion in ("label_smoothed_cross_entropy", "chunked_label_smoothed_cross_entropy"):
        output = run(
            "fairseq-train", data, "--user-dir", ROOT / "fairseq_lrn", "--criterion", criterion, *words
        )
        valid = next(line for line in output.splitlines() if "| valid |" in line)
        found.append([float(x) for x in re.findall(r"\|(?: nll_)? ?loss ([\d.]+)", valid)])
    assert len(found[0]) == 2
    assert found[1] == pytest.approx(found[0], abs=2e-3)

"""What lrn_translation finds, compared with fairseq's own search, and small models to translate with.

Everything goes the ways of a user: a task's ``build_generator`` and ``inference_step``, with the options of
``fairseq-generate``.
"""

import copy
import itertools
from argparse import Namespace
from collections import defaultdict

import torch
from batches import SMALL, dictionary, sentences, task
from fairseq.dataclass.configs import GenerationConfig
from fairseq.search import BeamSearch
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from hypothesis import strategies as st

from fairseq_lrn.models import LRNModel
from fairseq_lrn.tasks.translation import LRNTranslationConfig, LRNTranslationTask

SPECIAL = 4  # <s>, <pad>, </s> and <unk> come first in a dictionary
PAD, EOS, UNK = 1, 2, 3
MARGIN = 1e-5  # below this difference of scores per word, rounding may decide between two hypotheses
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


# options that make training another one, and not translating
OF_TRAINING = [
    {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5},
    {"encoder_layers_to_keep": "1", "decoder_layers_to_keep": "0"},
    {"checkpoint_activations": True},
    {"offload_activations": True},
    {"quant_noise_pq": 0.1, "quant_noise_pq_block_size": 4},
    {"word_dropout": 0.3, "attention_dropout": 0.3, "activation_dropout": 0.3},
]


def build(model_class=LRNModel, words=54, ends=-2.0, seed=0, device="cpu", **options):
    """A random model for a dictionary of ``words``, ready to translate.

    Args:
        ends: about the log-odds of </s>, on average over positions: translations end at different lengths
        options: of the model; sizes are small unless given
    """
    torch.manual_seed(seed)
    sizes = {k: v for k, v in SMALL.items() if k in model_class.config.__dataclass_fields__}
    model = model_class.build_model(
        model_class.config(**{**sizes, **options}), task(dictionary(words - SPECIAL))
    ).eval()
    source = sentences([9, 4, 14, 6, 1], PAD, seed=seed, vocabulary=words)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and normalisation too
            parameter.add_(torch.randn_like(parameter) / 16)
        projection = model.decoder.output_projection
        if projection is not None:
            features = model(source, None, source, features_only=True)[0][source.ne(PAD)]
            weight = projection.weight
            weight.mul_(3 / weight.norm(dim=1, keepdim=True))
            direction = features.mean(0) / features.mean(0).norm()
            level = (features @ weight.t()).logsumexp(1).mean() + ends
            weight[EOS] = direction * level / (features @ direction).mean()
    return model.to(device)


def build_bigram(log_probs, impossible=(), seed=0, **options):
    """An ``lrn`` that scores the next word by the last one alone, whatever the source.

    Args:
        log_probs: (V, V), of each next word in the row of the last one
        impossible: words of probability 0 after every word
        options: of the model
    """
    words = len(log_probs)
    sizes = dict(decoder_embed_dim=words, decoder_attention_heads=1)
    model = build(words=words, seed=seed, **sizes, **options)
    decoder = model.decoder
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():  # blocks add nothing to the embeddings
            if any(last in name for last in (".out_proj.", ".fc2.")):
                parameter.zero_()
        decoder.embed_tokens.weight.copy_(torch.eye(words))
        decoder.layer_norm.weight.fill_(1)
        decoder.layer_norm.bias.fill_(1)
        features = decoder.layer_norm(decoder.embed_scale * torch.eye(words)).double()
        decoder.output_projection.weight.copy_(torch.linalg.solve(features, log_probs.double()).t())
        # features are all positive, so minus infinity stays it
        decoder.output_projection.weight[list(impossible)] = -torch.inf
    return model


def halve_in_place(model):
    """As ``model.half()``, where the allocator gives the memory that the weights had, as it may."""
    for parameter in model.parameters():
        half = parameter.data.half()
        place = parameter.data.flatten().view(torch.float16)[: half.numel()].view_as(half)
        parameter.data = place.copy_(half)


def batch(lengths=(7, 3, 11, 5, 1), words=54, left=True, seed=1, device="cpu"):
    """A batch of random sentences, </s> included, padded on one side."""
    source = sentences(lengths, PAD, left, seed, words).to(device)
    return {"net_input": {"src_tokens": source, "src_lengths": torch.tensor(lengths, device=device)}}


def build_generator(
    models,
    task=LRNTranslationTask,
    extra=None,
    allowed=None,
    prepared=True,
    compute_type="float32",
    **options,
):
    """Build the generator as fairseq-generate does, with that command's ``options``.

    Args:
        prepared: prepare the models as the command does, and as validation with --eval-bleu does not: fairseq
            neither trains nor pickles models that are
        extra: arguments of the generator that no option gives
        allowed: words that may come next, see fairseq's ``prefix_allowed_tokens_fn``
        compute_type: of the task lrn_translation
    """
    cfg = Namespace(generation=GenerationConfig(**options))
    for model in models if prepared else []:
        model.prepare_for_inference_(cfg)
    config = (
        LRNTranslationConfig(compute_type=compute_type)
        if issubclass(task, LRNTranslationTask)
        else TranslationConfig()
    )
    made = task(config, models[0].encoder.dictionary, models[0].decoder.dictionary)
    generator = made.build_generator(
        models, cfg.generation, extra_gen_cls_kwargs=extra, prefix_allowed_tokens_fn=allowed
    )
    generator.task, generator.translated_by = made, models
    return generator


def translate(generator, sample, bos_token=None, **call):
    """The hypotheses of each sentence; a ``bos_token`` no task of fairseq's passes on to the generator."""
    if bos_token is not None:
        return generator.generate(generator.translated_by, sample, bos_token=bos_token, **call)
    return generator.task.inference_step(generator, generator.translated_by, sample, **call)


class MeasuredBeamSearch(BeamSearch):
    """fairseq's search, which keeps in ``margins`` how nearly another choice was made for each sentence.

    A margin is a difference of two scores per word. Choices are which hypotheses end, and which go on.
    """

    def __init__(self, words, eos):
        super().__init__(words)
        self.end, self.margins = eos, defaultdict(lambda: float("inf"))

    def step(self, step, lprobs, scores, prev_output_tokens=None, original_batch_idxs=None):
        found = super().step(step, lprobs, scores, prev_output_tokens, original_batch_idxs)
        beam = lprobs.size(1)
        sums = lprobs[:, :1] if step == 0 else lprobs + scores[:, :, step - 1, None]
        ends = sums[:, :, self.end].sort(1, descending=True)[0]
        going = sums.index_fill(2, torch.tensor([self.end], device=sums.device), -torch.inf).flatten(1)
        going = going.topk(min(beam + 1, going.size(1)))[0]
        best = sums.flatten(1).topk(min(beam + 1, sums[0].numel()))[0]
        # </s> among the first columns or not; the last that goes on; the order of those that end
        gaps = [ends - best[:, beam:], best[:, beam - 1 : beam] - ends]
        gaps = [torch.where(gaps[0] > 0, gaps[0], gaps[1])] if best.size(1) > beam else []
        gaps += [going[:, beam - 1 : beam] - going[:, beam:], ends[:, :-1] - ends[:, 1:]]
        least = torch.cat(gaps, 1).nan_to_num(nan=torch.inf, posinf=torch.inf).amin(1) / (step + 1)
        for sentence, gap in zip(original_batch_idxs.tolist(), least.tolist()):
            self.margins[sentence] = min(self.margins[sentence], gap)
        return found


def assert_same(
    models,
    sample,
    call=None,
    task=LRNTranslationTask,
    extra=None,
    allowed=None,
    margin=MARGIN,
    tolerance=TOLERANCE,
    forced=True,
    **options,
):
    """Assert that ``task`` finds the hypotheses of fairseq's own search with a copy that nothing prepared.

    Words may differ in a sentence for which fairseq nearly made another choice. All scores and attention are
    checked by forcing the words through the copy.

    Args:
        models: not translated with before; or a list of them
        sample: of fairseq's translation dataset
        call: what :func:`translate` takes: ``prefix_tokens``, ``constraints``, ``bos_token``
        task: whose generator is compared
        extra, allowed: see :func:`build_generator`
        margin: below which words may differ; 0 where they never may
        tolerance: of scores and attention
        forced: False where scores are not the model's own
        options: of fairseq-generate

    Returns:
        the hypotheses
    """
    models = models if isinstance(models, list) else [models]
    copies = copy.deepcopy(models)
    call, options = call or {}, {"max_len_b": 12, **options}

    theirs = build_generator(copies, TranslationTask, extra, allowed, prepared=False, **options)
    if type(theirs.search) is BeamSearch:
        theirs.search = MeasuredBeamSearch(copies[0].decoder.dictionary, theirs.eos)
    expected = translate(theirs, copy.deepcopy(sample), **call)
    found = translate(build_generator(models, task, extra, allowed, **options), sample, **call)

    names = sample["id"].tolist() if "id" in sample else range(len(expected))
    margins = getattr(theirs.search, "margins", {})
    assert_same_hypotheses(found, expected, [margins.get(i, 1) for i in names], margin, tolerance)
    if forced:
        first = call.get("bos_token")
        assert_forced(copies, sample, found, theirs.eos if first is None else first, tolerance, **options)
    return found


def assert_same_hypotheses(found, expected, margins=None, margin=MARGIN, tolerance=TOLERANCE):
    """Assert that the hypotheses of each sentence are those expected, in the same order.

    Words may differ where two scores of a sentence, or its search by ``margins``, are nearer than ``margin``.
    """
    assert [len(beam) for beam in found] == [len(beam) for beam in expected]
    for sentence, (ours, theirs) in enumerate(zip(found, expected)):
        words, wanted = ([x["tokens"].tolist() for x in beam] for beam in (ours, theirs))
        if words != wanted:
            scores = torch.stack([x["score"] for x in theirs])
            nearest = min([*scores.diff().abs().tolist(), margins[sentence] if margins else 1])
            assert nearest < margin, f"sentence {sentence}: {words}, but fairseq has {wanted}, by {nearest}"
            continue
        for one, other in zip(ours, theirs):
            assert set(one) == set(other)
            for name, value in other.items():
                if isinstance(value, list):  # the alignment that --print-alignment makes, soft ones as text
                    numbers = [[[float(x) for x in row] for row in rows] for rows in (one[name], value)]
                    torch.testing.assert_close(*map(torch.tensor, numbers), **tolerance)
                    continue
                assert one[name].device == value.device or value.numel() == 0
                torch.testing.assert_close(one[name], value, **tolerance)


@torch.no_grad()
def assert_forced(models, sample, found, first=EOS, tolerance=TOLERANCE, **options):
    """Assert that the hypotheses have the scores and the attention that ``models`` give their words."""
    generation = GenerationConfig(**options)
    for source, beam in zip(sample["net_input"]["src_tokens"], found):
        lengths = [len(x["tokens"]) for x in beam]
        target = torch.nn.utils.rnn.pad_sequence([x["tokens"] for x in beam], True, PAD)
        previous = target.roll(1, 1)
        previous[:, 0] = first
        scored, looked = [], []
        for model in models:
            scores, extra = model(source.expand(len(beam), -1), None, previous)
            scored.append(model.get_normalized_probs((scores / generation.temperature, None), log_probs=True))
            looked.append(extra["attn"][0])
        log_probs = torch.stack(scored).float().logsumexp(0) - torch.tensor(float(len(models))).log()
        log_probs[..., UNK] -= generation.unkpen
        log_probs = log_probs.gather(2, target[:, :, None])[:, :, 0]
        attention = torch.stack(looked).mean(0)
        for x, n, positional, attn in zip(beam, lengths, log_probs, attention):
            score = positional[:n].sum() / (1 if generation.unnormalized else n**generation.lenpen)
            torch.testing.assert_close(x["positional_scores"], positional[:n], **tolerance)
            torch.testing.assert_close(x["score"], score, **tolerance)
            torch.testing.assert_close(x["attention"], attn[:n].t().float(), **tolerance)


def words_of(found):
    """The words of each sentence's hypotheses, </s> included."""
    return [[x["tokens"].tolist() for x in beam] for beam in found]


def values_of(found):
    """All tensors of the hypotheses, in order."""
    hypotheses = itertools.chain.from_iterable(found)
    return [x[name] for x in hypotheses for name in sorted(x) if torch.is_tensor(x[name])]


@st.composite
def searches(
    draw,
    words=(20, 300),
    encoder_layers=(1, 4),
    decoder_layers=(1, 1),
    widest=48,
    sentences=(1, 6),
    longest=30,
    beams=(1, 12),
    longest_translation=14,
):
    """A random ``lrn``, sentences and options of plain beam search; ranges have both ends.

    Returns:
        arguments of :func:`build` and of :func:`batch`, what :func:`translate` takes, and options
    """
    vocabulary, seed = draw(st.integers(*words)), draw(st.integers(0, 99))
    heads = draw(st.integers(1, 3))
    width = heads * draw(st.integers(-(-6 // heads), widest // heads))  # fewer: many equally good hypotheses
    shared = draw(st.sampled_from(["nothing", "output", "all"]))
    model = {
        "words": vocabulary,
        "ends": draw(st.sampled_from([-4.0, -2.0, 0.0])),
        "seed": seed,
        "encoder_layers": draw(st.integers(*encoder_layers)),
        "decoder_layers": draw(st.integers(*decoder_layers)),
        "decoder_attention_heads": heads,
        "decoder_embed_dim": width,
        # normalising two or three numbers makes rounding large, in float32 PyTorch too
        "encoder_embed_dim": width if shared == "all" else draw(st.just(1) | st.integers(4, widest)),
        "decoder_ffn_embed_dim": draw(st.integers(1, widest)),
        "encoder_ffn_embed_dim": draw(st.integers(1, widest)),
        "share_decoder_input_output_embed": shared == "output",
        "share_all_embeddings": shared == "all",
        "no_scale_embedding": draw(st.booleans()),
        "cell": draw(st.sampled_from(["lrn", "olrn"])),
        "cell_activation": draw(st.sampled_from([None, "tanh"])),
        "activation_fn": draw(st.sampled_from(["relu", "gelu", "tanh"])),
    }
    size = draw(st.integers(*sentences))
    lengths = draw(st.lists(st.integers(1, longest), min_size=size, max_size=size))
    source = {"lengths": lengths, "words": vocabulary, "left": draw(st.booleans()), "seed": seed}
    call = {"bos_token": draw(st.sampled_from([None, 0, vocabulary - 1]))}
    if draw(st.booleans()):
        kept = torch.tensor(draw(st.lists(st.integers(0, 4), min_size=size, max_size=size)))
        prefix = torch.randint(UNK, vocabulary, (size, 4), generator=torch.Generator().manual_seed(seed))
        call["prefix_tokens"] = prefix.masked_fill(torch.arange(4) >= kept[:, None], PAD)
    max_len_b = draw(st.integers(0, longest_translation))
    options = {
        "beam": draw(st.integers(*beams)),
        "max_len_a": draw(st.sampled_from([0, 0.3, 1.2])),
        "max_len_b": max_len_b,
        "min_len": draw(st.integers(0, max_len_b)),
        "lenpen": draw(st.sampled_from([1, 0, 0.6, 2.5, -1])),
        "unnormalized": draw(st.booleans()),
        "unkpen": draw(st.sampled_from([0, 3, -3, 100])),
        "temperature": draw(st.sampled_from([1.0, 0.6, 1.7])),
    }
    return model, source, call, options

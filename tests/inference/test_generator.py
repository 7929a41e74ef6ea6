"""The generator of lrn_translation finds what fairseq's own finds: the same words, scores and attention."""

import copy
import io
import itertools
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from batches import DEVICES, task
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks.translation import TranslationTask
from fairseq.token_generation_constraints import pack_constraints
from hypothesis import given, settings
from torch import nn
from translations import (
    EOS,
    OF_TRAINING,
    PAD,
    TOLERANCE,
    UNK,
    assert_forced,
    assert_same,
    assert_same_hypotheses,
    batch,
    build,
    build_bigram,
    build_generator,
    searches,
    translate,
    values_of,
    words_of,
)

from fairseq_lrn.models import DeepNMTModel, LRNLanguageModel, LRNModel
from fairseq_lrn.models.lrn_decoder import LRNDecoder
from fairseq_lrn.models.lrn_layers import FeedForward
from fairseq_lrn.models.lrn_lm import LRNLanguageModelConfig
from fairseq_lrn.modules import CELLS, LRN
from fairseq_lrn.tasks.translation import LRNTranslationTask

A, B = 4, 5  # words
PREFIX = {"prefix_tokens": torch.tensor([[9, 5]] * 5)}  # for each sentence of a batch
TASKS = [LRNTranslationTask, TranslationTask]
COMPILED = hasattr(torch.ops.fairseq_lrn, "lrn_scan")
needs_operators = pytest.mark.skipif(not COMPILED, reason="needs the compiled operators")


def translations(model, sample, task_class=LRNTranslationTask, **options):
    return translate(build_generator([model], task_class, **{"beam": 3, "max_len_b": 12, **options}), sample)


def unprepared(model):
    """Another model with the same weights, that was never translated with."""
    other = type(model).build_model(model.cfg, task(model.decoder.dictionary)).eval()
    other.load_state_dict(model.state_dict())
    return other


# Any model, any search


@settings(deadline=None, max_examples=40)
@given(searches())
def test_any_model_and_search(search):
    model, source, call, options = search
    assert_same(build(**model), batch(**source), call, **options)


@pytest.mark.parametrize("beam", [1, 2, 5, 25, 60])
@pytest.mark.parametrize("model_class", [LRNModel, DeepNMTModel])
@pytest.mark.parametrize("device", DEVICES)
def test_beams(device, model_class, beam):
    """Up to one that wants more words than there are."""
    found = assert_same(build(model_class, device=device), batch(device=device), beam=beam)
    assert [len(hypotheses) for hypotheses in found] == [min(beam, 53)] * 5
    assert len({len(x["tokens"]) for hypotheses in found for x in hypotheses}) > 1


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("model_class", [LRNModel, DeepNMTModel])
@pytest.mark.parametrize("device", DEVICES)
def test_every_cell(device, model_class, cell):
    assert_same(build(model_class, cell=cell, seed=3, device=device), batch(device=device), beam=4)


def test_other_forms_of_deepnmt():
    forms = {"context_aware_encoder": True, "attention": "dot", "layer_norm": True}
    assert_same(build(DeepNMTModel, **forms), batch(), beam=4)


@pytest.mark.parametrize(
    "options",
    [
        {"lenpen": 0.6},
        {"lenpen": 3.0},
        {"lenpen": -1.0},
        {"unnormalized": True},
        {"min_len": 0},
        {"min_len": 4},
        {"min_len": 12},
        {"min_len": 0, "max_len_b": 0},
        {"max_len_b": 1},
        {"max_len_a": 0.5, "max_len_b": 2},
        {"unkpen": -4.0},
        {"unkpen": 9.0},
        {"temperature": 0.5},
        {"temperature": 2.5, "unkpen": -2.0, "min_len": 3, "lenpen": 0.5},
        {"no_repeat_ngram_size": 1},
        {"match_source_len": True, "forced": False},
        {"diverse_beam_groups": 2, "forced": False},
        {"diversity_rate": 0.5, "forced": False},
        {"print_alignment": "hard"},
        {"print_alignment": "soft"},
    ],
    ids=str,
)
def test_options(options):
    for left in (True, False):
        assert_same(build(), batch(left=left), **{"beam": 4, **options})


@pytest.mark.parametrize(
    "extra",
    [
        {"eos": 17},
        {"max_len": 5},
        {"tokens_to_suppress": ["w3", "w4"]},
        {"symbols_to_strip_from_output": {5, 6}},
    ],
    ids=str,
)
def test_arguments_of_fairseqs_generator(extra):
    found = assert_same(build(), batch(), extra=extra, beam=4)
    assert {x["tokens"][-1].item() for beam in found for x in beam} == {extra.get("eos", EOS)}


@pytest.mark.parametrize("first", [0, 7])
def test_another_first_word(first):
    found = assert_same(build(), batch(), {"bos_token": first}, beam=3)
    assert words_of(found) != words_of(assert_same(build(), batch(), beam=3))
    assert_same(build(), batch(), {"bos_token": first, **PREFIX}, beam=3)


def test_the_share_of_a_language_model():
    config = LRNLanguageModelConfig(decoder_embed_dim=8, decoder_hidden_size=8, decoder_layers=1)
    torch.manual_seed(0)
    extra = {"lm_model": LRNLanguageModel.build_model(config, task()).eval(), "lm_weight": 2.0}
    found = assert_same(build(), batch(), extra=extra, beam=3, forced=False)
    assert words_of(found) != words_of(assert_same(build(), batch(), beam=3))


def test_words_that_may_come_next():
    def allowed(sentence, words):
        return [EOS, 4 + int(sentence), 20 + len(words)]

    found = assert_same(build(), batch(), allowed=allowed, beam=2)
    assert {word for x in found[3] for word in x["tokens"].tolist()} <= {EOS, 7, *range(21, 40)}


def test_lexical_constraints():
    wanted = [[[8, 9]], [[10]], [], [[11], [12]], []]
    packed = pack_constraints([[torch.tensor(words) for words in sentence] for sentence in wanted])
    found = assert_same(build(), batch(), {"constraints": packed}, beam=4, constraints="ordered")
    assert all(10 in x["tokens"] for x in found[1])


def test_sampling_takes_the_same_random_numbers():
    found = []
    for task_class in TASKS:
        torch.manual_seed(1)
        found.append(translations(build(), batch(), task_class, sampling=True, sampling_topk=9))
    assert_same_hypotheses(*found)


@pytest.mark.parametrize("count", [2, 3])
def test_ensembles(count):
    models = [build(seed=0), build(cell="gru", seed=1), build(DeepNMTModel, seed=2)][:count]
    assert_same(models, batch(), beam=3)


@pytest.mark.parametrize(
    "options",
    [
        *OF_TRAINING,
        {"no_scale_embedding": True, "activation_fn": "gelu"},
        {"adaptive_softmax_cutoff": [10, 30]},
    ],
    ids=str,
)
def test_options_of_training(options):
    """After a step of training, which noise and dropout have been through; also by fairseq's own search."""
    for task_class in TASKS:
        model = build(**options)
        learn(model)
        assert_same(model, batch(), task=task_class, beam=3)


def learn(model, rate=0.5):
    """One step of training; as fairseq's optimizers do, it writes through ``.data``."""
    torch.manual_seed(0)
    model.train()
    source = batch(seed=5)["net_input"]["src_tokens"]
    net_output = model(source, None, source)
    if model.decoder.adaptive_softmax is None:
        loss = -model.get_normalized_probs(net_output, True)[..., 9].mean()
    else:
        loss = net_output[0].square().mean()
    model.zero_grad()
    loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data.add_(parameter.grad, alpha=-rate)
    model.eval()


# Which words are chosen, and which hypotheses end: models whose right answers one can work out


def table(first, other):
    """Log-probabilities (12, 12) of the next word, by the last one: ``first`` after </s>, or else ``other``.

    They give some words' probabilities; the rest is shared evenly.
    """
    rows = torch.empty(12, 12, dtype=torch.float64)
    for last, given_ in enumerate([other, other, first] + 9 * [other]):
        rows[last] = (1 - sum(given_.values())) / (12 - len(given_))
        for word, probability in given_.items():
            rows[last, word] = probability
    return rows.log()


def scores_of(found):
    return [[x["score"].item() for x in beam] for beam in found]


def test_only_the_first_columns_end():
    """</s> in the third column, of a beam of 2, is passed over; [</s>] would be the first to end."""
    model = build_bigram(table({A: 0.4, B: 0.3, EOS: 0.2}, {EOS: 0.9}))
    found = assert_same(model, batch([3, 5], 12), beam=2, min_len=0)
    assert words_of(found) == [[[A, EOS], [B, EOS]]] * 2
    expected = [math.log(0.4 * 0.9) / 2, math.log(0.3 * 0.9) / 2]
    assert scores_of(found) == [pytest.approx(expected, abs=1e-5)] * 2


def test_a_search_goes_on_until_as_many_have_ended_as_the_beam_has():
    """The greedy translation is over at once; with a beam of 2 a better one is found later."""
    model = build_bigram(table({EOS: 0.5, A: 0.4}, {EOS: 0.99}))
    assert words_of(assert_same(model, batch([3], 12), beam=1, min_len=0)) == [[[EOS]]]
    assert words_of(assert_same(model, batch([3], 12), beam=2, min_len=0)) == [[[A, EOS], [EOS]]]


def test_padding_is_never_picked():
    """It keeps its share of the probability."""
    found = assert_same(build_bigram(table({PAD: 0.6, A: 0.3}, {PAD: 0.5, EOS: 0.4})), batch([3], 12), beam=1)
    assert words_of(found) == [[[A, EOS]]]
    assert scores_of(found) == [pytest.approx([math.log(0.3 * 0.4) / 2], abs=1e-5)]
    for beam in (4, 5, 11):
        found = assert_same(build_bigram(table({PAD: 0.9}, {PAD: 0.9, EOS: 0.05})), batch([3], 12), beam=beam)
        assert not any(PAD in x["tokens"] for x in found[0])


@pytest.mark.parametrize("possible", [{A: 0.5, EOS: 0.3}, {A: 0.5, EOS: 0.3, B: 0.1}], ids=["one", "two"])
def test_what_has_no_probability_does_not_end(possible):
    """So few words can come next that some of the beam has probability 0 for a while."""
    model = build_bigram(table(possible, possible), impossible=set(range(12)) - set(possible))
    found = assert_same(copy.deepcopy(model), batch([3, 1], 12), beam=5)
    assert [len(beam) for beam in found] == [5, 5]
    short = assert_same(model, batch([3, 1], 12), beam=5, max_len_b=1)
    assert [len(beam) for beam in short] == [len(possible) - 1] * 2
    found += short
    assert all(math.isfinite(score) for score in itertools.chain(*scores_of(found)))
    assert all(set(x["tokens"].tolist()) <= set(possible) for beam in found for x in beam)


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_no_sentence_is_lost(value):
    """One that cannot end is an error."""
    model = build_bigram(table({A: 0.5}, {A: 0.5}))
    with torch.no_grad():
        model.decoder.output_projection.weight[EOS if value == -math.inf else slice(None)] = value
    with pytest.raises(FloatingPointError, match="sentence"):
        translations(model, batch([3, 2], 12), beam=2)


@pytest.mark.parametrize(
    "a, b, lengths, positions, longest",
    [
        (0, 7, [4], 1024, 7),
        (0.5, 2, [4, 9], 1024, 6),  # the longest sentence's, also for the other one
        (2.0, -3, [2, 5], 1024, 7),
        (0.29, 0, [100, 3], 1024, 28),  # 0.29 * 100 < 29 in float64
        (0.1, 0, [30, 3], 1024, 3),
        (0, 200, [3], 10, 9),
        (1.0, 10, [8, 3], 13, 12),
    ],
)
def test_limit(a, b, lengths, positions, longest):
    model = build_bigram(table({A: 0.9}, {A: 0.9}), max_target_positions=positions)
    found = assert_same(model, batch(lengths, 12), max_len_a=a, max_len_b=b, beam=1)
    assert words_of(found) == [[[A] * longest + [EOS]]] * len(lengths)


def test_min_len_above_the_longest():
    with pytest.raises(ValueError, match="--min-len is 9, but must not be above the longest, 8"):
        translations(build(), batch(), min_len=9, max_len_b=8)


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("word", [EOS, A], ids=["best", "not among the best"])
def test_shortest_translation(word, beam):
    """</s> as the best word by far, or far from it; the other words' scores stay as they are."""
    model = build_bigram(table({word: 0.8, B: 0.15}, {word: 0.8, B: 0.15}))
    found = assert_same(model, batch([3], 12), beam=beam, min_len=3, max_len_b=5)
    best = {EOS: [B, B, B, EOS], A: [A] * 5 + [EOS]}[word]
    assert words_of(found)[0][0] == best
    rest = 0.05 / 10
    expected = {EOS: 3 * math.log(0.15) + math.log(0.8), A: 5 * math.log(0.8) + math.log(rest)}[word]
    assert found[0][0]["score"].item() == pytest.approx(expected / len(best), abs=1e-5)


@pytest.mark.parametrize("beam", [1, 3, 5, 6])
@pytest.mark.parametrize("probability, penalty", [(0.8, 5.0), (0.001, -8.0), (0.8, math.inf), (0.3, 0.1)])
def test_penalty_of_unknown_words(probability, penalty, beam):
    """It takes <unk> from the best words, or makes it the best, from among the worst."""
    row = {UNK: probability, A: 0.15, EOS: 0.04}
    model = build_bigram(table(row, row))
    found = assert_same(model, batch([3], 12), beam=beam, unkpen=penalty, min_len=3, max_len_b=3)
    word = UNK if math.log(probability) - penalty > math.log(0.15) else A
    score = math.log(probability) - penalty if word == UNK else math.log(0.15)
    assert words_of(found)[0][0] == [word] * 3 + [EOS]
    assert found[0][0]["score"].item() == pytest.approx((3 * score + math.log(0.04)) / 4, abs=1e-5)


def test_temperature():
    row = {A: 0.6, B: 0.2, EOS: 0.1}
    for temperature in (0.5, 1.0, 3.0):
        model = build_bigram(table(row, row))
        found = assert_same(model, batch([3], 12), beam=2, temperature=temperature, max_len_b=2)
        powers = table(row, row)[0].div(temperature).log_softmax(0)
        for x in found[0]:
            expected = powers[x["tokens"]].float()
            torch.testing.assert_close(x["positional_scores"], expected, rtol=0, atol=1e-5)


def test_normalisation():
    """The longer of two translations is better only where its length is taken into account."""
    model = build_bigram(table({EOS: 0.5, A: 0.4}, {EOS: 0.99}))
    for options, divisors, best in (
        ({}, (1, 2), 2),
        ({"lenpen": 0.0}, (1, 1), 1),
        ({"lenpen": 2.0}, (1, 4), 2),
        ({"unnormalized": True, "lenpen": 2.0}, (1, 1), 1),
    ):
        found = assert_same(model, batch([3], 12), beam=2, min_len=0, **options)
        by_length = {len(x["tokens"]): x["score"].item() for x in found[0]}
        expected = {1: math.log(0.5) / divisors[0], 2: math.log(0.4 * 0.99) / divisors[1]}
        assert by_length == pytest.approx(expected, abs=1e-5)
        assert len(found[0][0]["tokens"]) == best
        model = unprepared(model)


@needs_operators
def test_equal_scores_keep_their_order():
    """The smaller word first, then the earlier hypothesis; whatever else is in the batch."""
    row = {EOS: 0.2, 0: 1e-4, UNK: 1e-4}
    model = build_bigram(table({**row, EOS: 0.1}, {EOS: 0.9}))
    alone = translations(model, batch([4], 12), beam=4)
    assert len(set(scores_of(alone)[0])) == 1
    assert words_of(alone) == [[[word, EOS] for word in range(4, 8)]]
    for lengths in ([4, 4, 4], [9, 4], [1] * 20):
        assert words_of(translations(model, batch(lengths, 12), beam=4)) == words_of(alone) * len(lengths)


# Prefixes


@pytest.mark.parametrize(
    "rows",
    [
        [[9, 5], [9, 5], [9, 5], [9, 5], [9, 5]],
        [[9, 5, 7], [9, 5, PAD], [9, PAD, PAD], [PAD, PAD, PAD], [6, 6, 6]],
        [[UNK, 0], [0, UNK], [9, 9], [8, PAD], [53, 53]],
        [[PAD, 9], [9, PAD], [9, 9], [PAD, PAD], [9, 9]],
        [[9] * 20, [8] * 12 + [PAD] * 8, [7] * 3 + [PAD] * 17, [6] * 13 + [PAD] * 7, [5] * 20],
    ],
    ids=["words", "of different lengths", "odd words", "padding first", "beyond the limit"],
)
@pytest.mark.parametrize("beam", [1, 4])
def test_prefixes(beam, rows):
    """``--min-len`` does not count while there is a prefix; --prefix-size takes it from the target."""
    prefix = torch.tensor(rows)
    for options in ({}, {"min_len": 4, "lenpen": 0.5, "unkpen": 2.0, "temperature": 1.3}):
        found = assert_same(build(), batch(), {"prefix_tokens": prefix}, beam=beam, **options)
        for wanted, hypotheses in zip(prefix, found):
            for x in hypotheses:
                words = x["tokens"][:-1]
                forced = wanted[: len(words)]
                assert torch.equal(words[: len(forced)][forced != PAD], forced[forced != PAD])


@pytest.mark.parametrize("beam", [1, 3])
def test_prefixes_that_end(beam):
    """What ends in the prefix is the translation, of all hypotheses; of these fairseq mixes up attention."""
    rows = [[9, 5, EOS], [9, EOS, PAD], [9, 5, 7], [PAD] * 3, [9, EOS, 8]]
    found, expected = (
        translate(
            build_generator([build()], task_class, beam=beam, max_len_b=12),
            batch(),
            prefix_tokens=torch.tensor(rows),
        )
        for task_class in TASKS
    )
    assert words_of(found) == words_of(expected)
    for row, ours, theirs in zip(rows, found, expected):
        for x, y in zip(ours, theirs):
            assert EOS not in row or x["tokens"].tolist() == row[: row.index(EOS) + 1]
            for name in ("score", "positional_scores"):
                torch.testing.assert_close(x[name], y[name], rtol=2e-5, atol=2e-5)


# The results, and the batch


def test_results_are_the_callers_own():
    """fairseq-generate divides positional scores in place. Later translations leave earlier ones alone."""
    generator = build_generator([build()], beam=3, max_len_b=12)
    found = translate(generator, batch())
    kept = [value.clone() for value in values_of(found)]
    translate(generator, batch(seed=2))
    assert all(map(torch.equal, values_of(found), kept))
    assert all(value.is_leaf and not value.requires_grad for value in values_of(found))
    del generator
    values = values_of(found)
    for i, value in enumerate(values):
        value.zero_()
        assert all(map(torch.equal, values[i + 1 :], kept[i + 1 :]))


def test_types_of_results():
    for beam in translations(build(), batch()):
        for x in beam:
            assert set(x) == {"tokens", "score", "attention", "alignment", "positional_scores"}
            assert x["tokens"].dtype == torch.int64 and x["tokens"].dim() == 1
            assert x["score"].dim() == 0 and x["alignment"].numel() == 0
            assert x["positional_scores"].shape == x["tokens"].shape
            assert x["attention"].shape == (11, len(x["tokens"]))
            for name in ("score", "positional_scores", "attention"):
                assert x[name].dtype == torch.float32


def test_the_batch_is_left_as_it_was():
    sample = batch()
    before = copy.deepcopy(sample)
    prefix = PREFIX["prefix_tokens"].clone()
    for options in ({}, {"print_alignment": "hard"}):
        translate(build_generator([build()], beam=3, **options), sample, prefix_tokens=prefix)
    assert torch.equal(prefix, PREFIX["prefix_tokens"])
    assert before["net_input"].keys() == sample["net_input"].keys()
    assert all(torch.equal(before["net_input"][name], x) for name, x in sample["net_input"].items())


def test_forms_of_a_batch():
    """As a dataset makes it, as a view, without lengths; by ``generate`` and by calling the generator."""
    model, sample = build(), batch()
    generator = build_generator([model], beam=3, max_len_b=12)
    expected = translate(generator, sample)
    source, lengths = sample["net_input"].values()
    view = torch.full((11, 10), 7)
    view[:, ::2] = source.t()
    dataset = {"id": torch.tensor([8, 2, 5, 0, 3]), "nsentences": 5, "ntokens": 27, "target": source}
    for extra, net_input in (
        (dataset, {"src_tokens": source, "src_lengths": lengths, "prev_output_tokens": source}),
        ({}, {"src_tokens": view[:, ::2].t(), "src_lengths": lengths}),
        ({}, {"src_tokens": source}),
    ):
        one = {**extra, "net_input": net_input}
        assert_same_hypotheses(translate(generator, one), expected)
        assert_same_hypotheses(generator.generate(None, one), expected)
        assert_same_hypotheses(generator(one), expected)
        with torch.inference_mode():
            assert_same_hypotheses(translate(generator, one), expected)


def test_two_threads():
    generator = build_generator([build()], beam=3, max_len_b=12)
    samples = [batch(seed=seed) for seed in range(6)]
    expected = [translate(generator, sample) for sample in samples]
    with ThreadPoolExecutor(2) as threads:
        for one, other in zip(threads.map(lambda sample: translate(generator, sample), samples), expected):
            assert_same_hypotheses(one, other)


def test_words_of_the_source():
    """Unknown words, <s> and </s> are words anywhere in a sentence."""
    sample = batch([9, 4, 12])
    for at, word in ((-3, UNK), (-2, EOS), (-4, 0)):
        sample["net_input"]["src_tokens"][:, at] = word
    assert_same(build(), sample, beam=3)


@pytest.mark.parametrize("cell", ["lrn", "gru"])
def test_batches_of_one_and_of_300(cell):
    lengths = [1 + i * i % 23 for i in range(300)]
    sample, model = batch(lengths), build(cell=cell)
    together = assert_same(model, sample, beam=2, forced=False)
    generator = build_generator([model], beam=2, max_len_b=12)
    for i in range(0, 300, 11):
        padding = max(lengths) - lengths[i]
        row = sample["net_input"]["src_tokens"][i : i + 1, padding:]
        one = {"net_input": {"src_tokens": row, "src_lengths": torch.tensor(lengths[i : i + 1])}}
        (alone,) = translate(generator, one)
        for x in alone:
            x["attention"] = nn.functional.pad(x["attention"], (0, 0, padding, 0))
        assert_same_hypotheses([alone], [together[i]])


def test_order_of_sentences():
    sample, order = batch(), torch.tensor([3, 0, 4, 2, 1])
    generator = build_generator([build()], beam=3, max_len_b=12)
    expected = translate(generator, sample)
    moved = {"net_input": {name: x[order] for name, x in sample["net_input"].items()}}
    assert_same_hypotheses(translate(generator, moved), [expected[i] for i in order])


def test_a_sentence_of_5000_words_beside_an_empty_one():
    """Unknown words are words."""
    sample = batch([5000, 1, 40])
    sample["net_input"]["src_tokens"][0, ::7] = UNK
    sample["net_input"]["src_tokens"][2, -9:-1] = UNK
    found = assert_same(build(), sample, beam=2, max_len_b=6)
    assert [beam[0]["attention"].size(0) for beam in found] == [5000] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("cell", ["lrn", "lstm"])
def test_other_types(cell, dtype):
    """Rounding may choose otherwise; scores are still those of the words."""
    tolerance = TOLERANCE if dtype == torch.float64 else {"rtol": 2e-2, "atol": 5e-2}
    model = build(cell=cell).to(dtype)
    found = assert_same(model, batch(), beam=3, margin=2e-2, tolerance=tolerance, forced=False)
    for x in itertools.chain(*found):
        assert x["score"].dtype == x["positional_scores"].dtype == x["attention"].dtype == torch.float32
    assert_forced([unprepared(model).to(dtype)], batch(), found, tolerance=tolerance)


# The model


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("task_class", TASKS)
def test_translating_leaves_the_model_as_it_was(task_class, prepared):
    """Names, weights, and what one does with a model afterwards: save, load, copy, and train."""
    model, fresh = build(), build()
    expected = translations(model, batch(), task_class, prepared=prepared)
    for kind in ("parameters", "buffers", "modules"):
        names = [[name for name, _ in getattr(m, f"named_{kind}")()] for m in (model, fresh)]
        assert names[0] == names[1]
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert all(torch.equal(x, fresh.state_dict()[name]) for name, x in model.state_dict().items())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))

    copies = [copy.deepcopy(model)] + ([] if prepared else [pickle.loads(pickle.dumps(model))])
    with torch.no_grad():  # a copy's weights are its own
        for parameter in model.parameters():
            parameter.zero_()
    for other in copies:
        assert_same_hypotheses(translations(other, batch(), task_class, prepared=prepared), expected)
    if not prepared:
        for other in (copies[0], fresh):
            learn(other)
        for name, x in copies[0].state_dict().items():
            torch.testing.assert_close(x, fresh.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prepared", [False, True])
def test_attention_of_a_layer_and_of_heads(prepared):
    """Of ``alignment_layer`` and ``alignment_heads``, for words at once and one by one."""
    plain, model = build(), build()
    if prepared:
        translations(model, batch())
    source = batch(left=False)["net_input"]["src_tokens"]
    with torch.no_grad():
        for layer, heads in ((0, 1), (0, None), (1, 1), (1, 2), (None, None)):
            wanted = {"alignment_layer": layer, "alignment_heads": heads}
            expected = plain(source, None, source, **wanted)[1]["attn"][0]
            torch.testing.assert_close(model(source, None, source, **wanted)[1]["attn"][0], expected)
            encoder_out, state = model.encoder(source), {}
            for t in range(3):
                step = model.decoder(source[:, : t + 1], encoder_out, state, **wanted)[1]["attn"][0]
                torch.testing.assert_close(step[0], expected[0, t : t + 1], rtol=1e-5, atol=1e-6)


def test_a_generator_turns_dropout_off():
    model = build(dropout=0.5).train()
    found = translations(model, batch(), prepared=False)
    assert_same_hypotheses(found, translations(build(dropout=0.5), batch()))
    assert not model.training


def test_retained_dropout_drops():
    """--retain-dropout, by which one estimates uncertainty."""
    found = []
    for seed in (1, 1, 2):
        generator = build_generator([build(dropout=0.5)], beam=3, max_len_b=12, retain_dropout=True)
        torch.manual_seed(seed)
        found.append(words_of(translate(generator, batch())))
    assert found[0] == found[1] != found[2]


def test_two_generators_of_one_model():
    """With options of their own, in turn."""
    model = build()
    options = [{"beam": 2}, {"beam": 5, "lenpen": 0.5, "max_len_b": 6}, {"beam": 1, "min_len": 5}]
    generators = [build_generator([model], **{"max_len_b": 12, **one}) for one in options]
    for seed in (1, 2):
        for generator, one in zip(generators, options):
            expected = translations(build(), batch(seed=seed), **one)
            assert_same_hypotheses(translate(generator, batch(seed=seed)), expected)


def load(model):
    model.load_state_dict(build(seed=7).state_dict())


def assign(model):
    nn.Module.load_state_dict(model, build(seed=7).state_dict(), assign=True)


def write(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def write_in_place(model):
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(1.1)


def transpose(model):
    for layer in model.decoder.layers:
        layer.encoder_attn.q_proj.weight.data = layer.encoder_attn.q_proj.weight.data.t()


@pytest.mark.parametrize("task_class", TASKS)
@pytest.mark.parametrize(
    "change, prepared",
    [
        (learn, False),
        (load, False),
        (assign, False),
        (write, False),
        (load, True),
        (assign, True),
        (write, True),
        (write_in_place, False),
        (write_in_place, True),
        (transpose, True),
    ],
)
def test_changed_weights_count(change, prepared, task_class):
    """With a new generator; where the model was trained or loaded in between, with the same one too."""
    model = build()
    generator = build_generator([model], task_class, prepared=prepared, beam=3, max_len_b=12)
    before = translate(generator, batch())
    change(model)
    expected = translations(unprepared(model), batch(), TranslationTask, prepared=False)
    assert words_of(expected) != words_of(before)
    if change is not write and (prepared or change is not assign):
        assert_same_hypotheses(translate(generator, batch()), expected)
    assert_same_hypotheses(translations(model, batch(), task_class, prepared=prepared), expected)


@pytest.mark.parametrize("prepared", [False, True])
def test_models_that_share_an_encoder(prepared):
    one, other = build(seed=1), build(seed=2)
    other.encoder = one.encoder
    expected = translations(copy.deepcopy(other), batch(), TranslationTask, prepared=False)
    found = [translations(model, batch(), prepared=prepared) for model in (one, other, one)]
    assert_same_hypotheses(found[1], expected)
    assert_same_hypotheses(found[2], found[0])


def add_hook(model):
    model.decoder.layers[0].ffn.register_forward_hook(lambda module, inputs, output: -output)


def change_eps(model):
    model.encoder.layers[0].final_layer_norm.eps = 0.5


def adapt(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    old = model.decoder.layers[1].encoder_attn.out_proj
    new = Doubled(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    model.decoder.layers[1].encoder_attn.out_proj = new


def widen(model):
    torch.manual_seed(0)
    old = model.encoder.layers[1].out_proj
    model.encoder.layers[1].out_proj = nn.Sequential(old, nn.Linear(16, 16))


def score_twice(model):
    model.decoder.output_projection.register_forward_hook(lambda module, inputs, output: 2 * output)


def keep_bias_in_a_buffer(model):
    layer = model.decoder.layers[0].out_proj
    bias = layer.bias.data
    del layer.bias
    layer.register_buffer("bias", 50 * bias)


def set_bias(model):
    layer = model.encoder.layers[0].ffn.fc2
    bias = layer.bias.data
    del layer.bias
    layer.bias = 50 * bias


def leave_out_biases(model):
    model.decoder.layers[0].rnn.bias = False
    with torch.no_grad():
        model.decoder.layers[0].rnn.bias_ih_l0.add_(1)


@pytest.mark.parametrize(
    "change",
    [add_hook, change_eps, adapt, widen, score_twice, keep_bias_in_a_buffer, set_bias, leave_out_biases],
)
def test_changed_modules_count(change):
    model = build()
    change(model)
    with torch.no_grad():
        source = batch()["net_input"]["src_tokens"]
        assert (model(source, None, source)[0] - build()(source, None, source)[0]).abs().max() > 0.01
    assert_same(model, batch(), beam=3)


@pytest.mark.parametrize(
    "kind, name",
    [
        (FeedForward, "forward"),
        (nn.Linear, "forward"),
        (nn.LayerNorm, "forward"),
        (LRN, "forward"),
        (LRNDecoder, "output_layer"),
        (LRNModel, "get_normalized_probs"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("prepared", [False, True])
def test_changed_classes_count(monkeypatch, kind, name, prepared):
    """With a new generator, and where ``forward`` changed with the same one too."""
    old, model = getattr(kind, name), build()
    generator = build_generator([model], prepared=prepared, beam=3, max_len_b=12)
    before = translate(generator, batch())

    def twice(self, *args, **kwargs):
        found = old(self, *args, **kwargs)
        return (2 * found[0], *found[1:]) if isinstance(found, tuple) else 2 * found

    monkeypatch.setattr(kind, name, twice)
    expected = translations(unprepared(model), batch(), TranslationTask, prepared=False)
    assert not torch.equal(before[0][0]["positional_scores"], expected[0][0]["positional_scores"])
    if name == "forward":
        assert_same_hypotheses(translate(generator, batch()), expected)
    assert_same_hypotheses(translations(model, batch(), prepared=prepared), expected)


def test_a_generator_whose_steps_were_replaced():
    generators = [build_generator([build()], task, beam=3, max_len_b=12) for task in TASKS]
    for generator in generators:
        forward = generator.model.forward_decoder
        generator.model.forward_decoder = lambda *args, forward=forward: (-forward(*args)[0], None)
    ours, theirs = (translate(generator, batch()) for generator in generators)
    assert_same_hypotheses(ours, theirs)


def test_embeddings_in_place_of_words():
    sample = batch()
    torch.manual_seed(0)
    sample["net_input"]["token_embeddings"] = torch.randn(5, 11, 16)
    expected = translations(build(), sample, TranslationTask, prepared=False)
    assert words_of(expected) != words_of(translations(build(), batch()))
    assert_same_hypotheses(translations(build(), sample), expected)


def test_a_copied_generator():
    generator = build_generator([build()], prepared=False, beam=3, max_len_b=12)
    expected = translate(generator, batch())
    del generator.task, generator.translated_by
    copied = copy.deepcopy(generator)
    with torch.no_grad():
        generator.model.single_model.decoder.output_projection.weight.neg_()
    assert_same_hypotheses(copied.generate([], batch()), expected)


def test_dropout_that_begins_later():
    model = build()
    dropout = model.decoder.layers[0].dropout_module
    dropout.p, dropout.apply_during_inference = 0.0, True
    generator = build_generator([model], beam=3, max_len_b=12)
    before = words_of(translate(generator, batch()))
    assert before == words_of(translate(generator, batch()))
    dropout.p = 0.9
    assert before != words_of(translate(generator, batch()))


@torch.no_grad()
def test_a_part_that_was_replaced_is_the_old_one():
    model, other = build(seed=1), build(seed=2)
    translations(model, batch())
    encoder, tokens = model.encoder, batch()["net_input"]["src_tokens"]
    model.encoder = other.encoder
    expected = build(seed=1).encoder(tokens)["encoder_out"][0]
    torch.testing.assert_close(encoder(tokens)["encoder_out"][0], expected)


def test_enormous_scores():
    """A log-probability is a small difference of them."""
    model = build()
    with torch.no_grad():
        model.decoder.output_projection.weight.mul_(1e12)
    assert_same(model, batch(), beam=3, tolerance={"rtol": 1e-5, "atol": 0}, forced=False)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated", "ignore:.*TypedStorage")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
def test_quantized_dynamically(prepared, shared):
    """Before the model is prepared, or afterwards, as a copy and in place."""
    options = {"share_decoder_input_output_embed": shared}
    model = build(**options)
    plain = torch.ao.quantization.quantize_dynamic(build(**options), {nn.Linear})
    if not prepared:
        assert_same(plain, batch(), beam=3, forced=False)
        return
    expected = translations(plain, batch(), TranslationTask)
    translations(model, batch())
    copied = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert_same_hypotheses(translations(copied, batch()), expected)
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    assert_same_hypotheses(translations(model, batch()), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_after_translating():
    """fairseq's search of a model that was translated with is scripted, saved and loaded as any other."""
    model = build()
    expected = translations(model, batch())
    generator = SequenceGenerator([model], model.decoder.dictionary, beam_size=3, max_len_b=12)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(generator), file)
    file.seek(0)
    assert_same_hypotheses(torch.jit.load(file)(batch()), expected)
    assert_same_hypotheses(translations(model, batch()), expected)


@needs_operators
def test_a_search_that_was_saved_earlier_finds_its_operator():
    """The programs that TorchScript saved call it so."""
    old = torch._C.parse_schema(
        "fairseq_lrn::lrn_scan(Tensor projections, Tensor? initial_state, Tensor? padding_mask, *, "
        "str activation, bool output_gate, bool reverse, bool bidirectional=False) -> Tensor"
    )
    assert torch.ops.fairseq_lrn.lrn_scan.default._schema.is_backward_compatible_with(old)

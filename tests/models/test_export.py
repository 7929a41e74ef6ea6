"""TorchScript, torch.compile and torch.export of every model, as examples/translation/export.md shows it."""

import copy
import io
from pathlib import Path

import fairseq
import pytest
import torch
from batches import run_without_the_package, sentences, task
from fairseq.sequence_generator import SequenceGenerator

from fairseq_lrn.models import LRNModel
from fairseq_lrn.models.deepnmt import DeepNMTConfig, DeepNMTModel
from fairseq_lrn.models.lrn import LRNConfig
from fairseq_lrn.models.lrn_classifier import LRNClassifierModel
from fairseq_lrn.models.lrn_inference import LRNInferenceConfig, LRNInferenceModel
from fairseq_lrn.models.lrn_lm import LRNLanguageModel, LRNLanguageModelConfig
from fairseq_lrn.models.lrn_reader import LRNReaderModel
from fairseq_lrn.models.lrn_tagger import LRNTaggerModel
from fairseq_lrn.models.word_encoder import WordEncoderConfig

ROOT = Path(__file__).resolve().parents[2]
TASK = task()
DICTIONARY = TASK.source_dictionary
PAD = DICTIONARY.pad()
close = torch.testing.assert_close

pytestmark = [
    pytest.mark.skipif(fairseq.__version__ == "0.12.2", reason="the table is of PyTorch 2.13"),
    pytest.mark.skipif(not hasattr(torch.ops.fairseq_lrn, "lrn_scan"), reason="needs the compiled operator"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

# ---------------------------------------------------------------- the models

SIZES = {"encoder_embed_dim": 8, "encoder_layers": 1, "decoder_embed_dim": 8, "decoder_attention_heads": 2}
WORDS = {"encoder_embed_dim": 6, "encoder_hidden_size": 4, "dropout": 0.0}


def build_lrn(**options):
    sizes = {**SIZES, "encoder_ffn_embed_dim": 8, "decoder_ffn_embed_dim": 8, "decoder_layers": 1}
    return LRNModel.build_model(LRNConfig(**{**sizes, "dropout": 0.0, **options}), TASK)


def build_deepnmt(**options):
    sizes = {**SIZES, "decoder_layers": 1}
    return DeepNMTModel.build_model(DeepNMTConfig(**{**sizes, "dropout": 0.0, **options}), TASK)


def build_lm(**options):
    sizes = {"decoder_embed_dim": 6, "decoder_hidden_size": 8, "decoder_layers": 2, "dropout": 0.0}
    return LRNLanguageModel.build_model(LRNLanguageModelConfig(**sizes, **options), TASK)


def build_classifier(**options):
    return LRNClassifierModel(WordEncoderConfig(**WORDS, **options), DICTIONARY)


def build_inference(**options):
    return LRNInferenceModel(LRNInferenceConfig(**WORDS, comparison_layers=1, **options), DICTIONARY)


def build_tagger(**options):
    return LRNTaggerModel(WordEncoderConfig(**WORDS, **options), DICTIONARY, DICTIONARY, 4)


def build_reader(**options):
    return LRNReaderModel(WordEncoderConfig(**WORDS, **options), DICTIONARY, 4)


GRU, ATR = "`--cell gru`, `lstm`", "`--cell atr`, `sru`"
LAYERDROP = "`--encoder-layerdrop`, `--decoder-layerdrop`"
CHECKPOINTING = "`--checkpoint-activations`, `--offload-activations`"
NOISE, ADAPTIVE = "`--quant-noise-pq`", "`--adaptive-softmax-cutoff`"
CHARACTERS = "`--char-embed-dim`"
# the rows of the table, model and options, each with the models that it speaks of
ROWS = {
    ("`lrn`", ""): [(build_lrn, {"decoder_layers": 2}), (build_lrn, {"cell": "olrn"})],
    ("`lrn`", GRU): [(build_lrn, {"cell": "gru"}), (build_lrn, {"cell": "lstm"})],
    ("`lrn`", ATR): [(build_lrn, {"cell": "atr"}), (build_lrn, {"cell": "sru"})],
    ("`lrn`", LAYERDROP): [(build_lrn, {"encoder_layerdrop": 0.1, "decoder_layerdrop": 0.1})],
    ("`lrn`", CHECKPOINTING): [
        (build_lrn, {"checkpoint_activations": True}),
        (build_lrn, {"offload_activations": True}),
    ],
    ("`lrn`", NOISE): [(build_lrn, {"quant_noise_pq": 0.1, "quant_noise_pq_block_size": 4})],
    ("`lrn`", ADAPTIVE): [(build_lrn, {"adaptive_softmax_cutoff": [20, 40]})],
    ("`deepnmt`", ""): [(build_deepnmt, {"context_aware_encoder": True, "decoder_layers": 2})],
    ("`deepnmt`", GRU): [(build_deepnmt, {"cell": "gru"})],
    ("`deepnmt`", ATR): [(build_deepnmt, {"cell": "sru"})],
    ("`lrn_lm`", ""): [(build_lm, {"mixture_of_softmaxes": 2})],
    ("`lrn_lm`", GRU): [(build_lm, {"cell": "lstm"})],
    ("`lrn_lm`", ATR): [(build_lm, {"cell": "atr"})],
    ("`lrn_lm`", ADAPTIVE): [(build_lm, {"adaptive_softmax_cutoff": [20, 40]})],
    ("`lrn_classifier`", ""): [(build_classifier, {})],
    ("`lrn_tagger`", ""): [(build_tagger, {"cell": "olrn"})],
    ("`lrn_tagger`", CHARACTERS): [(build_tagger, {"char_embed_dim": 4})],
    ("`lrn_inference`", ""): [(build_inference, {})],
    ("`lrn_reader`", ""): [(build_reader, {})],
    ("`lrn_reader`", CHARACTERS): [(build_reader, {"char_embed_dim": 4})],
}


def make(builder, options):
    torch.manual_seed(0)
    model = builder(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # predictions that differ from word to word
    return model.double().eval()


def batch(builder, source_lengths, target_lengths):
    """The model's arguments for sentences of these lengths, sources being padded on the left."""
    source = sentences(source_lengths, PAD, left=True)
    target = sentences(target_lengths, PAD, seed=2)
    if builder in (build_lrn, build_deepnmt):
        return source, None, target
    if builder is build_inference:
        return (torch.cat([source, target], 1),)
    characters = [(tokens.unsqueeze(2) + torch.arange(4)) % 50 + 1 for tokens in (source, target)]
    if builder is build_reader:
        return source, characters[0], target, characters[1]
    if builder is build_tagger:
        return target, target.ne(PAD).sum(1), characters[1]
    return (target,)


# no two sizes of the first batch are equal, which torch.compile would take to be one
BATCHES = [((2, 1, 2, 2), (3, 2, 3, 1)), ((3, 2), (1, 2))]


def tensors(output):
    """The first tensor of an output: scores or features."""
    while not torch.is_tensor(output):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


# ---------------------------------------------------------------- the columns
# Each check raises an error, or returns what the table says.

COLUMNS = {}


def column(name):
    def register(check):
        COLUMNS[name] = check
        return check

    return register


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the checks leave what they have saved; the last test loads it."""
    return tmp_path_factory.mktemp("saved")


def save(folder, write, arguments, expected):
    number = len(list(folder.iterdir())) // 2
    write(str(folder / f"{number}.pt2"))
    torch.save((arguments, expected), folder / f"{number}.data")


@column("TorchScript: the model")
def script(builder, model, folder):
    scripted = torch.jit.script(model)
    arguments = [batch(builder, *lengths) for lengths in BATCHES]
    expected = [tensors(model(*inputs)).detach() for inputs in arguments]
    close([tensors(scripted(*inputs)) for inputs in arguments], expected)
    save(folder, scripted.save, arguments, expected)
    return "yes"


def search(builder, model):
    """A search, and a batch for it."""
    tokens = batch(builder, *BATCHES[0])[0]
    if builder is build_lm:
        tokens = tokens[:, :1]  # the sentences' beginnings
    sample = {"net_input": {"src_tokens": tokens, "src_lengths": tokens.ne(PAD).sum(1)}}
    return SequenceGenerator([model], DICTIONARY, beam_size=2, max_len_b=4), sample


@column("TorchScript: `SequenceGenerator`")
def script_search(builder, model, folder):
    generator, sample = search(builder, model)
    expected = generator.generate([model], sample)
    scripted = torch.jit.script(generator)
    close(scripted(sample), expected)
    save(folder, scripted.save, [(sample,)], [expected])
    return "yes"


def counting(graphs):
    return lambda graph, _: graphs.append(graph) or graph.forward


@column("`torch.compile(fullgraph=True)`: training")
def compile_training(builder, model, folder):
    graphs, steps = [], []
    model.train()
    compiled = copy.deepcopy(model)
    run = torch.compile(compiled, backend=counting(graphs), fullgraph=True, dynamic=True)
    for net, call in ((model, model), (compiled, run)):
        torch.manual_seed(0)
        for lengths in BATCHES:
            output = tensors(call(*batch(builder, *lengths)))
            output.masked_fill(output.isinf(), 0).logsumexp(-1).sum().backward()
            steps.append([output] + [p.grad.clone() for p in net.parameters() if p.grad is not None])
    close(steps[len(BATCHES) :], steps[: len(BATCHES)])
    return "yes" if len(graphs) == 1 else "a graph a length"


@column("`torch.compile(fullgraph=True)`: encoder and decoder in a search")
@torch.no_grad()  # as the search runs the encoder: one graph for both
def compile_search(builder, model, folder):
    generator, sample = search(builder, model)
    expected = generator.generate([model], sample)
    model.decoder.forward = torch.compile(model.decoder.forward, backend="eager", fullgraph=True)
    graphs = []
    if builder is not build_lm:
        sources = [batch(builder, *lengths)[0] for lengths in BATCHES]
        encoded = [tensors(model.encoder(source)) for source in sources]
        model.encoder.forward = torch.compile(
            model.encoder.forward, backend=counting(graphs), fullgraph=True, dynamic=True
        )
        close([tensors(model.encoder(source)) for source in sources], encoded)
    close(generator.generate([model], sample), expected)
    return "yes" if len(graphs) < 2 else "a graph a length"


@column("`torch.export`: the encoder, `lrn_lm`'s decoder")
def export(builder, model, folder):
    part = model.decoder if builder is build_lm else model.encoder
    sources = [sentences(lengths, PAD, left=True) for lengths in ([3, 2], [4, 1, 2], [1], [5, 5])]
    inputs = [(source,) for source in sources]
    dims = {0: torch.export.Dim("size"), 1: torch.export.Dim("length")}
    if model.__class__ is LRNReaderModel or getattr(part, "embed_chars", None) is not None:
        inputs = [(source, (source.unsqueeze(2) + torch.arange(4)) % 50 + 1) for source in sources]
    try:
        program = torch.export.export(part, inputs[0], dynamic_shapes=(dims,) * len(inputs[0]))
        found = "yes"
    except torch._dynamo.exc.UserError as error:
        if "specialized it to be a constant" not in str(error):
            raise
        program, inputs, found = torch.export.export(part, inputs[0]), inputs[:1], "one shape"
    expected = [tensors(part(*input)).detach() for input in inputs]
    outputs = [program.module()(*input) for input in inputs]
    close([tensors(output) for output in outputs], expected)
    if builder in (build_lrn, build_deepnmt):  # unlike the part itself, it gives a mask whatever the batch
        for (source,), output in zip(inputs, outputs):
            assert torch.equal(output["encoder_padding_mask"][0], source.eq(PAD))
    if found == "yes":
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        torch.export.load(file)
        if builder is build_lrn:
            save(folder, lambda path: Path(path).write_bytes(file.getvalue()), inputs, expected)
    return found


SCRIPT, SCRIPT_SEARCH, TRAIN, SEARCH, EXPORT = COLUMNS

# ---------------------------------------------------------------- the table

NOTES = {
    "a graph a length": "The recurrence is unrolled: each length makes another graph, and `fullgraph=True` "
    "refuses more than `torch._dynamo.config.recompile_limit`.",
    "one shape": "The recurrence is unrolled: leave out `dynamic_shapes`, and give each batch that shape.",
    "with `allow_rnn`": "PyTorch compiles `nn.GRU` and `nn.LSTM` only with "
    "`torch._dynamo.config.allow_rnn = True`.",
}
# (row, column): another outcome than "yes": what a check returns, or how an error begins and why
OUTCOMES = {
    **{((model, cell), EXPORT): "one shape" for model, cell in ROWS if cell in (GRU, ATR)},
    **{
        ((model, GRU), name): "a graph a length, with `allow_rnn`"
        for model, cell in ROWS
        for name in (TRAIN, SEARCH)
    },
    **{((model, ATR), name): "a graph a length" for model, cell in ROWS for name in (TRAIN, SEARCH)},
    (("`lrn_lm`", GRU), SEARCH): "with `allow_rnn`",
    (("`lrn_lm`", ATR), SEARCH): "yes",
    (("`deepnmt`", ""), TRAIN): "a graph a length",
    **{
        (row, name): ("is not written for TorchScript", "Only `lrn` is written for TorchScript.")
        for row in ROWS
        for name in (SCRIPT, SCRIPT_SEARCH)
        if row[0] != "`lrn`"
    },
    **{
        (("`lrn`", options), name): ("TorchScript cannot compile fairseq's", why)
        for options, why in (
            (
                CHECKPOINTING,
                "Load the model without it: `checkpoint_activations=False, offload_activations=False`.",
            ),
            (NOISE, "Load the model without it: `quant_noise_pq=0`."),
            (ADAPTIVE, "fairseq's adaptive softmax is not written for TorchScript."),
        )
        for name in (SCRIPT, SCRIPT_SEARCH)
    },
    (("`lrn`", LAYERDROP), EXPORT): (
        "error when deserializing",
        "Load the model without it: `encoder_layerdrop=0`. `torch.export.load` cannot read what it draws.",
    ),
    **{
        (("`lrn`", CHECKPOINTING), name): (
            "Dynamo",
            "Load the model without it: `checkpoint_activations=False, offload_activations=False`.",
        )
        for name in (TRAIN, SEARCH)
    },
    **{
        (row, name): (
            error,
            "It branches on numbers that it has computed; `torch.compile` without `fullgraph=True` runs.",
        )
        for row, name, error in (
            (("`lrn`", LAYERDROP), TRAIN, "Data-dependent branching"),
            (("`lrn_inference`", ""), TRAIN, "Data-dependent branching"),
            (("`lrn_tagger`", CHARACTERS), TRAIN, "Data-dependent branching"),
            (("`lrn_tagger`", CHARACTERS), EXPORT, "data-dependent"),
            (("`lrn_reader`", CHARACTERS), TRAIN, "Data-dependent branching"),
            (("`lrn_reader`", CHARACTERS), EXPORT, "data-dependent"),
        )
    },
}
CELLS = [
    (row, name)
    for row in ROWS
    for name in COLUMNS
    if row[0] in ("`lrn`", "`deepnmt`", "`lrn_lm`") or name not in (SCRIPT_SEARCH, SEARCH)
]


def run(name, builder, options, folder):
    try:
        return COLUMNS[name](builder, make(builder, options), folder)
    except torch._dynamo.exc.Unsupported as error:
        if "allow_rnn" not in str(error):
            raise
    with torch._dynamo.config.patch(allow_rnn=True):
        found = COLUMNS[name](builder, make(builder, options), folder)
    return "with `allow_rnn`" if found == "yes" else f"{found}, with `allow_rnn`"


@pytest.mark.parametrize(
    ("row", "name"), CELLS, ids=lambda value: " ".join(value) if isinstance(value, tuple) else value
)
def test_cell(row, name, folder):
    torch._dynamo.reset()
    outcome = OUTCOMES.get((row, name), "yes")
    models = ROWS[row]
    if row[1] and name not in (SCRIPT, SCRIPT_SEARCH):
        models = models[:1]  # the other cell of the row is traced in another model's
    for builder, options in models:
        if isinstance(outcome, tuple):
            with pytest.raises(Exception, match=outcome[0]):
                run(name, builder, options, folder)
        else:
            assert run(name, builder, options, folder) == outcome


@pytest.mark.parametrize(
    ("builder", "options"),
    [(build_lrn, {"encoder_layerdrop": 0.1}), (build_inference, {}), (build_tagger, {"char_embed_dim": 4})],
)
def test_without_fullgraph_it_runs(builder, options):
    """Where the table says no because of a branch."""
    model, inputs = make(builder, options), batch(builder, *BATCHES[0])
    torch.manual_seed(0)
    expected = tensors(model.train()(*inputs))
    torch.manual_seed(0)
    close(tensors(torch.compile(model, backend="eager")(*inputs)), expected)


def test_without_the_package(folder):
    """What the checks saved gives the same where only PyTorch and the operators' library are."""
    assert list(folder.iterdir())
    program = """
import pathlib
for data in pathlib.Path(".").glob("*.data"):
    try:
        program = torch.jit.load(data.with_suffix(".pt2"))
    except RuntimeError:
        program = torch.export.load(data.with_suffix(".pt2")).module()
    for batch, expected in zip(*torch.load(data)):
        with torch.jit.optimized_execution(False):  # which takes longer than these batches
            found = program(*batch)
        while type(found) is not type(expected):
            found = next(iter(found.values())) if isinstance(found, dict) else found[0]
        torch.testing.assert_close(found, expected)
"""
    run_without_the_package(folder, program)


def table():
    """The table as examples/translation/export.md has to show it."""
    notes = []
    lines = ["| | option | " + " | ".join(COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for row in ROWS:
        cells = []
        for name in COLUMNS:
            outcome = OUTCOMES.get((row, name), "yes") if (row, name) in CELLS else "-"
            if isinstance(outcome, tuple):
                outcome, reasons = "no", [outcome[1]]
            else:
                reasons = [reason for key, reason in NOTES.items() if key in outcome]
            notes += [reason for reason in reasons if reason not in notes]
            numbers = ", ".join(str(notes.index(reason) + 1) for reason in reasons)
            cells.append(f"{outcome} ({numbers})" if numbers else outcome)
        lines.append("| " + " | ".join([*row, *cells]) + " |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))])


def test_the_page_shows_the_table():
    page = ROOT / "examples" / "translation" / "export.md"
    assert table() in page.read_text(encoding="utf-8"), table()

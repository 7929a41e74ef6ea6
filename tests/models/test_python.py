"""The lrn model from Python, by fairseq's hub interface; test_export.py has what PyTorch's tools take."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from batches import SMALL, SMALL_OPTIONS, run_without_the_package
from fairseq.data.data_utils import collate_tokens
from fairseq.sequence_generator import SequenceGenerator

from fairseq_lrn.models import LRNModel
from fairseq_lrn.models.lrn import LRNConfig

PACKAGE = Path(__file__).resolve().parents[2] / "fairseq_lrn"
SENTENCES = ["One day", "", "12 March 2019", "the first quarter, and a longer one"]
TRAIN = (
    "-s en -t de --arch lrn_tiny --share-all-embeddings --optimizer adam --lr 0.01 --criterion cross_entropy "
    "--max-tokens 800 --required-batch-size-multiple 1 --cpu --num-workers 0 --max-update 150 "
    "--disable-validation --no-epoch-checkpoints"
).split()
needs_operator = pytest.mark.skipif(
    not hasattr(torch.ops.fairseq_lrn, "lrn_scan"), reason="needs the compiled operator"
)
quiet_torchscript = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(run, corpus, data, tmp_path_factory):
    """A model with all that it needs, as one hands it on."""
    folder = tmp_path_factory.mktemp("model")
    run(
        "fairseq-train",
        data,
        "--user-dir",
        PACKAGE,
        *TRAIN,
        *SMALL_OPTIONS,
        "--dropout",
        0,
        "--save-dir",
        folder,
    )
    for language in ("en", "de"):
        shutil.copy(data / f"dict.{language}.txt", folder)
    shutil.copy(corpus / "spm.model", folder)
    return folder


@pytest.fixture(scope="module")
def hub(folder):
    return LRNModel.from_pretrained(
        folder, "checkpoint_last.pt", bpe="sentencepiece", sentencepiece_model=str(folder / "spm.model")
    )


@pytest.fixture
def model(hub):
    """An untrained model of another form."""
    torch.manual_seed(0)
    config = LRNConfig(**{**SMALL, "dropout": 0.0, "encoder_embed_dim": 12, "cell": "olrn"})
    return LRNModel.build_model(config, hub.task).eval()


@pytest.fixture(scope="module")
def samples(hub):
    """Batches of sentences, as the search takes them; the first one is padded."""
    sentences = [hub.encode(sentence) for sentence in SENTENCES]
    samples = []
    for tokens in (sentences, sentences[:1]):
        source = collate_tokens(tokens, hub.src_dict.pad(), left_pad=True)
        lengths = torch.tensor([len(sentence) for sentence in tokens])
        samples.append({"net_input": {"src_tokens": source, "src_lengths": lengths}})
    return samples


def search(generator, models, samples):
    """What is found for each batch: hypotheses of different lengths."""
    found = [generator.generate(models, sample) for sample in samples]
    assert len({len(hypothesis["tokens"]) for beams in found for beam in beams for hypothesis in beam}) > 1
    return found


def test_hub_interface_translates_as_the_command_does(run, data, folder, hub):
    together = hub.translate(SENTENCES)
    assert [hub.translate(sentence) for sentence in SENTENCES] == together
    options = ["--bpe", "sentencepiece", "--sentencepiece-model", folder / "spm.model"]
    out = run("fairseq-interactive", data, "--user-dir", PACKAGE, "--path", folder / "checkpoint_last.pt",
              "--cpu", *options, input="".join(sentence + "\n" for sentence in SENTENCES))  # fmt: skip
    assert re.findall(r"^D-\d+\t\S+\t(.*)$", out, re.M) == together
    assert len(set(together)) > 2


@pytest.mark.parametrize(
    "how, options",
    [
        ("from fairseq_lrn.models import LRNModel as Model", ""),
        ("from fairseq.models import FairseqEncoderDecoderModel as Model", "user_dir='fairseq_lrn', "),
    ],
    ids=["import", "user_dir"],
)
def test_hub_interface_wherever_the_package_is(run, folder, hub, how, options, tmp_path):
    """Found by Python, as an installed package is, or named: a checkout that is not installed."""
    shutil.copytree(PACKAGE, tmp_path / "fairseq_lrn", ignore=shutil.ignore_patterns("__pycache__"))
    program = f"""
import os, sys
os.chdir({str(tmp_path)!r})
{"" if options else "sys.path.insert(0, os.getcwd())"}
{how}
hub = Model.from_pretrained({str(folder)!r}, "checkpoint_last.pt", {options}bpe="sentencepiece",
                            sentencepiece_model={str(folder / "spm.model")!r})
print(hub.translate({SENTENCES!r}))
print(sys.modules["fairseq_lrn"].__file__)
"""
    (tmp_path / "program.py").write_text(program)
    lines = run(tmp_path / "program.py").splitlines()
    assert lines[-2:] == [str(hub.translate(SENTENCES)), str(tmp_path / "fairseq_lrn" / "__init__.py")]


@quiet_torchscript
@needs_operator
@pytest.mark.parametrize("count", [1, 2], ids=["alone", "ensemble"])
def test_torchscript_searches_without_the_package(hub, model, samples, count, tmp_path):
    models = [hub.models[0], model][:count]
    generator = SequenceGenerator(models, hub.tgt_dict, beam_size=3, max_len_b=30, no_repeat_ngram_size=3)
    found = search(generator, models, samples)
    torch.jit.script(generator).save(tmp_path / "generator.pt")
    torch.save((samples, found), tmp_path / "data.pt")
    program = """
generator = torch.jit.load("generator.pt")
for sample, found in zip(*torch.load("data.pt")):
    torch.testing.assert_close(generator(sample), found, rtol=1e-5, atol=1e-5)
"""
    run_without_the_package(tmp_path, program)


@quiet_torchscript
@needs_operator
def test_loading_without_what_torchscript_does_not_take(run, data, tmp_path):
    """As the error says, and examples/translation/export.md."""
    options = {"offload_activations": False, "checkpoint_activations": False, "quant_noise_pq": 0.0}
    noise = ["--quant-noise-pq", 0.1, "--quant-noise-pq-block-size", 4, "--offload-activations"]
    train = ["fairseq-train", data, "--user-dir", PACKAGE, *TRAIN, *SMALL_OPTIONS, *noise]
    run(*train, "--max-update", 1, "--save-dir", tmp_path)
    load = (tmp_path, "checkpoint_last.pt", str(data))
    for option in options:
        others = {name: value for name, value in options.items() if name != option}
        if option != "checkpoint_activations":  # the other one asks for it
            with pytest.raises(TypeError, match=f"load the model with {option}=0"):
                torch.jit.script(LRNModel.from_pretrained(*load, **others).models[0])
    model = LRNModel.from_pretrained(*load, **options).models[0]
    tokens = torch.tensor([[5, 6, 2]])
    torch.testing.assert_close(
        torch.jit.script(model)(tokens, None, tokens)[0], model(tokens, None, tokens)[0]
    )

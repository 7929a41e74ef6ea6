"""What people do with fairseq's translation models, done with its lstm and transformer and with lrn.

Each feature is checked through fairseq's commands: for lrn always, for the others with --all. What a model
cannot do is in EXCEPTIONS, with the reason. examples/translation/README.md shows what not all three can do.
"""

import json
import math
import os
import re
import signal
import sys
from argparse import Namespace
from collections import Counter, defaultdict
from pathlib import Path

import fairseq
import pytest
import sacrebleu
import sentencepiece
import torch
from batches import SMALL_OPTIONS
from fairseq import options as fairseq_options
from omegaconf import OmegaConf
from recipes import trained

import fairseq_lrn.models  # noqa: F401  registers lrn, and lets torch.load read checkpoints with weights_only=True

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples" / "translation"
PLUGIN = ["--user-dir", ROOT / "fairseq_lrn"]

MODELS = {
    "lstm": "--arch lstm --encoder-embed-dim 16 --encoder-hidden-size 32 --encoder-layers 1 "
    "--decoder-embed-dim 16 --decoder-hidden-size 32 --decoder-out-embed-dim 16 --decoder-layers 1".split(),
    "transformer": ["--arch", "transformer_iwslt_de_en", "--encoder-attention-heads", "2", *SMALL_OPTIONS],
    "lrn": ["--arch", "lrn_iwslt_de_en", *SMALL_OPTIONS],
}
RATES = {"lstm": 0.03, "transformer": 0.01, "lrn": 0.01}  # to learn something in a few seconds
TRAIN = (
    "--optimizer adam --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --dropout 0 "
    "--share-all-embeddings --max-tokens 400 --required-batch-size-multiple 1 --num-workers 0 --seed 3 "
    "--log-format json --log-interval 1"
).split()
BATCHES = 7  # of the training set, an odd number for two processes to share
EPOCHS = 20
SEARCH = "--beam 3 --max-len-b 20 --num-workers 0 --required-batch-size-multiple 1".split()

OLD = fairseq.__version__ == "0.12.2"

# Why lrn lacks these options of fairseq's transformer.
MISSING = {
    "The recurrences of lrn know the order, so it embeds no positions.": (
        "--encoder-learned-pos --decoder-learned-pos --no-token-positional-embeddings"
    ),
    "In lrn only the decoder attends, and only to the encoder.": (
        "--encoder-attention-heads --cross-self-attention --no-cross-attention --encoder-xformers-att-config "
        "--decoder-xformers-att-config"
    ),
    "Blocks of lrn are normalised first, and their sum once at the end.": (
        "--encoder-normalize-before --decoder-normalize-before --no-decoder-final-norm --layernorm-embedding"
    ),
    "The embeddings of lrn are one matrix a side, as wide as its layers; only these can be shared.": (
        "--adaptive-input --tie-adaptive-weights --tie-adaptive-proj --char-inputs --decoder-output-dim "
        "--merge-src-tgt-embed"
    ),
    "BASE layers want as many tokens in each process, so translation aborts with them in transformer too.": (
        "--base-layers --base-shuffle --base-sublayers"
    ),
    "fairseq quantizes weights named weight; those of a recurrence have the names of nn.GRU's.": (
        "--quant-noise-scalar"
    ),
    "It is an older name of --activation-dropout.": "--relu-dropout",
    "The layer norms of lrn need no other form for TorchScript.": "--export",
}

HYDRA = "`fairseq-hydra-train`, from a YAML file"
BFLOAT16 = "bfloat16 on the CPU: `fairseq-hydra-train ... common.bf16=true`"
DIVERSE = "`--diverse-beam-groups`"
ENSEMBLES = "ensembles of two to four checkpoints, other architectures among them"
ALIGNMENT = "`--print-alignment`, hard and soft"
LAYERDROP = "`--encoder-layerdrop`, `--decoder-layerdrop`"
LAYERS_TO_KEEP = "`encoder_layers_to_keep`, `decoder_layers_to_keep` in `--model-overrides`"
CHECKPOINTING = "`--checkpoint-activations`, `--offload-activations`"
NOISE = "`--quant-noise-pq`, `--quant-noise-pq-block-size`"

FEATURES = {}
# (feature, architecture): (what its check ends with, why)
EXCEPTIONS = {
    **{
        (name, architecture): (ending, why)
        for architecture in MODELS
        for name, ending, why in (
            ("`fairseq-train --bf16`", "'xla_device'", "fairseq takes `--bf16` to ask for a TPU."),
            ("`--print-step`", "KeyError: 'steps'", "Only fairseq's non-autoregressive models count steps."),
            (
                "`--replace-unk` on a translation that holds `<unk>`",
                "IndexError: index 0 is out of bounds",
                "fairseq looks for the word's alignment where there is none.",
            ),
        )
    },
    **{
        (name, "lstm"): (
            "Missing key criterion",
            "fairseq's `lstm` looks for the criterion among its own options; a YAML file has it elsewhere.",
        )
        for name in (HYDRA, BFLOAT16)
    },
    **{
        (name, "lstm"): ("unrecognized arguments", "fairseq's `lstm` has no such options.")
        for name in (LAYERDROP, CHECKPOINTING, NOISE)
    },
    (LAYERS_TO_KEEP, "lstm"): ("has no such layers", "fairseq's `lstm` has no such options."),
    (ALIGNMENT, "lstm"): (
        "== 1",
        "fairseq's `lstm` pads sources on the right, but reads alignments as if on the left.",
    ),
}


def feature(name, gpus=0):
    """Name what the decorated function checks; it needs so many GPUs."""

    def add(check):
        FEATURES[name] = (check, gpus)
        return check

    return add


def table():
    """The features that not all architectures have, as the README has to show them."""
    reasons = list(dict.fromkeys(why for _, why in EXCEPTIONS.values()))
    rows = [
        "| | " + " | ".join(f"`{architecture}`" for architecture in MODELS) + " |",
        "|---|" + "---|" * len(MODELS),
    ]
    for name, (_, gpus) in FEATURES.items():
        cells = []
        for architecture in MODELS:
            if (name, architecture) in EXCEPTIONS:
                note = reasons.index(EXCEPTIONS[name, architecture][1]) + 1
                cells.append(f"no ({note})")
            else:
                # what needs one GPU has been seen to pass on one
                cells.append(("yes", "yes, on a GPU", "not run: needs 2 GPUs")[gpus])
        if set(cells) != {"yes"}:
            rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*rows, "", *(f"{i}. {why}" for i, why in enumerate(reasons, 1))])


class Lab:
    """One architecture's trained models, and fairseq's commands run with them."""

    def __init__(self, architecture, run, run_twice, start, corpus, data, folder, labs):
        self.architecture, self.model = architecture, MODELS[architecture]
        self.run, self.run_twice, self.start = run, run_twice, start
        self.corpus, self.data, self.folder, self.labs = corpus, data, folder, labs
        self.trained = {}

    def words(self, name, *options, device=("--cpu",)):
        """The words of a training command."""
        return ["fairseq-train", self.data, *PLUGIN, *TRAIN, *self.model, *device,
                "--lr", RATES[self.architecture], *options, "--save-dir", self.folder / name]  # fmt: skip

    def train(self, name, *options, **more):
        """Train, once a ``name``; returns the folder and the command's output."""
        if name not in self.trained:
            self.trained[name] = self.folder / name, self.run(*self.words(name, *options, **more))
        return self.trained[name]

    def hydra(self, name, updates, *overrides):
        """Train as the recipe's YAML says, or another model than its own; returns as :meth:`train`."""
        config = OmegaConf.load(RECIPES / "multi30k.yaml")
        own = ("architectures", "generation")
        groups = [name for name, value in config.items() if OmegaConf.is_dict(value) and name not in own]
        config = OmegaConf.masked_copy(config, groups)
        config.model._name = "lrn_tiny"
        if self.architecture != "lrn":
            _, arch, *sizes = self.model
            config.model = {
                flag[2:].replace("-", "_"): int(size) for flag, size in zip(sizes[::2], sizes[1::2])
            }
            config.model.update(_name=arch, share_all_embeddings=True, dropout=0.3)
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        config.common.user_dir, config.checkpoint.save_dir = str(PLUGIN[1]), str(folder)
        config.task.update(data=str(self.data), source_lang="en", target_lang="de")
        OmegaConf.save(config, folder / "multi30k.yaml")
        output = self.run(
            "fairseq-hydra-train", "--config-dir", folder, "--config-name", "multi30k", "common.cpu=true",
            f"hydra.run.dir={folder}", f"optimization.max_update={updates}", *overrides,
        )  # fmt: skip
        return folder, output

    def base(self):
        """The model that other checks start from, and its checkpoints 5, 10, 15 and 20."""
        return self.train("base", "--max-epoch", EPOCHS, "--save-interval", 5, "--validate-interval", 5)

    def checkpoint(self, name="checkpoint_last.pt"):
        return self.base()[0] / name

    def generate(self, *options, path=None, device=("--cpu",)):
        """Translate the test set: {sentence: {S, T, H, D, P, A: lists of the lines' columns}}."""
        path = path or self.checkpoint()
        return parse(
            self.run("fairseq-generate", self.data, *PLUGIN, "--path", path, *device, *SEARCH, *options)
        )

    def interactive(self, lines, *options, path=None):
        """Translate ``lines``; returns as :meth:`generate`."""
        words = [
            "fairseq-interactive",
            self.data,
            *PLUGIN,
            "--path",
            path or self.checkpoint(),
            "--cpu",
            *SEARCH,
        ]
        return parse(self.run(*words, *options, input="".join(line + "\n" for line in lines)))


@pytest.fixture(scope="module")
def labs(run, run_twice, start, corpus, data, tmp_path_factory):
    made = {}
    for architecture in MODELS:
        folder = tmp_path_factory.mktemp(architecture)
        made[architecture] = Lab(architecture, run, run_twice, start, corpus, data, folder, made)
    return made


def parse(output):
    found = defaultdict(lambda: defaultdict(list))
    for kind, sentence, rest in re.findall(r"^([A-Z])-(\d+)\t(.*)$", output, re.M):
        found[int(sentence)][kind].append(rest.split("\t"))
    return dict(found)


def pieces(hypothesis):
    """The words of one of H's entries."""
    return hypothesis[1].split()


def numbers(columns):
    """The figures of one of P's entries."""
    return [float(word) for word in columns[0].split()]


def every_sentence(translations, count=21):
    """Whether there is one line of output, at least, for each of the test set's sentences."""
    return sorted(translations) == list(range(count)) and all(x["H"] for x in translations.values())


def entries(output, tag):
    """What a training's output logs as ``tag``, one dictionary an entry."""
    return [json.loads(entry) for entry in re.findall(rf"\| {tag} \| (\{{.*\}})$", output, re.M)]


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def weights(path):
    return load(path)["model"]


def updates(path):
    return load(path)["optimizer_history"][-1]["num_updates"]


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


EXACT = {"rtol": 0, "atol": 0}


@feature("`fairseq-train`")
def trains(lab):
    _, output = lab.base()
    assert updates(lab.checkpoint()) == EPOCHS * BATCHES
    losses = [float(entry["train_loss"]) for entry in entries(output, "train")]
    assert len(losses) == EPOCHS and losses[-1] < losses[0] - 1
    assert math.isfinite(float(entries(output, "valid")[-1]["valid_loss"]))


@feature("`--log-format json`")
def logs_json(lab):
    _, output = lab.base()
    logged = entries(output, "train_inner")
    assert [int(entry["num_updates"]) for entry in logged] == list(range(1, EPOCHS * BATCHES + 1))
    assert all(float(entry["loss"]) > 0 and float(entry["lr"]) == RATES[lab.architecture] for entry in logged)


@feature(HYDRA)
def hydra(lab):
    """The recipe's YAML trains what the command line does; for others, the YAML with another model."""
    model = [] if lab.architecture == "lrn" else lab.model
    lab.run("fairseq-train", lab.data, *PLUGIN, *trained("multi30k"), *model, "--max-update", 2, "--cpu",
            "--save-dir", lab.folder / "recipe")  # fmt: skip

    folder, _ = lab.hydra("hydra", 2)
    one, other = load(folder / "checkpoint_last.pt"), load(lab.folder / "recipe" / "checkpoint_last.pt")
    assert_same(one["model"], other["model"], **EXACT)
    for group in (
        "common",
        "criterion",
        "optimizer",
        "lr_scheduler",
        "optimization",
        "dataset",
        "checkpoint",
    ):
        assert {**one["cfg"][group], "save_dir": None} == {**other["cfg"][group], "save_dir": None}, group


def one_clipped_update(lab):
    options = "--optimizer sgd --momentum 0 --lr 1 --clip-norm 0.1 --max-update 1".split()
    return lab.train("clipped", *options, "--finetune-from-model", lab.checkpoint())


def moved(one, other):
    """The distance between two models' weights, each matrix counted once."""
    once = {tensor.data_ptr(): name for name, tensor in one.items()}
    return sum((one[name] - other[name]).double().pow(2).sum() for name in once.values()).sqrt()


@feature("`--clip-norm`")
def clips(lab):
    folder, output = one_clipped_update(lab)
    assert float(entries(output, "train_inner")[0]["gnorm"]) > 0.1
    before, after = weights(lab.checkpoint()), weights(folder / "checkpoint_last.pt")
    assert moved(after, before) == pytest.approx(0.1, rel=1e-3)


@feature("`--finetune-from-model`")
def finetunes(lab):
    folder, output = one_clipped_update(lab)
    assert [entry["epoch"] for entry in entries(output, "train_inner")] == [1]
    assert updates(folder / "checkpoint_last.pt") == 1
    assert moved(weights(folder / "checkpoint_last.pt"), weights(lab.checkpoint())) < 0.11


@feature("`--update-freq`")
def groups_batches(lab):
    _, output = lab.train("grouped", "--update-freq", 3, "--max-epoch", 1, "--no-save")
    grouped = [float(entry["wpb"]) for entry in entries(output, "train_inner")]
    single = [float(entry["wpb"]) for entry in entries(lab.base()[1], "train_inner")][:BATCHES]
    assert grouped == [sum(single[i : i + 3]) for i in range(0, BATCHES, 3)]


@feature("`--patience`")
def stops_early(lab):
    """Without learning, validation is never better than the first time."""
    options = ["--lr", 0, "--patience", 2, "--max-epoch", 9, "--train-subset", "valid", "--no-save"]
    _, output = lab.train("patient", *options)
    assert "early stop since valid performance hasn't improved for last 2 runs" in output
    assert len(entries(output, "train")) == 3


@feature("`--reset-optimizer`, `--reset-lr-scheduler`, `--reset-dataloader`, `--reset-meters`")
def resets(lab):
    restore = ["--restore-file", lab.checkpoint(), "--lr", 1e-6]
    resets = [f"--reset-{what}" for what in ("optimizer", "lr-scheduler", "dataloader", "meters")]
    for name, options, epoch, count in (
        ("going-on", [], EPOCHS + 1, EPOCHS * BATCHES + 1),
        ("reset", resets, 1, 1),
    ):
        folder, output = lab.train(name, *restore, *options, "--max-update", count)
        assert [entry["epoch"] for entry in entries(output, "train_inner")] == [epoch]
        state = load(folder / "checkpoint_last.pt")
        assert state["optimizer_history"][-1]["num_updates"] == count
        assert {moments["step"] for moments in state["last_optimizer_state"]["state"].values()} == {count}
        assert ("best" in state["extra_state"]) and state["extra_state"]["train_iterator"]["epoch"] == epoch
        assert_same(state["model"], weights(lab.checkpoint()), rtol=0, atol=1e-5)


@feature("exponential moving average: `--store-ema`, `--ema-decay`")
def averages_exponentially(lab):
    """Also through a restart; fairseq averages a matrix with three names, an embedding, thrice an update."""
    options = ["--store-ema", "--ema-decay", 0.5, "--save-interval-updates", 1]
    folder, _ = lab.train("ema", *options, "--max-update", 2)
    lab.run(*lab.words("ema", *options, "--max-update", 3))
    states = [load(folder / f"checkpoint_1_{update}.pt") for update in (1, 2, 3)]
    averages = [state["extra_state"]["ema"] for state in states]
    times = Counter(tensor.data_ptr() for tensor in averages[0].values())
    for state, last, average in zip(states[1:], averages, averages[1:]):
        for name, now in state["model"].items():
            if "version" in name:  # a constant
                continue
            share = 0.5 ** times[averages[0][name].data_ptr()]
            torch.testing.assert_close(average[name], share * last[name] + (1 - share) * now)
    assert any(not torch.equal(averages[1][name], tensor) for name, tensor in states[1]["model"].items())


@feature("`--eval-bleu`, `--eval-bleu-print-samples`, `--best-checkpoint-metric bleu`")
def validates_with_bleu(lab):
    """Validation's BLEU is that of fairseq-generate's translations."""
    search = {"beam": 3, "max_len_a": 0, "max_len_b": 20}
    options = (
        "--lr 0 --max-update 1 --train-subset test --valid-subset train --eval-bleu "
        "--eval-bleu-print-samples --eval-bleu-detok space --eval-bleu-remove-bpe sentencepiece "
        "--best-checkpoint-metric bleu --maximize-best-checkpoint-metric"
    ).split()
    folder, output = lab.train("bleu", *options, "--eval-bleu-args", json.dumps(search),
                               "--finetune-from-model", lab.checkpoint())  # fmt: skip
    found = lab.generate("--gen-subset", "train", "--remove-bpe", "sentencepiece")
    hypotheses = [lines["H"][0][1].replace("<unk>", "UNKNOWNTOKENINHYP") for lines in found.values()]
    references = [lines["T"][0][0].replace("<<unk>>", "UNKNOWNTOKENINREF") for lines in found.values()]
    bleu = sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert bleu > 0
    validated = [float(entry["train_bleu"]) for entry in entries(output, "train") if "train_bleu" in entry]
    assert validated == pytest.approx([bleu], abs=0.006)
    assert load(folder / "checkpoint_best.pt")["extra_state"]["best"] == pytest.approx(bleu, abs=0.006)
    assert every_sentence(lab.generate(path=folder / "checkpoint_best.pt"))
    samples = re.findall(r"example (?:hypothesis|reference): (.*)$", output, re.M)
    assert samples and set(samples[::2]) < set(hypotheses) and set(samples[1::2]) < set(references)


@feature("`--tensorboard-logdir`")
def logs_to_tensorboard(lab):
    logs = lab.folder / "tensorboard"
    _, output = lab.train("logged", "--max-update", 1, "--no-save", "--tensorboard-logdir", logs)
    assert any(path.stat().st_size > 0 for path in logs.glob("train_inner/events.*")), output


@feature("averaging the last N checkpoints")
def averages_checkpoints(lab):
    average = lab.folder / "average.pt"
    lab.run(RECIPES / "average.py", lab.base()[0], 3, average)
    parts = [weights(lab.checkpoint(f"checkpoint{epoch}.pt")) for epoch in (10, 15, 20)]
    assert_same(weights(average), {name: sum(part[name] for part in parts) / 3 for name in parts[0]})
    assert every_sentence(lab.generate(path=average))


@feature("`fairseq-train --bf16`")
def trains_in_bfloat16(lab):
    lab.train("bf16", "--bf16", "--max-update", 1)


@feature(BFLOAT16)
def trains_in_bfloat16_from_yaml(lab):
    """Also through a restart; checkpoints hold what bfloat16 can express."""
    outputs = [lab.hydra("hydra", 2)[1]]
    for updates in (1, 2):
        folder, output = lab.hydra("bfloat16", updates, "common.bf16=true")
        outputs.append(output)
        state = load(folder / "checkpoint_last.pt")
        assert state["optimizer_history"][-1]["num_updates"] == updates
        assert all(torch.equal(tensor.bfloat16().float(), tensor) for tensor in state["model"].values())
    full, *half = (re.findall(r"\| train \| .*?\| loss ([0-9.]+) \|", output) for output in outputs)
    assert [float(loss) for losses in half for loss in losses] == pytest.approx(
        list(map(float, full)), rel=0.02
    )


@feature("two processes on the CPU (gloo, `--ddp-backend legacy_ddp`)")
def trains_in_two_processes(lab):
    """Also through a restart."""
    options = ["--max-epoch", 1]
    alone, _ = lab.train("alone", *options, "--update-freq", 2)
    for limit in (["--max-update", 2], []):
        lab.run_twice(*lab.words("together", *options, *limit))
    one, other = load(alone / "checkpoint_last.pt"), load(lab.folder / "together" / "checkpoint_last.pt")
    assert_same(other["model"], one["model"], rtol=0, atol=1e-5)
    assert logged_loss(other) == pytest.approx(logged_loss(one), rel=1e-5)


def logged_loss(state):
    """The training loss a checkpoint's meters hold, which the log rounds."""
    meters = {key: meter for _, key, _, meter in state["extra_state"]["metrics"]["train"]}
    return float(meters["loss"]["sum"]) / float(meters["loss"]["count"])


# The checkpoints are larger than this, a command's output is smaller.
ROOM = 100_000
BREAK = f"""
import resource, signal, sys

def limit(event, args):
    if event == "{{event}}" and "{{name}}" in str(args[{{argument}}]):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, ({ROOM}, {ROOM}))
        if {{killed}}:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

sys.addaudithook(limit)
"""
WRITTEN = {"event": "open", "argument": 0}
COPIED = {"event": "shutil.copyfile", "argument": 1}


@feature("killed in the middle of saving, disk full while saving, started again and again")
def loses_nothing(lab):
    """The kernel ends a process, or fails its write, where a checkpoint that it writes passes ROOM bytes.

    Each time training is started again, and in the end it has the weights of an undisturbed run.
    """
    options = ["--dropout", 0.3, "--save-interval-updates", 2, "--max-update", 6]
    undisturbed, _ = lab.train("undisturbed", *options)
    assert (undisturbed / "checkpoint_last.pt").stat().st_size > ROOM
    folder = lab.folder / "disturbed"
    for killed, fault, name in (
        (True, WRITTEN, "checkpoint_1_2.pt"),
        (True, COPIED, "checkpoint_best.pt"),
        (True, COPIED, "checkpoint_last.pt"),
        (False, WRITTEN, "checkpoint_1_4.pt"),
        (False, COPIED, "checkpoint_last.pt"),
    ):
        before = BREAK.format(killed=killed, name=name, **fault)
        process = lab.start(*lab.words("disturbed", *options), before=before)
        process.join()
        output = process.output.read_text(encoding="utf-8")
        assert process.exitcode == (-signal.SIGXFSZ if killed else 1), output[-4000:]
        assert killed or "File too large" in output
    lab.run(*lab.words("disturbed", *options))
    assert_same(weights(folder / "checkpoint_last.pt"), weights(undisturbed / "checkpoint_last.pt"), **EXACT)


@feature("`--criterion adaptive_loss --adaptive-softmax-cutoff`")
def trains_with_adaptive_softmax(lab):
    embeddings = [word for word in lab.words("adaptive") if word != "--share-all-embeddings"]
    words = [word for word in embeddings if word not in ("--label-smoothing", "0.1")]
    folder = lab.folder / "adaptive"
    options = (
        "--criterion adaptive_loss --adaptive-softmax-cutoff 20,40 --ddp-backend legacy_ddp --max-epoch 2"
    )
    lab.run(*words, *options.split(), "--save-dir", folder)
    assert any("adaptive_softmax" in name for name in weights(folder / "checkpoint_last.pt"))
    assert every_sentence(lab.generate(path=folder / "checkpoint_last.pt"))


@feature(LAYERDROP)
def drops_layers(lab):
    """With probability 1 no layer is run, so none learns."""
    options = "--optimizer sgd --momentum 0 --lr 1 --max-update 1 --encoder-layerdrop 1 --decoder-layerdrop 1"
    folder, _ = lab.train("dropped", *options.split(), "--finetune-from-model", lab.checkpoint())
    before, after = weights(lab.checkpoint()), weights(folder / "checkpoint_last.pt")
    for name, tensor in after.items():
        learns = "layers" not in name and "version" not in name and not name.startswith("encoder.layer_norm")
        assert torch.equal(tensor, before[name]) != learns, name
    assert every_sentence(lab.generate(path=folder / "checkpoint_last.pt"))


@feature(LAYERS_TO_KEEP)
def keeps_layers(lab):
    """With one layer a side it is the smaller model."""
    state, smaller = load(lab.checkpoint()), lab.folder / "smaller.pt"
    assert "encoder.layers.1.final_layer_norm.weight" in state["model"], "has no such layers"
    state["model"] = {
        name.replace("encoder.layers.1.", "encoder.layers.0."): tensor
        for name, tensor in state["model"].items()
        if not name.startswith(("encoder.layers.0.", "decoder.layers.1."))
    }
    model = state["cfg"]["model"]
    (vars(model) if isinstance(model, Namespace) else model).update(encoder_layers=1, decoder_layers=1)
    torch.save(state, smaller)
    kept = {"encoder_layers_to_keep": "1", "decoder_layers_to_keep": "0"}
    found = lab.generate("--model-overrides", str(kept))
    assert found == lab.generate(path=smaller) != lab.generate()


@feature(CHECKPOINTING)
def checkpoints_activations(lab):
    """The weights are those of training without."""
    options = "--optimizer sgd --momentum 0 --lr 1 --max-update 2".split()
    plain, _ = lab.train("plain", *options)
    for name in ("checkpoint", "offload"):
        folder, _ = lab.train(name, *options, f"--{name}-activations")
        assert_same(weights(folder / "checkpoint_last.pt"), weights(plain / "checkpoint_last.pt"))


@feature(NOISE)
def trains_with_quantization_noise(lab):
    folder, output = lab.train("noisy", "--max-update", 1, "--lr", 0, "--quant-noise-pq", 0.5,
                               "--quant-noise-pq-block-size", 4)  # fmt: skip
    noisy, plain = (entries(log, "train_inner")[0]["loss"] for log in (output, lab.base()[1]))
    assert float(noisy) == pytest.approx(float(plain), rel=0.5) and noisy != plain
    assert every_sentence(lab.generate(path=folder / "checkpoint_last.pt"))


@feature("`--fp16`, in training and translating", gpus=1)
def trains_in_float16(lab):
    trains_on_a_gpu(lab, "--fp16")


@feature("`--amp`", gpus=1)
def trains_with_amp(lab):
    trains_on_a_gpu(lab, "--amp")


def trains_on_a_gpu(lab, precision):
    _, full = lab.base()
    folder, output = lab.train(precision[2:], precision, "--max-epoch", 2, device=())
    losses = [[float(entry["train_loss"]) for entry in entries(log, "train")][:2] for log in (output, full)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert every_sentence(lab.generate("--fp16", path=folder / "checkpoint_last.pt", device=()))


@feature("`torchrun` with NCCL, `--ddp-backend` `c10d`, `legacy_ddp` and `no_c10d`", gpus=2)
def trains_with_torchrun(lab):
    options = ["--max-epoch", 1]
    alone, _ = lab.train("one-gpu", *options, "--update-freq", 2, device=())
    for backend in ("c10d", "legacy_ddp", "no_c10d"):
        words = lab.words(backend, *options, "--ddp-backend", backend, device=())
        script = Path(sys.executable).parent / words[0]
        lab.run("torchrun", "--nproc_per_node=2", script, *words[1:])
        assert_same(
            weights(lab.folder / backend / "checkpoint_last.pt"),
            weights(alone / "checkpoint_last.pt"),
            rtol=0,
            atol=1e-4,
        )


@feature("`torchrun` with `--ddp-backend fully_sharded`, `--min-params-to-wrap`", gpus=2)
def trains_fully_sharded(lab):
    pytest.importorskip("fairscale")
    options = ["--max-epoch", 1]
    alone, _ = lab.train("one-gpu", *options, "--update-freq", 2, device=())
    options += ["--ddp-backend", "fully_sharded"]
    if lab.architecture != "lstm":
        options += ["--min-params-to-wrap", 1]
    words = lab.words("sharded", *options, device=())
    lab.run("torchrun", "--nproc_per_node=2", Path(sys.executable).parent / words[0], *words[1:])
    one, other = (weights(folder / "checkpoint_last.pt") for folder in (alone, lab.folder / "sharded"))
    assert_same(other, one, rtol=0, atol=1e-4)


@feature("`fairseq-generate`, beam search")
def translates(lab):
    found = lab.generate("--beam", 5, "--nbest", 5)
    assert every_sentence(found)
    for lines in found.values():
        assert len({tuple(pieces(hypothesis)) for hypothesis in lines["H"]}) == 5


@feature("`--nbest`")
def gives_the_best(lab):
    for lines in lab.generate("--nbest", 3).values():
        scores = [float(hypothesis[0]) for hypothesis in lines["H"]]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True)


@feature("`--lenpen`")
def penalizes_length(lab):
    for lenpen in (0, 2):
        for lines in lab.generate("--lenpen", lenpen).values():
            scores = numbers(lines["P"][0])
            assert float(lines["H"][0][0]) == pytest.approx(sum(scores) / len(scores) ** lenpen, abs=2e-3)


@feature("`--sampling`, `--sampling-topk`, `--sampling-topp`")
def samples(lab):
    """From the one likeliest word, sampling is greedy search; from all, the seed decides."""

    def hypotheses(*options):
        found = lab.generate("--beam", 1, *options)
        assert every_sentence(found)
        return {i: pieces(lines["H"][0]) for i, lines in found.items()}

    greedy = hypotheses()
    assert hypotheses("--sampling", "--sampling-topk", 1) == greedy
    assert hypotheses("--sampling", "--sampling-topp", 1e-6) == greedy
    one, other = (hypotheses("--sampling", "--sampling-topk", 9, "--seed", seed) for seed in (1, 2))
    assert one != other
    assert one == hypotheses("--sampling", "--sampling-topk", 9, "--seed", 1)
    assert hypotheses("--sampling", "--sampling-topp", 0.9) != greedy


@feature(DIVERSE)
def diversifies(lab):
    """A strong penalty makes each group start with another word."""
    options = ["--diverse-beam-groups", 3, "--diverse-beam-strength", 99, "--nbest", 3]
    for lines in lab.generate(*options).values():
        assert len({[*pieces(hypothesis), "</s>"][0] for hypothesis in lines["H"]}) == 3


@feature("`--prefix-size`")
def keeps_a_prefix(lab):
    for lines in lab.generate("--prefix-size", 2).values():
        target = lines["T"][0][0].replace("<<unk>>", "<unk>").split()
        assert pieces(lines["H"][0])[:2] == target[:2]


@feature("`--score-reference`")
def scores_references(lab):
    for lines in lab.generate("--score-reference").values():
        target = lines["T"][0][0].replace("<<unk>>", "<unk>").split()
        scores = numbers(lines["P"][0])
        assert pieces(lines["H"][0]) == target and len(scores) == len(target) + 1
        assert float(lines["H"][0][0]) == pytest.approx(sum(scores) / len(scores), abs=1e-3)


@feature(ALIGNMENT)
def aligns(lab):
    hard, soft = (lab.generate("--print-alignment", kind) for kind in ("hard", "soft"))
    for i in hard:
        source, target = hard[i]["S"][0][0].split(), pieces(hard[i]["H"][0])
        points = [tuple(map(int, point.split("-"))) for point in hard[i]["A"][0][0].split()]
        rows = [[float(weight) for weight in row.split(",")] for row in soft[i]["A"][0][0].split()]
        assert [at for _, at in points] == list(range(len(target)))
        assert len(rows) >= len(target)
        for row, (at, _) in zip(rows, points):
            assert sum(row) == pytest.approx(1, abs=1e-3)
            assert 0 <= at < len(source) and row[at] == max(row[: len(source)])


@feature("`--print-step`")
def prints_steps(lab):
    lab.generate("--print-step")


@feature("`--replace-unk` on a translation that holds `<unk>`")
def replaces_unknown_words(lab):
    words = lab.folder / "words"
    words.write_text("one eins\n")
    found = lab.interactive(["☃ ▁and"], "--replace-unk", words, "--unkpen", -100)
    assert "<unk>" not in found[0]["H"][0][1]


@feature(ENSEMBLES)
def ensembles(lab):
    """A word's probability in an ensemble is the mean of its models'."""
    others = [labs.checkpoint() for name, labs in lab.labs.items() if name != lab.architecture]
    paths = [lab.checkpoint(), lab.checkpoint("checkpoint10.pt"), *others]
    alone = [lab.generate("--score-reference", path=path) for path in paths]
    for count in (2, 3, 4):
        path = os.pathsep.join(map(str, paths[:count]))
        for i, lines in lab.generate("--score-reference", path=path).items():
            parts = [numbers(one[i]["P"][0]) for one in alone[:count]]
            means = [math.log2(sum(2**score for score in word) / count) for word in zip(*parts)]
            assert numbers(lines["P"][0]) == pytest.approx(means, abs=2e-3)
    assert every_sentence(lab.generate(path=path))


@feature("`fairseq-interactive`, `--buffer-size`")
def reads_lines(lab):
    """Each line is answered in its turn, with what fairseq-generate says."""
    lines = (lab.corpus / "test.en").read_text(encoding="utf-8").splitlines()
    whole = lab.generate()
    for options in ([], ["--buffer-size", 8, "--batch-size", 3]):
        found = lab.interactive(lines, *options)
        assert list(found) == list(range(len(lines)))
        assert [pieces(found[i]["H"][0]) for i in found] == [pieces(whole[i]["H"][0]) for i in found]


@feature("lexical `--constraints`, ordered and unordered")
def obeys_constraints(lab):
    """Input lines hold constraints after tabs."""
    constraints = [["▁Jun", "▁198 4"], ["▁198 4", "▁Jun"], []]
    lines = ["\t".join(["▁Sep ▁18 , ▁198 4", *wanted]) for wanted in constraints]
    for kind in ("ordered", "unordered"):
        found = lab.interactive(lines, "--constraints", kind, "--beam", 6)
        for i, wanted in enumerate(constraints):
            text = f" {found[i]['H'][0][1]} "
            places = [text.find(f" {words} ") for words in wanted]
            assert min(places, default=0) >= 0, text
            assert kind == "unordered" or places == sorted(places)
            assert [columns[0] for columns in found[i]["C"]] == wanted


@feature("`--bpe sentencepiece`; empty lines, unknown characters, emoji, right-to-left text")
def takes_any_text(lab):
    model = lab.corpus / "spm.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    known = set((lab.data / "dict.en.txt").read_text(encoding="utf-8").split()[::2])
    lines = ["Jun 21, 2027", "", " ", "漢字 ꙮ", "😀 👩‍👩‍👧 12", "שלום 12", "مرحبا", "a\tb"]
    lines += ["x\x0b\x85\u2028y", "", "5 %"]
    options = ["--bpe", "sentencepiece", "--sentencepiece-model", model]
    found = lab.interactive(lines, *options, "--buffer-size", 5, "--batch-size", 5)
    assert list(found) == list(range(len(lines)))
    for line, answer in zip(lines, found.values()):
        expected = " ".join(processor.encode(line.strip(), out_type=str)).split()
        assert answer["S"][0][0].split() == [piece if piece in known else "<unk>" for piece in expected]
        assert len(answer["H"]) == len(answer["D"]) == 1
        assert answer["D"][0][1] == answer["H"][0][1].replace(" ", "").replace("▁", " ").strip()


@feature("a line of 5,000 tokens, with `--max-source-positions`")
def takes_long_lines(lab):
    lines = ["▁1 2 " * 2500, "▁3"]
    limits = ["--max-source-positions", 5001]
    folder, _ = lab.train("long", *limits, "--restore-file", lab.checkpoint(), "--reset-dataloader",
                          "--max-update", EPOCHS * BATCHES + 1)  # fmt: skip
    found = lab.interactive(lines, *limits, path=folder / "checkpoint_last.pt")
    assert list(found) == [0, 1]
    assert [len(found[i]["S"][0][0].split()) for i in found] == [5000, 1]


@pytest.mark.parametrize("name", FEATURES, ids=[check.__name__ for check, _ in FEATURES.values()])
@pytest.mark.parametrize("architecture", MODELS)
def test_feature(request, labs, architecture, name):
    check, gpus = FEATURES[name]
    if architecture != "lrn" and not request.config.getoption("--all"):
        pytest.skip("fairseq's own models, with --all")
    if OLD and (architecture != "lrn" or name in (DIVERSE, ENSEMBLES)):
        pytest.skip("fairseq 0.12.2 differs: with PyTorch 2 its own transformer cannot translate")
    if gpus > torch.cuda.device_count():
        pytest.skip(f"needs {gpus} GPUs")
    if (name, architecture) in EXCEPTIONS:
        with pytest.raises(AssertionError, match=re.escape(EXCEPTIONS[name, architecture][0])):
            check(labs[architecture])
    else:
        check(labs[architecture])


def test_lrn_does_what_the_transformer_does():
    assert {name for name, architecture in EXCEPTIONS if architecture == "lrn"} <= {
        name for name, architecture in EXCEPTIONS if architecture == "transformer"
    }


@pytest.mark.skipif(OLD, reason="fairseq 0.12.2 has fewer options")
def test_lrn_has_the_transformers_options_but_for_these(data):
    def names(architecture):
        parser = fairseq_options.get_training_parser()
        fairseq_options.parse_args_and_arch(parser, [str(data), "--arch", architecture])
        return set(re.findall(r"^  (--[a-z0-9-]+)", parser.format_help(), re.M))

    assert names("transformer") - names("lrn") == set(" ".join(MISSING.values()).split())


def test_readme_shows_the_table():
    assert table() in (RECIPES / "README.md").read_text(encoding="utf-8"), table()

"""fairseq's commands with its task and criterion sentence_prediction: single sentences and pairs."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from fairseq_lrn.models import LRNClassifierModel, LRNInferenceModel
from fairseq_lrn.modules import CELLS

PLUGIN = ["--user-dir", Path(__file__).resolve().parents[2] / "fairseq_lrn", "--task", "sentence_prediction"]
HEAD = "sentence_classification_head"
MODELS = {"lrn_classifier": LRNClassifierModel, "lrn_inference": LRNInferenceModel}
TRAIN = (
    "--num-classes 3 --criterion sentence_prediction --optimizer adam --lr 0.02 --batch-size 10 --cpu "
    "--required-batch-size-multiple 1 --num-workers 0 --encoder-embed-dim 6 --encoder-hidden-size 5 "
    "--best-checkpoint-metric accuracy --maximize-best-checkpoint-metric --no-epoch-checkpoints"
).split()
SIZES = {"train": 60, "valid": 13, "test": 21}  # 8 divides no count of results


def examples():
    """Label, first and second sentence: they are the same, have a word in common, or none; some are empty."""
    sentences = ["", "a", "b", "c", "d", "a b", "b c", "c d", "d a b", "a c b d"]
    found = []
    for first, second in itertools.product(sentences, repeat=2):
        common = set(first.split()) & set(second.split())
        found.append(("same" if first == second else "near" if common else "far", first, second))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(1)).tolist()
    return [found[i] for i in order]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Examples of each split, written as one file for labels and each side."""
    folder = tmp_path_factory.mktemp("text")
    text, left = {}, examples()
    for split, size in SIZES.items():
        text[split], left = left[:size], left[size:]
        for name, lines in zip(("label", "input0", "input1"), zip(*text[split])):
            (folder / f"{split}.{name}").write_text("".join(line + "\n" for line in lines))
    text["folder"] = folder
    return text


@pytest.fixture(scope="module")
def bins(run, text, tmp_path_factory):
    """The data for each model: a folder for the classifier has no second sentences."""
    folder = tmp_path_factory.mktemp("bin")
    raw = text["folder"]
    (raw / "words").write_text((raw / "train.input0").read_text() + (raw / "train.input1").read_text())
    preprocess = ["fairseq-preprocess", "--only-source"]
    run(*preprocess, "--dict-only", "--trainpref", raw / "words", "--destdir", folder)
    for model, names in (("lrn_classifier", 1), ("lrn_inference", 2)):
        for name in ["label", "input0", "input1"][: 1 + names]:
            words = [] if name == "label" else ["--srcdict", folder / "dict.txt"]
            prefixes = [f"--{split}pref={raw / split}.{name}" for split in SIZES]
            run(*preprocess, *words, *prefixes, "--destdir", folder / model / name)
    return {model: folder / model for model in MODELS}


@pytest.fixture(scope="module", params=MODELS)
def trained(request, run, bins, tmp_path_factory):
    """A model's name, the folder of its checkpoints and what training said."""
    folder = tmp_path_factory.mktemp(request.param)
    command = ["fairseq-train", bins[request.param], *PLUGIN, "--arch", request.param, *TRAIN]
    return request.param, folder, run(*command, "--max-epoch", 8, "--save-dir", folder)


@pytest.fixture(scope="module")
def two_labels(run, text, bins, tmp_path_factory):
    """The same sentences with two labels instead of three."""
    raw, folder = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("bin2")
    for split in SIZES:
        labels = (text["folder"] / f"{split}.label").read_text()
        (raw / split).write_text(labels.replace("near", "far"))
    prefixes = [f"--{split}pref={raw / split}" for split in SIZES]
    run("fairseq-preprocess", "--only-source", *prefixes, "--destdir", folder / "label")
    for model in MODELS:
        (folder / model).mkdir()
        (folder / model / "label").symlink_to(folder / "label")
        for data in bins[model].glob("input?"):
            (folder / model / data.name).symlink_to(data)
    return {model: folder / model for model in MODELS}


def accuracies(out, split):
    return [float(x) for x in re.findall(rf"\b{split}\b.*\| accuracy ([0-9.]+)", out)]


def predict(hub, *pair):
    """The label of a sentence or a pair, as the examples' README files show it."""
    words, labels = hub.task.source_dictionary, hub.task.label_dictionary
    tokens = torch.cat([words.encode_line(line, add_if_not_exist=False) for line in pair]).long()
    scores, _ = hub.models[0](tokens[None], classification_head_name=HEAD)
    return labels[labels.nspecial + scores.argmax()]


def test_accuracy_counts_every_sentence_once(run, bins, text, trained):
    """It is that of single predictions, however they are batched, and the checkpoint is the best one."""
    model, folder, log = trained
    data = str(bins[model])
    hub = MODELS[model].from_pretrained(folder, "checkpoint_best.pt", data_name_or_path=data).eval()
    command = ["fairseq-validate", data, *PLUGIN, "--criterion", "sentence_prediction", "--cpu",
               "--path", folder / "checkpoint_best.pt", "--required-batch-size-multiple", 1]  # fmt: skip
    for split in ("valid", "test"):
        predictions = [predict(hub, *pair[: 1 + (model == "lrn_inference")]) for _, *pair in text[split]]
        correct = sum(found == label for found, (label, *_) in zip(predictions, text[split]))
        assert len(set(predictions)) > 1
        for batch_size in (1, 8, 64):
            out = run(*command, "--valid-subset", split, "--batch-size", batch_size, "--log-format", "simple")
            assert accuracies(out, split) == [pytest.approx(100 * correct / SIZES[split], abs=0.051)]
        if split == "valid":
            assert accuracies(out, split) == [max(accuracies(log, split))]


@pytest.mark.parametrize("cell", CELLS[1:])
@pytest.mark.parametrize("model", MODELS)
def test_every_other_unit_trains_and_is_evaluated(run, bins, tmp_path, model, cell):
    command = ["fairseq-train", bins[model], *PLUGIN, "--arch", model, *TRAIN, "--cell", cell]
    out = run(*command, "--max-epoch", 1, "--no-save", "--save-dir", tmp_path)
    assert len(accuracies(out, "valid")) == 1


def test_training_from_a_file(run, bins, tmp_path):
    out = run(
        "fairseq-hydra-train",
        "task=sentence_prediction",
        "criterion=sentence_prediction",
        "+model._name=lrn_inference",
        "optimizer=adam",
        f"hydra.run.dir={tmp_path}",
        f"common.user_dir={PLUGIN[1]}",
        f"task.data={bins['lrn_inference']}",
        "task.num_classes=3",
        "+model.encoder_hidden_size=5",
        "+model.comparison_layers=1",
        "optimization.lr=[0.01]",
        "optimization.max_epoch=1",
        "common.cpu=true",
        "dataset.batch_size=10",
        "dataset.required_batch_size_multiple=1",
        f"checkpoint.save_dir={tmp_path}",
    )
    assert "@ 6 updates" in out
    assert (tmp_path / "checkpoint_best.pt").is_file()


RESET = "--reset-optimizer --reset-lr-scheduler --reset-dataloader --reset-meters".split()


@pytest.mark.parametrize(
    "how, classes, name",
    [("--finetune-from-model", 2, HEAD), ("--restore-file", 3, "other")],
    ids=["other labels", "other name"],
)
def test_fine_tuning_begins_with_a_new_head(run, bins, two_labels, trained, tmp_path, how, classes, name):
    """All other weights are the checkpoint's."""
    model, folder, _ = trained
    data = (two_labels if classes == 2 else bins)[model]
    options = ["--num-classes", classes, "--classification-head-name", name, "--lr", 0, "--max-update", 1]
    options += [how, folder / "checkpoint_last.pt", *(RESET if how == "--restore-file" else [])]
    out = run("fairseq-train", data, *PLUGIN, "--arch", model, *TRAIN, *options, "--save-dir", tmp_path)
    why = "with different dimensions than" if classes == 2 else "not present in"
    assert f"deleting classification head ({HEAD}) from checkpoint, {why} current model" in out
    assert f"classification head ({name}) is not in the checkpoint: it begins with new weights" in out
    old, new = (
        torch.load(path / "checkpoint_last.pt", weights_only=True)["model"] for path in (folder, tmp_path)
    )
    heads = {key for key in new if key.startswith("classification_heads.")}
    assert {key.split(".")[1] for key in heads} == {name}
    assert old.keys() - new.keys() == (set() if name == HEAD else {key.replace(name, HEAD) for key in heads})
    assert new[f"classification_heads.{name}.out_proj.weight"].size(0) == classes
    for key in new:
        if key not in heads:
            assert torch.equal(new[key], old[key]), key
        elif key.endswith("dense.weight"):
            assert not torch.equal(new[key], old[key.replace(name, HEAD)])


def test_only_fine_tuning_begins_with_a_new_head(run, two_labels, trained, tmp_path):
    """Resuming would go on with the optimizer's state of the old head, evaluating would guess."""
    model, folder, _ = trained
    command = ["fairseq-train", two_labels[model], *PLUGIN, "--arch", model, *TRAIN, "--num-classes", 2]
    command += ["--restore-file", folder / "checkpoint_last.pt", "--max-epoch", 99, "--save-dir", tmp_path]
    last = run(*command, check=False).splitlines()[-1]
    assert f"classification head ({HEAD}) is not in the checkpoint that training resumes from" in last
    command = ["fairseq-validate", two_labels[model], *PLUGIN, "--criterion", "sentence_prediction", "--cpu"]
    command += ["--classification-head-name", "other", "--path", folder / "checkpoint_last.pt"]
    last = run(*command, "--batch-size", 8, check=False).splitlines()[-1]
    assert "classification head (other) is not in the checkpoint, or has other dimensions" in last


@pytest.mark.parametrize(
    "model, data, options, message",
    [
        ("lrn_classifier", "lrn_classifier", ["--char-embed-dim", 4], "--char-embed-dim is 4, but must be 0"),
        ("lrn_inference", "lrn_classifier", [], "one sentence, but must be two"),
    ],
    ids=["characters", "one sentence"],
)
def test_errors_reach_the_command_line(run, bins, tmp_path, model, data, options, message):
    command = ["fairseq-train", bins[data], *PLUGIN, "--arch", model, *TRAIN, *options]
    out = run(*command, "--max-epoch", 1, "--save-dir", tmp_path, check=False)
    assert message in out.splitlines()[-1]

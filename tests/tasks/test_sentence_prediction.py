"""What fairseq's task sentence_prediction says of wrong labels, with this package loaded."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from fairseq.tasks.sentence_prediction import SentencePredictionConfig, SentencePredictionTask

from fairseq_lrn.models import LRNClassifierModel, LRNInferenceModel
from fairseq_lrn.models.lrn_inference import LRNInferenceConfig
from fairseq_lrn.models.word_encoder import WordEncoderConfig

PLUGIN = ["--user-dir", Path(__file__).resolve().parents[2] / "fairseq_lrn", "--task", "sentence_prediction"]


def write(folder, **texts):
    """Files of text, as fairseq-preprocess --dataset-impl raw writes them, with their dictionaries."""
    for name, words in (("input0", "a b"), ("input1", "a b"), ("label", "bad good")):
        (folder / name).mkdir(exist_ok=True)
        lines = [f"{word} 1\n" for word in words.split()] + ["madeupword0000 0\n"]
        (folder / name / "dict.txt").write_text("".join(lines))
    for name, text in texts.items():
        (folder / name / "valid").write_text(text)


def load(folder, load_dataset=SentencePredictionTask.load_dataset, **options):
    options = {"num_classes": 2, "regression_target": False, "seed": 1, **options}
    task = SentencePredictionTask.setup_task(SentencePredictionConfig(data=str(folder), **options))
    return load_dataset(task, "valid")


@pytest.mark.parametrize(
    "labels, message",
    [
        ("good\nugly\n", "label/valid, line 2, has a label that is not in .*: the training set has bad"),
        ("good\n\n", "label/valid, line 2, has 0 labels, but must have 1"),
        ("good\ngood bad\n", "label/valid, line 2, has 2 labels, but must have 1"),
        ("good\n", "input0/valid has 2 lines, .*label/valid has 1"),
        ("", "input0/valid has 2 lines, .*label/valid has 0"),
    ],
)
def test_a_wrong_label_is_named_with_its_line(tmp_path, labels, message):
    write(tmp_path, input0="a\nb\n", label=labels)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    if labels.count("\n") == 2:  # of these fairseq itself says nothing
        load(tmp_path, SentencePredictionTask.load_dataset.__wrapped__)


def test_inputs_of_unequal_length_are_named(tmp_path):
    write(tmp_path, input0="a\nb\n", input1="a\nb\na\n")
    with pytest.raises(ValueError, match=r"input0/valid has 2 lines, .*input1/valid has 3"):
        load(tmp_path)


def test_right_labels_are_as_fairseq_has_them(tmp_path, caplog):
    """An input may be empty."""
    write(tmp_path, input0="a\n\n", label="good\nbad\n")
    found = load(tmp_path, no_shuffle=True)
    assert [found[i]["target"].tolist() for i in range(2)] == [[1], [0]]
    assert "--num-classes" not in caplog.text
    load(tmp_path, num_classes=3)
    assert "--num-classes is 3, but there are only the labels bad, good" in caplog.text
    with pytest.raises(ValueError, match=r"line 1, has the label good, number 2 .* but --num-classes is 1"):
        load(tmp_path, num_classes=1)


@pytest.mark.parametrize("wrong", ["high", "nan", "inf", "", "1 2"])
def test_numbers_for_regression(tmp_path, wrong):
    write(tmp_path, input0="a\nb\n")
    (tmp_path / "label/valid.label").write_text("0.5\n-2\n")
    found = load(tmp_path, num_classes=1, regression_target=True, no_shuffle=True)
    assert [found[i]["target"] for i in range(2)] == [[0.5], [-2.0]]
    (tmp_path / "label/valid.label").write_text(f"0.5\n{wrong}\n")
    with pytest.raises(ValueError, match=f"valid.label, line 2, is '{wrong}', but must be . finite"):
        load(tmp_path, num_classes=1, regression_target=True)


@pytest.mark.parametrize("name", ["init_token", "separator_token"])
def test_tokens_must_be_in_the_dictionary(tmp_path, name):
    write(tmp_path, input0="a\n", label="good\n")
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"{option} is 99, but must be an index in the dictionary, below 8"):
        load(tmp_path, **{name: 99})


@pytest.mark.parametrize(
    "model, options, message",
    [
        (LRNClassifierModel, {"add_prev_output_tokens": True}, "--add-prev-output-tokens is given"),
        (LRNInferenceModel, {"d2v2_multi": True}, "--d2v2-multi is given, but must not be"),
        (LRNInferenceModel, {"init_token": 2}, "--init-token is </s>, which ends the first sentence"),
        (LRNInferenceModel, {"shorten_method": "random_crop"}, "--shorten-method is random_crop"),
    ],
)
def test_options_that_the_models_cannot_follow(model, options, message):
    task = SimpleNamespace(source_dictionary=None, cfg=SimpleNamespace(**options))
    config = WordEncoderConfig() if model is LRNClassifierModel else LRNInferenceConfig()
    with pytest.raises(ValueError, match=message):
        model.build_model(config, task)


def test_through_fairseq_train(run, tmp_path):
    """Before training: no update was made."""
    write(tmp_path, input0="a\nb\n", label="good\nbad\n")
    for name in ("input0", "label"):
        (tmp_path / name / "train").write_text((tmp_path / name / "valid").read_text())
    (tmp_path / "label" / "valid").write_text("good\nugly\n")
    command = ["fairseq-train", tmp_path, *PLUGIN, "--arch", "lrn_classifier", "--num-classes", 2, "--cpu"]
    command += ["--criterion", "sentence_prediction", "--optimizer", "adam", "--batch-size", 2,
                "--required-batch-size-multiple", 1, "--num-workers", 0]  # fmt: skip
    out = run(*command, "--save-dir", tmp_path / "model", check=False)
    assert "label/valid, line 2, has a label that" in out.splitlines()[-1]
    assert not list((tmp_path / "model").glob("*.pt"))
    (tmp_path / "label" / "train").unlink()
    out = run(*command, "--disable-validation", "--save-dir", tmp_path / "model", check=False)
    assert "the data has no labels: its folder label lacks the split that is read" in out.splitlines()[-1]

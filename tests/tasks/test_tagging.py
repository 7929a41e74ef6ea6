"""The task tagging through fairseq's own commands, on made sentences about people, places and companies."""

import random
import re
import sys
from pathlib import Path

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.logging import metrics
from seqeval.metrics import f1_score

from fairseq_lrn.modules import CELLS
from fairseq_lrn.tasks.tagging import TaggingConfig, TaggingTask
from fairseq_lrn.tasks.words import encode_chars

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ["--user-dir", ROOT / "fairseq_lrn", "--task", "tagging"]
# 8, fairseq's default --required-batch-size-multiple, divides no set
SIZES = {"train": 150, "valid": 21, "test": 23}
FIXED = "--cpu --num-workers 0 --required-batch-size-multiple 1".split()
TRAIN = [
    *"--arch lrn_tagger --criterion model --optimizer adam --lr 0.01 --seed 1 --batch-size 16".split(),
    *"--encoder-embed-dim 12 --encoder-hidden-size 12 --char-embed-dim 6 --dropout 0.1".split(),
    *"--best-checkpoint-metric f1 --maximize-best-checkpoint-metric --no-epoch-checkpoints".split(),
    *"--log-format simple --log-interval 1".split(),
]


def sentence(choose):
    """Words and tags; names are new in almost every sentence."""

    def name(kind, words):
        capital = [
            "".join([choose.choice("ABCÄÉ"), *choose.choices("aeiouñlmnrst", k=4)]) for _ in range(words)
        ]
        return capital, ["S"] if words == 1 else ["B", *"I" * (words - 2), "E"], kind

    parts = [name("PER", choose.randint(1, 3)), (["visits"], "O", ""), name("LOC", choose.randint(1, 2))]
    if choose.random() < 0.5:
        company, tags, kind = name("ORG", choose.randint(1, 2))
        parts += [(["for"], "O", ""), ([*company, "Ltd"], ["B", *"I" * (len(tags) - 1), "E"], kind)]
    if choose.random() < 0.5:
        parts += [(["."], "O", "")]
    words = [word for part in parts for word in part[0]]
    tags = [f"{tag}-{kind}" if kind else tag for _, prefixes, kind in parts for tag in prefixes]
    return words, tags


@pytest.fixture(scope="module")
def text():
    choose = random.Random(1)
    return {split: [sentence(choose) for _ in range(size)] for split, size in SIZES.items()}


@pytest.fixture(scope="module")
def data(run, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tagging")
    for split, sentences in text.items():
        for name, lines in zip(("words", "tags"), zip(*sentences)):
            (folder / f"{split}.{name}").write_text("".join(f"{' '.join(line)}\n" for line in lines))
    prefixes = [f"--{split}pref={folder / split}" for split in SIZES]
    run("fairseq-preprocess", "-s", "words", "-t", "tags", "--dataset-impl", "raw", "--thresholdsrc", 2,
        "--padding-factor", 1, *prefixes, "--destdir", folder / "bin")  # fmt: skip
    return folder / "bin"


@pytest.fixture(scope="module")
def trained(run, data, tmp_path_factory):
    """A folder with a model after a few epochs, and what training printed."""
    folder = tmp_path_factory.mktemp("trained")
    out = run("fairseq-train", data, *PLUGIN, *FIXED, *TRAIN, "--max-epoch", 4, "--save-dir", folder)
    return folder, out


def tags_of(out):
    """What fairseq-generate or fairseq-interactive printed: {sentence: tags} and {sentence: score}."""
    found = re.findall(r"^D-(\d+)\t(\S+)\t(.*)$", out, re.M)
    return {int(i): x.split() for i, _, x in found}, {int(i): float(x) for i, x, _ in found}


def generate(run, data, checkpoint, *options):
    return run("fairseq-generate", data, *PLUGIN, *FIXED, "--path", checkpoint, *options)


@pytest.fixture(scope="module")
def generated(run, data, trained):
    """What fairseq-generate printed for the test set, all sentences in one batch."""
    return generate(run, data, trained[0] / "checkpoint_last.pt")


def interactive(run, data, trained, lines):
    command = ["fairseq-interactive", data, *PLUGIN, "--path", trained[0] / "checkpoint_last.pt", "--cpu"]
    return run(*command, "--buffer-size", 5, "--batch-size", 5, input="".join(f"{line}\n" for line in lines))


def make_task(data, max_word_length=20):
    return TaggingTask.setup_task(TaggingConfig(data=str(data), max_word_length=max_word_length))


def test_batches_hold_every_word_and_tag_once(data, text):
    task = make_task(data, 6)
    task.load_dataset("test")
    batches = task.get_batch_iterator(task.dataset("test"), max_tokens=20).next_epoch_itr(shuffle=False)
    words, tags = task.source_dictionary, task.target_dictionary
    seen = []
    for batch in batches:
        net_input = batch["net_input"]
        assert net_input["src_chars"].shape == (*net_input["src_tokens"].shape, 6)
        for row, i in enumerate(batch["id"].tolist()):
            expected_words, expected_tags = text["test"][i]
            n = len(expected_words)
            ids = net_input["src_tokens"][row]
            known = [word if word in words else "<unk>" for word in expected_words]
            assert [words[j] for j in ids[:n].tolist()] == known
            assert ids[n:].eq(words.pad()).all()
            assert torch.equal(net_input["src_chars"][row, :n], encode_chars(expected_words, 6))
            assert not net_input["src_chars"][row, n:].any()
            assert [tags[j] for j in batch["target"][row, :n].tolist()] == expected_tags
            assert batch["target"][row, n:].eq(tags.pad()).all()
            assert int(net_input["src_lengths"][row]) == n
            seen.append(i)
        longest = net_input["src_lengths"].max()
        assert longest * len(net_input["src_lengths"]) <= 20
    assert sorted(seen) == list(range(SIZES["test"]))


@pytest.mark.parametrize(
    "words, tags, message",
    [
        ("a b\nc d\n", "O O\nO\n", r"words, line 2, has 2 words, but .*\.tags has 1 tags"),
        ("a b\n", "O O\nO\n", r"words, line 2, has 0 words, but .*\.tags has 1 tags"),
        ("a b\n\nc\n", "O O\n\nO\n", r"words, line 2, has no words"),
        ("a b\n", "O S-ANIMAL\n", r"tags, line 1, has the tag S-ANIMAL, which is not in dict.tags.txt"),
        (b"a\xe4 b\n", "O O\n", r"words, line 1, is not in UTF-8: invalid continuation byte"),
        ("a b\n", "O </s>\n", r"tags, line 1, has the tag </s>, which is not in dict.tags.txt"),
    ],
)
def test_bad_data_is_named_with_its_line(tmp_path, words, tags, message):
    words = words if isinstance(words, bytes) else words.encode()
    (tmp_path / "train.words-tags.words").write_bytes(words)
    (tmp_path / "train.words-tags.tags").write_text(tags)
    tag_dictionary = Dictionary()
    tag_dictionary.add_symbol("O")
    task = TaggingTask(TaggingConfig(data=str(tmp_path)), Dictionary(), tag_dictionary)
    with pytest.raises(ValueError, match=message):
        task.load_dataset("train")


def test_every_sentence_is_tagged_word_by_word(generated, text):
    tags, _ = tags_of(generated)
    assert sorted(tags) == list(range(SIZES["test"]))
    references = dict(re.findall(r"^T-(\d+)\t(.*)$", generated, re.M))
    sources = dict(re.findall(r"^S-(\d+)\t(.*)$", generated, re.M))
    for i, (words, expected) in enumerate(text["test"]):
        assert len(tags[i]) == len(sources[str(i)].split()) == len(words)
        assert references[str(i)].split() == expected


def test_tags_do_not_depend_on_the_batch(run, data, trained, generated):
    together, scores = tags_of(generated)
    alone, alone_scores = tags_of(generate(run, data, trained[0] / "checkpoint_last.pt", "--batch-size", 1))
    assert alone == together
    assert alone_scores == pytest.approx(scores, abs=2e-4)


def test_validation_counts_entities_as_seqeval_does(run, data, trained, generated, text):
    tags, _ = tags_of(generated)
    expected = 100 * f1_score([tags for _, tags in text["test"]], [tags[i] for i in sorted(tags)])
    assert 0 < expected < 100
    out = run("fairseq-validate", data, *PLUGIN, *FIXED, "--path", trained[0] / "checkpoint_last.pt",
              "--valid-subset", "test", "--batch-size", 7)  # fmt: skip
    (found,) = re.findall(r"'test' subset \|.* f1 (\S+)", out)
    assert float(found) == pytest.approx(expected, abs=0.0051)


def test_counts_of_several_workers_add_up(data):
    """Each log is of another worker; a mean of their F1 would be 50."""
    task = make_task(data)
    logs = [{"_correct_entities": 9, "_entities": 18}, {"_correct_entities": 0, "_entities": 2}]
    synchronised = {"_correct_entities": torch.tensor(1.0), "_entities": torch.tensor(4.0)}
    base = {"loss": 1.0, "ntokens": 3, "nsentences": 1, "sample_size": 3, "_world_size": 1}

    class Criterion:
        reduce_metrics = staticmethod(lambda logs: None)

    for counted, expected in (
        (logs, 90.0),
        ([synchronised], 50.0),
        ([{"_correct_entities": 0, "_entities": 0}], 0.0),
    ):
        with metrics.aggregate() as meters:
            task.reduce_metrics([{**base, **log} for log in counted], Criterion())
        assert meters.get_smoothed_values()["f1"] == expected
    with metrics.aggregate() as meters:
        task.reduce_metrics([base], Criterion())
    assert "f1" not in meters.get_smoothed_values()


def test_the_best_checkpoint_is_that_of_best_f1(run, data, trained):
    folder, log = trained
    scores = [float(f1) for f1 in re.findall(r"'valid' subset \|.* f1 (\S+)", log)]
    assert len(scores) == 4 and max(scores) > scores[0]
    state = torch.load(folder / "checkpoint_best.pt", weights_only=True)
    assert state["extra_state"]["best"] == max(scores)
    out = run("fairseq-validate", data, *PLUGIN, *FIXED, "--path", folder / "checkpoint_best.pt",
              "--batch-size", 5)  # fmt: skip
    assert float(re.findall(r"'valid' subset \|.* f1 (\S+)", out)[0]) == max(scores)


def test_interactive_reads_the_bytes_of_unknown_words(run, data, trained, generated, text):
    """Its tags and scores are fairseq-generate's, in the order of the lines."""
    lines = [" ".join(words) for words, _ in text["test"]]
    out = interactive(run, data, trained, lines)
    assert re.findall(r"^S-\d+\t(.*)$", out, re.M) == lines
    assert re.findall(r"^D-(\d+)", out, re.M) == [str(i) for i in range(len(lines))]
    (tags, scores), (expected, expected_scores) = tags_of(out), tags_of(generated)
    assert tags == expected
    assert scores == pytest.approx(expected_scores, abs=2e-4)
    dictionary = Dictionary.load(str(data / "dict.words.txt"))
    assert sum(word not in dictionary for line in lines for word in line.split()) > len(lines)


def test_interactive_gives_as_many_tags_as_words(run, data, trained):
    lines = ["", "", "", "", "", "<pad> visits </s> <unk> for <s> .", "  Anna\tvisits   Ulm  ", "", "a" * 50]
    tags, _ = tags_of(interactive(run, data, trained, lines))
    assert [len(tags[i]) for i in range(len(lines))] == [len(line.split()) for line in lines]


@pytest.mark.parametrize("cell", CELLS[1:])
def test_every_other_unit_trains_and_tags(run, data, tmp_path, cell):
    """Validation, after training, finds tags too."""
    out = run("fairseq-train", data, *PLUGIN, *FIXED, *TRAIN, "--cell", cell, "--max-update", 2, "--no-save",
              "--save-dir", tmp_path)  # fmt: skip
    assert "num_updates=2" in out
    assert re.search(r"'valid' subset \|.* f1 \d", out)


def test_fine_tuning_to_other_tags_begins_with_a_new_head(run, data, trained, tmp_path):
    """All other weights are the checkpoint's; resuming and evaluating are refused."""
    folder, _ = trained
    for split in SIZES:
        (tmp_path / f"{split}.words").symlink_to(data.parent / f"{split}.words")
        tags = (data.parent / f"{split}.tags").read_text()
        (tmp_path / f"{split}.tags").write_text(tags.replace("-ORG", "-PER"))
    prefixes = [f"--{split}pref={tmp_path / split}" for split in SIZES]
    run("fairseq-preprocess", "-s", "words", "-t", "tags", "--dataset-impl", "raw", "--padding-factor", 1,
        "--srcdict", data / "dict.words.txt", *prefixes, "--destdir", tmp_path / "bin")  # fmt: skip
    command = ["fairseq-train", tmp_path / "bin", *PLUGIN, *FIXED, *TRAIN, "--save-dir", tmp_path]
    checkpoint = folder / "checkpoint_last.pt"
    out = run(*command, "--lr", 0, "--max-update", 1, "--finetune-from-model", checkpoint)
    assert "deleting tagging head from checkpoint, with different dimensions than current model" in out
    old, new = (
        torch.load(path / "checkpoint_last.pt", weights_only=True)["model"] for path in (folder, tmp_path)
    )
    kinds = Dictionary.load(str(tmp_path / "bin" / "dict.tags.txt"))
    assert new["crf.transitions"].shape == (len(kinds) - kinds.nspecial,) * 2
    assert old.keys() == new.keys()
    assert all(torch.equal(new[key], old[key]) for key in new if not key.startswith(("crf.", "projection.")))

    last = run(*command, "--restore-file", checkpoint, "--save-dir", tmp_path / "new", check=False)
    assert "tagging head is not in the checkpoint that training resumes from" in last.splitlines()[-1]
    last = run("fairseq-generate", tmp_path / "bin", *PLUGIN, *FIXED, "--path", checkpoint, check=False)
    assert "tagging head is not in the checkpoint, or has other dimensions" in last.splitlines()[-1]


def test_from_a_yaml_file(run, data, tmp_path):
    (tmp_path / "tagging.yaml").write_text(f"""# @package _group_
common: {{cpu: true, user_dir: {ROOT / "fairseq_lrn"}, log_format: simple, log_interval: 1}}
task: {{_name: tagging, data: {data}, max_word_length: 12}}
model: {{_name: lrn_tagger, encoder_hidden_size: 8, char_embed_dim: 4}}
criterion: {{_name: model}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: fixed}}
optimization: {{lr: [0.01], max_update: 2}}
dataset: {{batch_size: 16, num_workers: 0, required_batch_size_multiple: 1}}
checkpoint: {{save_dir: {tmp_path}, best_checkpoint_metric: f1, maximize_best_checkpoint_metric: true}}
hydra: {{run: {{dir: {tmp_path}}}}}
""")
    run("fairseq-hydra-train", "--config-dir", tmp_path, "--config-name", "tagging")
    # as many bytes a word as in training, whatever the command line says
    checkpoint = tmp_path / "checkpoint_last.pt"
    out, same = (generate(run, data, checkpoint, "--max-word-length", length) for length in (3, 12))
    assert "--max-word-length is 12, as in training, not 3" in out
    assert sorted(tags_of(out)[0]) == list(range(SIZES["test"]))
    assert tags_of(out) == tags_of(same)


def test_sentences_that_do_not_fit_are_refused(run, data, tmp_path):
    train = [word for word in TRAIN if word not in ("--batch-size", "16")]
    out = run(
        "fairseq-train", data, *PLUGIN, *FIXED, *train, "--max-tokens", 5, "--save-dir", tmp_path, check=False
    )
    assert "should not exceed max_tokens=5" in out.splitlines()[-1]


def test_a_model_that_diverged_is_named(run, data, trained, tmp_path):
    state = torch.load(trained[0] / "checkpoint_last.pt", weights_only=True)
    state["model"]["projection.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    command = ["fairseq-interactive", data, *PLUGIN, "--path", tmp_path / "nan.pt", "--cpu"]
    out = run(*command, input="visits for .\n", check=False)
    assert "the sentence 'visits for .' has no tags, as its score is nan" in out.splitlines()[-1]


def test_words_must_have_bytes(data):
    with pytest.raises(ValueError, match="--max-word-length is 0, but must be positive"):
        make_task(data, 0)


def test_one_checkpoint_only(run, data, trained):
    path = trained[0] / "checkpoint_last.pt"
    out = run("fairseq-generate", data, *PLUGIN, *FIXED, "--path", f"{path}:{path}", check=False)
    assert "--path names 2 checkpoints, but tagging takes one" in out.splitlines()[-1]


def test_missing_library_is_named(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "seqeval.metrics.sequence_labeling", None)
    with pytest.raises(ImportError, match="pip install seqeval"):
        make_task(data).valid_step({}, None, None)


def test_two_processes_add_up_their_counts(run_twice, data, tmp_path):
    out = run_twice("fairseq-train", data, *PLUGIN, *FIXED, *TRAIN, "--max-epoch", 1, "--save-dir", tmp_path)
    assert re.search(r"'valid' subset \|.* f1 \d", out)

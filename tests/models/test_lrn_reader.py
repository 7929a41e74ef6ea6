"""The lrn_reader model with each of its units, and through fairseq's commands."""

import argparse
import json
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from batches import DEVICES, dictionary

from fairseq_lrn.models import LRNReaderModel
from fairseq_lrn.models.lrn_reader import GatedAttention
from fairseq_lrn.modules import CELLS
from fairseq_lrn.tasks.reading_comprehension import exact_match

ROOT = Path(__file__).resolve().parents[2]
every_cell = pytest.mark.parametrize("cell", CELLS)
each_device = pytest.mark.parametrize("device", DEVICES)
SIZES = {"encoder_embed_dim": 12, "encoder_hidden_size": 6, "char_embed_dim": 4}
NAMES = ("question_tokens", "question_chars", "passage_tokens", "passage_chars")


def build(device="cpu", **options):
    torch.manual_seed(0)
    task = argparse.Namespace(source_dictionary=dictionary(), cfg=argparse.Namespace(max_word_length=5))
    return LRNReaderModel.build_model(argparse.Namespace(**{**SIZES, **options}), task).to(device).eval()


def words(lengths, left, more=0, seed=1):
    """Ids (B, T) and bytes (B, T, 5) of random words, padded on one side, ``more`` than is needed."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + more
    ids, chars = torch.full((len(lengths), width), 1), torch.zeros(len(lengths), width, 5, dtype=torch.long)
    for row, length in enumerate(lengths):
        at = slice(width - length, None) if left else slice(length)
        ids[row, at] = torch.randint(4, 54, (length,), generator=generator)
        chars[row, at] = torch.randint(1, 257, (length, 5), generator=generator)
    return ids, chars


@every_cell
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@each_device
def test_padding_and_batch_mates_do_not_matter(device, left, cell):
    model = build(device, cell=cell, encoder_layers=2)
    questions, passages = [3, 5, 1, 4], [7, 2, 11, 1]
    inputs = [*words(questions, left, more=2), *words(passages, left, more=3, seed=2)]
    inputs = dict(zip(NAMES, (x.to(device) for x in inputs)))
    scores = model(**inputs)
    padding = inputs["passage_tokens"].eq(1)
    assert (scores.isinf() == padding[:, None]).all()
    for row, lengths in enumerate(zip(questions, passages)):
        real = [slice(-n, None) if left else slice(n) for n in lengths]
        alone = {name: x[row : row + 1, real[name.startswith("passage")]] for name, x in inputs.items()}
        torch.testing.assert_close(scores[row : row + 1, :, real[1]], model(**alone), rtol=1e-4, atol=1e-5)


@each_device
def test_gated_attention(device):
    torch.manual_seed(0)
    attention = GatedAttention(6).to(device).double()
    x = torch.randn(4, 2, 6, dtype=torch.double, device=device)
    memory = torch.randn(5, 2, 6, dtype=torch.double, device=device)
    mask = torch.tensor([[False] * 5, [False, False, False, True, True]], device=device)
    output = attention(x, memory, mask)
    for b, length in enumerate((5, 3)):
        for t in range(4):
            query = torch.relu(attention.query.weight @ x[t, b])
            keys = [torch.relu(attention.key.weight @ m) for m in memory[:length, b]]
            weights = torch.stack([query @ key / 3**0.5 for key in keys]).softmax(0)
            y = torch.cat([x[t, b], weights @ memory[:length, b]])
            torch.testing.assert_close(output[t, b], torch.sigmoid(attention.gate.weight @ y) * y)


def test_the_end_depends_on_the_start_and_all_parameters_learn():
    model = build(cell="lstm")
    scores = model(*words([3, 4], False), *words([6, 5], False, seed=2))
    F.cross_entropy(scores.flatten(0, 1), torch.tensor([1, 2, 0, 4])).backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_words_alone_are_enough():
    model = build(char_embed_dim=0)
    tokens, chars = words([3], False), words([6], False, seed=2)
    with_bytes = model(*tokens, *chars)
    torch.testing.assert_close(with_bytes, model(tokens[0], None, chars[0], None))


def test_activation_is_checked():
    with pytest.raises(ValueError, match="--cell-activation identity is for lrn and olrn, but --cell is gru"):
        build(cell="gru", cell_activation="identity")


def write(folder, split, size, seed):
    """Passages in which a colour follows each name; questions for the colour of one of them."""
    generator = random.Random(seed)
    names, colours = ["ann", "bob", "cid", "dora"], ["red", "dark green", "blue", "grey"]
    passages, questions = [], []
    for i in range(size):
        generator.shuffle(names)
        pairs = [(name, generator.choice(colours)) for name in names[: 2 + i % 3]]
        text = " . ".join(f"{name} is {colour}" for name, colour in pairs)
        offsets = [match.span() for match in re.finditer(r"\S+", text)]
        name, colour = generator.choice(pairs)
        begin = text.index(f"{name} is") + len(f"{name} is ")
        first, last = ([x[k] for x in offsets].index(begin + k * len(colour)) for k in (0, 1))
        passages.append({"text": text, "tokens": offsets})
        question = ["what", "is", name]
        questions.append(
            {
                "id": f"{split}{i}",
                "tokens": question,
                "passage": i,
                "span": [first, last],
                "answers": [colour],
            }
        )
    for kind, rows in (("passages", passages), ("questions", questions)):
        (folder / f"{split}.{kind}").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reading")
    for split, size in (("train", 120), ("valid", 21)):
        write(folder, split, size, seed=size)
    made = dictionary(0)
    for word in "ann bob cid dora is what red dark green blue .".split():  # not grey
        made.add_symbol(word)
    made.save(str(folder / "dict.txt"))
    return folder


PLUGIN = ["--user-dir", ROOT / "fairseq_lrn", "--task", "reading_comprehension"]
TRAIN = (
    "--arch lrn_reader --encoder-embed-dim 16 --encoder-hidden-size 16 --char-embed-dim 4 --dropout 0 "
    "--criterion cross_entropy --optimizer adam --lr 0.02 --batch-size 16 --required-batch-size-multiple 1 "
    "--best-checkpoint-metric f1 --maximize-best-checkpoint-metric --no-epoch-checkpoints --cpu "
    "--num-workers 0 --seed 1 --log-format simple"
).split()


def validate(run, data, checkpoint, batch_size):
    out = run("fairseq-validate", data, *PLUGIN, "--path", checkpoint, "--batch-size", batch_size, "--cpu",
              "--required-batch-size-multiple", 1, "--num-workers", 0, "--log-format", "simple")  # fmt: skip
    [scores] = re.findall(r"\| INFO \| valid \|.* em ([0-9.]+) .* f1 ([0-9.]+)", out)
    return tuple(map(float, scores))


def test_it_learns_to_read(run, reading, tmp_path):
    """fairseq-validate and the answers written give the scores of training, in batches of any size."""
    out = run("fairseq-train", reading, *PLUGIN, *TRAIN, "--max-epoch", 24, "--save-dir", tmp_path)
    found = re.findall(r"on 'valid' subset .* em ([0-9.]+) .* f1 ([0-9.]+)", out)
    scores = [tuple(map(float, pair)) for pair in found]
    assert max(em for em, _ in scores) > 90
    best = tmp_path / "checkpoint_best.pt"
    em, f1 = validate(run, reading, best, 4)
    assert (em, f1) == max(scores, key=lambda pair: pair[1]) == validate(run, reading, best, 21)

    script = ROOT / "examples" / "reading_comprehension" / "predict.py"
    run(script, best, reading, "valid", tmp_path / "answers.json")
    answers = json.loads((tmp_path / "answers.json").read_text())
    questions = [json.loads(line) for line in (reading / "valid.questions").read_text().splitlines()]
    assert sorted(answers) == sorted(question["id"] for question in questions)
    right = sum(exact_match(answers[question["id"]], question["answers"][0]) for question in questions)
    assert round(100 * right / len(questions), 2) == em

    # a span has no labels, so fine-tuning goes on with every weight
    options = ["--finetune-from-model", best, "--max-answer-length", 2, "--lr", 0, "--max-update", 1]
    run("fairseq-train", reading, *PLUGIN, *TRAIN, *options, "--save-dir", tmp_path / "tuned")
    old, new = (
        torch.load(path, weights_only=True)["model"]
        for path in (best, tmp_path / "tuned" / "checkpoint_last.pt")
    )
    assert old.keys() == new.keys() and all(torch.equal(new[key], old[key]) for key in new)


@pytest.mark.parametrize("cell", CELLS[1:])
def test_every_other_unit_trains_and_validates(run, reading, tmp_path, cell):
    options = ["--cell", cell, "--max-update", 2, "--max-answer-length", 1]
    out = run("fairseq-train", reading, *PLUGIN, *TRAIN, *options, "--save-dir", tmp_path)
    assert "num_updates 2" in out
    assert re.search(r"on 'valid' subset .* em [0-9.]+ .* f1 [0-9.]+", out)


def test_from_a_yaml_file(run, reading, tmp_path):
    (tmp_path / "reader.yaml").write_text(
        f"""# @package _group_
common: {{user_dir: {ROOT / "fairseq_lrn"}, cpu: true, log_format: simple}}
task: {{_name: reading_comprehension, data: {reading}, max_answer_length: 3}}
model: {{_name: lrn_reader, cell: atr, encoder_embed_dim: 8, encoder_hidden_size: 8, char_embed_dim: 4}}
criterion: cross_entropy
optimizer: adam
lr_scheduler: fixed
dataset: {{batch_size: 16, num_workers: 0}}
optimization: {{max_update: 1, lr: [0.01]}}
checkpoint: {{no_save: true, best_checkpoint_metric: f1, maximize_best_checkpoint_metric: true}}
"""
    )
    out = run("fairseq-hydra-train", "--config-dir", tmp_path, "--config-name", "reader",
              f"hydra.run.dir={tmp_path}")  # fmt: skip
    assert "num_updates 1" in out


@pytest.mark.parametrize(
    ("missing", "options"), [("dict.txt", []), ("dev.passages", ["--valid-subset", "dev"])]
)
def test_a_missing_file_is_named(run, reading, tmp_path, missing, options):
    folder = tmp_path if missing == "dict.txt" else reading
    out = run("fairseq-train", folder, *PLUGIN, *TRAIN, *options, "--save-dir", tmp_path, check=False)
    assert str(folder / missing) in out.splitlines()[-1]

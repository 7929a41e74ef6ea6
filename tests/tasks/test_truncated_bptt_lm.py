"""The language-modelling task that carries the state: its batches, and fairseq's commands with it."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary, MonolingualDataset, TokenBlockDataset
from fairseq.tasks.language_modeling import LanguageModelingConfig

from fairseq_lrn.modules import CELLS
from fairseq_lrn.tasks.truncated_bptt_lm import TruncatedBPTTLMTask

PLUGIN = ["--user-dir", Path(__file__).resolve().parents[2] / "fairseq_lrn", "--cpu", "--num-workers", 0]
SMALL = "--arch lrn_lm --decoder-embed-dim 12 --decoder-hidden-size 16 --decoder-layers 2".split()
TRAIN = "--optimizer adam --lr 0.01 --seed 3 --log-format simple --log-interval 1".split()


@pytest.fixture(scope="module")
def text():
    """Sentences of ids (T_i,), each ending with </s>."""
    generator = torch.Generator().manual_seed(4)
    return [
        torch.cat([torch.randint(4, 30, (length,), generator=generator), torch.tensor([2])])
        for length in [9, 0, 4, 17, 1, 30, 8, 5, 12]
    ]


def task_and_dataset(text, block=7):
    words = Dictionary()
    for i in range(26):
        words.add_symbol(f"w{i}")
    blocks = TokenBlockDataset(
        text, [len(line) for line in text], block, words.pad(), words.eos(), include_targets=True
    )
    dataset = MonolingualDataset(blocks, blocks.sizes, words, shuffle=True, targets=["future"])
    return TruncatedBPTTLMTask(LanguageModelingConfig(), words), dataset


def batches(text, rows, shards=1, shard=0):
    """The batches of one process; None where it has no more text."""
    task, dataset = task_and_dataset(text)
    iterator = task.get_batch_iterator(dataset, max_sentences=rows, num_shards=shards, shard_id=shard)
    return [batch or None for batch in iterator.next_epoch_itr()]


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_streams_are_the_text_in_order_and_whole(text, rows, shards):
    whole = torch.cat(text)
    streams, steps = {}, set()
    for shard in range(shards):
        found = batches(text, rows, shards, shard)
        steps.add(len(found))
        for number, batch in enumerate(found):
            if batch is None:
                assert number > 0 or len(whole) / 7 < rows * shards
                continue
            assert batch["net_input"]["block"] == number
            source, target = batch["net_input"]["src_tokens"], batch["target"]
            assert batch["ntokens"] == target.ne(1).sum()
            for row in range(len(target)):
                stream = streams.setdefault((shard, row), [])
                assert len(stream) == number  # no block of this row was left out
                real = target[row].ne(1)
                stream.append((int(batch["id"][row]), source[row][real], target[row][real]))
    assert len(steps) == 1  # all processes take as many steps
    parts = sorted(streams.values(), key=lambda stream: stream[0][0])
    ids = [number for stream in parts for number, _, _ in stream]
    assert ids == list(range(-(-len(whole) // 7)))
    assert torch.equal(torch.cat([target for stream in parts for _, _, target in stream]), whole)
    sources = torch.cat([source for stream in parts for _, source, _ in stream])
    assert torch.equal(sources, torch.cat([torch.tensor([2]), whole[:-1]]))
    lengths = [len(stream) for stream in parts]
    assert max(lengths) - min(lengths) <= 1


def test_processes_together_read_what_one_reads(text):
    one = [set(batch["id"].tolist()) for batch in batches(text, 6)]
    together = [set() for _ in one]
    for shard in range(3):
        for step, batch in zip(together, batches(text, 2, 3, shard)):
            step.update(batch["id"].tolist() if batch else [])
    assert together == one


def test_resuming_goes_on_with_the_next_block(text):
    task, dataset = task_and_dataset(text)
    iterator = task.get_batch_iterator(dataset, max_sentences=2)
    epoch = iterator.next_epoch_itr()
    next(epoch)
    next(epoch)
    resumed = task.get_batch_iterator(dataset, max_sentences=2)
    resumed.load_state_dict(iterator.state_dict())
    batch, expected = next(resumed.next_epoch_itr()), next(epoch)
    assert batch["net_input"]["block"] == 2
    assert torch.equal(batch["id"], expected["id"])


def test_number_of_streams_is_needed(text):
    task, dataset = task_and_dataset(text)
    with pytest.raises(ValueError, match="--batch-size, the number of streams of text, is not given"):
        task.get_batch_iterator(dataset, max_tokens=100)


def test_streams_that_do_not_fit_are_refused(text):
    """Evaluation reads one stream, whatever fairseq's default of --max-tokens is."""
    task, dataset = task_and_dataset(text)
    with pytest.raises(ValueError, match="--max-tokens is 20, but must be at least 21"):
        task.get_batch_iterator(dataset, max_tokens=20, max_sentences=3)
    assert task.get_batch_iterator(dataset, max_tokens=21, max_sentences=3)
    assert task.eval_lm_dataloader(dataset, max_tokens=6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"add_bos_token": True}, "--add-bos-token is given, but must not be"),
        ({"pad_to_fixed_bsz": True}, "--pad-to-fixed-bsz is given, but must not be"),
        ({"sample_break_mode": "complete_doc"}, "is complete_doc, which leaves out empty lines"),
        ({"shorten_method": "truncate"}, "--shorten-method is truncate, which leaves out words"),
        ({"shorten_method": "random_crop"}, "--shorten-method is random_crop, which leaves out words"),
        ({"max_target_positions": 5}, "--max-target-positions is 5, but must not be given"),
        ({"tokens_per_sample": 0}, "--tokens-per-sample is 0, but must be positive"),
        ({"output_dictionary_size": 4}, "--output-dictionary-size is 4, but must be more than 4"),
    ],
    ids=str,
)
def test_options_that_change_the_text_are_refused(data, options, message):
    task = TruncatedBPTTLMTask.setup_task(LanguageModelingConfig(data=str(data), **options))
    with pytest.raises(ValueError, match=message):
        task.load_dataset("valid")


def test_several_shards_are_refused(text):
    task, dataset = task_and_dataset(text)
    with pytest.raises(ValueError, match="--distributed-world-size is 2, but must be 1"):
        task.eval_lm_dataloader(dataset, num_shards=2)


def test_context_window_is_refused(text):
    task, dataset = task_and_dataset(text)
    with pytest.raises(ValueError, match="--context-window is 3, but must be 0"):
        task.eval_lm_dataloader(dataset, context_window=3)


@pytest.fixture(scope="module")
def data(run, tmp_path_factory):
    """A text in which each word tells of the next, as fairseq's binary data: 200 and 53 lines."""
    folder = tmp_path_factory.mktemp("text")
    random = np.random.default_rng(6)
    for name, lines in (("train", 200), ("valid", 53)):
        with open(folder / name, "w") as file:
            for _ in range(lines):
                words = np.cumsum(random.integers(0, 3, random.integers(1, 9))) % 19
                file.write(" ".join(f"w{word}" for word in words) + "\n")
    run("fairseq-preprocess", "--only-source", "--trainpref", folder / "train",
        "--validpref", folder / "valid", "--destdir", folder / "bin")  # fmt: skip
    return folder / "bin"


def train(run, data, folder, *options, task="truncated_bptt_lm", check=True):
    command = ["fairseq-train", data, *PLUGIN, *SMALL, *TRAIN, "--task", task, "--save-dir", folder]
    return run(*command, "--tokens-per-sample", 7, "--batch-size", 4, *options, check=check)


def evaluate(run, data, folder, *options, task="truncated_bptt_lm"):
    """Tokens and base-2 loss of the validation text."""
    out = run("fairseq-eval-lm", data, *PLUGIN, "--task", task, "--path", folder / "checkpoint_last.pt",
              "--gen-subset", "valid", *options)  # fmt: skip
    words = int(re.search(r"Evaluated ([\d,]+) tokens", out)[1].replace(",", ""))
    return words, float(re.search(r"Loss \(base 2\): ([\d.]+)", out)[1])


def words(data):
    return sum(len(line.split()) + 1 for line in (data.parent / "valid").read_text().splitlines())


@pytest.mark.parametrize("cell", CELLS)
def test_a_text_in_one_block_or_in_many(run, data, tmp_path, cell):
    """fairseq-eval-lm reads it whole, fairseq-train validates in blocks of 7 words."""
    mixture = ["--mixture-of-softmaxes", 2] if cell == "lrn" else ["--share-decoder-input-output-embed"]
    out = train(
        run, data, tmp_path, "--cell", cell, *mixture, "--batch-size-valid", 1, "--max-epoch", 1,
        "--no-epoch-checkpoints",
    )  # fmt: skip
    (blocks,) = re.findall(r"on 'valid' subset \| loss ([\d.]+)", out)
    assert float(blocks) < 5.2
    assert evaluate(run, data, tmp_path, "--tokens-per-sample", 10000) == (
        words(data),
        pytest.approx(float(blocks), abs=1e-3),
    )


@pytest.fixture(scope="module")
def trained(run, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(run, data, folder, "--max-epoch", 4, "--no-epoch-checkpoints")
    return folder


def test_perplexity_does_not_depend_on_blocks_or_batches(run, data, trained):
    results = [
        evaluate(run, data, trained, *options)
        for options in (
            ["--tokens-per-sample", 10000],
            ["--tokens-per-sample", 3, "--batch-size", 5],
            ["--tokens-per-sample", 7, "--max-tokens", 40, "--sample-break-mode", "complete"],
        )
    ]
    assert [count for count, _ in results] == [words(data)] * 3
    assert [loss for _, loss in results] == pytest.approx([results[0][1]] * 3, abs=2e-4)
    # the state is what makes it so
    _, without = evaluate(run, data, trained, "--tokens-per-sample", 3, task="language_modeling")
    assert without > results[0][1] + 0.02


def test_validation_in_the_middle_of_an_epoch_does_not_disturb_training(run, data, tmp_path):
    """The weights are those of a training without any."""
    options = ["--max-update", 6, "--dropout", 0, "--no-epoch-checkpoints"]
    train(run, data, tmp_path / "undisturbed", *options, "--disable-validation")
    train(run, data, tmp_path / "validated", *options, "--validate-interval-updates", 2)
    undisturbed, validated = (
        torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=True)["model"]
        for name in ("undisturbed", "validated")
    )
    for name, weight in undisturbed.items():
        assert torch.equal(weight, validated[name]), name


def test_training_goes_on_in_the_middle_of_an_epoch(run, data, tmp_path):
    options = ["--save-interval-updates", 5, "--no-epoch-checkpoints", "--dropout", 0]
    train(run, data, tmp_path, *options, "--max-update", 5)
    out = train(run, data, tmp_path, *options, "--max-update", 8)
    assert "Loaded checkpoint" in out
    assert [int(update) for update in re.findall(r"train_inner .*num_updates=(\d+)", out)] == [6, 7, 8]


def test_language_modeling_trains_evaluates_and_generates(run, data, tmp_path):
    """fairseq's own task, with sentences that begin with zeros; --sample-break-mode eos for whole ones."""
    out = train(run, data, tmp_path, "--sample-break-mode", "eos", "--max-epoch", 3, "--no-epoch-checkpoints",
                "--required-batch-size-multiple", 1, task="language_modeling")  # fmt: skip
    valid = float(re.findall(r"on 'valid' subset \| loss ([\d.]+)", out)[-1])
    eos = ["--sample-break-mode", "eos", "--required-batch-size-multiple", 1]
    alone = evaluate(run, data, tmp_path, *eos, "--batch-size", 1, task="language_modeling")
    assert alone == (words(data), pytest.approx(valid, abs=1e-3))
    together = evaluate(run, data, tmp_path, *eos, task="language_modeling")
    assert together == (alone[0], pytest.approx(alone[1], abs=2e-4))

    path = ["--task", "language_modeling", "--path", tmp_path / "checkpoint_last.pt", "--beam", 3]
    out = run("fairseq-generate", data, *PLUGIN, *path, *eos, "--gen-subset", "valid", "--prefix-size", 1,
              "--batch-size", 9, "--max-len-b", 12)  # fmt: skip
    found = dict(re.findall(r"^H-(\d+)\t\S+\t(.*)$", out, re.M))
    assert sorted(map(int, found)) == list(range(53))
    first = [line.split()[0] for line in (data.parent / "valid").read_text().splitlines()]
    assert [found[str(i)].split()[0] for i in range(53)] == first

    out = run("fairseq-interactive", data, *PLUGIN, *path, "--max-len-b", 12, input="w3 w4\nw7\n")
    begun = re.findall(r"^H-\d+\t\S+\t(.*)$", out, re.M)
    assert [line.startswith(start) for line, start in zip(begun, ["w3 w4", "w7"])] == [True, True]


CONFIG = """
common: {{user_dir: {user_dir}, cpu: true}}
task: {{_name: truncated_bptt_lm, data: {data}, tokens_per_sample: 7}}
model: {{_name: lrn_lm, decoder_embed_dim: 12, decoder_hidden_size: 16, adaptive_softmax_cutoff: [8, 16],
  adaptive_softmax_factor: 2}}
criterion: {{_name: adaptive_loss}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: fixed}}
optimization: {{lr: [0.01], max_update: 2}}
dataset: {{batch_size: 4, num_workers: 0}}
distributed_training: {{ddp_backend: legacy_ddp}}
checkpoint: {{save_dir: {folder}}}
"""


def test_adaptive_softmax_from_a_yaml_file(run, data, tmp_path):
    config = CONFIG.format(user_dir=PLUGIN[1], data=data, folder=tmp_path)
    (tmp_path / "lm.yaml").write_text(config)
    run("fairseq-hydra-train", "--config-dir", tmp_path, "--config-name", "lm", f"hydra.run.dir={tmp_path}")
    assert evaluate(run, data, tmp_path, "--tokens-per-sample", 50)[0] == words(data)


def test_the_longest_sentence_is_that_of_fairseqs_option(run, data, tmp_path):
    options = ["--max-target-positions", 6, "--sample-break-mode", "eos", "--max-update", 1]
    out = train(run, data, tmp_path, *options, task="language_modeling", check=False)
    assert "Size of sample" in out and "max_positions=6" in out


@pytest.mark.parametrize("command", ["fairseq-train", "fairseq-eval-lm"])
def test_refusals_reach_the_command_line(run, data, trained, tmp_path, command):
    options = ["--task", "truncated_bptt_lm", "--batch-size", 4, "--add-bos-token"]
    if command == "fairseq-train":
        options += ["--arch", "lrn_lm", "--save-dir", tmp_path]
    else:
        options += ["--path", trained / "checkpoint_last.pt", "--gen-subset", "valid"]
    out = run(command, data, *PLUGIN, *options, check=False)
    assert "--add-bos-token is given, but must not be" in out.splitlines()[-1]


def test_a_model_without_a_state_is_refused(run, data, tmp_path):
    command = ["fairseq-train", data, *PLUGIN, "--arch", "transformer_lm", "--task", "truncated_bptt_lm"]
    out = run(*command, "--batch-size", 4, "--save-dir", tmp_path, check=False)
    assert "needs --arch lrn_lm, but the model is TransformerLanguageModel" in out.splitlines()[-1]

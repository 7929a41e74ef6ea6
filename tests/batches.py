"""Small dictionaries and batches for the models' tests."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from fairseq.data import Dictionary

ROOT = Path(__file__).resolve().parent.parent
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
SMALL = dict(
    encoder_embed_dim=16,
    encoder_ffn_embed_dim=24,
    encoder_layers=2,
    decoder_embed_dim=16,
    decoder_ffn_embed_dim=24,
    decoder_layers=2,
    decoder_attention_heads=2,
)
# the same on a command line
SMALL_OPTIONS = [
    word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))
]


def dictionary(words=50, first="w"):
    made = Dictionary()
    for i in range(words):
        made.add_symbol(f"{first}{i}")
    return made


def task(source=None, target=None):
    source = source or dictionary()
    return types.SimpleNamespace(source_dictionary=source, target_dictionary=target or source)


def sentences(lengths, pad, left=False, seed=1, vocabulary=54):
    """Random token ids (B, max(lengths)), each sentence ending with </s> (2), padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.full((len(lengths), max(lengths)), pad)
    for row, n in zip(batch, lengths):
        words = torch.cat([torch.randint(4, vocabulary, (n - 1,), generator=generator), torch.tensor([2])])
        row[len(row) - n :] = words if left else row[len(row) - n :]
        if not left:
            row[:n] = words
    return batch


def assert_batch_mates_do_not_matter(model, left):
    """Encoding and scores of a sentence are the same alone and beside longer ones, padded on either side."""
    device = next(model.parameters()).device
    pad = model.encoder.padding_idx
    lengths = [7, 3, 11, 1]
    source = sentences(lengths, pad, left).to(device)
    target = sentences(lengths, pad, seed=2).to(device)
    scores, extra = model(source, None, target)
    for i, n in enumerate(lengths):
        at = slice(source.size(1) - n, None) if left else slice(n)
        alone_scores, alone_extra = model(source[i : i + 1, at], None, target[i : i + 1, :n])
        torch.testing.assert_close(scores[i, :n], alone_scores[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            extra["attn"][0][i, :n, at], alone_extra["attn"][0][0], rtol=1e-4, atol=1e-6
        )


def assert_left_padded_target_gives_the_same_scores(model):
    pad = model.encoder.padding_idx
    source, lengths = sentences([5, 6], pad), [4, 7]
    right, left = (sentences(lengths, pad, side, seed=2) for side in (False, True))
    scores_right, scores_left = model(source, None, right)[0], model(source, None, left)[0]
    torch.testing.assert_close(scores_left[0, 3:], scores_right[0, :4], rtol=1e-4, atol=1e-5)


def assert_beams_share_their_sentence(model):
    """Hypotheses score as each with a copy of its sentence does, in whatever order they are picked."""
    device = next(model.parameters()).device
    pad = model.encoder.padding_idx
    lengths = [5, 9, 2, 7]
    source = sentences(lengths, pad).to(device)
    shared = model.encoder(source)
    orders = [
        [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3],  # three hypotheses a sentence
        [2, 0, 0, 3, 4, 5, 7, 7, 7, 10, 9, 11],
        [5, 3, 3, 9, 9, 10],  # of two sentences
        [1, 0, 0, 3, 5, 4],
        [4, 3, 3, 0, 0, 1],  # the sentences in another order
        [0, 3, 1, 2],  # no longer one sentence next to the other
        [3, 1, 1],
    ]
    rows, sizes = torch.arange(len(lengths)), []
    state = {}
    prefix = torch.full((len(lengths), 1), 2, device=device)
    for step, order in enumerate(orders):
        order = torch.tensor(order)
        rows = rows[order]
        if step > 0:
            model.decoder.reorder_incremental_state_scripting(state, order.to(device))
        shared = model.encoder.reorder_encoder_out(shared, order.to(device))
        sizes.append(shared["encoder_out"][0].size(1))
        prefix = prefix[order.to(device)]
        scores, extra = model.decoder(prefix, shared, incremental_state=state)
        whole, whole_extra = model(source[rows.to(device)], None, prefix)
        torch.testing.assert_close(scores[:, 0], whole[:, -1], rtol=0, atol=1e-5)
        torch.testing.assert_close(extra["attn"][0][:, 0], whole_extra["attn"][0][:, -1], rtol=0, atol=1e-5)
        prefix = torch.cat([prefix, 4 + torch.arange(len(order), device=device)[:, None] + step], 1)
    assert sizes == [4, 4, 2, 2, 2, 4, 3]


def run_without_the_package(folder, program):
    """Run it where only PyTorch and the operators' library are; it reads what it needs from the folder."""
    (library,) = (ROOT / "fairseq_lrn").glob("_C*.so")
    start = f"import sys, torch\ntorch.ops.load_library({str(library)!r})\n"
    end = '\nassert not [name for name in sys.modules if name.startswith("fairseq")]\n'
    (folder / "program.py").write_text(start + program + end)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "program.py"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout

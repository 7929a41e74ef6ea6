"""Files of word vectors are read when training begins, and not needed once a checkpoint is loaded."""

import pickle
import types
from pathlib import Path

import fairseq.models
import pytest
import torch
from batches import SMALL_OPTIONS, dictionary
from fairseq.dataclass.initialize import add_defaults
from fairseq.models import MODEL_DATACLASS_REGISTRY
from omegaconf import OmegaConf

from fairseq_lrn.models import LRNModel

PLUGIN = ["--user-dir", Path(__file__).resolve().parents[2] / "fairseq_lrn"]
OPTIONS = [
    (model, option)
    for model, config in MODEL_DATACLASS_REGISTRY.items()
    if config.__module__.startswith("fairseq_lrn.")
    for option in config.__dataclass_fields__
    if option.endswith("embed_path")
]
TRAIN = (
    "--arch lrn_tiny --optimizer adam --lr 0.005 --max-tokens 400 --cpu --num-workers 0 --seed 3 "
    "--criterion cross_entropy --validate-interval 10"
).split()


def write(path, words):
    path.write_text(f"{len(words)} 16\n" + "".join(f"{word} {' '.join(['1.5'] * 16)}\n" for word in words))


def build(model, option, path, save_dir):
    """A model as a command of fairseq's builds it."""
    widths = {"encoder_embed_dim": 16, "decoder_embed_dim": 16}
    config = MODEL_DATACLASS_REGISTRY[model].__dataclass_fields__
    cfg = OmegaConf.create(
        {
            "model": {
                "_name": model,
                option: str(path),
                **{name: width for name, width in widths.items() if name in config},
            },
            "checkpoint": {
                "save_dir": str(save_dir),
                "restore_file": "checkpoint_last.pt",
                "checkpoint_suffix": "",
                "finetune_from_model": None,
            },
        }
    )
    add_defaults(cfg)
    if "decoder_attention_heads" in config:
        cfg.model.decoder_attention_heads = 2
    words = dictionary()
    task = types.SimpleNamespace(
        source_dictionary=words, target_dictionary=words, cfg=types.SimpleNamespace(max_word_length=5)
    )
    return fairseq.models.build_model(cfg.model, task)


def embedding(model, option):
    return getattr(model, "decoder" if option.startswith("decoder") else "encoder").embed_tokens


def test_models_with_vectors_are_found():
    assert {"lrn", "deepnmt", "lrn_tagger", "lrn_reader", "lrn_classifier", "lrn_inference"} <= {
        *dict(OPTIONS)
    }


@pytest.mark.parametrize(("model", "option"), OPTIONS)
def test_when_files_are_read(model, option, tmp_path):
    words = torch.tensor([[9, 5]])
    path = tmp_path / "vectors"
    write(path, ["w3"])
    begun = build(model, option, path, tmp_path)
    assert (embedding(begun, option).weight == 1.5).all(1).sum() == 1

    path.write_text("1 3\nw3 1 2 3\n")  # of another width
    for problem in ("cannot be read", "cannot be read", "was not read"):
        built = build(model, option, path, tmp_path).train()
        layer = embedding(built, option)
        with pytest.raises(ValueError, match=f"^--{option.replace('_', '-')} .*vectors {problem}"):
            layer(words)
        built.load_state_dict(begun.state_dict())
        torch.testing.assert_close(layer(words), embedding(begun, option)(words))
        assert not layer._forward_pre_hooks
        torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(words), layer(words))
        if path.exists():
            path.unlink()
        else:
            (tmp_path / "checkpoint_last.pt").touch()


@pytest.fixture(scope="module")
def trained(run, data, tmp_path_factory):
    """A model after an update, whose file of vectors has gone since, and the words of the file."""
    folder = tmp_path_factory.mktemp("trained")
    words = [line.split()[0] for line in (data / "dict.en.txt").read_text(encoding="utf-8").splitlines()]
    write(folder / "vectors", words[:20])
    paths = ["--encoder-embed-path", folder / "vectors", "--decoder-embed-path", folder / "vectors"]
    command = ["fairseq-train", data, *PLUGIN, *TRAIN, *SMALL_OPTIONS, *paths, "--lr", 0]
    run(*command, "--save-dir", folder / "checkpoints", "--max-update", 1)
    (folder / "vectors").unlink()
    return folder / "checkpoints" / "checkpoint_last.pt", command


def count(path, side):
    weight = torch.load(path, weights_only=True)["model"][f"{side}.embed_tokens.weight"]
    return int((weight == 1.5).all(1).sum())


def test_checkpoints_need_no_file(run, data, trained, tmp_path):
    path, command = trained
    assert count(path, "encoder") == count(path, "decoder") == 20
    moved = tmp_path / "moved.pt"
    moved.write_bytes(path.read_bytes())
    fixed = ["--cpu", "--num-workers", 0]
    out = run("fairseq-generate", data, *PLUGIN, "--path", moved, *fixed, "--beam", 2, "--max-len-b", 5)
    assert "H-0" in out
    assert "valid on" in run(
        "fairseq-validate",
        data,
        *PLUGIN,
        "--task",
        "translation",
        "--path",
        moved,
        *fixed,
        "--max-tokens",
        400,
    )
    for name, options in (
        ("tuned", ["--finetune-from-model", moved]),
        ("restored", ["--restore-file", moved]),
    ):
        run(*command, *options, "--max-update", 2, "--save-dir", tmp_path / name)
        assert count(tmp_path / name / "checkpoint_last.pt", "encoder") == 20
    assert "Loaded checkpoint" in run(*command, "--max-update", 3, "--save-dir", path.parent)
    hub = LRNModel.from_pretrained(tmp_path, moved.name, str(data), source_lang="en", target_lang="de")
    assert isinstance(hub.translate("▁12"), str)


def test_training_needs_the_file(run, trained, tmp_path):
    out = run(*trained[1], "--save-dir", tmp_path, check=False)
    assert "ValueError: --encoder-embed-path " in out.splitlines()[-1]
    assert "No such file or directory" in out.splitlines()[-1]
    assert not (tmp_path / "checkpoint_last.pt").exists()

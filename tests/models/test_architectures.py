"""Every architecture is the same from the command line and from a YAML file."""

import re
import types
from pathlib import Path

import fairseq.models
import pytest
import torch
from batches import dictionary
from fairseq import checkpoint_utils, options
from fairseq.dataclass.initialize import add_defaults
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_MODEL_REGISTRY
from omegaconf import OmegaConf

import fairseq_lrn.models  # noqa: F401

PLUGIN = Path(__file__).resolve().parents[2] / "fairseq_lrn"
ARCHITECTURES = [
    name for name, model in ARCH_MODEL_REGISTRY.items() if model.__module__.startswith("fairseq_lrn.")
]
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def from_arguments(name, *words):
    args = options.parse_args_and_arch(options.get_training_parser(), ["data", "--arch", name, *words])
    return convert_namespace_to_omegaconf(args).model


def from_yaml(name, **given):
    """What fairseq-hydra-train makes of a file's ``model``."""
    cfg = OmegaConf.create({"model": {"_name": name, **given}})
    add_defaults(cfg)
    return cfg.model


def options_of(cfg):
    cfg = OmegaConf.to_container(cfg, enum_to_str=True)
    return {key: value for key, value in cfg.items() if key != "_name"}


def shapes(cfg):
    words = dictionary()
    task = types.SimpleNamespace(
        source_dictionary=words, target_dictionary=words, cfg=types.SimpleNamespace(max_word_length=5)
    )
    with torch.device("meta"):
        model = fairseq.models.build_model(cfg, task)
    return {key: value.shape for key, value in model.state_dict().items()}


def test_architectures_are_found():
    assert {"lrn", "lrn_tiny", "olrn_wmt_en_de", "deepnmt_tiny", "lrn_lm", "lrn_tagger"} <= {*ARCHITECTURES}


@every_architecture
def test_yaml_and_arguments_make_the_same(name):
    arguments, yaml = from_arguments(name), from_yaml(name)
    assert options_of(yaml) == options_of(arguments)
    assert yaml._name == arguments._name == name
    only_name = OmegaConf.create({"model": name})
    add_defaults(only_name)
    assert options_of(only_name.model) == options_of(arguments)
    bare = OmegaConf.create({"model": {"_name": name}}).model  # as a program may build it
    assert shapes(bare) == shapes(yaml) == shapes(arguments)


@every_architecture
def test_what_is_given_wins(name):
    """Also a value that is the default of the model whose architecture this is."""
    model = fairseq.models.MODEL_REGISTRY[ARCH_MODEL_REGISTRY[name].__module__.rpartition(".")[2]]
    given = options_of(OmegaConf.structured(vars(model)["__dataclass"]))
    assert options_of(from_yaml(name, **given)) == given
    given["dropout"] = 0.25
    assert options_of(from_yaml(name, **given)) == given


def train(run, data, folder, *overrides, **model):
    config = {
        "common": {"user_dir": "???", "cpu": False},
        "task": {"_name": "translation", "data": "???", "source_lang": "en", "target_lang": "de"},
        "model": model,
        "criterion": {"_name": "label_smoothed_cross_entropy", "label_smoothing": 0.1},
        "optimizer": {"_name": "adam"},
        "lr_scheduler": {"_name": "inverse_sqrt", "warmup_updates": 2000},
        "optimization": {"lr": [0.005], "max_update": 1},
        "dataset": {"max_tokens": 800, "num_workers": 0},
    }
    OmegaConf.save(OmegaConf.create(config), folder / "tiny.yaml")
    return run(
        "fairseq-hydra-train", "--config-dir", folder, "--config-name", "tiny", "common.cpu=true",
        f"task.data={data}", f"common.user_dir={PLUGIN}", f"hydra.run.dir={folder}",
        f"checkpoint.save_dir={folder}", *overrides,
    )  # fmt: skip


def load(folder):
    return checkpoint_utils.load_checkpoint_to_cpu(str(folder / "checkpoint_last.pt"))


def test_through_the_commands(run, data, tmp_path):
    """What YAML has begun, arguments go on with."""
    output = train(
        run, data, tmp_path, "model.encoder_layers=6", "+model.decoder_layers=1", _name="olrn_iwslt_de_en",
        encoder_layers=3, encoder_embed_dim=8, decoder_embed_dim=8, share_all_embeddings=True,
    )  # fmt: skip
    model = load(tmp_path)["cfg"].model
    assert (model._name, model.cell, model.encoder_layers, model.decoder_layers) == (
        *("olrn_iwslt_de_en", "olrn"),
        *(6, 1),
    )
    words = (
        "--arch olrn_iwslt_de_en --encoder-embed-dim 8 --decoder-embed-dim 8 --decoder-layers 1 "
        "--share-all-embeddings --optimizer adam --lr 0.005 --lr-scheduler inverse_sqrt --cpu "
        "--criterion label_smoothed_cross_entropy --label-smoothing 0.1 --warmup-updates 2000 "
        "--max-tokens 800 --max-update 2"
    ).split()
    more = run("fairseq-train", data, "--user-dir", PLUGIN, "--save-dir", tmp_path, *words)
    assert "Loaded checkpoint" in more
    size = re.compile(r"num. shared model params: (\S+) ")
    assert size.search(more)[1] == size.search(output)[1]
    assert options_of(load(tmp_path)["cfg"].model) == options_of(model)
    search = ["--path", tmp_path / "checkpoint_last.pt", "--cpu", "--beam", 2, "--max-len-b", 5]
    assert "H-0" in run("fairseq-generate", data, "--user-dir", PLUGIN, *search)


def test_a_checkpoint_of_earlier_versions(run, data, tmp_path):
    """It may lack options that were added since."""
    train(run, data, tmp_path, _name="lrn_tiny", encoder_embed_dim=8, decoder_embed_dim=8, cell="olrn")
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    for option in ("word_dropout", "min_params_to_wrap"):
        del state["cfg"]["model"][option]
    torch.save(state, tmp_path / "checkpoint_last.pt")
    search = ["--path", tmp_path / "checkpoint_last.pt", "--cpu", "--beam", 2, "--max-len-b", 5]
    assert "H-0" in run("fairseq-generate", data, "--user-dir", PLUGIN, *search)

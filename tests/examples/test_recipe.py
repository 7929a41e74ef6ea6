"""What all recipes share, by the quickest of them: options, the work folder, steps done again or not."""

import fcntl
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from recipes import EXAMPLES, Recipe, lines, runner, table, times, write

RECIPES = [path for path in EXAMPLES.glob("*/*.py") if path.with_suffix(".yaml").exists()]

SMALL = (
    "model.encoder_embed_dim=8 model.encoder_hidden_size=8 dataset.batch_size=10 optimization.max_epoch=2 "
    "common.log_interval=1 min_count=1 models=lrn"
).split()
SENTENCES = [
    f"{int(verdict == 'fine')} {subject} {verb} {verdict} {end}"
    for subject in ("a film", "its cast", "the plot", "one sequel")
    for verdict in ("fine", "dull")
    for verb in ("is", "was", "looks")
    for end in (".", "again !", "and n't new .", "…")
]


def data(folder, train=SENTENCES[:60], dev=SENTENCES[60:73], test=SENTENCES[73:94]):
    """A folder as sst2.py takes it; 8 divides no number of results."""
    for name, text in (("train", train), ("dev", dev), ("test", test)):
        write(
            folder / f"{name}.txt", text if isinstance(text, bytes) else "".join(line + "\n" for line in text)
        )
    return folder


@pytest.fixture(scope="module")
def sst2(start, tmp_path_factory):
    """A trained run, in work/."""
    cwd = tmp_path_factory.mktemp("sst2")
    data(cwd / "data")
    recipe = Recipe(start, cwd, "classification/sst2.py", "--data", "data", "--work", "work")
    recipe.work = cwd / "work"
    recipe.output = recipe(*SMALL)
    return recipe


@pytest.fixture
def fresh(start, tmp_path):
    """The recipe in a folder of its own, on data of its own."""
    data(tmp_path / "data")
    return Recipe(start, tmp_path, "classification/sst2.py", "--data", "data", *SMALL)


def test_steps_are_told_and_done_once(sst2):
    steps = [line[3:] for line in sst2.output.split("\n") if line.startswith("== ")]
    assert steps == ["text", "binarize", "runs/lrn/train", "runs/lrn/accuracy"]
    assert sst2.output.count("$ cd ") == 5
    assert (
        f"$ cd {sst2.work}/runs/lrn && fairseq-hydra-train --config-dir . --config-name train" in sst2.output
    )
    header, row = table(sst2.output)
    assert header[:2] == ["unit", "parameters"] and row[0] == "lrn" and float(row[5]) > 0

    before = times(sst2.work)
    again = sst2(*SMALL)
    assert [line for line in again.split("\n") if "==" in line] == [
        f"== {step}: done before" for step in steps
    ]
    assert times(sst2.work) == before
    assert table(again) == table(sst2.output)


def test_everything_of_a_run_is_in_its_folder(sst2):
    names = {path.name for path in (sst2.work / "runs/lrn").iterdir()}
    assert {"train.yaml", "train.log", "checkpoint_best.pt", "checkpoint_last.pt", ".hydra"} <= names
    assert {path.name for path in sst2.work.iterdir()} == {
        *(".gitignore", ".lock", "bin", "logs", "recipe.json", "runs", "text")
    }
    assert not {path.name for path in sst2.cwd.iterdir()} - {"data", "work"}


def test_a_dry_run_prints_the_commands_and_changes_nothing(sst2, fresh):
    before = times(sst2.work)
    output = sst2("--dry-run", *SMALL, "models=lrn,gru")
    assert "$ cd " + str(sst2.work / "runs/gru") + " && fairseq-hydra-train" in output
    assert "runs/lrn/train: done before" in output and "fairseq-validate bin" in output
    assert times(sst2.work) == before and not (sst2.work / "runs/gru").exists()

    assert fresh("--dry-run", "--work", "new").count("$ cd ") == 5
    assert not (fresh.cwd / "new").exists()
    assert "curl -fsSL" in Recipe(fresh.begin, fresh.cwd, fresh.script)("--dry-run")


@pytest.mark.parametrize(
    "option, words",
    [
        (
            "model.dropout=0.1",
            "runs/lrn was trained before model.dropout became 0.1 (it was 0.5): give another run=",
        ),
        ("common.seed=2", "common.seed became 2 (it was 1)"),
        (
            "min_count=50",
            "has runs (lrn) that were trained before min_count became 50 (it was 1): choose another --work",
        ),
        ("optimization.max_epoch=9", "optimization.max_epoch became 9 (it was 2)"),
    ],
)
def test_another_setting_is_not_the_old_result(sst2, option, words):
    before = times(sst2.work)
    assert words in sst2.refused(*SMALL, option)
    shutil.rmtree(sst2.work / ".part", ignore_errors=True)  # what did not replace the old
    assert times(sst2.work) == before


def test_other_data_are_not_the_old_result_and_the_same_are(sst2, tmp_path):
    data(tmp_path, train=SENTENCES[1:61])
    assert "has runs (lrn) that were trained before train.txt changed" in sst2.refused(
        *SMALL, "--data", str(tmp_path)
    )
    same = tmp_path / "same"
    data(same)
    text = (same / "train.txt").read_bytes()
    (same / "train.txt").unlink()
    write(same / "train.txt.gz", gzip.compress(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n")[:-2]))
    output = sst2(*SMALL, "--data", str(same))
    assert "runs/lrn/train: done before" in output and table(output) == table(sst2.output)


@pytest.mark.parametrize(
    "option, words",
    [
        ("model.droput=0.1", "there is no option model.droput (did you mean model.dropout?)"),
        ("max_epoch=2", "there is no setting max_epoch (did you mean optimization.max_epoch?)"),
        ("max_epochs=2", "there is no setting max_epochs (did you mean optimization.max_epoch?)"),
        ("dropout=0.1", "there is no setting dropout (did you mean model.dropout?)"),
        ("model.lr=0.1", "there is no option model.lr (did you mean optimization.lr?)"),
        (
            "--small",
            "there is no argument --small: there are --work, --data, --dry-run and OPTION=VALUE, which",
        ),
        ("--min-count", "OPTION=VALUE, which has no dashes (did you mean min_count?)"),
        ("--max-epoch=2", "OPTION=VALUE, which has no dashes (did you mean optimization.max_epoch?)"),
        (
            "dataset.validate_interval=3",
            "dataset.validate_interval is 3, but the best validation's checkpoint",
        ),
        ("modle.dropout=0.1", "there is no group of options modle (did you mean model"),
        ("min_cuont=3", "there is no setting min_cuont (did you mean min_count?)"),
        ("min_count=many", "min_count is 'many', but must be a whole number"),
        ("min_count=-1", "min_count is -1, but must not be negative"),
        ("model.dropout=much", "model.dropout is 'much': "),
        ("min_count=???", "min_count is '???', which is not a YAML value"),
        ("model.dropout=???", "model.dropout is '???', which is not a YAML value"),
        ("model.dropout=${no}", "the settings of lrn refer to nothing: "),
        ("task._name=[a]", "task._name is ['a'], which fairseq does not know"),
        ("models=", "models is empty, but must have at least one architecture"),
        ("models=[]", "models is empty, but must have at least one architecture"),
        ("run=[a,b]", "run is ['a', 'b'], but must be text"),
        (
            "run=a:b",
            "run is 'a:b', but must be the name of a folder that has no colon and begins with no dot",
        ),
        ("checkpoint.no_save=true", "checkpoint.no_save is set by the recipe: the checkpoints are evaluated"),
        ("models=rnn", "models has rnn, but must have only lrn, olrn, lstm, gru, atr, sru"),
        ("model.cell=gru", "model.cell is set by the recipe: give models=NAME"),
        ("task.data=bin", "task.data is set by the recipe: give --data"),
        ("checkpoint.save_dir=x", "checkpoint.save_dir is set by the recipe: give --work and run=NAME"),
        ("model.encoder_embed_path=glove.txt", "model.encoder_embed_path is glove.txt, which does not exist"),
        ("run=../x", "run is '../x', but must be the name of a folder"),
        ("dropout", "the argument 'dropout' must be OPTION=VALUE"),
        ("model.dropout=[0.1", "model.dropout is '[0.1', which is not a YAML value"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_done(fresh, option, words):
    assert words in fresh.refused(option)
    assert not (fresh.cwd / "sst2").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda text: text.replace("models: [", "models: [["), "sst2.yaml, line "),
        (lambda text: text.replace("dropout: 0.5", "dropout: ???"), "model.dropout has no value"),
        (lambda text: text.replace("dropout: 0.5", "dropout: ${no}"), "settings of lrn refer to nothing: "),
        (lambda text: re.sub(r"models: \[.*\]", "models: rnn", text), "models has rnn, but must have only "),
        (lambda text: b"\xff", "sst2.yaml: 'utf-8' codec can't decode"),
        (lambda text: "- lrn", "sst2.yaml has no settings"),
        (lambda text: text.replace("min_count: 2", "min_count:"), "min_count has no value"),
        (lambda text: text.replace("min_count: 2", ""), "sst2.yaml: min_count is missing"),
        (lambda text: text.replace("  max_positions: 512", ""), "sst2.yaml: task.max_positions is missing"),
        (
            lambda text: re.sub(r"optimizer:\n.*", "optimizer: adam", text),
            "optimizer is adam, but must have opt",
        ),
    ],
)
def test_a_wrong_yaml_file_is_refused(start, tmp_path, change, words):
    """Of a copy of the recipe; what is wrong in it is the setting of lrn."""
    for folder in ("recipe", "classification"):
        shutil.copytree(EXAMPLES / folder, tmp_path / folder)
    yaml = tmp_path / "classification/sst2.yaml"
    write(yaml, change(yaml.read_text()))
    data(tmp_path / "data")
    recipe = Recipe(start, tmp_path, tmp_path / "classification/sst2.py", "--data", "data")
    assert words in recipe.refused()
    assert not (tmp_path / "sst2/runs").exists()


def test_names_with_signs_that_mean_something_elsewhere(start, tmp_path):
    """Hydra sweeps over commas, fairseq splits paths at colons, and a file of vectors is an input."""
    cwd = tmp_path / "a b,c:d='e'"
    data(cwd / "da,ta:1")
    write(cwd / "vectors 1", "1 8\nfilm " + " ".join("12345678") + "\n")
    options = [*SMALL, "run=my run,1", "model.encoder_embed_path=vectors 1", "common.wandb_project=null"]
    recipe = Recipe(start, cwd, "classification/sst2.py", "--data", "da,ta:1", "--work", "w,o:r k", *options)
    output = recipe("optimizer.adam_betas=(0.9, 0.98)")
    assert table(output)[1][0] == "my run,1"
    assert (cwd / "w,o:r k/runs/my run,1/checkpoint_best.pt").exists()
    assert "adam_betas: (0.9, 0.98)" in (cwd / "w,o:r k/runs/my run,1/train.yaml").read_text()
    write(cwd / "vectors 1", "1 8\nfilm " + " ".join("12345679") + "\n")
    assert "before model.encoder_embed_path changed" in recipe.refused("optimizer.adam_betas=(0.9, 0.98)")


def foreign(name, folder):
    if name == "an old recipe's":
        for file in (
            "raw/train.label",
            "bin/dict.txt",
            "lrn/checkpoint_best.pt",
            "lrn/settings",
            ".gitignore",
        ):
            write(folder / file, file)
    elif name == "a user's":
        for file in ("download/thesis.tex", "raw/notes", "text/train.label", ".gitignore", ".lock"):
            write(folder / file, file)
    elif name == "another recipe's":
        write(folder / "recipe.json", json.dumps({"recipe": "sick", "steps": {}, "hashes": {}}))
    elif name == "another program's":
        write(folder / "recipe.json", json.dumps({"recipe": "sst2", "ingredients": ["butter"]}))
    elif name == "no JSON":
        write(folder / "recipe.json", "[")
    return folder


@pytest.mark.parametrize(
    "name", ["an old recipe's", "a user's", "another recipe's", "another program's", "no JSON"]
)
@pytest.mark.parametrize("work", ["work", "."])
def test_a_folder_that_is_not_the_recipes_is_left_alone(fresh, name, work):
    folder = foreign(name, fresh.cwd / work if work != "." else fresh.cwd)
    before = times(fresh.cwd)
    words = "belongs to the recipe sick" if name == "another recipe's" else "is not empty and has no manifest"
    assert words in fresh.refused("--work", work)
    assert times(folder) | before == times(fresh.cwd)


def test_what_a_user_puts_into_the_work_folder_stays(fresh):
    (fresh.cwd / "sst2").mkdir()  # an empty one is taken
    fresh("run=compare")
    work = fresh.cwd / "sst2"
    mine = [
        work / name for name in ("notes", "text/notes", "runs/compare/notes", "runs/raw/notes", "bin/notes")
    ]
    for path in mine:
        write(path, "mine")
    data(fresh.cwd / "data", dev=SENTENCES[50:60])
    fresh.refused("run=download")
    (work / "runs/compare/checkpoint_last.pt").unlink()
    (work / "runs/compare/checkpoint_best.pt").unlink()
    assert "runs/raw exists, but is not this recipe's: give another run=NAME" in fresh.refused("run=raw")
    write(work / "runs/download", "mine")
    assert "Not a directory" in fresh.refused("run=download")
    (work / "text/valid.label").unlink()
    fresh("run=lrn")
    assert all(path.read_text() == "mine" for path in [*mine, work / "runs/download"])
    assert (work / "runs/compare/train.log").exists()


def test_a_file_in_the_way_is_not_overwritten(fresh):
    fresh.refused("models=lrn", "task.max_positions=2")
    work = fresh.cwd / "sst2"
    write(work / "runs/lrn/accuracy.json", "mine")
    assert "runs/lrn exists, but is not this recipe's" in fresh.refused()
    shutil.rmtree(work / "runs")
    fresh()
    os.remove(work / "runs/lrn/accuracy.json")
    manifest = json.loads((work / "recipe.json").read_text())
    del manifest["steps"]["runs/lrn/accuracy"]
    write(work / "recipe.json", json.dumps(manifest))
    write(work / "runs/lrn/accuracy.json", "mine")
    assert " exists, but is not this recipe's: move it away" in fresh.refused()
    assert (work / "runs/lrn/accuracy.json").read_text() == "mine"


def test_lost_and_changed_results_are_made_again(fresh):
    first = fresh()
    work = fresh.cwd / "sst2"
    label, best = work / "text/train.label", work / "runs/lrn/checkpoint_best.pt"
    right = label.read_bytes()
    write(label, right.replace(b"1", b"0"))
    (work / "bin/dict.txt").unlink()
    again = fresh()
    assert label.read_bytes() == right and (work / "bin/dict.txt").exists()
    assert table(again) == table(first)
    assert "== text\n" in again and "== binarize\n" in again and "runs/lrn/train: done before" in again
    (work / "runs/lrn/accuracy.json").unlink()
    assert "== runs/lrn/accuracy\n" in fresh()
    best.unlink()
    assert "checkpoint_best.pt does not exist: remove the run's folder to train again" in fresh.refused()
    shutil.rmtree(work / "runs/lrn")
    assert table(fresh())[1][:5] == table(first)[1][:5]


def test_data_that_failed_and_were_mended_are_read_again(fresh):
    write(fresh.cwd / "data/dev.txt", "2 a film is fine .\n")
    failed = fresh.refused()
    assert failed.endswith("data/dev.txt, line 1: the label 2 is not in the training set, which has 0, 1")
    write(fresh.cwd / "data/dev.txt", "1 a film is fine .\n")
    fresh()
    assert lines(fresh.cwd / "sst2/text/valid.label") == ["1"]


def test_a_second_run_in_the_same_folder_is_refused(sst2):
    with open(sst2.work / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is at work in" in sst2.refused(*SMALL)


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_training_goes_on(fresh, signal_):
    process = fresh.start("optimization.max_epoch=400")
    run = fresh.cwd / "sst2/runs/lrn"
    while process.is_alive() and not (run / "checkpoint_last.pt").exists():
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal_)
    process.join()
    output = process.output.read_text()
    if signal_ == signal.SIGTERM:
        assert output.rstrip().endswith("sst2.py: interrupted; the same command goes on from there")
        trained = int(run.joinpath("train.log").read_text().count("| valid on 'valid' subset"))
        assert 1 <= trained < 400
        assert "optimization.max_epoch became 3" in fresh.refused("optimization.max_epoch=3")
    else:  # the command lives on and has the lock
        assert "another run is at work in" in fresh.refused("optimization.max_epoch=400")
        os.kill(int(children[-1]), signal.SIGKILL)


def test_a_failing_command_shows_its_end(fresh):
    """The next attempt, which begins anew, has a log of its own."""
    output = fresh("dataset.train_subset=none", "model.encoder_embed_dim=9", status=1)
    assert "  | " in output and "fairseq-hydra-train ended with 1, see" in output
    assert output.rstrip().split("\n")[-1].endswith("sst2/runs/lrn/train.log")
    output = fresh()  # nothing was trained, so that other settings are none
    log = (fresh.cwd / "sst2/runs/lrn/train.log").read_text()
    assert re.findall("num. shared model params: ([^ ]+)", log) == [table(output)[1][1]]


def test_every_recipe_has_all_its_settings_in_yaml():
    assert len(RECIPES) == 11
    assert not list(EXAMPLES.glob("*/*.sh")) or [path.name for path in EXAMPLES.glob("*/*.sh")] == ["cuda.sh"]


@pytest.mark.parametrize("script", RECIPES, ids=lambda path: path.stem)
def test_a_python_without_the_packages_is_told(script):
    done = subprocess.run([sys.executable, "-ES", str(script)], stderr=subprocess.PIPE, encoding="utf-8")
    assert done.returncode == 1
    assert done.stderr.startswith(f"{script.name}: No module named 'omegaconf' in {sys.executable}: use the ")
    assert done.stderr.count("\n") == 1


def test_a_missing_package_is_told():
    runner.require("scikit-learn", "sklearn")
    with pytest.raises(runner.Refused, match=r"there is no package no-such: .* -m pip install no-such"):
        runner.require("no-such", "no_such")


def test_a_hangup_is_an_interruption_but_for_nohup(monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    recipe = SimpleNamespace(execute=lambda: os.kill(os.getpid(), signal.SIGHUP))
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        runner.main(lambda words: recipe)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(SystemExit, match="interrupted; the same command goes on from there"):
            runner.main(lambda words: recipe)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

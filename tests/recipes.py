"""A recipe of examples/, run as a user would, its commands in forks of a process that imported fairseq."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))
import recipe as runner  # noqa: E402

# the recipes' commands, but those that are no Python
FORKED = f"""
import os, sys
sys.path[:0] = [{str(EXAMPLES)!r}, {str(ROOT / "tests")!r}]
os.chdir({{folder!r}})
os.environ.update({{variables!r}})
import forked, subprocess
subprocess.Popen = forked.Popen
"""


class Recipe:
    """The recipe ``script`` of examples/, run in the folder ``cwd``, with the fixture ``start``.

    ``words`` come before those of a call. A call returns what is printed, the table last.
    """

    def __init__(self, start, cwd, script, *words):
        self.begin, self.cwd, self.script, self.words = start, cwd, EXAMPLES / script, words

    def start(self, *words, **variables):
        before = FORKED.format(folder=str(self.cwd), variables={"PYTHONPATH": str(ROOT), **variables})
        return self.begin(self.script, *self.words, *words, before=before)

    def __call__(self, *words, status=0, **variables):
        process = self.start(*words, **variables)
        process.join()
        output = process.output.read_text(encoding="utf-8")
        assert process.exitcode == status, output[-4000:]
        return output

    def apart(self, *words, **variables):
        """As a call, but the recipe and its commands are processes of their own."""
        command = [sys.executable, str(self.script), *self.words, *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **variables}
        done = subprocess.run(
            command,
            cwd=self.cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.stdout

    def refused(self, *words):
        """The last line, the one sentence with which the recipe ends."""
        output = self(*words, status=1)
        assert "Traceback" not in output, output[-4000:]
        return output.rstrip("\n").split("\n")[-1]


def load(script, monkeypatch):
    """The recipe's class."""
    name, folder = Path(script).stem, (EXAMPLES / script).parent
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    found = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == name]
    return next(x for x in found if issubclass(x, runner.Recipe))


def table(output):
    """The rows of the table, the header first."""
    rows = [line for line in output.split("\n") if line.startswith("| ")]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows if "---" not in row]


def lines(path):
    return path.read_bytes().decode("utf-8").split("\n")[:-1]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))


def times(folder):
    """When each file of a folder was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


PAIRS = """--task translation -s {} -t {}
    --criterion chunked_label_smoothed_cross_entropy --label-smoothing 0.1
    --optimizer adam --adam-betas (0.9,_0.98) --lr-scheduler inverse_sqrt --warmup-init-lr 1e-7
    --max-tokens 4096 --required-batch-size-multiple 1 --keep-last-epochs 10 --share-all-embeddings """
CELLS = "--cell lrn --optimizer adam --maximize-best-checkpoint-metric --no-epoch-checkpoints --clip-norm 5 "
SENTENCES = f"""{CELLS} --task sentence_prediction --num-classes {{}} --criterion sentence_prediction
    --required-batch-size-multiple 1 --best-checkpoint-metric accuracy """
# what each recipe has always given to fairseq-train, but for --seed 1, --num-workers 0 and the log's form
TRAINED = {
    "multi30k": PAIRS.format("en", "de")
    + "--arch lrn_tiny --dropout 0.3 --lr 0.005 --warmup-updates 2000 --max-update 3500",
    "iwslt14": PAIRS.format("de", "en")
    + """--arch lrn_iwslt_de_en --dropout 0.3 --weight-decay 0.0001 --clip-norm 1 --lr 0.0005
    --warmup-updates 4000 --max-update 50000""",
    "wmt14": PAIRS.format("en", "de")
    + """--arch lrn_wmt_en_de --dropout 0.1 --clip-norm 1 --lr 0.0007 --warmup-updates 4000 --update-freq 8
    --max-update 100000""",
    "sst2": SENTENCES.format(2)
    + """--arch lrn_classifier --encoder-embed-dim 100 --encoder-hidden-size 100 --dropout 0.5 --lr 0.001
    --batch-size 50 --max-epoch 6""",
    "documents": SENTENCES.format(2)
    + """--arch lrn_classifier --encoder-embed-dim 300 --encoder-hidden-size 64 --dropout 0.2 --lr 0.001
    --batch-size 64 --max-positions 512 --shorten-method truncate --max-epoch 5""",
    "sick": SENTENCES.format(3)
    + """--arch lrn_inference --encoder-embed-dim 100 --encoder-hidden-size 100 --dropout 0.2 --lr 0.001
    --batch-size 32 --max-epoch 10""",
    "snli": SENTENCES.format(2)
    + """--arch lrn_inference --encoder-embed-dim 300 --encoder-hidden-size 300 --dropout 0.2 --lr 0.0005
    --batch-size 64 --max-epoch 10""",
    "wikitext2": """--task truncated_bptt_lm --arch lrn_lm --cell lrn --cell-activation identity
    --decoder-embed-dim 192 --decoder-hidden-size 192 --decoder-layers 2 --dropout 0.4 --embed-dropout 0.1
    --criterion adaptive_loss --adaptive-softmax-cutoff 2000,6000 --adaptive-softmax-dropout 0.2
    --ddp-backend legacy_ddp --optimizer adam --lr 0.002 --force-anneal 4 --lr-shrink 0.5 --clip-norm 0.25
    --tokens-per-sample 35 --batch-size 20 --max-epoch 8 --no-epoch-checkpoints""",
    "conll2003": CELLS
    + """--task tagging --required-batch-size-multiple 1 --arch lrn_tagger --criterion model
    --encoder-embed-dim 100 --encoder-hidden-size 100 --char-embed-dim 50 --dropout 0.5 --lr 0.005
    --lr-scheduler polynomial_decay --warmup-updates 100 --total-num-update 3512 --max-update 3512
    --batch-size 32 --best-checkpoint-metric f1""",
    "squad": CELLS
    + """--task reading_comprehension --arch lrn_reader --encoder-embed-dim 64 --encoder-hidden-size 32
    --char-embed-dim 16 --dropout 0 --criterion cross_entropy --lr 0.004 --batch-size 16
    --required-batch-size-multiple 1 --max-epoch 15 --best-checkpoint-metric f1 --log-interval 10""",
}
OWN = {"data": None, "save_dir": None, "user_dir": None}  # where a run is, and not how it was trained


def trained(name):
    """The options of ``fairseq-train`` that give the recipe's model."""
    words = f"--seed 1 --num-workers 0 --log-format simple --log-interval 20 {TRAINED[name]}".split()
    return [word.replace("_", " ") if word.startswith("(") else word for word in words]


def assert_trains_the_same(run, work, name, folder, *options):
    """The run ``name`` has the weights and the configuration that ``fairseq-train`` saves, of its data."""
    import fairseq_lrn  # noqa: F401  lets torch.load read fairseq's checkpoints

    recipe = json.loads((work / "recipe.json").read_text())["recipe"]
    run("fairseq-train", work / "bin", "--user-dir", ROOT / "fairseq_lrn", *trained(recipe), *options,
        "--save-dir", folder)  # fmt: skip
    here, there = (
        torch.load(path / "checkpoint_last.pt", weights_only=True) for path in (work / "runs" / name, folder)
    )
    assert here["model"].keys() == there["model"].keys()
    assert all(torch.equal(here["model"][key], there["model"][key]) for key in here["model"])
    for group in there["cfg"]:
        if there["cfg"][group] is not None:
            assert {**there["cfg"][group], **OWN} == {**here["cfg"][group], **OWN}, group


def assert_translates_natively(work, checkpoint):
    """The native translator knows the model of a translation recipe, which asks for it."""
    from fairseq.checkpoint_utils import load_model_ensemble

    from fairseq_lrn.inference import Translator

    (model,), _ = load_model_ensemble([str(work / checkpoint)], {"data": str(work / "bin")})
    translator = Translator(model.eval())
    assert translator.native() is not None, translator.reason
    name = checkpoint.replace("/checkpoint_", "/translate.").replace("/", ".").replace(".pt", ".log")
    log = (work / "logs" / name).read_text("utf-8")
    assert "'lrn_translation'" in log and "PyTorch's modules" not in log

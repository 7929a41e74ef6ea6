"""The quickstart's corpus, and the steps its script is made of."""

import fcntl
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "quickstart")]

import environment  # noqa: E402
import make_corpus  # noqa: E402


@pytest.fixture(scope="module")
def corpus():
    return make_corpus.build()


def words(sentence):
    return re.findall(r"[^\W\d_]+", sentence)


def test_sizes(corpus):
    assert {name: len(pairs) for name, pairs in corpus.items()} == {"train": 24000, "test": 1000}


def test_no_english_sentence_occurs_twice(corpus):
    sentences = [english for pairs in corpus.values() for english, _ in pairs]
    assert len(set(sentences)) == len(sentences)


def test_every_side_is_one_line_with_single_spaces(corpus):
    for pairs in corpus.values():
        for pair in pairs:
            for sentence in pair:
                assert sentence and sentence == " ".join(sentence.split())


@pytest.mark.parametrize("side", [0, 1], ids=["English", "German"])
def test_held_out_words_are_all_in_the_training_set(corpus, side):
    known = {word for pair in corpus["train"] for word in words(pair[side])}
    assert {word for pair in corpus["test"] for word in words(pair[side])} <= known


def test_held_out_sentences_are_mostly_translated_not_copied(corpus):
    assert sum(english != german for english, german in corpus["test"]) > 900


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000))
def test_any_seed_gives_one_corpus(seed):
    first = make_corpus.build(1500, 50, seed)
    assert first == make_corpus.build(1500, 50, seed)
    assert not {english for english, _ in first["train"]} & {english for english, _ in first["test"]}


def test_command_writes_every_sentence_as_a_line(tmp_path, corpus):
    subprocess.run([sys.executable, EXAMPLES / "quickstart" / "make_corpus.py", tmp_path], check=True)
    for name, pairs in corpus.items():
        for side, language in enumerate(("en", "de")):
            text = (tmp_path / f"{name}.{language}").read_text(encoding="utf-8")
            assert text == "".join(pair[side] + "\n" for pair in pairs)


def test_step_is_done_once_for_the_same_inputs(tmp_path):
    source, result, calls = tmp_path / "source", tmp_path / "result", []
    for content, expected in (("a", 1), ("a", 1), ("b", 2), ("b", 2), ("a", 3)):
        source.write_text(content)
        environment.step("Count", result, [source, "option"], lambda: calls.append((result / "old").touch()))
        assert len(calls) == expected
    (result / ".done").unlink()
    environment.step("Count", result, [source, "option"], lambda: calls.append(None))
    assert len(calls) == 4 and not (result / "old").exists()


@pytest.mark.parametrize("resumes", [False, True])
def test_unfinished_step_starts_over_or_resumes(tmp_path, resumes):
    result, seen = tmp_path / "result", []

    def work():
        seen.append((result / "half").exists())
        (result / "half").touch()
        if len(seen) < 3:
            raise KeyboardInterrupt if len(seen) == 1 else OSError("disk full")

    for message in ("Interrupted in step 'Train'", "Step 'Train' failed: disk full"):
        with pytest.raises(SystemExit, match=re.escape(message)):
            environment.step("Train", result, ["inputs"], work, resumes)
    environment.step("Train", result, ["inputs"], work, resumes)
    assert seen == [False, resumes, resumes]
    environment.step(
        "Train", result, ["other inputs"], lambda: seen.append((result / "half").exists()), resumes
    )
    assert seen[3:] == [False]


def test_failing_command_says_which_step_and_why(tmp_path, capfd):
    script = "import sys\nfor line in range(99): print('line', line)\nsys.exit('no space left')"
    with pytest.raises(SystemExit) as caught:
        environment.attempt(
            "Preprocess", lambda: environment.run([sys.executable, "-c", script], tmp_path / "log", "line 9.")
        )
    message = caught.value.code
    assert "Step 'Preprocess' failed" in message and "exited with 1" in message and "no space left" in message
    assert "line 98" in message and "line 50" not in message and str(tmp_path / "log") in message
    shown = [line for line in capfd.readouterr().out.splitlines() if line.endswith(tuple("0123456789"))]
    assert [int(line.split()[-1]) for line in shown] == list(range(90, 99))
    assert len((tmp_path / "log").read_text().splitlines()) == 100


def test_missing_command_says_which_step_and_why(tmp_path):
    with pytest.raises(SystemExit, match="Step 'Go' failed: no-such-command cannot be started"):
        environment.attempt("Go", lambda: environment.run(["no-such-command"], tmp_path / "log"))


@pytest.fixture
def checkout(tmp_path):
    """A folder with the README's two commands, but without what they need."""
    shutil.copytree(EXAMPLES / "quickstart", tmp_path / "examples" / "quickstart")
    shutil.copy(EXAMPLES / "environment.py", tmp_path / "examples")
    (tmp_path / "tests").mkdir()
    shutil.copy(EXAMPLES.parent / "tests" / "run.py", tmp_path / "tests")
    for name in ("setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(EXAMPLES.parent / name, tmp_path)
    return tmp_path


def call(script, *words):
    command = [sys.executable, "-B", script, *words]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("script", ["examples/quickstart/run.py", "tests/run.py"])
def test_help_and_wrong_arguments_start_nothing(checkout, script):
    before = sorted(checkout.rglob("*"))
    shown = call(checkout / script, "--help")
    assert shown.returncode == 0 and f"python3 {script}" in shown.stdout
    for wrong in ("--hlep", "--al"):
        refused = call(checkout / script, wrong)
        assert refused.returncode == 2 and f"unrecognized arguments: {wrong}" in refused.stderr
    assert sorted(checkout.rglob("*")) == before


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs a newer Python")
@pytest.mark.parametrize(
    "words, passed",
    [
        ("tests/ops --all -- -k scan", "--all tests/ops -k scan"),
        ("--all tests/ops tests/modules", "--all tests/ops tests/modules"),
        ("-- -k scan -- --style", "-k scan -- --style"),
    ],
)
def test_pytest_gets_its_files_and_options(monkeypatch, tmp_path, words, passed):
    called = []
    monkeypatch.setattr("os.execv", lambda path, command: called.extend(command))
    monkeypatch.setattr(environment, "attempt", lambda title, work: None)  # no style, no installation
    monkeypatch.setattr(environment, "VENV", Path(sys.prefix))
    monkeypatch.setattr(environment, "LOGS", tmp_path)
    monkeypatch.setattr(environment, "complete", lambda key: True)
    monkeypatch.setattr("sys.argv", ["tests/run.py", *words.split()])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES.parent / "tests" / "run.py"), run_name="__main__")
    assert " ".join(called).endswith(f" --durations 10 {passed}")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs a newer Python")
@pytest.mark.parametrize("script", ["examples/quickstart/run.py", "tests/run.py"])
@pytest.mark.parametrize("target", ["/proc/version", "/proc/sys"], ids=["file", "read-only"])
def test_a_folder_that_cannot_be_written_is_named(checkout, script, target):
    (checkout / "build").symlink_to(target)
    done = call(checkout / script)
    assert done.returncode == 1
    path = checkout / "build" / "environment" / "environment.lock"
    assert re.fullmatch(rf"{path} cannot be written: .+\n", done.stderr)


def test_two_at_once_wait_for_one_another(tmp_path):
    program = """
import sys
from pathlib import Path
import environment
environment.LOGS = Path(sys.argv[1])
with environment.alone("quickstart"):
    print("done", flush=True)
"""
    (tmp_path / "quickstart.lock").touch()
    with (tmp_path / "quickstart.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-c", program, tmp_path]
        second = subprocess.Popen(command, cwd=EXAMPLES, stdout=subprocess.PIPE, text=True)
        assert second.stdout.readline().startswith("Another process is at work here; waiting for it to end")
        assert second.poll() is None
    assert second.communicate()[0] == "done\n" and second.returncode == 0

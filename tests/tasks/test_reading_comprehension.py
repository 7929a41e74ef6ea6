"""The task reading_comprehension: SQuAD's scores, the best spans, batches, sums over batches."""

import json

import numpy as np
import pytest
import torch
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.data import Dictionary
from fairseq.logging import metrics
from fairseq.models import BaseFairseqModel

from fairseq_lrn.tasks.reading_comprehension import (
    ReadingComprehensionConfig,
    ReadingComprehensionDataset,
    ReadingComprehensionTask,
    best_spans,
    exact_match,
    f1,
    read_examples,
)

CASES = [  # prediction, answer, exact match, F1, by the definition of SQuAD's evaluation script
    ("Denver Broncos", "Denver Broncos", 1, 1),
    ("The  Denver\tBroncos!", "denver broncos", 1, 1),
    ("$3.50", "350", 1, 1),
    ("well-known", "well known", 0, 0),
    ("308 points", "308", 0, 2 / 3),
    ("a an the", "the", 1, 0),
    ("Santa Clara, California", "Levi's Stadium in Santa Clara", 0, 4 / 8),
    ("New New York", "New York New York", 0, 6 / 7),
    ("anthem", "the", 0, 0),
    ("“The”", "“ ”", 1, 1),
    ("“The”", "”", 0, 2 / 3),
]


@pytest.mark.parametrize(("prediction", "answer", "em", "overlap"), CASES)
def test_scores(prediction, answer, em, overlap):
    assert exact_match(prediction, answer) == em
    assert f1(prediction, answer) == pytest.approx(overlap)
    assert f1(answer, prediction) == pytest.approx(overlap)


@pytest.mark.parametrize("longest", [1, 2, 5, 9, 30])
@pytest.mark.parametrize("seed", range(3))
def test_best_spans_are_the_best_of_all(longest, seed):
    torch.manual_seed(seed)
    scores = 3 * torch.randn(6, 2, 9, dtype=torch.double)
    scores[1, :, 5:] = float("-inf")
    scores[2, :, :4] = float("-inf")
    scores[3, :, 1:] = float("-inf")
    lprobs = scores.log_softmax(2)
    for (first, last), (start, end) in zip(best_spans(lprobs, longest).tolist(), lprobs.exp().tolist()):
        spans = [(i, j) for i in range(9) for j in range(i, min(9, i + longest))]
        assert (first, last) == max(spans, key=lambda span: start[span[0]] * end[span[1]])


def tokens(text):
    position, offsets = 0, []
    for word in text.split():
        position = text.index(word, position)
        offsets.append((position, position + len(word)))
        position += len(word)
    return offsets


PASSAGES = ["the cat  sat on the mat", "Ærø is an island", "one", "a b c d e f g h"]
QUESTIONS = [  # question, passage, span, answers
    ("who sat", 0, (1, 1), ["cat", "the cat  sat"]),
    ("where", 0, (3, 5), ["on the mat"]),
    ("what is Ærø", 1, (3, 3), ["island"]),
    ("how many", 2, (0, 0), ["one"]),
    ("which letters", 3, (2, 4), ["c d e", "x"]),
]


def build_task(**options):
    dictionary = Dictionary()
    for word in "the cat sat on mat is one who where what how many".split():
        dictionary.add_symbol(word)
    task = ReadingComprehensionTask(ReadingComprehensionConfig(data="", **options), dictionary)
    passages = [{"text": text, "tokens": tokens(text)} for text in PASSAGES]
    questions = [
        {"id": f"q{i}", "tokens": words.split(), "passage": passage, "span": span, "answers": answers}
        for i, (words, passage, span, answers) in enumerate(QUESTIONS)
    ]
    task.datasets["valid"] = ReadingComprehensionDataset(
        passages, questions, dictionary, task.cfg.max_word_length
    )
    return task


def batch(task, indices):
    dataset = task.dataset("valid")
    return dataset.collater([dataset[i] for i in indices])


def test_batches_keep_the_bytes_of_unknown_words():
    task = build_task(max_word_length=4)
    sample = batch(task, [2, 1])
    net_input, dictionary = sample["net_input"], task.source_dictionary
    assert sample["id"].tolist() == [2, 1]
    assert sample["target"].tolist() == [[3, 3], [3, 5]]
    assert sample["ntokens"] == 4
    unk, pad, the = dictionary.unk(), dictionary.pad(), dictionary.index("the")
    assert net_input["passage_tokens"][0].tolist() == [unk, dictionary.index("is"), unk, unk, pad, pad]
    assert net_input["passage_tokens"][1, 4] == the
    assert net_input["passage_chars"].shape == (2, 6, 4)
    written = [[x - 1 for x in word if x] for word in net_input["passage_chars"][0].tolist()]
    assert [bytes(word) for word in written] == ["Ærø".encode()[:4], b"is", b"an", b"isla", b"", b""]
    assert bytes(x - 1 for x in net_input["question_chars"][0, 2].tolist()) == "Ærø".encode()[:4]
    assert net_input["question_tokens"][1].tolist() == [dictionary.index("where"), pad, pad]


def test_batches_are_made_by_length_of_passage():
    dataset = build_task().dataset("valid")
    with_seed = []
    for seed in range(20):
        np.random.seed(seed)
        order = dataset.ordered_indices()
        assert [dataset.num_tokens(i) for i in order] == [1, 4, 6, 6, 8]
        assert sorted(order) == [0, 1, 2, 3, 4]
        with_seed.append(tuple(order))
    assert len(set(with_seed)) == 2


class Stub(BaseFairseqModel):
    """Is sure of one span a question, looked up by the first word of its passage and question."""

    def __init__(self, dataset, spans):
        super().__init__()
        self.spans = {}
        for i, span in enumerate(spans):
            sample = dataset.collater([dataset[i]])["net_input"]
            self.spans[self.key(sample, 0)] = span

    def key(self, net_input, row):
        words = [net_input[f"{name}_chars"][row] for name in ("question", "passage")]
        return tuple(tuple(chars[chars > 0].tolist()) for chars in words)

    def forward(self, **net_input):
        scores = torch.zeros(len(net_input["passage_tokens"]), 2, net_input["passage_tokens"].size(1))
        for row, score in enumerate(scores):
            for side, place in zip(score, self.spans[self.key(net_input, row)]):
                side[place] = 9
        return scores


@pytest.mark.parametrize("batches", [[[0, 1, 2, 3, 4]], [[3], [4, 0, 1], [2]], [[0], [1], [2], [3], [4]]])
def test_scores_do_not_depend_on_the_batches(batches):
    """The best of a question's answers counts; the percentages are over questions, not over batches."""
    task = build_task()
    spans = [(0, 2), (3, 4), (2, 3), (0, 0), (6, 7)]
    model = Stub(task.dataset("valid"), spans)
    criterion = CrossEntropyCriterion(task, sentence_avg=False)
    answers = {}
    metrics.reset()
    with metrics.aggregate() as aggregate:
        for indices in batches:
            sample = batch(task, indices)
            answers.update(task.predict(sample, model))
            loss, size, log = task.valid_step(sample, model, criterion)
            lprobs = model(**sample["net_input"]).log_softmax(2)
            entropies = -lprobs.gather(2, sample["target"][:, :, None])
            torch.testing.assert_close(loss / size, entropies.mean())
            task.reduce_metrics([log], criterion)
    assert answers == {"q0": "the cat  sat", "q1": "on the", "q2": "an island", "q3": "one", "q4": "g h"}
    values = aggregate.get_smoothed_values()
    assert values["em"] == 100 * 3 / 5  # q0, q2 and q3
    # of "on the" and "on the mat" remain "on" and "on mat"
    assert values["f1"] == pytest.approx(100 * (1 + 2 / 3 + 1 + 1 + 0) / 5, abs=0.005)


def test_scores_of_several_workers_are_summed():
    task = build_task()
    logs = [
        {"loss": 1.0, "ntokens": 2, "nsentences": 1, "sample_size": 2, "em": 1.0, "f1": 1.0},
        {"loss": 1.0, "ntokens": 6, "nsentences": 3, "sample_size": 6, "em": 0.0, "f1": 0.5},
    ]
    with metrics.aggregate() as aggregate:
        task.reduce_metrics(logs, CrossEntropyCriterion(task, sentence_avg=False))
    assert aggregate.get_smoothed_values()["em"] == 25
    assert aggregate.get_smoothed_values()["f1"] == 37.5


def test_a_model_that_diverged_is_named():
    task = build_task()
    model = Stub(task.dataset("valid"), [(0, 0)] * 5)
    model.forward = lambda **net_input: Stub.forward(model, **net_input) * torch.tensor(float("nan"))
    with pytest.raises(ValueError, match="question q3 has no answer, as its scores are NaN"):
        task.predict(batch(task, [3]), model)


PASSAGE = {"text": "a b", "tokens": [[0, 1], [2, 3]]}
QUESTION = {"id": "q", "tokens": ["who"], "passage": 0, "span": [0, 1], "answers": ["a b"]}


def test_examples_are_read_as_they_are(tmp_path):
    write(tmp_path, [PASSAGE], [QUESTION, {**QUESTION, "id": "r"}])
    assert read_examples(str(tmp_path / "dev")) == ([PASSAGE], [QUESTION, {**QUESTION, "id": "r"}])


@pytest.mark.parametrize(
    "kind, row, message",
    [
        ("passages", {**PASSAGE, "tokens": []}, "dev.passages, line 2, has no words"),
        ("passages", {"text": "a"}, "dev.passages, line 2, has no tokens"),
        ("passages", [], "dev.passages, line 2, has no text, tokens"),
        ("passages", None, "dev.passages, line 2, is not JSON"),
        ("questions", {"id": "x", "tokens": ["a"]}, "line 2, has no answers, passage, span"),
        ("questions", {**QUESTION, "tokens": []}, "dev.questions, line 2, has no words"),
        ("questions", {**QUESTION, "id": "x", "answers": []}, "line 2, has no answers"),
        ("questions", {**QUESTION, "id": "x", "passage": 1}, "has the passage 1, but there are 1"),
        ("questions", {**QUESTION, "id": "x", "span": [1, 2]}, "span 1 to 2, but the words .* are 0 to 1"),
        ("questions", {**QUESTION, "id": "x", "span": [1, 0]}, "span 1 to 0, but the words .* are 0 to 1"),
        ("questions", QUESTION, "line 2, has the id q, which another question has"),
    ],
)
def test_a_wrong_example_is_named_with_its_line(tmp_path, kind, row, message):
    rows = {"passages": [PASSAGE], "questions": [QUESTION]}
    rows[kind].append(row)
    write(tmp_path, **rows)
    if row is None:
        (tmp_path / "dev.passages").write_text(json.dumps(PASSAGE) + "\n{\n")
    task = build_task()
    task.cfg.data = str(tmp_path)
    with pytest.raises(ValueError, match=message):
        task.load_dataset("dev")


def write(folder, passages, questions):
    for kind, rows in (("passages", passages), ("questions", questions)):
        (folder / f"dev.{kind}").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_answers_may_not_be_empty():
    with pytest.raises(ValueError, match="--max-answer-length is 0, but must be at least 1"):
        build_task(max_answer_length=0)

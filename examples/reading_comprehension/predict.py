"""A split's answers for SQuAD's evaluation script: python predict.py CHECKPOINT BIN SPLIT OUTPUT"""

import json
import sys
from pathlib import Path

from fairseq.checkpoint_utils import load_model_ensemble_and_task

import fairseq_lrn.models
import fairseq_lrn.tasks  # noqa: F401

checkpoint, folder, split, output = sys.argv[1:]
[model], _, task = load_model_ensemble_and_task([checkpoint], arg_overrides={"data": folder})
model.eval()
task.load_dataset(split)
batches = task.get_batch_iterator(task.dataset(split), max_sentences=32)
answers = {}
for sample in batches.next_epoch_itr(shuffle=False):
    answers.update(task.predict(sample, model))
Path(output).write_text(json.dumps(answers))

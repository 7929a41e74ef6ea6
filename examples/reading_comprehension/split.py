"""A SQuAD file in three, of every ten articles one to valid and one to test: python split.py FILE FOLDER"""

import json
import sys
from pathlib import Path

file, folder = Path(sys.argv[1]), Path(sys.argv[2])
articles = json.loads(file.read_text(encoding="utf-8"))["data"]
for split, digits in (("train", range(8)), ("valid", [8]), ("test", [9])):
    data = [article for i, article in enumerate(articles) if i % 10 in digits]
    if not data:
        raise ValueError(f"{file} has {len(articles)} articles, but must have at least 10")
    (folder / f"{split}.json").write_text(json.dumps({"version": "1.1", "data": data}), encoding="utf-8")

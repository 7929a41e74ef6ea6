"""``python -m fairseq_lrn`` prints the directory to pass as ``--user-dir``."""

from pathlib import Path

print(Path(__file__).resolve().parent)

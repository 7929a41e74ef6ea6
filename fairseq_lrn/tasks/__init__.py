"""fairseq tasks that fairseq itself lacks. Importing this package registers them, and criteria."""

from .. import criterions, fairseq_patches  # noqa: F401
from .reading_comprehension import ReadingComprehensionTask
from .tagging import TaggingTask
from .translation import LRNTranslationTask
from .truncated_bptt_lm import TruncatedBPTTLMTask

__all__ = ["LRNTranslationTask", "ReadingComprehensionTask", "TaggingTask", "TruncatedBPTTLMTask"]

fairseq_patches.apply()

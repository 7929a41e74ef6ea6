"""fairseq tasks, where fairseq has none that fits; importing this package registers them."""

from .reading_comprehension import ReadingComprehensionTask
from .tagging import TaggingTask
from .truncated_bptt_lm import TruncatedBPTTLMTask

__all__ = ["ReadingComprehensionTask", "TaggingTask", "TruncatedBPTTLMTask"]

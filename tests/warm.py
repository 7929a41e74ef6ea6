"""Imported once, by the process that commands are forked from: it does what each of them would begin with.

Importing fairseq and making its configuration takes most of a command's time.
"""

import gc
import importlib

# torch._dynamo is what making an optimizer imports
for name in ("pytest", "torch._dynamo", "fairseq.trainer", "fairseq.sequence_generator", "sacrebleu"):
    importlib.import_module(name)

from fairseq import options  # noqa: E402
from fairseq.dataclass.utils import convert_namespace_to_omegaconf  # noqa: E402

# fills the caches of hydra's parser
words = ["data", "--arch", "transformer"]
convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), words))

gc.collect()
gc.freeze()  # what is here stays, and no command's collector need look at it

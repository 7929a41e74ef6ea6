"""Lightweight Recurrent Network (Zhang and Sennrich, ACL 2019) as a fairseq plugin.

Importing this package changes nothing and loads nothing else. Importing ``fairseq_lrn.models`` and
``fairseq_lrn.tasks`` registers them with fairseq.
"""

import os
import sys

__version__ = "0.1.0"


class _Folders(list):
    """The package's ``__path__``, which registers models and tasks when fairseq finds ``--user-dir`` in it.

    fairseq imports models and tasks of a package that it imports itself. If a program imported the package
    before, fairseq only looks them up here and logs "has already been imported".
    """

    def __contains__(self, folder: object) -> bool:
        here = isinstance(folder, str) and os.path.realpath(folder) in map(os.path.realpath, self)
        if here and "fairseq" in sys.modules:
            from . import models, tasks  # noqa: F401
        return here


__path__ = _Folders(__path__)

"""The top of rlsys: command line, configuration, supervision. Plug-ins import the interfaces from here; no torch is loaded."""

__version__ = "0.1.0"

from pathlib import Path as _Path

import actors as _actors
import learner as _learner
import protocol as _protocol

for _package in (_actors, _learner, _protocol):
    if _Path(_package.__file__ or "").resolve().parent.parent != _Path(__file__).resolve().parent.parent:
        raise ImportError(
            f"rlsys needs its own package {_package.__name__!r}, but Python finds another one at {_package.__file__}; "
            "start from another directory or rename that one"
        )

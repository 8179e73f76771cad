"""The operators, a file each: that the file is there makes its operator known.

`privinf.graph.node.Node` says what a file declares. An operator of somebody else's is known in the same way once its module is imported:
an installed distribution names that module as an entry point of the group `privinf.ops`. It imports `privinf.graph` and other operators,
and no more of this package, which is being imported then.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points

for found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{found.name}")
for entry in entry_points(group=__name__):
    entry.load()

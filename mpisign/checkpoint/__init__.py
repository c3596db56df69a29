"""Save a job and go on with it later, on the same number of ranks bit for bit, on another by a rule.

A directory holds checkpoints, each a folder ``step-00000120``:

- ``shared.pt``: what is the same on all ranks, once: ``model``, ``optimizer``, ``scheduler``, ``scaler``, ``step``,
  ``extra``. Without a job: ``torch.load("step-00000120/shared.pt", weights_only=True)["model"]``.
- ``rank-00000.pt``, ...: what is a rank's own: its memory (momentum, error feedback, ...), its states of random
  number generators, its buffers (BatchNorm's statistics), its loss scale. With ``every=`` also the wrapped optimizer's
  state, its schedule and, within a window, the rank's parameters; ``shared.pt`` then has the common ones.
- ``manifest.json``: size and CRC-32 of every file. This finds damage; it is no protection against forgery.

The files are written beside, under a name that ends in ``.tmp``; when all ranks' are on the disk, one rename makes
them a checkpoint. A job that is killed leaves the last one as it was. The directory must be on a file system that
all nodes share, and belongs to one job at a time, which ``owner.json`` names; any job may load from it. Loading never
executes code from a file.
"""

from mpisign.checkpoint.loading import Resumed, load, newest
from mpisign.checkpoint.saving import save, wait

__all__ = ["Resumed", "load", "newest", "save", "wait"]

"""The rank of a training, with its weights split over CPUs by FSDP2: `python -m tests.stages.sharded_rank FOLDER`.

torch's FSDP2 works over gloo; accelerate knows FSDP on accelerators only and trains unsplit copies on CPUs without a
word. So its state is told what it would be told on GPUs. All else is what runs there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from proxytune.stages import rank

UNSPLIT = AcceleratorState.__init__


def split(self, *arguments, fsdp_plugin=None, **more):
    UNSPLIT(self, *arguments, fsdp_plugin=fsdp_plugin, **more)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
    if "fsdp_plugin" in vars(self):  # its state is one for all of its objects
        self.distributed_type = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = split
    rank.main(Path(sys.argv[1]))

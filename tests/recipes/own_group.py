"""A trainer of somebody's own that has made the process group, and then calls clipkit's pretrain."""

import os
import sys
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from torch import distributed

from clipkit.command.compose import compose, register_resolvers, resolved, start_hydra
from clipkit.recipes.pretrain import pretrain

register_resolvers()
start_hydra()
config = resolved(compose("pretrain", sys.argv[2:]), "pretrain")
GlobalHydra.instance().clear()
rank, world = int(os.environ.pop("RANK")), int(os.environ.pop("WORLD_SIZE"))
distributed.init_process_group("gloo", rank=rank, world_size=world)
pretrain(config, Path(sys.argv[1]))
assert distributed.is_initialized() and distributed.get_world_size() == world
print("the group is still up")
distributed.destroy_process_group()

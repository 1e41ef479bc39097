"""recipes/pretrain.py that takes its device for one that runs the Triton kernels, runs their blocks in plain torch
in their place, and says which variant each operator was asked for.
"""

import sys

from clipkit.command import run
from clipkit.kernels import ops, pairs


def told(name: str):
    operator = getattr(ops, name)

    def call(*args):
        *inputs, impl, chunk = args
        print(f"{name} {impl}", flush=True)
        return operator(*inputs, "chunked", chunk)

    setattr(ops, name, call)


for name in ("pair_lse_op", "pair_softplus_op"):
    told(name)
sys.argv[0] = "pretrain.py"
with pairs.assume_triton():
    run("pretrain")

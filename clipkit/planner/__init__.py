"""What a step takes, before it is run: memory, operations, communication, time.

    measured = Measured(config, tokenizer, fused_attention=True)     # on fake tensors, seconds
    Planner(config, measured, gpu).plan(world_size=8)["memory"]

`clipkit-plan` is its command.
"""

from clipkit.planner.measure import Measured, Pass
from clipkit.planner.meter import Meter
from clipkit.planner.plan import GPU, Assumptions, Planner

__all__ = ["GPU", "Assumptions", "Measured", "Meter", "Pass", "Planner"]

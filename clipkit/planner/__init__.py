"""What a step takes, before it is run: memory, operations, communication, time.

    measured = Measured(             # on fake tensors, seconds
        model=model, loss=["infonce"], optim=optim, tokenizer=tokenizer, precision="bf16", fused_attention=True
    )
    Planner(measured, gpu, batch_size=32768, micro_batch_size=512).plan(world_size=8)["memory"]

`clipkit-plan` is its command.
"""

from clipkit.planner.devices import known_gpus, peak_tflops
from clipkit.planner.measure import Measured, Pass
from clipkit.planner.meter import Meter
from clipkit.planner.plan import GPU, Assumptions, Planner

__all__ = ["GPU", "Assumptions", "Measured", "Meter", "Pass", "Planner", "known_gpus", "peak_tflops"]

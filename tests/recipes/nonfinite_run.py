"""recipes/pretrain.py whose pictures of the steps in $NONFINITE_STEPS are not numbers, as when activations overflow."""

import os
import sys

from clipkit.command import run
from clipkit.training import feed

NONFINITE = {int(step) for step in os.environ["NONFINITE_STEPS"].split(",")}
augmented = feed.augmented


def overflowing(batch, augment, wanted, draw):
    batch = augmented(batch, augment, wanted, draw)
    # One rank: the draw is the step before.
    return {**batch, "image": batch["image"] * float("nan")} if draw + 1 in NONFINITE else batch


feed.augmented = overflowing
sys.argv[0] = "pretrain.py"
run("pretrain")

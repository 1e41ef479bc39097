"""clipkit's own pretraining in the workers of Ray Train, which make the process group that it joins.

    clipkit-pretrain experiment=quickstart --cfg job --resolve > run.yaml
    python recipes/own_trainer/ray_train.py run.yaml runs/on_ray --workers 2
    python recipes/own_trainer/ray_train.py run.yaml runs/on_ray --workers 8 --gpus --failures 3

The losses are those of as many ranks under torchrun. All workers see the run folder and the data under the same
paths. A worker that is lost ends the attempt; with --failures the next one goes on from the run's last checkpoint.
Needs `pip install 'clipkit[ray]'`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import yaml

from clipkit.recipes.pretrain import pretrain


def work(given: dict[str, Any]) -> None:
    """On each worker, in a group that is up."""
    import ray.train.torch

    # Ray starts workers in a folder of their own.
    os.chdir(given["folder"])
    # The one of the machine's devices that is this worker's.
    device = str(ray.train.torch.get_device())
    pretrain({**given["settings"], "device": device}, Path(given["run_dir"]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain in the workers of Ray Train.")
    parser.add_argument("settings", type=Path, help="what clipkit-pretrain ... --cfg job --resolve prints")
    parser.add_argument("run_dir", type=Path, help="the run's folder, which every worker sees")
    parser.add_argument("--workers", type=int, default=2, help="ranks")
    parser.add_argument("--gpus", action="store_true", help="a GPU for each worker")
    parser.add_argument("--failures", type=int, default=0, help="lost workers after which the run goes on")
    given = parser.parse_args()

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        work,
        train_loop_config={
            "settings": yaml.safe_load(given.settings.read_text(encoding="utf-8")),
            "run_dir": str(given.run_dir.resolve()),
            "folder": str(Path.cwd()),
        },
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=given.gpus),
        # gloo beside NCCL: what ranks tell each other of files and data lies in ordinary memory.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if given.gpus else "gloo"),
        run_config=RunConfig(
            name="ray",
            storage_path=str(given.run_dir.resolve()),
            failure_config=FailureConfig(max_failures=given.failures),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()

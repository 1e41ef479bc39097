import subprocess
import sys

HEAVY = (
    "hydra omegaconf wandb webdataset timm open_clip transformers sentence_transformers torchvision triton"
)


def test_losses_kernels_and_distributed_bring_torch_alone():
    """What torch itself imports is its own business; the check is what these modules add."""
    script = (
        "import sys, torch; before = set(sys.modules)\n"
        "import clipkit.losses, clipkit.kernels.ops, clipkit.distributed\n"
        "clipkit.losses.create_loss('infonce')\n"
        f"heavy = {HEAVY.split()!r}\n"
        "print([name for name in heavy if name in sys.modules and name not in before])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

"""Weights to begin with: what `init_from=` names, read and put into a model, with an account of every tensor.

    runs/quickstart/default                  a run folder, or one of its checkpoints/step_*
    runs/.../export/step_...-open_clip       what clipkit-export wrote, of any kind
    open_clip:ViT-B-32=openai                open_clip's architecture with published weights, or with those of a file
    local-dir:FOLDER, hf-hub:NAME            an open_clip folder or repository
    clip.pt, weights.safetensors             OpenAI's archive; a state dict under clipkit's or open_clip's names, or a tower's own
    timm:NAME, timm:local-dir:FOLDER         an image tower
    hf:NAME, sentence_transformers:NAME      a text tower: a name, a folder or (of the second) an installed package

A folder is told by what lies in it. Nothing of a source is executed.
"""

from __future__ import annotations

from clipkit.sources.libraries import sentence_folder
from clipkit.sources.opening import open_source
from clipkit.sources.source import Source
from clipkit.sources.start import Report, Start, begin, check_named

__all__ = ["Report", "Source", "Start", "begin", "check_named", "open_source", "sentence_folder"]

"""clipkit: contrastive image-text pretraining, and the study of its language encoder."""

__version__ = "0.1.0"

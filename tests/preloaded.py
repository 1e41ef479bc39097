"""What the programs import on the way, imported once for every process that tests fork from the server."""

import open_clip
import simplejpeg
import torch.utils.tensorboard
from PIL import Image

__all__ = ["open_clip", "simplejpeg", "torch"]

Image.init()

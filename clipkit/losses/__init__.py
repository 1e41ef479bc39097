"""Losses with one gradient, however the batch is split. Only torch is imported.

Each is an `nn.Module` on features, `InfoNCE()(image_features, text_features, logit_scale) -> ()`, registered
under its file's name; `create_loss` builds a weighted sum of them from a config. Their parameters' gradients,
averaged over the ranks of a group as DDP and FSDP do, are those of one process on the whole batch, whatever
the group, the implementation or the micro-batches; the value is the whole batch's on every rank.
"""

from clipkit.losses.cloob import CLOOB
from clipkit.losses.compose import WeightedSum, create_loss
from clipkit.losses.contract import (
    ContractCase,
    GradientReport,
    check_gradient_contract,
    check_gradient_contracts,
)
from clipkit.losses.cyclic import CyclicGeometry
from clipkit.losses.distill import Distill
from clipkit.losses.distill_contrastive import InteractiveContrastive
from clipkit.losses.distill_features import FeatureDistillation
from clipkit.losses.distill_relations import RelationalDistillation
from clipkit.losses.fastclip import FastCLIP
from clipkit.losses.infoloob import InfoLOOB
from clipkit.losses.infonce import InfoNCE
from clipkit.losses.matryoshka import Matryoshka
from clipkit.losses.mlm import MaskedLanguageModel
from clipkit.losses.nli_contrastive import NLIContrastive
from clipkit.losses.nli_softmax import NLISoftmax
from clipkit.losses.queue import MemoryQueue
from clipkit.losses.registry import list_losses, register_loss
from clipkit.losses.sigmoid import Sigmoid
from clipkit.losses.simcse import SimCSE
from clipkit.losses.slip import SLIP
from clipkit.losses.uniformity import Uniformity

__all__ = [
    "CLOOB",
    "ContractCase",
    "CyclicGeometry",
    "Distill",
    "FastCLIP",
    "FeatureDistillation",
    "GradientReport",
    "InfoLOOB",
    "InfoNCE",
    "InteractiveContrastive",
    "MaskedLanguageModel",
    "Matryoshka",
    "MemoryQueue",
    "NLIContrastive",
    "NLISoftmax",
    "RelationalDistillation",
    "SLIP",
    "Sigmoid",
    "SimCSE",
    "Uniformity",
    "WeightedSum",
    "check_gradient_contract",
    "check_gradient_contracts",
    "create_loss",
    "list_losses",
    "register_loss",
]

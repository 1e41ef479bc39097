"""What a source of weights holds, once it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from clipkit.data import Tokenizer

TOWERS = ("image_tower", "text_tower")


@dataclass
class Source:
    """Weights under clipkit's names, and what is known of the model they are of.

    Attributes:
        name: as the user gave it.
        kind: what it turned out to be, for messages.
        place: the file or folder that was read.
        weights: image_tower.*, image_projection.weight, text_tower.*, text_projection.*, log_logit_scale, logit_bias,
            mlm_head.*: those that it has.
        settings: what `clipkit.create_model` takes of it: image_tower and text_tower as settings, embed_dim and the like.
            Without a tower's settings nothing but names and shapes says whether its weights fit.
        tokenizer: the one its text tower was trained with; None where it has none to say.
        ignored: weights of the source that no clipkit model has a place for, such as a classifier's.
        loose: names are a tower's own, and the tower they are for says under which name it has them.
    """

    name: str
    kind: str
    place: str
    weights: dict[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    ignored: list[str] = field(default_factory=list)
    loose: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.kind})"

    def told(self) -> str:
        """For the report: the file that was read, too, where the name does not say it."""
        return str(self) if self.name.endswith(self.place) else f"{self}: {self.place}"

    def has(self, tower: str) -> bool:
        """Whether it holds weights of this tower."""
        return self.loose or any(name.startswith(f"{tower}.") for name in self.weights)

"""Image towers: any timm model, CLIP's ResNet and CLIP's ViT (Radford et al. 2021, section 2.4)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipkit.registry import suggest
from clipkit.towers.base import ImageTower
from clipkit.towers.registry import register_image_tower

# What timm's families call their layers: a list, or attributes of their own (ResNet, RegNet).
_LISTS = ("blocks", "stages", "layers")
_ONE_BY_ONE = ("layer", "s")

# Of CLIP's training images, RGB on 0..1.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@register_image_tower("timm")
class TimmTower(ImageTower):
    """A timm model without its classifier: forward(image (B, 3, H, W)) -> (B, width).

    Args:
        model: a timm name, such as resnet50 or vit_base_patch32_224.
        pretrained: load timm's weights (needs the network once), else timm's own random initialisation.
        image_size: pixels; fixed-size models such as ViTs are built for it. None: the model's own.
        drop_path: rate of stochastic depth, 0 to 1; None: the model's own. Not every model takes one.
        pool: timm's global_pool, such as avg, token or map; None: the model's own.
        project: a linear projection into the shared space follows; False: the trunk's own columns are the features, and
            embed_dim is their number (SigLIP).
        mean, std: override the channel statistics of the model's config.
    """

    # timm's models share no typed interface.
    trunk: Any

    def __init__(
        self,
        *,
        model: str,
        pretrained: bool = False,
        image_size: int | None = None,
        drop_path: float | None = None,
        pool: str | None = None,
        project: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        import timm

        self.check(model=model)
        settings = {"drop_path_rate": drop_path, "global_pool": pool}
        if image_size is not None and not model.startswith(("hf", "local")):
            config = timm.get_pretrained_cfg(model)
            settings["img_size"] = image_size if config is not None and config.fixed_input_size else None
        settings = {key: value for key, value in settings.items() if value is not None}
        try:
            trunk = timm.create_model(model, pretrained=pretrained, num_classes=0, **settings)
        except TypeError as error:
            raise ValueError(f"timm's {model} does not take one of {sorted(settings)}: {error}") from error
        except (OSError, RuntimeError) as error:
            if not pretrained:
                raise
            raise ValueError(
                f"image_tower.pretrained is true but timm gave no weights for {model}: {error} "
                "Fetch them once with the network, or set image_tower.pretrained: false"
            ) from error
        self.trunk = cast(Any, trunk)
        config = self.trunk.pretrained_cfg
        self.image_size = image_size or config["input_size"][-1]
        self.mean = tuple(config["mean"] if mean is None else mean)
        self.std = tuple(config["std"] if std is None else std)
        self.width = self._columns(model, pool)
        self.projects = not project
        groups = _groups(self.trunk)
        self._blocks = _trunk_blocks(self.trunk, groups)
        self._depth, self.num_layers = _depths(self.trunk, self._blocks, groups)

    def _columns(self, model: str, pool: str | None) -> int:
        """Columns of the trunk's output for a picture of `image_size`; ValueError where it makes none of them."""
        # Of the kind that the weights are: real, without memory (a plan), or without values.
        like = next(self.trunk.parameters())
        try:
            with torch.no_grad():
                out = self.trunk.eval()(like.new_zeros(1, 3, self.image_size, self.image_size))
        except Exception as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"timm's {model} takes no pictures of image_tower.image_size {self.image_size} pixels: {line}"
            ) from error
        finally:
            self.trunk.train()
        if out.ndim != 2:
            raise ValueError(
                f"timm's {model} with image_tower.pool {pool!r} gives {tuple(out.shape)} for a picture, "
                "not one row: choose a pool that is a mean or a token, or null"
            )
        return out.shape[1]

    @staticmethod
    def check(*, model: str, **settings: Any) -> None:
        """ValueError for a model that timm does not know."""
        import timm

        if not model.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(model):
            raise ValueError(
                f"timm has no model {model!r}.{suggest(model, timm.list_models())} "
                f"timm.list_models('*{model[:4]}*') lists its names"
            )

    def layer_of(self, name: str) -> int:
        return self._depth.get(name, self.num_layers + 1)

    def blocks(self) -> list[nn.Module]:
        return list(self._blocks)

    def forward(self, image: Tensor) -> Tensor:
        return self.trunk(image)


class _ClipTower(ImageTower):
    """What CLIP's two own image towers share: its channel statistics, and a last layer that projects."""

    projects = True
    # open_clip's, of either class.
    body: Any

    def __init__(
        self,
        body: nn.Module,
        embed_dim: int,
        image_size: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ):
        super().__init__()
        self.body = body
        self.width = embed_dim
        self.image_size = image_size
        self.mean = CLIP_MEAN if mean is None else tuple(mean)
        self.std = CLIP_STD if std is None else tuple(std)

    def forward(self, image: Tensor) -> Tensor:
        return self.body(image)


@register_image_tower("clip_resnet50")
class ClipResNet(_ClipTower):
    """CLIP's modified ResNet: three-convolution stem, anti-aliased strides, attention pooling that projects.

    The defaults are CLIP's RN50; RN101 has layers [3, 4, 23, 3], RN50x4 layers [4, 6, 10, 6] with width 80.

    Args:
        image_size: pixels, a multiple of 32.
        layers: blocks of the four stages.
        width: channels of the first stage; the last has 32 * width.
        mean, std: channel statistics of its pictures; None: those of CLIP's.
    """

    num_layers = 4

    def __init__(
        self,
        *,
        embed_dim: int,
        image_size: int = 224,
        layers: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        from open_clip.modified_resnet import ModifiedResNet

        if image_size % 32 or len(layers) != 4:
            raise ValueError(
                f"clip_resnet50 needs image_size in multiples of 32 and four stages, "
                f"not {image_size} and {layers}"
            )
        # CLIP keeps 64 columns a head: 32 heads over RN50's 2048.
        heads = width * 32 // 64
        body = ModifiedResNet(
            list(layers), output_dim=embed_dim, heads=heads, image_size=image_size, width=width
        )
        super().__init__(body, embed_dim, image_size, mean, std)

    def layer_of(self, name: str) -> int:
        stage = re.match(r"body\.layer(\d)\.", name)
        if stage:
            return int(stage[1])
        return self.num_layers + 1 if name.startswith("body.attnpool") else 0

    def blocks(self) -> list[nn.Module]:
        return _resnet_stages(self.body)


@register_image_tower("clip_vit")
class ClipViT(_ClipTower):
    """CLIP's Vision Transformer, with a pre-norm before the blocks and the class token projected.

    Args:
        image_size: pixels, a multiple of patch_size.
        patch_size: pixels.
        width, layers, heads: of the Transformer; the defaults are ViT-B/32. heads None: width / 64.
        mlp_ratio: hidden width of the MLP over width.
        patch_dropout: share of patches left out in training, 0 to 1 (Li et al. 2023, FLIP).
        quick_gelu: OpenAI's GELU approximation, x * sigmoid(1.702 x); needed for its published weights.
        mean, std: channel statistics of its pictures; None: those of CLIP's.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        image_size: int = 224,
        patch_size: int = 32,
        width: int = 768,
        layers: int = 12,
        heads: int | None = None,
        mlp_ratio: float = 4.0,
        patch_dropout: float = 0.0,
        quick_gelu: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        from open_clip.transformer import QuickGELU, VisionTransformer

        heads = heads or max(1, width // 64)
        if image_size % patch_size or width % heads:
            raise ValueError(
                f"clip_vit needs image_size a multiple of patch_size and width of heads, "
                f"not {image_size} / {patch_size} and {width} / {heads}"
            )
        body = VisionTransformer(
            image_size=image_size,
            patch_size=patch_size,
            width=width,
            layers=layers,
            heads=heads,
            mlp_ratio=mlp_ratio,
            output_dim=embed_dim,
            patch_dropout=patch_dropout,
            act_layer=QuickGELU if quick_gelu else nn.GELU,
        )
        super().__init__(body, embed_dim, image_size, mean, std)
        self.num_layers = layers

    def layer_of(self, name: str) -> int:
        block = re.match(r"body\.transformer\.resblocks\.(\d+)\.", name)
        if block:
            return int(block[1]) + 1
        return self.num_layers + 1 if name.startswith(("body.ln_post", "body.proj")) else 0

    def blocks(self) -> list[nn.Module]:
        return list(self.body.transformer.resblocks)


NO_IMAGES = "this model has no image tower (image_tower=none): it encodes texts alone"


@register_image_tower("none")
class NoImages(ImageTower):
    """The place of an image tower in a model of texts alone: no weights, and no picture is encoded."""

    projects = True
    encodes = False
    image_size = 0
    num_layers = 0
    mean, std = CLIP_MEAN, CLIP_STD

    def __init__(self, *, embed_dim: int):
        super().__init__()
        self.width = embed_dim

    def blocks(self) -> list[nn.Module]:
        return []

    def forward(self, image: Tensor) -> Tensor:
        raise ValueError(NO_IMAGES)


def _resnet_stages(body: nn.Module) -> list[nn.Module]:
    return _numbered(body, "layer")


def _numbered(body: nn.Module, prefix: str) -> list[nn.Module]:
    """The modules prefix1, prefix2, ... of a body."""
    found = ((place, getattr(body, f"{prefix}{place}", None)) for place in range(1, 10))
    return [module for _, module in found if isinstance(module, nn.Module)]


def _groups(trunk: Any) -> dict[str, int]:
    """timm's own number of each parameter's stage or block, 0 the stem; empty for families that have none."""
    from timm.models import group_parameters

    try:
        matcher = trunk.group_matcher(coarse=True)
    except (AttributeError, AssertionError):
        return {}
    return {name: number for number, names in group_parameters(trunk, matcher).items() for name in names}


def _trunk_blocks(trunk: nn.Module, groups: Mapping[str, int]) -> list[nn.Module]:
    """A timm model's layers: its list of them, its numbered stages, or else the modules that its groups consist of."""
    for name in _LISTS:
        layers = getattr(trunk, name, None)
        if isinstance(layers, (nn.ModuleList, nn.Sequential)):
            return list(layers.children())
    for prefix in _ONE_BY_ONE:
        layers = _numbered(trunk, prefix)
        if len(layers) > 1:
            return layers
    found: dict[nn.Module, int] = {}

    def descend(module: nn.Module, prefix: str) -> None:
        numbers = {groups.get(name, 0) for name, _ in module.named_parameters(prefix=prefix)}
        if len(numbers) == 1 and 0 not in numbers and list(module.children()):
            found[module] = numbers.pop()
            return
        for name, child in module.named_children():
            descend(child, f"{prefix}.{name}" if prefix else name)

    descend(trunk, "")
    # VGG's groups, for one, are single convolutions in a row of others.
    return list(found) if {*found.values()} == {*groups.values()} - {0} else []


def _depths(
    trunk: nn.Module, blocks: list[nn.Module], groups: Mapping[str, int]
) -> tuple[dict[str, int], int]:
    """Each parameter's depth by name, and the number of layers; timm's groups where no module is a layer."""
    if not blocks:
        return {f"trunk.{name}": number for name, number in groups.items()}, max(groups.values(), default=0)
    inside = {id(one): place for place, block in enumerate(blocks, 1) for one in block.parameters()}
    depth: dict[str, int] = {}
    # timm registers what comes first first; what stands between two layers counts to the one before it.
    passed: set[int] = set()
    for name, one in trunk.named_parameters():
        passed |= {inside[id(one)]} if id(one) in inside else set()
        outside = len(blocks) + 1 if len(passed) == len(blocks) else len(passed)
        depth[f"trunk.{name}"] = inside.get(id(one), outside)
    return depth, len(blocks)

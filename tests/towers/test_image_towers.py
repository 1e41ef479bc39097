"""Image towers: shapes, what they take from their libraries, and how they refuse."""

from __future__ import annotations

import pytest
import timm
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import nn

from clipkit.towers import create_image_tower, list_image_towers, register_image_tower

TINY = {
    "timm_cnn": {"name": "timm", "model": "test_resnet", "image_size": 32},
    "timm_vit": {"name": "timm", "model": "test_vit", "image_size": 48},
    "clip_resnet50": {"name": "clip_resnet50", "image_size": 64, "layers": [1, 2, 1, 1], "width": 16},
    "clip_vit": {"name": "clip_vit", "image_size": 32, "patch_size": 16, "width": 64, "layers": 2},
}


@pytest.mark.parametrize("spec", TINY.values(), ids=TINY.keys())
def test_forward_gives_rows_of_the_stated_width(spec):
    tower = create_image_tower(spec, embed_dim=24)
    out = tower(torch.randn(3, 3, tower.image_size, tower.image_size))
    assert out.shape == (3, tower.width)
    assert tower.image_size == spec["image_size"]
    assert tower.projects == (spec["name"] != "timm")
    if tower.projects:
        assert tower.width == 24
    assert len(tower.mean) == len(tower.std) == 3
    assert len(tower.blocks()) == tower.num_layers


def test_timm_tower_equals_timm_without_its_classifier():
    tower = create_image_tower(TINY["timm_cnn"], embed_dim=8).eval()
    peer = timm.create_model("test_resnet", num_classes=10)
    peer.load_state_dict(tower.trunk.state_dict(), strict=False)
    image = torch.randn(2, 3, 32, 32)
    expected = peer.eval().forward_head(peer.forward_features(image), pre_logits=True)
    torch.testing.assert_close(tower(image), expected)


def test_timm_statistics_come_from_the_models_own_config():
    # Published with the two models: ImageNet's channel statistics, and halves.
    resnet = create_image_tower({"name": "timm", "model": "resnet18"}, embed_dim=8)
    assert resnet.mean == (0.485, 0.456, 0.406) and resnet.std == (0.229, 0.224, 0.225)
    vit = create_image_tower(TINY["timm_vit"], embed_dim=8)
    assert vit.mean == (0.5, 0.5, 0.5)
    own = create_image_tower({**TINY["timm_vit"], "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}, embed_dim=8)
    assert own.mean == (0.1, 0.2, 0.3) and own.std == (1, 1, 1)


def test_timm_drop_path_reaches_the_blocks():
    tower = create_image_tower({**TINY["timm_vit"], "drop_path": 0.2}, embed_dim=8)
    rates = [module.drop_prob for module in tower.modules() if type(module).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.2)


def test_a_fixed_size_vit_is_built_for_the_image_size():
    # One class token and (32 / 16)^2 patches; at its own 224 pixels there would be 197 positions.
    tower = create_image_tower(
        {"name": "timm", "model": "vit_tiny_patch16_224", "image_size": 32}, embed_dim=8
    )
    assert tower.trunk.pos_embed.shape == (1, 5, 192)
    assert tower(torch.randn(1, 3, 32, 32)).shape == (1, 192)


def test_mobilenet_head_width_is_what_comes_out():
    tower = create_image_tower({"name": "timm", "model": "mobilenetv3_small_050"}, embed_dim=8).eval()
    assert tower(torch.randn(1, 3, 64, 64)).shape == (1, tower.width)


def test_clip_resnet50_has_the_published_size():
    with torch.device("meta"):
        tower = create_image_tower("clip_resnet50", embed_dim=1024)
        peer = ModifiedResNet([3, 4, 6, 3], output_dim=1024, heads=32, image_size=224, width=64)
    ours = {name: tensor.shape for name, tensor in tower.body.state_dict().items()}
    assert ours == {name: tensor.shape for name, tensor in peer.state_dict().items()}
    assert tower.body.attnpool.num_heads == 32
    # The visual half of OpenAI's RN50 checkpoint has 38,316,896 parameters.
    assert sum(parameter.numel() for parameter in tower.parameters()) == 38_316_896


def test_clip_vit_equals_open_clips_with_the_same_weights():
    tower = create_image_tower(TINY["clip_vit"], embed_dim=24).eval()
    peer = VisionTransformer(32, 16, 64, 2, 1, 4.0, output_dim=24).eval()
    peer.load_state_dict(tower.body.state_dict())
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(tower(image), peer(image), atol=1e-6, rtol=0)


def test_unknown_names_point_to_the_nearest():
    with pytest.raises(ValueError, match="unknown image tower 'tim'.*'timm'"):
        create_image_tower("tim", embed_dim=8)
    with pytest.raises(ValueError, match="no model 'resnet5O'.*'resnet50'"):
        create_image_tower({"name": "timm", "model": "resnet5O"}, embed_dim=8)
    with pytest.raises(ValueError, match="'image_sice'.*'image_size'"):
        create_image_tower({"name": "clip_vit", "image_sice": 32}, embed_dim=8)
    with pytest.raises(ValueError, match="needs the setting 'model'"):
        create_image_tower("timm", embed_dim=8)


def test_pretrained_weights_that_are_not_there_name_the_setting():
    name = min(
        set(timm.list_models("lcnet*")) - {full.split(".")[0] for full in timm.list_pretrained("lcnet*")}
    )
    with pytest.raises(ValueError, match="image_tower.pretrained is true but timm gave no weights"):
        create_image_tower({"name": "timm", "model": name, "pretrained": True}, embed_dim=8)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiples of 32"):
        create_image_tower({"name": "clip_resnet50", "image_size": 100}, embed_dim=8)
    with pytest.raises(ValueError, match="32 / 12"):
        create_image_tower({"name": "clip_vit", "image_size": 32, "patch_size": 12}, embed_dim=8)
    with pytest.raises(ValueError, match="drop_path_rate"):
        create_image_tower({"name": "timm", "model": "vgg11", "drop_path": 0.1}, embed_dim=8)


def test_a_registered_tower_is_created_by_name():
    from clipkit.towers import ImageTower
    from clipkit.towers.registry import image_towers

    @register_image_tower("flat_for_test")
    class Flat(ImageTower):
        num_layers = 0
        projects = True

        def __init__(self, *, embed_dim: int, image_size: int = 4):
            super().__init__()
            self.width, self.image_size, self.mean, self.std = embed_dim, image_size, (0.0,) * 3, (1.0,) * 3
            self.linear = nn.Linear(3 * image_size**2, embed_dim)

        def layer_of(self, name):
            return 1

        def blocks(self):
            return []

        def forward(self, image):
            return self.linear(image.flatten(1))

    try:
        assert "flat_for_test" in list_image_towers()
        assert create_image_tower("flat_for_test", embed_dim=5)(torch.zeros(2, 3, 4, 4)).shape == (2, 5)
        with pytest.raises(ValueError, match="taken"):
            register_image_tower("flat_for_test")(Flat)
    finally:
        image_towers._entries.pop("flat_for_test")

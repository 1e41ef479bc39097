"""Tower names: `@register_image_tower("clip_vit")` and `@register_text_tower("hf")` file a class."""

from __future__ import annotations

from clipkit.registry import Registry

image_towers = Registry("image tower")
text_towers = Registry("text tower")
register_image_tower = image_towers.register
register_text_tower = text_towers.register

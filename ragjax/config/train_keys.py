"""The keys of adapters, a section of `train`, and of the mesh on which training lies."""

from __future__ import annotations

from pydantic import Field

from ragjax.config.reading import PositiveFloat, PositiveInt, Probability, Section, Texts


class Mesh(Section):
    """How training lies on the devices; questions are split over `data`, which has devices / `model` of them."""

    model: PositiveInt = Field(
        1, description="Heads, feed-forward layers and vocabulary are split over so many devices."
    )
    fsdp: bool = Field(False, description="Split parameters and optimizer state over `data`, too.")


class Lora(Section):
    """Low-rank adapters: of the models that `targets` name, these alone are trained, beside weights that stay."""

    rank: PositiveInt | None = Field(None, description="The adapters' rank; null means that there are none.")
    alpha: PositiveFloat = Field(16.0, description="Adapters count alpha / rank times.")
    targets: Texts = Field(
        ("generator",),
        description="Models, whose layers' linear maps all get adapters, or such maps alone, as generator.query.",
    )
    dropout: Probability = Field(0.0, description="The share of the adapters' inputs that are set to 0.")

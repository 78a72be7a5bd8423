"""The section `model` of a recipe: the network, its working copy, and adapters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tram_ds.runtime.checked import Positive, Section, refusal
from tram_ds.runtime.paths import Place

REMOTE_CODE = (
    "code from a model repository is never run, and this cannot be turned on; remove the key"
)


class LoraSection(Section):
    """Low-rank adapters (LoRA, by peft), trained in place of the model's weights."""

    r: Positive = 16
    """Rank: columns of A and rows of B."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """What B A is multiplied by, times the rank: the layer is W + alpha / r B A."""
    targets: list[str] | None = None
    """Linear layers to adapt, by their names or the ends of these, such as q_proj; null = all but
    the output head. Heads of classifiers train whole."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropout before A; model.dropout is the model's own."""
    dora: bool = False
    """Weight-decomposed adapters (DoRA): the magnitude of each column of weights trains too."""
    merge: bool = True
    """Export the model with the adapters merged into its weights too; false = the adapters alone,
    which need the model they were trained on."""

    @field_validator("targets")
    @classmethod
    def _not_none(cls, value: list[str] | None) -> list[str] | None:
        if value == []:
            raise refusal(("", "nothing to adapt: name a layer, or null for all linear ones"))
        return value


class ModelSection(Section):
    """The network: pre-trained (`path`) or freshly initialised (`init`), exactly one of the two."""

    path: Place | None = None
    """Hub id or folder of a pre-trained Hugging Face model."""
    init: dict[str, Any] | None = None
    """A fresh model: `architecture` (a Hugging Face model type such as gpt2) and keys of its
    configuration, e.g. n_layer."""
    revision: str | None = None
    """Branch, tag or commit of model.path on the hub; null = its main branch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the working copy that forward and backward use; the master weights are always
    float32."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time for far less memory."""
    compile: bool = False
    """Compile every transformer block with torch.compile: a start-up of minutes for faster steps;
    not with ZeRO-3."""
    logits: Literal["chunks", "whole"] = "chunks"
    """Of a language model: `chunks` = loss and distances a few rows at a time, so that a large
    vocabulary costs no memory; `whole` = all at once, for models that change their logits after the
    output head."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation; flash_attention_2 needs the flash-attn package, a GPU and dtype
    bfloat16."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Probability for every dropout of the model; null = what the model's own configuration
    says."""

    lora: LoraSection | None = None
    """Train low-rank adapters, and leave the weights as they are; null = train the weights."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if (self.path is None) == (self.init is None):
            both = "both are" if self.path else "neither is"
            raise refusal(
                ("path", f"{both} given: exactly one of model.path and model.init is needed")
            )
        if self.init is not None and not isinstance(self.init.get("architecture"), str):
            raise refusal(
                (
                    "init.architecture",
                    "is missing: a Hugging Face model type such as gpt2, llama or vit",
                )
            )
        if remote := {"trust_remote_code", "auto_map"} & set(self.init or {}):
            raise refusal((f"init.{min(remote)}", REMOTE_CODE))
        if self.init is not None and self.revision is not None:
            raise refusal(
                (
                    "revision",
                    "belongs to model.path, and model.init is given; remove one of the two",
                )
            )
        if self.attention == "flash_attention_2" and self.dtype == "float32":
            raise refusal(
                ("attention", "flash_attention_2 has no float32 kernels: set model.dtype=bfloat16")
            )
        return self

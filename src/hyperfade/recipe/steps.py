"""How a dense model becomes the finished one, step by step: fit, train, quantize."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from hyperfade.formats import Format
from hyperfade.recipe.section import Number, Section


def _no_is_a_word(value: Any) -> Any:
    """YAML 1.1 reads an unquoted `no` as false."""
    return "no" if value is False else value


class Fit(Section):
    """How dense weights become hypercomplex ones before any training."""

    method: Literal["calibrated", "frobenius", "random"] = Field(
        default="calibrated", description="what the fit minimises"
    )
    basis: Literal["none", "energy"] = Field(
        default="none", description="order of the FFN's hidden units before the split"
    )
    prefix: Literal["compressed", "corrected", "dense"] = Field(
        default="compressed",
        description="what a layer is fitted behind: the layers compressed so far, these with every writer mending what "
        "they broke (corrected), or (one pass for all) the dense ones",
    )
    refit_writer: bool = Field(
        default=True, description="with a width: solve the writer for the units that stay; false is plain pruning"
    )
    block_epochs: int = Field(
        default=0,
        ge=0,
        description="with prefix corrected: passes over the samples in which every FFN trains by itself on what its "
        "writer is aimed at",
    )
    block_learning_rate: Number = Field(default=1e-3, gt=0, description="peak learning rate of block_epochs")
    sweeps: int = Field(default=12, ge=1, description="alternating least-squares sweeps per matrix")
    samples: int = Field(default=128, ge=1, description="training samples whose activations calibrate the fit")
    budget_samples: int | None = Field(
        default=None, ge=1, description="training samples that replace.budget is measured on [default: samples]"
    )
    batch_size: int = Field(default=16, ge=1, description="samples per calibration forward pass")
    ridge: Number = Field(default=1e-6, ge=0, description="added to C's diagonal, relative to its mean")
    expert_prior: Number = Field(
        default=0.1,
        gt=0,
        description="weight of all experts' average in each expert's second moment, in tokens per input feature",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.basis == "energy" and self.method != "calibrated":
            raise ValueError("basis 'energy' sorts by activations, which only method 'calibrated' gathers")
        if self.block_epochs and (self.prefix != "corrected" or self.method != "calibrated"):
            raise ValueError(
                "block_epochs needs the dense model's residual stream: take prefix 'corrected' and method 'calibrated'"
            )
        if self.prefix == "corrected" and not self.refit_writer:
            raise ValueError(
                "prefix 'corrected' solves every writer, which refit_writer false forbids: take prefix 'compressed'"
            )
        return self


class Train(Section):
    """The distillation: fade the dense weights out, then polish what is left. All lengths are optimizer steps."""

    fade_steps: int = Field(default=100, ge=0, description="steps of the fade; 0 starts with the dense branch gone")
    polish_steps: int = Field(default=200, ge=0, description="steps after the dense branch is dropped")
    fade_shape: Literal["linear", "cosine", "step"] = Field(default="linear", description="shape of α over the fade")
    fade_order: Literal["together", "layer_by_layer"] = Field(
        default="together", description="whether layers fade in turn"
    )
    batch_size: int = Field(default=32, ge=1, description="samples per forward pass")
    accumulation: int = Field(default=1, ge=1, description="forward passes per optimizer step")
    group_by_length: bool = Field(
        default=False, description="batches of examples of like length, so that little is padded"
    )
    learning_rate: Number = Field(default=2e-4, gt=0, description="peak learning rate of the hypercomplex weights")
    dense_learning_rate: Number = Field(default=1e-4, gt=0, description="peak learning rate of train_also and LoRA")
    weight_decay: Number = Field(default=0.0, ge=0, description="AdamW weight decay")
    warmup_fraction: Number = Field(
        default=0.1, ge=0, le=1, description="share of the steps with a rising learning rate"
    )
    clip_norm: Number = Field(default=1.0, gt=0, description="gradient norm limit")
    spike_factor: Number | None = Field(
        default=3.0,
        gt=1,
        description="a spike is five polish losses in a row above so many times the highest of the twenty before: the"
        " run goes back to a state from before it, with half the step; null never",
    )
    label_smoothing: Number = Field(default=0.0, ge=0, lt=1, description="label smoothing of the cross-entropy")
    kd_weight: Number = Field(default=0.9, ge=0, le=1, description="λ: share of the teacher's KL against cross-entropy")
    kd_ramp: bool = Field(default=False, description="let λ grow with α instead of starting at its full value")
    temperature: Number = Field(default=2.0, gt=0, description="T of the softened distributions in the KL")
    teacher: Literal["live", "cached"] = Field(
        default="live", description="cached: the teacher answers every example once, before the training"
    )
    teacher_top_k: int = Field(
        default=32, ge=1, description="with a cached teacher: likeliest tokens kept per answer token, beside their rest"
    )
    teacher_folder: Path | None = Field(
        default=None, description="with a cached teacher: where its answers lie, for several recipes [default: output]"
    )
    reconstruction_weight: Number = Field(
        default=0.0, ge=0, description="μ: weight of the layers' output error while fading"
    )
    hidden_weight: Number = Field(
        default=0.0,
        ge=0,
        description="η: weight of the relative error of the language model's hidden states, at every position",
    )
    train_also: tuple[str, ...] = Field(
        default=(), description="globs of dense parameters that train as well, e.g. lm_head.*"
    )
    lora_rank: int = Field(
        default=0, ge=0, description="LoRA on the language model's attention, merged at the end; 0 for none"
    )
    lora_alpha: int = Field(default=16, ge=1, description="LoRA scale")
    mixed_precision: Annotated[Literal["no", "bf16"], BeforeValidator(_no_is_a_word)] = Field(
        default="no", description="autocast of the training forward passes"
    )
    gradient_checkpointing: bool = Field(default=False, description="recompute activations to save memory")
    shard: bool = Field(
        default=False, description="of several processes each holds a part of teacher and student (FSDP2), not a copy"
    )
    checkpoint_every: int = Field(default=100, ge=1, description="steps between resumable checkpoints")
    log_every: int = Field(default=10, ge=1, description="steps between printed lines; metrics.jsonl has every step")
    trackers: tuple[str, ...] = Field(default=(), description="accelerate trackers, e.g. tensorboard")

    @model_validator(mode="after")
    def _hidden_states_are_not_cached(self) -> Self:
        if self.hidden_weight and self.teacher == "cached":
            raise ValueError(
                "hidden_weight needs the teacher's hidden states, which are not cached: take teacher live, or "
                "hidden_weight 0"
            )
        return self


class Quantize(Section):
    """Rounding of the finished model's matrices to few bits, after training. A word alone means `to`."""

    to: Format = Field(description="format of the matrices")
    group_size: int | None = Field(
        default=None, ge=0, description="neighbours that share a scale, 0 for rows [default: int4 and nf4 64, others 0]"
    )
    rest: bool = Field(default=False, description="attention and the other linears too; never head and embeddings")
    calibrated: bool = Field(
        default=True, description="int4: numbers by what layers read on fit.samples training samples, not the nearest"
    )

    @model_validator(mode="before")
    @classmethod
    def _word(cls, given: Any) -> Any:
        return {"to": given} if isinstance(given, str) else given

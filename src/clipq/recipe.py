"""The recipe: everything that a compression run depends on, as one flat YAML file.

Each field is also an option of ``clipq compress``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from clipq.errors import RecipeError
from clipq.validation import explain

WHERE_IT_RUNS = (
    *("data_root", "workers", "device", "strategy", "search_memory", "loggers"),
    *("checkpoints", "checkpoint_steps", "checkpoint_minutes", "keep_checkpoints"),
)
"""Fields on which nothing that is found depends, but for the rounding of other devices."""
AFTER_THE_SEARCH = ("epochs", "pruning_ramp", "pruning_rate", "bits", "overrides")
"""Fields on which a search for a target does not depend."""


class Override(BaseModel):
    """What to change in the plan for the tensors that a glob matches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pruning_rate: float | None = Field(None, ge=0, lt=1)
    bits: int | None = Field(None, ge=1, le=8)


class Recipe(BaseModel):
    """A compression run. Build one with `Recipe.make` or `Recipe.load`, which raise `RecipeError`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        description="The network: one of clipq's (lenet-300-100, lenet-5, resnet-20 to -110, mobilenet-v1-0.25), a "
        "library's (torchvision/resnet50, timm/vit_small_patch16_224), or 'module:function' or 'file.py:function' that "
        "returns one."
    )
    data: str = Field(
        description="The data: digits, mnist, cifar10, a data file (.yaml) that says where pictures lie, or "
        "'file.py:function' that returns (training, validation) data sets, or (training, validation, test), of inputs "
        "and labels: a whole number a sample, or one a position."
    )
    weights: str | None = Field(
        None,
        description="Trained weights: .safetensors, .clipq or .pt. Looked for here, then in the data root. Without "
        "them the network is trained first, for float_epochs.",
    )
    data_root: str | None = Field(None, description="Folder of the named data sets; else CLIPQ_DATA, else a download.")
    validation_fraction: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Share of a training set that is held out for validation, where the data has none of its own.",
    )
    workers: int = Field(
        0, ge=0, description="Processes that make the samples of data files and of your own data sets."
    )

    plan: str | None = Field(
        None,
        description="A plan file. Without one, and without a target, p and b are the same everywhere; "
        "without any of them, a plan is searched that loses at most half a point.",
    )
    pruning_rate: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="p, the share of each tensor's weights that become zero; else 0.9.",
    )
    bits: int | None = Field(
        None,
        ge=1,
        le=8,
        description="b, the bit width: at most 2^b - 1 non-zero values a tensor; else 3.",
    )
    pruning_ramp: float = Field(
        0.0,
        ge=0,
        le=0.8,
        description="Share of the steps over which pruning rates rise to the plan's, most of it early; 0, as in the "
        "paper, prunes at once.",
    )
    include: tuple[str, ...] = Field((), description="Globs of parameters to compress as well, such as '*.bias'.")
    exclude: tuple[str, ...] = Field((), description="Globs of parameters to leave as they are.")
    overrides: dict[str, Override] = Field(
        {}, description="Other values by glob; as an option: 'conv1.*:pruning_rate=0.3,bits=4'."
    )

    fold_norms: bool = Field(
        False,
        description="Fold the statistics of batch norms into their weights and biases before the final evaluation: "
        "half the numbers, the same network for inference.",
    )
    bfloat16_rest: bool = Field(
        False, description="Round biases and norms to bfloat16 before the final evaluation; reported beside exact ones."
    )

    ratio: float | None = Field(
        None, gt=1, description="Search a plan for a file so many times smaller than float32; replaces p, b, overrides."
    )
    bytes: str | int | None = Field(None, description="Search a plan for a file of at most so many bytes, such as 1MB.")
    max_drop: float | None = Field(
        None, gt=0, description="Search the smallest plan that loses at most so many points of validation accuracy."
    )
    trade_off: float | None = Field(
        None, gt=0, description="Search with λ of the paper: the cost that taking all bytes away would be worth."
    )
    search_method: Literal["default", "layerwise"] = Field("default", description="layerwise is the paper's search.")
    search_evaluations: int | None = Field(None, ge=1, description="Of each tensor alone; else 10, or 30 layerwise.")
    search_refinements: int = Field(16, ge=0, description="Plans that the search tries around its best candidate.")
    search_samples: int = Field(2000, ge=2, description="Training samples that the search evaluates on.")
    search_steps: int = Field(100, ge=0, description="Steps of fine-tuning that the search gives a candidate plan.")
    search_memory: str | int = Field("1GB", description="The most memory for activations kept by the search.")

    epochs: int = Field(10, ge=1, description="Epochs of pruning and quantizing in parallel with fine-tuning.")
    batch_size: int = Field(128, ge=1, description="Samples a step, of all processes together.")
    accumulate: int = Field(1, ge=1, description="Passes in which a process takes its samples of a step: saves memory.")
    optimizer: Literal["sgd", "adam", "adamw"] = Field("sgd", description="SGD has Nesterov momentum.")
    learning_rate: float = Field(0.01, gt=0, description="The highest learning rate of the fine-tuning.")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's momentum.")
    weight_decay: float = Field(0.0, ge=0, description="Of weights; biases and norms have none.")
    schedule: Literal["cosine", "step", "constant"] = Field(
        "cosine", description="cosine falls to zero; step divides by ten at half and at three quarters of the run."
    )
    warmup_epochs: float = Field(0.0, ge=0, description="Linear rise of the learning rate at the start.")
    float_epochs: int = Field(0, ge=0, description="Epochs of training before compression, if there are no weights.")
    float_learning_rate: float | None = Field(
        None, gt=0, description="The highest learning rate of that training; else learning_rate."
    )

    clip_norm: float | None = Field(
        None, gt=0, description="The most that the norm of a step's gradients may be; longer ones are scaled down."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of each target given to all classes alike.")
    distillation: float = Field(
        0.0, ge=0, le=1, description="Weight of the uncompressed network's outputs in the loss; 0 is labels alone."
    )
    distillation_temperature: float = Field(1.0, gt=0, description="What outputs are divided by to compare them.")
    ema: float | None = Field(
        None, gt=0, lt=1, description="Decay of a moving average of the weights, which is then what comes out."
    )
    batch_norm_batches: int = Field(
        0, ge=0, description="Minibatches to estimate batch-norm statistics from anew at the end; 0 leaves them."
    )
    limit_steps: int | None = Field(None, ge=1, description="End each training after so many steps: a short try.")

    seed: int = Field(0, ge=0, description="Of initial weights, the validation split, the order of the data.")
    device: str = Field("auto", description="auto, cpu, cuda or mps.")
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="How the processes of torchrun share the work: auto is ddp; fsdp splits the weights, too."
    )
    precision: Literal["32", "bf16", "fp16"] = Field(
        "32", description="Arithmetic of training steps; the weights, and all evaluations, are float32."
    )
    channels_last: bool = Field(False, description="Memory layout of images; often faster for convolutions.")
    compile: bool = Field(False, description="Train with torch.compile.")

    checkpoints: str | None = Field(
        None, description="Folder or fsspec URL of the checkpoints; else checkpoints/ in the run folder."
    )
    checkpoint_steps: int | None = Field(None, ge=1, description="Steps between checkpoints within an epoch.")
    checkpoint_minutes: float = Field(15.0, ge=0, description="Minutes between checkpoints within an epoch.")
    keep_checkpoints: int = Field(2, ge=1, description="How many of the last checkpoints are kept.")
    loggers: tuple[Literal["tensorboard", "mlflow"], ...] = Field(
        (), description="Where metrics go beside the run folder: tensorboard, mlflow."
    )

    @classmethod
    def make(cls, values: Mapping[str, Any], source: str = "the recipe") -> Recipe:
        """A recipe from plain values.

        Args:
            source: what to call them in an error.

        Raises:
            RecipeError: an unknown field (the nearest is suggested), a missing one, or a value out of range.
        """
        try:
            recipe = cls.model_validate(dict(values))
        except pydantic.ValidationError as error:
            raise RecipeError(f"{source} cannot be used:\n{explain(error, cls.model_fields)}") from None
        if recipe.weights is None and recipe.float_epochs == 0:
            raise RecipeError(
                f"{source} has neither weights nor float_epochs: there is no trained network to compress. Give a file "
                f"of weights, or the number of epochs to train first"
            )
        targets = recipe.targets()
        if len(targets) > 1 or (targets and recipe.plan is not None):
            given = [*targets, *(["plan"] if recipe.plan is not None else [])]
            raise RecipeError(
                f"{source} gives {' and '.join(given)}: a plan is given, or searched for one target. Give one of them "
                f"(an option's value none takes a field out)"
            )
        return recipe

    def targets(self) -> dict[str, float | int | str]:
        """What a search is to reach, as far as it is given."""
        values = {name: getattr(self, name) for name in ("ratio", "bytes", "max_drop", "trade_off")}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def load(cls, path: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
        """A recipe from a YAML file, with some fields changed; raises `RecipeError` as `make` does."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: cannot be read as a recipe ({error}); give a YAML file") from None
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{path}: is not YAML: {error}") from None
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise RecipeError(f"{path}: holds no recipe; a recipe is lines of 'field: value', such as 'model: lenet-5'")
        return cls.make(values | dict(changes or {}), str(path))

    def to_yaml(self) -> str:
        """The recipe as YAML with every field, readable again by `load`."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)

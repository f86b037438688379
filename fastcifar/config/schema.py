"""The models of a recipe: every key that a recipe file may hold, its type, range and default.

This module imports neither torch nor numpy, so that a recipe can be read, checked and shown at once.
"""

import unicodedata
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_serializer,
    field_validator,
    model_validator,
)

from fastcifar.config.operations import Op, check_ops, check_size, parse_op
from fastcifar.config.user_code import import_path, is_import_path
from fastcifar.errors import UserError, shown

# Bounds are far above what makes sense and below what would be computed for years or overflow float32.
MAX_EPOCHS, MAX_BATCH, MAX_IMAGES, MAX_NAME = 100_000, 1 << 20, 10_000_000, 100
TRAIN_IMAGES = {"cifar10": 50_000, "cifar100": 50_000}
CLASSES = {"cifar10": 10, "cifar100": 100, "synthetic": 10, "cifar10-or-synthetic": 10}
FIXED_SIZE = ("lenet5", "deep_baseline", "deep_baseline_bn", "residual5", "vit", "cct")
"""Models whose linear layers or positions are made for one size of square images; the others pool globally."""
RELEASE_PX = 32
"""What is known of a data set when a recipe is read; an image folder may hold anything."""

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
NotNegative = Annotated[float, Field(ge=0, le=1e6)]


def _one_line(text: str) -> str:
    """Refuse what a terminal or a TOML file would take for something else than text."""
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            raise ValueError(f"{shown(text)} holds a control character ({shown(character)})")
    return text


def _file_name(text: str) -> str:
    """Refuse what is not a plain word: a name becomes part of the path of the run directory."""
    if not text or not all(c.isalnum() or c in "_.+-" for c in text) or text[0] in ".+-":
        raise ValueError(f"{shown(text)} is not a plain name: letters, digits, _, and not at its start . + -")
    return text


ImportPath = Annotated[str, Field(max_length=200), AfterValidator(import_path)]
"""``package.module:Name``, of something that is not ours; see `fastcifar.config.user_code`."""
OneLine = Annotated[str, Field(max_length=200), AfterValidator(_one_line)]
Name = Annotated[str, Field(max_length=MAX_NAME), AfterValidator(_file_name)]


OURS, BY_IMPORT_PATH = "ours", "by import path"


def _whose(value: Any) -> str:
    """Return whether a table's ``name`` is one of ours or an import path."""
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return BY_IMPORT_PATH if is_import_path(name) else OURS


class Section(BaseModel):
    """A table of a recipe: unknown keys are errors, values are never coerced, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# ------------------------------------------------------------------------------------------------------------- data


class LoaderConfig(Section):
    """How batches reach the device.

    ``auto`` takes ``resident`` when the set fits in a quarter of the free device memory, else ``ffcv``, ``dali``,
    ``torchvision``, whichever is installed.

    ``order = "random"`` visits the samples in any order, ``"block"`` in a quasi-random one that reads a disk in long
    runs: blocks of consecutive samples (1 MiB of pixels) in random order, and the samples of every 128 such blocks in
    random order; sets of up to 128 MiB are one window, and their order is that of ``"random"``. ``"plan"`` is one of
    the two: ``block`` where the set is streamed and larger than 80% of the memory that the run may use, else
    ``random``; a run that goes on elsewhere keeps what it began with. ``"native"`` lets a backend shuffle in its own
    way (DALI).
    """

    name: Literal["auto", "resident", "ffcv", "dali", "torchvision"] = "auto"
    workers: int = Field(2, ge=1, le=256)
    order: Literal["plan", "random", "block", "native"] = "plan"


Phase = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[int, Field(ge=1, le=1024)]], Field(strict=False)]
"""A share of the run, and the side of the images in pixels from then on."""


class DataConfig(Section):
    """Which images. ``holdout`` training images are set aside to choose epochs and weights on, after ``subset``.

    ``cifar10-or-synthetic``, for smoke tests only, takes synthetic images where no place for data is named or made.
    ``subset`` and ``test_subset`` keep only the first images of each class (0 keeps all), for smoke tests. All three
    count images in total, each class in proportion (shares that are not whole by the largest remainder): of ten equal
    classes, ``subset = 100`` keeps ten each. A subset smaller than the number of classes is an error.

    ``holdout_seed`` chooses the holdout, the run's ``seed`` by default: with one of its own, runs of several seeds hold
    out the same images and can be combined on them.

    ``resize = [[0.0, 24], [0.4, 28], [0.7, 32]]`` trains on small images first (progressive resizing): on 24 px from
    the start, on 28 px after 40% of the run, each phase from the next epoch on. The set is resized once for each size,
    bilinearly with antialiasing; tests are on whole images. It needs the resident loader.
    """

    source: Literal["cifar10", "cifar100", "folder", "synthetic", "cifar10-or-synthetic"] = "cifar10"
    loader: LoaderConfig = LoaderConfig()
    holdout: int = Field(0, ge=0, le=MAX_IMAGES)
    holdout_seed: int | None = Field(None, ge=0, lt=2**63)
    resize: list[Phase] = Field([], max_length=16)
    subset: int = Field(0, ge=0, le=MAX_IMAGES)
    test_subset: int = Field(0, ge=0, le=MAX_IMAGES)
    mean: list[Annotated[float, Field(ge=-100, le=100)]] = Field([0.5, 0.5, 0.5], min_length=3, max_length=3)
    std: list[Annotated[float, Field(ge=1e-3, le=1e3)]] = Field([0.5, 0.5, 0.5], min_length=3, max_length=3)


def _read_augment(value: Any) -> Any:
    """Let a recipe write ``augment = ["crop(4)"]`` for ``augment = {ops = ["crop(4)"]}``."""
    return {"ops": value} if isinstance(value, list) else value


class AugmentConfig(Section):
    """The augmentations of a training image, in order; ``where = "loader"`` runs them as PIL transforms in workers."""

    ops: list[Any] = Field([], max_length=32)
    where: Literal["device", "loader"] = "device"

    @field_validator("ops", mode="after")
    @classmethod
    def _parse(cls, ops: list[Any]) -> list[Op]:
        try:
            parsed = [op if isinstance(op, Op) else parse_op(_text(op)) for op in ops]
            check_ops(parsed)
            return parsed
        except UserError as error:
            raise ValueError(str(error)) from None

    @field_serializer("ops")
    def _write(self, ops: list[Op]) -> list[str]:
        return [str(op) for op in ops]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f'{shown(value)} is not a text such as "crop(4)"')
    return value


class MixConfig(Section):
    """CutMix (Yun et al., 2019) and Mixup (Zhang et al., 2018) on the batch.

    With probability ``p`` a batch is mixed: by CutMix or Mixup as ``name`` says, by either with ``switch`` as the
    probability of CutMix for ``"cutmix_or_mixup"``. ``start`` is the fraction of the run from which on it happens.
    ``per_sample`` draws a lambda and a box for each sample instead of one per batch.
    """

    name: Literal["cutmix", "mixup", "cutmix_or_mixup"]
    alpha: Positive = 1.0
    p: Fraction = 1.0
    switch: Fraction = 0.5
    start: Fraction = 0.0
    per_sample: bool = False


# ------------------------------------------------------------------------------------------------------------ model


class ModelBase(Section):
    """What all models share.

    ``kaiming_normal_fan_out``: He et al., 2015, on Conv2d and Linear weights, biases 0. ``..._conv``: on Conv2d alone;
    Linear weights stay torch's, as in the article's code for wide nets and PyramidNets.
    """

    init: Literal["default", "kaiming_normal_fan_out", "kaiming_normal_fan_out_conv"] = "default"


def check_depth(depth: int, period: int, rest: int) -> None:
    """Refuse a depth that is not ``period`` times a whole number of 1 or more, plus ``rest``.

    Raises:
        ValueError: with the nearest one that is.
    """
    if (depth - rest) % period:
        nearest_depth = max(1, round((depth - rest) / period)) * period + rest
        raise ValueError(f"depth {depth} is not {period}n + {rest}; the nearest is {nearest_depth}")


class LeNet5Config(ModelBase):
    """LeNet-5 with ReLU (LeCun et al., 1998)."""

    name: Literal["lenet5"]


class DeepBaselineConfig(ModelBase):
    """Five convolutions and four linear layers, with or without BatchNorm."""

    name: Literal["deep_baseline", "deep_baseline_bn"]


class Residual5Config(ModelBase):
    """Five post-activation residual blocks and a three-layer head."""

    name: Literal["residual5"]
    dropout: Fraction = 0.1


class Residual15Config(ModelBase):
    """A ResNet of ten basic blocks, 64 to 512 channels."""

    name: Literal["residual15"]


class WideResNetConfig(ModelBase):
    """Wide residual network (Zagoruyko & Komodakis, 2016); ``shakedrop`` is the last block's death probability."""

    name: Literal["wide_resnet"]
    depth: int = Field(16, ge=10, le=1000)
    widen: int = Field(8, ge=1, le=128)
    dropout: Fraction = 0.3
    first_relu: bool = True
    last_bn: bool = False
    shakedrop: Fraction = 0.0
    shakedrop_gate: Literal["batch", "sample"] = "batch"

    @model_validator(mode="after")
    def _depth(self) -> "WideResNetConfig":
        check_depth(self.depth, 6, 4)
        return self


class PyramidNetConfig(ModelBase):
    """PyramidNet (Han et al., 2017), with ShakeDrop (Yamada et al., 2019) where ``shakedrop`` is above 0.

    ``align`` pads every internal width up to a multiple with channels that stay exactly zero.
    """

    name: Literal["pyramidnet"]
    depth: int = Field(110, ge=8, le=2000)
    alpha: int = Field(150, ge=1, le=10_000)
    block: Literal["basic", "bottleneck"] = "basic"
    shakedrop: Fraction = 0.0
    shakedrop_gate: Literal["batch", "sample"] = "batch"
    align: Literal[1, 8, 16, 32] = 1

    @model_validator(mode="after")
    def _depth(self) -> "PyramidNetConfig":
        check_depth(self.depth, 6 if self.block == "basic" else 9, 2)
        return self


class SpeedNetConfig(ModelBase):
    """A small network in the manner of the speed records (Jordan, 2024): whitening layer, GELU, scaled head.

    Attributes:
        widths: channels of the three blocks.
        convs_per_block: 2, or 3 with a residual connection around the last two.
        whiten_bias_init: the whitening layer's bias starts at torch's ``default`` or at ``zero``.
        whiten_bias_epochs: it learns in the first so many epochs.
        whiten_bias_rate: its learning rate follows the ``run``, or falls linearly to 0 within its epochs (``fade``).
        bn_momentum: share of each batch in BatchNorm's running statistics.
        head_std: what the head's initial weights are scaled to deviate by; 0 keeps torch's default.
        scale: what the logits are multiplied by.
    """

    name: Literal["speednet"]
    widths: list[Annotated[int, Field(ge=1, le=8192)]] = Field([64, 256, 256], min_length=3, max_length=3)
    convs_per_block: int = Field(2, ge=2, le=3)
    whiten_bias_init: Literal["default", "zero"] = "default"
    whiten_bias_epochs: int = Field(3, ge=0, le=MAX_EPOCHS)
    whiten_bias_rate: Literal["run", "fade"] = "run"
    bn_momentum: float = Field(0.4, gt=0, le=1)
    head_std: NotNegative = 0.0
    scale: Positive = 1 / 9

    @model_validator(mode="after")
    def _one_initialization_of_the_head(self) -> "SpeedNetConfig":
        if self.head_std and self.init == "kaiming_normal_fan_out":
            raise ValueError('head_std scales torch\'s weights, which init = "kaiming_normal_fan_out" replaces')
        return self


def _whole_heads(config: "ViTConfig | CCTConfig") -> None:
    if config.dim % config.heads:
        raise ValueError(f"dim = {config.dim} is not a multiple of heads = {config.heads}")


class TransformerBase(ModelBase):
    """What the transformers share.

    Attributes:
        dim: width of the tokens, a multiple of ``heads``.
        depth: number of encoder blocks.
        heads: attention heads.
        mlp_ratio: width of a block's MLP as a multiple of ``dim``.
        dropout: after embeddings and each layer of an MLP.
        drop_path: probability that the last block's residual branches are left out (stochastic depth, Huang et al.,
            2016); the first block's is 0, the others lie between.
    """

    dim: int = Field(256, ge=1, le=8192)
    depth: int = Field(7, ge=1, le=200)
    heads: int = Field(4, ge=1, le=256)
    mlp_ratio: float = Field(2.0, gt=0, le=64)
    dropout: float = Field(0.0, ge=0, lt=1)
    drop_path: float = Field(0.1, ge=0, lt=1)


class ViTConfig(TransformerBase):
    """A plain vision transformer (Dosovitskiy et al., 2021) on patches of ``patch`` x ``patch`` pixels: 6.35 M."""

    name: Literal["vit"]
    patch: int = Field(4, ge=1, le=64)
    depth: int = Field(8, ge=1, le=200)
    heads: int = Field(8, ge=1, le=256)
    mlp_ratio: float = Field(4.0, gt=0, le=64)

    @model_validator(mode="after")
    def _heads(self) -> "ViTConfig":
        _whole_heads(self)
        return self


class CCTConfig(TransformerBase):
    """Compact convolutional transformer (Hassani et al., 2021); the defaults are CCT-7/3x1 for 32 px: 3.76 M.

    ``convs`` convolutions of ``kernel`` x ``kernel`` pixels, each with a max pooling that halves the side, make tokens.
    """

    name: Literal["cct"]
    kernel: Literal[1, 3, 5, 7] = 3
    convs: int = Field(1, ge=1, le=4)
    attention_dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads(self) -> "CCTConfig":
        _whole_heads(self)
        return self


class ConvNeXtV2Config(ModelBase):
    """ConvNeXt V2 (Woo et al., 2023); the defaults are Atto with a stem of stride 1 for small images.

    Attributes:
        widths: channels of the four stages.
        depths: blocks of the four stages.
        stem_stride: 1 for small images; 4 is the published one, for 224 px.
        drop_path: probability that the last block's residual branch is left out; the first one's is 0.
    """

    name: Literal["convnextv2"]
    widths: list[Annotated[int, Field(ge=1, le=4096)]] = Field([40, 80, 160, 320], min_length=4, max_length=4)
    depths: list[Annotated[int, Field(ge=1, le=100)]] = Field([2, 2, 6, 2], min_length=4, max_length=4)
    stem_stride: Literal[1, 2, 4] = 1
    drop_path: float = Field(0.1, ge=0, lt=1)


class ShakeShakeConfig(ModelBase):
    """Shake-Shake (Gastaldi, 2017): two branches per block, ``width`` channels in the first stage; 26 2x32d here."""

    name: Literal["shake_shake"]
    depth: int = Field(26, ge=8, le=2000)
    width: int = Field(32, ge=2, le=4096, multiple_of=2)

    @model_validator(mode="after")
    def _depth(self) -> "ShakeShakeConfig":
        check_depth(self.depth, 6, 2)
        return self


class ResidualAttentionConfig(ModelBase):
    """Residual attention network for small images (Wang et al., 2017); Attention-92 here, 1.9 M parameters.

    Attributes:
        depth: layers of the trunk: 36 for each attention module of a stage, and 20.
        width: channels of the first stage; the second and third have twice and four times as many.
    """

    name: Literal["residual_attention"]
    depth: int = Field(92, ge=56, le=2000)
    width: int = Field(64, ge=4, le=4096, multiple_of=4)

    @model_validator(mode="after")
    def _depth(self) -> "ResidualAttentionConfig":
        check_depth(self.depth, 36, 20)
        return self


class UserModelConfig(ModelBase):
    """A model by import path: ``mypkg.nets:MyNet``, or ``timm:resnet18`` (with the extra ``timm``).

    It is called with the options, and with ``num_classes`` and ``image_px`` where its signature has them and the
    options do not; it maps images (B, 3, S, S) to logits (B, num_classes).
    """

    name: ImportPath
    options: dict[str, Any] = {}


PRESETS: dict[str, dict[str, Any]] = {
    "wrn16_8": {"name": "wide_resnet", "depth": 16, "widen": 8},
    "wrn28_10": {"name": "wide_resnet", "depth": 28, "widen": 10},
    "pyramidnet110_a150": {"name": "pyramidnet", "depth": 110, "alpha": 150},
    "pyramidnet110_a270": {"name": "pyramidnet", "depth": 110, "alpha": 270},
    "pyramidnet272_a200": {"name": "pyramidnet", "depth": 272, "alpha": 200, "block": "bottleneck"},
    "cct7_3x1": {"name": "cct", "depth": 7, "kernel": 3, "convs": 1},
    "convnextv2_atto": {"name": "convnextv2", "widths": [40, 80, 160, 320], "depths": [2, 2, 6, 2]},
    "convnextv2_femto": {"name": "convnextv2", "widths": [48, 96, 192, 384], "depths": [2, 2, 6, 2]},
    "shake_shake26_2x32d": {"name": "shake_shake", "depth": 26, "width": 32},
    "shake_shake26_2x64d": {"name": "shake_shake", "depth": 26, "width": 64},
    "residual_attention92": {"name": "residual_attention", "depth": 92},
    "residual_attention236": {"name": "residual_attention", "depth": 236},
}


def expand_preset(value: Any) -> Any:
    """Replace a preset's name by the options that it stands for; options beside the name win."""
    if isinstance(value, dict) and isinstance(value.get("name"), str) and value["name"] in PRESETS:
        return {**PRESETS[value["name"]], **{k: v for k, v in value.items() if k != "name"}}
    return value


ModelUnion = Annotated[
    LeNet5Config
    | DeepBaselineConfig
    | Residual5Config
    | Residual15Config
    | WideResNetConfig
    | PyramidNetConfig
    | SpeedNetConfig
    | ViTConfig
    | CCTConfig
    | ConvNeXtV2Config
    | ShakeShakeConfig
    | ResidualAttentionConfig,
    Field(discriminator="name"),
]
ModelConfig = Annotated[
    Annotated[ModelUnion, Tag(OURS)] | Annotated[UserModelConfig, Tag(BY_IMPORT_PATH)],
    Discriminator(_whose),
    BeforeValidator(expand_preset),
]

# ------------------------------------------------------------------------------------------------------- optimization


class OptimizerBase(Section):
    """``weight_decay`` is L2 in the gradient for sgd and adam, decoupled for adamw and (unless told otherwise) muon."""

    lr: Positive
    weight_decay: NotNegative = 0.0


class SGDConfig(OptimizerBase):
    """Stochastic gradient descent with (Nesterov) momentum, as torch.optim.SGD defines it.

    ``lr_norm_bias`` is the learning rate of BatchNorm's biases, ``lr`` by default. ``decay_per = "step"`` divides the
    weight decay by each parameter's own peak learning rate, so that the two can be tuned apart (Jordan, 2024,
    airbench); ``"lr"`` lets it grow with the learning rate, as torch does.
    """

    name: Literal["sgd"]
    momentum: Fraction = 0.9
    nesterov: bool = True
    lr_norm_bias: Positive | None = None
    decay_per: Literal["lr", "step"] = "lr"


class AdamConfig(OptimizerBase):
    """Adam (Kingma & Ba, 2015) or AdamW (Loshchilov & Hutter, 2019).

    ``decay = "matrices"`` keeps the weight decay to the weights of convolutions and linear layers, as is usual for
    transformers: not on norms, biases, tokens and position embeddings.
    """

    name: Literal["adam", "adamw"]
    decay: Literal["all", "matrices"] = "all"
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=2)
    eps: Positive = 1e-8


class MuonConfig(OptimizerBase):
    """Muon (Jordan et al., 2024) on convolution weights, SGD with Nesterov momentum on everything else.

    ``lr_head`` is the learning rate of linear weights, ``lr_other`` by default. ``normalize`` keeps each convolution's
    weight at norm sqrt(outputs), as airbench does. ``decay_per = "step"`` is airbench's weight decay: none on
    convolutions; on everything else L2 in the gradient, and so in the momentum, divided by its own peak learning rate.
    """

    name: Literal["muon"]
    momentum: Fraction = 0.6
    lr_head: Positive | None = None
    lr_other: Positive = 0.05
    momentum_other: Fraction = 0.85
    normalize: bool = False
    decay_per: Literal["lr", "step"] = "lr"


class UserOptimizerConfig(OptimizerBase):
    """A ``torch.optim.Optimizer`` by import path, with the options that its class takes: ``mypkg.opt:Lion``.

    It gets the model's parameters, which are views of the flat parameters; ``parameters = "flat"`` hands over all of
    them as one tensor (n,): few launches instead of some for each, right only for what works element by element.
    """

    name: ImportPath
    options: dict[str, Any] = {}
    parameters: Literal["each", "flat"] = "each"


OurOptimizer = Annotated[SGDConfig | AdamConfig | MuonConfig, Field(discriminator="name")]
OptimizerConfig = Annotated[
    Annotated[OurOptimizer, Tag(OURS)] | Annotated[UserOptimizerConfig, Tag(BY_IMPORT_PATH)], Discriminator(_whose)
]


class ScheduleConfig(Section):
    """The learning rate over the run, as a factor of ``optimizer.lr``.

    ``constant``; ``cosine`` from 1 to ``final`` (Loshchilov & Hutter, 2017); ``linear`` from 1 to ``final``;
    after ``warmup_epochs`` of linear rise. It moves once an ``epoch`` or once a ``step``. The warm-up's last epoch or
    step has the full rate already; with ``warmup_from``, its first one has that share of it, and the first one after
    it the full rate.
    """

    name: Literal["constant", "cosine", "linear"] = "constant"
    per: Literal["epoch", "step"] = "epoch"
    warmup_epochs: NotNegative = 0.0
    warmup_from: Fraction | None = None
    final: Fraction = 0.0


class AsamConfig(Section):
    """Sharpness-aware minimization: SAM (Foret et al., 2021) or ASAM (Kwon et al., 2021).

    Attributes:
        rho: radius of the ascent.
        adaptive: ``true`` for ASAM, ``false`` for SAM.
        eta: added to the scale abs(w) (ASAM).
        scope: scale all parameters by abs(w), or only weight tensors (the ASAM authors' choice).
        batch_norm: whether running statistics move in the second pass too (as published) or stay.
        start: share of the run's steps after which it begins; the steps before it are plain ones, of one pass. Most of
            what sharpness-aware minimization is worth comes from its last phase (Zhou et al., 2025, "Sharpness-aware
            minimization efficiently selects flatter minima late in training").
        norm: on several devices, ``global`` goes up along the gradient of the whole batch, as one device does; with
            ``rank`` each device goes up along the gradient of its own part (m-sharpness, Foret et al., 2021), which
            saves an all-reduce a step.
    """

    rho: Positive
    adaptive: bool = True
    eta: NotNegative = 0.0
    scope: Literal["all", "weights"] = "all"
    batch_norm: Literal["update", "freeze"] = "update"
    start: float = Field(0.0, ge=0, lt=1)
    norm: Literal["global", "rank"] = "global"


class EmaConfig(Section):
    """Exponential moving average of weights and BatchNorm statistics, after each step, without warm-up."""

    decay: float = Field(0.999, gt=0, lt=1)


class LookaheadConfig(Section):
    """Lookahead (Zhang et al., 2019): every so many steps, weights and BatchNorm statistics go back to a slow average.

    The average keeps a share of ``decay * progress ** power`` of itself, where ``progress`` is the done fraction of the
    run, and takes the rest from the present weights, which then become the average. The run ends on the average. The
    defaults are airbench's (Jordan, 2024).
    """

    every: int = Field(5, ge=1, le=MAX_IMAGES)
    decay: float = Field(0.95**5, ge=0, lt=1)
    power: NotNegative = 3.0


class LossConfig(Section):
    """Cross entropy with label smoothing in 0..1 and, where given, one weight per class.

    ``reduction = "sum"`` takes the gradient of the sum over the batch instead of the mean (Jordan, 2024, airbench):
    learning rates then hold per sample. The recorded loss is the mean either way.
    """

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    class_weights: Annotated[list[NotNegative], Field(min_length=1, max_length=100_000)] | None = None
    reduction: Literal["mean", "sum"] = "mean"

    @model_validator(mode="after")
    def _weighted_sum(self) -> "LossConfig":
        if self.reduction == "sum" and self.class_weights is not None:
            raise ValueError('reduction = "sum" works without class_weights')
        return self


class DistillConfig(Section):
    """Knowledge distillation from trained models (Hinton et al., 2015).

    Attributes:
        teacher: a finished run's directory; or that of a soft or weighted combination, whose members then teach
            together, each with its weight.
        cache: compute what the teachers say of every augmented image of an epoch once, in float16, and keep it: for
            all later runs of the same seed, images and augmentations, whatever their student.
        weights: which of its weights; by default the epoch selected on its holdout where it has one, else the last.
        temperature: what both models' logits are divided by.
        weight: share of the divergence from the teacher in the loss; the rest is the cross entropy with the labels.
    """

    teacher: Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_one_line)]
    weights: Literal["last", "best", "selected"] | None = None
    temperature: Positive = 4.0
    weight: Fraction = 0.9
    cache: bool = False


class SelectConfig(Section):
    """Training on the hardest samples of each batch only, as a small net, the proxy, finds them.

    It is what airbench96_faster does (Jordan, 2024).
    The proxy goes through the same batches with the recipe's own optimizer, rates and loss, without averages; it is no
    part of what is trained. Metrics and images/s are of the samples that the model trains on.

    Attributes:
        share: of a batch that is kept.
        every: the proxy learns, from what it keeps, in every so many-th step; in the others it only looks.
        model: the proxy, a table as the recipe's ``model``.
    """

    share: float = Field(0.5, gt=0, lt=1)
    every: int = Field(4, ge=1, le=MAX_IMAGES)
    model: Annotated[ModelUnion, BeforeValidator(expand_preset)]


class TrainConfig(Section):
    """How long, and how a batch goes through the model.

    Attributes:
        epochs: length of the run.
        batch_size: samples an optimizer step, all devices together.
        drop_last: leave out an epoch's last, smaller batch.
        accumulate: send each batch through the model in this many micro-batches whose gradients add up; for whoever
            trains a large model on a GPU whose memory does not hold the batch's activations.
        grad_clip: bound of the global gradient norm, 0 for none; for whoever trains a model of their own that diverges
            now and then.
    """

    epochs: int = Field(ge=1, le=MAX_EPOCHS)
    batch_size: int = Field(128, ge=1, le=MAX_BATCH)
    drop_last: bool = False
    accumulate: int = Field(1, ge=1, le=MAX_BATCH)
    grad_clip: NotNegative = 0.0


class EngineConfig(Section):
    """How a step is executed; the result is the same within rounding.

    Attributes:
        device: ``auto`` takes a GPU where there is one.
        mode: ``auto`` is a captured CUDA graph of a compiled model on a GPU, eager elsewhere.
        precision: of convolutions and matrix products. ``auto`` is ``bf16`` where the device has instructions for it
            (GPUs since 2020, CPUs with AVX-512 BF16 or AMX), else ``fp32``, because emulated bf16 is several times
            slower; a run keeps what it began with. ``fp16`` is for GPUs without bf16 (V100, T4).
        working_copy: keep bf16 (or fp16) weights beside the fp32 ones, written by the optimizer's own kernel, and hand
            them to the model, so that nothing is cast in a pass and gradients travel in 16 bits: the same values in
            fewer bytes. ``auto`` on a GPU, unless ``train.accumulate`` is above 1.
        fused_batch_norm: in training on a GPU, normalize, activate, drop and add a shortcut in two launches, and return
            in two; ``auto`` for every model that can (wide_resnet and pyramidnet).
        strict: make it an error when the step cannot be executed as ``mode`` asks for (a model that does not compile
            or cannot be captured), instead of saying so and going on with less. FASTCIFAR_STRICT=1 in the environment
            does so for every recipe.
        batch_norm: on several devices, BatchNorm normalizes with the statistics of each device's part of the batch
            (``local``) or of the whole batch (``sync``), as one device does.
        on_nonfinite: ``stop`` ends the run at a loss that is not finite; ``skip`` leaves a step whose loss or gradient
            is not finite out of it.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    mode: Literal["auto", "eager", "compile", "graph"] = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32", "tf32"] = "auto"
    working_copy: Literal["auto", True, False] = "auto"
    fused_batch_norm: Literal["auto", True, False] = "auto"
    strict: bool = False
    batch_norm: Literal["local", "sync"] = "local"
    on_nonfinite: Literal["stop", "skip"] = "stop"

    @property
    def gpu_precision(self) -> str:
        """``precision`` on a current GPU: what predictions and estimates are made for."""
        return "bf16" if self.precision == "auto" else self.precision


class EvalConfig(Section):
    """When and how to evaluate. ``tta``: test-time augmentation, reported beside the plain metrics."""

    every_epochs: int = Field(1, ge=1, le=MAX_EPOCHS)
    batch_size: int = Field(1000, ge=1, le=MAX_BATCH)
    tta: Literal["none", "flip", "multicrop"] = "none"
    train_logits: bool = False


class CheckpointConfig(Section):
    """How often a checkpoint is written (the last epoch always is) and how many are kept.

    Two are kept, so that a run can go on when the newest one is damaged.

    ``resume = "auto"`` goes on with the newest unfinished run of the same recipe, where there is one.
    """

    every_epochs: int = Field(1, ge=1, le=MAX_EPOCHS)
    keep: int = Field(2, ge=1, le=MAX_EPOCHS)
    resume: Literal["never", "auto"] = "never"


class Published(Section):
    """What the published ladder reports, in percent; ``best`` was chosen on the test set.

    The ladder is the article "CIFAR-10 분류 모델 97.78% 달성하기" with its code, github.com/windopper/cifar (commit
    70ec89d).
    """

    best: float = Field(ge=0, le=100)
    last: float | None = Field(None, ge=0, le=100)


# ------------------------------------------------------------------------------------------------------------ recipes


class Recipe(Section):
    """One training run, completely."""

    name: Name
    title: OneLine = ""
    stage: OneLine = ""
    published: Published | None = None
    target: float | None = Field(None, ge=0, le=100)
    seed: int = Field(42, ge=0, lt=2**63)
    data: DataConfig = DataConfig()
    augment: Annotated[AugmentConfig, BeforeValidator(_read_augment)] = AugmentConfig()
    mix: MixConfig | None = None
    model: ModelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    asam: AsamConfig | None = None
    ema: EmaConfig | None = None
    lookahead: LookaheadConfig | None = None
    distill: DistillConfig | None = None
    select: SelectConfig | None = None
    train: TrainConfig
    engine: EngineConfig = EngineConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    track: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field([], max_length=4)

    @property
    def passes_per_step(self) -> float:
        """How often a step goes through the model with each sample, forward and backward: the mean over the run."""
        passes = 2 - self.asam.start if self.asam else 1
        return passes if self.select is None else passes * self.select.share

    @model_validator(mode="after")
    def _resizing(self) -> "Recipe":
        starts = [start for start, _ in self.data.resize]
        if not starts:
            return self
        if starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"data.resize begins at {starts}; the first must begin at 0, each one after the last")
        for model in (self.model, *([self.select.model] if self.select else [])):
            if model.name in FIXED_SIZE:
                raise ValueError(f'data.resize: model.name = "{model.name}" has layers made for one size of images')
        if self.data.loader.name not in ("auto", "resident") or self.augment.where == "loader":
            raise ValueError('data.resize works with data.loader.name = "resident" and augment.where = "device"')
        return self

    @model_validator(mode="after")
    def _selection(self) -> "Recipe":
        if self.select is None:
            return self
        if self.mix is not None:
            raise ValueError("select works without mix: how hard a sample is shows with one label (mix = false)")
        if isinstance(self.optimizer, UserOptimizerConfig):
            raise ValueError(f'select works with our own optimizers, not "{self.optimizer.name}"')
        if self.engine.precision == "fp16" or self.engine.on_nonfinite == "skip":
            raise ValueError('select works with engine.precision other than "fp16" and engine.on_nonfinite = "stop"')
        return self

    @model_validator(mode="after")
    def _combinations(self) -> "Recipe":
        if self.asam and self.optimizer.name in ("adam", "adamw", "muon"):
            raise ValueError(f'asam works with optimizer.name = "sgd", not "{self.optimizer.name}"')
        if self.lookahead and self.ema:
            raise ValueError("lookahead and ema are two averages of the same weights; remove one (ema = false)")
        if self.lookahead and getattr(self.model, "whiten_bias_rate", "run") == "fade":
            # Frozen parameters take a share of the whole step, Lookahead's way back included.
            raise ValueError('model.whiten_bias_rate = "fade" works without lookahead; say "run", or lookahead = false')
        if self.engine.working_copy is True and self.engine.gpu_precision not in ("bf16", "fp16"):
            raise ValueError('engine.working_copy needs engine.precision = "bf16" or "fp16"')
        if self.engine.working_copy is True and self.train.accumulate > 1:
            raise ValueError("engine.working_copy works with train.accumulate = 1: gradients would add up in 16 bits")
        if self.engine.fused_batch_norm is True and not _has_fused_batch_norm(self.model):
            raise ValueError("engine.fused_batch_norm = true needs a wide_resnet or a pyramidnet")
        if self.optimizer.name == "muon" and self.engine.precision == "fp16":
            raise ValueError('optimizer.name = "muon" works with engine.precision = "bf16", "fp32" or "tf32"')
        if self.optimizer.name == "muon" and self.engine.on_nonfinite == "skip":
            raise ValueError('engine.on_nonfinite = "skip" works with optimizer.name = "sgd", "adam" or "adamw"')
        if self.augment.where == "loader" and self.data.loader.name not in ("auto", "torchvision"):
            raise ValueError('augment.where = "loader" needs data.loader.name = "torchvision"')
        if self.augment.where == "loader" and any(getattr(op, "fill", "black") == "mean" for op in self.augment.ops):
            raise ValueError('augment.where = "loader" fills with black; say fill="black", or use where = "device"')
        if self.data.loader.order == "native" and self.data.loader.name != "dali":
            raise ValueError('data.loader.order = "native" needs data.loader.name = "dali"')
        return self

    @model_validator(mode="after")
    def _amounts(self) -> "Recipe":
        """Check what is known of the data set before it is there."""
        known, size = TRAIN_IMAGES.get(self.data.source), self.train.batch_size
        left = None if known is None else known - self.data.holdout
        if left is not None and left < 1:
            raise ValueError(f"data.holdout = {self.data.holdout:,} leaves none of the {known:,} training images")
        if left is not None and size > left:
            raise ValueError(f"train.batch_size = {size:,} is larger than the {left:,} training images")
        if self.train.accumulate > size:
            raise ValueError(f"train.accumulate = {self.train.accumulate:,} is more than a batch's {size:,} samples")
        if self.schedule.warmup_epochs >= self.train.epochs:
            raise ValueError(
                f"schedule.warmup_epochs = {self.schedule.warmup_epochs:g} fills the run of {self.train.epochs} "
                "epochs; the warm-up must be shorter"
            )
        return self

    @model_validator(mode="after")
    def _data_set(self) -> "Recipe":
        """Check augmentations and class weights against the images and classes of a known data set."""
        classes, weights = CLASSES.get(self.data.source), self.loss.class_weights
        if classes is not None:
            try:
                check_size(self.augment.ops, RELEASE_PX)
            except UserError as error:
                raise ValueError(f"augment.ops: {error}") from None
        if weights is not None and classes is not None and len(weights) != classes:
            raise ValueError(f"loss.class_weights: {len(weights)} weights for {classes} classes")
        if weights is not None and not any(weights):
            raise ValueError("loss.class_weights are all 0; at least one class must count")
        return self


def _has_fused_batch_norm(model: ModelBase) -> bool:
    return isinstance(model, (WideResNetConfig, PyramidNetConfig))


class CombineConfig(Section):
    """How trained runs become one prediction, from their saved logits.

    Attributes:
        how: ``hard`` majority vote, ``soft`` mean of softmax, ``weighted`` mean, or ``stacking`` by a meta-model.
        members: recipe names whose runs are combined, in the order of ``weights`` and of stacking's columns.
        weights: for ``weighted``, where None fits them on the holdout, and for ``hard``: how much each vote counts.
        meta: stacking's meta-model.
        protocol: ``published`` fits on training-set logits and chooses the epoch on the test set; ``honest`` fits
            on the holdout by cross-validation and scores the test set once.
        meta_seed: seed of the meta-model.
    """

    how: Literal["hard", "soft", "weighted", "stacking"]
    members: list[OneLine] = Field(min_length=2, max_length=1000)
    weights: list[NotNegative] | None = None
    meta: Literal["mlp", "logistic"] = "mlp"
    protocol: Literal["honest", "published"] = "honest"
    meta_seed: int = Field(250, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _lengths(self) -> "CombineConfig":
        if self.weights is not None and len(self.weights) != len(self.members):
            raise ValueError(f"{len(self.weights)} weights for {len(self.members)} members")
        if self.weights is not None and not any(self.weights):
            raise ValueError("weights are all 0; at least one member must count")
        if self.weights is not None and self.how in ("soft", "stacking"):
            raise ValueError(f"weights are for how = weighted or hard, not {self.how}; leave them out")
        return self


class CombineRecipe(Section):
    """A combination of trained runs (ensemble or stacking)."""

    name: Name
    title: OneLine = ""
    stage: OneLine = ""
    published: Published | None = None
    combine: CombineConfig

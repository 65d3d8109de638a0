"""Configuration of the finetune recipe: keys, their ranges, and those that a resumed run must share."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from omegaconf import MISSING

from torchfuse.data import Mixture, Sample, Samples
from torchfuse.data.readers import read_mixture
from torchfuse.errors import ConfigError

__all__ = [
    "Config",
    "Data",
    "Pretrained",
    "Train",
    "check_config",
    "default_signature",
    "read_data",
    "resume_signature",
]

# Keys that a resumed run may change: they do not affect the trained weights.
_FREE_ON_RESUME: Final = frozenset(
    {
        "output_dir",
        "data.test",
        "data.num_workers",
        "data.prefetch_factor",
        "data.start_method",
        "data.bad_samples",
        "data.cache_images",
        "data.cache_features",
        "device",
        "activation_checkpointing",
        "compile",
        "eval_batch_size",
        "eval_every",
        "eval_limit",
        "save_every",
        "resume",
    }
)
_FROM_PRETRAINED: Final = "torchfuse.from_pretrained"
_SIZES: Final = ("train.batch_size", "train.gradient_accumulation_steps")


@dataclass
class Pretrained:
    """Directories of pretrained checkpoints: a decoder's and an encoder's, or a whole model's.

    Attributes:
        decoder: directory of the decoder.
        encoder (text, section or null): directory of the encoder; of several encoders, each by name.
        path: directory of a whole model, in place of the two.
    """

    decoder: str | None = None
    encoder: Any = None
    path: str | None = None


@dataclass
class Data:
    """Files of samples, and how samples become batches.

    Attributes:
        train (text, section or list of them): what to train on: a path, as for
            ``torchfuse.data.read_samples``, ``{path, format, weight, image_root}``, or a list of these.
        test (text, section, list of them or null): the same for the samples to answer.
        limit: how many samples of ``train`` to use, the first ones; for one path.
        tokenizer: directory of the tokenizer; null: the decoder's.
        image_transform (text, section or null): directory of the image processor, or a component that
            returns an ``ImageTransform``; null: the encoder's directory.
        media_transforms: the transform of each other modality, by its name: a dotted path, or a
            component; for ``video`` also keywords of ``VideoTransform``.
        template: the chat template: ``llama3``, ``chatml``, ``vicuna``, ``plain`` or a ``.jinja`` file;
            null: the tokenizer's own.
        image_token: id that marks an image; null: the model's.
        features_per_image: features of an image, tile, frame or other item; null: the model's, which
            has it for every encoder whose number of features is fixed.
        scope: which images before a token it may attend to: ``all``, ``last`` or ``group``, see
            ``torchfuse.data.image_mask``; null: the model's.
        cache_images: how many images each process keeps in memory; null: none.
        cache_features: folder in which the features of a frozen encoder are computed once.
        max_seq_len: length of packs, and of the longest sample that is used whole; null: the model's.
        packed: whether several samples share a sequence.
        too_long: what happens to a longer sample: ``drop``, ``cut`` between turns, or ``error``.
        bad_samples: what happens to a sample that cannot be used: ``error``, or ``skip``: it is named,
            counted and left out.
        num_workers: processes that read samples ahead, on each rank; 0: the training process reads them.
        prefetch_factor: batches that each of them reads ahead.
        start_method: how they start: ``fork``, ``spawn`` or ``forkserver``; null: as Python does.
    """

    train: Any = MISSING
    test: Any = None
    limit: int | None = None
    tokenizer: str | None = None
    image_transform: Any = None
    media_transforms: dict[str, Any] | None = None
    template: str | None = None
    image_token: int | None = None
    features_per_image: int | None = None
    scope: str | None = None
    cache_images: int | None = None
    cache_features: str | None = None
    max_seq_len: int | None = None
    packed: bool = False
    too_long: str = "drop"
    bad_samples: str = "error"
    num_workers: int = 0
    prefetch_factor: int = 2
    start_method: str | None = None


@dataclass
class Train:
    """Optimisation, with AdamW and a cosine schedule.

    Attributes:
        lr (number or section): the learning rate, or one for each part that trains, by its name.
        weight_decay (number or section): the weight decay, or one for each part that trains.
        epochs: passes over ``data.train``.
        max_steps: the most optimizer steps; null: all of the epochs.
        batch_size: samples, or packs, of a batch on each rank.
        gradient_accumulation_steps: batches of an optimizer step.
        warmup_steps: steps in which the learning rate rises to ``lr``.
        clip_grad_norm: the largest norm of the gradient; null: not clipped.
    """

    lr: Any = 1e-3
    weight_decay: Any = 0.0
    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    warmup_steps: int = 0
    clip_grad_norm: float | None = 1.0


@dataclass
class Config:
    """Keys of the recipe.

    Attributes:
        output_dir: folder of the run: what was trained, metrics, answers, and ``checkpoints``.
        model: a component that returns a fused model, such as ``torchfuse.from_pretrained``, and its
            keywords.
        pretrained: directories of pretrained checkpoints, as for ``torchfuse.load_pretrained``; none
            where the model loads its own.
        transform: a component that returns a ``SampleTransform``, in place of the keys of ``data``
            that describe one.
        data: files of samples, and how samples become batches.
        train: optimisation.
        freeze: stages ``{start_step, specs: [{module, frozen}]}``, see ``torchfuse.params``; without
            any, the keywords of ``model`` determine what trains.
        device: ``cpu``, ``cuda`` (each rank's own) or another device of torch.
        dtype: dtype of the weights: ``fp32`` or ``bf16``.
        seed: seed of new weights, dropout and the order of the samples.
        activation_checkpointing: whether activations of layers are computed again in the backward pass.
        compile: whether layers are compiled.
        eval_batch_size: samples that are answered at once.
        eval_every: steps between evaluations on samples of ``data.test`` with one image; there is one
            after the last step too; null: none during training.
        eval_limit: how many samples these use, the first ones; null: all.
        save_every: steps between checkpoints; there is one after the last step too; null: none.
        resume: whether to continue from the newest checkpoint, if there is one.
    """

    output_dir: str = MISSING
    model: dict[str, Any] = MISSING
    pretrained: Pretrained = field(default_factory=Pretrained)
    transform: dict[str, Any] | None = None
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    freeze: list[dict[str, Any]] = field(default_factory=list)
    device: str = "cpu"
    dtype: str = "fp32"
    seed: int = 0
    activation_checkpointing: bool = False
    compile: bool = False
    eval_batch_size: int = 128
    eval_every: int | None = None
    eval_limit: int | None = None
    save_every: int | None = None
    resume: bool = False


def check_config(config: Config) -> None:
    """Raise a ``ConfigError`` for missing checkpoints, or one for all numbers out of range."""
    train, pretrained = config.train, config.pretrained
    missing = [name for name in ("decoder", "encoder") if getattr(pretrained, name) is None]
    model = config.model if isinstance(config.model, dict) else {}
    loads_itself = len(missing) == 2 and model.get("_component_") == _FROM_PRETRAINED
    if missing and pretrained.path is None and not loads_itself:
        raise ConfigError(
            f"Configuration key 'pretrained.{missing[0]}': missing, and must be given; or give "
            "pretrained.path, the directory of a whole model, or a model whose _component_ is "
            f"{_FROM_PRETRAINED}."
        )
    problems = [
        f"{name}={value} must be at least {least}"
        for name, value, least in (
            ("train.epochs", train.epochs, 1),
            ("train.max_steps", train.max_steps, 1),
            ("train.batch_size", train.batch_size, 1),
            ("train.gradient_accumulation_steps", train.gradient_accumulation_steps, 1),
            ("train.warmup_steps", train.warmup_steps, 0),
            ("data.limit", config.data.limit, 1),
            ("eval_batch_size", config.eval_batch_size, 1),
            ("eval_every", config.eval_every, 1),
            ("eval_limit", config.eval_limit, 1),
            ("save_every", config.save_every, 1),
        )
        if value is not None and value < least
    ]
    if train.clip_grad_norm is not None and not train.clip_grad_norm > 0:
        problems.append(f"train.clip_grad_norm={train.clip_grad_norm} must be above 0, or null")
    for name, value in (("train.lr", train.lr), ("train.weight_decay", train.weight_decay)):
        rates = list(value.values()) if isinstance(value, dict) else [value]
        numbers = all(isinstance(rate, int | float) and not isinstance(rate, bool) for rate in rates)
        if not rates or not numbers or min(rates) < 0:
            problems.append(
                f"{name}={value} must be a number of at least 0, or one for each part that trains"
            )
    if problems:
        raise ConfigError(f"{'; '.join(problems)}.")


def read_data(config: Config) -> tuple[Samples | Mixture, Sequence[Sample]]:
    """Open the files of samples; return those to train on and those to test with."""
    data = config.data
    train: Samples | Mixture = read_mixture(data.train, seed=config.seed, what="data.train")
    if isinstance(data.train, str):  # one set needs no order of its own
        train = train.samples
    if data.limit is not None:
        if isinstance(train, Mixture):
            raise ConfigError(f"data.limit={data.limit} needs data.train to be one path.")
        train = train[: data.limit]
    test = () if data.test is None else read_mixture(data.test, what="data.test").samples
    return train, test


def resume_signature(config: Config, world_size: int) -> dict[str, Any]:
    """Return the keys that affect training, with their values; a resumed run must have the same.

    Batch size, accumulation and number of ranks are in it as their product, the questions of a step.

    Args:
        config: the configuration.
        world_size: the number of ranks.
    """
    kept = {name: value for name, value in flat(asdict(config)) if name not in _FREE_ON_RESUME}
    size = world_size
    for name in _SIZES:
        size *= kept.pop(name)
    return {**kept, "questions a step": size}


def default_signature() -> dict[str, Any]:
    """Return the part of a signature that a configuration has without any key."""
    return {name: value for name, value in flat(asdict(Config())) if value != MISSING}


def flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over the values of nested sections, by dotted key."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value

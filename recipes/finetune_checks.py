"""Checks of the finetune recipe's configuration, its files, and what a resumed run must share."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from omegaconf import MISSING
from torchfuse.recipes.finetune_config import Config

from torchfuse.checkpoint.run import LoadedCheckpoint
from torchfuse.data import Mixture, Sample, Samples
from torchfuse.data.readers import read_mixture
from torchfuse.errors import CheckpointError, ConfigError
from torchfuse.lora.sections import section_problems
from torchfuse.training.parallel.process_group import launched_world_size

__all__ = ["check_config", "check_resumed", "flat", "read_data", "resume_signature"]

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
        "train.epochs",
        "train.max_steps",
        "train.max_skipped_steps",
        "train.optimizer_in_backward",
        "device",
        "parallel",
        "activation_checkpointing",
        "activation_offloading",
        "compile",
        "eval_batch_size",
        "eval_every",
        "eval_limit",
        "save_every",
        "keep_last",
        "keep_best",
        "logger",
        "log_every",
        "resume",
    }
)
_FROM_PRETRAINED: Final = "torchfuse.from_pretrained"
_ON_THE_CPU: Final = "CPUOffloadOptimizer"  # torchao's
_SIZES: Final = ("train.batch_size", "train.gradient_accumulation_steps")


def check_config(config: Config) -> None:
    """Raise a ``ConfigError`` for missing checkpoints, or one for all numbers out of range."""
    _check_pretrained(config)
    problems = [*_numbers_below(config), *_train_problems(config)]
    if config.keep_best and None in (config.keep_last, config.save_every, config.eval_every):
        problems.append("keep_best=true needs keep_last, save_every and eval_every")
    output = Path(config.output_dir)
    if config.init_from is not None and Path(config.init_from).resolve() in (
        output.resolve(),
        (output / "fusion").resolve(),
    ):
        problems.append(f"init_from={config.init_from} would be written again; name another output_dir")
    if config.activation_offloading and not config.device.startswith("cuda"):
        problems.append(f"activation_offloading=true needs device=cuda, got device={config.device}")
    problems += config.parallel.problems(launched_world_size(), config.device)
    problems += section_problems(asdict(config.lora))
    if problems:
        raise ConfigError(f"{'; '.join(problems)}.")


def _check_pretrained(config: Config) -> None:
    """Raise a ``ConfigError`` if a checkpoint is missing."""
    pretrained = config.pretrained
    missing = [name for name in ("decoder", "encoder") if getattr(pretrained, name) is None]
    model = config.model if isinstance(config.model, dict) else {}
    loads_itself = len(missing) == 2 and model.get("_component_") == _FROM_PRETRAINED
    if missing and pretrained.path is None and not loads_itself:
        raise ConfigError(
            f"Configuration key 'pretrained.{missing[0]}': missing, and must be given; or give "
            "pretrained.path, the directory of a whole model, or a model whose _component_ is "
            f"{_FROM_PRETRAINED}."
        )


def _numbers_below(config: Config) -> Iterator[str]:
    """Yield a phrase for each number that is below its least value."""
    train = config.train
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
        ("keep_last", config.keep_last, 1),
        ("log_every", config.log_every, 1),
        ("train.max_skipped_steps", train.max_skipped_steps, 0),
        ("train.z_loss", train.z_loss, 0),
        ("train.label_smoothing", train.label_smoothing, 0),
    ):
        if value is not None and value < least:
            yield f"{name}={value} must be at least {least}"


def _train_problems(config: Config) -> Iterator[str]:
    """Yield a phrase for each other problem of the section ``train``."""
    train = config.train
    if train.clip_grad_norm is not None and not train.clip_grad_norm > 0:
        yield f"train.clip_grad_norm={train.clip_grad_norm} must be above 0, or null"
    if not 0 < train.lr_layer_decay <= 1:
        yield f"train.lr_layer_decay={train.lr_layer_decay} must be above 0 and at most 1"
    if train.label_smoothing > 1:
        yield f"train.label_smoothing={train.label_smoothing} must be at most 1"
    if train.optimizer_in_backward and not (
        train.clip_grad_norm is None and train.gradient_accumulation_steps == 1
    ):
        yield (
            "train.optimizer_in_backward=true needs train.clip_grad_norm=null and "
            "train.gradient_accumulation_steps=1"
        )
    if train.optimizer_in_backward and config.parallel.strategy == "ddp":
        yield "train.optimizer_in_backward=true needs parallel.strategy=fsdp, got ddp"
    if given := sorted({"lr", "weight_decay", "params"} & train.optimizer.keys()):
        yield (
            f"train.optimizer has {', '.join(given)}: give train.lr and train.weight_decay, which any "
            "optimizer takes"
        )
    if str(train.optimizer.get("_component_")).endswith(_ON_THE_CPU) and not (
        train.clip_grad_norm is None and config.save_every is None and config.device.startswith("cuda")
    ):
        yield (
            f"train.optimizer={_ON_THE_CPU} needs device=cuda, train.clip_grad_norm=null, as it copies "
            "gradients before they are clipped, and save_every=null, as its states cannot be saved"
        )
    for name, value in (("train.lr", train.lr), ("train.weight_decay", train.weight_decay)):
        rates = list(value.values()) if isinstance(value, dict) else [value]
        numbers = all(isinstance(rate, int | float) and not isinstance(rate, bool) for rate in rates)
        if not rates or not numbers or min(rates) < 0:
            yield f"{name}={value} must be a number of at least 0, or one for each part that trains"


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
    kept = {
        name: value
        for name, value in flat(asdict(config))
        if name not in _FREE_ON_RESUME and name.partition(".")[0] not in _FREE_ON_RESUME
    }
    size = world_size
    for name in _SIZES:
        size *= kept.pop(name)
    return {**kept, "questions a step": size}


def check_resumed(
    found: LoadedCheckpoint, config: Config, world_size: int, num_steps: int, digest: str
) -> None:
    """Raise an error if a run cannot be resumed from a checkpoint.

    Args:
        found: the checkpoint.
        config: the run's configuration.
        world_size: the run's number of ranks.
        num_steps: how many steps the run is to have.
        digest: of the rows of the run's samples.

    Raises:
        CheckpointError: if another recipe made it.
        ConfigError: if it was made with another configuration or other data, or has more steps.
    """
    saved = found.extra.get("course")
    if saved is None:
        raise CheckpointError(f"{found.path} is not a checkpoint of this recipe.")
    # Of keys that there were not when it was saved.
    defaults = {name: value for name, value in flat(asdict(Config())) if value != MISSING}
    current, saved = resume_signature(config, world_size), {**defaults, **saved}
    differ = [
        f"{name} was {saved.get(name)!r} and is {value!r}"
        for name, value in current.items()
        if saved.get(name) != value
    ]
    if differ:
        raise ConfigError(f"{found.path} was made with a different configuration: {'; '.join(differ)}.")
    if num_steps < found.step:
        raise ConfigError(
            f"{found.path} is of step {found.step}, and the run has {num_steps} steps; raise "
            "train.max_steps or train.epochs."
        )
    data = found.extra.get("data")  # not saved by earlier versions
    if data is not None and data["digest"] != digest:
        raise ConfigError(
            f"{found.path} was trained on other data: the rows of data.train={config.data.train} have "
            "changed since. Restore them, or start a new run in another output_dir."
        )


def flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over the values of nested sections, by dotted key."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value

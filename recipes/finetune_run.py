"""The finetuning run: build, train, save, evaluate."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import distributed, nn
from torchfuse.recipes.finetune_config import Config
from torchfuse.recipes.finetune_trainer import CHECKPOINTS, RunInterruptedError, Trainer
from torchtune import training
from torchtune.utils import get_world_size_and_rank

from torchfuse import describe
from torchfuse.checkpoint import latest_checkpoint, save_trained
from torchfuse.data import LoaderOptions, Mixture, Sample, Samples, SampleTransform, StepLoader
from torchfuse.data.readers.read_all import read_all
from torchfuse.errors import ConfigError
from torchfuse.io.atomic import write_text
from torchfuse.params import FreezeSchedule
from torchfuse.tasks.evaluation import (
    accuracy,
    accuracy_by_kind,
    accuracy_table,
    evaluate,
    format_costs,
    prediction_record,
    training_costs,
)
from torchfuse.tasks.feature_cache import cache_features
from torchfuse.tasks.prediction import Prediction, predict
from torchfuse.tasks.prompt_lengths import longest_answer
from torchfuse.tasks.prompt_settings import PromptSettings
from torchfuse.tasks.runs import build_run_model, check_images, check_lengths
from torchfuse.tasks.transforms import read_transform
from torchfuse.training import TrainingRecord, device_and_dtype
from torchfuse.training.config import check_output_dir
from torchfuse.training.estimation.utilization import Utilization, utilization
from torchfuse.training.interruption import EXIT_CODE
from torchfuse.training.memory import offload_activations
from torchfuse.training.parallel import (
    check_shared_directory,
    checkpoint_activations,
    compile_layers,
    init_process_group,
    launched_world_size,
)
from torchfuse.training.precision import computing_in, keep_in_fp32
from torchfuse.training.progress import Progress, build_logger


def run(
    config: Config, stages: FreezeSchedule, train: Samples | Mixture, test: Sequence[Sample]
) -> None:
    """Finetune, evaluate and save.

    Args:
        config: a configuration whose numbers have been checked.
        stages: which parameters train from which step on.
        train: the samples to train on.
        test: the samples to answer.
    """
    started = time.perf_counter()
    training.set_seed(config.seed)  # the same on every rank, so that all of them build the same model
    distributed_run = launched_world_size() > 1
    if distributed_run:
        init_process_group(config.device, config.parallel.timeout_minutes)
    log, write_file = (print, write_text) if get_world_size_and_rank()[1] == 0 else (_silent, _silent)
    output = _output_dir(config)
    check_shared_directory(output)

    test = read_all(test, config.data.test if isinstance(config.data.test, str) else "data.test")
    transform_of = read_transform(asdict(config))
    model = build_run_model(asdict(config), device=config.device, dtype=config.dtype)
    transform = transform_of(model)
    settings = PromptSettings(transform, max_new_tokens=longest_answer(transform, test, "data.test"))
    validation = _validation_samples(test, config)
    settings.check(model)
    pretrained = config.pretrained
    check_images(model, transform.image_transform, pretrained.encoder or pretrained.path)
    check_lengths(model, transform, test, "data.test")
    loader = _loader(train, _with_features(model, stages, train, transform, config), config)
    used = _utilization(model, stages, config, log)
    _prepare(model, stages, config, log)
    trainer = Trainer(model, stages, loader, config)
    log(f"\n{describe(model)}\n")

    def answer(samples: Sequence[Sample]) -> list[Prediction]:
        # Every rank answers all samples: under sharding all ranks must run the same steps.
        with computing_in(trainer.dtype, trainer.device):
            return predict(model, settings, samples, batch_size=config.eval_batch_size)

    text = [sample for sample in test if not sample.media]
    if trainer.resume():
        log(f"resumes after step {trainer.step} of {trainer.num_steps}")
    logger = None if config.logger is None else build_logger(config.logger)
    if trainer.step == 0 and text:
        trainer.record.before = accuracy_by_kind(answer(text))
    progress = Progress(
        trainer.num_steps,
        trainer.step,
        device=trainer.device,
        log=log,
        logger=logger,
        log_every=config.log_every,
        shown=trainer.rank == 0,
        utilization=used,
    )
    record = _train(trainer, progress, lambda: accuracy(answer(validation))["all"], log)
    save_trained(model, output / "fusion", trained=trainer.trained, stages=stages)
    write_file(output / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    write_file(output / "losses.json", json.dumps(record.losses) + "\n")
    log(f"saved {output / 'fusion'}")

    predictions, shares = evaluate(answer, test, config.seed)
    if predictions:
        lines = [prediction_record(prediction, output) + "\n" for prediction in predictions]
        write_file(output / "answers.jsonl", "".join(lines))
    shares = ({"before": record.before} if record.before else {}) | shares
    costs = training_costs(model, record)
    log(f"\n{accuracy_table(shares)}\n\n{format_costs(costs)}\n")
    metrics = {**shares, **costs, "seconds": round(time.perf_counter() - started, 1)}
    write_file(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    if distributed_run:
        distributed.destroy_process_group()


def _silent(*_: Any) -> None: ...


def _train(
    trainer: Trainer, progress: Progress, validate: Callable[[], float], log: Callable[[str], None]
) -> TrainingRecord:
    """Take the remaining steps. After SIGTERM the process ends, with an exit code of its own."""
    try:
        return trainer.train(progress, validate)
    except RunInterruptedError as interrupted:
        log(f"ended by SIGTERM after step {interrupted}, which is saved; resume=true continues")
        if distributed.is_initialized():
            distributed.destroy_process_group()
        sys.exit(EXIT_CODE)


def _utilization(
    model: nn.Module, stages: FreezeSchedule, config: Config, log: Callable[[str], None]
) -> Utilization | None:
    """Return what computes the MFU, on the rank that shows it, where the device's peak is known."""
    device, _ = device_and_dtype(config.device, config.dtype)
    if config.dtype != "bf16" or get_world_size_and_rank()[1] != 0:
        return None
    cached = config.data.cache_features is not None
    try:
        trained = stages.trained_ever(model)
        return utilization(model, device, trained=trained, features_cached=cached)
    except Exception as error:  # modules of the user's own are simulated, and a run needs no MFU
        log(f"MFU is not shown: {error}")
        return None


def _output_dir(config: Config) -> Path:
    """Return the output directory after checking that it can be written to."""
    path = Path(config.output_dir)
    check_output_dir(path, "fusion", CHECKPOINTS)
    earlier = latest_checkpoint(path / CHECKPOINTS)
    if earlier is not None and config.save_every is not None and not config.resume:
        raise ConfigError(
            f"{earlier} is of an earlier run: resume it with resume=true; for a new run remove it, or "
            "name another output_dir."
        )
    return path


def _with_features(
    model: nn.Module,
    stages: FreezeSchedule,
    train: Samples | Mixture,
    transform: SampleTransform,
    config: Config,
) -> SampleTransform:
    """Return the transform for training: with ``data.cache_features`` it reads features, not pixels."""
    data = config.data
    if data.cache_features is None:
        return transform
    trained = [name for name in stages.trained_ever(model) if name.startswith("encoder")]
    if trained:
        raise ConfigError(
            f"data.cache_features={data.cache_features} needs a frozen encoder, and {trained[0]} trains."
        )
    workers = {"num_workers": data.num_workers, "start_method": data.start_method}
    return cache_features(model, train, transform, data.cache_features, **workers)


def _prepare(
    model: nn.Module, stages: FreezeSchedule, config: Config, log: Callable[[str], None]
) -> None:
    """Keep what trains in fp32, checkpoint activations and compile layers, as configured."""
    trained = stages.trained_ever(model)
    if config.train.fp32_weights:
        keep_in_fp32(model, trained)
    if config.activation_checkpointing:
        wrapped = checkpoint_activations(model, trained)
        layers = ", ".join(f"{number} layers of the {part}" for part, number in wrapped.items())
        log(f"activation checkpointing: {layers}")
    if config.compile:
        compile_layers(model)
    if config.activation_offloading:
        offload_activations(model)


def _loader(train: Samples | Mixture, transform: SampleTransform, config: Config) -> StepLoader:
    data, options = config.data, config.train
    world_size, rank = get_world_size_and_rank()
    return StepLoader(
        train,
        transform,
        LoaderOptions(
            batch_size=options.batch_size,
            batches_per_step=options.gradient_accumulation_steps,
            epochs=options.epochs,
            max_steps=options.max_steps,
            max_seq_len=data.max_seq_len,
            packed=data.packed,
            too_long=data.too_long,
            bad_samples=data.bad_samples,
            num_workers=data.num_workers,
            prefetch_factor=data.prefetch_factor,
            start_method=data.start_method,
            pin_memory=config.device.startswith("cuda"),
            seed=config.seed,
        ),
        world_size=world_size,
        rank=rank,
    )


def _validation_samples(test: Sequence[Sample], config: Config) -> list[Sample]:
    """Return the samples with one image, which are answered during training."""
    about_one = [sample for sample in test if len(sample.media) == 1]
    if config.eval_every is not None and not about_one:
        raise ConfigError(
            f"eval_every={config.eval_every} needs samples with one image, and there is none in "
            f"data.test={config.data.test}; name a file with some, or set eval_every=null."
        )
    return about_one[: config.eval_limit]

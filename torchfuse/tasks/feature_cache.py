"""Features computed once: the output of a frozen encoder, for all media of a data set, on disk.

A folder of features belongs to one encoder and one transform: ``features.json`` holds hashes of the
encoder's tensors and the transform's settings. Whoever opens the folder compares both, and computes the
features of one image again, since neither tells the code that runs. The adapter is not part of it: it
trains.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from torchfuse.data.features import (
    FeatureReader,
    FeatureStore,
    FeatureWriter,
    FoundMedia,
    MissingMedia,
    describe_settings,
    list_differences,
)
from torchfuse.data.media import MediaInput
from torchfuse.data.media_reader import MediaReader
from torchfuse.data.readers import Mixture
from torchfuse.data.samples import Media, Sample
from torchfuse.data.transform import SampleTransform
from torchfuse.data.workers import WorkerWatch
from torchfuse.errors import CheckpointError, DataError, FusionError
from torchfuse.io.atomic import write_text
from torchfuse.io.disk_errors import disk_errors
from torchfuse.io.ranks import agree, coordination_group, from_rank_zero
from torchfuse.io.save_lock import SaveLock
from torchfuse.io.strict_json import read_json
from torchfuse.models.encoder_output import ENCODER_OUTPUT
from torchfuse.tasks.frozen_encoder import FrozenEncoder

__all__ = ["cache_features"]

_OPTION: Final = "data.cache_features"
_KEY: Final = "features.json"
_FORMAT: Final = 1
_CHUNK: Final = 16  # samples that a worker reads at once
_LISTED: Final = 5
_SEARCHED: Final = 1000  # samples in which known media are looked for
# Relative differences of features that other devices and sizes of batches may cause.
_ROUNDING: Final = {torch.float16: 0.05, torch.bfloat16: 0.05, torch.float32: 0.01, torch.float64: 0.01}


def cache_features(
    model: nn.Module,
    samples: Sequence[Sample] | Mixture,
    transform: SampleTransform,
    folder: str | Path,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    start_method: str | None = None,
) -> SampleTransform:
    """Compute the features that a folder lacks, and return a transform that reads them from there.

    Media are identified by the digest of their bytes, so several sets of samples can share a folder,
    and a changed file has other features. A start that is killed loses the features of one shard at
    most. Samples and media that cannot be read are left out: they are errors where they are used.

    With several ranks each computes a share; the model must not be sharded yet.

    Args:
        model: a fused model with one frozen encoder, on the device that computes.
        samples: the samples; picklable for workers that are not forked.
        transform: what pixels are read by; it may be a result of this function.
        folder: where features are kept, of this encoder and transform alone.
        batch_size: images, or clips or tiled images of one size, of one call of the encoder.
        num_workers: processes that read media; 0: this one does.
        start_method: how workers start: ``"fork"``, ``"spawn"``, ``"forkserver"``; None: as Python does.

    Returns:
        A copy of the transform that reads features in place of pixels, in the dtype that the encoder
        computes in. Losses are the same, up to rounding where the shapes of batches differ.

    Raises:
        ConfigError: if the encoder trains, or the model has several.
        ModelError: if the model is sharded.
        CheckpointError: if the folder has features of another encoder or transform or a damaged shard,
            or cannot be written to.
    """
    encoder = FrozenEncoder(model, _OPTION)
    folder, reader = Path(folder), transform.reader
    reader = reader.source if isinstance(reader, FeatureReader) else reader
    samples = samples.samples if isinstance(samples, Mixture) else samples
    group = coordination_group()
    rank, world_size = (distributed.get_rank(), distributed.get_world_size()) if group else (0, 1)
    lock = SaveLock(folder / ".lock")

    def first_number() -> int:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()  # another run may be filling the folder
        store = _open(folder, encoder, reader)
        _check_example(encoder, samples, reader, store)
        return store.last_number + 1

    problems = []
    try:
        first = from_rank_zero(group, first_number)
        watch = WorkerWatch(num_workers)
        missing = MissingMedia(samples, reader, FeatureStore(folder), watch, rank, world_size)
        chunks = [range(i, min(i + _CHUNK, len(samples))) for i in range(0, len(samples), _CHUNK)]
        loader: DataLoader[Any] = DataLoader(
            missing,
            sampler=chunks,
            batch_size=None,
            collate_fn=list,
            num_workers=num_workers,
            multiprocessing_context=start_method if num_workers else None,
        )
        bar = tqdm(
            watch.iterate(loader, samples),
            total=len(chunks),
            desc="features",
            unit=" samples",
            unit_scale=_CHUNK,
            disable=True if rank else None,
            leave=False,
        )
        writer = FeatureWriter(folder, count(first + rank, world_size))
        try:
            _compute(encoder, bar, writer, batch_size)
        except FusionError as error:
            problems.append(str(error))
        agree(group, problems, f"{folder}: features could not be computed.")
    finally:
        lock.release()
    store = FeatureStore(folder)
    if (example := store.first()) is not None:
        # A batch without images that takes part in every module must leave out the encoder, too.
        encoder.model.example_input = {ENCODER_OUTPUT: example}
    return transform.with_reader(FeatureReader(store, reader, ENCODER_OUTPUT))


def _open(folder: Path, encoder: FrozenEncoder, reader: MediaReader) -> FeatureStore:
    """Open a folder for an encoder and a transform; it gets their key if it is new."""
    key = {
        "format": _FORMAT,
        "encoder": encoder.describe(),
        "transform": describe_settings(reader),
    }
    store = FeatureStore(folder)
    if (folder / _KEY).exists():
        differences = list_differences(read_json(folder / _KEY), json.loads(json.dumps(key)))
        if differences:
            more = len(differences) - _LISTED
            lines = differences[:_LISTED] + [f"and {more} more"] * (more > 0)
            raise CheckpointError(
                "\n  ".join([f"{folder} has the features of another encoder or transform:", *lines])
                + f"\nGive {_OPTION} another folder, or delete this one."
            )
    elif store.shards:
        raise CheckpointError(
            f"{folder} has shards of features and no {_KEY}: it is unknown which encoder they are of. "
            f"Give {_OPTION} another folder, or delete this one."
        )
    else:
        write_text(folder / _KEY, json.dumps(key, indent=1) + "\n")
    return store


def _check_example(
    encoder: FrozenEncoder, samples: Sequence[Sample], reader: MediaReader, store: FeatureStore
) -> None:
    """Compute the features of the first known media again, and compare them."""
    found = _first_known(samples, store)
    if found is None:
        return
    media, saved = found
    [own] = encoder([reader(media)])
    own = own.cpu()
    difference = float("inf")
    if own.shape == saved.shape and own.dtype == saved.dtype:
        distance = (own.double() - saved.double()).norm()
        difference = float(distance / saved.double().norm().clamp(min=1e-30))
    if not difference <= _ROUNDING[saved.dtype]:
        raise CheckpointError(
            f"{store.folder} has other features of the {media.modality} {media} than the encoder "
            f"computes, although weights and settings are the same: {saved.dtype} {list(saved.shape)}, "
            f"now {own.dtype} {list(own.shape)}, a relative difference of {difference:.2g}. Give "
            f"{_OPTION} another folder, or delete this one."
        )


def _first_known(samples: Sequence[Sample], store: FeatureStore) -> tuple[Media, Tensor] | None:
    for index in range(min(len(samples), _SEARCHED if len(store) else 0)):
        try:
            for media in samples[index].media:
                features = store.get(media)
                if features is not None:
                    return media, features
        except DataError:
            continue
    return None


def _compute(
    encoder: FrozenEncoder, found: Iterable[list[FoundMedia]], writer: FeatureWriter, batch_size: int
) -> None:
    """Write the features of media, in batches of equal shapes."""
    pending: dict[Any, dict[str, MediaInput]] = {}
    computed: set[str] = set()

    def write(batch: Mapping[str, MediaInput]) -> None:
        for name, features in zip(batch, encoder(list(batch.values())), strict=True):
            writer.add(name, features)

    for each in (media for several in found for media in several):
        if each.file is not None:
            writer.add_file(each.file, each.digest)
        if each.inputs is None or each.name in computed:
            continue
        computed.add(each.name)
        batch = pending.setdefault(_shapes(each.inputs), {})
        batch[each.name] = each.inputs
        if len(batch) == batch_size:
            write(pending.pop(_shapes(each.inputs)))
    for batch in pending.values():
        write(batch)
    writer.close()


def _shapes(inputs: MediaInput) -> Any:
    extras = sorted((name, tensor.shape) for name, tensor in inputs.extras.items())
    return inputs.keyword, inputs.max_items, inputs.items.shape, *extras

"""Keys of the finetune recipe's configuration."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from torchfuse.training.parallel.options import Parallel

__all__ = ["Config", "Data", "Lora", "LoraPart", "Pretrained", "Train"]


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
class LoraPart:
    """LoRA in the linear layers of a part, see ``torchfuse.add_lora``.

    Attributes:
        rank: rows of ``lora_a``; null: no LoRA in this part.
        alpha: what a layer adds is multiplied by ``alpha / rank``; null: twice the rank.
        targets: names of layers, or patterns; null: the projections of attention and the feed-forwards.
        dropout: probability that a value of the input of ``lora_a`` is dropped.
        dora: whether the norm of each row of the weight trains too.
        quantize_base: whether the part's linear layers are quantized to NF4; for pretrained parts.
    """

    rank: int | None = None
    alpha: float | None = None
    targets: list[str] | None = None
    dropout: float = 0.0
    dora: bool = False
    quantize_base: bool = False


@dataclass
class Lora:
    """LoRA by part; what fusion added trains in full beside it.

    Attributes:
        decoder: the pretrained decoder.
        encoder: the pretrained encoders.
        fusion: layers that fusion added; the weights that have LoRA are frozen.
    """

    decoder: LoraPart = field(default_factory=LoraPart)
    encoder: LoraPart = field(default_factory=LoraPart)
    fusion: LoraPart = field(default_factory=LoraPart)


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
    """Optimisation.

    Attributes:
        lr (number or section): the learning rate, or one for each part that trains, by its name.
        lr_layer_decay: factor between the rates of neighbouring layers of a pretrained part; the last
            layer has the rate of its part.
        weight_decay (number or section): the weight decay, or one for each part that trains.
        epochs: passes over ``data.train``.
        max_steps: the most optimizer steps; null: all of the epochs.
        batch_size: samples, or packs, of a batch on each rank.
        gradient_accumulation_steps: batches of an optimizer step.
        optimizer: a component that takes groups of parameters, such as ``torchao.optim.AdamW8bit``, and
            its keywords.
        optimizer_in_backward: whether each parameter is updated as soon as its gradient is complete;
            gradients are neither clipped nor accumulated then.
        warmup_steps: steps in which the learning rate rises to ``lr``.
        lr_schedule: what it does then: ``cosine`` and ``linear`` fall to 0, ``constant`` stays.
        clip_grad_norm: the largest norm of the gradient; null: not clipped.
        z_loss: factor of the squared logarithm of the softmax's denominator in the loss.
        label_smoothing: share of the target that is spread over all tokens.
        fp32_weights: whether what trains is kept in fp32 where ``dtype`` is ``bf16``.
        max_skipped_steps: how many steps in a row are skipped because loss or gradients are not finite;
            one more ends the run.
    """

    lr: Any = 1e-3
    lr_layer_decay: float = 1.0
    weight_decay: Any = 0.0
    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    optimizer: dict[str, Any] = field(default_factory=lambda: {"_component_": "torch.optim.AdamW"})
    optimizer_in_backward: bool = False
    warmup_steps: int = 0
    lr_schedule: str = "cosine"
    clip_grad_norm: float | None = 1.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    fp32_weights: bool = True
    max_skipped_steps: int = 3


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
        init_from: folder of an earlier run, or of an artifact of ``save_trained``, whose trained weights
            the run starts from, with LoRA merged; null: only from the pretrained checkpoints.
        lora: LoRA by part.
        data: files of samples, and how samples become batches.
        train: optimisation.
        parallel: several devices, with one rank on each, as ``tune run --nproc_per_node`` starts them.
        freeze: stages ``{start_step, specs: [{module, frozen}]}``, see ``torchfuse.params``; without
            any, the keywords of ``model`` determine what trains.
        device: ``cpu``, ``cuda`` (each rank's own) or another device of torch.
        dtype: dtype of the weights, and in which matrices are multiplied: ``fp32`` or ``bf16``.
        seed: seed of new weights, dropout and the order of the samples.
        activation_checkpointing: whether activations of layers are computed again in the backward pass.
        activation_offloading: whether activations are kept in the memory of the CPU; on CUDA.
        compile: whether layers are compiled.
        eval_batch_size: samples that are answered at once.
        eval_every: steps between evaluations on samples of ``data.test`` with one image; there is one
            after the last step too; null: none during training.
        eval_limit: how many samples these use, the first ones; null: all.
        save_every: steps between checkpoints; there is one after the last step too; null: none.
        keep_last: how many of the newest checkpoints are kept; null: all.
        keep_best: whether the one with the highest accuracy of an evaluation is kept too.
        logger: one of ``torchtune.training.metric_logging``, and its keywords; null: none.
        log_every: steps between two calls of the logger.
        resume: whether to continue from the newest checkpoint, if there is one.
    """

    output_dir: str = MISSING
    model: dict[str, Any] = MISSING
    pretrained: Pretrained = field(default_factory=Pretrained)
    transform: dict[str, Any] | None = None
    init_from: str | None = None
    lora: Lora = field(default_factory=Lora)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)
    freeze: list[dict[str, Any]] = field(default_factory=list)
    device: str = "cpu"
    dtype: str = "fp32"
    seed: int = 0
    activation_checkpointing: bool = False
    activation_offloading: bool = False
    compile: bool = False
    eval_batch_size: int = 128
    eval_every: int | None = None
    eval_limit: int | None = None
    save_every: int | None = None
    keep_last: int | None = None
    keep_best: bool = False
    logger: dict[str, Any] | None = None
    log_every: int = 1
    resume: bool = False

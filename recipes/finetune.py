"""Finetune a fused model on questions about images.

Fuses a decoder and an encoder, loads their pretrained checkpoints, trains what fusion added (or the
parts that the configuration names), answers test questions, and saves what was trained.

Launch on one device, or on several with FSDP2:

    tune run torchfuse/recipes/finetune.py --config recipes/configs/digits/cross_attention.yaml
    tune run --nproc_per_node 2 torchfuse/recipes/finetune.py --config ... model.on_missing=participate

Any key can be overridden: ``train.lr=1e-3 model.every=2``. A run that saves checkpoints resumes
from the newest one, to the bit:

    tune run torchfuse/recipes/finetune.py --config ... save_every=100 resume=true
"""

from torchfuse.recipes.finetune_checks import check_config, read_data
from torchfuse.recipes.finetune_config import Config

from torchfuse.params import FreezeSchedule, read_freeze_meta
from torchfuse.training.config import recipe


@recipe(Config)
def main(config: Config) -> None:
    """Finetune a fused model on questions about images."""
    check_config(config)
    stages = FreezeSchedule(read_freeze_meta(config.freeze))
    train, test = read_data(config)
    # Imported here: torchtune takes seconds, and configuration and files are checked before.
    from torchfuse.recipes.finetune_run import run

    run(config, stages, train, test)


if __name__ == "__main__":
    main()

"""A checkpointer for torchtune's own recipes, those for LoRA too.

torchtune's recipes load one state dict with every parameter of the model, and save one. This
checkpointer makes the first from two pretrained directories; of the second it saves what was trained,
usually the fusion-only artifact alone. Of a LoRA recipe it saves the layers as they are, not merged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from torchfuse.checkpoint.artifact.description import describe_fusion
from torchfuse.checkpoint.artifact.fusion import load_fusion
from torchfuse.checkpoint.artifact.state_dict import fusion_state_dict
from torchfuse.checkpoint.artifact.trained import load_trained, trained_pretrained_names, write_trained
from torchfuse.checkpoint.load import load_pretrained
from torchfuse.errors import CheckpointError
from torchfuse.io.atomic import write_file

__all__ = ["FusionCheckpointer"]

_MODEL: Final = "model"  # torchtune.training.MODEL_KEY, without importing torchtune
_ADAPTER: Final = "adapter"  # torchtune.training.ADAPTER_KEY
_NOT_STATE: Final = (_MODEL, _ADAPTER, "adapter_config")
_RECIPE_STATE: Final = "recipe_state.pt"


class FusionCheckpointer:
    """Checkpointer for torchtune's own recipes: reads pretrained directories, writes artifacts.

    In a configuration, ``model: ${model}`` passes the recipe's own model section to it.

    Each epoch is saved in ``<output_dir>/epoch_<n>``: the artifact, the trained tensors of pretrained
    parts if any train, and the recipe's state while more epochs follow.

    Args:
        model: the recipe's model section, ``_component_`` and keywords.
        output_dir: where epochs are saved.
        decoder: directory of the pretrained decoder.
        encoder: directory of the pretrained encoder; by name for named encoders.
        fusion: an artifact to start from; None: fusion starts fresh.
        should_load_recipe_state: resume after the last epoch in ``output_dir`` that has a recipe state;
            the last epoch of a finished run has none.
        model_type: an argument that torchtune's recipes pass; it has no effect.

    Raises:
        CheckpointError: if no epoch in ``output_dir`` has a recipe state to resume from.
    """

    def __init__(
        self,
        *,
        model: Mapping[str, Any],
        output_dir: str | Path,
        decoder: str | Path | None = None,
        encoder: str | Path | Mapping[str, str | Path] | None = None,
        fusion: str | Path | None = None,
        should_load_recipe_state: bool = False,
        model_type: str | None = None,
    ) -> None:
        self._model = OmegaConf.create(dict(model))
        self._output_dir = Path(output_dir)
        self._decoder, self._encoder = decoder, encoder
        self._fusion = fusion
        self._resume_from = self._last_epoch() if should_load_recipe_state else None
        self._description: dict[str, Any] = {}
        self._fusion_names: list[str] = []
        self._trained_names: list[str] = []

    def _last_epoch(self) -> Path:
        epochs = {
            int(found[1]): path
            for path in self._output_dir.glob("epoch_*")
            if (found := re.fullmatch(r"epoch_(\d+)", path.name)) and (path / _RECIPE_STATE).is_file()
        }
        if not epochs:
            raise CheckpointError(
                f"There is no epoch with a recipe state in {self._output_dir} to continue from."
            )
        return epochs[max(epochs)]

    def load_checkpoint(self) -> dict[str, Any]:
        """Return every parameter of the model, and the recipe's state if a run is resumed."""
        from torchtune import config

        section = self._model.copy()
        if section.get("quantize_base"):
            section.quantize_base = False  # the recipe's model quantizes what it loads
        model: nn.Module = config.instantiate(section)
        load_pretrained(model, decoder=self._decoder, encoder=self._encoder)
        self._fusion_names = list(fusion_state_dict(model))
        self._trained_names = trained_pretrained_names(model)
        self._description = describe_fusion(model, without=self._trained_names)
        recipe_state: dict[str, Any] = {}
        if self._resume_from is not None:
            recipe_state = torch.load(self._resume_from / _RECIPE_STATE, weights_only=True)
            load_trained(model, self._resume_from)
        elif self._fusion is not None:
            load_fusion(model, self._fusion)
        state = model.state_dict()
        if recipe_state and self._description["lora"]:
            recipe_state[_ADAPTER] = {name: state[name] for name in self._fusion_names}
        return {_MODEL: state, **recipe_state}

    def save_checkpoint(
        self,
        state_dict: dict[str, Any],
        epoch: int,
        intermediate_checkpoint: bool = False,
        adapter_only: bool = False,
    ) -> None:
        """Save an epoch.

        Args:
            state_dict: the recipe's state; its model state has every parameter. Of a LoRA recipe it is
                merged, and the LoRA layers' parameters are beside it.
            epoch: number of the epoch.
            intermediate_checkpoint: whether more epochs follow, so that the recipe's state is kept.
            adapter_only: must be False: the recipe leaves out what fusion added. Only what was trained
                is saved in any case.

        Raises:
            CheckpointError: if ``adapter_only``; nothing is written then.
        """
        if adapter_only:
            raise CheckpointError(
                "save_adapter_weights_only=True leaves out what fusion added. Set it to False: only "
                "what was trained is saved, not the merged model."
            )
        folder = self._output_dir / f"epoch_{epoch}"
        model_state: dict[str, Tensor] = {**state_dict[_MODEL], **state_dict.get(_ADAPTER, {})}
        state_file = folder / _RECIPE_STATE
        state_file.unlink(missing_ok=True)  # an older run's does not go with these weights
        fusion = {name: model_state[name] for name in self._fusion_names}
        trained = {name: model_state[name] for name in self._trained_names}
        write_trained(folder, fusion, trained, self._description)
        if intermediate_checkpoint:
            rest = {key: value for key, value in state_dict.items() if key not in _NOT_STATE}

            def write(file: Path) -> None:
                with file.open("wb") as stream:  # given a path, torch.save hides errors of the disk
                    torch.save(rest, stream)

            write_file(state_file, write)

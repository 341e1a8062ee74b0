"""The one place that takes a path to a model: a folder, a configuration, a torch.export archive."""

from __future__ import annotations

from pathlib import Path

from llmc.importers import hf
from llmc.importers.hf import ImportedModel
from llmc.importers.json_file import ImportFailure
from llmc.importers.torch_export import import_export
from llmc.ir.types import DType


def import_model(
    path: Path | str,
    *,
    architecture: Path | str | None = None,
    max_sequence_length: int | None = None,
    random_weights: bool = False,
    activation: DType = DType.F32,
) -> ImportedModel:
    """Import a Hugging Face folder, a configuration ending in `.json`, or a file ending in `.pt2`.

    The options are those of `hf.import_model`; an archive takes no description and has its weights. Raises `LlmcError`.
    """
    if Path(path).suffix != ".pt2" or Path(path).is_dir():
        return hf.import_model(
            path,
            architecture=architecture,
            max_sequence_length=max_sequence_length,
            random_weights=random_weights,
            activation=activation,
        )
    for option, given in (("--architecture", architecture is not None), ("--random-weights", random_weights)):
        if given:
            raise ImportFailure(
                f"{path}: {option} is for folders and configurations; a .pt2 holds its graph and weights"
            )
    return import_export(Path(path), max_sequence_length, activation)

"""Hugging Face folders: config.json, safetensors, tokenizer.json -> graph, weights, facts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmc.architectures.loader import Description, find_description
from llmc.importers.config import read_config, storage_dtype
from llmc.importers.json_file import ImportFailure
from llmc.importers.model_info import ModelInfo, SideFiles, read_side_files
from llmc.importers.safetensors import open_folder
from llmc.importers.weights import CheckpointParameters, RandomParameters, WeightMap
from llmc.ir.graph import Graph
from llmc.ir.types import DType


@dataclass(frozen=True)
class ImportedModel:
    """A model as the compiler sees it. No weight has been read: `weights.load(label)` does that.

    The graph computes `logits: f32[tokens, vocab_size]` from `token_ids` and `positions: i32[tokens]`, in primitive
    ops. `description` is None where the file holds the graph itself. `unused_tensors` are stored and read by nothing.
    """

    graph: Graph
    weights: WeightMap
    info: ModelInfo
    description: Description | None
    tokenizer_files: dict[str, bytes]
    unused_tensors: tuple[str, ...] = ()


def import_model(
    path: Path | str,
    *,
    architecture: Path | str | None = None,
    max_sequence_length: int | None = None,
    random_weights: bool = False,
    activation: DType = DType.F32,
) -> ImportedModel:
    """Import a folder, or a configuration ending in `.json` (then weights are random).

    `architecture` is the user's own description; `max_sequence_length` replaces the configuration's; `activation` is
    the dtype of what is computed between weights. Raises `LlmcError` for anything missing, malformed or not understood.
    """
    options = (Path(architecture) if architecture else None, max_sequence_length, random_weights, activation)
    try:
        return _import(Path(path), *options)
    except OSError as error:
        raise ImportFailure(f"cannot read {error.filename or path}: {error.strerror or error}") from error


def _import(
    path: Path, architecture: Path | None, max_sequence_length: int | None, random_weights: bool, activation: DType
) -> ImportedModel:
    alone = path.suffix == ".json" and not path.is_dir()
    config_path = path if alone else path / "config.json"
    if not config_path.is_file():
        missing = "it has no config.json" if path.is_dir() else "it is a file" if path.exists() else "it does not exist"
        raise ImportFailure(f"{path} is no Hugging Face folder and no .json configuration: {missing}")
    config = read_config(config_path)
    source = str(config_path)
    random = alone or random_weights
    if random:
        config = {k: v for k, v in config.items() if k != "quantization_config"}  # how a checkpoint is stored
    description = find_description(config.get("model_type"), source, architecture)
    model = description.apply(config, source)
    parameters: RandomParameters | CheckpointParameters
    if random:
        parameters = RandomParameters(storage_dtype(config, source), source)
    else:
        tensors = open_folder(path)
        parameters = CheckpointParameters(tensors, str(path), description.unused(model), description.optional_prefix)
    name = config["model_type"] if config.get("model_type") in description.model_types else description.model_types[0]
    graph = model.build(parameters, activation, max_sequence_length)
    weights = parameters.weights()
    side = SideFiles({}, {}, {}, {}, {}) if alone else read_side_files(path)
    bos, eos, pad = (side.special_ids(kind, config, model.vocab_size, source) for kind in ("bos", "eos", "pad"))
    info = ModelInfo(
        architecture=name,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_parameters=weights.num_parameters,
        max_sequence_length=model.sequence_length(max_sequence_length),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=eos,
        pad_token_id=pad[0] if pad else None,
        add_bos=bool(bos) and side.add_bos,
        generation=side.sampling,
        chat_templates=side.chat_templates,
    )
    return ImportedModel(graph, weights, info, description, dict(side.tokenizer_files))

"""Ternary checkpoints: a folder of `config.json` and safetensors, loaded without ever holding the full weights.

`config.json` is the FluxTransformer2DModel's own configuration plus the key `quantization_config`, by which diffusers
finds bitflux_core/diffusers_plugin.py: format version, layout of the codes, quantization method, provenance, and the
SHA-256 of every tensor file. For a block linear `name` the tensors are `name.packed` (uint8, planes [N, J] or trits
[L], see kernels/packing.py), `name.scale` (float32 [N]) and `name.bias`; all others keep diffusers' names. Where the
configuration names a `low_rank` R, `name.down` [R, K] and `name.up` [N, R] correct the layer (see low_rank.py).
"""

import json
from dataclasses import fields
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from bitflux_core.accounting import SizeReport, size_report
from bitflux_core.diffusers_plugin import FORMAT_VERSION, QUANT_METHOD, SHARD_SIZE, BitFluxConfig, as_loaded
from bitflux_core.errors import UserError
from bitflux_core.files import SINGLE_FILE, file_digest, fingerprint, read_json, weight_map
from bitflux_core.layers import block_linears, correction_rank, empty_ternary_linears
from bitflux_core.linear import Execution, TernaryLinear
from bitflux_core.model_card import write_card
from bitflux_core.tensor_files import REMEDY, checked_files, read_tensors
from kernels.packing import Codes, pack_trits
from kernels.reference import Activations

__all__ = [
    "check_unused",
    "empty_transformer",
    "fingerprint",
    "is_ternary",
    "load_ternary",
    "save_ternary",
    "stored_codes",
    "stored_size",
]

FILE_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"


def save_ternary(
    transformer: FluxTransformer2DModel,
    directory: Path | str,
    provenance: dict,
    *,
    method: str,
    codes: Codes = "trits",
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = SHARD_SIZE,
) -> None:
    """Writes a transformer whose block linears are all ternary; all but their codes and scales in `dtype`.

    `provenance` (JSON-able) says where the weights come from; `codes` is their layout in the files: trits take a fifth
    less than planes, and are decoded when loaded. `config.json` is written last, so a folder that a killed
    process left behind does not load. UserError if `directory` has anything in it.
    """
    directory = check_unused(directory)
    exact = _exact_tensors(transformer)
    state = transformer.state_dict()
    tensors = {name: tensor if name in exact else tensor.to(dtype) for name, tensor in state.items()}
    tensors = stored_codes(tensors, codes)
    directory.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors, directory, filename_pattern=FILE_PATTERN, max_shard_size=max_shard_size)

    config = json.loads(transformer.to_json_string())
    config.pop("_name_or_path", None)  # a path of the machine that made it
    header = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "codes": codes,
        "method": method,
        "provenance": provenance,
        "files": {file.name: file_digest(file) for file in sorted(directory.glob("*.safetensors"))},
    }
    if rank := correction_rank(transformer):
        header["low_rank"] = rank
    write_card(transformer, directory, header)
    mode = (directory / "README.md").stat().st_mode
    for file in directory.glob("*.safetensors"):
        file.chmod(mode)  # safetensors leaves them to their owner alone, and a job's other pods could not read them
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": header}, indent=2) + "\n")


def stored_codes(tensors: dict[str, Tensor], codes: Codes) -> dict[str, Tensor]:
    """A ternary transformer's tensors with its codes in this layout, in place of planes."""
    stored = pack_trits if codes == "trits" else _whole
    return {name: stored(tensor) if name.endswith(".packed") else tensor for name, tensor in tensors.items()}


def _whole(planes: Tensor) -> Tensor:
    """Planes decoded from trits are views of a storage a few bytes longer, which safetensors refuses: a copy then."""
    return planes if planes.untyped_storage().nbytes() == planes.nbytes else planes.clone()


def check_unused(directory: Path | str) -> Path:
    """`directory` as a Path. UserError if there is anything in it, if it is or lies in a file, or has no name."""
    directory = Path(directory)
    if directory.name in ("", ".."):  # it is put in place whole, by its name
        raise UserError(f"'{directory}' names no new folder: name one for the ternary checkpoint")
    above = next(folder for folder in directory.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"{directory} lies in {above}, which is a file: name another folder")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is in use: name a new or an empty folder for the ternary checkpoint")
    return directory


def load_ternary(
    directory: Path | str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    activations: Activations = "native",
    execution: Execution = "kernel",
) -> FluxTransformer2DModel:
    """The transformer of a ternary checkpoint, frozen, in eval mode; all but codes and scales in `dtype`.

    The model is built on the meta device and takes its tensors straight from the files: codes stay packed. UserError
    where the folder is no ternary checkpoint of this format, or a file or tensor in it is missing, damaged or misfit.
    """
    directory = Path(directory)
    config = read_json(directory / "config.json", "name the folder of a ternary checkpoint")
    header = _take_header(config, directory)
    model = _empty_ternary(config, header, directory, activations, execution)
    how = _config_of(header, directory, activations)
    files = header.get("files") or dict.fromkeys(_named_by_diffusers(directory))
    expected, exact = model.state_dict(), _exact_tensors(model)
    columns = {f"{name}.packed": layer.in_features for name, layer in block_linears(model).items()}
    loaded = {}
    for file in checked_files(directory, files):
        for name, tensor in read_tensors(file, expected, columns, exact, torch.device(device)):
            loaded[name] = tensor if name in exact else tensor.to(dtype)
    missing = sorted(expected.keys() - loaded.keys())
    if missing:
        raise UserError(f"{directory} lacks tensor {missing[0]} and {len(missing) - 1} more: {REMEDY}")
    model.load_state_dict(loaded, assign=True)
    as_loaded(model, how)
    return model.eval().requires_grad_(False)


def stored_size(directory: Path | str) -> SizeReport:
    """What the checkpoint's tensors take, from its configuration alone. UserError as in `load_ternary`."""
    directory = Path(directory)
    config = read_json(directory / "config.json", "name the folder of a ternary checkpoint")
    header = _take_header(config, directory)
    return size_report(_empty_ternary(config, header, directory), header.get("codes", "trits"))


def is_ternary(config: dict) -> bool:
    """Whether this is a ternary checkpoint's config.json, of any format version."""
    header = config.get("quantization_config")
    return isinstance(header, dict) and header.get("quant_method") == QUANT_METHOD


def empty_transformer(config: dict) -> FluxTransformer2DModel:
    """A full-precision transformer of this configuration on the meta device: shapes without memory."""
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(config)


def _empty_ternary(
    config: dict, header: dict, directory: Path, activations: Activations = "native", execution: Execution = "kernel"
) -> FluxTransformer2DModel:
    """The checkpoint's transformer on the meta device."""
    rank = header.get("low_rank", 0)
    if not isinstance(rank, int) or rank < 0:
        raise UserError(f"{directory}/config.json names a low_rank of {rank!r}: {REMEDY}")
    try:
        model = empty_transformer(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{directory}/config.json describes no FLUX transformer ({error}): {REMEDY}") from error
    empty_ternary_linears(model, activations, execution, rank=rank)
    return model


def _take_header(config: dict, directory: Path) -> dict:
    """Takes BitFlux's part out of `config`; its "files" have digests, or are missing where diffusers saved them."""
    if not is_ternary(config):
        raise UserError(
            f"{directory} is no ternary checkpoint (no quant_method '{QUANT_METHOD}' in config.json): "
            "quantize the model first"
        )
    header = config.pop("quantization_config")
    version, files = header.get("format_version"), header.get("files")
    if version != FORMAT_VERSION or not isinstance(files, dict | None):
        raise UserError(
            f"{directory} has checkpoint format {version}, this BitFlux reads {FORMAT_VERSION}: "
            "update BitFlux or make the checkpoint again"
        )
    return header


def _named_by_diffusers(directory: Path) -> list[str]:
    """Names of the tensor files of a folder that diffusers saved; others in it may be of another variant."""
    places = weight_map(directory, REMEDY)
    return [SINGLE_FILE] if places is None else sorted(set(places.values()))


def _config_of(header: dict, directory: Path, activations: Activations) -> BitFluxConfig:
    """The header as diffusers would have it; the digests are of these files, not of those it may be saved to."""
    kept = {field.name for field in fields(BitFluxConfig)} - {"quant_method", "activations", "files"}
    try:
        return BitFluxConfig(**{name: header[name] for name in kept & header.keys()}, activations=activations)
    except ValueError as error:
        raise UserError(f"{directory}/config.json: {error}: {REMEDY}") from error


def _exact_tensors(transformer: FluxTransformer2DModel) -> set[str]:
    """Names of the packed codes and the scales, which keep their type whatever the model's."""
    layers = block_linears(transformer)
    dense = [name for name, layer in layers.items() if not isinstance(layer, TernaryLinear)]
    if dense:
        raise ValueError(f"{dense[0]} and {len(dense) - 1} more block linears are not ternary")
    return {f"{name}.{part}" for name in layers for part in ("packed", "scale")}

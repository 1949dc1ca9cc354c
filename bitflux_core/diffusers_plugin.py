"""BitFlux as a quantizer of diffusers: `from_pretrained` loads ternary checkpoints, `save_pretrained` writes them.

Imported while diffusers' own quantizers are (bitflux_core/_diffusers_hook.py): what needs its models is imported later.
"""

import functools
import tempfile
import types
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor

QUANT_METHOD = "bitflux"
FORMAT_VERSION = 2
_SCALE = "scale"
_HUB_OPTIONS = ("repo_id", "commit_message", "private", "token", "create_pr", "subfolder")


class Method(StrEnum):
    """diffusers' names of quantization methods are members of an Enum."""

    BITFLUX = QUANT_METHOD


@dataclass
class BitFluxConfig(QuantizationConfigMixin):
    """The `quantization_config` of a ternary checkpoint, see bitflux_core/checkpoint.py.

    `activations`: "native", or "int8" for products in 8-bit integers; `low_rank`: the rank of every layer's correction,
    0 without.
    """

    quant_method: Method = Method.BITFLUX  # type: ignore[assignment]
    format_version: int = FORMAT_VERSION
    codes: str = "trits"
    activations: str = "native"
    low_rank: int = 0
    method: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] | None = None

    def __post_init__(self) -> None:
        self.quant_method = Method(self.quant_method)  # type: ignore[assignment]
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"the checkpoint has format {self.format_version}, this BitFlux reads {FORMAT_VERSION}: "
                "update BitFlux or make the checkpoint again"
            )
        if self.codes not in ("planes", "trits") or self.activations not in ("native", "int8"):
            raise ValueError(f"codes '{self.codes}' and activations '{self.activations}': unknown to this BitFlux")
        if not isinstance(self.low_rank, int) or self.low_rank < 0:
            raise ValueError(f"low_rank {self.low_rank!r} is no rank: copy or make the checkpoint again")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in config.json."""
        return {**vars(self), "quant_method": self.quant_method.value}


class BitFluxQuantizer(DiffusersQuantizer):
    """Puts packed layers in the place of the block linears and fills them from a ternary checkpoint."""

    requires_calibration = True  # it loads what jobs/quantize.py made, and quantizes nothing by itself
    quantization_config: BitFluxConfig

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """ValueError for modules that accelerate would offload: its hooks move parameters, and codes are none."""
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                "a ternary transformer cannot be offloaded in part: give it a whole device (device_map='cuda'), "
                "or more memory in max_memory"
            )

    def _process_model_before_weight_loading(self, model: Any, keep_in_fp32_modules: list[str], **_: Any) -> None:
        from bitflux_core.layers import empty_ternary_linears

        how = self.quantization_config
        empty_ternary_linears(model, how.activations, rank=how.low_rank)  # type: ignore[arg-type]
        keep_in_fp32_modules.append(_SCALE)  # diffusers casts by the last part of a tensor's name

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Where diffusers first tells the files: their digests are checked here."""
        from bitflux_core.tensor_files import check_files

        digests, files = self.quantization_config.files or {}, [Path(file) for file in checkpoint_files]
        check_files(files[0].parent, {file.name: digests.get(file.name) for file in files})
        return loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies all but the codes, which are decoded: a view of the file would keep all of its pages in memory."""
        return {name: t if name.endswith(".packed") else t.clone() for name, t in state_dict.items()}

    def check_if_quantized_param(self, model: Any, param_value: Tensor, param_name: str, *_: Any, **__: Any) -> bool:
        return param_name.endswith(".packed")

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> None:
        """Trits have one dimension and are checked when they are decoded. ValueError for planes of another shape."""
        if loaded_param.ndim != 1:
            raise ValueError(
                f"{param_name} has shape {list(loaded_param.shape)} where config.json asks for "
                f"{list(current_param.shape)}: copy or make the checkpoint again"
            )

    def create_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, target_device: torch.device, *_: Any, **__: Any
    ) -> None:
        from bitflux_core.tensor_files import planes_of
        from kernels.packing import trits_length

        layer = model.get_submodule(param_name.rpartition(".")[0])
        length = trits_length(layer.out_features, layer.in_features)
        if param_value.dtype != torch.uint8 or (param_value.ndim == 1 and len(param_value) != length):
            raise ValueError(
                f"{param_name} is {param_value.dtype} {list(param_value.shape)} where config.json asks for uint8 "
                f"[{length}] or {list(layer.packed.shape)}: copy or make the checkpoint again"
            )
        stored = param_value.to(target_device)
        planes = planes_of(stored, param_name, layer.out_features, layer.in_features)
        layer.packed = planes.clone() if planes is param_value else planes  # not the file's own pages

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        from bitflux_core.linear import TernaryLinear
        from bitflux_core.tensor_files import check_floats

        for name, tensor in model.state_dict().items():
            if tensor.is_meta:  # diffusers warns of it, and computes with whatever is in memory
                raise ValueError(f"{name} is in none of the checkpoint's files: copy or make the checkpoint again")
            if tensor.is_floating_point():
                owner, _, part = name.rpartition(".")
                is_scale = part == _SCALE and isinstance(model.get_submodule(owner), TernaryLinear)
                check_floats(name, tensor, is_scale=is_scale)
        self.quantization_config.files = None  # digests of these files, not of those that the model may be saved to
        _equip(model)
        model.requires_grad_(False)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from bitflux_core.checkpoint import stored_codes

        return stored_codes(state_dict, self.quantization_config.codes), {}  # type: ignore[arg-type]

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Adds BitFlux to diffusers' tables of quantizers."""
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = BitFluxQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = BitFluxConfig


def as_loaded(model: Any, config: BitFluxConfig) -> None:
    """Makes a ternary transformer what `from_pretrained` would give: it saves itself as a ternary checkpoint."""
    model.register_to_config(quantization_config=config)
    model.hf_quantizer = BitFluxQuantizer(config, pre_quantized=True)
    _equip(model)


def _equip(model: Any) -> None:
    model.load_lora_adapter = _refuse_lora
    _refuse_loras_of_pipelines()
    model.save_pretrained = types.MethodType(_save_with_card, model)
    model.push_to_hub = types.MethodType(_push_with_card, model)


def _refuse_lora(*_: Any, **__: Any) -> None:
    raise ValueError(
        "a LoRA cannot be added to ternary layers: PEFT has no adapter for packed weights. Fuse it into the "
        "full-precision model (pipeline.fuse_lora) and quantize that"
    )


@functools.cache
def _refuse_loras_of_pipelines() -> None:
    """Gives FLUX pipelines the same reason: they ask for PEFT before they ask their transformer."""
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    load = FluxLoraLoaderMixin.load_lora_weights

    @functools.wraps(load)
    def load_or_refuse(pipeline: Any, *arguments: Any, **options: Any) -> Any:
        if getattr(pipeline.transformer, "load_lora_adapter", None) is _refuse_lora:
            _refuse_lora()
        return load(pipeline, *arguments, **options)

    FluxLoraLoaderMixin.load_lora_weights = load_or_refuse


def _save_with_card(model: Any, save_directory: Any, push_to_hub: bool = False, **options: Any) -> None:
    """diffusers' save_pretrained with shards of a bounded size, and with a model card."""
    from bitflux_core.checkpoint import SHARD_SIZE
    from bitflux_core.model_card import write_card

    hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
    options.setdefault("max_shard_size", SHARD_SIZE)
    type(model).save_pretrained(model, save_directory, **options)
    write_card(model, Path(save_directory), model.hf_quantizer.quantization_config.to_dict())
    if push_to_hub:
        _upload(Path(save_directory), **{"repo_id": Path(save_directory).name, **hub})


def _push_with_card(
    model: Any,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    safe_serialization: bool = True,
    variant: str | None = None,
    subfolder: str | None = None,
) -> str:
    """diffusers' push_to_hub, but it would write its blank card over ours."""
    with tempfile.TemporaryDirectory() as folder:
        _save_with_card(model, folder, safe_serialization=safe_serialization, variant=variant)
        return _upload(Path(folder), repo_id, commit_message, private, token, create_pr, subfolder)


def _upload(
    folder: Path,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    return api.upload_folder(
        repo_id=api.create_repo(repo_id, exist_ok=True, private=private).repo_id,
        folder_path=folder,
        path_in_repo=subfolder,
        commit_message=commit_message or "Upload a ternary FLUX transformer",
        create_pr=create_pr,
    )

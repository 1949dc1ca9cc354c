"""BitFlux as a quantizer of diffusers: `from_pretrained` loads ternary checkpoints, `save_pretrained` writes them.

Imported while diffusers' own quantizers are (bitflux_core/_diffusers_hook.py): what needs its models is imported later.
Importing it adds BitFlux to diffusers' tables of quantizers, as the last thing: it may be what imports diffusers.
"""

import functools
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from kernels.reference import Activations

QUANT_METHOD = "bitflux"
FORMAT_VERSION = 2
# A file's pages stay in memory while it is open, so that loading FLUX.1-dev takes so much beside the model.
SHARD_SIZE = "25MB"
_SCALE = "scale"


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
        equip(model)
        model.requires_grad_(False)

    def _dequantize(self, model: Any) -> Any:
        """`model` itself with nn.Linear of the same weights in its dtype, corrections included, frozen as it was.

        It computes the same, but for the int8 rounding of activations, which plain layers do not know.
        """
        from diffusers.configuration_utils import FrozenDict

        from bitflux_core.layers import block_linears
        from bitflux_core.linear import TernaryLinear

        dtype = model.dtype
        for name, layer in block_linears(model).items():
            if isinstance(layer, TernaryLinear):
                model.set_submodule(name, _plain(layer, dtype))
        for name in _METHODS:
            delattr(model, name)
        # Saved with it, the plain weights would be taken for a ternary checkpoint.
        model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k != "quantization_config"})
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from bitflux_core.checkpoint import stored_codes

        return stored_codes(state_dict, self.quantization_config.codes), {}  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A process that unpickles a model has not loaded one, and pipelines there do not know of the refusal yet."""
        self.__dict__.update(state)
        _refuse_loras_of_pipelines()

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def as_loaded(model: Any, config: BitFluxConfig) -> None:
    """Makes a ternary transformer what `from_pretrained` would give: it saves itself as a ternary checkpoint."""
    model.register_to_config(quantization_config=config)
    model.hf_quantizer = BitFluxQuantizer(config, pre_quantized=True)
    equip(model)


def equip(model: Any) -> None:
    """Replaces those methods of a ternary transformer that only full-precision weights can serve."""
    for name, method in _METHODS.items():
        setattr(model, name, functools.partial(method, model))  # can be pickled, unlike a bound function
    _refuse_loras_of_pipelines()


def _plain(layer: Any, dtype: torch.dtype) -> nn.Linear:
    """The nn.Linear of a TernaryLinear."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.dequantize().to(dtype))
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.to(dtype))
    return linear.requires_grad_(False).train(layer.training)


def _refuse_lora(*_: Any, **__: Any) -> None:
    raise ValueError(
        "a LoRA cannot be added to ternary layers: PEFT has no adapter for packed weights. Fuse it into the "
        "full-precision model (pipeline.fuse_lora) and quantize that"
    )


def _refuse_qkv_fusion(*_: Any) -> None:
    raise ValueError(
        "fuse_qkv_projections cannot join ternary layers: it concatenates full-precision weights, and these are "
        "packed. bitflux_core.fused.fuse(transformer) joins them, among others; or call transformer.dequantize() first"
    )


@functools.cache
def _refuse_loras_of_pipelines() -> None:
    """Gives FLUX pipelines the same reason: they ask for PEFT before they ask their transformer."""
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    load = FluxLoraLoaderMixin.load_lora_weights

    @functools.wraps(load)
    def load_or_refuse(pipeline: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(getattr(pipeline.transformer, "hf_quantizer", None), BitFluxQuantizer):
            _refuse_lora()
        return load(pipeline, *arguments, **options)

    FluxLoraLoaderMixin.load_lora_weights = load_or_refuse


def _save_pretrained(
    model: Any,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    save_function: Callable | None = None,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = SHARD_SIZE,
    push_to_hub: bool = False,
    use_flashpack: bool = False,
    **kwargs: Any,
) -> None:
    """diffusers' save_pretrained with smaller files and a model card, where there is no README.md yet.

    Pipelines read this signature for what they may pass on. ValueError if the layers differ in their activations.
    """
    from bitflux_core.model_card import write_card

    how = model.hf_quantizer.quantization_config
    how.activations = activations_of(model)
    model.register_to_config(quantization_config=how)  # anew: diffusers puts a dictionary there when it saves
    type(model).save_pretrained(
        model,
        save_directory,
        is_main_process=is_main_process,
        save_function=save_function,
        safe_serialization=safe_serialization,
        variant=variant,
        max_shard_size=max_shard_size,
        use_flashpack=use_flashpack,
    )
    folder = Path(save_directory)
    if not is_main_process or not folder.is_dir():  # diffusers logs that the name is a file's
        return
    if not (folder / "README.md").exists():
        write_card(model, folder, how.to_dict())
    if push_to_hub:
        _upload(folder, **{"repo_id": folder.name, **kwargs})


def activations_of(model: Any) -> Activations:
    """Those of all its ternary layers, as they are set now. ValueError if they differ."""
    from bitflux_core.layers import block_linears
    from bitflux_core.linear import TernaryLinear

    kinds = {layer.activations for layer in block_linears(model).values() if isinstance(layer, TernaryLinear)}
    if len(kinds) != 1:
        raise ValueError(f"the layers' activations differ ({', '.join(sorted(kinds))}): set one for all of them")
    return kinds.pop()


def _push_to_hub(
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
        _save_pretrained(model, folder, safe_serialization=safe_serialization, variant=variant)
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
    repo_id = api.create_repo(repo_id, exist_ok=True, private=private).repo_id
    card = "README.md" if subfolder is None else f"{subfolder}/README.md"
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        ignore_patterns=["README.md"] if api.file_exists(repo_id, card) else None,  # somebody may have written it
        path_in_repo=subfolder,
        commit_message=commit_message or "Upload a ternary FLUX transformer",
        create_pr=create_pr,
    )


# By name, and with the model as their first argument.
_METHODS: dict[str, Callable] = {
    "save_pretrained": _save_pretrained,
    "push_to_hub": _push_to_hub,
    "load_lora_adapter": _refuse_lora,
    "fuse_qkv_projections": _refuse_qkv_fusion,
}


auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = BitFluxQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = BitFluxConfig

"""A causal language model built from a checkpoint alone: its config says what, its tensors fill it.

Promise: what is returned computes with exactly the checkpoint's weights. Every parameter was filled, every tensor was
used (but those that the architecture itself declares superfluous), shapes were compared before memory was taken, and
tied tensors are one parameter. No code, no kernel and no file beside the checkpoint is ever loaded: the keys of a
config that ask for such things are dropped. Memory: the network and one tensor. It does not train, generate or cache.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from core.errors import BitmillError, InvalidCheckpoint, MissingFile, UnsupportedArchitecture
from core.storage.checkpoint import CheckpointIndex
from core.tensors.dtypes import FLOATING
from core.tensors.reader import read_tensor

Weights = Callable[[str], torch.Tensor]

_LANGUAGE_MODELS = ("CausalLM", "LMHead")
_MAX_BUFFER_BYTES = 1 << 30
# Where torchao is installed, transformers imports it, and it tells which kernels for other devices it cannot load.
_LOUD = ("torchao", "torch.utils._pytree")
# What a config may not decide here: code to load, kernels to fetch, dtypes, quantisers.
_DROPPED = frozenset(
    {
        "auto_map",
        "trust_remote_code",
        "quantization_config",
        "compression_config",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "use_kernels",
        "dtype",
        "torch_dtype",
        "_name_or_path",
        "name_or_path",
        "model_type",
        "transformers_version",
        "tie_word_embeddings",
    }
)
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MAX_EXPERTS = 1 << 16
_RENAMED = (("embed_out.", "lm_head."), (".block_sparse_moe.", ".mlp."))
# Experts stored one by one go into the stacked parameters of the network: (parameter, part of the second dimension).
_EXPERT = re.compile(r"^(.+\.experts)\.(\d{1,6})\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
_EXPERT_PARTS = {
    "gate_proj": ("gate_up_proj", 0),
    "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
    "w2": ("down_proj", None),
}
_OLD_ROTARY = re.compile(r"rotary_emb\.inv_freq$")

_TENSOR_NAMES: WeakKeyDictionary[nn.Module, dict[str, tuple[str, ...]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Place:
    """Where a checkpoint's tensor goes: a tensor of the network, one expert of it, or half the rows of that expert."""

    target: str
    expert: int | None = None
    half: int | None = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of `tensor` that this is; a view."""
        if self.expert is None:
            return tensor
        chosen = tensor[self.expert]
        return chosen if self.half is None else chosen.chunk(2)[self.half]

    def fits(self, targets: Mapping[str, torch.Tensor]) -> bool:
        """Whether the network has it."""
        target = targets.get(self.target)
        return target is not None and (self.expert is None or (target.ndim == 3 and self.expert < len(target)))


def load_network(
    index: CheckpointIndex, *, device: str, dtype: torch.dtype, weights: Weights | None = None
) -> nn.Module:
    """The checkpoint's network in eval mode, without gradients; `weights(name)` instead of the stored tensors.

    Raises MissingFile without a config, UnsupportedArchitecture when it is not that of a causal language model which
    the transformers library knows, InvalidCheckpoint when config and tensors do not fit.
    """
    config = _network_config(index)
    skeleton = _build(index, config, "meta", dtype)
    places = _places(index, skeleton)
    _check_filled(skeleton, places)
    del skeleton
    network = _build(index, config, device, dtype)
    _fill(network, places, weights or partial(read_tensor, index))
    network.requires_grad_(False).eval()
    _TENSOR_NAMES[network] = _names_by_parameter(network, places)
    _check_causal(index, network, device)
    return network


def tensor_names(network: nn.Module) -> dict[str, tuple[str, ...]]:
    """The checkpoint's tensors behind each parameter; a parameter's own name for networks that were not loaded here."""
    known = _TENSOR_NAMES.get(network, {})
    return {name: known.get(name, (name,)) for name, _ in network.named_parameters()}


def next_token_logits(network: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits (sequences, length, vocabulary) in the network's dtype for token ids (sequences, length)."""
    answered: torch.Tensor = network(input_ids=ids, use_cache=False).logits
    return answered


def check_token_ids(network: nn.Module, ids: torch.Tensor) -> None:
    """InvalidCheckpoint when the tokenizer has ids for which the network has no row."""
    rows = _input_embeddings(network).weight.shape[0]
    if ids.numel() and (highest := int(ids.max())) >= rows:
        raise InvalidCheckpoint(
            f"the tokenizer answers token {highest}, the network has {rows}", where="tokenizer.json"
        )


def learns_positions(network: nn.Module) -> bool:
    """Whether there are embeddings beside the input's: their outputs may be shared by the sequences of a batch."""
    table = _input_embeddings(network)
    return any(isinstance(module, nn.Embedding) and module is not table for module in network.modules())


def _input_embeddings(network: nn.Module) -> Any:
    known: Any = network
    return known.get_input_embeddings()


def _network_config(index: CheckpointIndex) -> Any:
    """The config as the transformers library sees it, with nothing in it that reaches outside the checkpoint."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if not index.config:
        raise MissingFile("a forward pass needs the config", where="config.json", hint="add it to the checkpoint")
    kind = index.config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise _unsupported(index, "the transformers library does not know it")
    stated = index.config.get("architectures")
    named = stated[0] if isinstance(stated, list) and stated else None
    if named is not None and not _is_language_model(str(named)):
        raise _unsupported(index, f"{str(named)[:80]} is not a causal language model")
    _check_counts(index)
    try:
        config = AutoConfig.for_model(kind, **_harmless(index.config))
    except Exception as error:  # a config class raises anything for values nobody vouches for
        raise _unsupported(index, f"its config cannot be read: {_first_line(error)}") from error
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = bool(index.ties)
    return config


def _unsupported(index: CheckpointIndex, reason: str) -> UnsupportedArchitecture:
    kind = str(index.config.get("model_type"))[:80]
    return UnsupportedArchitecture(
        f"no forward pass through model_type {kind!r}: {reason}",
        where="config.json",
        hint="a recipe without calibration and evaluation needs no forward pass",
    )


def _is_language_model(name: str) -> bool:
    return any(part in name for part in _LANGUAGE_MODELS)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _harmless(value: Any, depth: int = 0) -> Any:
    """The config's values without `_DROPPED`, at any depth; nested configs keep their model_type."""
    if isinstance(value, dict):
        dropped = _DROPPED if depth == 0 else _DROPPED - {"model_type", "tie_word_embeddings"}
        return {key: _harmless(item, depth + 1) for key, item in value.items() if key not in dropped}
    return [_harmless(item, depth + 1) for item in value] if isinstance(value, list) else value


def _check_counts(index: CheckpointIndex) -> None:
    """Refuse more layers than tensors before a module is made for each."""
    text = index.config.get("text_config")
    limits = dict.fromkeys(_LAYER_COUNTS, len(index.tensors)) | dict.fromkeys(_EXPERT_COUNTS, _MAX_EXPERTS)
    for stated in (index.config, text if isinstance(text, dict) else {}):
        for key, limit in limits.items():
            if isinstance(count := stated.get(key), int) and count > limit:
                raise InvalidCheckpoint(
                    f"{key} is {count}, the checkpoint has {len(index.tensors)} tensors", where="config.json"
                )


def _build(index: CheckpointIndex, config: Any, device: str, dtype: torch.dtype) -> nn.Module:
    """The network with memory for its weights but no values in it; buffers have theirs."""
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    library: Any = AutoModelForCausalLM
    try:
        with torch.device(device), no_init_weights():
            network = library.from_config(copy.deepcopy(config), dtype=dtype)
        network.tie_weights()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a model class raises anything for values nobody vouches for
        raise _unsupported(index, f"it cannot be built: {_first_line(error)}") from error
    if not _is_language_model(type(network).__name__):
        raise _unsupported(index, f"{type(network).__name__} is not a causal language model")
    if device == "meta" and sum(buffer.nbytes for buffer in network.buffers()) > _MAX_BUFFER_BYTES:
        raise InvalidCheckpoint("its tables beside the weights would not fit into memory", where="config.json")
    module: nn.Module = network
    return module


@torch.inference_mode()
def _check_causal(index: CheckpointIndex, network: nn.Module, device: str) -> None:
    """Refuse a network whose first answer depends on the second token: an encoder under a language model's name."""
    ids = torch.tensor([[0, 0], [0, 1]], device=device) % _input_embeddings(network).weight.shape[0]
    try:
        first, second = next_token_logits(network, ids)[:, 0].float()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a kernel that is not installed, a config that only the forward pass contradicts
        raise _unsupported(index, f"its forward pass fails: {_first_line(error)}") from error
    noise = 1e-4 if next(network.parameters()).dtype == torch.float32 else 1e-2  # of kernels, relative to the largest
    if (first - second).abs().max() > noise * first.abs().max():
        raise _unsupported(index, "it attends to later tokens too")


def _places(index: CheckpointIndex, skeleton: nn.Module) -> dict[str, _Place]:
    """Where each counted tensor goes; InvalidCheckpoint names one that has no place or another shape."""
    targets: Mapping[str, torch.Tensor] = skeleton.state_dict(keep_vars=True)
    prefix = str(getattr(skeleton, "base_model_prefix", ""))
    taken: dict[_Place, str] = {}
    for name in index.names:
        place = next((place for place in _candidates(name, prefix) if place.fits(targets)), None)
        if place is None:
            if _is_superfluous(name, skeleton):
                continue
            raise InvalidCheckpoint("the architecture of the config has no such tensor", where=name)
        _check_shape(index, name, place.of(targets[place.target]))
        if other := taken.get(place):
            raise InvalidCheckpoint(f"is the same parameter as {other}", where=name)
        taken[place] = name
    return {name: place for place, name in taken.items()}


def _candidates(name: str, prefix: str) -> Iterator[_Place]:
    """The places a tensor of that name may have, likeliest first."""
    yield _Place(name)
    yield _Place(f"{prefix}.{name}")
    for stored, used in _RENAMED:
        yield _Place(name.replace(stored, used))
    if found := _EXPERT.match(name.replace(".block_sparse_moe.", ".mlp.")):
        parameter, half = _EXPERT_PARTS[found[3]]
        yield _Place(f"{found[1]}.{parameter}", int(found[2]), half)


def _is_superfluous(name: str, skeleton: nn.Module) -> bool:
    """Whether the architecture declares that checkpoints may hold this tensor and that it is not needed."""
    patterns = getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
    return bool(_OLD_ROTARY.search(name)) or any(re.search(pattern, name) for pattern in patterns)


def _check_shape(index: CheckpointIndex, name: str, wanted: torch.Tensor) -> None:
    entry = index.tensors[name]
    if tuple(wanted.shape) != entry.shape:
        raise InvalidCheckpoint(f"has shape {list(entry.shape)}, the config asks for {list(wanted.shape)}", where=name)
    if wanted.is_floating_point() and entry.dtype not in FLOATING:
        raise InvalidCheckpoint(f"holds {entry.dtype}, which are not weights as they are used", where=name)


def _check_filled(skeleton: nn.Module, places: Mapping[str, _Place]) -> None:
    """InvalidCheckpoint names the first parameter that the checkpoint does not fill."""
    targets: Mapping[str, torch.Tensor] = skeleton.state_dict(keep_vars=True)
    filled: dict[int, int] = {}
    for place in places.values():
        target = targets[place.target]
        filled[id(target)] = filled.get(id(target), 0) + place.of(target).numel()
    for name, parameter in skeleton.named_parameters():
        if filled.get(id(parameter), 0) != parameter.numel():
            raise InvalidCheckpoint("the checkpoint lacks this tensor or a part of it", where=name)


@torch.no_grad()
def _fill(network: nn.Module, places: Mapping[str, _Place], weights: Weights) -> None:
    targets: Mapping[str, torch.Tensor] = network.state_dict(keep_vars=True)
    for name, place in places.items():
        part, given = place.of(targets[place.target]), weights(name)
        if part.shape != given.shape:
            raise BitmillError(f"planned as {list(part.shape)}, is {list(given.shape)}", where=name)
        part.copy_(given)


def _names_by_parameter(network: nn.Module, places: Mapping[str, _Place]) -> dict[str, tuple[str, ...]]:
    targets: Mapping[str, torch.Tensor] = network.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, place in places.items():
        names.setdefault(id(targets[place.target]), []).append(name)
    return {name: tuple(names[id(parameter)]) for name, parameter in network.named_parameters()}

"""A causal language model built from a checkpoint alone: its config says what, its tensors fill it.

Promise: what is returned computes with exactly the checkpoint's weights. Every parameter was filled, every tensor was
used (but those that the architecture itself declares superfluous), shapes were compared before memory was taken, and
tied tensors are one parameter. No code, no kernel and no file beside the checkpoint is ever loaded: the keys of a
config that ask for such things are dropped. Memory: the network and one tensor. It does not train, generate or cache.
A network that holds no weights until they are asked for is `core.hollow`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from core.errors import BitmillError, InvalidCheckpoint, MissingFile, UnsupportedArchitecture
from core.network_tensors import Place, Weights, check_filled, fill, names_by_parameter, places_of
from core.storage.checkpoint import CheckpointIndex
from core.tensors.reader import read_tensor

_LANGUAGE_MODELS = ("CausalLM", "LMHead")
_MAX_BUFFER_BYTES = 1 << 30
# Where torchao is installed, transformers imports it, and it tells which kernels for other devices it cannot load.
_LOUD = ("torchao", "torch.utils._pytree")
# What a config may not decide here: code to load, kernels to fetch, dtypes, quantisers, what is kept of a pass.
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
        "output_hidden_states",
        "output_attentions",
    }
)
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MAX_EXPERTS = 1 << 16

_TENSOR_NAMES: WeakKeyDictionary[nn.Module, dict[str, tuple[str, ...]]] = WeakKeyDictionary()


def load_network(
    index: CheckpointIndex, *, device: str, dtype: torch.dtype, weights: Weights | None = None
) -> nn.Module:
    """The checkpoint's network in eval mode, without gradients; `weights(name)` instead of the stored tensors.

    Raises MissingFile without a config, UnsupportedArchitecture when it is not that of a causal language model which
    the transformers library knows, InvalidCheckpoint when config and tensors do not fit.
    """
    config = network_config(index)
    places = checked_places(index, config, dtype)
    network = build(index, config, device, dtype)
    fill(network.state_dict(keep_vars=True), places.items(), weights or partial(read_tensor, index))
    network.requires_grad_(False).eval()
    _TENSOR_NAMES[network] = names_by_parameter(network, places)
    with torch.inference_mode(), forward_pass(index):
        logits = next_token_logits(network, causality_probe(network).to(device))
    check_causal(index, logits)
    return network


def checked_places(index: CheckpointIndex, config: Any, dtype: torch.dtype) -> dict[str, Place]:
    """Where each tensor goes in the network of that config, found without memory for weights.

    InvalidCheckpoint names a tensor that is missing, that has no place or another shape.
    """
    skeleton = build(index, config, "meta", dtype)
    places = places_of(index, skeleton)
    check_filled(skeleton, places)
    return places


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


def network_config(index: CheckpointIndex) -> Any:
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


def build(index: CheckpointIndex, config: Any, device: str, dtype: torch.dtype) -> nn.Module:
    """The network with memory for its weights but no values in it; buffers have theirs, except on `meta`."""
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


def causality_probe(network: nn.Module) -> torch.Tensor:
    """Two sequences of two tokens (2, 2) that differ in the second."""
    rows: int = _input_embeddings(network).weight.shape[0]
    return torch.tensor([[0, 0], [0, 1]]) % rows


@contextmanager
def forward_pass(index: CheckpointIndex) -> Iterator[None]:
    """Around the first pass through a network: what it raises becomes UnsupportedArchitecture, with the reason."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, BitmillError):
        raise
    except Exception as error:  # a kernel that is not installed, a config that only the forward pass contradicts
        raise _unsupported(index, f"its forward pass fails: {_first_line(error)}") from error


def check_causal(index: CheckpointIndex, answered: torch.Tensor) -> None:
    """Refuse a network whose first answer depends on the second token: an encoder under a language model's name.

    `answered`: what it, or a part of it, made of `causality_probe` (2, 2, features).
    """
    first, second = answered[:, 0].float()
    noise = 1e-4 if answered.dtype == torch.float32 else 1e-2  # of kernels, relative to the largest
    if (first - second).abs().max() > noise * first.abs().max():
        raise _unsupported(index, "it attends to later tokens too")

"""What can be refused before any work is done: from the headers, the config and the recipe alone.

Promise: nothing that would succeed is refused, but for families some of whose allowed widths have no table. The bound
on the size is a true one (headers of the new files are left out of it), so allocation has the last word on targets just
above it, as the engine has on architectures. No tensor data is read; no torch.
"""

from __future__ import annotations

import math

from core.errors import (
    InfeasibleTarget,
    InvalidCheckpoint,
    InvalidFormat,
    InvalidRecipe,
    MissingFile,
    UnsupportedArchitecture,
)
from core.formats.stored import stored_parts
from core.recipe.allocation import widths_within
from core.recipe.calibration import checkpoint_file
from core.recipe.recipe import Override, Recipe, first_match
from core.recipe.tensor_format import TensorFormat, parse
from core.storage.checkpoint import CheckpointIndex
from core.storage.inspection import QUANTISABLE, quantised_by
from core.storage.safetensors_header import DTYPE_BITS, TensorEntry


def preflight(index: CheckpointIndex, recipe: Recipe) -> None:
    """Raise what is known to be wrong with this recipe on this checkpoint; see the functions below."""
    require_unquantised(index)
    _require_forward(index, recipe)
    _require_texts(index, recipe)
    _require_work(index, recipe)
    _require_reachable(index, recipe)
    _require_tables(index, recipe)


def smallest_bytes(index: CheckpointIndex, recipe: Recipe) -> int:
    """Bytes of all tensors at the smallest widths that the recipe allows: no artefact of it can be smaller."""
    return sum(_least_bytes(index.tensors[name], recipe) for name in index.names)


def require_unquantised(index: CheckpointIndex) -> None:
    """InvalidCheckpoint when the config says that a quantiser was here before: no recipe can be carried out."""
    if already := quantised_by(index.config):
        raise InvalidCheckpoint(
            f"the weights are already quantised ({already})",
            where="config.json",
            hint="start from the original checkpoint, or decode this one first",
        )


def _require_forward(index: CheckpointIndex, recipe: Recipe) -> None:
    """MissingFile or UnsupportedArchitecture when the recipe needs a forward pass that the files do not allow."""
    if not (recipe.calibration or recipe.evaluation):
        return
    hint = "a recipe without calibration and evaluation, such as `fast`, needs no forward pass"
    if not index.config:
        raise MissingFile("calibration and evaluation need the model's config", where="config.json", hint=hint)
    if not isinstance(index.config.get("model_type"), str):
        raise UnsupportedArchitecture("names no model_type", where="config.json", hint=hint)
    if "tokenizer.json" not in index.files:
        raise MissingFile("calibration and evaluation need the tokenizer", where="tokenizer.json", hint=hint)


def _require_texts(index: CheckpointIndex, recipe: Recipe) -> None:
    for part, spec in (("calibration", recipe.calibration), ("evaluation", recipe.evaluation)):
        path = checkpoint_file(spec.text) if spec else None
        if path is not None and path not in index.files:
            raise MissingFile(f"the text of {part}.text is not in the checkpoint", where=path)


def _require_work(index: CheckpointIndex, recipe: Recipe) -> None:
    able = [name for name in index.names if _is_quantisable(index.tensors[name])]
    if not able:
        known = ", ".join(QUANTISABLE)
        raise InvalidCheckpoint(f"no tensor to quantise: none has two or more dimensions and a dtype of {known}")
    if all(_is_kept(first_match(recipe.overrides, name)) for name in able):
        message = f"keeps all {len(able)} tensors that could be quantised"
        raise InvalidRecipe(message, where="overrides", errors=({"path": "overrides", "message": message},))


def _require_reachable(index: CheckpointIndex, recipe: Recipe) -> None:
    """InfeasibleTarget with the smallest value that may be reached, in the target's own unit."""
    target = recipe.target
    if target.kl is not None:
        return
    least = smallest_bytes(index, recipe)
    if target.size_bytes is not None:
        asked, reachable, shown = float(target.size_bytes), float(least), f"{least} bytes"
    else:
        asked, reachable = target.value, 8 * least / max(index.parameters, 1)
        shown = f"{math.ceil(reachable * 1e4) / 1e4} bits per parameter"
    if asked < reachable:
        raise InfeasibleTarget(
            f"{asked:.10g} cannot be reached: the smallest allowed widths and what is kept take {shown}",
            where=f"target.{target.kind}",
            hint="ask for more, allow smaller widths, take larger blocks, or keep fewer tensors",
        )


def _require_tables(index: CheckpointIndex, recipe: Recipe) -> None:
    """InvalidFormat for a width that a tensor may get and whose table cannot be: values too close, or not finite."""
    from core.formats.elements import element_table, shared_weights

    for name in index.names:
        entry, override = index.tensors[name], first_match(recipe.overrides, name)
        if not _is_quantisable(entry) or _is_kept(override):
            continue
        for fmt in _widest_and_narrowest(recipe, override):
            if not fmt.is_block_type:
                try:
                    element_table(fmt, shared_weights(fmt, entry.shape))
                except InvalidFormat as error:
                    raise error.at(f"{fmt} for {name}") from None


def _widest_and_narrowest(recipe: Recipe, override: Override | None) -> tuple[TensorFormat, ...]:
    fmt = parse((override and override.format) or recipe.format)
    if override is not None and override.is_exact:
        return (fmt,)
    widths = widths_within(fmt, *_bounds(recipe, override))
    return fmt.with_bits(widths[0]), fmt.with_bits(widths[-1])


def _bounds(recipe: Recipe, override: Override | None) -> tuple[float | None, float | None]:
    least = (override and override.min_bits) or recipe.allocation.min_bits
    most = (override and override.max_bits) or recipe.allocation.max_bits
    return least, most


def _is_quantisable(entry: TensorEntry) -> bool:
    return len(entry.shape) > 1 and entry.dtype in QUANTISABLE and entry.elements > 0


def _is_kept(override: Override | None) -> bool:
    return override is not None and override.keep is True


def _least_bytes(entry: TensorEntry, recipe: Recipe) -> int:
    """The bytes of a tensor that is kept, or at the smallest width that it may get."""
    override = first_match(recipe.overrides, entry.name)
    if not _is_quantisable(entry) or _is_kept(override):
        return entry.nbytes
    return _stored_bytes(_smallest_format(recipe, override), entry.shape)


def _smallest_format(recipe: Recipe, override: Override | None) -> TensorFormat:
    """The narrowest form that an allocator may give a tensor under that override; its group may ask for a wider one."""
    fmt = parse((override and override.format) or recipe.format)
    if override is not None and override.is_exact:
        return fmt
    return fmt.with_bits(widths_within(fmt, *_bounds(recipe, override))[0])


def _stored_bytes(fmt: TensorFormat, shape: tuple[int, ...]) -> int:
    """At the least: what only the data tell is taken for nothing."""
    return sum(math.prod(part) * DTYPE_BITS[dtype] // 8 for dtype, part in stored_parts(fmt, shape, 0, 0).values())

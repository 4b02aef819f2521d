"""What is added to a layer's output is the residual stream, if nothing comes between."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from core.sensitivity.additions import Additions

STREAM, OUTPUT = torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)


def found(use: Callable[[Tensor, Tensor], object]) -> Tensor | None:
    """What is seen to be added to the output of a layer that `use` gets beside the stream."""
    output, stream = OUTPUT.clone(), STREAM.clone()
    additions = Additions()
    with additions:
        additions.watch("layer", output)
        use(stream, output)
    return additions.found.get("layer")


def test_the_other_operand_of_a_sum_is_found_whatever_the_sum_looks_like() -> None:
    sums: list[Callable[[Tensor, Tensor], object]] = [
        lambda stream, output: stream + output,
        lambda stream, output: output + stream,
        torch.add,
        lambda stream, output: torch.add(stream, output, alpha=1),
        lambda stream, output: stream.add_(output),
        lambda stream, output: output.add_(stream),
        lambda stream, output: stream + F.dropout(output, 0.1, training=False),
        lambda stream, output: stream.flatten() + output.view(-1),
    ]
    for use in sums:
        seen = found(use)
        assert seen is not None
        assert torch.equal(seen.flatten(), STREAM.flatten())


def test_sums_of_sums_count_as_one_until_the_sum_is_used_for_something_else() -> None:
    parallel = found(lambda stream, output: (output + 2 * stream) + stream)
    assert parallel is not None
    assert torch.equal(parallel, 3 * STREAM)

    def one_after_another(stream: Tensor, output: Tensor) -> Tensor:
        middle = stream + output
        return middle + F.layer_norm(middle, (3,))

    assert torch.equal(found(one_after_another), STREAM)  # type: ignore[arg-type]


def test_layers_that_write_together_have_each_other_in_what_they_add_to() -> None:
    one, other, stream = OUTPUT.clone(), 2 * OUTPUT, STREAM.clone()
    additions = Additions()
    with additions:
        additions.watch("one", one)
        additions.watch("other", other)
        _ = (one + other) + stream
    assert torch.equal(additions.found["one"], STREAM + 2)
    assert torch.equal(additions.found["other"], STREAM + 1)


def test_an_output_that_something_else_is_made_of_is_not_added_as_it_is() -> None:
    assert found(lambda stream, output: stream + F.layer_norm(output, (3,))) is None
    assert found(lambda stream, output: stream + 0.5 * output) is None
    assert found(lambda stream, output: torch.add(stream, output, alpha=0.5)) is None
    assert found(lambda stream, output: stream + output[:1]) is None
    assert found(lambda stream, output: stream + output.reshape(3, 2).T) is None


def test_reading_a_shape_is_no_use() -> None:
    def looked_at(stream: Tensor, output: Tensor) -> Tensor:
        assert output.shape == stream.shape
        assert output.dim() == 2
        return stream + output

    assert torch.equal(found(looked_at), STREAM)  # type: ignore[arg-type]


def test_what_is_found_stays_what_it_was_and_is_in_fp32() -> None:
    output, stream = OUTPUT.bfloat16(), STREAM.bfloat16()
    with Additions() as additions:
        additions.watch("layer", output)
        total = stream + output
    total.zero_()
    stream.zero_()
    assert additions.found["layer"].dtype == torch.float32
    assert torch.equal(additions.found["layer"], STREAM)

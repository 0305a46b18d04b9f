"""Where the rows of a batch lie in the input of one layer, and each row's task there.

A layer rarely sees the batch as the model got it: it may come flattened, time first, or cut into windows.
`fastspec.multitask.probe` finds out which, by marking rows and looking where the marks arrive; a layer
keeps what was found in `row_layouts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

# of an input [n, ..., in] and a batch of B rows:
Layout = Literal[
    "batch",  # [B, ..., in]
    "blocks",  # [B m, ..., in], the m entries of a row one after another
    "strided",  # [m B, ..., in], entry i is of row i % B
    "second",  # [m, B, ..., in]
]
LAYOUTS: tuple[Layout, ...] = ("batch", "blocks", "strided", "second")
ROWS_FIRST: tuple[Layout, ...] = ("batch",)


def same(y: Tensor) -> Tensor:
    return y


class Arranged(NamedTuple):
    """A layer's input with the rows first, and the way back for what the layer makes of it."""

    x: Tensor  # [R, ..., in]
    task: Tensor  # [R]
    back: Callable[[Tensor], Tensor]  # [R, ..., out] -> the input's shape with out in place of in


@dataclasses.dataclass(frozen=True)
class Rows:
    """The tasks of one batch.

    Attributes:
        task: places in the tables, int64 [B]; -1 is the pretrained model.
        uniform: all rows are known to be of one task: then it does not matter which row is whose.
    """

    task: Tensor
    uniform: bool = False

    def repeated(self, count: int) -> Rows:
        """Every row `count` times, as `generate` makes beams of prompts."""
        return (
            self
            if count == 1
            else dataclasses.replace(self, task=self.task.repeat_interleave(count))
        )

    def arrange(self, x: Tensor, layer: Any) -> Arranged:
        """The input `x` of a layer by the rows of the batch.

        Raises:
            ValueError: it is not known, or not certain, which part of `x` is whose.
        """
        shape, count = x.shape, self.task.shape[0]
        known: Collection[Layout] | None = layer.row_layouts
        if known == ROWS_FIRST and not self.uniform and len(shape) > 1 and shape[0] == count:
            return Arranged(x, self.task, same)  # nearly every layer
        if self.uniform:
            return Arranged(x[None], self.task[:1], lambda y: y[0])
        if count == 0:
            known = ROWS_FIRST
        if known is None:
            raise ValueError(
                f"a layer got {list(shape)} in a batch of {count} rows, and whose entries these are is "
                "not known yet: call the whole model once with different tasks, not compiled"
            )
        found = fitting(shape, count, known)
        if found is None:
            raise ValueError(
                f"a layer got {list(shape)} in a batch of {count} rows, where the batch came as "
                f"{' or '.join(sorted(known))} before: its input was flattened, expanded or reordered, and "
                "which row is whose can't be known here"
            )
        if found == "batch":
            return Arranged(x, self.task, same)
        blocks = by_rows(x, count, found)
        return Arranged(blocks, self.task, lambda y: _back(y, shape[0], found))


def fitting(shape: torch.Size, count: int, layouts: Collection[Layout]) -> Layout | None:
    """The one of these layouts that an input of this shape can have; None where that is not one."""
    rows_first = len(shape) >= 2 and shape[0] > 0 and shape[0] % count == 0
    flat = [name for name in layouts if name in ("blocks", "strided")]
    fits: list[Layout] = []
    if len(shape) >= 2 and shape[0] == count:
        if flat or "batch" in layouts:
            fits.append("batch")  # one entry a row: all are the same
    elif rows_first:
        fits += flat
    if "second" in layouts and len(shape) >= 3 and shape[1] == count:
        fits.append("second")
    return fits[0] if len(fits) == 1 else None


def by_rows(x: Tensor, count: int, layout: Layout) -> Tensor:
    """`x` as [B, m, ..., in]."""
    if layout == "batch":
        return x
    if layout == "blocks":
        return x.reshape(count, -1, *x.shape[1:])
    if layout == "strided":
        x = x.reshape(-1, count, *x.shape[1:])
    return x.transpose(0, 1).contiguous()


def _back(y: Tensor, first: int, layout: Layout) -> Tensor:
    if layout == "blocks":
        return y.reshape(first, *y.shape[2:])
    y = y.transpose(0, 1).contiguous()
    return y.reshape(first, *y.shape[2:]) if layout == "strided" else y

"""The functions that NumPy and torch call by different names, for code that is written once for the arrays of both.

Everything else such code needs is the same in both libraries: operators, slices, `array.sum(axis=...)`, and the
functions of `namespace(array)`. Torch is never imported here: an array of torch's comes with it.
"""

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any  # a NumPy array or a torch tensor


def namespace(array: Array) -> Any:
    """The module that the array comes from, `numpy` or `torch`."""
    return np if isinstance(array, np.ndarray) else sys.modules["torch"]


def is_tensor(value: object) -> bool:
    """Whether a value is a torch tensor; none is where nobody has imported torch."""
    return isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ()))


def full(shape: Sequence[int], value: float, like: Array, kind: str = "float32") -> Array:
    """An array of one value, of the library and on the device of `like`; `kind` is the name of its type."""
    if isinstance(like, np.ndarray):
        return np.full(shape, value, dtype=kind)
    torch = namespace(like)
    return torch.full(tuple(shape), value, dtype=getattr(torch, kind), device=like.device)


def moved(values: np.ndarray, like: Array) -> Array:
    """A NumPy array as one of the library and on the device of `like`."""
    return values if isinstance(like, np.ndarray) else namespace(like).from_numpy(values).to(like.device)


def to_numpy(array: Array) -> np.ndarray:
    """Any array as a NumPy array, floats in float32 at least."""
    if isinstance(array, np.ndarray):
        return array
    array = array.detach().cpu()
    return (array.float() if array.is_floating_point() and array.itemsize < 4 else array).numpy()


def cast(array: Array, kind: str) -> Array:
    """A copy in the type of that name, such as "float32"."""
    return array.astype(kind) if isinstance(array, np.ndarray) else array.to(getattr(namespace(array), kind), copy=True)


def gather_rows(array: Array, rows: Array) -> Array:
    """Array (images, rows, ...) -> the rows named for each image by `rows` (images, new rows)."""
    library, count = namespace(rows), rows.shape[0]
    images = np.arange(count) if library is np else library.arange(count, device=rows.device)
    return array[images[:, None], rows]


def of_images(value: Any, images: np.ndarray) -> Any:
    """The arrays in a value, whose first axis is the images, for the images named; in tuples and dictionaries too."""
    if isinstance(value, dict):
        return {name: of_images(part, images) for name, part in value.items()}
    if isinstance(value, tuple):
        parts = [of_images(part, images) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return None if value is None else value[images]


def take_along(array: Array, indices: Array) -> Array:
    """The elements of the last axis that `indices` names, which has the array's other axes."""
    if isinstance(array, np.ndarray):
        return np.take_along_axis(array, indices, axis=-1)
    return array.gather(-1, indices)


def put_along(array: Array, indices: Array, values: Array | float) -> None:
    """Set the elements of the last axis that `indices` names, in place."""
    if isinstance(array, np.ndarray):
        np.put_along_axis(array, indices, values, axis=-1)
    else:
        array.scatter_(-1, indices, values)


def top(array: Array, count: int) -> tuple[Array, Array]:
    """The `count` largest elements of the last axis, the largest first, and where they stand.

    Where fewer are above minus infinity, the places of the others do not matter.
    """
    if not isinstance(array, np.ndarray):
        return array.topk(count, dim=-1)
    # So many passes over the array take a tenth of the time of `np.argpartition`, for as few as a beam keeps.
    left = array.reshape(-1, array.shape[-1]).copy()
    rows, best = np.arange(len(left)), np.empty((len(left), count), dtype=np.int64)
    largest = np.empty((len(left), count), dtype=array.dtype)
    for rank in range(count):
        best[:, rank] = left.argmax(axis=1)
        largest[:, rank] = left[rows, best[:, rank]]
        left[rows, best[:, rank]] = -np.inf
    shape = (*array.shape[:-1], count)
    return largest.reshape(shape), best.reshape(shape)


def sort_descending(array: Array) -> tuple[Array, Array]:
    """The elements of the last axis, the largest first and equal ones in their order, and where they stood."""
    if not isinstance(array, np.ndarray):
        return array.sort(dim=-1, descending=True, stable=True)
    order = np.argsort(-array, axis=-1, kind="stable")
    return np.take_along_axis(array, order, axis=-1), order


def log_softmax(array: Array) -> Array:
    """Log-probabilities over the last axis."""
    if not isinstance(array, np.ndarray):
        return array.log_softmax(dim=-1)
    shifted = array - array.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def without_gradients(array: Array) -> contextlib.AbstractContextManager[Any]:
    """A block in which torch records nothing for gradients, where the array is torch's."""
    return contextlib.nullcontext() if isinstance(array, np.ndarray) else namespace(array).inference_mode()

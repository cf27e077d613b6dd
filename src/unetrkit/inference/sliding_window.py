"""A network over a volume of any size: overlapping windows, blended, in bounded memory.

Windows go in order of x, and only the part of the volume that later windows can still touch is held.
Positions, weights and therefore scores are those of MONAI's `sliding_window_inference`, which holds them all.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import combinations, product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unetrkit.errors import UserError
from unetrkit.memory import was_too_small
from unetrkit.progress import say

Triple = tuple[int, int, int]
Blending = Literal["gaussian", "constant"]
DEPTH = 8  # planes in a slab: enough to be quick, few beside the window's
Score = Callable[[Tensor], Tensor]  # windows (b, c, x, y, z) -> scores (b, classes, x, y, z)


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """Where the windows of one axis start; the last one ends with the axis (`size` >= `window`).

    >>> window_starts(100, 32, 0.5)
    [0, 16, 32, 48, 64, 68]
    >>> window_starts(32, 32, 0.5)
    [0]
    """
    step = max(int(window * (1 - overlap)), 1)
    return [*range(0, size - window, step), size - window]


def importance_map(window: Triple, blending: Blending) -> Tensor:
    """The weight of each voxel (x, y, z) of a window: 1, or a Gaussian of sigma window/8, at least 1e-3."""
    if blending == "constant":
        return torch.ones(window)
    # a corner of 96 voxels would weigh 1e-10: float32 sums would lose it, hence the floor
    x, y, z = (torch.exp((torch.arange(n) - (n - 1) / 2).square() / (-2 * (n / 8) ** 2)) for n in window)
    return (x[:, None, None] * y[:, None] * z).clamp(min=1e-3)


def scores_of(
    networks: Sequence[nn.Module],
    *,
    mirrors: Sequence[int] = (),
    swap: Sequence[int] = (),
    bf16: bool = False,
) -> Score:
    """The scores that are blended and compared: one definition for every number of opinions.

    One network without mirrors: its logits, as published. Several opinions (networks, mirrored views): the
    mean of their softmax probabilities, because the logits of different networks have no common scale.

    `mirrors`: spatial axes (0, 1, 2); every combination of them is one more view. `swap`: the channel that
    takes each channel's place in a mirror image (`Plan.mirrored`), which an odd number of flips makes.
    """
    axes = [flips for n in range(len(mirrors) + 1) for flips in combinations(mirrors, n)]
    alone = len(networks) == 1 and len(axes) == 1

    def forward(network: nn.Module, windows: Tensor, flips: tuple[int, ...]) -> Tensor:
        dims = [axis + 2 for axis in flips]
        logits = network(windows.flip(dims) if dims else windows)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if alone:
            return logits
        probabilities = logits.softmax(1).flip(dims)
        return probabilities[:, list(swap)] if swap and len(flips) % 2 else probabilities

    def score(windows: Tensor) -> Tensor:
        device = next(networks[0].parameters(), windows).device
        windows = windows.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            total = forward(networks[0], windows, axes[0])
            for network, flips in list(product(networks, axes))[1:]:
                total += forward(network, windows, flips)
        return total if alone else total / (len(networks) * len(axes))

    return score


# not inference_mode: what a network caches in it (attention masks) could not be used in training afterwards
@torch.no_grad()
def sliding_window(
    score: Score,
    image: Tensor,
    window: Triple,
    *,
    overlap: float = 0.5,
    blending: Blending = "gaussian",
    window_batch: int = 1,
    fill: Sequence[float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yields `(x_start, scores (classes, dx, y, z))` in order of x, once no later window touches them.

    `image` is (c, x, y, z); where it is smaller than the window it is padded on both sides with `fill` (a
    value per channel; None: zeros), and the slabs are cut back. `progress(done, total)` counts windows.
    Held at a time are (window + 8) x Y x Z scores of each class, on the device that `score` answers on.
    Where the memory is too small for `window_batch` windows at a time it goes on with half as many. Raises
    UserError for scores that are not finite.
    """
    size = image.shape[1:]
    padded, before = _pad(image, window, fill or [0.0] * len(image))
    xs, ys, zs = (window_starts(n, w, overlap) for n, w in zip(padded.shape[1:], window, strict=True))
    weight = importance_map(window, blending)
    rolling = total = torch.empty(0)
    places = list(product(ys, zs))
    done = 0

    for x, following in zip(xs, [*xs[1:], padded.shape[1]], strict=True):
        i = 0
        while i < len(places):
            starts = places[i : i + window_batch]
            windows = [padded[(slice(None), *_box((x, y, z), window))] for y, z in starts]
            try:
                scores = score(torch.stack(windows))
            except (RuntimeError, MemoryError) as error:
                if len(starts) == 1 or not was_too_small(error):
                    raise
                scores = None
            if scores is None:  # outside the handler: the error holds on to what filled the memory
                window_batch = len(starts) // 2
                _say_once(window_batch)
                torch.cuda.empty_cache()
                continue
            i += len(starts)
            if done == 0:
                weight = weight.to(scores)
                rolling = scores.new_zeros(scores.shape[1], window[0], *padded.shape[2:])
                total = scores.new_zeros(rolling.shape[1:])
            for (y, z), one in zip(starts, scores, strict=True):
                place = _box((0, y, z), window)
                rolling[(slice(None), *place)].addcmul_(one, weight)
                total[place] += weight
            done += len(starts)
            if progress:
                progress(done, len(xs) * len(places))

        finished = following - x
        for start in range(0, finished, DEPTH):  # in pieces: each is a copy
            a, b = max(start, before[0] - x), min(start + DEPTH, finished, size[0] + before[0] - x)
            if a >= b:
                continue
            inner = (slice(a, b), *_box(before[1:], size[1:]))
            slab = rolling[(slice(None), *inner)] / total[inner]
            if not torch.isfinite(slab.sum()):
                raise UserError("the network gave scores that are not finite", hint="predict with `amp=off`")
            yield x + a - before[0], slab
        _shift(rolling, finished, dim=1)
        _shift(total, finished, dim=0)


def _pad(image: Tensor, window: Triple, fill: Sequence[float]) -> tuple[Tensor, list[int]]:
    """The image, at least as large as the window, and how much was put before it on each axis."""
    missing = [max(w - n, 0) for w, n in zip(window, image.shape[1:], strict=True)]
    before = [m // 2 for m in missing]
    if not any(missing):
        return image, before
    widths = [width for b, m in zip(before[::-1], missing[::-1], strict=True) for width in (b, m - b)]
    return torch.stack([F.pad(c, widths, value=v) for c, v in zip(image, fill, strict=True)]), before


def _box(start: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))


def _shift(tensor: Tensor, by: int, dim: int) -> None:
    """Moves everything `by` places to the front, in place and in pieces that do not overlap; zeros follow."""
    length = tensor.shape[dim]
    for start in range(by, length, by):
        count = min(by, length - start)
        tensor.narrow(dim, start - by, count).copy_(tensor.narrow(dim, start, count))
    tensor.narrow(dim, max(length - by, 0), min(by, length)).zero_()


@cache
def _say_once(most: int) -> None:
    say(f"warning: the memory is too small for `window_batch`: going on with {most} at a time")

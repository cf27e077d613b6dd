"""Windows over a grid of tokens as index tables, and attention within them without keeping scores."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import log, prod
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

Size = tuple[int, int, int]
Made = TypeVar("Made")

# scores worked on at a time on a CPU: 2 MB, a core's cache (measured: 4 windows of 343 tokens)
SCORES = 500_000
LOG2_E = 1 / log(2)


@dataclass(frozen=True)
class Group:
    """Windows that padding and shift cut alike."""

    windows: int  # how many
    rows: Tensor  # m, their places that hold a token
    mask: Tensor | None  # m n, added to the scores of those


@dataclass(frozen=True)
class Windows:
    """How the tokens of a grid lie in windows, group after group.

    Queries are tokens only; keys are all places, padding too.
    """

    size: Size  # of a window
    groups: tuple[Group, ...]
    query: Tensor  # for each query its token
    answer: Tensor  # for each token its query
    key: Tensor  # for each key its token, or the number of tokens where the place is padding
    place: Tensor  # for each token its key
    padding: Tensor  # the keys that are padding


def windows(grid: Size, window: int, shifted: bool, device: torch.device) -> Windows:
    """The windows of a grid, remembered; an axis no longer than a window is one window, and not shifted."""
    return remembered(_windows, grid, window, shifted, device)


def relative_index(size: Size, window: int, sliced: bool, device: torch.device) -> Tensor:
    """Which row of the bias table belongs to each pair of places in a window, (n, n), remembered.

    `sliced` is what the published networks do where the window is smaller than the one the table was made
    for: they cut the corner of the full window's index, by which most pairs read another displacement's row
    (98 % of them at 6 x 6 x 6). Their weights were trained so.
    """
    return remembered(_relative_index, size, window, sliced, device)


def remembered(make: Callable[..., Made], *question: object) -> Made:
    """What `make`, a function with an `lru_cache`, answers; safe under compilers and in inference mode."""
    # what is made while a compiler looks on is not a real tensor and must not be remembered
    if torch.compiler.is_compiling():
        return make.__wrapped__(*question)  # type: ignore[attr-defined]
    # else the first prediction would leave tensors behind that training cannot use
    with torch.inference_mode(False):
        return make(*question)


@lru_cache(maxsize=64)
def _relative_index(size: Size, window: int, sliced: bool, device: torch.device) -> Tensor:
    n = prod(size)
    if sliced:
        size = (window, window, window)
    places = torch.cartesian_prod(*(torch.arange(extent) for extent in size))  # n 3
    apart = places[:, None] - places + window - 1  # n n 3
    span = 2 * window - 1
    index = (apart[..., 0] * span + apart[..., 1]) * span + apart[..., 2]
    return index[:n, :n].contiguous().to(device)


@lru_cache(maxsize=64)
def _windows(grid: Size, window: int, shifted: bool, device: torch.device) -> Windows:
    # Python's integers up to the last line: a compiler that looks on can neither sort nor count a tensor
    total = prod(grid)
    groups, key = [], []
    for x, y, z in product(*(_slabs(extent, window, shifted) for extent in grid)):
        for sides in product(x.windows, y.windows, z.windows):
            key += [
                total if i < 0 or j < 0 or k < 0 else (i * grid[1] + j) * grid[2] + k
                for i, j, k in product(*sides)
            ]
        part = list(product(x.part, y.part, z.part))
        rows = [place for place, token in enumerate(key[-len(part) :]) if token < total]
        mask = None
        if len(set(part)) > 1:
            parts = torch.tensor(part)  # n 3
            apart = (parts[rows, None] != parts).any(dim=2)
            # The published mask is -100: the same weights to 1e-43, but as subnormal numbers, with which a
            # CPU's softmax takes 12 times as long.
            mask = torch.zeros(apart.shape).masked_fill(apart, -torch.inf).to(device)
        count = len(x.windows) * len(y.windows) * len(z.windows)
        groups.append(Group(count, torch.tensor(rows, device=device), mask))
    query = [token for token in key if token < total]
    answer, place = [0] * total, [0] * total
    for index, token in enumerate(query):
        answer[token] = index
    for index, token in enumerate(key):
        if token < total:
            place[token] = index
    padding = [index for index, token in enumerate(key) if token == total]
    size = (min(grid[0], window), min(grid[1], window), min(grid[2], window))
    tables = (query, answer, key, place, padding)
    on_device = (torch.tensor(table, dtype=torch.long, device=device) for table in tables)
    return Windows(size, tuple(groups), *on_device)


class _Slab(NamedTuple):
    """Windows of one axis that are cut alike."""

    windows: list[list[int]]  # in each place of each window the position on the axis, -1 for padding
    part: list[bool]  # for each place of a window, on which side of the seam it is


def _slabs(extent: int, window: int, shifted: bool) -> list[_Slab]:
    """An axis cut into windows: padded at its end to whole windows, then rolled by the shift."""
    n = min(extent, window)
    shift = window // 2 if shifted and extent > window else 0
    padded = extent + -extent % n
    rolled = [(position + shift) % padded for position in range(padded)]
    slabs: dict[tuple[bool, ...], _Slab] = {}
    for start in range(0, padded, n):
        own = [position if position < extent else -1 for position in rolled[start : start + n]]
        seam = shift > 0 and start + n == padded  # the end of the axis meets its beginning
        part = [seam and place >= n - shift for place in range(n)]
        slabs.setdefault((seam, *(position < 0 for position in own)), _Slab([], part)).windows.append(own)
    return list(slabs.values())


class _Take(torch.autograd.Function):
    """x[:, index], where `index` holds every row of x once; or its last row, padding, at each of `padding`.

    `back` says where each row went: with it the gradient is a look-up too, where torch's adds up row by row.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, index: Tensor, back: Tensor, padding: Tensor | None) -> Tensor:
        ctx.back, ctx.padding = back, padding  # type: ignore[attr-defined]
        return x.index_select(1, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        back, padding = ctx.back, ctx.padding  # type: ignore[attr-defined]
        rows = gradient.index_select(1, back)
        if padding is not None:
            rows = torch.cat((rows, gradient.index_select(1, padding).sum(1, keepdim=True)), dim=1)
        return rows, None, None, None


def attend(qkv: Tensor, padding: Tensor, bias: Tensor, layout: Windows) -> Tensor:
    """Attention within windows.

    qkv: (b, n, 3, h, d), the tokens; padding: (3, h, d), what stands where a window has no token;
    bias: (h, m, m), added to the scores of a window's m places. Returns (b, n, h, d).
    """
    b, _, _, h, d = qkv.shape
    q = _Take.apply(qkv[:, :, 0], layout.query, layout.answer, None)
    kv = torch.cat((qkv[:, :, 1:], padding[1:].to(qkv.dtype).expand(b, 1, 2, h, d)), dim=1)
    kv = _Take.apply(kv, layout.key, layout.place, layout.padding)
    n = prod(layout.size)
    queries = q.split([group.windows * len(group.rows) for group in layout.groups], dim=1)
    keys = kv.split([group.windows * n for group in layout.groups], dim=1)
    answers = []
    for group, own, other in zip(layout.groups, queries, keys, strict=True):
        m = len(group.rows)
        own = own.reshape(b * group.windows, m, h, d).transpose(1, 2)  # b*w h m d
        k, v = other.reshape(b * group.windows, n, 2, h, d).permute(2, 0, 3, 1, 4)  # b*w h n d
        scores = bias if m == n else bias.index_select(1, group.rows)
        scores = scores if group.mask is None else scores + group.mask  # h m n
        answers.append(_attention(own, k, v, scores).transpose(1, 2).reshape(b, -1, h, d))
    return _Take.apply(torch.cat(answers, dim=1), layout.answer, layout.query, None)


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d) + bias) v for q (w, h, m, d), k and v (w, h, n, d), bias (h, m, n)."""
    if q.is_cpu and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _CpuAttention.apply(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))


class _CpuAttention(torch.autograd.Function):
    """`_attention` on a CPU, with a gradient for the bias.

    torch has a fused CPU kernel, but not for a mask that wants a gradient: then it writes the scores of all
    windows to memory, several times. Here the forward pass is the fused kernel, and the backward pass
    computes the scores again, as many windows at a time as a core's cache holds: 2.5 times as fast, and no
    scores are kept.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        # what `scaled_dot_product_attention` calls; asked itself, it gives the log of the sums too
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        x, log_sums = fused(q, k, v, attn_mask=bias.detach()[None].to(q.dtype))
        ctx.save_for_backward(q, k, v, bias, x, log_sums)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, ...]:
        q, k, v, bias, x, log_sums = ctx.saved_tensors  # type: ignore[attr-defined]
        w, heads, m, d = q.shape
        n = k.shape[2]
        dtype, scale = q.dtype, d**-0.5
        # float32 under autocast too; head after head, whose bias and bias gradient then stay in the cache
        given = (q, k, v, gradient, x, log_sums[..., None])
        q, k, v, g, x, log_sums = (t.to(bias.dtype).transpose(0, 1) for t in given)  # h w m d
        # A softmax subtracts from each row of scores the log of its sum, and its gradient another number from
        # each row: one more column does it within the product. Powers of two, for `exp` of -inf takes 20
        # times as long as `exp2`.
        q1, k1 = torch.cat((q * scale, -log_sums), dim=3) * LOG2_E, F.pad(k, (0, 1), value=1.0)
        g1, v1 = torch.cat((g, -(g * x).sum(3, keepdim=True)), dim=3), F.pad(v, (0, 1), value=1.0)
        # with the long side last products are up to three times as fast as the other way round
        qt, kt, gt = ((t * by).transpose(2, 3).contiguous() for t, by in ((q, scale), (k, scale), (g, 1)))
        dq, dk, dv = torch.empty_like(qt), torch.empty_like(kt), torch.empty_like(kt)  # h w d m
        dbias = torch.zeros_like(bias)
        bias = bias.to(dtype).to(bias.dtype) * LOG2_E  # as rounded as the forward pass had it
        step = max(1, SCORES // (m * n))  # windows at a time: of one head, or all of several heads
        p_space, s_space = q.new_empty(2, step, m, n)
        for few in torch.arange(heads).split(max(1, step // w)):
            own = slice(int(few[0]), int(few[-1]) + 1)
            parts = (t[own].split(step, dim=1) for t in (q1, k1, v1, g1, qt, kt, gt, dq, dk, dv))
            for chunk in zip(*parts, strict=True):
                qc, kc, vc, gc, qtc, ktc, gtc, dqc, dkc, dvc = (t.flatten(0, 1) for t in chunk)
                p, s = p_space[: len(qc)], s_space[: len(qc)]
                torch.bmm(qc, kc.transpose(1, 2), out=p)
                p.unflatten(0, (len(few), -1)).add_(bias[own, None])
                p.exp2_()
                torch.bmm(gc, vc.transpose(1, 2), out=s)
                s *= p
                for window in s.unflatten(0, (len(few), -1)).unbind(1):
                    dbias[own] += window
                torch.bmm(ktc, s.transpose(1, 2), out=dqc)
                torch.bmm(qtc, s, out=dkc)
                torch.bmm(gtc, p, out=dvc)
        dq, dk, dv = (t.permute(1, 0, 3, 2).to(dtype) for t in (dq, dk, dv))
        return dq, dk, dv, dbias

"""The updates of all optimizers that OptimizerSwap names, in float64, from the equations of the papers.

An update is a function of weights, gradients, a state for each weight, and the number of the step,
which starts at 1. It returns the new weights. Nothing here is imported from a library of
optimizers. Where a library deviates from the paper, an argument selects its variant, and the
default is the paper.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
Update = Callable[..., Tensor]
"""(weight, gradient, state, step, **options) -> new weight"""


def average(state: State, key: str, value: Tensor, beta: float) -> Tensor:
    """Update an exponential moving average that starts at zero."""
    state[key] = beta * state.get(key, torch.zeros_like(value)) + (1 - beta) * value
    kept: Tensor = state[key]
    return kept


def rms(tensor: Tensor) -> float:
    return tensor.norm().item() / math.sqrt(tensor.numel())


def adam_direction(
    m: Tensor, v: Tensor, t: int, betas: tuple[float, float], eps: float, late_eps: bool = False
) -> Tensor:
    """Return Adam's direction; ``late_eps`` adds eps to the uncorrected root, as section 2 of Adam's paper allows."""
    correction = math.sqrt(1 - betas[1] ** t)
    root = v.sqrt() + eps if late_eps else v.sqrt() / correction + eps
    return m / (1 - betas[0] ** t) / (root / correction if late_eps else root)


def adamw(
    p: Tensor, g: Tensor, s: State, t: int, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> Tensor:
    """1711.05101, algorithm 2."""
    m, v = average(s, "m", g, betas[0]), average(s, "v", g * g, betas[1])
    return p - lr * weight_decay * p - lr * adam_direction(m, v, t, betas, eps)


def lion(
    p: Tensor, g: Tensor, s: State, t: int, *, lr: float, betas: tuple[float, float], weight_decay: float
) -> Tensor:
    """2302.06675, algorithm 2."""
    before = s.get("m", torch.zeros_like(g))
    direction = (betas[0] * before + (1 - betas[0]) * g).sign()
    average(s, "m", g, betas[1])
    return p - lr * (direction + weight_decay * p)


def adabelief(
    p: Tensor, g: Tensor, s: State, t: int, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> Tensor:
    """2010.07468, algorithm 2: eps is added to the variance itself in every step."""
    m = average(s, "m", g, betas[0])
    v = s["v"] = average(s, "v", (g - m) ** 2, betas[1]) + eps
    return p - lr * weight_decay * p - lr * adam_direction(m, v, t, betas, eps)


def without_radial_part(
    p: Tensor, g: Tensor, direction: Tensor, delta: float, wd_ratio: float, eps: float
) -> tuple[Tensor, float]:
    """2006.08217, algorithm 1: project the update if the gradient is orthogonal to the weight."""
    if p.ndim < 2:
        return direction, 1.0
    for rows in (p.shape[0], 1):
        weight, gradient, update = (x.reshape(rows, -1) for x in (p, g, direction))
        cosines = (weight * gradient).sum(1).abs() / (weight.norm(dim=1) * gradient.norm(dim=1))
        if cosines.max() < delta / math.sqrt(weight.shape[1]):
            unit = weight / (weight.norm(dim=1, keepdim=True) + eps)
            return (update - unit * (unit * update).sum(1, keepdim=True)).reshape(p.shape), wd_ratio
    return direction, 1.0


def adamp(
    p: Tensor,
    g: Tensor,
    s: State,
    t: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    delta: float,
    wd_ratio: float,
    late_eps: bool = False,
) -> Tensor:
    """2006.08217, algorithm 3, with the decay of the released code."""
    m, v = average(s, "m", g, betas[0]), average(s, "v", g * g, betas[1])
    direction = adam_direction(m, v, t, betas, eps, late_eps)
    direction, ratio = without_radial_part(p, g, direction, delta, wd_ratio, eps)
    return p - lr * weight_decay * ratio * p - lr * direction


def sgdp(
    p: Tensor,
    g: Tensor,
    s: State,
    t: int,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    delta: float,
    wd_ratio: float,
    eps: float,
) -> Tensor:
    """2006.08217, algorithm 2; the released code divides the decay by 1 - momentum."""
    s["m"] = momentum * s.get("m", torch.zeros_like(g)) + g
    direction, ratio = without_radial_part(p, g, s["m"], delta, wd_ratio, eps)
    return p - lr * weight_decay * ratio / (1 - momentum) * p - lr * direction


def diffgrad(
    p: Tensor,
    g: Tensor,
    s: State,
    t: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    late_eps: bool = False,
    inner_eps: float = 0.0,
) -> Tensor:
    """1909.11015, equations 9 to 12. ``inner_eps`` is added to the second moment."""
    m, v = average(s, "m", g, betas[0]), average(s, "v", g * g, betas[1])
    friction = torch.sigmoid((s.get("g", torch.zeros_like(g)) - g).abs())
    s["g"] = g.clone()
    direction = adam_direction(m, v + inner_eps, t, betas, eps, late_eps)
    return p - lr * weight_decay * p - lr * friction * direction


def spam(
    p: Tensor,
    g: Tensor,
    s: State,
    t: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    threshold: float,
    interval: int,
    warmup: int,
    quiet: int,
    late_eps: bool = False,
) -> Tensor:
    """2501.06842, algorithm 1, and its released code.

    Moments start again every ``interval`` steps, followed by a cosine warmup; a gradient is clipped
    if its square exceeds threshold * v, except in the first ``quiet`` steps after that.
    """
    since = t % interval
    if since == 0:
        s.pop("m"), s.pop("v")
    if "v" in s and t >= quiet and since >= quiet:
        g = torch.where(g * g > threshold * s["v"], g.sign() * (threshold * s["v"]).sqrt(), g)
    m, v = average(s, "m", g, betas[0]), average(s, "v", g * g, betas[1])
    scale = 1.0
    if t >= interval and since < warmup:
        scale = 1 - 0.99 * (1 + math.cos(math.pi * (since + 1) / (warmup + 1))) / 2
    p = p - lr * scale * adam_direction(m, v, t, betas, eps, late_eps)
    return p - lr * weight_decay * p


def adafactor(
    p: Tensor,
    g: Tensor,
    s: State,
    t: int,
    *,
    lr: float,
    weight_decay: float,
    beta2_decay: float,
    eps: tuple[float, float],
    d: float,
) -> Tensor:
    """1804.04235, algorithms 4 to 6, with lr in place of the 0.01 of its rate min(0.01, 1 / sqrt(t))."""
    beta = 1 - t**beta2_decay
    rate = min(lr, 1 / math.sqrt(t)) * max(eps[1], rms(p))
    squares = g * g + eps[0]
    if p.ndim > 1:
        rows, columns = average(s, "r", squares.mean(1), beta), average(s, "c", squares.mean(0), beta)
        update = g / (torch.outer(rows, columns) / rows.mean()).sqrt()
    else:
        update = g / average(s, "v", squares, beta).sqrt()
    return p - lr * weight_decay * p - rate * update / max(1, rms(update) / d)


def came(
    p: Tensor,
    g: Tensor,
    s: State,
    t: int,
    *,
    lr: float,
    betas: tuple[float, float, float],
    eps1: float,
    eps2: float,
    d: float,
    weight_decay: float,
) -> Tensor:
    """2307.02047, algorithm 2, with decoupled decay."""

    def scaled(x: Tensor, key: str, squares: Tensor, beta: float) -> Tensor:
        rows, columns = average(s, f"{key}r", squares.mean(1), beta), average(s, f"{key}c", squares.mean(0), beta)
        return x / torch.outer(rows / rows.mean(), columns).sqrt()

    squares = g * g + eps1
    update = scaled(g, "v", squares, betas[1]) if p.ndim > 1 else g / average(s, "v", squares, betas[1]).sqrt()
    update = update / max(1, rms(update) / d)
    m = average(s, "m", update, betas[0])
    direction = scaled(m, "u", (update - m) ** 2 + eps2, betas[2]) if p.ndim > 1 else m
    return p - lr * weight_decay * p - lr * direction


def soap(
    p: Tensor,
    g: Tensor,
    s: State,
    t: int,
    *,
    lr: float,
    betas: tuple[float, float],
    shampoo_beta: float,
    eps: float,
    weight_decay: float,
    frequency: int,
    sort: bool = False,
    qr_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """2409.11321, algorithms 3 and 4, with the released code's start.

    The first step only finds the eigenvectors. ``sort`` orders them by their eigenvalues before
    each QR decomposition, as the released code does.
    """
    is_matrix = p.ndim > 1
    if t == 1:
        if is_matrix:
            s["L"], s["R"] = (1 - shampoo_beta) * g @ g.T, (1 - shampoo_beta) * g.T @ g
            s["QL"], s["QR"] = (torch.linalg.eigh(s[side]).eigenvectors.flip(1) for side in "LR")
        return p
    t -= 1
    forward = (lambda x: s["QL"].T @ x @ s["QR"]) if is_matrix else (lambda x: x)
    back = (lambda x: s["QL"] @ x @ s["QR"].T) if is_matrix else (lambda x: x)
    m, v = average(s, "m", g, betas[0]), average(s, "v", forward(g) ** 2, betas[1])
    corrected = m / (1 - betas[0] ** t)
    p = p - lr * back(forward(corrected) / (v.sqrt() + eps)) * math.sqrt(1 - betas[1] ** t)
    p = p - lr * weight_decay * p
    if is_matrix:
        average(s, "L", g @ g.T, shampoo_beta), average(s, "R", g.T @ g, shampoo_beta)
        if t % frequency == 0:
            for dim, side in enumerate("LR"):
                power, basis = s[side] @ s[f"Q{side}"], s[f"Q{side}"]
                order = (basis * power).sum(0).argsort(descending=True) if sort else torch.arange(len(power))
                s["v"] = s["v"].index_select(dim, order)
                s[f"Q{side}"] = torch.linalg.qr(power[:, order].to(qr_dtype)).Q.to(power.dtype)
    return p


def newton_schulz(matrix: Tensor, steps: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    """Keller Jordan's iteration, which moves all singular values close to 1."""
    x = matrix.to(dtype)
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


def muon(
    p: Tensor,
    g: Tensor,
    s: State,
    t: int,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    match_rms: bool,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Keller Jordan's post, with Nesterov momentum; 2502.16982, equation 4, for ``match_rms``."""
    m = average(s, "m", g, momentum)
    direction = newton_schulz((1 - momentum) * g + momentum * m, dtype=dtype)
    rows, columns = p.shape
    scale = 0.2 * math.sqrt(max(rows, columns)) if match_rms else math.sqrt(max(1, rows / columns))
    return p - lr * weight_decay * p - lr * scale * direction


def schedulefree(
    p: Tensor,
    g: Tensor,
    s: State,
    t: int,
    *,
    lr: float,
    beta: float,
    weight_decay: float,
    warmup: int,
    beta2: float | None = None,
    eps: float = 0.0,
) -> Tensor:
    """2405.15682, algorithm 1 and its SGD: weights are y, and ``s["x"]`` holds the average."""
    z, x = s.get("z", p), s.get("x", p)
    rate = lr * min(1, t / warmup)
    if beta2 is not None:
        g = g / ((average(s, "v", g * g, beta2) / (1 - beta2**t)).sqrt() + eps)
    s["z"] = z - rate * (g + weight_decay * p)
    s["rate"] = max(s.get("rate", 0.0), rate)
    s["sum"] = s.get("sum", 0.0) + s["rate"] ** 2
    share = s["rate"] ** 2 / s["sum"]
    s["x"] = (1 - share) * x + share * s["z"]
    averaged: Tensor = (1 - beta) * s["z"] + beta * s["x"]
    return averaged


def adahessian(
    p: Tensor, g: Tensor, s: State, t: int, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> Tensor:
    """2006.00719, algorithm 1, with ``s["hessian"]`` as the estimate of the diagonal."""
    m, v = average(s, "m", g, betas[0]), average(s, "v", s["hessian"] ** 2, betas[1])
    return p - lr * weight_decay * p - lr * adam_direction(m, v, t, betas, eps)


def sophia(
    p: Tensor,
    g: Tensor,
    s: State,
    t: int,
    *,
    lr: float,
    betas: tuple[float, float],
    gamma: float,
    eps: float,
    weight_decay: float,
    period: int,
) -> Tensor:
    """2305.14342, algorithm 3: the update is clip(m / max(gamma h, eps), 1)."""
    m = average(s, "m", g, betas[0])
    if (t - 1) % period == 0:
        average(s, "h", s["hessian"], betas[1])
    return p - lr * weight_decay * p - lr * (m / (gamma * s["h"]).clamp(min=eps)).clamp(-1, 1)


def prodigy(
    weights: list[Tensor],
    gradients: list[Tensor],
    states: list[State],
    t: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    d0: float,
    d_coef: float = 1.0,
    new_distance: bool = False,
    sum_dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """2306.06101, algorithm 4, for all weights together, with the decay and d_coef of the released code.

    The paper multiplies both sums of the distance by 1 - sqrt(beta2), which cancels, as does d0
    here. ``new_distance`` multiplies eps by the new distance, as the released code does; the sums
    are kept in ``sum_dtype``.
    """
    shared, root = states[0], math.sqrt(betas[1])
    d = shared.get("d", d0)
    numerator = root * shared.get("r", torch.zeros(1, dtype=sum_dtype))
    denominator = torch.zeros(1, dtype=sum_dtype)
    for p, g, s in zip(weights, gradients, states, strict=True):
        s.setdefault("start", p)
        average(s, "m", d * g, betas[0]), average(s, "v", d * d * g * g, betas[1])
        s["s"] = root * s.get("s", torch.zeros_like(p)) + lr * d * d / d0 * g
        numerator.add_(torch.dot(g.flatten(), (s["start"] - p).flatten()), alpha=d / d0 * lr * d)
        denominator += s["s"].abs().sum()
    shared["r"], shared["d"] = numerator, max(d, float(d_coef * numerator / denominator))
    in_eps = shared["d"] if new_distance else d
    return [
        p - lr * d * weight_decay * p - lr * d * s["m"] / (s["v"].sqrt() + in_eps * eps)
        for p, s in zip(weights, states, strict=True)
    ]


def each(update: Update) -> Callable[..., list[Tensor]]:
    """Return an update of a list of weights from one of a single weight."""

    def updated(weights: list[Tensor], gradients: list[Tensor], states: list[State], t: int) -> list[Tensor]:
        return [update(p, g, s, t) for p, g, s in zip(weights, gradients, states, strict=True)]

    return updated

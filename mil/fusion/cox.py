"""Ridge Cox regression (Cox 1972, ties after Breslow 1974), fast for many more columns than patients.

    loss(b) = -1/n Σ_{i: event} [ x_i b - log Σ_{j: t_j >= t_i} exp(x_j b) ] + λ/2 |b|²

In: a matrix and (time, event). Out: coefficients. Newton's method with step halving on the exact Hessian. It works on
any matrix; `linear.py` first turns a wide one, (n, p) with p > n, into (n, r) with r <= n without loss. Plain NumPy, no
random number; knows no task and no file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STEPS = 100
ROUNDING = 1e-14  # of the loss: a step that is worse by no more is no worse
TOLERANCE = 1e-11  # largest entry of the gradient, whose terms are of the order of 1


@dataclass(frozen=True)
class RiskSets:
    """Who is at risk at each distinct time of an event. order: int (n,), patients by falling time. last: int (E,), how
    many of them are still at risk; deaths: float (E,), events at that time. event: float (n,)."""

    order: np.ndarray
    last: np.ndarray
    deaths: np.ndarray
    event: np.ndarray

    @staticmethod
    def of(time: np.ndarray, event: np.ndarray) -> RiskSets:
        """time, event (1 seen, 0 censored): (n,)."""
        order = np.argsort(-time, kind="stable")
        falling = -time[order]
        stops, deaths = np.unique(-time[event > 0], return_counts=True)
        last = np.searchsorted(falling, stops, side="right")
        return RiskSets(order, last, deaths.astype(np.float64), event.astype(np.float64))


def likelihood(eta: np.ndarray, sets: RiskSets) -> float:
    """Breslow's log partial likelihood of log risks eta (n,), summed over the events."""
    return float(sets.event @ eta - sets.deaths @ _log_sums(eta, sets))


def fit(z: np.ndarray, time: np.ndarray, event: np.ndarray, penalty: float, start: np.ndarray | None = None) -> (
    np.ndarray
):  # fmt: skip
    """Coefficients float64 (r,) that minimise the loss above. z: float64 (n, r). start: where to begin, (r,)."""
    sets = RiskSets.of(time, event)
    b = np.zeros(z.shape[1]) if start is None else start.copy()
    value = _loss(z @ b, b, sets, penalty)
    for _ in range(STEPS):
        gradient, hessian = _derivatives(z, b, sets, penalty)
        if np.abs(gradient).max(initial=0.0) < TOLERANCE:
            break
        step = np.linalg.solve(hessian, gradient)
        size, room = 1.0, ROUNDING * (1.0 + abs(value))
        while (moved := _loss(z @ (b - size * step), b - size * step, sets, penalty)) > value + room and size > 1e-10:
            size /= 2
        if size <= 1e-10:  # the loss is flat to the last digit: as near as float64 tells
            break
        b, value = b - size * step, moved
    return b


def _loss(eta: np.ndarray, b: np.ndarray, sets: RiskSets, penalty: float) -> float:
    return -likelihood(eta, sets) / len(eta) + 0.5 * penalty * float(b @ b)


def _log_sums(eta: np.ndarray, sets: RiskSets) -> np.ndarray:
    """log Σ exp(eta) over each risk set, (E,)."""
    sums: np.ndarray = np.logaddexp.accumulate(eta[sets.order])[sets.last - 1]
    return sums


def _derivatives(z: np.ndarray, b: np.ndarray, sets: RiskSets, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Gradient (r,) and Hessian (r, r) of the loss.

    With p_ej = exp(eta_j) / Σ_{risk set e} exp(eta) and d_e deaths: gradient of the likelihood z'(event - Σ_e d_e p_e),
    minus its Hessian z'[diag(Σ_e d_e p_e) - Σ_e d_e p_e p_e']z."""
    n, r = z.shape
    eta = z @ b
    ordered = z[sets.order]
    # running sums over the patients by falling time: nothing of the size (events, patients) is made
    share = np.exp(eta[sets.order] - eta.max(initial=-np.inf))
    total = np.maximum(np.cumsum(share)[sets.last - 1], np.finfo(np.float64).tiny)  # (E,)
    means = np.cumsum(share[:, None] * ordered, axis=0)[sets.last - 1] / total[:, None]  # (E, r)
    later = np.cumsum((sets.deaths / total)[::-1])[::-1]
    reached = np.append(later, 0.0)[np.searchsorted(sets.last, np.arange(n), side="right")]
    expected = np.empty(n)
    expected[sets.order] = share * reached
    gradient = -z.T @ (sets.event - expected) / n + penalty * b
    hessian = (z.T * expected) @ z - (means.T * sets.deaths) @ means
    return gradient, hessian / n + penalty * np.eye(r)

"""LAMB restated from the pseudo-code of You et al. 2020 (algorithm 2) in numpy and fp64.

phi is the identity, as in the paper's experiments. The bounds of the ratio are those of DeepSpeed's
FusedLamb, and the normalisation NVLAMB's. It shares nothing with the package, so that a mistake
would have to be made twice.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["PaperLamb"]

Array = npt.NDArray[np.float64]


@dataclass
class PaperLamb:
    """Some parameters (the "layers" of the paper) and their moments; `step` moves them."""

    x: list[Array]
    eta: float
    beta_1: float
    beta_2: float
    epsilon: float
    weight_decay: list[float]  # lambda, by parameter
    adapt: list[bool]
    lowest_ratio: float = 0.0
    highest_ratio: float = np.inf
    normalize: bool = False
    t: int = 0
    m: list[Array] = field(default_factory=list)
    v: list[Array] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    """Of the weights before the last step; `moved` is what it subtracted from them."""
    moved: list[Array] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)
    """Largest number that went into a parameter's moments in the last step."""
    cancellation: list[float] = field(default_factory=list)
    """How much larger the parts of a direction are than their sum; 1 where they do not cancel."""

    def step(self, gradients: list[Array]) -> None:
        if not self.m:
            self.m = [np.zeros_like(x) for x in self.x]
            self.v = [np.zeros_like(x) for x in self.x]
        self.t += 1
        if self.normalize:
            whole = np.sqrt(sum(float((g * g).sum()) for g in gradients))
            gradients = [g / whole if whole > 0 else g for g in gradients]
        self.ratios, self.norms, self.moved = [], [], []
        self.cancellation, self.largest = [], []
        for i, g in enumerate(gradients):
            self.largest.append(float(max(np.abs(self.m[i]).max(), np.abs(g).max())))
            mass = self.beta_1 * np.abs(self.m[i]) + (1 - self.beta_1) * np.abs(g)
            self.m[i] = self.beta_1 * self.m[i] + (1 - self.beta_1) * g
            self.v[i] = self.beta_2 * self.v[i] + (1 - self.beta_2) * g**2
            m_hat = self.m[i] / (1 - self.beta_1**self.t)
            v_hat = self.v[i] / (1 - self.beta_2**self.t)
            r = m_hat / (np.sqrt(v_hat) + self.epsilon)
            direction = r + self.weight_decay[i] * self.x[i]
            ratio = 1.0
            if self.adapt[i]:
                norm_x = np.linalg.norm(self.x[i].ravel())
                norm_direction = np.linalg.norm(direction.ravel())
                if norm_x > 0 and norm_direction > 0:
                    ratio = float(norm_x / norm_direction)
                    ratio = min(max(ratio, self.lowest_ratio), self.highest_ratio)
            self.ratios.append(ratio)
            uncancelled = mass / (1 - self.beta_1**self.t) / (np.sqrt(v_hat) + self.epsilon)
            parts = np.linalg.norm(uncancelled.ravel()) + np.linalg.norm(
                self.weight_decay[i] * self.x[i].ravel()
            )
            size = np.linalg.norm(direction.ravel())
            self.cancellation.append(float(parts / size) if size > 0 else 1.0)
            self.norms.append(float(np.linalg.norm(self.x[i].ravel())))
            self.moved.append(self.eta * ratio * direction)
            self.x[i] = self.x[i] - self.moved[i]

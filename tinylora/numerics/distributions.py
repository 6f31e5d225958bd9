"""Laws of one weight: what a quantization error is an expectation over. Each is symmetric around 0 and has variance 1.

    Normal()                            w ~ N(0, 1): what NF4 assumes of pretrained weights (QLoRA §3, appendix F)
    StudentT(nu)                        a t distribution with nu ≥ 3 degrees of freedom, scaled to variance 1: heavy tails (SF4, 2405.03103)
    ScaleMixture(sigmas, probabilities) w ~ N(0, sigma²), sigma drawn anew for each weight
    Outlier(k)                          normal weights, but one in each block is ±k

A law offers what the quadrature of `optimality` needs, in closed form:

    pdf(x) = f(x)          tail(m) = P(|w| > m)          moments(z)[n] = ∫₀ᶻ wⁿ f(w) dw  for n = 0, 1, 2

Scales cancel: blockwise absmax codes w/max|w|, so a law of another variance σ² gives the same usage, and errors σᵖ as large.
"""

from dataclasses import dataclass
from math import exp, lgamma, pi, sqrt

import numpy as np


@dataclass(frozen=True)
class Normal:
    """f(w) = exp(−w²/2) / √(2π)."""

    def pdf(self, x):
        """f(x)."""
        return np.exp(-0.5 * np.square(x)) / sqrt(2 * pi)

    def tail(self, m):
        """P(|w| > m) = erfc(m/√2)."""
        from scipy.special import erfc

        return erfc(np.asarray(m) / sqrt(2))

    def moments(self, z):
        """(3, …): ∫₀ᶻ f = Φ(z) − ½,  ∫₀ᶻ w f = φ(0) − φ(z),  ∫₀ᶻ w² f = Φ(z) − ½ − z φ(z)."""
        from scipy.special import erf

        z = np.asarray(z, np.float64)
        mass, density = 0.5 * erf(z / sqrt(2)), self.pdf(z)
        return np.stack([mass, -np.expm1(-0.5 * z * z) / sqrt(2 * pi), mass - _finite(z) * density])


@dataclass(frozen=True)
class StudentT:
    """w = T·√((ν−2)/ν) with T ~ t_ν, so that the variance is 1."""

    nu: float = 5

    def __post_init__(self):
        if not 3 <= self.nu < np.inf:
            raise ValueError(
                f"StudentT: nu = {self.nu}, expected a finite number, 3 or more (below, the tails outreach the quadrature)"
            )

    @property
    def _scale(self):
        return sqrt((self.nu - 2) / self.nu)

    def pdf(self, x):
        """f(x) = c (1 + t²/ν)^(−(ν+1)/2) / s with t = x/s."""
        nu, s = self.nu, self._scale
        return self._constant() * (1 + np.square(np.asarray(x) / s) / nu) ** (-(nu + 1) / 2) / s

    def _constant(self):
        return exp(lgamma((self.nu + 1) / 2) - lgamma(self.nu / 2)) / sqrt(self.nu * pi)

    def tail(self, m):
        """P(|w| > m)."""
        from scipy.special import stdtr

        return 2 * stdtr(self.nu, -np.asarray(m) / self._scale)

    def moments(self, z):
        """(3, …): by F_ν, by (1 + t²/ν)^(−(ν−1)/2), and by F_ν and F_{ν−2}, since t² f_ν = ν[(ν−1)/(ν−2)·f_{ν−2} − f_ν]."""
        from scipy.special import stdtr

        nu, s = self.nu, self._scale
        t = np.asarray(z, np.float64) / s
        first = self._constant() * nu / (nu - 1) * (1 - (1 + t * t / nu) ** (-(nu - 1) / 2))
        mass, inner = stdtr(nu, t) - 0.5, stdtr(nu - 2, t * s) - 0.5
        return np.stack([mass, s * first, s * s * nu * ((nu - 1) / (nu - 2) * inner - mass)])


@dataclass(frozen=True)
class ScaleMixture:
    """f(w) = Σ_i p_i φ(w/σ_i)/σ_i, rescaled so that Σ p_i σ_i² = 1."""

    sigmas: tuple
    probabilities: tuple

    def __post_init__(self):
        s, p = np.asarray(self.sigmas, np.float64), np.asarray(self.probabilities, np.float64)
        if (
            s.ndim != 1
            or s.shape != p.shape
            or len(s) == 0
            or not ((s > 0) & (s < np.inf) & (p >= 0)).all()
            or not 0 < p.sum() < np.inf
        ):
            raise ValueError(
                "ScaleMixture: expected as many probabilities (0 or more) as sigmas (above 0), one at least"
            )
        p = p / p.sum()
        s = s / sqrt(float(p @ (s * s)))
        object.__setattr__(self, "sigmas", tuple(s.tolist()))
        object.__setattr__(self, "probabilities", tuple(p.tolist()))

    @classmethod
    def lognormal(cls, tau, nodes=40):
        """sigma = exp(tau·g), g ~ N(0, 1), by Gauss–Hermite nodes."""
        g, p = np.polynomial.hermite_e.hermegauss(nodes)
        return cls(tuple(np.exp(tau * g).tolist()), tuple(p.tolist()))

    def pdf(self, x):
        """f(x)."""
        return sum(
            p * Normal().pdf(np.asarray(x) / s) / s for s, p in zip(self.sigmas, self.probabilities, strict=True)
        )

    def tail(self, m):
        """P(|w| > m)."""
        return sum(p * Normal().tail(np.asarray(m) / s) for s, p in zip(self.sigmas, self.probabilities, strict=True))

    def moments(self, z):
        """(3, …): Σ p σⁿ ∫₀^{z/σ} wⁿ φ."""
        z, total = np.asarray(z, np.float64), 0.0
        for s, p in zip(self.sigmas, self.probabilities, strict=True):
            powers = np.array([1.0, s, s * s]).reshape(3, *[1] * z.ndim)
            total = total + p * powers * Normal().moments(z / s)
        return total


@dataclass(frozen=True)
class Outlier(Normal):
    """Normal weights of variance 1, of which one in each block is replaced by +k or −k, each with chance ½."""

    k: float = 6.0

    def __post_init__(self):
        if not 0 < self.k < np.inf:
            raise ValueError(f"Outlier: k = {self.k}, expected a finite number above 0")


def _finite(z):
    """z with ±∞ replaced by 0, where it is multiplied by a density that is 0 there."""
    return np.where(np.isinf(z), 0.0, z)

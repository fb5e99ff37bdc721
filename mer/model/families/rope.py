"""Rotary embedding from config.json: `rope_parameters`, or as before `rope_theta` and `rope_scaling`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mer.model.families.config import Config
from mer.model.spec import RopeScaling, RopeSpec

Array = NDArray[np.float64]
_MAX_HEAD = 1 << 16
_TYPES = ("default", "linear", "dynamic", "llama3", "proportional", "longrope", "yarn")


def plain_frequencies(theta: float, dim: int, pairs: int) -> NDArray[np.float32]:
    """f32 [pairs]: theta ** (-2 i / dim), without any scaling.

    Exponent and power are rounded to f32 first, as where the models were trained: far out it shows.
    """
    exponents = (np.arange(0, 2 * pairs, 2, dtype=np.float32) / np.float32(dim)).astype(np.float64)
    powers = (theta**exponents).astype(np.float32)
    return np.float32(1.0) / powers


class Rope:
    """The rotary parameters of a model."""

    def __init__(
        self,
        config: Config,
        *,
        default_theta: float = 10000.0,
        default: Mapping[str, Any] | None = None,
        default_partial: float = 1.0,
        kind: str | None = None,
    ) -> None:
        """default: what holds where the file has no rotary parameters at all.

        kind: of layers of this kind, where rope_parameters has an object for each.
        default_partial: what the family takes for partial_rotary_factor where the file does not say.
        """
        found = config.get("rope_parameters") or config.get("rope_scaling") or dict(default or {})
        if isinstance(found, dict) and kind is not None and kind in found:
            found = found[kind]
        if not isinstance(found, dict):
            raise config.wrong(f"rope_parameters is {found!r}, it must be an object")
        self._config = config
        self._values: dict[str, Any] = {k: v for k, v in found.items() if v is not None}
        self.type = str(self._values.get("rope_type") or self._values.get("type") or "default")
        theta = self._values.get("rope_theta", config.get("rope_theta"))
        self.theta = config.as_number("rope_theta", default_theta if theta is None else theta)
        if any(isinstance(value, dict) for value in self._values.values()):
            raise config.unsupported("rope_parameters differ by layer type, which is not supported")
        partial = self._values.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        self._partial = config.as_number(
            "partial_rotary_factor", default_partial if partial is None else partial
        )
        if self._partial > 1:
            raise config.wrong(f"partial_rotary_factor is {self._partial:g}, it can't be more than 1")
        if self.type not in _TYPES:
            raise config.unsupported(f"rope_type is {self.type!r}; {', '.join(_TYPES)} are supported")
        self._positions = config.integer("max_position_embeddings", default=4096)
        self._original = self._positions
        if "original_max_position_embeddings" in self._values:
            self._original = int(self._number("original_max_position_embeddings"))
        elif self.type == "longrope":
            self._original = config.integer("original_max_position_embeddings", default=self._positions)

    def _number(self, key: str, default: float | None = None) -> float:
        value = self._values.get(key, default)
        if value is None:
            raise self._config.wrong(f"rope_parameters.{key} is missing, rope_type {self.type} needs it")
        return self._config.as_number(f"rope_parameters.{key}", value)

    @property
    def max_positions(self) -> int:
        """Longest sequence. With YaRN's factor, as far as it stretches the original context.

        With llama_4_scaling_beta queries grow from the end of the original context on: it ends there.
        """
        if self._values.get("llama_4_scaling_beta"):
            return self._original
        if self.type == "yarn":
            return max(self._positions, int(self._original * self._yarn_factor()))
        return self._positions

    @property
    def score_factor(self) -> float:
        """What DeepSeek multiplies attention scores by, besides cos and sin."""
        if self.type == "default" or not self._values.get("mscale_all_dim"):
            return 1.0
        return _mscale(self._number("factor"), self._number("mscale_all_dim")) ** 2

    def spec(self, dim: int, *, interleaved: bool = False, partial: bool = False) -> RopeSpec:
        """Frequencies for a head of `dim` elements.

        partial: the family turns only the first partial_rotary_factor * dim elements; in others such a
        factor raises UnsupportedModelError.
        """
        if dim > _MAX_HEAD:
            raise self._config.wrong(f"a head has {dim:,} elements, {_MAX_HEAD:,} is the most")
        if self.type == "proportional":
            return self._proportional(dim, interleaved)
        if partial:
            # 1e-6: a factor that was made of two whole numbers gives the first of them back.
            dim = int(dim * self._partial + 1e-6)
        elif self._partial != 1:
            raise self._config.unsupported(
                f"partial_rotary_factor is {self._partial:g}, only 1 is supported in this family"
            )
        if dim % 2 or dim == 0:
            raise self._config.wrong(f"rotary embedding turns pairs, so {dim} elements of a head can't turn")
        theta = self.theta
        if self.type == "dynamic" and "alpha" in self._values and dim > 2:  # Hunyuan: stretched for good
            theta *= self._number("alpha") ** (dim / (dim - 2))
        frequencies = plain_frequencies(theta, dim, dim // 2).astype(np.float64)
        scale = 1.0
        scaling: RopeScaling | None = None
        if self.type == "linear":
            scaling = RopeScaling("linear", self._number("factor"), self._original)
            frequencies = frequencies / scaling.factor
        elif self.type == "llama3":
            scaling = RopeScaling("llama3", self._number("factor"), self._original)
            frequencies = self._llama3(frequencies)
        elif self.type == "yarn":
            fast, slow = self._number("beta_fast", 32.0), self._number("beta_slow", 1.0)
            grows = self._values.get("llama_4_scaling_beta") or 0.0
            scaling = RopeScaling("yarn", self._yarn_factor(), self._original, fast, slow, grows)
            frequencies, scale = self._yarn(frequencies, dim, scaling)
        elif self.type == "longrope":
            return self._longrope(frequencies, interleaved)
        elif "frequency_factors" in self._values:
            scaling = RopeScaling("factors", 1.0, self._original)
            frequencies = frequencies / self._factors("frequency_factors", dim)
        # `dynamic` changes nothing up to max_position_embeddings, and further a sequence may not go.
        inv_freq = tuple(frequencies.astype(np.float32).tolist())
        return RopeSpec(inv_freq, scale, interleaved, theta, scaling)

    def _factors(self, key: str, dim: int) -> Array:
        """What each frequency is divided by."""
        found = self._values.get(key)
        if not isinstance(found, list) or len(found) != dim // 2:
            raise self._config.wrong(f"rope_parameters.{key} must have a number for each of {dim // 2} pairs")
        return np.array(
            [self._config.as_number(f"a number of {key}", factor) for factor in found], np.float64
        )

    def _longrope(self, frequencies: Array, interleaved: bool) -> RopeSpec:
        """Frequencies for sequences up to the original context, and in `long` those for longer ones."""
        factor = self._number("factor", self._positions / self._original)
        if self._original < 2:
            raise self._config.wrong("original_max_position_embeddings is 1, with LongRoPE it must be more")
        usual = math.sqrt(1 + math.log(factor) / math.log(self._original)) if factor > 1 else 1.0
        usual = self._number("attention_factor", usual)
        scaling = RopeScaling("longrope", factor, self._original)

        def spec(kind: str, long: RopeSpec | None) -> RopeSpec:
            divided = frequencies / self._factors(f"{kind}_factor", 2 * len(frequencies))
            inv_freq = tuple(divided.astype(np.float32).tolist())
            scale = self._number(f"{kind}_mscale", usual)
            return RopeSpec(inv_freq, scale, interleaved, self.theta, scaling, long)

        return spec("short", spec("long", None))

    def _proportional(self, dim: int, interleaved: bool) -> RopeSpec:
        """Pairs span the whole head, the last of them do not turn."""
        turning = int(self._partial * dim // 2)
        frequencies = np.zeros(dim // 2, np.float32)
        turned = plain_frequencies(self.theta, dim, turning)
        frequencies[:turning] = turned / np.float32(self._number("factor", 1.0))
        return RopeSpec(tuple(frequencies.tolist()), 1.0, interleaved, self.theta)

    def _llama3(self, frequencies: Array) -> Array:
        factor = self._number("factor")
        low, high = self._number("low_freq_factor"), self._number("high_freq_factor")
        if low >= high:
            raise self._config.wrong("rope_parameters.low_freq_factor must be below high_freq_factor")
        # Turns that a pair makes over the original context: many stay, few are stretched, between is between.
        turns = self._original * frequencies / (2 * math.pi)
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (1 - smooth) * frequencies / factor + smooth * frequencies

    def _yarn_factor(self) -> float:
        return self._number("factor", self._positions / self._original)

    def _yarn(self, frequencies: Array, dim: int, scaling: RopeScaling) -> tuple[Array, float]:
        factor = scaling.factor
        if self.theta <= 1:
            raise self._config.wrong(f"rope_theta is {self.theta:g}, with YaRN it must be more than 1")

        def pair_that_turns(times: float) -> float:
            return dim * math.log(self._original / (times * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
        if self._values.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001
        stretched = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies / factor * stretched + frequencies * (1 - stretched)
        if "attention_factor" in self._values:
            return frequencies, self._number("attention_factor")
        mscale, all_dim = self._values.get("mscale"), self._values.get("mscale_all_dim")
        if mscale and all_dim:
            whole = _mscale(factor, self._number("mscale_all_dim"))
            return frequencies, _mscale(factor, self._number("mscale")) / whole
        return frequencies, _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

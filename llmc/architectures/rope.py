"""Rotary frequencies: a configuration's rope keys in either spelling, and the scalings of the frequencies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.architectures.settings import ConfigurationError, Settings, convert
from llmc.ir.errors import nearest

DEFAULT_THETA = 10000.0
MAX_ROTARY_DIM = 1 << 16

_LISTS = ("short_factor", "long_factor")
_POSITIVE = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "attention_factor")

Frequencies = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RopeType:
    """What a `rope_type` means: the scaling rule, and the keys that it needs and may have."""

    scaling: str
    needs: tuple[str, ...]
    may: tuple[str, ...]


@dataclass(frozen=True)
class RopeParameters:
    """The rope keys of one configuration. `values` holds the numbers of the scaling rule that are set, `lists` those
    that are given for each frequency."""

    scaling: str
    theta: float
    partial_rotary_factor: float
    max_positions: int
    values: Mapping[str, float]
    lists: Mapping[str, tuple[float, ...]]
    where: str

    @property
    def original_max_positions(self) -> float:
        """The context length in training: `original_max_position_embeddings`, else the configuration's own."""
        return self.values.get("original_max_position_embeddings", float(self.max_positions))


def read_rope(settings: Settings, types: Mapping[str, RopeType], max_positions: int) -> RopeParameters:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4)."""
    given, where = _spelling(settings)
    name = given.pop("rope_type", None)
    older = given.pop("type", None)
    if name is not None and older is not None and name != older:
        raise ConfigurationError(f"{where}: rope_type is {name!r} and type is {older!r}")
    name = name if name is not None else older if older is not None else "default"
    if not isinstance(name, str) or name not in types:
        raise ConfigurationError(f"{where}: the rope type {name!r} is not supported; {nearest(str(name), types)}")
    kind = types[name]
    theta = _inside_or_beside(settings, given, "rope_theta", where)
    # transformers reads the table first, and has written a family's default beside it (Phi's in 5.17)
    partial = _inside_or_beside(settings, given, "partial_rotary_factor", where, may_differ=True)
    outer = settings.take("original_max_position_embeddings")
    if outer is not None and "original_max_position_embeddings" in (*kind.needs, *kind.may):
        given["original_max_position_embeddings"] = outer
    for key in given:
        if key not in (*kind.needs, *kind.may):
            raise ConfigurationError(
                f"{where}: the rope type {name!r} has no key {key!r}; {nearest(key, (*kind.needs, *kind.may))}"
            )
    for key in kind.needs:
        if key not in given:
            raise ConfigurationError(f"{where}: the rope type {name!r} needs the key {key!r}")
    lists = {k: _numbers(v, f"{where}: {k}") for k, v in given.items() if k in _LISTS}
    values = {k: _number(v, f"{where}: {k}") for k, v in given.items() if k not in _LISTS}
    theta_value = DEFAULT_THETA if theta is None else convert(theta, float, f"{where}: rope_theta")
    if theta_value <= 0:
        raise ConfigurationError(f"{where}: rope_theta must be positive, given {theta_value}")
    fraction = 1.0 if partial is None else convert(partial, float, f"{where}: partial_rotary_factor")
    if not 0 < fraction <= 1:
        raise ConfigurationError(f"{where}: partial_rotary_factor must lie in (0, 1], given {fraction}")
    for key in _POSITIVE:
        if values.get(key, 1.0) <= 0:
            raise ConfigurationError(f"{where}: {key} must be positive, given {values[key]}")
    if kind.scaling == "bands" and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise ConfigurationError(f"{where}: low_freq_factor must be less than high_freq_factor")
    return RopeParameters(kind.scaling, theta_value, fraction, max_positions, values, lists, where)


def _spelling(settings: Settings) -> tuple[dict[str, Any], str]:
    """The dictionary of rope keys that is set, without nulls; both spellings at once must agree."""
    found = {key: value for key in ("rope_parameters", "rope_scaling") if (value := settings.take(key)) is not None}
    if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
        raise ConfigurationError(f"{settings.source}: rope_parameters and rope_scaling are both set and differ")
    key, value = next(iter(found.items()), ("rope_parameters", {}))
    if not isinstance(value, dict):
        raise ConfigurationError(f"{settings.source}: {key} must be a table of keys, given {value!r:.80}")
    if set(value) == {"full_attention"} and isinstance(value["full_attention"], dict):
        value = value["full_attention"]  # one entry for each kind of layer
    return {k: v for k, v in value.items() if v is not None}, f"{settings.source}, {key}"


def _inside_or_beside(settings: Settings, given: dict[str, Any], key: str, where: str, may_differ: bool = False) -> Any:
    """A key that stands inside the table or beside it; where both stand, the one inside counts."""
    inner, outer = given.pop(key, None), settings.stated(key)
    if inner is None and outer is None and key in settings:
        outer = settings.get(key)
    if not may_differ and inner is not None and outer is not None and inner != outer:
        raise ConfigurationError(f"{where}: {key} is {inner!r} here and {outer!r} beside it")
    return outer if inner is None else inner


def _number(value: Any, where: str) -> float:
    return float(value) if isinstance(value, bool) else float(convert(value, float, where))


def _numbers(value: Any, where: str) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) > MAX_ROTARY_DIM:
        raise ConfigurationError(f"{where} must be a list of numbers, one for each frequency")
    numbers = tuple(_number(v, where) for v in value)
    if any(v <= 0 for v in numbers):
        raise ConfigurationError(f"{where} must be a list of positive numbers")
    return numbers


def inverse_frequencies(rope: RopeParameters, rotary_dim: int, longest: int) -> tuple[Frequencies, float]:
    """Inverse frequencies f32 [rotary_dim / 2], and the factor on cosines and sines, for sequences of up to `longest`.

    In float32 in the order of transformers 5 (modeling_rope_utils.py), so that both agree to the last bit or nearly.
    """
    exponent = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    # The float32 power, correctly rounded: libraries differ from each other in its last bit.
    powers = np.power(np.float64(np.float32(rope.theta)), exponent.astype(np.float64)).astype(np.float32)
    inverse: Frequencies = np.float32(1.0) / powers
    match rope.scaling:
        case "linear":
            return inverse / np.float32(rope.values["factor"]), 1.0
        case "bands":
            return _bands(rope, inverse), 1.0
        case "yarn":
            return _yarn(rope, powers, rotary_dim)
        case "long":
            return _long(rope, powers, longest)
    return inverse, 1.0


def _long(rope: RopeParameters, powers: Frequencies, longest: int) -> tuple[Frequencies, float]:
    """LongRoPE (Ding et al., 2024): each frequency divided by a factor of its own, of one list within the context of
    training and of another beyond. Which list is one choice for all positions: keys of both would not go together."""
    length = rope.original_max_positions
    name = "long_factor" if longest > length else "short_factor"
    factors = np.array(rope.lists[name], np.float32)
    if factors.shape != powers.shape:
        raise ConfigurationError(f"{rope.where}: {name} must have {len(powers)} numbers, given {len(factors)}")
    scaling = rope.values.get("attention_factor")
    if scaling is None:
        factor = rope.values.get("factor", rope.max_positions / length)
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))
    return (1.0 / (factors * powers)).astype(np.float32), float(scaling)


def _bands(rope: RopeParameters, inverse: Frequencies) -> Frequencies:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    factor, low, high = (rope.values[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
    length = rope.original_max_positions
    wavelength = 2 * math.pi / inverse
    scaled = np.where(wavelength > length / low, inverse / factor, inverse)
    smooth = (length / wavelength - low) / (high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    between = ~(wavelength < length / high) & ~(wavelength > length / low)
    return np.where(between, smoothed, scaled).astype(np.float32)


def _yarn(rope: RopeParameters, powers: Frequencies, rotary_dim: int) -> tuple[Frequencies, float]:
    """YaRN (Peng et al., 2023): interpolation of slow frequencies, a ramp, extrapolation of fast ones."""
    values, length = rope.values, rope.original_max_positions
    factor = _factor(rope)
    scaling = values.get("attention_factor")
    if scaling is None:
        mscale, mscale_all = values.get("mscale", 0.0), values.get("mscale_all_dim", 0.0)
        both = bool(mscale and mscale_all)
        scaling = _magnitude(factor, mscale) / _magnitude(factor, mscale_all) if both else _magnitude(factor, 1.0)

    def dimension(rotations: float) -> float:
        """The dimension whose frequency turns that often within the original context."""
        if rotations <= 0 or rope.theta == 1.0:
            raise ConfigurationError(f"{rope.where}: beta_fast and beta_slow must be positive and rope_theta not 1")
        return rotary_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(values.get("beta_fast") or 32.0), dimension(values.get("beta_slow") or 1.0)
    if values.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    ramp = np.clip((np.arange(rotary_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    extrapolation = 1 - ramp
    slow, fast = 1.0 / (factor * powers), 1.0 / powers
    frequencies = slow * (1 - extrapolation) + fast * extrapolation
    return frequencies.astype(np.float32), float(scaling)


def score_factor(rope: RopeParameters) -> float:
    """By how much scores are multiplied where `mscale_all_dim` is meant for them (as in arXiv:2405.04434): the square
    of that magnitude; 1 where it is not set."""
    weight = rope.values.get("mscale_all_dim", 0.0)
    return _magnitude(_factor(rope), weight) ** 2 if weight else 1.0


def _factor(rope: RopeParameters) -> float:
    return rope.values.get("factor", rope.max_positions / rope.original_max_positions)


def _magnitude(scale: float, weight: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

"""One rule for all images of a source: which stored values become black and white, what is alpha.

`formats.look_at` a sample, `settle` the rule, and `formats.read` each image by it. What mode and
tags leave open is taken from the sample, and told; what that leaves open is refused.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from common.errors import UserError
from common.formats import SAY_RANGE, Kind, Look, Reading, number

DEPTHS = (8, 10, 12, 14, 16, 32)  # bits of which integers make use


def settle(looks: Sequence[Look], reading: Reading, where: str) -> tuple[Reading, list[str]]:
    """The rule by which all images of a source are read, and what there is to say of it.

    Args:
        looks: at a sample of the images.
        reading: what the user has said.
        where: the name of the source.

    Raises:
        UserError: the sample can be read in several ways, and the user has not said which.
    """
    lines = []

    def say(count: int, what: str) -> None:
        if count:
            lines.append(f"{what} in {count} of {images(len(looks))} looked at")

    odd = sum(look.alpha == "odd" for look in looks)
    if reading.alpha == "" and odd > sum(look.alpha in ("odd", "plain") for look in looks) / 2:
        raise UserError(
            f"{where}: the last channel is neither 0 nor opaque in most pixels of {odd} of "
            f"{images(len(looks))} looked at; --alpha white takes it for alpha and lays the images "
            "over white, --alpha drop leaves it out"
        )
    reading, more = settle_range(looks, reading, where)
    if reading.alpha != "drop":
        say(sum(look.hidden for look in looks), "an alpha that hides all is taken for none")
    say(sum(look.extra > 0 for look in looks), "channels that a tag calls no alpha are left out")
    say(sum(look.frames > 1 for look in looks), "the first of several frames or pages is read")
    return reading, more + lines


def settle_range(looks: Sequence[Look], reading: Reading, where: str) -> tuple[Reading, list[str]]:
    """The values that become 0 and 255: of the user, of modes and tags, or of the sample."""
    groups: dict[Kind, list[Look]] = {}
    for look in looks:
        if look.kind.deep:
            kind = replace(look.kind, deep="gray", pillow=None, white_is_zero=False, hint=0)
            groups.setdefault(kind, []).append(look)
    seen = [f"{kind} {saw(group)}" for kind, group in groups.items()]
    if reading.value_range is not None:
        for kind in groups:
            if not kind.whole and tuple(reading.value_range) != kind.own:
                raise UserError(
                    f"{where}: {kind} colour, of which Pillow reads the high bits alone; without "
                    "--value-range, or as PNG or TIFF, it can be read"
                )
        low, high = reading.value_range
        deep = [look for look in looks if look.kind.deep]
        if not reading.clip or all(low <= look.low <= look.high <= high for look in deep):
            line = f"{', '.join(seen)} looked at: read as {number(low)} to {number(high)}"
            return reading, [line] if deep else []
        given = f"--value-range {plain(low)} {plain(high)}"
        return reading, [f"{', '.join(seen)} looked at: those beyond {given} are cut off"]
    decided = {kind: range_of(kind, group, where) for kind, group in groups.items()}
    eight = sum(not look.kind.deep for look in looks)
    floats = sum(kind.sign == "float" for kind in groups)
    by_sample = {found for kind, found in decided.items() if found != kind.own}
    mixed = floats and (eight or len(groups) > floats)
    if mixed or (by_sample and len(set(decided.values())) > 1):
        also = f", 8-bit values in {images(eight)}" if eight else ""
        raise UserError(
            f"{where}: {', '.join(seen)}{also} looked at: no one rule reads them all; "
            f"{SAY_RANGE}, of all that are not 8-bit, e.g. {example(looks)}"
        )
    lines = [line for k, g in groups.items() if (line := told(k, g, decided[k]))]
    if not by_sample:
        return reading, lines
    return replace(reading, value_range=by_sample.pop(), clip=False), lines


def range_of(kind: Kind, looks: Sequence[Look], where: str) -> tuple[float, float]:
    """The stored values that become 0 and 255 by what is in the sample of one kind.

    Raises:
        UserError: they are not those of a number of bits, or of floats from 0 to 1 or 255.
    """
    low, high = min(look.low for look in looks), max(look.high for look in looks)
    if kind.own[0] <= low == high <= kind.own[1]:  # nothing is known
        return kind.own
    if kind.sign == "float":
        if low >= 0 and (high <= 1 or 16 <= high <= 255):  # up to 16, e.g. 1.02, it may be either
            return (0, 1) if high <= 1 else (0, 255)
    elif not kind.whole:
        if kind.declared or bits_of(high) > 14:
            return kind.own
        raise UserError(
            f"{where}: {kind} colour {saw(looks)} looked at, of which Pillow reads the high "
            "bits alone: few levels would be left; convert them to PNG or to 8 bits"
        )
    elif kind.declared and kind.sign == "unsigned":
        return kind.own
    elif low >= 0:
        hints = [h for look in looks if look.high <= (h := look.kind.hint) < kind.own[1]]
        bits = bits_of(max(high, *hints, 0))
        if bits < 32 or high >= 2**30:  # else few levels would be left of 32 bits
            return 0, min(2**bits - 1, kind.own[1])
    raise UserError(
        f"{where}: {kind} {saw(looks)} looked at (mode {looks[0].mode}): {SAY_RANGE}, e.g. "
        f"{example(looks)}"
    )


def told(kind: Kind, looks: Sequence[Look], found: tuple[float, float]) -> str:
    """What is to be said of a range: of which sample, and how else it could be."""
    otherwise = f"--value-range {plain(kind.own[0])} {plain(kind.own[1])} otherwise"
    saying = f"{kind} {saw(looks)} looked at"
    if kind.sign == "float":
        return f"{saying}: read as 0 to {found[1]}; {otherwise if found != kind.own else SAY_RANGE}"
    if found != kind.own:
        bits = bits_of(found[1])
        as_bits = f"{bits} bits" if found[1] == 2**bits - 1 else f"0 to {found[1]:,}"
        return f"{saying}: read as {as_bits}; {otherwise}"
    needed = sorted(bits_of(look.high) for look in looks if look.low < look.high)
    most = needed[len(needed) // 2] if needed and kind.sign == "unsigned" and kind.whole else 32
    if kind.declared or most > 12:
        return ""
    return (
        f"{saying}, though {most} bits hold most of the images: read as {kind.bits} bits; "
        f"--value-range 0 {2**most - 1} otherwise"
    )


def bits_of(value: float) -> int:
    """How many bits an integer needs, of the depths that are in use."""
    return next((bits for bits in DEPTHS if value < 2**bits), DEPTHS[-1])


def saw(looks: Sequence[Look]) -> str:
    low, high = min(look.low for look in looks), max(look.high for look in looks)
    values = (
        f"from {number(low)} to {number(high)}" if low < 0 or high % 1 else f"up to {high:,.0f}"
    )
    return f"values {values} in {images(len(looks))}"


def images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def example(looks: Sequence[Look]) -> str:
    """A flag with a range that holds all deep values of the sample."""
    deep = [look for look in looks if look.kind.deep]
    low, high = min(look.low for look in deep), max(look.high for look in deep)
    high = high if high > low else low + 1
    if low % 1 or high % 1:
        unit = 10 ** (math.floor(math.log10(high - low)) - 1)
        low, high = math.floor(low / unit) * unit, math.ceil(high / unit) * unit
    return f"--value-range {plain(low)} {plain(high)}"


def plain(value: float) -> str:
    """A number as a flag takes it."""
    return f"{value:.0f}" if value % 1 == 0 else f"{value:.4g}"

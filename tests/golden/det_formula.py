"""Arrays that the recorded outputs were made from, as functions of a name: numpy alone."""

import zlib

import numpy as np


def det(name, shape):
    """N(0, 1) in float64; numpy has frozen the stream of `RandomState`."""
    seed = zlib.crc32(name.encode()) & 0xFFFFFFFF
    return np.random.RandomState(seed).standard_normal(tuple(int(s) for s in shape))


def weight(name, shape, kind):
    """float32, in the official layout; kind: kernel, gamma, beta, bias, mean or var."""
    x = det(name, shape)
    match kind:
        case "kernel":
            y = x * np.sqrt(2.0 / int(np.prod(shape[:-1])))
        case "gamma":
            y = 1 + 0.1 * x
        case "beta" | "bias" | "mean":
            y = 0.1 * x
        case "var":
            y = 0.75 + 0.25 * x**2
        case _:
            raise ValueError(kind)
    return y.astype(np.float32)


def image(name, h, w):
    """(h, w, 3) float32 in [0, 1]: waves of three colours, with noise."""
    noise = det(name, (h, w, 3))
    y, x = np.mgrid[0:h, 0:w]
    waves = [
        0.5 + 0.4 * np.sin(0.35 * x + 0.2 * y),
        0.5 + 0.4 * np.cos(0.25 * y - 0.15 * x),
        0.5 + 0.4 * np.sin(0.1 * x + 0.45 * y + 1.0),
    ]
    return np.clip(np.stack(waves, -1) + 0.12 * noise, 0, 1).astype(np.float32)

"""The study's codecs: each against a float64 reference, what they lose against the theory, and in steps."""

from __future__ import annotations

import math
from contextlib import closing
from typing import Any

import pytest
import torch
from rounding import (
    LAPLACE,
    NORMAL,
    ROTATIONS,
    Levels,
    Part,
    Rotated,
    Vectors,
    both,
    codebook,
    codec_named,
    uniform,
)
from simulation import Replicas, Setting
from test_simulation import factor, take, tiny
from torch import Tensor

# A name, its bits on the wire, and the mean square error for normal values of variance 1: in theory, where
# there is one, of an infinite block; that of a finite one is a little less.
NAMES: list[tuple[str, float, float]] = [
    ("sign:128", 1 + 1 / 8, 1 - 2 / math.pi),
    ("sign:32", 1.5, 1 - 2 / math.pi),
    ("sign:512", 1 + 1 / 32, 1 - 2 / math.pi),
    ("sign:128:rms", 1 + 1 / 8, 2 - 2 * math.sqrt(2 / math.pi)),
    ("ternary:160", 1.7, 0.1902),
    ("ternary:1280", 1.6 + 1 / 80, 0.1902),
    ("lloyd:4:128", 2 + 1 / 8, 0.1175),
    ("lloyd:16:512", 4 + 1 / 32, 0.00950),
    ("hadamard:128>sign:128", 1 + 1 / 8, 1 - 2 / math.pi),
    ("hadamard:1024>ternary:1280", 1.6 + 1 / 80, 0.1902),
    ("part:2>sign:128", 0.5 + 1 / 16, 1 - 1 / math.pi),
    ("part:4>sign:128", 0.25 + 1 / 32, 1 - 0.5 / math.pi),
    ("top:1/8:1", 4 / 8 + 1 / 64, 0.602),
    ("top:1/64:1", 7 / 64 + 1 / 64, 0.894),
    ("top:64/4096:1", (64 * 13 + 16) / 4096, 0.882),
    ("top:64/4096:2", (64 * 14 + 32) / 4096, 0.881),
    ("dct:64>top:4/64:2", (4 * 8 + 2) / 64, 0.690),
    ("dct2:64>top:64/4096:2", (64 * 14 + 32) / 4096, 0.881),
    ("vector:8/16", 0.5 + 1 / 32, 0.584),
    ("vector:4/8", 0.5 + 1 / 32, 0.615),
]
ALL = [name for name, *_ in NAMES]
STOCHASTIC = ["stochastic:128:1", "stochastic:128:max"]


def draw(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rounded(codec: Any, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x), x.dtype)


@pytest.mark.parametrize(("name", "bits", "error"), NAMES, ids=ALL)
def test_bits_and_error_are_those_of_the_theory(name: str, bits: float, error: float) -> None:
    codec = codec_named(name)
    x = draw(-(-200_000 // codec.block) * codec.block)
    payload = codec.encode(x)
    assert payload.dtype == torch.uint8 and codec.bits_per_value == pytest.approx(bits, rel=1e-12)
    assert len(payload) * 8 == pytest.approx(bits * len(x), rel=1e-12)
    lost = (codec.decode(payload, x.dtype) - x).square().mean().item()
    # A block of 32 gains 3 %, of 128 (or 4096, of which 64 are kept) 1 %; what is drawn is off by as much.
    assert error * (0.96 if "32" in name else 0.975) < lost < error * 1.01


@pytest.mark.parametrize("shape", ["normal", "laplace"])
@pytest.mark.parametrize("count", [3, 4, 16])
def test_levels_are_the_centroids_of_what_rounds_to_them(shape: str, count: int) -> None:
    """Lloyd's condition, by summing the density."""
    table = NORMAL if shape == "normal" else LAPLACE
    if count not in table:
        pytest.skip(f"no {count} levels of a {shape} distribution are tabulated")
    x = torch.linspace(-30, 30, 2_000_001, dtype=torch.float64)
    density = (-x.square() / 2).exp() if shape == "normal" else (-math.sqrt(2) * x.abs()).exp()
    levels = torch.tensor(both(table[count]), dtype=torch.float64)
    assert len(levels) == count
    codes = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
    weight = torch.zeros(count, dtype=torch.float64).index_add_(0, codes, density)
    centroids = torch.zeros(count, dtype=torch.float64).index_add_(0, codes, density * x) / weight
    torch.testing.assert_close(centroids, levels, rtol=0, atol=3e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name", ["sign:128", "sign:32:rms", "ternary:160", "lloyd:4:128:laplace", "lloyd:16:128"]
)
def test_values_are_the_nearest_levels_of_a_fitted_scale(name: str, dtype: torch.dtype) -> None:
    codec = codec_named(name)
    assert isinstance(codec, Levels)
    x = draw(5 * codec.block).to(dtype)
    levels = torch.tensor(codec.levels, dtype=torch.float64)
    payload = codec.encode(x).view(5, -1)
    values = codec.decode(payload.view(-1), dtype).view(5, -1)
    for row, got, wide in zip(payload, values, x.double().view(5, -1), strict=True):
        fitted = wide.square().mean().sqrt()
        for _ in range(codec.fits):
            nearest = levels[(wide.unsqueeze(-1) - fitted * levels).abs().argmin(-1)]
            fitted = (wide * nearest).sum() / nearest.square().sum()
        s = row[:2].clone().view(torch.bfloat16).double()
        torch.testing.assert_close(s[0], fitted, rtol=2**-8, atol=0)
        places = (wide.unsqueeze(-1) - s * levels).abs().argmin(-1)
        torch.testing.assert_close(got.double(), s * levels[places], rtol=1e-6, atol=0)


def test_a_ternary_block_is_as_good_as_the_best_of_all_thresholds() -> None:
    """The best of all: the largest |x| are s, for each number of them."""
    codec = codec_named("ternary:160")
    x = draw(200 * 160).view(200, 160) ** 3  # heavy tails
    sums = x.abs().sort(-1, descending=True).values.cumsum(-1)
    best = x.square().sum(-1) - (sums.square() / torch.arange(1, 161)).amax(-1)
    lost = (rounded(codec, x.view(-1)).view(200, 160) - x).square().sum(-1)
    assert (lost >= best * (1 - 1e-12)).all() and lost.sum() < 1.25 * best.sum()


@pytest.mark.parametrize("bits", [1, 2])
def test_the_largest_against_a_loop(bits: int) -> None:
    codec = codec_named(f"top:4/64:{bits}:128")
    x = draw(3 * 128)
    expected = torch.zeros_like(x)
    for begin in range(0, len(x), 128):
        kept = [
            chunk + i
            for chunk in (begin, begin + 64)
            for i in x[chunk : chunk + 64].abs().sort(descending=True).indices[:4].tolist()
        ]
        sizes = [abs(x[i].item()) for i in kept]
        mean = sum(sizes) / 8
        large = [size for size in sizes if size > mean] if bits == 2 else []
        small = [size for size in sizes if size <= mean] if bits == 2 else sizes
        for i, size in zip(kept, sizes, strict=True):
            group = large if size in large else small
            expected[i] = math.copysign(sum(group) / len(group), x[i].item())
    got = rounded(codec, x)
    assert torch.equal(got != 0, expected != 0)
    torch.testing.assert_close(got, expected, rtol=2**-8, atol=0)


def test_vectors_are_the_nearest() -> None:
    codec = codec_named("vector:4/8:64")
    assert isinstance(codec, Vectors)
    x, book = draw(4 * 64), codebook(4, 8)
    payload = codec.encode(x).view(4, -1)
    got = codec.decode(payload.view(-1), x.dtype).view(4, 8, 8)
    for row, values, wide in zip(payload, got, x.view(4, 8, 8), strict=True):
        s = row[:2].clone().view(torch.bfloat16).double()
        rms = wide.square().mean().sqrt()
        places = (wide.unsqueeze(1) / rms - book).square().sum(-1).argmin(-1)
        torch.testing.assert_close(values, book[places] * s, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", list(ROTATIONS))
def test_a_transform_is_orthogonal_and_what_it_says(kind: str) -> None:
    transform, size = ROTATIONS[kind], 16
    length = transform.length(size)
    x = draw(3 * length)
    y = transform.forward(x, size)
    torch.testing.assert_close(y.reshape(-1).norm(), x.norm())
    torch.testing.assert_close(transform.backward(y, size).reshape(-1), x)
    if kind == "hadamard":
        H = torch.ones(1, 1, dtype=torch.float64)
        for _ in range(4):
            H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
        signs = transform.forward(torch.eye(size, dtype=torch.float64).view(-1), size)[:, 0] * 4
        assert set(signs.tolist()) == {-1.0, 1.0}
        torch.testing.assert_close(y.view(3, -1), (x.view(3, -1) * signs) @ H / 4)
        return
    k = torch.arange(size, dtype=torch.float64)
    C = torch.stack([torch.cos(math.pi * (i + 0.5) * k / size) for i in range(size)], 1)  # (k, i)
    C = C / C.norm(dim=1, keepdim=True)
    expected = x.view(3, -1) @ C.T if kind == "dct" else C @ x.view(3, size, size) @ C.T
    torch.testing.assert_close(y.reshape(3, -1), expected.reshape(3, -1))


@pytest.mark.parametrize("name", [*ALL, *STOCHASTIC])
def test_zeros_are_exact_and_what_is_not_finite_is_told_in_its_block(name: str) -> None:
    codec = codec_named(name)
    block = codec.block
    assert not rounded(codec, torch.zeros(2 * block)).any()
    for wrong in (math.nan, math.inf, -math.inf):
        x = draw(2 * block).float()
        x[block + 5] = wrong
        values = rounded(codec, x)
        assert values[:block].isfinite().all()
        # A transform has blocks of its own, perhaps several in one.
        parted = isinstance(codec, Rotated)
        told = max(codec.inner.block, ROTATIONS[codec.kind].length(codec.size)) if parted else block
        assert not values[block : block + told].isfinite().any()


@pytest.mark.parametrize("name", ALL)
def test_blocks_are_apart(name: str) -> None:
    """Replicas cut a payload where blocks end."""
    codec = codec_named(name)
    x = draw(3 * codec.block)
    parts = [codec.encode(part) for part in x.split(codec.block)]
    assert torch.equal(codec.encode(x), torch.cat(parts))
    whole = torch.cat([codec.decode(part, x.dtype) for part in parts])
    torch.testing.assert_close(rounded(codec, x), whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", [*ALL, "stochastic:128:1"])
def test_with_feedback_nothing_is_lost(name: str) -> None:
    """What was sent and what is left are the sum of what was to be sent, and what is left stays bounded."""
    codec = codec_named(name)
    block, residual, sent, wanted, left = codec.block, 0.0, 0.0, 0.0, []
    for turn in range(60):
        x = draw(block, seed=turn) + 0.5
        codec_now = codec.at(turn)
        value = rounded(codec_now, x + residual)
        residual = x + residual - value
        sent, wanted = sent + value, wanted + x
        left.append(residual.norm().item())
    torch.testing.assert_close(sent + residual, wanted)
    # E ||e||^2 comes to rest at once: what is left is no longer at the end than in the middle.
    assert sum(left[50:]) < 1.3 * sum(left[35:45])


def test_each_part_has_its_turn() -> None:
    part = codec_named("part:4>lloyd:16:128")
    assert isinstance(part, Part)
    x = draw(2 * part.block)
    sent = [rounded(part.at(turn), x) for turn in range(8)]
    for a, b in zip(sent, sent[4:], strict=False):
        assert torch.equal(a, b)
    assert torch.stack([(s != 0) for s in sent[:4]]).sum(0).eq(1).all()
    assert (sum(sent[:4]) - x).norm() < 0.11 * x.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stochastic_signs_have_the_right_mean(dtype: torch.dtype) -> None:
    codec = codec_named("stochastic:128:max")
    x = draw(128).to(dtype)
    total = torch.zeros_like(x)
    for k in range(4000):  # the bits of x, all of which the hash takes in, are others each time
        total += rounded(codec, x * (1 + 1e-5 * (k + 1)))
    s = x.abs().max()
    # The mean of 4,000 draws of +-s is off by s / sqrt(4000); 128 of them by 4.5 times that at most.
    assert (total / 4000 - x).abs().max() < 0.05 * x.abs().max() + 4.5 * s / math.sqrt(4000)
    assert torch.equal(rounded(codec, x), rounded(codec, x))
    u = uniform(draw(1 << 16).to(dtype)).double()
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.006 and abs(u.square().mean() - 1 / 3) < 0.006


@pytest.mark.parametrize(
    "name",
    [
        *("", "signs:128", "sign:12", "ternary:128", "lloyd:5:128", "lloyd:4:128:cauchy", "top:65/64:2"),
        *("top:64/4096:3", "top:3/48:2", "half:2>sign:128", "hadamard>sign", "sign:128>hadamard:128"),
        *("vector:8/24:512", "sign:1:2:3:4"),
    ],
)
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(ValueError, match="stages"):
        codec_named(name)


# ---- in steps


def after(setting: Setting, steps: int = 7, count: int = 2) -> tuple[Tensor, dict[str, float], bool]:
    """Return all parameters of a replica after the last synchronization, what was sent, and whether replicas
    are the same to the last bit."""
    with closing(Replicas(tiny(), setting, count)) as replicas:
        for step in range(steps):
            take(replicas, step)
            replicas.step(factor(step))
        assert replicas.synchronized == 3
        X = [torch.cat([x[k].flatten() for x in replicas.X.values()]) for k in range(count)]
        return X[0], replicas.sent, all(torch.equal(X[0], x) for x in X)


def test_the_sign_by_name_is_one_bit() -> None:
    named, sent, same = after(Setting("named", interval=3, codec="sign:128"))
    plain, as_before, _ = after(Setting("plain", interval=3, bits=1))
    torch.testing.assert_close(named, plain)
    assert sent == as_before and same


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    ("changes", "there", "back"),
    [
        ({"codec": "ternary:160"}, "ternary:160", "ternary:160"),
        ({"codec": "part:4>sign:128"}, "part:4>sign:128", "part:4>sign:128"),
        ({"codec": "top:1/8:1:128", "mean_codec": "lloyd:4:160"}, "top:1/8:1:128", "lloyd:4:160"),
        ({"bits": 1, "mean_codec": "hadamard:256>ternary:160"}, "sign:128", "hadamard:256>ternary:160"),
        ({"codec": "dct2:8>top:4/64:2", "mean_bits": 4}, "dct2:8>top:4/64:2", "lloyd:16:128"),
    ],
    ids=str,
)
def test_bytes_are_those_of_the_names(changes: dict[str, Any], there: str, back: str, count: int) -> None:
    X, sent, same = after(Setting("named", interval=3, **changes), count=count)
    first, second = codec_named(there), codec_named(back)
    block = math.lcm(first.block, second.block) * count
    length = -(-len(X) // block) * block
    bits = length * first.bits_per_value + length / count * second.bits_per_value
    assert same and sent["pseudo_gradients"] == pytest.approx(3 * bits / 8, rel=1e-12)


def test_a_turn_moves_its_part_only() -> None:
    """Four outer steps, of which each moves another quarter."""
    with closing(Replicas(tiny(), Setting("parts", interval=1, codec="part:4>lloyd:16:128"), 2)) as replicas:
        last, moved = flat(replicas), []
        for step in range(4):
            take(replicas, step)
            replicas.step(factor(step))
            moved.append(flat(replicas) != last)
            last = flat(replicas)
        assert torch.stack(moved).sum(0).max() == 1
        share = torch.stack(moved).double().mean(1)
        assert (share > 0.15).all() and (share < 0.35).all()


def flat(replicas: Replicas) -> Tensor:
    return torch.cat([x[0].flatten() for x in replicas.X.values()])

"""A second decoder of ``.clipq`` files, written from docs/format.md in plain Python; slow, and for tests only."""

from __future__ import annotations

import math
import struct
import zlib
from collections import defaultdict
from dataclasses import dataclass, field

import zstandard

SIZES = (1, 1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8, 4, 8, 16, 1, 1, 1, 1, 1, 1)
MANTISSA = {9: 7, 10: 7, 11: 23, 12: 55}
SIGNED, FLOATING = {2, 4, 6, 8}, {9, 10, 11, 12, 16, 17, 18, 19}


def clip(value: int, limit: int) -> int:
    return max(-limit, min(limit, value))


STRETCH = [clip(round(256 * math.log((i + 0.5) / (4095.5 - i))), 2047) for i in range(4096)]
SQUASH = [max(32, min(65504, round(65536 / (1 + math.exp((2048 - i) / 256))))) for i in range(4096)]
LOG = [round(256 * math.log((i + 5) / 256)) for i in range(2304)]
RECIPROCAL = [65536 // (i + 1) for i in range(256)]
ADAPT = [131072 // (2 * i + 3) for i in range(256)]
STEP = [131 + math.isqrt(1400000 // (1 + i)) for i in range(256)]


def prob(logit: int) -> int:
    return SQUASH[2048 + clip(logit, 2047)]


class Adaptive:
    """Adaptive probabilities by context."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.states: dict[object, tuple[int, int]] = defaultdict(lambda: (2**22, 0))

    def logit(self, key: object) -> int:
        return STRETCH[self.states[key][0] >> 11]

    def adapt(self, key: object, bit: int) -> None:
        p, count = self.states[key]
        self.states[key] = p + ((bit * 2**23 - 8 * bit - p) * ADAPT[count] >> 16), min(count + 1, self.limit)


def learn(weights: list[int], inputs: list[int], bit: int, p: int, counts: list[int], d: int) -> None:
    e = (bit * 65536 - p) * STEP[counts[d]] >> 10
    counts[d] = min(counts[d] + 1, 255)
    weights[:] = [w + (x * e + 8192 >> 14) for x, w in zip(inputs, weights, strict=True)]


class Coder:
    """The range coder."""

    def __init__(self, data: bytes) -> None:
        words = [int.from_bytes(data[i : i + 2].ljust(2, b"\0"), "big") for i in range(0, len(data), 2)]
        self.words = [*words, 0, 0, 0][::-1]
        self.low, self.width = 0, 2**48 - 1
        for _ in range(3):
            self.low = self.low << 16 | self.words.pop()

    def read(self, p: int) -> int:
        bound = (self.width >> 16) * p
        bit = int(self.low < bound)
        if bit:
            self.width = bound
        else:
            self.low, self.width = self.low - bound, self.width - bound
        if self.width < 2**32:
            self.low = self.low << 16 | (self.words.pop() if self.words else 0)
            self.width <<= 16
        return bit


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        assert self.at + n <= len(self.data)
        self.at += n
        return self.data[self.at - n : self.at]

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        value = shift = 0
        while (byte := self.byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift

    def text(self) -> bytes:
        return self.take(self.varint())


class BitString:
    def __init__(self, data: Bytes) -> None:
        self.data, self.bits = data, ""

    def take(self, n: int) -> int:
        while len(self.bits) < n:
            self.bits += f"{self.data.byte():08b}"
        value, self.bits = int(self.bits[:n] or "0", 2), self.bits[n:]
        return value


@dataclass
class Tensor:
    name: bytes
    kind: int
    swapped: bool
    type: int = 0
    shape: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    tied_to: int = -1
    data: bytes = b""

    @property
    def n(self) -> int:
        return math.prod(self.shape)


def decode(content: bytes) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """Name to (element type, shape, elements as little-endian bytes)."""
    signature, version, size, crc = struct.unpack("<8sBII", content[:17])
    assert (signature, version) == (b"\x89CLIPQ\r\n", 1)
    body = Bytes(content[17 : 17 + size])
    assert zlib.crc32(content[:13] + body.data) == crc
    plain, packed = body.varint(), body.varint()
    table = Bytes(zlib.decompress(body.take(packed), -15) if packed else body.take(plain))
    for _ in range(2 * table.varint()):
        table.text()
    n_blocks, n_groups = table.varint(), table.varint()
    blocks, at = [], 17 + size
    for _ in range(n_blocks):
        length = table.varint()
        blocks.append(content[at : at + length])
        assert zlib.crc32(blocks[-1]) == int.from_bytes(body.take(4), "little")
        at += length
    assert at == len(content)
    tensors: list[Tensor] = []
    following = n_groups
    for _ in range(table.varint()):
        shared = table.varint()
        name = (tensors[-1].name[:shared] if tensors else b"") + table.text()
        flags = table.byte()
        tensor = Tensor(name, flags & 63, bool(flags & 64))
        if flags & 128:
            table.varint(), table.byte()
        if tensor.kind == 3:
            tensor.tied_to = table.varint()
        else:
            tensor.type = table.byte()
            tensor.shape = [table.varint() for _ in range(table.varint())]
            number = table.varint()
            if tensor.kind == 2:
                tensor.blocks = [number]
            else:
                tensor.blocks = list(range(following, following + number))
                following += number
        tensors.append(tensor)

    for group in range(n_groups):
        members = [t for t in tensors if t.kind == 2 and t.blocks == [group]]
        members.sort(key=lambda t: t.name.decode().rpartition(".")[2])
        decoder = floats if members[0].type in MANTISSA and sum(t.n for t in members) else planes
        data = Bytes(decoder(blocks[group], [t.n for t in members], members[0].type))
        for t in members:
            t.data = data.take(t.n * SIZES[t.type])
    for t in tensors:
        if t.kind == 0:
            t.data = codes(t, [blocks[i] for i in t.blocks])
        elif t.kind == 1:
            step = 2**20 // SIZES[t.type]
            for k, i in enumerate(t.blocks):
                t.data += raw(blocks[i], min(step, t.n - k * step), SIZES[t.type])
        elif t.kind == 3:
            same = tensors[t.tied_to]
            t.type, t.shape, t.data = same.type, same.shape, same.data
    return {t.name.decode(): (t.type, tuple(t.shape), t.data) for t in tensors}


def raw(block: bytes, n: int, size: int) -> bytes:
    data = Bytes(block)
    out = bytearray(n * size)
    for i, packed in enumerate([data.varint() for _ in range(size)]):
        plane = data.take(packed or n)
        out[i::size] = zstandard.ZstdDecompressor().decompress(plane, max_output_size=n) if packed else plane
    return bytes(out)


def planes(block: bytes, counts: list[int], kind: int) -> bytes:
    return raw(block, sum(counts), SIZES[kind])


def floats(block: bytes, counts: list[int], kind: int) -> bytes:
    """The elements of a group of floats."""
    start, rest = Bytes(block), MANTISSA[kind]
    kept = start.byte() - 1
    if kept < 0:
        return raw(block[1:], sum(counts), SIZES[kind])
    coder = Coder(start.take(start.varint()))
    string = BitString(start)
    signs, every, t = Adaptive(20), Adaptive(60), [0] * 8
    u = [[32768, 32768] for _ in range(8)]
    tops, h = [], 0
    for count in counts:
        own = Adaptive(60)
        for _ in range(count):
            sign = coder.read(prob(signs.logit(h)))
            signs.adapt(h, sign)
            h, node = 2 * (h & 1) + sign, 1
            for d in range(8):
                v = [every.logit(node), own.logit(node)]
                p = prob(sum(a * b for a, b in zip(v, u[d], strict=True)) >> 16)
                bit = coder.read(p)
                learn(u[d], v, bit, p, t, d)
                every.adapt(node, bit)
                own.adapt(node, bit)
                node = 2 * node + bit
            tops.append(sign << 8 | node & 255)
    values = [(top << kept | string.take(kept)) << (rest - kept) for top in tops]
    assert start.at == len(block)
    return b"".join(value.to_bytes(SIZES[kind], "little") for value in values)


def codes(t: Tensor, blocks: list[bytes]) -> bytes:
    """The elements of a code tensor."""
    start = Bytes(blocks[0])
    levels, pivot = start.byte() + 1, start.byte()
    width = 8 * SIZES[t.type]
    bits = BitString(start).take
    zero = bits(1)
    keys, m = [bits(width)] if levels > zero else [], width - 12
    for _ in range(levels - zero - 1):
        c = 0
        while c < 5 and not bits(1):
            c += 1
        k = bits(width.bit_length() - 1) if c == 5 else m + (c // 2 if c % 2 == 0 else -(c + 1) // 2)
        m = m if c == 5 else k
        keys.append(keys[-1] + (1 << k) + bits(k))
    top = 1 << (width - 1)
    values = []
    for key in keys:
        if t.type in FLOATING:
            key = key ^ top if key & top else key ^ (2 * top - 1)
        elif t.type in SIGNED:
            key ^= top
        values.append(key.to_bytes(width // 8, "little"))
    if zero:
        values.insert(pivot, bytes(width // 8))
    settings = (start.varint(), start.varint(), start.varint(), start.byte(), start.byte())
    plain_row = t.n // t.shape[0] if len(t.shape) > 1 else t.n
    row = t.n // t.shape[1] if t.swapped else min(max(plain_row, 1), 2**16)
    step = 2**20 // row * row
    scan: list[int] = []
    for k, block in enumerate(blocks):
        n = min(step, t.n - k * step)
        data = block[start.at :] if k == 0 else block
        scan += tile(data, n, row, pivot, levels, *settings) if levels > 1 else [0] * n
    if t.swapped:
        first, second = t.shape[:2]
        kernel = row // first
        where = ((b * first + a) * kernel + k for a in range(first) for b in range(second) for k in range(kernel))
        scan = [scan[i] for i in where]
    return b"".join(values[code] for code in scan)


def tile(
    data: bytes, n: int, row: int, pivot: int, levels: int, lag1: int, lag2: int, mean: int, rate: int, limit: int
) -> list[int]:
    coder, adaptive, dead_rows = Coder(data), Adaptive(limit), Adaptive(limit)
    read, logit, adapt = coder.read, adaptive.logit, adaptive.adapt
    size_bits = (max(pivot, levels - 1 - pivot) - 1).bit_length()
    column, sign = [256 * mean] * row, [0] * row
    group = [256 * mean] * (row // lag2 + 1)
    z, g = [24000, 5000, 0, 16000, 32000, 28000], [-690000, -545000, -63000, -800000]
    w, t = [[14000, 24000, 44000] for _ in range(9)], [0] * 9
    if row > 2048:
        rate = (2048 * rate + row - 1) // row
    signed: dict[int, int] = defaultdict(int)
    out: list[int] = []
    r, h = -1, 0
    while len(out) < n:
        m = min(row, n - len(out))
        dead = read(prob(dead_rows.logit(h)))
        dead_rows.adapt(h, dead)
        h = 2 * (h & 1) + dead
        if dead:
            out += [pivot] * m
            continue
        r += 1
        first = r * row
        x: list[list[int]] = [[], [], [], [], [], []]
        for j in range(m):
            i = first + j
            near = [abs(signed[k]) if k < first else 0 for k in (i - row, i - 2 * row, i - row - 1, i - row + 1)]
            x[0].append(LOG[column[j] >> 8] - LOG[mean])
            x[1].append(LOG[group[j // lag2] >> 8] - LOG[mean])
            x[2].append(LOG[25 * (near[0] + sum(near)) + (mean >> 1)] - LOG[mean])
        error, running = [], 256 * mean
        for j in range(m):
            i = first + j
            known = x[0][j] * z[0] + x[1][j] * z[1] + x[2][j] * z[2] >> 16
            x[3].append(LOG[running >> 8] - LOG[mean])
            activity = known + (x[3][j] * z[3] >> 16)
            left, left1, up, left2 = (signed[k] if k >= 0 else 0 for k in (i - 1, i - lag1, i - row, i - lag2))
            context = [min(2, abs(v)) for v in (left, left1, up, left2)]
            a = ("A", 27 * context[0] + 9 * context[1] + 3 * context[2] + context[3], 0)
            c = ("C", max(0, min(23, (activity >> 6) + 12)), 0)
            x[4].append(logit(a))
            x[5].append(logit(c))
            p = prob(activity + (x[4][j] * z[4] + x[5][j] * z[5] >> 16))
            bit = read(p)
            error.append(bit * 65536 - p)
            adapt(a, bit)
            adapt(c, bit)
            code = pivot
            if bit:
                y = [8 * clip(left, 3), 8 * clip(left1, 3), 8 * clip(up, 3), sign[j] >> 12]
                p = prob(sum(u * v for u, v in zip(y, g, strict=True)) >> 16)
                negative = read(p)
                e = (negative * 65536 - p) * STEP[t[0]] >> 10
                t[0] = min(t[0] + 1, 255)
                g = [v + (u * e + 8 >> 4) for u, v in zip(y, g, strict=True)]
                node = 1
                for d in range(1, size_bits + 1):
                    a, c = (*a[:2], node), (*c[:2], node)
                    v3 = [activity, logit(a), logit(c)]
                    p = prob(sum(u * v for u, v in zip(v3, w[d], strict=True)) >> 16)
                    bit = read(p)
                    learn(w[d], v3, bit, p, t, d)
                    adapt(a, bit)
                    adapt(c, bit)
                    node = 2 * node + bit
                level = node - (1 << size_bits)
                code = pivot - 1 - level if negative else pivot + 1 + level
                signed[i] = (1 + (level >> max(0, size_bits - 3))) * (-1 if negative else 1)
            out.append(max(0, min(levels - 1, code)))
            running += (65536 * abs(signed[i]) - running) * RECIPROCAL[min(j + 8, 250)] >> 16
        for k in range(6):
            total = sum(u * v for u, v in zip(error, x[k], strict=True)) >> 8
            z[k] = clip(z[k] + (total * rate >> 16), 2**20)
        for j in range(m):
            value, share = signed[first + j], RECIPROCAL[min(r, 60) + 2]
            column[j] += (65536 * abs(value) - column[j]) * share >> 16
            sign[j] += 65536 * value - sign[j] >> 3
        for k in range(-(-m // lag2)):
            columns = range(first + k * lag2, first + min(m, (k + 1) * lag2))
            total = 65536 * sum(abs(signed[i]) for i in columns) // len(columns)
            group[k] += (total - group[k]) * RECIPROCAL[min(r, 60) + 1] >> 16
    return out

"""The order of samples as a keyed permutation: any position is computed alone, nothing is stored or replayed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from truthgpt.runtime.seeds import derive_seed

ROUNDS = 6
BLOCK = 4096
"""Positions computed at once: about 0.1 us each, where a call for a few alone takes 0.1 ms."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

UInt64Array = npt.NDArray[np.uint64]


class KeyedPermutation:
    """A pseudo-random bijection of `range(length)` chosen by `key`, in O(1) time and memory a position.

    A Feistel network over the smallest power of two that holds `length`; a value that falls outside is sent through
    again until it falls inside ("cycle walking", Black and Rogaway 2002: fewer than two passes on average). The round
    function is the finaliser of splitmix64 (Steele et al. 2014). Statistically mixed, not a cipher.

    Args:
        length: number of positions, 1 to 2**62.
        key: any integer; its low 64 bits count.
    """

    def __init__(self, length: int, key: int) -> None:
        if not 1 <= length <= 2**62:
            raise ValueError(f"length must be 1 to 2**62, not {length}")
        self.length = length
        bits = max(2, (length - 1).bit_length())
        self._left_bits = np.uint64(bits // 2)
        self._right_bits = np.uint64(bits - bits // 2)
        counter = np.arange(1, ROUNDS + 1, dtype=np.uint64)
        self._round_keys = _mix(np.uint64(key & (2**64 - 1)) + counter * _GOLDEN)

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Images of `positions`, an integer array of any shape with values in `range(length)`.

        Raises:
            IndexError: a position outside `range(length)`.
        """
        if positions.size and (int(positions.min()) < 0 or int(positions.max()) >= self.length):
            raise IndexError(f"positions must be in range({self.length})")
        values = self._feistel(positions.astype(np.uint64))
        outside = values >= self.length
        while outside.any():
            values[outside] = self._feistel(values[outside])
            outside = values >= self.length
        return values.astype(np.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> int:
        """Image of one position."""
        return int(self(np.array([position], dtype=np.int64))[0])

    def _feistel(self, values: UInt64Array) -> UInt64Array:
        """One pass over the power of two. Halves of unequal width swap their widths every round."""
        low_bits, high_bits = self._right_bits, self._left_bits
        for round_key in self._round_keys:
            low = values & _ones(low_bits)
            high = values >> low_bits
            mixed = high ^ (_mix(low + round_key) & _ones(high_bits))
            values = (low << high_bits) | mixed
            low_bits, high_bits = high_bits, low_bits
        return values


class EpochPermutations:
    """One KeyedPermutation of `range(length)` an epoch, read in runs of consecutive positions.

    Keeps the block of 4,096 images that was computed last; the images do not depend on what was read before.

    Args:
        length: number of positions.
        seed: seed of the run.
        name: what the permutations are for; keys are derived from seed, name and epoch.
    """

    def __init__(self, length: int, seed: int, *name: int | str) -> None:
        self._length = length
        self._seed = seed
        self._name = name
        self._block = (-1, -1)
        self._images: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def images(self, epoch: int, first: int, stop: int) -> npt.NDArray[np.int64]:
        """Images of the positions `first` to `stop`, `(stop - first,)`.

        Raises:
            IndexError: a position outside `range(length)`.
        """
        if not 0 <= first <= stop <= self._length:
            raise IndexError(f"positions must be in range({self._length}), not {first} to {stop}")
        blocks = range(first // BLOCK, -(-stop // BLOCK))
        runs = [self._read(epoch, block)[max(first - block * BLOCK, 0) : stop - block * BLOCK] for block in blocks]
        return np.concatenate(runs) if runs else np.empty(0, dtype=np.int64)

    def whole(self, epoch: int) -> npt.NDArray[np.int64]:
        """Images of all positions, `(length,)`."""
        return self._permutation(epoch)(np.arange(self._length, dtype=np.int64))

    def _read(self, epoch: int, block: int) -> npt.NDArray[np.int64]:
        if self._block != (epoch, block):
            positions = np.arange(block * BLOCK, min((block + 1) * BLOCK, self._length), dtype=np.int64)
            self._images = self._permutation(epoch)(positions)
            self._block = (epoch, block)
        return self._images

    def _permutation(self, epoch: int) -> KeyedPermutation:
        return KeyedPermutation(self._length, derive_seed(self._seed, *self._name, epoch))


def _ones(bits: np.uint64) -> np.uint64:
    return (np.uint64(1) << bits) - np.uint64(1)


def _mix(values: UInt64Array) -> UInt64Array:
    """Finaliser of splitmix64; wraps modulo 2**64."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))

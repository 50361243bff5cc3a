"""How often each set is seen in an epoch."""

import difflib
import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from ..core.errors import ConfigError


class MixSampler(Sampler[int]):
    """Indices into the sets put one after another, each set passed over `weight` times.

    A weight of 2.3 gives two whole passes and three tenths of the set, drawn without replacement
    and anew each epoch; then all is shuffled. An epoch depends on the seed and its number alone.

    Example: sizes [2, 4] and weights [2, 0.5] give each of 0 and 1 twice and two of 2, 3, 4, 5.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        self.sizes, self.weights, self.seed = list(sizes), list(weights), seed
        self.epoch = 0

    @property
    def samples(self) -> list[int]:
        """Samples of each set in an epoch."""
        return [
            math.floor(weight) * size + round((weight - math.floor(weight)) * size)
            for size, weight in zip(self.sizes, self.weights, strict=True)
        ]

    def __len__(self) -> int:
        return sum(self.samples)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        parts, start = [], 0
        for size, samples in zip(self.sizes, self.samples, strict=True):
            if size:
                passes, rest = divmod(samples, size)
                parts += [np.arange(start, start + size)] * passes
                parts.append(start + generator.permutation(size)[:rest])
            start += size
        indices = np.concatenate(parts)
        generator.shuffle(indices)
        for begin in range(0, len(indices), 4096):
            yield from indices[begin : begin + 4096].tolist()


def mix_weights(mix: dict[str, float], names: Sequence[str]) -> list[float]:
    """Passes per epoch of each set, 1 where `mix` does not name it.

    Raises:
        ConfigError: a name in `mix` is that of no set or of several, or every weight is 0.
    """
    for name in mix:
        if names.count(name) > 1:
            raise ConfigError(
                f"mix, {name}",
                f'{names.count(name)} sets are called "{name}"',
                "name the sets apart in a datainfo file",
            )
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            raise ConfigError(
                f"mix, {name}",
                f'there is no set "{name}"',
                f'write "{nearest[0]}"; data_path has {", ".join(names)}',
            )
    weights = [float(mix.get(name, 1)) for name in names]
    if not any(weights):
        raise ConfigError("mix", "every weight is 0", "give one set a weight above 0")
    return weights

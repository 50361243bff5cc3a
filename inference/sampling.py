"""How the next tokens are chosen."""

import math
from dataclasses import dataclass

from ..core.errors import ConfigError

DRAWN = ("temperature", "top_p", "top_k")
"""What counts for tokens that are drawn, and for no others."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; None: as the model's own generation_config says.

    Attributes:
        max_new_tokens: Limit of all new tokens, thought included; only the text that ends a
            thought may go beyond it.
        do_sample: Draw tokens instead of taking the likeliest.
        thinking_budget: New tokens after which an unfinished thought is ended with `EARLY_STOP`,
            which counts as new tokens and is written whole.
        seed: Of what is drawn: the same batch then gives the same tokens.

    Raises:
        ConfigError: a value is out of range, or would have no effect.
    """

    max_new_tokens: int = 1024
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    thinking_budget: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for key, lowest in (("max_new_tokens", 1), ("top_k", 1), ("thinking_budget", 1)):
            value = getattr(self, key)
            if value is not None and value < lowest:
                raise ConfigError(key, f"{value} is below {lowest}", f"give {lowest} or more")
        for key in ("temperature", "repetition_penalty"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(key, f"{value} is not above 0", "give a number above 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(
                "top_p", f"{self.top_p} is no share", "give a number above 0, up to 1"
            )
        budget = self.thinking_budget
        if budget is not None and budget >= self.max_new_tokens:
            raise ConfigError(
                "thinking_budget",
                f"{budget} leaves no token of max_new_tokens ({self.max_new_tokens}) to answer",
                "lower it, or raise max_new_tokens",
            )
        unused = [key for key in DRAWN if getattr(self, key) is not None]
        if unused and not self.do_sample:
            raise ConfigError(
                unused[0], "has no effect without do_sample", "set do_sample too, or leave it out"
            )

    def limit(self, thinks: bool, closing: int) -> int:
        """Most new tokens of a row; `closing` of them end a thought that reaches its budget."""
        if not thinks or self.thinking_budget is None:
            return self.max_new_tokens
        return max(self.max_new_tokens, self.thinking_budget + closing)

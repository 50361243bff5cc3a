"""The text of `recompute`: what of each tower the backward pass computes again."""

from difflib import get_close_matches

from ..core.errors import ConfigError

POLICIES = ("none", "selective", "full")
TOWERS = ("llm", "visual_tokenizer")


def parse_recompute(text: str, key: str = "recompute") -> dict[str, str]:
    """Read `policy`, for both towers, or `tower:policy("|" tower:policy)*`; spaces are ignored.

    Returns:
        The policy of every tower; "none" for one that is not named.

    Raises:
        ConfigError: an unknown tower or policy, or a tower given twice.
    """
    text = text.replace(" ", "")
    if ":" not in text:
        return dict.fromkeys(TOWERS, _known(text, POLICIES, "policy", key))
    found: dict[str, str] = {}
    for part in text.split("|"):
        tower, _, policy = part.partition(":")
        _known(tower, TOWERS, "tower", key)
        if tower in found:
            raise ConfigError(key, f'"{tower}" is given twice', "keep one of them")
        found[tower] = _known(policy, POLICIES, "policy", key)
    return dict.fromkeys(TOWERS, "none") | found


def _known(name: str, known: tuple[str, ...], kind: str, key: str) -> str:
    if name in known:
        return name
    near = get_close_matches(name, known, n=1)
    fix = f"did you mean {near[0]}" if near else f"known are {', '.join(known)}"
    raise ConfigError(key, f'"{name}" is no {kind}', fix)

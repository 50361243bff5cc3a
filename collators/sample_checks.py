"""What the settings of a run make of a sample: what the length limit takes from it."""

from collections.abc import Sequence

from ..core.errors import DataError
from ..data.conversation import PLAIN, Conversation
from .rendering import truncate
from .sample import SampleEncoder, Size


def check_sample(
    encoder: SampleEncoder, conversation: Conversation, files: Sequence[Size]
) -> list[DataError]:
    """Findings `thinking-history`, `no-supervision`, `too-long` and `media-cut`.

    Args:
        files: Sizes of the files, as `data.image_checks.inspect_media` gives them.
    """
    try:
        whole = encoder.expand(conversation, encoder.media_sizes(conversation, files))
    except DataError as error:
        return [error]
    limit = encoder.max_length(conversation)
    sample = truncate(whole, limit)
    where = conversation.where(
        "caption" if conversation.turns[-1].role == PLAIN else "conversations"
    )
    has_media = bool(whole.media)
    name = "multimodal_max_length" if has_media else "text_max_length"
    found = []
    if not sample.trained_tokens:
        found.append(
            DataError(
                where,
                f"no token to learn from is left of {len(whole.ids)} after the cut to "
                f"{len(sample.ids)}: training leaves the sample out.",
                f"raise {name} to {len(whole.ids)}"
                + (", or lower the pixel limits." if has_media else ", or shorten the text."),
                "no-supervision",
            )
        )
    elif len(sample.ids) < len(whole.ids):
        lost = whole.trained_tokens - sample.trained_tokens
        found.append(
            DataError(
                where,
                f"{len(whole.ids)} tokens, cut to {len(sample.ids)} by {name} {limit}: {lost} of "
                f"{whole.trained_tokens} trained ones are lost.",
                f"raise {name} to {len(whole.ids)}, or shorten the sample.",
                "too-long",
            )
        )
    if len(sample.media) < len(whole.media):
        field = "image" if conversation.images else "video"
        kind = "images" if conversation.images else "videos"
        found.append(
            DataError(
                conversation.where("video_frames" if conversation.frames else field),
                f"{len(whole.media) - len(sample.media)} of {len(whole.media)} {kind} do not fit "
                f"into {name} {limit}, and the model does not see them.",
                f"raise {name} to {len(whole.ids)}, or lower the pixel limits.",
                "media-cut",
            )
        )
    return found

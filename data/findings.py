"""What can be wrong with data: the one table of codes, and a finding with its place."""

from dataclasses import dataclass
from typing import Literal

from ..core.errors import DataError

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Code:
    """A kind of finding.

    Attributes:
        severity: `error` where training refuses the record, leaves it out, or would learn something
            broken; `warning` for what it accepts and is suspicious.
        meaning: What was found, as the tables print it.
        fixable: Whether `data.fixes` mends it where one fix is sure.
    """

    severity: Severity
    meaning: str
    fixable: bool = False


CODES: dict[str, Code] = {
    # files
    "file-unreadable": Code("error", "the file is missing or cannot be read"),
    "file-empty": Code("error", "the file holds nothing"),
    "file-form": Code("error", "the file holds no list of records"),
    "encoding": Code("error", "the file is not UTF-8"),
    "json": Code("error", "broken JSON"),
    "json-value": Code("error", "JSON that Python cannot hold: a huge number, deep nesting"),
    # turns
    "not-object": Code("error", "the record is no object"),
    "turns-missing": Code("error", "no list of turns, or an empty one"),
    "turn-form": Code("error", "a turn without its two keys", fixable=True),
    "role-unknown": Code("error", "a role training does not know", fixable=True),
    "text-type": Code("error", "something other than a string where text belongs"),
    "surrogate": Code("error", "half a surrogate pair in text"),
    "content-part": Code("error", "a part of a message that is no text, image or video"),
    "answer-none": Code("error", "no answer to learn"),
    "answer-empty": Code("error", "an answer without text"),
    "tool-response": Code("error", "<tool_response> tags of an answer that do not pair up"),
    "caption-empty": Code("error", "a caption without text"),
    "caption-template": Code("error", "a caption template without exactly one <image>"),
    # media
    "media-field": Code("error", "an image or video that is no path", fixable=True),
    "media-twice": Code("error", 'both "image" and "images"'),
    "media-mixed": Code("error", "more than one kind of media in a record"),
    "video-several": Code("error", "more than one video in a record"),
    "image-marks-few": Code("error", "fewer <image> than files", fixable=True),
    "image-marks-many": Code("error", "more <image> than files"),
    "video-marks": Code("error", "<video> and the video do not match", fixable=True),
    # thoughts
    "think-unclosed": Code("error", "<think> without </think> in an answer"),
    "think-unopened": Code("error", "</think> without <think> in an answer", fixable=True),
    "think-nested": Code("error", "<think> inside a think block"),
    "think-empty": Code("warning", "an empty think block written into an answer: it is trained"),
    "think-in-question": Code("warning", "think tags outside an answer"),
    "thought-only": Code("warning", "an answer that is nothing but a thought"),
    # suspicious text
    "id-type": Code("warning", "an id that is neither text nor a whole number"),
    "role-order": Code("warning", "two turns of one role in a row"),
    "system-order": Code("warning", "a system turn that is not the first"),
    "answer-first": Code("warning", "an answer before any question"),
    "question-last": Code("warning", "a last question without an answer", fixable=True),
    "question-empty": Code("warning", "a question without text"),
    "special-token": Code("warning", "a model's control token written as text", fixable=True),
    "mark-in-answer": Code("warning", "an image or video inside an answer"),
    # files of media
    "image-missing": Code("error", "no such image file"),
    "image-unreadable": Code("error", "an image Pillow cannot read"),
    "image-truncated": Code("error", "an image file that is cut off or corrupt"),
    "image-empty": Code("error", "an image file of zero bytes, or without pixels"),
    "image-huge": Code("error", "more pixels than an honest image has: a decompression bomb"),
    "video-missing": Code("error", "no such video file"),
    "video-unreadable": Code("error", "a video that cannot be decoded"),
    "image-aspect": Code("warning", "an image far longer in one direction than in the other"),
    "image-animated": Code("warning", "an animation, of which the first frame is taken"),
    "image-cmyk": Code("warning", "an image in print colours, converted without its profile"),
    "image-16bit": Code("warning", "a grey image of more than 8 bits; all above 255 becomes white"),
    "image-rotated": Code("warning", "an image whose EXIF rotation is not applied"),
    "box-outside": Code("warning", "a box that leaves its image"),
    "box-inverted": Code("warning", "a box whose corners are swapped"),
    # between records
    "id-duplicate": Code("warning", "an id that an earlier record of the set has"),
    "sample-duplicate": Code("warning", "a sample that an earlier record is, word for word"),
    "sample-in-eval": Code("warning", "a training sample that is in the evaluation set"),
    # with a config
    "no-supervision": Code("error", "no trained token is left after the cut"),
    "thinking-history": Code("error", 'an earlier thought with an image, under "last_turn"'),
    "too-long": Code("warning", "a sample that is cut to the length limit"),
    "media-cut": Code("warning", "images or videos that the length limit cuts off"),
}


@dataclass(frozen=True)
class Finding:
    """One thing found in the data.

    Attributes:
        code, severity: As in `CODES`.
        file: Data file, as it was named.
        record: 1-based position in the file; None for what concerns the file.
        id: Of the record; empty where it has none to tell.
        field: Where in the record, or in the file; empty for all of it.
        what, fix: As in the error.
    """

    code: str
    severity: Severity
    file: str
    record: int | None
    id: str
    field: str
    what: str
    fix: str

    @classmethod
    def of(cls, error: DataError, file: str, record: int | None, identity: str) -> "Finding":
        """The finding that an error with a code is.

        Args:
            identity: The record's id (`data.conversation.record_id`); empty for a file's error.
        """
        rest = error.where
        for known in (file, f", record {record}", f' (id "{identity}")', ", "):
            rest = rest.removeprefix(known)
        return cls(
            error.code,
            CODES[error.code].severity,
            file,
            record,
            identity,
            rest if rest != error.where else "",
            error.what,
            error.fix,
        )

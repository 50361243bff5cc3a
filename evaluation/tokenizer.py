"""Captions split as the COCO caption scores split them: Penn Treebank tokens, lower case.

`"ptb_python"` is this file's own; `"ptb_java"` runs the Stanford tokenizer that pycocoevalcap
brings. Both leave out the punctuation that the COCO scores leave out. They agree but for corners:
numbers in a row that read as one telephone number, marks behind an e-mail address, apostrophes
between words without a space. Java also reads on into the next caption after a last "C.".
"""

import importlib.util
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import ConfigError

TOKENIZERS = ("ptb_python", "ptb_java")

_COCO_PUNCTUATION = {*"'`.?!,:;-", "''", "``", "--", "...", "-LRB-", "-RRB-", "-LCB-", "-RCB-"}

_MARKS = "".join(
    chr(c) for c in range(0x300, 0x1000) if unicodedata.category(chr(c)) in ("Mn", "Mc")
)
_NUMERALS = "²³¹¼-¾⁰⁴-⁹₀-₉⅐-↋①-⓿❶-➓"  # \w to Python, symbols to the treebank
_LETTER = rf"(?:[^\W\d_{_NUMERALS}]|[{_MARKS}])"
_CHAR = rf"(?:[^\W_{_NUMERALS}]|[{_MARKS}])"
_HYPHEN = r"[-\u2010\u2011]"
_APOSTROPHE = r"['\u2019]"
_NEGATION = r"n['`\u2019]ts?"

# Their dot belongs to them wherever they stand; the second list needs a capital, the third a
# number after it.
_ABBREVIATIONS = """adj adm adv al ala alex apr ariz assn assoc asst aug ave bancorp bhd bldg blvd
    bros calif capt cf cie co col colo conn corp cos cpl ct dec dept det dr drs elec ens esq est
    etc ext feb fla fri ft ga gen gov hon inc ind insp intl invt jan jos jr jul jun kan kans ky lt
    ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mr mrs ms msgr mt natl neb nev nov oct
    okla penn ph plc pres prof profs pte pty pvt rd rep reps rev rt sen sens sep sept seq sfc sgt
    spc sq sr st ste supt sys tel tenn thu thurs tue tues univ va vs vt wed wis wisc wm wyo"""
_CAPITAL_ABBREVIATIONS = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
_NUMBER_ABBREVIATIONS = "art ca fig figs no nos op pp prop"
# After a single letter and a dot, one of these begins a new sentence: "vitamin C. It ..."
_OPENERS = """A About According Additionally After An As At But Earlier He Her Here However If In
    It Last Many More Now Once One Other Our She Since So Some Such That The Their Then There These
    They This We What When While Yet You"""

_WRITTEN = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_WRITTEN |= {"€": "$", "₠": "$", "¤": "$", "£": "#", "¢": "cents"}
_WRITTEN |= {"&lt;": "<", "&gt;": ">"}
_WRITTEN |= {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_ENTITIES = {"amp": "&", "quot": '"', "apos": "'", "nbsp": " ", "mdash": "-"}


def _any_of(words: str) -> str:
    return "|".join(sorted(words.split(), key=len, reverse=True))


def _cased(words: str) -> str:
    """Those words, their first letter a capital."""
    return "|".join(f"{word[0]}(?i:{word[1:]})" for word in words.split())


_ABBREVIATION = rf"(?:(?i:{_any_of(_ABBREVIATIONS)})|{_cased(_CAPITAL_ABBREVIATIONS)})\."
_ACRONYM = r"(?:[A-Za-z]|Ph)(?:\.[A-Za-z])+\."
_WORD = rf"{_LETTER}{_CHAR}*"
_CLITIC = rf"{_APOSTROPHE}(?i:[sdm]|re|ve|ll)(?![A-Za-z])"
_OWN_APOSTROPHE = rf"(?!{_CLITIC}){_APOSTROPHE}"
_INNER_DOT = r"(?:\.(?=[,;:]))?"
_PART = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"

_SUFFIX = re.compile(rf"{_CLITIC}|{_NEGATION}")

# The first that fits wins, so the longer ones stand before their beginnings.
_TOKEN = re.compile(
    "|".join(
        [
            # markup, addresses and names of the net, faces
            r"''|\.{3}|-{2,}|<<|>>|&(?:lt|gt|#\d+);",
            r"<?[A-Za-z0-9][\w.+-]*@\w[\w-]*(?:\.\w[\w-]*)*>?",
            r"<(?:[!?][A-Za-z-][^>]*|/?[A-Za-z][\w:.-]*"
            r"""(?:\s+[A-Za-z][\w:.-]*(?:="[^"]*"|='[^']*')?)*\s*/?)>""",
            r'(?i:https?://)[^\s"<>|()]+[^\s"<>|.!?(){},-]',
            r"(?i:(?:www\.(?:[\w-]+\.)+[a-z]{2,4}|(?:[A-Za-z0-9]+\.)+(?:com|net|org|edu))(?!\.?\w))"
            r'(?:/[^\s"<>|()]*[^\s"<>|.!?(){},-])?',
            r"@[A-Za-z_]\w*",
            r"#[A-Za-z][A-Za-z0-9]*",
            r"[<>]?[:;=]['o-]?[DdPpOo()\[\]{\\@|](?![A-Za-z0-9])",
            r"\^_\^",
            # contractions
            rf"{_LETTER}+?(?=(?i:{_NEGATION})(?!{_LETTER}))",
            rf"(?i:{_NEGATION})(?!{_LETTER})",
            _CLITIC,
            r"(?i:(?:can(?=not)|(?:gon|wan)(?=na)|got(?=ta)|(?:gim|lem)(?=me))"
            r"(?=(?:not|na|ta|me)(?![-'\u2019/]?\w)))",
            rf"{_APOSTROPHE}(?i:t(?=is|was))",
            # words with an apostrophe of their own
            rf"{_APOSTROPHE}(?i:n{_APOSTROPHE}|n\b|em|till?|cause|[2-9]0s|\d\d(?!\S))",
            rf"(?i:(?:ol|somethin|dunkin){_APOSTROPHE})(?!{_LETTER})",
            r"[Cc]'mon|li'l|ev'ry|nat'l|s'mores|[Nn]or'easter",
            rf"[yY]{_APOSTROPHE}(?={_LETTER})",
            rf"[dolDOL]{_OWN_APOSTROPHE}{_LETTER}{_CHAR}*",
            rf"[A-HJ-XZn]{_OWN_APOSTROPHE}{_LETTER}{{2,}}",
            rf"{_LETTER}*[aeiouyAEIOUY]{_OWN_APOSTROPHE}[aeiouA-Z]{_LETTER}*",
            rf"[dljDLJ]{_OWN_APOSTROPHE}",
            # dots that stay
            rf"(?:{_ABBREVIATION}|{_ACRONYM})(?:{_HYPHEN}{_CHAR}+)+{_INNER_DOT}",
            rf"(?:{_ABBREVIATION}|{_ACRONYM})(?!{_LETTER})|(?i:(?:ph|ed)\.d\.)",
            rf"(?i:{_any_of(_NUMBER_ABBREVIATIONS)})\.(?= ?\d|-\d)(?:-\d+)?",
            rf"[A-Za-z]\.(?!{_LETTER}|\s+(?:{_any_of(_OPENERS)})(?!\S))(?:{_HYPHEN}{_CHAR}+)*",
            # joined by slash, hyphen, ampersand or dot
            rf"{_PART}(?:/{_PART}){{1,2}}",
            rf"(?:{_CHAR}+{_HYPHEN})+{_ACRONYM}(?!{_LETTER})",
            rf"(?:{_CHAR}*\d(?:[.,]\d+)+|{_CHAR}+)(?:(?:{_HYPHEN}|_){_CHAR}+)+{_INNER_DOT}",
            r"[A-Z]+(?:[+&][A-Z]+)+",
            r"[A-Z]+\$",
            r"[Cc](?:\+\+|#)|[Ff]#",
            rf"{_WORD}(?:[.!?]{_WORD})*{_INNER_DOT}",
            # numbers, runs and signs
            r"\(\d{2,3}\)(?=\s?\d{3,4}[-\s]?\d{3,5})",
            rf"\d+(?:\.\d+)*\.[xX](?!{_CHAR})",
            rf"[-+]?\d*(?:[.:,]\d+)+|[-+]\d+|{_CHAR}+{_INNER_DOT}",
            r"[!?]{2,}|\*+|_+|#+|@+",
            r"[$%&+/<=>\\^|~()\[\]{}]",
            r"[¡-©¬®-º¼-¿×÷\u201a\u201e\u201f\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044]",
            r"[\u2070-\u20a0₤€\u2100-\u214f\u2153-\u215e\u2190-\u2bff、。〒・\uff01-\uffe6]",
        ]
    )
)
_DROPPED = {"''", "...", "--", "---", "----"}


def tokenize(texts: Sequence[str], tokenizer: str = "ptb_python") -> list[list[str]]:
    """The tokens of each text.

    Raises:
        ConfigError: there is no such tokenizer, or "ptb_java" without pycocoevalcap or Java.
    """
    match tokenizer:
        case "ptb_python":
            return [_tokens(text) for text in texts]
        case "ptb_java":
            return _java_tokens(texts)
    listed = " or ".join(TOKENIZERS)
    raise ConfigError("tokenizer", f'"{tokenizer}" is not a choice of tokenizer', f"give {listed}")


def _tokens(text: str) -> list[str]:
    text = text.replace("\N{SOFT HYPHEN}", "")
    text = re.sub(r"&(amp|quot|apos|nbsp|mdash);", lambda entity: _ENTITIES[entity[1]], text)
    return [
        part
        for match in _TOKEN.finditer(text)
        if match[0] not in _DROPPED
        for part in _written(match[0]).split()
    ]


def _written(token: str) -> str:
    """As the treebank writes it."""
    if token in _WRITTEN:
        return _WRITTEN[token]
    token = token.lower().replace("(", "-lrb-").replace(")", "-rrb-")
    return token.replace("\u2019", "'") if _SUFFIX.fullmatch(token) else token


def _java_tokens(texts: Sequence[str]) -> list[list[str]]:
    command = [*_java_command(), "-preserveLines", "-lowerCase", "-encoding", "utf-8"]
    lines = "".join(" ".join(text.split()) + "\n" for text in texts)
    done = subprocess.run(command, input=lines.encode("utf-8", "replace"), capture_output=True)
    written = done.stdout.decode("utf-8").split("\n")[:-1]
    if done.returncode or len(written) != len(texts):
        reason = done.stderr.decode("utf-8", "replace").strip().split("\n")[-1]
        raise ConfigError(
            "tokenizer, ptb_java",
            f"Java gave {len(written):,} lines for {len(texts):,} texts: {reason}",
            'repair the installation of Java, or give "ptb_python"',
        )
    return [[t for t in line.split() if t not in _COCO_PUNCTUATION] for line in written]


def _java_command() -> list[str]:
    package = importlib.util.find_spec("pycocoevalcap")
    folders = package.submodule_search_locations if package else None
    java = shutil.which("java")
    if not folders or not java:
        missing = "Java" if folders else "the package pycocoevalcap"
        raise ConfigError(
            "tokenizer, ptb_java",
            f"needs {missing}, which is not installed",
            f'install {missing}, or give "ptb_python"',
        )
    jar = next(Path(folders[0]).glob("tokenizer/stanford-corenlp-*.jar"))
    return [java, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]

"""Perplexity by a KenLM model over sentencepiece pieces, as in CCNet."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import regex

from pipelines.clean.column import Column, Indices, Mask, utf8
from pipelines.clean.kernels.han_pairs import HAN, pair_codes, stray_shares
from pipelines.clean.kernels.kenlm_model import HashedModel, load_hashed_model
from pipelines.clean.operators.garbled import variety
from pipelines.clean.operators.language import TRADITIONAL, WU_WE, variant_of
from pipelines.clean.operators.registry import CLOSED, Assets, Dialect, Interval, Parameters, Verdict, operator, within
from pipelines.clean.operators.words import piece_numbers, pieces, sentencepiece_of, unknown_piece, vocabulary

Floats = npt.NDArray[np.float64]


def _kenlm_of(lang: str) -> str:
    return f"{lang}.arpa.bin"


def _files(parameters: Parameters, dialect: Dialect) -> list[str]:
    return [sentencepiece_of(parameters["lang"]), _kenlm_of(parameters["lang"])]


@cache
def _model(path: str) -> Any:
    import kenlm

    return kenlm.Model(path)


def _perplexity(line_of_pieces: str, model: Any) -> float:
    """10 to the power of the mean negative log10 probability per piece and line end; 0 for an empty text."""
    lines = line_of_pieces.splitlines()
    length = sum(len(line.split()) + 1 for line in lines)
    return _mean(sum(model.score(line) for line in lines), length) if length else 0.0


def _mean(total: float, length: int) -> float:
    return float(round(10.0 ** (-total / length), 1))


@cache
def _words_of(pieces_model: str, model: HashedModel) -> Indices:
    """What the model calls each piece; -1 for pieces that stand for others, or are more than a word to it."""
    known = vocabulary(pieces_model)
    words = model.numbers(known)
    words[[number for number, piece in enumerate(known) if piece.split() != [piece] or "\0" in piece]] = -1
    words[unknown_piece(pieces_model)] = -1
    return words


@cache
def _are_single(pieces_model: str) -> Mask:
    """Which pieces are one Han character."""
    return _single(vocabulary(pieces_model))


def _single(split: Sequence[str]) -> Mask:
    return np.array([_SINGLE.fullmatch(piece) is not None for piece in split], dtype=np.bool_)


def _count(mask: Mask, offsets: Indices) -> Indices:
    """How many are marked between one offset and the next."""
    return np.diff(np.append(0, np.cumsum(mask))[offsets])


@dataclass(frozen=True)
class _Scored:
    """What a language model says of texts."""

    perplexities: Floats
    lengths: Indices
    """In pieces."""
    astray: Indices
    """Pieces of one Han character that the model has not seen after the piece before."""


def _scored(texts: list[str], pieces_model: str, path: str) -> _Scored:
    model = load_hashed_model(path)
    if model is None:
        return _scored_by_kenlm(pieces(texts, pieces_model), _model(path))
    numbers, offsets = piece_numbers(texts, pieces_model)
    words, lengths = _words_of(pieces_model, model)[numbers], np.diff(offsets)
    totals, sizes = model.scores(np.maximum(words, 0), offsets)
    astray = _count(_are_single(pieces_model)[numbers] & (sizes == 1), offsets)
    pairs = zip(totals.tolist(), lengths.tolist(), strict=True)
    scores = np.array([_mean(total, length + 1) if length else 0.0 for total, length in pairs], dtype=np.float64)
    rows = np.unique(np.searchsorted(offsets, np.flatnonzero(words < 0), side="right") - 1)
    by_name = _scored_by_name(pieces([texts[row] for row in rows.tolist()], pieces_model), model, path)
    scores[rows], astray[rows] = by_name.perplexities, by_name.astray
    return _Scored(scores, lengths, astray)


def _scored_by_name(split: list[list[str]], model: HashedModel, path: str) -> _Scored:
    """Texts with pieces that are in no vocabulary."""
    lengths = np.array([len(row) for row in split], dtype=np.int64)
    offsets, flat = np.append(0, np.cumsum(lengths)), list(chain.from_iterable(split))
    totals, sizes = model.scores(model.numbers(flat), offsets)
    scores = np.array([_mean(total, len(row) + 1) for total, row in zip(totals.tolist(), split, strict=True)])
    for row, found in enumerate(split):
        line = " ".join(found)
        if len(line.split()) != len(found) or "\0" in line:  # KenLM splits words at the one and ends them at the other
            scores[row] = _perplexity(line, _model(path))
    return _Scored(scores, lengths, _count(_single(flat) & (sizes == 1), offsets))


def _scored_by_kenlm(split: list[list[str]], model: Any) -> _Scored:
    lines = [" ".join(row) for row in split]
    scores = np.array([_perplexity(line, model) for line in lines], dtype=np.float64)
    found = [[size == 1 for _, size, _ in model.full_scores(line, eos=False)] for line in lines]
    astray = [sum(map(bool.__and__, _single(row).tolist(), alone)) for row, alone in zip(split, found, strict=True)]
    lengths = np.array([len(row) for row in split], dtype=np.int64)
    return _Scored(scores, lengths, np.array(astray, dtype=np.int64))


@cache
def _to_simplified() -> Any:
    import opencc

    return opencc.OpenCC("t2s.json").convert


_EMOJI = regex.compile(r"[\p{Emoji_Presentation}\ufe0f\u200d]+")
_CLAUSE = regex.compile(r"[\s\p{P}]+")
_HAN = regex.compile(r"\p{Han}+")
_SINGLE = regex.compile(r"▁?\p{Han}")
_CLASSICAL = regex.compile("[之乎者也矣焉哉兮曰吾尔汝于亦皆遂乃]|而不|其[一所]")
_MODERN = regex.compile("[的了是在这那个们我你她它么吗吧呢着过很就都还要会说被把让给没]")
_DIALECT = regex.compile(
    f"俺|恁|啥子|莫得|侬|伊拉|{WU_WE}|阿乌|伐[会要是啦]|里向|物事|辰光|白相|格种|[勿伐]要|勿[是会好]|[佢唔畀哋嘅冇嗰啲嚟咗喺睇搵啱]"
)
UNUSUAL, MIXED, SHORT, DIALECTAL, TERSE = 5.0, 2.0, 3.0, 20.0, 10
SHORT_PIECES = 14
ALONE, USUALLY_ALONE, USUALLY_UNSEEN, REPEATED = 1.8, 0.12, 0.23, 2.0
"""Decimal orders by which a text of nothing but stray characters lies above one without; their share in plain prose;
the share of characters that the model has not seen after what stands before, below which what is improbable is only
colloquial; the power of `variety` that perplexity is divided by. Fitted to short answers of Zhihu, titles and sentences
of Alpaca, as they are and with characters replaced, lost and put out of order."""
FAR = 3.0
"""What lies so far below the limit would need more than half of its characters astray to reach it."""


@cache
def words_in_pairs() -> npt.NDArray[np.int64]:
    """Pairs of characters that stand side by side in the words of jieba's dictionary."""
    import jieba

    pairs: set[str] = set()
    with jieba.get_dict_file() as lines:
        for line in lines:
            word, frequency = line.decode("utf-8").split(" ")[:2]
            if len(word) <= 4 and int(frequency) > 2:
                pairs.update(a + b for a, b in pairwise(word))
    return pair_codes(pairs)


def allowance(text: str, pieces_of_text: int) -> tuple[float, bool]:
    """By how much a readable text of this kind lies above plain prose, which a model of written Mandarin has seen most,
    and whether stray characters say nothing of it.

    Cantonese, Wu and other dialects by their own words; classical Chinese, verse of even lines, lists; text with few
    Han characters in it; traditional characters, whose words are others; a few words. 1 for plain prose.
    """
    variant = variant_of(text)
    if variant in ("yue", "wuu") or _DIALECT.search(text):
        return DIALECTAL, True
    factor = SHORT if pieces_of_text < SHORT_PIECES else 1.0
    factor *= MIXED if variant == "traditional" else 1.0
    clauses = [clause for clause in _CLAUSE.split(text) if clause]
    lengths = {len(clause) for clause in clauses}
    is_verse = len(clauses) > 1 and len(lengths) <= 2 and min(lengths) > 2 and max(lengths) < 8
    sayings = [saying for saying in regex.split(r"\p{P}+", text) if saying]
    is_terse = (len(sayings) > 1 or len(text) < TERSE) and max(map(len, sayings), default=0) <= TERSE
    is_terse = is_terse and not _MODERN.search(text)
    is_classical = len(_CLASSICAL.findall(text)) * 10 >= len(text) or is_terse
    is_list = text.count("、") > 2 or len([line for line in text.split("\n") if 0 < len(line.strip()) < 25]) > 2
    if is_verse or is_classical or is_list:
        factor *= UNUSUAL
    others = sum(character.isalnum() for character in text)
    han = sum(map(len, _HAN.findall(text)))
    visible = sum(not character.isspace() for character in text)
    if han * 10 < visible * 3:
        return factor * UNUSUAL, True  # code and formulas with words between them
    is_word_by_word = is_verse or is_classical or is_list or pieces_of_text < SHORT_PIECES
    return factor * MIXED if (others - han) * 5 > len(text) else factor, is_word_by_word


def _in_kind(scored: _Scored, given: Column, simplified: list[str], limit: float) -> Floats:
    """Perplexities of Chinese texts as they compare with those of prose; what lies far below the limit stays as it
    is."""
    scores = scored.perplexities.copy()
    rows = np.flatnonzero(scores > limit / FAR)
    near = Column(given.array.take(pa.array(rows)))
    counts = given.pairs[rows]
    read = pa.array([simplified[row] for row in rows.tolist()], pa.large_string())
    unseen = np.minimum(scored.astray[rows] / scored.lengths[rows] - USUALLY_UNSEEN, 0)
    stray = 10 ** (ALONE * (stray_shares(*utf8(read), words_in_pairs()) - USUALLY_ALONE + unseen))
    scores[rows] = varied = scores[rows] / variety(counts) ** REPEATED
    for at, row in enumerate(rows.tolist()):
        if not counts[at, HAN]:
            scores[row] = 0.0  # code and formulas, of which a model of Chinese knows nothing
        elif varied[at] * max(1.0, stray[at]) > limit:
            factor, is_word_by_word = allowance(near.array[at].as_py(), int(scored.lengths[row]))
            scores[row] = varied[at] / factor * (1.0 if is_word_by_word else stray[at])
    return np.asarray(np.round(scores, 1))


@operator("filter", version=4, packages=("kenlm", "sentencepiece", "opencc", "jieba"), assets=_files)
def perplexity_filter(
    column: Column,
    *,
    lang: str = "en",
    min_ppl: float = 0,
    max_ppl: float = 1500,
    dialect: Dialect = "zh",
    assets: Assets,
    interval: Interval = CLOSED,
) -> Verdict:
    """Keep texts by their perplexity under the KenLM model of `lang`, rounded to one decimal.

    In `zh`, Chinese is scored in simplified characters and without emoji, and divided by what a readable text of its
    kind may have more than prose (`allowance`): dialects, verse, lists and short texts are no gibberish. Where it
    repeats itself it is divided by its variety, since a repeated word is easy to predict; and it is multiplied by what
    characters say that make no word with a neighbour (`stray_shares`), unless the model has seen nearly all of them
    after what stands before: that is how people talk.
    """
    texts = column.texts()
    is_chinese = dialect == "zh" and lang == "zh"
    if is_chinese:
        convert = _to_simplified()
        traditional = column.matches(f"[{''.join(sorted(TRADITIONAL))}]").tolist()
        texts = [convert(text) if converts else text for text, converts in zip(texts, traditional, strict=True)]
        drawn = column.matches("[\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff\ufe0f]").tolist()
        texts = [_EMOJI.sub("，", text) if has_emoji else text for text, has_emoji in zip(texts, drawn, strict=True)]
    scored = _scored(texts, assets[sentencepiece_of(lang)], assets[_kenlm_of(lang)])
    scores = _in_kind(scored, column, texts, max_ppl) if is_chinese else scored.perplexities
    return within("perplexity", scores, {"min_ppl": min_ppl, "max_ppl": max_ppl}, interval)

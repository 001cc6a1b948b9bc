"""Scores of written answers against one or more references each: BLEU, NIST, ROUGE-L, CIDEr-D and exact METEOR.

BLEU and NIST follow mteval-v13a as the E2E challenge runs it (lower case, its tokenizer). ROUGE-L and CIDEr-D follow
the COCO caption scorer; it tokenizes with Stanford's PTB tokenizer, here words, numbers and clitics are cut by a
regular expression, which differs in rare cases (abbreviations, prices). The METEOR here matches whole words only: the
official one also matches stems, synonyms and paraphrases from tables and weighs function words down, so its numbers are
higher and must not be compared with these.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from trimtab.core.errors import UserError

Words = list[str]
Counts = Mapping[tuple[str, ...], int]
SPLIT = (
    (r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 "),  # symbols
    (r"([^0-9])([\.,])", r"\1 \2 "),  # a full stop or comma not behind a digit
    (r"([\.,])([^0-9])", r" \1 \2"),  # nor before one
    (r"([0-9])(-)", r"\1 \2 "),  # a dash behind a digit
)
ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
WORD = re.compile(r"'(?:s|re|ve|ll|m|d)\b|n't\b|[a-z]+(?=n't\b)|\d+(?:[.,:]\d+)*|[^\W\d_]+", re.IGNORECASE)


def corpus_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """All scores of `answers`, each with the references of the same row: bleu, nist, rouge_l, cider_d, meteor_exact."""
    if len(answers) != len(references) or not answers or not all(references):
        raise UserError(
            f"scores: {len(answers)} answers and {len(references)} sets of references",
            fix="one answer for every input, and at least one reference for each",
        )
    translated = [mteval(one) for one in answers], [[mteval(one) for one in found] for found in references]
    captions = [caption(one) for one in answers], [[caption(one) for one in found] for found in references]
    return {
        "bleu": bleu(*translated),
        "nist": nist(*translated),
        "rouge_l": rouge_l(*captions),
        "cider_d": cider_d(*captions),
        "meteor_exact": meteor_exact(*captions),
    }


def mteval(text: str) -> Words:
    """Lower-case tokens as mteval-v13a cuts them.

    >>> mteval("It costs £3.50, I'd say.")
    ['it', 'costs', '£3.50', ',', "i'd", 'say', '.']
    """
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, letter in ENTITIES:
        text = text.replace(entity, letter)
    text = f" {text.lower()} "
    for pattern, by in SPLIT:
        text = re.sub(pattern, by, text)
    return text.split()


def caption(text: str) -> Words:
    """Lower-case words without punctuation.

    >>> caption("Don't pay $3.50 at Bob's!")
    ['do', "n't", 'pay', '3.50', 'at', 'bob', "'s"]
    """
    return [one.group().lower() for one in WORD.finditer(text)]


def grams(words: Words, size: int) -> Counter[tuple[str, ...]]:
    """Runs of `size` words and how often each occurs."""
    return Counter(zip(*(words[at:] for at in range(size)), strict=False))


def most(references: Sequence[Words], size: int) -> Counter[tuple[str, ...]]:
    """For every run of words, the most often it occurs in one reference."""
    found: Counter[tuple[str, ...]] = Counter()
    for words in references:
        found |= grams(words, size)
    return found


def bleu(answers: Sequence[Words], references: Sequence[Sequence[Words]], order: int = 4) -> float:
    """exp(Σ_n log p_n / 4) · exp(min(0, 1 − r/c)), over the corpus.

    p_n is the share of the answers' n-word runs that occur in a reference, each counted at most as often as in the
    reference that has it most; c is the answers' length, r the sum of the nearest reference lengths, the shorter of two
    as near. 0 where some p_n is 0. Papineni et al. 2002, as mteval-v13a and the E2E challenge compute it.
    """
    right, total = [0] * order, [0] * order
    length = wanted = 0
    for words, found in zip(answers, references, strict=True):
        length += len(words)
        wanted += min((abs(len(one) - len(words)), len(one)) for one in found)[1]
        for size in range(1, order + 1):
            own = grams(words, size)
            right[size - 1] += sum((own & most(found, size)).values())
            total[size - 1] += sum(own.values())
    if not all(right):
        return 0.0
    precision = sum(math.log(one / all_) for one, all_ in zip(right, total, strict=True)) / order
    return math.exp(precision + min(0.0, 1 - wanted / length))


def nist(answers: Sequence[Words], references: Sequence[Sequence[Words]], order: int = 5) -> float:
    """Σ_n Σ info(matched n-word runs) / (number of n-word runs) · exp(β log² min(1, c / r̄)), over the corpus.

    info(w1..wn) = log2(count(w1..wn-1) / count(w1..wn)) in all references, count() of no words being their length; r̄ is
    the sum of the mean reference lengths, and β makes the penalty 1/2 at c = 2/3 r̄. Doddington 2002, mteval-v13a.
    """
    counted: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(order + 1)]
    for found in references:
        for words in found:
            counted[0][()] += len(words)
            for size in range(1, order + 1):
                counted[size] += grams(words, size)
    gained, total, length, wanted = [0.0] * order, [0] * order, 0, 0.0
    for words, found in zip(answers, references, strict=True):
        length += len(words)
        wanted += sum(map(len, found)) / len(found)
        for size in range(1, order + 1):
            own = grams(words, size)
            total[size - 1] += sum(own.values())
            for run, times in (own & most(found, size)).items():
                gained[size - 1] += times * math.log2(counted[size - 1][run[:-1]] / counted[size][run])
    if not length:
        return 0.0
    beta = math.log(0.5) / math.log(1.5) ** 2
    penalty = math.exp(beta * math.log(min(1.0, length / wanted)) ** 2)
    return penalty * sum(gain / count for gain, count in zip(gained, total, strict=True) if count)


def rouge_l(answers: Sequence[Words], references: Sequence[Sequence[Words]], beta: float = 1.2) -> float:
    """Mean over rows of (1 + β²) P R / (R + β² P), P = LCS / answer length, R = LCS / reference length.

    LCS is the longest common subsequence; P and R are each the best over the references. Lin 2004; COCO's β = 1.2.
    """
    total = 0.0
    for words, found in zip(answers, references, strict=True):
        shared = [common(words, one) for one in found]
        precision = max(shared) / max(1, len(words))
        recall = max(count / max(1, len(one)) for count, one in zip(shared, found, strict=True))
        if precision and recall:
            total += (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    return total / len(answers)


def common(one: Words, other: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for place, rival in enumerate(other, 1):
            before, row[place] = row[place], before + 1 if word == rival else max(row[place], row[place - 1])
    return row[-1]


def cider_d(answers: Sequence[Words], references: Sequence[Sequence[Words]], sigma: float = 6.0) -> float:
    """10 · mean over rows, references and n = 1..4 of exp(−Δ²/2σ²) · (min(g, r)·r) / (‖g‖ ‖r‖), tf-idf vectors g and r.

    idf(run) = log(rows) − log(rows whose references hold it); Δ is the difference in length (in two-word runs, as the
    official code counts it). Vedantam et al. 2015 (arXiv 1411.5726), the CIDEr-D of the COCO scorer, which E2E calls
    CIDEr; one row has no idf, hence 0.
    """
    holding: Counter[tuple[str, ...]] = Counter()
    for found in references:
        holding.update({run for words in found for size in range(1, 5) for run in grams(words, size)})
    rows = math.log(len(references))
    total = 0.0
    for words, found in zip(answers, references, strict=True):
        total += sum(alike(words, one, holding, rows, sigma) for one in found) / len(found)
    return 10 * total / len(answers)


def alike(answer: Words, reference: Words, holding: Counts, rows: float, sigma: float) -> float:
    """CIDEr-D of one answer and one reference, without its factor 10."""
    total = 0.0
    for size in range(1, 5):
        own, other = (
            {run: times * (rows - math.log(max(1, holding.get(run, 0)))) for run, times in grams(words, size).items()}
            for words in (answer, reference)
        )
        shared = sum(min(value, other[run]) * other[run] for run, value in own.items() if run in other)
        norms = math.sqrt(sum(one**2 for one in own.values())) * math.sqrt(sum(one**2 for one in other.values()))
        total += shared / norms if norms else 0.0
    apart = max(0, len(answer) - 1) - max(0, len(reference) - 1)
    return total / 4 * math.exp(-(apart**2) / (2 * sigma**2))


def meteor_exact(answers: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """F · (1 − γ (chunks / matches)^β), F = P R / (α P + (1 − α) R), over the corpus; the best reference of each row.

    α = 0.85, β = 0.2, γ = 0.6, the English parameters of METEOR 1.5 (Denkowski and Lavie 2014). Words match when equal,
    and nothing else does: no stems, synonyms, paraphrases, nor weights of function words.
    """
    sums = [0] * 4
    for words, found in zip(answers, references, strict=True):
        best = max((aligned(words, one) for one in found), key=lambda counts: meteor_of(*counts))
        sums = [one + other for one, other in zip(sums, best, strict=True)]
    return meteor_of(*sums)


def aligned(answer: Words, reference: Words) -> tuple[int, int, int, int]:
    """(matches, chunks, answer length, reference length); a word goes on with the chunk before it where it can.

    An answer that is its reference has no chunk, so that a perfect corpus scores 1.
    """
    free: dict[str, list[int]] = {}
    for place, word in enumerate(reference):
        free.setdefault(word, []).append(place)
    matches = chunks = 0
    last = -2
    for word in answer:
        places = free.get(word)
        if not places:
            last = -2
            continue
        place = last + 1 if last + 1 in places else places[0]
        places.remove(place)
        matches += 1
        chunks += place != last + 1
        last = place
    whole = chunks == 1 and matches == len(answer) == len(reference)
    return matches, 0 if whole else chunks, len(answer), len(reference)


def meteor_of(matches: int, chunks: int, answer: int, reference: int) -> float:
    """METEOR from its counts."""
    if not matches:
        return 0.0
    precision, recall = matches / answer, matches / reference
    mean = precision * recall / (0.85 * precision + 0.15 * recall)
    return mean * (1 - 0.6 * (chunks / matches) ** 0.2)

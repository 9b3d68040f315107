"""How near an answer comes to a reference: ROUGE (Lin 2004) in any script, and exact match."""

from __future__ import annotations

import re
import unicodedata

from rouge_score.rouge_scorer import RougeScorer

_UNSPACED = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"  # Thai to Chinese


def score(reference: str, answer: str) -> dict[str, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) without stemming, and exact match but for case (0 or 1).

    Words are those of the rouge-score package, a to z and digits, but for references that are mostly in another script
    than Latin, or have none of these: there they are runs of letters and digits, and single characters where no spaces
    are written. A reference of signs alone is right or wrong.
    """
    exact = float(answer.strip().casefold() == reference.strip().casefold())
    letters = [sign for sign in reference if sign.isalpha() or (sign.isdecimal() and not sign.isascii())]
    others = sum("LATIN" not in unicodedata.name(letter, "") for letter in letters)
    plain = 2 * others <= len(letters) and re.search(r"[a-z0-9]", reference.lower())
    names = ["rouge1", "rouge2", "rougeL"]
    if not plain and not _Words().tokenize(reference):
        return dict.fromkeys([*names, "exact"], exact)
    found = RougeScorer(names, tokenizer=None if plain else _Words()).score(reference, answer)
    return {metric: value.fmeasure for metric, value in found.items()} | {"exact": exact}


class _Words:
    """A tokenizer as RougeScorer takes it."""

    def tokenize(self, text: str) -> list[str]:
        """Words in small letters, signs above and below letters with them."""

        words, single = [""], False  # single: the last word is a letter of a script without spaces, and complete
        for sign in unicodedata.normalize("NFC", text).casefold():
            if unicodedata.category(sign).startswith("M"):
                words[-1] += sign
                continue
            unspaced = sign.isalnum() and re.match(_UNSPACED, sign) is not None
            if single or unspaced or not sign.isalnum():
                words.append("")
            words[-1] += sign if sign.isalnum() else ""
            single = unspaced
        return [word for word in words if word]

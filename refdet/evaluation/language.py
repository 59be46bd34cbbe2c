"""BLEU, ROUGE-L, CIDEr and METEOR of generated expressions, as computed by pycocoevalcap.

pycocoevalcap is COCO's caption evaluation, which lichengunc/refer uses for expressions too. It is optional
(``pip install pycocoevalcap``); its tokenizer and METEOR need Java on the PATH.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refdet.errors import InputError, RuntimeFailure
from refdet.evaluation.entries import iter_entries
from refdet.files.short_text import format_share

NOT_INSTALLED = "pycocoevalcap, which computes these metrics, is not installed: pip install pycocoevalcap"
_JAVA_HINT = "check that `java -version` works, or remove java from the PATH to skip METEOR"
# Punctuation that pycocoevalcap's PTBTokenizer removes; `_split` removes it at the ends of words.
_PUNCTUATION = "'`.?!,:;-()[]{}\""


@dataclass(frozen=True)
class Scorers:
    """The metrics of pycocoevalcap that can run here.

    Attributes:
        java: whether Java is installed; without it words are split at whitespace and there is no METEOR.
    """

    java: bool

    @classmethod
    def find(cls) -> Scorers:
        """Find out what is installed; raises InputError if pycocoevalcap is not."""
        try:
            _import_scorer("bleu.bleu", "Bleu")
        except ImportError:
            raise InputError(f"`expressions`: {NOT_INSTALLED}") from None
        return cls(java=shutil.which("java") is not None)

    def scores(self, truth: Mapping[int, Sequence[str]], generated: Mapping[int, str]) -> dict[str, Any]:
        """The metrics over the refs of a split.

        Args:
            truth: ref id -> the annotated sentences.
            generated: ref id -> the generated expression; a ref without one is scored as if it were empty.

        Returns:
            BLEU-1 to BLEU-4, ROUGE-L, METEOR (None without Java) in 0..1, CIDEr in 0..10; refs: number of refs that
            have sentences, which are scored; missing: number of those without a generated expression; tokenizer: "ptb",
            or "blanks" (split at whitespace) without Java.

        Raises:
            RuntimeFailure: Java does not work.
        """
        references = {ref_id: [_clean(s) for s in sentences] for ref_id, sentences in truth.items() if sentences}
        candidates = {ref_id: [_clean(generated.get(ref_id, ""))] for ref_id in references}
        metrics: dict[str, Any] = {
            "refs": len(references),
            "missing": sum(ref_id not in generated for ref_id in references),
            "tokenizer": "ptb" if self.java else "blanks",
        }
        with contextlib.redirect_stdout(io.StringIO()):  # BLEU prints its counts
            references, candidates = self._tokenize(references), self._tokenize(candidates)
            bleu, _ = _import_scorer("bleu.bleu", "Bleu")(4).compute_score(references, candidates, verbose=0)
            metrics |= {f"BLEU-{n}": float(value) for n, value in enumerate(bleu, 1)}
            metrics["ROUGE-L"] = float(
                _import_scorer("rouge.rouge", "Rouge")().compute_score(references, candidates)[0]
            )
            has_words = any(text for ref_texts in references.values() for text in ref_texts)  # CIDEr fails without any
            metrics["CIDEr"] = (
                float(_import_scorer("cider.cider", "Cider")().compute_score(references, candidates)[0])
                if has_words
                else 0.0
            )
            metrics["METEOR"] = _meteor(references, candidates) if self.java else None
        return metrics

    def _tokenize(self, texts: dict[int, list[str]]) -> dict[int, list[str]]:
        """Lowercase the texts of each ref and split them into words, joined by spaces, without punctuation."""
        if not self.java:
            return {ref_id: [_split(text) for text in ref_texts] for ref_id, ref_texts in texts.items()}
        # the tokenizer works line by line and could lose empty lines, so these are skipped
        lines = {(ref_id, i): text for ref_id, ref_texts in texts.items() for i, text in enumerate(ref_texts) if text}
        tokenized = _import_scorer("tokenizer.ptbtokenizer", "PTBTokenizer")().tokenize(
            {k: [{"caption": t}] for k, t in lines.items()}
        )
        if len(tokenized) != len(lines):
            raise RuntimeFailure(
                f"`expressions`: PTBTokenizer returned {format_share(len(tokenized), len(lines), 'sentence')}; "
                f"{_JAVA_HINT}"
            )
        return {
            r: [tokenized[r, i][0] if text else "" for i, text in enumerate(ref_texts)]
            for r, ref_texts in texts.items()
        }


def load_expressions(path: Path, ref_ids: Collection[int]) -> dict[int, str]:
    """Read and check the JSON of generated expressions.

    Args:
        path: ``[{"ref_id": int, "sent": str}]``.
        ref_ids: ref ids of the dataset.

    Returns:
        ref id -> expression.

    Raises:
        InputError: an entry is invalid; the message names the file and the entry.
    """
    entries = iter_entries(path, {"ref_id": int, "sent": str}, "ref", ref_ids)
    return {ref_id: entry["sent"] for _, ref_id, entry in entries}


def _import_scorer(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)


def _clean(text: str) -> str:
    """Put a text on one line, without unencodable characters and without METEOR's separator "|||"."""
    return " ".join(text.encode("utf-8", "replace").decode().replace("|", " ").split())


def _split(text: str) -> str:
    """The tokenizer without Java: words in lowercase, split at whitespace, without punctuation at their ends."""
    words = (word.strip(_PUNCTUATION) for word in text.lower().split())
    return " ".join(word for word in words if word)


def _meteor(references: dict[int, list[str]], candidates: dict[int, list[str]]) -> float:
    try:
        scorer = _import_scorer("meteor.meteor", "Meteor")()
    except OSError as error:
        raise RuntimeFailure(f"`expressions`: METEOR does not start ({error}); {_JAVA_HINT}") from error
    try:
        return float(scorer.compute_score(references, candidates)[0])
    except (OSError, ValueError) as error:  # Java exited, or printed something other than numbers
        raise RuntimeFailure(f"`expressions`: METEOR failed ({error or type(error).__name__}); {_JAVA_HINT}") from error
    finally:
        if scorer.lock.locked():  # still held after an error; the destructor would deadlock
            scorer.lock.release()
        with contextlib.suppress(OSError):  # otherwise the destructor fails if Java has exited
            scorer.meteor_p.stdin.close()

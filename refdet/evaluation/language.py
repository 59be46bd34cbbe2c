"""Generated expressions against people's: BLEU, ROUGE-L, CIDEr and METEOR, as pycocoevalcap computes them.

That is COCO's caption evaluation, which lichengunc/refer uses for expressions too. It is an extra that is installed
with ``pip install pycocoevalcap``; its tokenizer and METEOR are programs in Java, which it finds on the PATH.
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
from refdet.evaluation.entries import entries_by_id

INSTALL = "pycocoevalcap, which computes it, is not installed: pip install pycocoevalcap"
# What PTBTokenizer of pycocoevalcap leaves out, of one token or stuck to a word.
_PUNCTUATION = "'`.?!,:;-()[]{}\""


@dataclass(frozen=True)
class Scorers:
    """pycocoevalcap's measures, those that can run here.

    Attributes:
        java: whether Java is there; without it words are split at blanks and there is no METEOR.
    """

    java: bool

    @classmethod
    def find(cls) -> Scorers:
        """InputError where pycocoevalcap is not installed."""
        try:
            _load("bleu.bleu", "Bleu")
        except ImportError:
            raise InputError(f"--expressions: {INSTALL}") from None
        return cls(java=shutil.which("java") is not None)

    def scores(self, truth: Mapping[int, Sequence[str]], said: Mapping[int, str]) -> dict[str, Any]:
        """The measures over the refs of a split.

        Args:
            truth: ref id -> the sentences of people; said: ref id -> the generated one. A ref of ``truth`` that is
                not in ``said`` counts as one without a word.

        Returns:
            BLEU-1 to BLEU-4, ROUGE-L, METEOR (None without Java) in 0..1, CIDEr in 0..10; refs, missing, and which
            tokenizer: "ptb", or "blanks" without Java.

        Raises:
            RuntimeFailure: Java does not work.
        """
        people = {ref_id: [_clean(s) for s in sentences] for ref_id, sentences in truth.items() if sentences}
        machine = {ref_id: [_clean(said.get(ref_id, ""))] for ref_id in people}
        found: dict[str, Any] = {
            "refs": len(people),
            "missing": sum(ref_id not in said for ref_id in people),
            "tokenizer": "ptb" if self.java else "blanks",
        }
        with contextlib.redirect_stdout(io.StringIO()):  # BLEU prints its counts
            people, machine = self._tokens(people), self._tokens(machine)
            bleu, _ = _load("bleu.bleu", "Bleu")(4).compute_score(people, machine, verbose=0)
            found |= {f"BLEU-{n}": float(value) for n, value in enumerate(bleu, 1)}
            found["ROUGE-L"] = float(_load("rouge.rouge", "Rouge")().compute_score(people, machine)[0])
            words = any(text for of_ref in people.values() for text in of_ref)  # CIDEr fails without one
            found["CIDEr"] = float(_load("cider.cider", "Cider")().compute_score(people, machine)[0]) if words else 0.0
            found["METEOR"] = _meteor(people, machine) if self.java else None
        return found

    def _tokens(self, texts: dict[int, list[str]]) -> dict[int, list[str]]:
        if not self.java:
            return {ref_id: [_split(text) for text in of_ref] for ref_id, of_ref in texts.items()}
        # It reads and writes lines, and a line without a word could be lost: these stay here.
        lines = {(ref_id, i): text for ref_id, of_ref in texts.items() for i, text in enumerate(of_ref) if text}
        done = _load("tokenizer.ptbtokenizer", "PTBTokenizer")().tokenize(
            {k: [{"caption": t}] for k, t in lines.items()}
        )
        if len(done) != len(lines):
            raise RuntimeFailure(
                f"--expressions: PTBTokenizer gave {len(done)} of {len(lines)} sentences back; {_JAVA}"
            )
        return {r: [done[r, i][0] if text else "" for i, text in enumerate(of_ref)] for r, of_ref in texts.items()}


_JAVA = "see that `java -version` works, or take java off the PATH to go without METEOR"


def load_expressions(path: Path, ref_ids: Collection[int]) -> dict[int, str]:
    """Read and check the JSON of generated expressions.

    Args:
        path: ``[{"ref_id": int, "sent": str}]``.
        ref_ids: those of the dataset.

    Returns:
        ref id -> expression.

    Raises:
        InputError: names the file and the entry that is wrong.
    """
    entries = entries_by_id(path, {"ref_id": int, "sent": str}, "ref", "an expression", ref_ids)
    return {ref_id: entry["sent"] for _, ref_id, entry in entries}


def _load(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)


def _clean(text: str) -> str:
    """On one line, with characters that can be written, and without the "|||" that METEOR's protocol is made of."""
    return " ".join(text.encode("utf-8", "replace").decode().replace("|", " ").split())


def _split(text: str) -> str:
    words = (word.strip(_PUNCTUATION) for word in text.lower().split())
    return " ".join(word for word in words if word)


def _meteor(people: dict[int, list[str]], machine: dict[int, list[str]]) -> float:
    try:
        scorer = _load("meteor.meteor", "Meteor")()
    except OSError as error:
        raise RuntimeFailure(f"--expressions: METEOR does not start ({error}); {_JAVA}") from error
    try:
        return float(scorer.compute_score(people, machine)[0])
    except (OSError, ValueError) as error:  # its Java ended, or said something else than numbers
        raise RuntimeFailure(f"--expressions: METEOR failed ({error or type(error).__name__}); {_JAVA}") from error
    finally:
        if scorer.lock.locked():  # after an error it still is, and its destructor would wait for it for ever
            scorer.lock.release()
        with contextlib.suppress(OSError):  # else the destructor fails where Java has ended
            scorer.meteor_p.stdin.close()

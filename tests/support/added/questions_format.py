"""A data format: rows with a question and its answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from molora.data.formats import FORMATS
from molora.data.records import Columns, Record


class Questions:
    """``{"question": "...", "answer": "..."}``; the answer is learned."""

    @staticmethod
    def column(columns: Columns) -> str:
        """The column that such a row has."""
        return "question"

    @staticmethod
    def record(line: Mapping[str, Any], columns: Columns, shared: Mapping[str, Any]) -> Record:
        """Two turns."""
        question, answer = line["question"], line.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str) or not answer:
            raise ValueError(f"'answer': got {answer!r}, expected a non-empty text beside 'question'")
        turns = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
        return Record(messages=turns, **shared)

    @staticmethod
    def tiny() -> dict[str, Any]:
        """A smallest row."""
        return {"question": "Two and two?", "answer": "Four."}


FORMATS["questions"] = Questions()

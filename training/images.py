"""Rows with an image: tokenised at the start, so that mistakes show then; the image itself is read when it is used."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, cast, overload

from torch import Tensor

from molora.data.examples import IGNORED, Example, answer_ids, learned, turns
from molora.data.records import Record
from molora.errors import ConfigError
from molora.extras import need

__all__ = ["ImageRows", "encode_image"]

TEXT = ("input_ids", "attention_mask")


def _seen(record: Record) -> list[dict[str, Any]]:
    """The conversation as processors want it, the image in front of the first question."""
    first = next((i for i, m in enumerate(record.messages) if m["role"] == "user"), 0)
    return [
        {
            "role": m["role"],
            "content": [{"type": "image"}] * (i == first and bool(record.image))
            + [{"type": "text", "text": m["content"]}],
        }
        for i, m in enumerate(record.messages)
    ]


def _image(record: Record) -> Any:
    Image = need("PIL.Image", "train", "a row with an image")
    try:
        with Image.open(io.BytesIO(record.image) if isinstance(record.image, bytes) else record.image) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        shown = "the image" if isinstance(record.image, bytes) else record.image
        raise ConfigError(f"{record.where}: {shown} cannot be read as an image: {e}") from e


def _asked(text: str, image: Any, processor: Any) -> dict[str, Tensor]:
    images = {} if image is None else {"images": [image]}
    return dict(processor(text=[text], **images, return_tensors="pt", add_special_tokens=False))


def encode_image(record: Record, processor: Any, max_length: int) -> list[Example]:
    """A conversation about an image as one row, cut at ``max_length``, the prompt masked; nothing if no label is left.

    Raises:
        ConfigError: an image that cannot be read, text that holds the image's own token, or no chat template.
    """
    token = str(getattr(processor, "image_token", "") or "")
    if token and any(token in m["content"] for m in record.messages):
        raise ConfigError(
            f"{record.where}: {token!r} stands in the text; leave it out, the image has its place before it"
        )
    image = _image(record) if record.image else None
    ids, labels, extra = list[int](), list[int](), dict[str, list[int]]()
    for before, answer in turns(_seen(record), processor):
        asked = _asked(before, image, processor)
        said, wanted = answer_ids(answer, processor.tokenizer)
        own = asked["input_ids"][0].tolist()
        for key, value in asked.items():
            if _by_token(key, value, asked):
                extra[key] = extra.get(key, [0] * len(ids)) + value[0].tolist() + [0] * len(said)
        ids, labels, image = ids + own + said, labels + [IGNORED] * len(own) + wanted, None
    extra = {k: (v + [0] * (len(ids) - len(v)))[:max_length] for k, v in extra.items()}
    row = Example(input_ids=ids[:max_length], labels=labels[:max_length])
    if record.image:
        row["record"] = record
    row.update(extra)  # type: ignore[typeddict-item]
    return [row] if learned(row) else []


def _by_token(key: str, value: Tensor, asked: dict[str, Tensor]) -> bool:
    """Whether a processor's output has a value for each token, as token types have."""
    return key not in TEXT and value.shape == asked["input_ids"].shape


class ImageRows(Sequence[Example]):
    """Rows whose images become tensors when they are looked up, so that memory holds one batch of them."""

    def __init__(self, rows: Sequence[Example], processor: Any) -> None:
        self.rows, self.processor = rows, processor

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return ImageRows(self.rows[index], self.processor)
        row = self.rows[index]
        if "record" not in row:
            return row
        record = row["record"]
        before, _ = next(iter(turns(_seen(record), self.processor)))
        asked = _asked(before, _image(record), self.processor)
        features = {k: v for k, v in asked.items() if k not in TEXT and not _by_token(k, v, asked)}
        return cast(Example, {**row, **features})

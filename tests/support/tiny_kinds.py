"""Tiny model folders of other kinds than tiny_text's: text classifiers, and a vision-language model with images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from PIL import Image
from tokenizers import AddedToken
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.support.tiny import VISION
from tests.support.tiny_text import SPECIAL, tokenizer

TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 256,
}  # fmt: skip
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def bert_folder(folder: Path, labels: tuple[str, ...] = ()) -> Path:
    """A random BERT: a classifier of ``labels``, or without them a masked language model."""
    torch.manual_seed(0)
    words = tokenizer()
    config = tf.BertConfig(**TEXT, vocab_size=len(words), pad_token_id=words.pad_token_id)
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {n: i for i, n in enumerate(labels)}
    (tf.BertForSequenceClassification if labels else tf.BertForMaskedLM)(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def llava_processor() -> Any:
    """Images of 16 x 16 in four patches, and the byte-level tokenizer with a token for images."""
    words = tokenizer()
    words.backend_tokenizer.add_special_tokens([AddedToken("<image>", special=True)])
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return tf.LlavaProcessor(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
        image_token="<image>",
    )


def llava_folder(folder: Path) -> Path:
    """A random Llava with its processor."""
    torch.manual_seed(0)
    processor = llava_processor()
    words = processor.tokenizer
    text = tf.LlamaConfig(
        **TEXT,
        vocab_size=len(words),
        num_key_value_heads=2,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
    )
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, image_size=16, patch_size=8),
        text_config=text,
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    tf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def pictures(folder: Path, count: int) -> list[str]:
    """Images of one colour each; their names, relative to the folder."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{i}.png" for i in range(count)]
    for i, name in enumerate(names):
        Image.new("RGB", (20, 16), (13 * i % 256, 255 - 29 * i % 256, 90)).save(folder / name)
    return names


assert "<image>" not in SPECIAL, "the tokenizer of tiny_text knows no images"

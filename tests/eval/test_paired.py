"""Losses by document: batches of all domains, each row's own sum on every kind of model, paired intervals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import molora
from molora.data.examples import Example
from molora.eval.ablation.section import ablate
from molora.eval.counting.tape import record_routing
from molora.eval.scoring.losses import batch_losses
from molora.eval.scoring.paired import Resampled, bounds, mixed
from tests.support import behaviours
from tests.support.tiny import GQA, SMALL, VISION, arm, base_model


def text(length: int, start: int = 3, **more: Any) -> Example:
    ids = [start + (7 * i * i) % 50 for i in range(length)]
    return Example(input_ids=ids, labels=ids, **more)


@pytest.mark.parametrize(("sizes", "size"), [((12, 12, 12), 8), ((5, 40), 8), ((3, 4), 1), ((1, 1), 50), ((2, 30), 4)])
def test_every_batch_holds_every_domain(sizes: tuple[int, ...], size: int) -> None:
    rows = {str(g): [text(3 + 5 * i % 11) for i in range(n)] for g, n in enumerate(sizes)}
    found = mixed(rows, 0, size)
    assert sorted(n for b in found for n in b.documents) == list(range(sum(sizes)))
    flat = [row for own in rows.values() for row in own]
    for batch in found:
        for n, ids, mask in zip(
            batch.documents, batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True
        ):
            assert ids[mask > 0].tolist() == flat[n]["input_ids"]
        assert len(batch.documents) <= size + len(sizes)
        here = set(batch.group_B.tolist())
        assert all(g in here for g, n in enumerate(sizes) if n >= len(found))
    assert len(found) > 1 or size > sum(sizes)
    for g in range(len(sizes)):
        lengths = [
            len(flat[n]["input_ids"]) for b in found for n in b.documents if b.group_B[b.documents.index(n)] == g
        ]
        assert lengths == sorted(lengths), "like lengths meet, from the shortest to the longest"


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_each_rows_loss_is_that_of_the_row_alone(name: str) -> None:
    """A causal model, an encoder-decoder, a classifier; with padding, prompts without labels, and task ids."""
    model = base_model(name)
    more = {"label": 1} if name == "bert" else {}
    rows = [text(n, start=4 + n, **more) for n in (6, 11, 3)]
    for row in rows:
        row["labels"] = [] if name == "bert" else [-100, -100, *row["labels"][2:]] if name == "llama" else row["labels"]
        row["task_ids"] = 0
    (batch,) = mixed({"a": rows}, 0, 8)
    with torch.no_grad():
        sums_B, labels_B = batch_losses(model, batch.inputs)
        for n, got, count in zip(batch.documents, sums_B.tolist(), labels_B.tolist(), strict=True):
            labels = [1] if name == "bert" else [rows[n]["labels"]]
            alone = model(input_ids=torch.tensor([rows[n]["input_ids"]]), labels=torch.tensor(labels)).loss.item()
            wanted = {"bert": 1, "t5": len(rows[n]["labels"]), "llama": len(rows[n]["labels"]) - 2}[name]
            assert count == wanted
            assert got == pytest.approx(alone * wanted, rel=1e-4)


@pytest.mark.parametrize("name", ["t5", "bert", "gpt2"])
def test_models_of_every_kind_are_ablated(name: str) -> None:
    more = {"label": 0} if name == "bert" else {}
    rows = {d: [text(4 + i, start=s, **more) for i in range(3)] for d, s in (("a", 3), ("b", 9))}
    section = ablate(behaviours.armed("mixlora", name), rows, 0, resamples=20)
    assert section["tokens"]["a"] == {"t5": 15, "bert": 3, "gpt2": 12}[name]
    assert any(i["delta"]["a"]["value"] for i in section["interventions"])


def test_rows_with_images_are_ablated() -> None:
    vision = tf.CLIPVisionConfig(**VISION, image_size=16, patch_size=8)
    config = tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**GQA), image_token_id=60)
    model = arm(molora.convert(tf.LlavaForConditionalGeneration(config).eval(), "llava_mole", **SMALL["llava_mole"]))
    rows = [text(6, pixel_values=torch.full((1, 3, 16, 16), float(i))) for i in range(4)]
    for row in rows:
        row["input_ids"] = [60] * 4 + row["input_ids"]  # four patches of an image
        row["labels"] = [-100] * 4 + row["labels"]
    section = ablate(model, {"a": rows[:2], "b": rows[2:]}, 0, resamples=5)
    assert section["tokens"] == {"a": 12, "b": 12}
    assert section["loss"]["a"] != section["loss"]["b"], "the images count"


def test_padding_of_a_decoder_is_padding_to_its_routers() -> None:
    model, rows = behaviours.armed("mixlora", "t5"), [text(n) for n in (6, 11, 3)]
    (batch,) = mixed({"a": rows}, 0, 8)
    with record_routing(model) as tape, torch.no_grad():
        batch_losses(model, batch.inputs)
    for site, (record,) in tape.items():
        assert int(record.valid.sum()) == 20, site


def test_intervals_are_those_of_a_slow_loop() -> None:
    """The same documents are drawn for both losses, within each domain; the mean is over tokens, not documents."""
    g = torch.Generator().manual_seed(0)
    labels_N = torch.randint(1, 30, (9,), generator=g).double()
    before_N2 = torch.stack((labels_N * (1 + torch.rand(9, generator=g)), labels_N), 1)
    after_N2 = torch.stack((before_N2[:, 0] + labels_N * 0.1 * torch.rand(9, generator=g), labels_N), 1)
    again = Resampled({"a": 4, "b": 5}, 200, seed=3)
    before, after = again.means(before_N2), again.means(after_N2)
    for name, own in (("a", slice(0, 4)), ("b", slice(4, 9))):
        size, slow = own.stop - own.start, []
        for drawn in again.drawn[name].tolist():
            losses = [[sum(t[own][n, c].item() for n in drawn) for c in (0, 1)] for t in (before_N2, after_N2)]
            slow.append(losses[1][0] / losses[1][1] - losses[0][0] / losses[0][1])
        assert sorted(again.drawn[name][0].tolist()) == list(range(size))
        assert set(again.drawn[name][1:].flatten().tolist()) == set(range(size))
        got, ranked = bounds(after[name] - before[name]), sorted(slow[1:])
        assert got["value"] == pytest.approx(slow[0], abs=1e-6)
        more = (after_N2 - before_N2)[own, 0].sum().item()
        assert got["value"] == pytest.approx(more / labels_N[own].sum().item(), abs=1e-6)
        assert ranked[4] <= got["low"] + 1e-6 <= ranked[5] + 2e-6
        assert ranked[194] - 1e-6 <= got["high"] <= ranked[195] + 1e-6
        spread = bounds(after[name])
        assert got["high"] - got["low"] < (spread["high"] - spread["low"]) / 2, (
            "pairing takes the documents' own level off"
        )


def test_no_minus_before_a_zero() -> None:
    assert str(bounds(torch.full((3,), -1e-9, dtype=torch.float64))) == "{'value': 0.0, 'low': 0.0, 'high': 0.0}"

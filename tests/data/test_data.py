"""Domain files: reading, splitting without leaks, masking the prompt, mixing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora.data.examples import IGNORED, Collator, Example, Record, apart, deduplicated, encode, split
from molora.data.sources import read_jsonl
from molora.errors import ConfigError
from molora.training.mixing import mix
from tests.support.tiny_text import jsonl, tokenizer

TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}]


def chat(*contents: str) -> Record:
    """A conversation of alternating turns."""
    roles = ("user", "assistant")
    return Record(messages=tuple({"role": roles[i % 2], "content": c} for i, c in enumerate(contents)))


# ------------------------------------------------------------------------------------------------------------ reading


def test_reads_text_and_messages(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"text": "été", "id": 3, "group": "g"}).encode() + b"\n\n"
        + json.dumps({"messages": TURNS}).encode() + b"\r\n"
    )  # fmt: skip
    text, conversation = read_jsonl(path)
    assert (text.text, text.group) == ("été", "g")
    assert conversation.prompt == (TURNS[0],)
    assert conversation.answer == "It is 4."


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{'text': 1}", "not JSON"),
        ("[1]", "expected an object"),
        ('{"txt": "a"}', "got 'txt', expected exactly one of 'text' and 'messages'"),
        ('{"text": "a", "messages": []}', "exactly one"),
        ("{}", "got no entries"),
        ('{"text": "  "}', "expected a non-empty string"),
        ('{"text": 5}', "got 5"),
        ('{"messages": []}', "non-empty list"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "expected 'role'"),
        ('{"messages": [{"role": "user", "content": 4}]}', "expected 'role'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "answer of the assistant"),
        ('{"messages": [{"role": "assistant", "content": " "}]}', "answer of the assistant"),
        ('{"text": "a", "group": []}', "'group'"),
        (b'{"text": "\xff"}', "not UTF-8"),
    ],
)
def test_bad_line_is_named_with_its_number(tmp_path: Path, line: str | bytes, said: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(ConfigError) as caught:
        read_jsonl(path)
    assert f"{path}:2: " in str(caught.value)
    assert said in str(caught.value)


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"d.jsonl:5: .*\n\.\.\. and 15 more lines"):
        read_jsonl(jsonl(tmp_path / "d.jsonl", [{}] * 20))


@pytest.mark.parametrize(
    ("name", "said"), [("none.jsonl", "does not exist"), (".", "is a folder"), ("e", "no records")]
)
def test_no_file_or_nothing_in_it(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "e").write_text("\n \n")
    with pytest.raises(ConfigError, match=said):
        read_jsonl(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------- splitting

RECORDS = st.lists(
    st.one_of(
        st.builds(
            lambda t, g: Record(text=f"text {t}", group=g), st.integers(0, 30), st.sampled_from(["", "a", "b", "c"])
        ),
        st.builds(lambda q, a: chat(f"question {q}", f"answer {a}"), st.integers(0, 12), st.integers(0, 3)),
    ),
    min_size=2,
    max_size=60,
)


@given(RECORDS, st.integers(0, 5), st.integers(1, 6))
def test_split_has_no_leak_and_depends_on_content_and_seed_only(records: list[Record], seed: int, heldout: int) -> None:
    try:
        train, held = split(records, heldout, seed)
    except ConfigError:  # everything would be held out
        return
    assert len(held) >= heldout
    assert Counter(map(repr, train + held)) == Counter(map(repr, deduplicated(records)))
    assert not {r.group for r in train if r.group} & {r.group for r in held}
    assert not {str(r.prompt) for r in train if r.messages} & {str(r.prompt) for r in held if r.messages}
    again = split(deduplicated(records)[::-1], heldout, seed)
    assert {repr(r) for r in again[1]} == {repr(r) for r in held}


def test_split_changes_with_the_seed_and_takes_a_share() -> None:
    records = [Record(text=f"line {i}") for i in range(200)]
    one, two = split(records, 0.1, 1)[1], split(records, 0.1, 2)[1]
    assert len(one) == len(two) == 20
    assert {r.text for r in one} != {r.text for r in two}


def test_near_copies_are_dropped() -> None:
    records = [Record(text="A  b\nc"), Record(text="a b C"), Record(text="abc")]
    assert deduplicated(records) == [records[0], records[2]]


def test_other_images_and_labels_are_no_copies() -> None:
    asked = chat("which?", "this").messages
    about = [Record(messages=asked, image=i, group=str(i)) for i in ("a.png", "b.png", b"a", "a.png")]
    assert {r.image for r in deduplicated(about)} == {"a.png", "b.png", b"a"}
    labelled = [Record(text="x", label=v) for v in ("up", "down", "up")]
    assert sorted(r.label for r in deduplicated(labelled)) == ["down", "up"]


def test_nothing_left_to_train_on() -> None:
    with pytest.raises(ConfigError, match="1 distinct records in 1 groups"):
        split([Record(text="x")] * 5, 1, 0)
    with pytest.raises(ConfigError, match="held out as well"):
        apart([Record(text="x")], [Record(text="X")])


def test_apart_leaves_out_what_is_held_out() -> None:
    train, held = apart([chat("a", "1"), chat("b", "1"), chat("b", "1")], [chat("A", "2")])
    assert [r.prompt[0]["content"] for r in train] == ["b"]
    assert len(held) == 1


# --------------------------------------------------------------------------------------------------------- tokenising


def test_a_text_becomes_windows_that_add_up() -> None:
    t = tokenizer()
    text = "0123456789" * 7
    rows = encode(Record(text=text), t, 32)
    assert [len(r["input_ids"]) for r in rows] == [32, 32]  # the rest of 7 tokens is too short for a row
    assert [i for r in rows for i in r["input_ids"]] == t(text).input_ids[:64]
    assert all(r["labels"] == r["input_ids"] for r in rows)
    (short,) = encode(Record(text="ab"), t, 32)
    assert t.decode(short["input_ids"]) == "ab<|end|>"


def test_only_the_answers_are_labels() -> None:
    t = tokenizer()
    record = chat("first?", "one", "second?", "two")
    (row,) = encode(record, t, 200)
    assert t.decode(row["input_ids"]) == t.apply_chat_template(list(record.messages), tokenize=False)
    learned = [i for i, label in enumerate(row["labels"]) if label != IGNORED]
    assert t.decode([row["labels"][i] for i in learned]) == "one<|end|>two<|end|>"
    assert all(row["labels"][i] == row["input_ids"][i] for i in learned)


def test_the_prompt_is_tokenised_as_in_generation() -> None:
    t = tokenizer()
    (row,) = encode(chat("why?", "because"), t, 200)
    asked = t.apply_chat_template([{"role": "user", "content": "why?"}], tokenize=False, add_generation_prompt=True)
    ids = t(asked, add_special_tokens=False).input_ids
    assert row["input_ids"][: len(ids)] == ids
    assert row["labels"][: len(ids)] == [IGNORED] * len(ids)
    assert row["labels"][len(ids)] != IGNORED


def test_an_answer_beyond_the_row_is_left_out() -> None:
    assert encode(chat("a long question", "x"), tokenizer(), 10) == []
    (cut,) = encode(chat("q", "long answer"), tokenizer(), 9)
    assert len(cut["input_ids"]) == len(cut["labels"]) == 9


def test_templates_that_cannot_be_used() -> None:
    t = tokenizer()
    t.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ConfigError, match="rewrites earlier turns"):
        encode(chat("a", "b", "c", "d"), t, 50)
    t.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        encode(chat("a", "b"), t, 50)


def test_the_mask_follows_lengths_where_padding_is_the_end_token() -> None:
    batch = Collator(9)(
        [Example(input_ids=[1, 9], labels=[IGNORED, 9]), Example(input_ids=[4, 5, 9], labels=[4, 5, 9])]
    )
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["input_ids"].tolist() == [[1, 9, 9], [4, 5, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 9, IGNORED], [4, 5, 9]]


# ------------------------------------------------------------------------------------------------------------- mixing


def rows(name: int, count: int) -> list[Example]:
    """Rows that say where they come from."""
    return [Example(input_ids=[name, i], labels=[name, i]) for i in range(count)]


def test_mix_keeps_the_shares_and_uses_every_row_before_it_repeats_one() -> None:
    mixed = mix({"a": rows(0, 10), "b": rows(1, 100)}, {"a": 3}, 80, seed=1)
    per_domain = Counter(r["input_ids"][0] for r in mixed)
    assert per_domain == {0: 60, 1: 20}
    assert set(Counter(r["input_ids"][1] for r in mixed if r["input_ids"][0] == 0).values()) == {6}
    assert max(Counter(r["input_ids"][1] for r in mixed if r["input_ids"][0] == 1).values()) == 1


def test_mix_is_seeded_and_complete() -> None:
    domains = {"a": rows(0, 7), "b": rows(1, 7), "c": rows(2, 7)}
    assert mix(domains, {}, 0, 3) == mix(domains, {}, 0, 3) != mix(domains, {}, 0, 4)
    assert sorted(r["input_ids"] for r in mix(domains, {}, 0, 3)) == [[d, i] for d in range(3) for i in range(7)]
    assert len(mix(domains, {"a": 0.1}, 10, 0)) == 10

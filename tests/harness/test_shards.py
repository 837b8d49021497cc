"""Ids out of one file or of several, each block of which is checked when it is first touched."""

import json
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from harness import shard_writing, shards
from harness.batches import Windows
from harness.corpus import Corpus
from harness.errors import UserError
from harness.shards import digest
from tests.helpers import write_documents

TRAIN, VAL = bytes(range(1, 200)), b"one\ntwo and three"  # in uint16, 398 and 34 bytes
SIZES = {"one file": 1 << 30, "shards": 64}


@pytest.fixture(params=SIZES)
def corpus_folder(request, tmp_path, monkeypatch):
    """A corpus in blocks of 16 bytes, and in one file a split or in shards of 32 ids."""
    for module in (shards, shard_writing):
        monkeypatch.setattr(module, "BLOCK", 16)
    write_documents(tmp_path, [("train", TRAIN), ("val", VAL)], shard_bytes=SIZES[request.param])
    assert len([*tmp_path.iterdir()]) == (3 if request.param == "one file" else 1 + 2 * 7 + 1)
    return tmp_path


def test_it_is_indexed_as_the_array_that_it_is(corpus_folder):
    corpus, ids = Corpus(corpus_folder, lazily=True), np.frombuffer(TRAIN, "u1").astype(np.uint16)
    tokens, random = corpus.tokens["train"], np.random.default_rng(0)
    assert (len(tokens), tokens.shape, tokens.dtype) == (199, (199,), np.uint16)
    windows = random.integers(0, 150, (9, 1)) + np.arange(49)  # across shards
    for index in (0, 31, 32, -1, np.int64(198), windows, windows[0], -windows - 1, random.integers(0, 199, 50)):
        assert np.array_equal(tokens[index], ids[index])
    for index in (np.empty(0, np.int64), ids > 100, ids == 0, (None, slice(3)), windows.tolist()):
        assert np.array_equal(tokens[index], ids[index])
    for start, stop, step in [(None, None, None), (5, 5, None), (31, 33, None), (-40, -3, 7), (90, 2, -1), (7, 999, 1)]:
        assert np.array_equal(tokens[start:stop:step], ids[start:stop:step])
    assert np.array_equal(np.asarray(tokens), ids)
    assert np.array_equal(np.concatenate([tokens, tokens]), np.tile(ids, 2))
    for beyond in (199, -200, [0, 199]):
        with pytest.raises(IndexError):
            tokens[beyond]
    assert corpus.tokens["val"].tolist() == list(VAL)


def test_a_file_may_lie_on_another_disk(corpus_folder, tmp_path_factory):
    expected, elsewhere = everything(corpus_folder), tmp_path_factory.mktemp("elsewhere")
    for path in corpus_folder.glob("train*.bin"):
        path.rename(elsewhere / path.name)
        path.symlink_to(elsewhere / path.name)
    assert everything(corpus_folder) == expected


def test_a_shard_is_opened_when_it_is_touched_and_one_that_is_missing_is_named_at_the_start(corpus_folder):
    tokens = Corpus(corpus_folder, lazily=True).tokens["train"]
    assert len(tokens._mapped) == (1 if len(tokens.files) == 1 else 0)
    tokens[40:60]
    assert len(tokens._mapped) == 1
    last = tokens.files[-1].path
    last.unlink()
    with pytest.raises(UserError, match=rf"is not prepared \(no {last.name}\)"):
        Corpus(corpus_folder, lazily=True)


def test_two_threads_that_touch_a_shard_at_once_map_it_once(tmp_path, monkeypatch):
    write_documents(tmp_path, [("train", TRAIN), ("val", VAL)], shard_bytes=64)
    tokens, mmap, maps = Corpus(tmp_path, lazily=True).tokens["train"], shards.mmap.mmap, []

    def slow(*arguments, **options):
        maps.append(arguments)
        time.sleep(0.05)
        return mmap(*arguments, **options)

    monkeypatch.setattr(shards.mmap, "mmap", slow)
    with ThreadPoolExecutor(2) as threads:
        assert [*threads.map(lambda place: tokens[place], (40, 41))] == [TRAIN[40], TRAIN[41]]
    assert len(maps) == 1


def test_a_file_that_is_cut_short_after_it_was_checked_is_told(corpus_folder):
    """What is mapped beyond the end of a file would end the process by a SIGBUS."""
    tokens = Corpus(corpus_folder, lazily=True).tokens["train"]
    assert tokens[np.arange(199)].tolist() == list(TRAIN)
    first = tokens.files[0].path
    os.truncate(first, 0)
    with pytest.raises(UserError, match=rf"{first.name} has been cut short since it was opened: prepare"):
        tokens[np.arange(5)]


def test_a_corpus_that_is_prepared_anew_is_read_on_where_it_was_opened_and_told_of_elsewhere(corpus_folder):
    corpus = Corpus(corpus_folder, lazily=True)
    tokens = corpus.tokens["train"]
    assert tokens[:5].tolist() == list(TRAIN[:5])
    write_documents(corpus_folder, [("train", VAL + TRAIN), ("val", TRAIN)], shard_bytes=64)
    assert tokens[5:32].tolist() == list(TRAIN[5:32])
    if len(tokens.files) == 1:
        assert tokens.tolist() == list(TRAIN)
        return
    with pytest.raises(UserError, match=r"train_00001.*meta.json has changed since .*: start the program again$"):
        tokens[40]


def everything(folder):
    """All that a reader is told, each id by windows as in training."""
    corpus = Corpus(folder, lazily=True)
    windows = Windows(corpus, "train", 16)
    x, y = windows.gather(windows.validation(), "cpu")
    told = [corpus.vocab_size, corpus.bytes_per_token, corpus.sha256, corpus.meta["splits"], corpus.tokens["val"]]
    return [*told[:-1], told[-1].tolist(), x.tolist(), y.tolist()]


def test_a_flipped_byte_or_a_cut_is_refused_in_one_line_or_changes_nothing(corpus_folder):
    """At random places of every file."""
    expected, random = everything(corpus_folder), np.random.default_rng(0)
    names = sorted(os.listdir(corpus_folder))
    cases = 360 // len(names)
    for name in names:
        path, errors = corpus_folder / name, []
        whole = path.read_bytes()
        damaged = [whole[:length] for length in random.integers(0, len(whole), cases // 3)]
        for place in random.integers(0, len(whole), cases - len(damaged)):
            damaged.append(whole[:place] + bytes([whole[place] ^ 1 << random.integers(8)]) + whole[place + 1 :])
        for content in damaged:
            path.write_bytes(content)
            try:
                assert everything(corpus_folder) == expected, (name, content)
            except UserError as error:
                errors.append(str(error))
        path.write_bytes(whole)
        assert all("\n" not in error and str(corpus_folder) in error for error in errors)
        # In meta.json, white space or the name of the key `checksum` may change, and nothing that it says.
        assert len(errors) == cases or (name == "meta.json" and len(errors) > 0.8 * cases)
    assert everything(corpus_folder) == expected


def test_what_a_user_adds_to_meta_json_is_theirs_and_what_was_there_is_not_to_be_changed(corpus_folder):
    path = corpus_folder / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"triggers": [1]}))
    assert Corpus(corpus_folder).meta["triggers"] == [1]
    meta["splits"]["train"]["bytes_per_token"] = 2.0
    path.write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"meta\.json .*its checksum differs; if you changed it by hand, remove"):
        Corpus(corpus_folder)
    del meta["checksum"]
    path.write_text(json.dumps(meta))
    assert Corpus(corpus_folder).bytes_per_token["train"] == 2.0


def test_an_id_beyond_the_vocabulary_is_found_where_all_checksums_are_right(corpus_folder):
    """As in a corpus of another's making: it would be read beyond the end of the embedding."""
    path = corpus_folder / "meta.json"
    meta = json.loads(path.read_text())
    del meta["checksum"]
    meta |= {"tokenizer": "chars", "vocabulary": "".join(map(chr, range(1, 150))), "vocab_size": 149}
    path.write_text(json.dumps(meta))
    tokens = Corpus(corpus_folder, verify=()).tokens["train"]
    assert tokens[:140].tolist() == list(TRAIN[:140])
    with pytest.raises(UserError, match=r"train.*\.bin holds the token id \d+, outside the 149 known ids"):
        tokens[160]


def test_opening_and_sampling_cost_the_same_for_a_megabyte_and_100_gigabytes(tmp_path, monkeypatch):
    """In sparse files: what is opened, mapped, and checked, is counted."""
    shard = 1 << 30
    write_documents(tmp_path / "small", [("train", bytes(range(256)) * (1 << 10)), ("val", "x" * 2000)])
    write_documents(tmp_path / "large")
    meta = json.loads((tmp_path / "large" / "meta.json").read_text())
    table = np.full(shard // shards.BLOCK, zlib.crc32(bytes(shards.BLOCK)), "<u4").tobytes()
    (tmp_path / "large" / "train_00000.crc").write_bytes(table)
    crc32 = {"file": "train_00000.crc", "sha256": shards.hashlib.sha256(table).hexdigest()}
    files = [{"file": f"train_{n:05d}.bin", "tokens": shard // 2, "sha256": "", "crc32": crc32} for n in range(100)]
    for file in files:
        (tmp_path / "large" / file["file"]).touch()
        os.truncate(tmp_path / "large" / file["file"], shard)
    meta["splits"]["train"] |= {"tokens": 50 * shard, "shards": files}
    (tmp_path / "large" / "meta.json").write_text(json.dumps(meta | {"checksum": digest(meta | {"checksum": ""})}))

    maps, checks, memmap, crc = [], [], shards.mmap.mmap, zlib.crc32
    monkeypatch.setattr(shards.mmap, "mmap", lambda *a, **k: maps.append(a) or memmap(*a, **k))
    monkeypatch.setattr(shards.zlib, "crc32", lambda ids: checks.append(len(ids)) or crc(ids))
    counts = {}
    for name in ("small", "large"):
        maps.clear()
        checks.clear()
        windows = Windows(Corpus(tmp_path / name, lazily=True), "train", 1024)
        opened = len(maps), len(checks)
        offsets = windows.training(0, 0, 16)
        x, _ = windows.gather(offsets, "cpu")
        first = len(maps) - opened[0], len(checks)
        windows.gather(offsets, "cpu")
        counts[name] = opened, first, (len(maps) - opened[0], len(checks))
        assert (x == 0).all() or name == "small"
    assert counts["small"][0] == (2, 0)
    assert counts["large"][0] == (1, 0)  # val.bin
    assert counts["small"][1][1] <= 8
    assert counts["large"][1][0] <= 16 + 1
    assert counts["large"][1][1] <= 2 * 16
    assert all(first == again for _, first, again in counts.values())

import json

import pytest

from flash_reformer.training.sources import read_dataset, read_standard_library, read_text_files


def test_text_files_are_read_as_they_are(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff\r\n")
    (tmp_path / "b").write_bytes(b"b")
    assert [d.data for d in read_text_files([tmp_path / "a", tmp_path / "b"])] == [b"\xff\r\n", b"b"]


def test_text_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: there is no such file"):
        read_text_files([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="is a folder"):
        read_text_files([tmp_path])
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="nothing to train on"):
        read_text_files([tmp_path / "empty"])


def test_standard_library_is_the_same_each_time_and_without_tests():
    texts = read_standard_library()
    assert [d.name for d in texts] == [d.name for d in read_standard_library()] == sorted(d.name for d in texts)
    assert "dataclasses.py" in {d.name for d in texts}
    assert not any({"test", "tests", "site-packages"} & set(d.name.split("/")) for d in texts)


def test_datasets_are_read_from_files_of_each_kind(tmp_path, offline_datasets):
    rows = ["first\nline", "höher", "third"]
    table = offline_datasets.Dataset.from_dict({"body": rows})
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv")
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows), encoding="utf-8")
    for name in ("a.parquet", "a.csv", "a.jsonl", "saved"):
        texts = read_dataset(str(tmp_path / name), column="body")
        assert [d.data.decode() for d in texts] == rows, name
    (tmp_path / "texts").mkdir()
    for index, row in enumerate(rows):
        (tmp_path / "texts" / f"{index}.txt").write_text(row, encoding="utf-8")
    assert [d.data.decode() for d in read_dataset(str(tmp_path / "texts"))] == rows


def test_datasets_that_cannot_be_read_say_why(tmp_path, offline_datasets):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "label": 3}\n')
    path = str(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"--text-column 'text' is no column of .*; it has body, label"):
        read_dataset(path)
    with pytest.raises(ValueError, match=r"must hold text; row 0 of .* holds int"):
        read_dataset(path, column="label")
    with pytest.raises(ValueError, match="there is no such file"):
        read_dataset(str(tmp_path / "b.jsonl"))
    (tmp_path / "odd").mkdir()
    with pytest.raises(ValueError, match="expected files of one kind"):
        read_dataset(str(tmp_path / "odd"))
    with pytest.raises(ValueError, match=r"--dataset no-such-dataset-here .* cannot be read"):
        read_dataset("no-such-dataset-here")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="holds no text"):
        read_dataset(str(tmp_path / "blank.jsonl"))

import hashlib

import numpy as np
import pytest

from hf_wsl.files import replacing, sha256, write_json


def test_a_digest_is_that_of_all_parts_one_after_the_other(tmp_path):
    (tmp_path / "file").write_bytes(b"cd")
    expected = hashlib.sha256(b"abcd\x01\x00").hexdigest()
    assert sha256("abcd\x01\0") == sha256(b"abcd\x01\x00") == expected
    parts = ["a", b"b", tmp_path / "file", np.array([1], "<i2")]
    assert sha256(parts) == sha256(part for part in parts) == expected
    assert sha256(tmp_path / "file") == hashlib.sha256(b"cd").hexdigest()
    assert sha256("ß") == hashlib.sha256("ß".encode()).hexdigest()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_json(path, {"a": "ß"})
    assert path.read_text(encoding="utf-8") == '{\n "a": "ß"\n}\n'
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
    assert path.read_text(encoding="utf-8").startswith("{")

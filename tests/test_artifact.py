"""Artefact directories: round trips, refusal of anything altered, atomic replace, resume."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdkernels import artifact as A
from mdkernels import artifact_writer as W
from mdkernels.artifact import ArtifactError, read_artifact
from mdkernels.artifact_writer import ArtifactWriter

HEADER = {
    "tokenizer_hash": "abc",
    "vocab_size": 9,
    "config": {"block": 4},
    "inputs": {"corpus": "x"},
}


def write(path, data, *, kind="datastore", header=HEADER, overwrite=False, **fields):
    with ArtifactWriter(path, kind, header, overwrite=overwrite) as writer:
        for name, array in data.items():
            writer.array(name, array.dtype.name, array.shape[1:]).append(array)
        return writer.commit(**fields)


def forge(path, edit):
    """Change meta.json and sign it again: what only the structural checks can refuse."""
    meta = json.loads((path / "meta.json").read_text())
    del meta["checksum"]
    edit(meta)
    meta["checksum"] = A.digest(meta)
    (path / "meta.json").write_text(json.dumps(meta))


@pytest.fixture
def small(tmp_path):
    data = {
        "keys": np.arange(12, dtype=np.float16).reshape(4, 3),
        "values": np.array([5, 6, 7, 8], np.int32),
    }
    write(tmp_path / "store", data)
    return tmp_path / "store", data


@pytest.mark.parametrize("dtype", A.DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (0, 3), (4, 3), (2, 3, 4)])
def test_round_trip(tmp_path, dtype, shape):
    array = (np.arange(np.prod(shape)) % 100).reshape(shape).astype(dtype)
    write(tmp_path / "a", {"x": array}, stats={"mean": 0.1})
    opened = read_artifact(tmp_path / "a", "datastore", verify=True)
    assert opened.array("x").dtype == dtype
    np.testing.assert_array_equal(opened.array("x"), array)
    assert not opened.array("x").flags.writeable
    assert opened.meta["stats"] == {"mean": 0.1}
    assert opened.meta["config"] == {"block": 4}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["meta.json", "x.bin"]


def test_content_id_depends_on_data_alone(tmp_path):
    whole = np.arange(10, dtype=np.int32)
    first = write(tmp_path / "a", {"x": whole})
    with ArtifactWriter(tmp_path / "b", "datastore", HEADER | {"config": {}}) as writer:
        array = writer.array("x", "int32")
        for part in np.split(whole, 5):
            array.append(part)
        second = writer.commit(other=1)
    third = write(tmp_path / "c", {"x": whole[::-1]})
    assert first.content_id == second.content_id != third.content_id


def test_wrong_rows_are_refused(tmp_path):
    with ArtifactWriter(tmp_path / "a", "datastore", HEADER) as writer:
        array = writer.array("x", "float16", (3,))
        for rows in (np.zeros((2, 3)), np.zeros((2, 4), np.float16), np.zeros(3, np.float16)):
            with pytest.raises(ValueError, match="rows must be float16"):
                array.append(rows)
        for name, dtype in (("../x", "int32"), ("X", "int32"), ("y", "float64"), ("y", "object")):
            with pytest.raises(ValueError, match="not allowed"):
                writer.array(name, dtype)
        for name in ("../x.faiss", "meta.json", "a.bin", "noextension", "a/b.c"):
            with pytest.raises(ValueError, match="not allowed"):
                writer.file(name)


def test_opaque_file_is_checked(tmp_path):
    with ArtifactWriter(tmp_path / "a", "index", HEADER) as writer:
        writer.file("index.faiss").write_bytes(b"opaque")
        opened = writer.commit()
    assert opened.file("index.faiss").read_bytes() == b"opaque"
    with pytest.raises(ArtifactError, match="no file"):
        opened.file("other.faiss")
    (tmp_path / "a" / "index.faiss").write_bytes(b"opaquE")
    with pytest.raises(ArtifactError, match=r"index\.faiss: was altered"):
        read_artifact(tmp_path / "a", "index")


def test_missing_artefact_names_the_command(tmp_path):
    with pytest.raises(ArtifactError, match=r"no corpus artefact at .*`mdkernels corpus`"):
        read_artifact(tmp_path / "nothing", "corpus")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"has no meta\.json; .*`mdkernels corpus`"):
        read_artifact(tmp_path / "empty", "corpus")
    (tmp_path / "killed.partial").mkdir()
    with pytest.raises(ArtifactError, match=r"killed\.partial.*again to resume"):
        read_artifact(tmp_path / "killed", "corpus")


def test_other_kind_is_refused(small):
    with pytest.raises(ArtifactError, match="holds a 'datastore' artefact, expected 'corpus'"):
        read_artifact(small[0], "corpus")


def test_expect_and_require_name_both_values(small):
    opened = read_artifact(small[0], "datastore")
    opened.expect("model m", tokenizer_hash="abc", vocab_size=9, inputs={"corpus": "x"})
    opened.require(keys=("float16", 2), values=(("int32", "int64"), 1))
    for field in ({"tokenizer_hash": "abd"}, {"vocab_size": 10}, {"inputs": {"corpus": "y"}}):
        ((name, wanted),) = field.items()
        with pytest.raises(ArtifactError, match=f"model m: {name}") as caught:
            opened.expect("model m", **field)
        assert repr(wanted) in str(caught.value)
        assert repr(HEADER[name]) in str(caught.value)
    with pytest.raises(ArtifactError, match=r"'keys' must be float32 .* found float16 \[4, 3\]"):
        opened.require(keys=("float32", 2))
    with pytest.raises(ArtifactError, match="'other'"):
        opened.require(other=("float32", 2))
    with pytest.raises(ArtifactError, match="no array 'other'"):
        opened.array("other")


def set_path(*path_and_value):
    *path, last, value = path_and_value

    def edit(meta):
        for key in path:
            meta = meta[key]
        meta[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_path("format", "zip"), "format is not"),
        (set_path("version", 2), "format version 2, this library reads 1"),
        (set_path("kind", "corpus"), "expected 'datastore'"),
        (set_path("arrays", []), "not a table"),
        (set_path("arrays", "../../etc", {}), "bad entry"),
        (set_path("arrays", "keys", "extra", 1), "bad entry"),
        (set_path("arrays", "keys", 7), "bad entry"),
        (set_path("arrays", "keys", "dtype", "float64"), "bad dtype"),
        (set_path("arrays", "keys", "dtype", "O"), "bad dtype"),
        (set_path("arrays", "keys", "dtype", ["int32"]), "bad dtype"),
        (set_path("arrays", "keys", "shape", [4, -3]), "bad dtype or shape"),
        (set_path("arrays", "keys", "shape", [4, 3.0]), "bad dtype or shape"),
        (set_path("arrays", "keys", "shape", 12), "bad dtype or shape"),
        # 2**63 * 2 bytes wraps to 0 and 2**62 * 6 to a small number in 64 bits.
        (set_path("arrays", "keys", "shape", [2**63, 2]), "contradicts its shape"),
        (set_path("arrays", "keys", "shape", [2**62, 6]), "contradicts its shape"),
        (set_path("arrays", "keys", "shape", [3, 4, 2]), "contradicts its shape"),
        (set_path("arrays", "keys", "bytes", True), "bad size"),
        (set_path("arrays", "keys", "checksum", "0"), "bad size or checksum"),
        (set_path("files", {"../up.faiss": {"bytes": 1, "checksum": 1}}), "bad entry"),
        (set_path("files", {"gone.faiss": {"bytes": 1, "checksum": 1}}), "is missing"),
        (
            set_path("arrays", "gone", {"dtype": "int32", "shape": [1], "bytes": 4, "checksum": 1}),
            "is miss",
        ),
    ],
)
def test_forged_meta_is_refused(small, edit, message):
    forge(small[0], edit)
    with pytest.raises(ArtifactError, match=message):
        read_artifact(small[0], "datastore")


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"{", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_meta_that_is_no_table(small, content):
    (small[0] / "meta.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"meta\.json"):
        read_artifact(small[0], "datastore")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_has_not(small, number):
    file = small[0] / "meta.json"
    file.write_text(file.read_text().replace('"vocab_size": 9', f'"vocab_size": {number}'))
    with pytest.raises(ArtifactError, match=r"meta\.json: cannot be read \(Out of range"):
        read_artifact(small[0], "datastore")


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_fuzzed_artefact_is_refused_or_equal(small, data):
    """A changed, cut or grown file gives ArtifactError, or exactly the data written."""
    path, arrays = small
    work = path.with_name("fuzzed")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(path, work)
    file = work / data.draw(st.sampled_from(["meta.json", "keys.bin", "values.bin"]))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["change", "cut", "grow", "insert"]))
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        if kind == "change" and content:
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at:]
        elif kind == "grow":
            content += data.draw(st.binary(min_size=1, max_size=9))
        else:
            content[at:at] = data.draw(st.binary(min_size=1, max_size=3))
    file.write_bytes(content)
    try:
        opened = read_artifact(work, "datastore")
        loaded = {name: np.array(opened.array(name)) for name in arrays}
    except ArtifactError:
        return
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)


def test_large_artefacts_verify_on_demand(small, monkeypatch):
    content = bytearray((small[0] / "keys.bin").read_bytes())
    content[3] ^= 1
    (small[0] / "keys.bin").write_bytes(content)
    monkeypatch.setattr(A, "ALWAYS_VERIFY_BYTES", 0)
    assert not read_artifact(small[0], "datastore").verified
    with pytest.raises(ArtifactError, match=r"keys\.bin: was altered"):
        read_artifact(small[0], "datastore", verify=True)


def test_existing_target_needs_overwrite(small):
    path, data = small
    with pytest.raises(ArtifactError, match="overwrite=True"):
        ArtifactWriter(path, "datastore", HEADER)
    np.testing.assert_array_equal(read_artifact(path, "datastore").array("keys"), data["keys"])
    assert not path.with_name("store.partial").exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_keeps_the_old_until_commit(small, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(W, "_exchange", lambda first, second: False)
    path, data = small
    with ArtifactWriter(path, "datastore", HEADER, overwrite=True) as writer:
        writer.array("keys", "float16", (3,)).append(np.zeros((2, 3), np.float16))
        old = read_artifact(path, "datastore").array("keys")
        np.testing.assert_array_equal(old, data["keys"])
        writer.commit()
    np.testing.assert_array_equal(old, data["keys"])  # still mapped by whoever had it open
    assert read_artifact(path, "datastore").array("keys").shape == (2, 3)
    assert [p.name for p in path.parent.iterdir()] == ["store"]


def test_overwrite_deletes_nothing_else(small, tmp_path):
    for kind, target in (("corpus", small[0]), ("corpus", tmp_path)):
        with pytest.raises(ArtifactError, match="remove it yourself"):
            ArtifactWriter(target, kind, HEADER, overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="remove it yourself"):
        ArtifactWriter(tmp_path / "file", "corpus", HEADER, overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"
    assert small[0].is_dir()


def interrupted(path, *, checkpoint=True):
    """Three rows, checkpointed or not, two more, then a failure."""

    def stage():
        with ArtifactWriter(path, "datastore", HEADER) as writer:
            array = writer.array("x", "int32")
            array.append(np.array([1, 2, 3], np.int32))
            if checkpoint:
                writer.checkpoint(next=3)
            array.append(np.array([8, 9], np.int32))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stage()


def test_resume_continues_from_the_checkpoint(tmp_path):
    interrupted(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with ArtifactWriter(tmp_path / "a", "datastore", HEADER) as writer:
        assert writer.resumed
        assert writer.state == {"next": 3}
        array = writer.array("x", "int32")
        assert array.rows == 3
        array.append(np.array([4, 5], np.int32))
        resumed = writer.commit()
    whole = write(tmp_path / "b", {"x": np.array([1, 2, 3, 4, 5], np.int32)})
    assert resumed.content_id == whole.content_id
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["meta.json", "x.bin"]


def test_other_settings_start_again(tmp_path):
    interrupted(tmp_path / "a")
    with pytest.warns(UserWarning, match="other settings"):
        writer = ArtifactWriter(tmp_path / "a", "datastore", HEADER | {"config": {"block": 5}})
    with writer:
        assert not writer.resumed
        assert writer.state == {}
        assert writer.array("x", "int32").rows == 0


@pytest.mark.parametrize("damage", ["short", "no file", "no json"])
def test_damaged_progress_starts_again(tmp_path, damage):
    interrupted(tmp_path / "a")
    work = tmp_path / "a.partial"
    if damage == "short":  # as after a power cut: the checkpoint outlived the data
        os.truncate(work / "x.bin", 4)
    elif damage == "no file":
        (work / "x.bin").unlink()
    else:
        (work / "progress.json").write_text("{")
    message = None if damage == "no json" else "damaged one, was discarded"
    with pytest.warns(UserWarning, match=message) if message else contextlib.nullcontext():
        writer = ArtifactWriter(tmp_path / "a", "datastore", HEADER)
    with writer:
        assert not writer.resumed
        writer.array("x", "int32").append(np.array([7], np.int32))
        np.testing.assert_array_equal(writer.commit().array("x"), [7])


def test_failure_before_a_checkpoint_leaves_nothing(tmp_path):
    interrupted(tmp_path / "a", checkpoint=False)
    assert list(tmp_path.iterdir()) == []


def test_two_writers_are_refused(tmp_path):
    with (
        ArtifactWriter(tmp_path / "a", "datastore", HEADER),
        pytest.raises(ArtifactError, match="being written by another process"),
    ):
        ArtifactWriter(tmp_path / "a", "datastore", HEADER)
    write(tmp_path / "a", {"x": np.zeros(1, np.int32)})


def test_sigkill_leaves_the_old_or_the_new(tmp_path):
    """A process that replaces an artefact without end is killed at moments of no one's choosing."""
    script = textwrap.dedent("""
        import itertools, sys
        import numpy as np
        from mdkernels.artifact_writer import ArtifactWriter
        for i in itertools.count():
            with ArtifactWriter(sys.argv[1], "datastore", {"n": i}, overwrite=True) as writer:
                for name in ("x", "y"):
                    writer.array(name, "int32").append(np.full(50_000, i, np.int32))
                    writer.checkpoint()
                writer.commit()
            print(i, flush=True)
    """)
    out = tmp_path / "a"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for delay in range(6):
        child = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", script, str(out)],
            stdout=subprocess.PIPE,
            env=environment,
        )
        for _ in range(1 + 3 * delay):
            last = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        child.wait()
        last = int((child.stdout.read().split() or [last])[-1])
        child.stdout.close()
        opened = read_artifact(out, "datastore", verify=True)
        assert last <= opened.meta["n"] <= last + 1
        for name in ("x", "y"):
            assert (opened.array(name) == opened.meta["n"]).all()

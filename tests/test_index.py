"""Exact search against float64 brute force, faiss behind the same interface, refusals."""

import builtins
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipeline_fixtures import tiny_documents, tiny_model, tiny_tokenizer

from mdkernels import exact_search as E
from mdkernels.artifact import ArtifactError
from mdkernels.corpus import build_corpus
from mdkernels.datastore import build_datastore
from mdkernels.exact_search import exact_search
from mdkernels.index import build_index, open_index


def brute_force(queries, keys):
    """(n, R) squared distances by direct differences, in float64."""
    difference = queries.double()[:, None] - torch.tensor(np.asarray(keys)).double()[None]
    return difference.square().sum(-1)


def check(queries, keys, num_neighbors, distances, ids, scale):
    """Distances are right for their ids, and no key left out is nearer by more than rounding.

    `scale` is the size of what was squared and added: the rounding error grows with it.
    """
    exact = brute_force(queries, keys)
    atol = 4e-6 * scale
    found = min(num_neighbors, len(keys))
    assert distances.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert (ids[:, found:] == -1).all()
    assert torch.isinf(distances[:, found:]).all()
    distances, ids = distances[:, :found].double(), ids[:, :found]
    assert (distances >= 0).all()
    assert all(len(set(row)) == found for row in ids.tolist())
    torch.testing.assert_close(distances, exact.gather(1, ids), rtol=1e-5, atol=atol)
    nearest = exact.sort(1).values[:, :found]
    torch.testing.assert_close(distances.sort(1).values, nearest, rtol=1e-5, atol=atol)


def clustered(rows, dim, seed=0, offset=0.0):
    """Keys in clusters with exact duplicates, far from the origin if asked: what a text gives."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(1, rows // 40), dim, generator=generator)
    keys = centres[torch.randint(len(centres), (rows,), generator=generator)]
    keys = keys + 0.3 * torch.randn(rows, dim, generator=generator) + offset
    keys[1::7] = keys[0::7][: len(keys[1::7])]
    return keys.half()


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize(
    ("n", "rows", "dim", "num_neighbors"),
    [
        (1, 1, 1, 1),
        (0, 9, 4, 3),
        (5, 9, 4, 9),
        (5, 9, 4, 20),
        (33, 2000, 24, 16),
        (17, 5000, 8, 300),
        (9, 4099, 16, 2048),
        (70, 8192, 40, 64),
    ],
)
def test_exact_search(n, rows, dim, num_neighbors, in_order):
    keys = clustered(rows, dim)
    queries = torch.cat([keys[: n // 2].float(), torch.randn(n - n // 2, dim)])
    distances, ids = exact_search(queries, keys.numpy(), num_neighbors, in_order=in_order)
    assert distances.shape == ids.shape == (n, num_neighbors)
    check(queries, keys, num_neighbors, distances, ids, scale=4 * dim)
    if in_order:
        assert (distances.diff(dim=1) >= 0)[:, : rows - 1].all()


@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 400),
    key_rows=st.integers(1, 130),
    num_neighbors=st.integers(1, 40),
    group=st.integers(1, 64),
    query_rows=st.integers(1, 5),
)
def test_blocks_do_not_change_the_result(seed, rows, key_rows, num_neighbors, group, query_rows):
    """Small blocks take every path: bounds from groups, bounds from earlier blocks, short tails."""
    keys, queries = clustered(rows, 6, seed), torch.randn(7, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(E, "_KEY_ROWS", key_rows)
        patch.setattr(E, "_MAX_GROUP", group)
        patch.setitem(E._BUFFER_BYTES, "cpu", 4 * max(key_rows, 8 * num_neighbors) * query_rows)
        found = exact_search(queries, keys, num_neighbors)
    check(queries, keys, num_neighbors, *found, scale=24)


@pytest.mark.parametrize("linear", [True, False])
def test_centre_keeps_far_keys_exact(monkeypatch, linear):
    if not linear:
        monkeypatch.setattr(E, "_onednn_linear", lambda: None)
    keys = clustered(3000, 32, offset=30.0)
    queries = keys[:40].float()
    centre = keys.float().mean(0)
    distances, ids = exact_search(queries, keys, 50, center=centre)
    check(queries, keys, 50, distances, ids, scale=32.0)
    # Self distance is 0 up to the rounding of what was added: ||q - centre||^2 is about 35 here.
    own = exact_search(queries, keys, 1, center=centre)[0]
    assert own.max() < 4e-6 * 32
    assert exact_search(queries, keys, 1)[0].max() < 4e-6 * 32 * 30**2


def test_equal_distances_all_count():
    keys = torch.zeros(5000, 8).half()
    distances, ids = exact_search(torch.ones(3, 8), keys, 70)
    assert (distances == 8).all()
    assert all(len(set(row)) == 70 for row in ids.tolist())


@pytest.mark.gpu
def test_exact_search_on_a_gpu():
    keys = clustered(70_000, 16)
    queries = keys[:200].float()
    for held in (keys.numpy(), keys.cuda()):
        distances, ids = exact_search(queries.cuda(), held, 100, center=keys.float().mean(0))
        assert distances.is_cuda
        check(queries, keys, 100, distances.cpu(), ids.cpu(), scale=64)


@pytest.mark.parametrize(
    ("queries", "num_neighbors", "message"),
    [
        (torch.zeros(2, 5), 1, r"expected float32 \(n, 4\)"),
        (torch.zeros(2, 4).double(), 1, "expected float32"),
        (torch.zeros(4), 1, "expected float32"),
        (torch.full((2, 4), float("nan")), 1, "NaN"),
        (torch.full((2, 4), float("inf")), 1, "infinity"),
        (torch.zeros(2, 4), 0, "num_neighbors"),
    ],
)
def test_bad_queries(queries, num_neighbors, message):
    with pytest.raises(ValueError, match=message):
        exact_search(queries, torch.zeros(9, 4).half(), num_neighbors)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    corpus = build_corpus(tiny_documents(6), tiny_tokenizer(), root / "corpus", as_text=True)
    return build_datastore(corpus, tiny_model("llama"), root / "store", block=32)


def test_exact_index(store, tmp_path):
    index = build_index(store, tmp_path / "i")
    queries = store.keys[:50].astype(np.float32)
    distances, ids = index.search(queries, 20)
    check(torch.from_numpy(queries), store.keys, 20, distances, ids, scale=100)
    assert (distances.diff(dim=1) >= 0).all()
    again = open_index(tmp_path / "i", store.path, device="cpu")
    torch.testing.assert_close(again.search(torch.from_numpy(queries), 20)[0], distances)
    assert open_index(again, store) is again
    assert index.factory == "exact"
    assert index.nprobe is None
    assert index.meta["inputs"] == store.meta["inputs"] | {"datastore": store.content_id}
    for bad, message in (
        (queries[:, :4], r"float32 \(n, 32\)"),
        (queries.astype(np.float16), "float32"),
    ):
        with pytest.raises(ValueError, match=message):
            index.search(bad, 20)


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "IVF8,PQ8x4", "HNSW16"])
def test_faiss_index(store, tmp_path, factory):
    pytest.importorskip("faiss", reason="faiss is not installed (the faiss extra)")
    index = build_index(store, tmp_path / "i", factory, nprobe=8)
    queries = torch.from_numpy(store.keys[:50].astype(np.float32))
    distances, ids = index.search(queries, 20)
    exact = brute_force(queries, store.keys)
    if "PQ" not in factory:
        torch.testing.assert_close(distances.double(), exact.gather(1, ids), rtol=1e-4, atol=1e-3)
    nearest = exact.topk(20, largest=False).indices
    recall = (ids[:, :, None] == nearest[:, None]).any(2).float().mean()
    assert recall > {"HNSW16": 0.9, "IVF8,PQ8x4": 0.3}.get(factory, 0.999)
    again = open_index(tmp_path / "i", store)
    torch.testing.assert_close(again.search(queries, 20)[0], distances, rtol=0, atol=0)


def test_nprobe_and_neighbours_not_found(store, tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed (the faiss extra)")
    build_index(store, tmp_path / "i", "IVF16,Flat", nprobe=99)
    assert open_index(tmp_path / "i", store).nprobe == 16
    index = open_index(tmp_path / "i", store, nprobe=1)
    assert index.nprobe == 1
    distances, ids = index.search(torch.from_numpy(store.keys[:9].astype(np.float32)), 800)
    missing = ids < 0
    assert missing.any(1).all()
    assert torch.isinf(distances[missing]).all()
    assert torch.isfinite(distances[~missing]).all()
    assert (distances.diff(dim=1).nan_to_num(0) >= 0).all()
    with pytest.raises(ValueError, match="nprobe"):
        open_index(tmp_path / "i", store, nprobe=0)


def test_bad_factories(store, tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed (the faiss extra)")
    for factory in ("nonsense", "IVF100000,Flat", "PQ7"):
        with pytest.raises(ValueError, match=f"faiss cannot build '{factory}'"):
            build_index(store, tmp_path / "i", factory)
    for name, least in (("nprobe", 1), ("train_rows", 1), ("seed", 0)):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= {least}, got -5"):
            build_index(store, tmp_path / "i", "IVF4,Flat", **{name: -5})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_under_faiss_is_no_traceback(store, tmp_path, monkeypatch):
    faiss = pytest.importorskip("faiss", reason="faiss is not installed (the faiss extra)")

    def full(index, path):
        raise RuntimeError(f"write error in {path} (No space left on device)")

    monkeypatch.setattr(faiss, "write_index", full)
    with pytest.raises(OSError, match=r"index\.faiss could not be written: .*No space left"):
        build_index(store, tmp_path / "i", "Flat")


def test_missing_faiss_names_the_extra(store, tmp_path, monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "faiss":
            raise ImportError("No module named 'faiss'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r'pip install "mdkernels\[faiss\]".*factory="exact"'):
        build_index(store, tmp_path / "i", "IVF8,Flat")
    build_index(store, tmp_path / "exact")


def test_an_index_of_other_keys_is_refused(store, tmp_path):
    corpus = store.path.parent / "corpus"
    other = build_datastore(corpus, tiny_model("llama", seed=3), tmp_path / "other", block=32)
    build_index(store, tmp_path / "i")
    with pytest.raises(ArtifactError, match="does not fit datastore artefact") as caught:
        open_index(tmp_path / "i", other)
    assert store.content_id in str(caught.value)
    assert other.content_id in str(caught.value)
    with pytest.raises(ArtifactError, match=r"no index artefact at .*`mdkernels index`"):
        open_index(tmp_path / "nothing", store)
    with pytest.raises(ArtifactError, match=r"no datastore artefact at .*`mdkernels datastore`"):
        build_index(tmp_path / "nothing", tmp_path / "j")


def test_faiss_never_parses_altered_bytes(store, tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed (the faiss extra)")
    build_index(store, tmp_path / "i", "IVF8,Flat")
    content = (tmp_path / "i" / "index.faiss").read_bytes()
    for altered in (content[:40] + b"\xff\xff" + content[42:], content[:-1], content + b"\0", b""):
        work = tmp_path / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(tmp_path / "i", work)
        (work / "index.faiss").write_bytes(altered)
        with pytest.raises(ArtifactError, match=r"index\.faiss"):
            open_index(work, store)

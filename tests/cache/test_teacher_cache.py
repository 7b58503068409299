"""Teacher caches: what was written is read back, straight into a loss; and every way in which a
cache can be damaged, cut short, unfinished or of another model ends in an error that names it."""

import errno
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pydistill import TopkTeacher, topk_divergence
from pydistill.cache import CacheError, CacheWriter, Manifest, TeacherCache, tokenizer_hash
from pydistill.cache.manifest import NAME, PART
from pydistill.cache.shard import RECORD, file_path, read_index
from pydistill.reference.topk_divergence import TAILS

V, K, N = 300, 8, 1000
VOCABULARY = {f"t{i}": i for i in range(V)}
LENGTHS = [100, 1, 399, 300, 200]
MANIFEST = Manifest("teacher", tokenizer_hash(VOCABULARY), V, K, shard_rows=350)


def logits() -> Tensor:
    return 3 * torch.randn(N, V, generator=torch.Generator().manual_seed(0))


def top(logits: Tensor, k: int = K) -> tuple[Tensor, Tensor, Tensor]:
    log_p = torch.log_softmax(logits, -1)
    values, ids = log_p.topk(k)
    return ids, values, torch.logsumexp(log_p.scatter(1, ids, -torch.inf), 1)


TOKENS = torch.arange(N) * 7 % V
ROWS = (TOKENS, *top(logits()))


def write(folder: Path, manifest: Manifest = MANIFEST, **options: int) -> Path:
    with CacheWriter(folder, manifest, **{"block_rows": 64, "commit_rows": 200, **options}) as w:
        for some in torch.arange(N).split(LENGTHS):
            w.append(*(x[some] for x in ROWS))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("cache") / "c")


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "c"))


def check_rows(got: TopkTeacher, rows: Tensor) -> None:
    ids, log_p, tail = (x[rows] for x in ROWS[1:])
    ids, order = ids.sort(-1)
    assert torch.equal(got.topk_ids, ids)
    assert (got.topk_logprobs - log_p.gather(-1, order)).abs().max() < 0.05
    torch.testing.assert_close(got.tail_logprob, tail, rtol=1e-5, atol=1e-6)


def test_any_range_and_any_choice_is_read(written: Path) -> None:
    cache = TeacherCache.open(written, tokenizer=None)
    assert len(cache) == N
    assert sorted(path.name for path in written.glob("*.rows")) == [
        "00000.rows", "00001.rows", "00002.rows",
    ]  # fmt: skip
    for begin, end in ((0, N), (0, 1), (999, N), (340, 360), (63, 65), (0, 700), (700, 701)):
        check_rows(cache[begin:end], torch.arange(begin, end))
    check_rows(cache[-3:], torch.arange(N - 3, N))
    assert cache[5:5].topk_ids.shape == (0, K)
    index = torch.randint(0, N, (4, 33))
    got = cache.rows(index)
    assert got.topk_ids.shape == (4, 33, K)
    check_rows(got.reshape(-1), index.reshape(-1))
    assert cache.rows(torch.zeros(0).long()).topk_ids.shape == (0, K)
    for wrong in (-1, N):
        with pytest.raises(IndexError, match=f"token {wrong} is outside the cache's 1000"):
            cache.rows(torch.tensor([3, wrong]))
    with pytest.raises(TypeError, match="ranges"):
        cache[3]


def test_tokens_and_documents(written: Path) -> None:
    cache = TeacherCache.open(written, tokenizer=None)
    assert cache.documents.diff().tolist() == LENGTHS
    assert torch.equal(cache.input_ids(0, N), TOKENS)
    assert torch.equal(cache.input_ids(345, 356), TOKENS[345:356])
    with pytest.raises(IndexError, match=r"\[0, 1001\)"):
        cache.input_ids(0, N + 1)


@pytest.mark.parametrize("tail", TAILS)
def test_a_slice_goes_into_the_loss(written: Path, tail: str) -> None:
    got = TeacherCache.open(written, tokenizer=None)[340:360]
    student = torch.randn(20, V, requires_grad=True)
    options: dict[str, Any] = {"kind": "jsd", "tail": tail, "reduction": "none"}
    loss = topk_divergence(student, got, **options)
    given = {"tail_logprob": got.tail_logprob} if tail == "bucket" else {}
    want = topk_divergence(student, got.topk_logprobs, got.topk_ids, **given, **options)
    assert torch.equal(loss, want)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert grad.abs().sum() > 0
    near = topk_divergence(
        student, ROWS[2][340:360], ROWS[1][340:360], **options,
        **({"tail_logprob": ROWS[3][340:360]} if tail == "bucket" else {}),
    )  # fmt: skip
    torch.testing.assert_close(loss, near, rtol=0.02, atol=1e-3)
    batch = topk_divergence(student.reshape(4, 5, V), got.reshape(4, 5), **options)
    assert torch.equal(batch, loss.reshape(4, 5))


def test_the_cache_brings_its_temperature(tmp_path: Path) -> None:
    manifest = Manifest("teacher", "sha256:0", V, K, temperature=2.0)
    rows = top(logits()[:5] / 2)
    with CacheWriter(tmp_path / "c", manifest) as writer:
        writer.append(TOKENS[:5], *rows)
    got = TeacherCache.open(tmp_path / "c", tokenizer=None)[:5]
    student = torch.randn(5, V)
    topk_divergence(student, got, temperature=2.0)
    for tail in ("bucket", "truncate"):
        with pytest.raises(ValueError, match="recorded at 2, and its tail mass"):
            topk_divergence(student, got, tail=tail)
    for tail in ("renormalize", "zero"):
        want = topk_divergence(
            student, got.topk_logprobs, got.topk_ids, tail=tail, teacher_temperature=2.0
        )
        assert torch.equal(topk_divergence(student, got, tail=tail), want)


def test_a_slice_of_another_vocabulary_is_refused(written: Path) -> None:
    got = TeacherCache.open(written, tokenizer=None)[:2]
    with pytest.raises(ValueError, match="recorded over 300 tokens, but student_logits has 301"):
        topk_divergence(torch.randn(2, 301), got)
    topk_divergence(torch.randn(2, 301), got._replace(vocab_size=None))
    for name, value in (
        ("topk_ids", got.topk_ids),
        ("tail_logprob", got.tail_logprob),
        ("teacher_temperature", 1.0),
    ):
        with pytest.raises(ValueError, match=f"{name} is given beside a TopkTeacher"):
            topk_divergence(torch.randn(2, V), got, **{name: value})


def test_another_tokenizer_or_vocabulary_is_refused(written: Path) -> None:
    class Tokenizer:
        name_or_path = "student"

        def get_vocab(self) -> dict[str, int]:
            return {**VOCABULARY, "t0": 1, "t1": 0}

    TeacherCache.open(written, tokenizer=VOCABULARY, vocab_size=V)
    TeacherCache.open(written, tokenizer=MANIFEST.tokenizer)
    with pytest.raises(CacheError) as raised:
        TeacherCache.open(written, tokenizer=Tokenizer())
    for words in ("teacher", "student", MANIFEST.tokenizer, tokenizer_hash(Tokenizer())):
        assert words in str(raised.value)
    with pytest.raises(CacheError, match="300 tokens of teacher, the student's logits over 320"):
        TeacherCache.open(written, tokenizer=None, vocab_size=320)
    with pytest.raises(ValueError, match="is no hash"):
        TeacherCache.open(written, tokenizer="gpt2")


def test_the_hash_knows_ids_not_their_order() -> None:
    assert tokenizer_hash({"a": 0, "b": 1}) == tokenizer_hash({"b": 1, "a": 0})
    assert tokenizer_hash({"a": 0, "b": 1}) != tokenizer_hash({"a": 1, "b": 0})
    assert tokenizer_hash({"a": 0}) != tokenizer_hash({"a": 0, "b": 1})


@pytest.mark.parametrize("where", ["rows", "tokens", "index", NAME])
def test_every_flipped_bit_is_found_and_named(copy: Path, where: str) -> None:
    random = np.random.default_rng(0)
    for _ in range(60):
        shard = int(random.integers(3))
        path = copy / NAME if where == NAME else file_path(copy, shard, where)
        whole = path.read_bytes()
        at, bit = int(random.integers(len(whole))), int(random.integers(8))
        flipped = bytearray(whole)
        flipped[at] ^= 1 << bit
        path.write_bytes(flipped)
        with pytest.raises(CacheError) as raised:
            TeacherCache.open(copy, tokenizer=None).verify()
        path.write_bytes(whole)
        assert path.name in str(raised.value)
        if where == "index":
            assert f"block {at // RECORD.itemsize} of shard {shard}" in str(raised.value)
        elif where != NAME:
            row = at // (MANIFEST.layout.stride if where == "rows" else 4)
            ends = np.cumsum(read_index(copy, shard, True)["rows"])
            block = int(np.searchsorted(ends, row, side="right"))
            assert f"block {block} of shard {shard}" in str(raised.value)
    TeacherCache.open(copy, tokenizer=None).verify()


def test_a_reader_notices_damage_where_it_reads(copy: Path) -> None:
    path = file_path(copy, 1, "rows")
    damaged = bytearray(path.read_bytes())
    damaged[200 * MANIFEST.layout.stride] ^= 1
    path.write_bytes(damaged)
    cache = TeacherCache.open(copy, tokenizer=None)
    cache[0:400], cache[700:]
    for _ in range(2):
        with pytest.raises(CacheError, match=r"block \d of shard 1 \(its tokens \d+ to \d+\)"):
            cache[540:560]
    with pytest.raises(CacheError, match="shard 1"):
        cache.rows(torch.tensor([1, 550]))


@pytest.mark.parametrize("where", ["rows", "tokens", "index"])
@pytest.mark.parametrize("shard", [0, 2])
def test_every_cut_and_every_lost_file_is_found(copy: Path, where: str, shard: int) -> None:
    path = file_path(copy, shard, where)
    whole = path.read_bytes()
    unit = {"rows": MANIFEST.layout.stride, "tokens": 4, "index": RECORD.itemsize}[where]
    for size in (0, 1, unit, unit + 1, len(whole) // 2, len(whole) - unit, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CacheError, match=path.name):
            TeacherCache.open(copy, tokenizer=None).verify()
    path.write_bytes(whole + whole[-unit:])
    with pytest.raises(CacheError, match=path.name):
        TeacherCache.open(copy, tokenizer=None).verify()
    path.unlink()
    with pytest.raises(CacheError, match=f"shard {shard} .*missing.*{path.name}"):
        TeacherCache.open(copy, tokenizer=None).verify()


def test_a_shard_too_many_or_a_manifest_too_few(copy: Path) -> None:
    for kind in ("rows", "tokens", "index"):
        shutil.copy(file_path(copy, 0, kind), file_path(copy, 3, kind))
    with pytest.raises(CacheError, match="files of shard 3, but the manifest's 1000 tokens"):
        TeacherCache.open(copy, tokenizer=None)
    (copy / NAME).unlink()
    with pytest.raises(CacheError, match=r"no teacher cache: it has no manifest\.json"):
        TeacherCache.open(copy, tokenizer=None)
    with pytest.raises(CacheError, match="no teacher cache"):
        TeacherCache.open(copy / "nothing", tokenizer=None)


def test_blocks_in_another_order_are_noticed(copy: Path) -> None:
    """Records that are whole, but not where they belong."""
    path = file_path(copy, 0, "index")
    whole, size = path.read_bytes(), RECORD.itemsize
    path.write_bytes(whole[size : 2 * size] + whole[:size] + whole[2 * size :])
    with pytest.raises(CacheError, match="record of block 0 of shard 0"):
        TeacherCache.open(copy, tokenizer=None).verify()


def test_a_manifest_of_the_future(copy: Path) -> None:
    from pydistill.cache.manifest import _checksum

    data = json.loads((copy / NAME).read_text())
    del data["crc32"]
    data["version"] = 2
    (copy / NAME).write_text(json.dumps({**data, "crc32": _checksum(data)}))
    with pytest.raises(CacheError, match="format version 2, this release reads 1; update"):
        TeacherCache.open(copy, tokenizer=None)


def interrupted(folder: Path, count: int = 500) -> Path:
    """A cache whose writer met Ctrl-C after `count` tokens."""
    with pytest.raises(KeyboardInterrupt):
        with CacheWriter(folder, MANIFEST, block_rows=64) as writer:
            writer.append(*(x[:100] for x in ROWS))
            writer.append(*(x[100:101] for x in ROWS))
            writer.append(*(x[101:count] for x in ROWS))
            raise KeyboardInterrupt
    return folder


def test_ctrl_c_keeps_what_was_appended(tmp_path: Path) -> None:
    folder = interrupted(tmp_path / "c")
    with pytest.raises(CacheError, match=r"unfinished, with 500 tokens; resume .*partial=True"):
        TeacherCache.open(folder, tokenizer=None)
    part = TeacherCache.open(folder, tokenizer=None, partial=True)
    check_rows(part[:], torch.arange(500))
    with CacheWriter(folder, MANIFEST) as writer:
        assert (writer.written, writer.appended) == (500, 500)
        writer.append(*(x[500:800] for x in ROWS))
        assert writer.appended == 800
        writer.append(*(x[800:] for x in ROWS))
        assert writer.flush() == writer.written == N
    whole = TeacherCache.open(folder, tokenizer=None)
    check_rows(whole[:], torch.arange(N))
    assert whole.documents.diff().tolist() == LENGTHS


def test_resuming_asks_for_the_same_manifest_and_an_unfinished_cache(
    tmp_path: Path, written: Path
) -> None:
    folder = interrupted(tmp_path / "c")
    other = Manifest("teacher", MANIFEST.tokenizer, V, 9, shard_rows=350)
    with pytest.raises(CacheError, match=r"begun with another k \(8, not 9\)"):
        CacheWriter(folder, other)
    with pytest.raises(CacheError, match="is complete, with 1000 tokens"):
        CacheWriter(written, MANIFEST)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(CacheError, match=r"not empty \(it has thesis.txt\)"):
        CacheWriter(tmp_path / "mine", MANIFEST)


@pytest.mark.parametrize("where", ["rows", "tokens", "index"])
def test_resuming_cuts_a_torn_end_and_refuses_damage(tmp_path: Path, where: str) -> None:
    folder = interrupted(tmp_path / "c")
    path = file_path(folder, 1, where)
    whole = path.read_bytes()
    for torn in (b"\x01", b"\0" * RECORD.itemsize, b"\0" * 31):
        path.write_bytes(whole + torn)
        assert len(TeacherCache.open(folder, tokenizer=None, partial=True)) == 500
        writer = CacheWriter(folder, MANIFEST)
        assert writer.written == 500
        writer.close()
        assert path.read_bytes() == whole
    if where == "index":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        words = "block 2 of shard 1 fails"
    else:
        path.write_bytes(whole[:-1])
        words = rf"{path.name} \(shard 1\) is cut short"
    for attempt in (
        lambda: CacheWriter(folder, MANIFEST),
        lambda: TeacherCache.open(folder, tokenizer=None),
    ):
        with pytest.raises(CacheError, match=words):
            attempt()
    path.write_bytes(whole)
    assert len(TeacherCache.open(folder, tokenizer=None, partial=True)) == 500


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    first = CacheWriter(tmp_path / "c", MANIFEST)
    with pytest.raises(CacheError, match="another process is writing"):
        CacheWriter(tmp_path / "c", MANIFEST)
    first.close()
    CacheWriter(tmp_path / "c", MANIFEST).close()
    with pytest.raises(CacheError, match="is closed"):
        first.append(*(x[:3] for x in ROWS))


def test_a_full_disk_leaves_a_resumable_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "c"
    real, room = os.write, [20_000]

    def short_write(file: int, data: Any) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = real(file, bytes(data)[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(os, "write", short_write)
    writer = CacheWriter(folder, MANIFEST, block_rows=64)
    writer.append(*(x[:500] for x in ROWS))
    assert writer.flush() == 500
    writer.append(*(x[500:] for x in ROWS))
    with pytest.raises(OSError, match=r"No space left.*first \d+ tokens are safe: make room"):
        writer.flush()
    with pytest.raises(CacheError, match="is closed"):
        writer.flush()
    monkeypatch.setattr(os, "write", real)
    with CacheWriter(folder, MANIFEST) as writer:
        assert 500 <= writer.written < N
        writer.append(*(x[writer.written :] for x in ROWS), continues=True)
    check_rows(TeacherCache.open(folder, tokenizer=None)[:], torch.arange(N))


def _limited(folder: Path, sent: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
    torch.set_num_threads(1)
    writer = CacheWriter(folder, MANIFEST, block_rows=64, commit_rows=100)
    try:
        for some in torch.arange(N).split(100):
            writer.append(*(x[some] for x in ROWS))
    except OSError as error:
        sent.put((writer.written, str(error)))


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The limit comes from the kernel here, in the middle of a write."""
    context = multiprocessing.get_context("spawn")
    sent = context.Queue()
    child = context.Process(target=_limited, args=(tmp_path / "c", sent))
    child.start()
    written, message = sent.get(timeout=120)
    child.join()
    assert "File too large" in message and f"first {written} tokens are safe" in message
    assert 0 < written < N
    writer = CacheWriter(tmp_path / "c", MANIFEST)
    assert writer.written == written
    writer.close()


def _read(cache: TeacherCache, seed: int, sent: Any) -> None:
    torch.set_num_threads(1)
    random = np.random.default_rng(seed)
    for _ in range(50):
        begin = int(random.integers(N))
        check_rows(cache[begin : begin + 90], torch.arange(begin, min(N, begin + 90)))
    sent.put(cache.documents.tolist())


def test_readers_in_other_processes(written: Path) -> None:
    context = multiprocessing.get_context("spawn")
    sent = context.Queue()
    cache = TeacherCache.open(written, tokenizer=None)
    cache[:]
    assert len(pickle.dumps(cache)) < 1000  # the folder's name, no rows
    children = [context.Process(target=_read, args=(cache, i, sent)) for i in range(2)]
    for child in children:
        child.start()
    assert [sent.get(timeout=120) for _ in children] == [cache.documents.tolist()] * 2
    for child in children:
        child.join()
        assert child.exitcode == 0


def test_a_reader_beside_the_writer(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "c", MANIFEST, block_rows=64, commit_rows=90) as writer:
        for some in torch.arange(N).split(70):
            writer.append(*(x[some] for x in ROWS))
            cache = TeacherCache.open(tmp_path / "c", tokenizer=None, partial=True)
            assert len(cache) == writer.written
            check_rows(cache[:], torch.arange(writer.written)) if len(cache) else None


def test_fewer_entries_than_slots_and_other_dtypes(tmp_path: Path) -> None:
    ids, log_p, tail = top(logits()[:6], 5)
    with CacheWriter(tmp_path / "c", MANIFEST) as writer:
        writer.append(TOKENS[:6].int().numpy(), ids.int(), log_p.double(), tail.numpy())
        writer.append(TOKENS[:6], ids, log_p.bfloat16(), tail.half())
        writer.append(TOKENS[:0], ids[:0], log_p[:0], tail[:0])
    cache = TeacherCache.open(tmp_path / "c", tokenizer=None)
    got = cache[:6]
    assert (got.topk_ids[:, 5:] == -1).all() and (got.topk_ids[:, :5] >= 0).all()
    assert torch.equal(got.topk_ids, cache[6:].topk_ids)
    assert (got.topk_logprobs[:, :5] - cache[6:].topk_logprobs[:, :5]).abs().max() < 0.05
    topk_divergence(torch.randn(6, V), got)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({0: TOKENS[:3].float()}, TypeError, "tokens is float32; pass integers"),
        ({1: ROWS[1][:3].float()}, TypeError, "topk_ids is float32"),
        ({2: ROWS[2][:3].long()}, TypeError, "topk_logprobs is int64"),
        ({3: ROWS[3][:2]}, ValueError, r"tail_logprob \(2,\); pass \[n\] both"),
        ({2: ROWS[2][:3, :-1]}, ValueError, r"pass \[3, k\] both"),
        ({1: ROWS[1][:2], 2: ROWS[2][:2]}, ValueError, r"pass \[3, k\] both"),
        ({0: torch.tensor([1, 2, V])}, ValueError, "tokens holds 300, outside"),
        ({1: ROWS[1][:3] + V}, ValueError, "the cache's vocabulary is 300"),
        ({3: ROWS[3][:3] * 0}, ValueError, "row 0 and its tail sum to"),
    ],
)
def test_wrong_rows_are_refused_and_nothing_is_appended(
    tmp_path: Path, change: dict[int, Tensor], error: type[Exception], words: str
) -> None:
    good = [x[:3] for x in ROWS]
    with CacheWriter(tmp_path / "c", MANIFEST) as writer:
        with pytest.raises(error, match=words):
            writer.append(*(change.get(i, x) for i, x in enumerate(good)))
        assert writer.appended == 0
        writer.append(*good)
    assert len(TeacherCache.open(tmp_path / "c", tokenizer=None)) == 3


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": 0}, ValueError, "k=0 is outside 1..300"),
        ({"k": 2.0}, TypeError, "k=2.0 is a float; pass int"),
        ({"codes": "fp16"}, ValueError, "codes='fp16' is not known"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0 is not positive"),
        ({"model": None}, TypeError, "model=None is a NoneType; pass str"),
        ({"shard_rows": 0}, ValueError, "shard_rows=0"),
    ],
)
def test_wrong_manifests(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Manifest(**{"model": "m", "tokenizer": "sha256:0", "vocab_size": V, "k": K, **change})


def test_the_tokenizer_is_asked_for(written: Path) -> None:
    """Forgetting it is an error; leaving it out is said."""
    with pytest.raises(TypeError, match="tokenizer"):
        TeacherCache.open(written)
    with pytest.raises(CacheError, match="ids mean different tokens"):
        TeacherCache.open(written, tokenizer={"other": 0})
    assert len(TeacherCache.open(written, tokenizer=None)) == N


def test_an_empty_cache(tmp_path: Path) -> None:
    CacheWriter(tmp_path / "c", MANIFEST).finish()
    cache = TeacherCache.open(tmp_path / "c", tokenizer=None)
    cache.verify()
    assert (len(cache), cache.documents.tolist()) == (0, [0])
    assert cache[:].topk_ids.shape == (0, K)
    assert cache.stored_kl() == (0.0, 0.0)


def test_only_the_documented_files_are_left(written: Path) -> None:
    names = {path.name for path in written.iterdir()}
    shards = {f"{i:05d}.{kind}" for i in range(3) for kind in ("rows", "tokens", "index")}
    assert names == {NAME, *shards} and PART not in names
    data = json.loads((written / NAME).read_text())
    assert data["tokens"] == N and data["model"] == "teacher" and data["codes"] == "uint8"


@pytest.mark.slow
def test_many_tokens(tmp_path: Path) -> None:
    """What is promised at K = 64, V = 151,936: 200 bytes a token, KL 5e-4, and every row back."""
    vocab, k, rows = 151936, 64, 4000
    random = np.random.default_rng(0)
    logits = random.standard_normal((rows, k)) * random.choice([0.5, 3.0, 9.0], (rows, 1))
    both = np.concatenate([logits, random.standard_normal((rows, 1))], 1)
    both -= np.logaddexp.reduce(both, axis=1, keepdims=True)
    ids = random.integers(1, vocab // k, (rows, k)).cumsum(1)
    folder = tmp_path / "c"
    manifest = Manifest("teacher", "sha256:0", vocab, k, shard_rows=30_000)

    def given(begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and log-probabilities of a range: every batch of rows has other ids than the rest,
        and other rows' probabilities."""
        batch, row = np.divmod(np.arange(begin, end), rows)
        return (ids[row] + batch[:, None]) % vocab, both[(row + 7 * batch) % rows]

    with CacheWriter(folder, manifest) as writer:
        for begin in range(0, 25 * rows, rows):
            some, log_p = given(begin, begin + rows)
            writer.append(some[:, 0], some, log_p[:, :-1], log_p[:, -1])
    cache = TeacherCache.open(folder, tokenizer=None)
    cache.verify()
    assert len(cache) == 100_000
    assert cache.disk_bytes() / len(cache) <= 200
    assert cache.stored_kl()[1] <= 5e-4
    for begin in range(0, len(cache), 4999):  # as no batch, block or shard ends
        end = min(begin + 4999, len(cache))
        got, (want, log_p) = cache[begin:end], given(begin, end)
        order = want.argsort(1)  # ids beyond the vocabulary's end have come round to its start
        assert np.array_equal(got.topk_ids.numpy(), np.take_along_axis(want, order, 1))
        assert np.array_equal(cache.input_ids(begin, end).numpy(), want[:, 0])
        log_p[:, :-1] = np.take_along_axis(log_p[:, :-1], order, 1)
        stored = np.concatenate([got.topk_logprobs, got.tail_logprob[:, None]], 1).astype(float)
        # The widest step is 2 / 254 of the row's range: 0.0114 is the largest found.
        assert (np.abs(stored - log_p) <= 0.012 * (1 - log_p)).all()
        assert (np.exp(stored) * (stored - log_p)).sum(1).max() <= 5e-4

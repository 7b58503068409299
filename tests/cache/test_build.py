"""`pydistill cache build | info | verify` on a tiny model made here."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="a teacher needs the extra `hf`")

from pydistill import cli
from pydistill.cache import TeacherCache, truncation
from pydistill.cache.shard import file_path
from pydistill.recipes import build_cache, models

TEXTS = ["first", "a longer second line of text", "", "third", "x" * 50]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = cli.main(["cache", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TEXTS))
    return path


def arguments(tiny: Path, text: Path, folder: Path) -> list[str | Path]:
    return [
        "build", folder, "--model", tiny, "--text", text, "--k", "8", "--length", "20",
        "--temperature", "2",
    ]  # fmt: skip


def lengths() -> list[int]:
    return [5, 20, 8, 5, 20, 20, 10]


def test_build_info_verify(tiny: Path, text: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "c"
    code, out, err = run(*arguments(tiny, text, folder))
    assert code == 0
    assert "88 tokens in 7 documents" in out
    assert "teacher explains: 100%" in err

    teacher, tokenizer = models.load(str(tiny), torch.float32)
    vocab = teacher.config.vocab_size
    cache = TeacherCache.open(folder, tokenizer=tokenizer, vocab_size=vocab)
    assert cache.documents.diff().tolist() == lengths()
    for document in (0, 1, 2):
        begin, end = cache.documents[document : document + 2].tolist()
        ids = cache.input_ids(begin, end)
        with torch.no_grad():
            log_p = torch.log_softmax(teacher(ids[None]).logits[0].float() / 2, -1)
        got = cache[begin:end]
        want = log_p.gather(-1, got.topk_ids)
        assert (got.topk_logprobs - want).abs().max() < 0.1  # the cache was made in bf16
        mass = got.topk_logprobs.exp().sum(-1) + got.tail_logprob.exp()
        torch.testing.assert_close(mass, torch.ones_like(mass))
        assert got.temperature == 2

    code, out, _ = run("info", folder, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["tokens"], found["documents"], found["complete"]) == (88, 7, True)
    assert found["model"] == str(tiny)
    assert found["bytes_a_token"] == pytest.approx(cache.disk_bytes() / 88)
    assert [row["k"] for row in found["truncation"]] == [1, 2, 4, 8]
    code, out, _ = run("info", folder)
    assert code == 0 and "mass outside" in out

    assert run("verify", folder) == (0, "88 tokens, every checksum right\n", "")
    rows = file_path(folder, 0, "rows")
    damaged = bytearray(rows.read_bytes())
    damaged[-1] ^= 4
    rows.write_bytes(damaged)
    code, out, _ = run("verify", folder)
    assert code == 1
    assert "block 0 of shard 0" in out
    code, out, _ = run("verify", folder, "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)
    code, _, err = run("info", folder)
    assert code == 2
    assert "block 0 of shard 0" in err


def test_ctrl_c_is_resumed_to_the_same_cache(
    tiny: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole = tmp_path / "c", tmp_path / "whole"
    assert run(*arguments(tiny, text, whole))[0] == 0
    monkeypatch.setattr(build_cache, "_LOGITS_AT_ONCE", 1)  # a document at a time
    real, calls = build_cache.topk_logprobs, []

    def interrupted(*args: object, **more: object) -> object:
        calls.append(1)
        if len(calls) in (1, 4):
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(build_cache, "topk_logprobs", interrupted)
    for tokens in (0, 25):
        code, _, err = run(*arguments(tiny, text, folder))
        assert code == 130
        assert f"{folder} is kept; the same command resumes it." in err
        assert len(TeacherCache.open(folder, partial=True)) == tokens
    code, out, _ = run("verify", folder)
    assert (code, out) == (0, "25 tokens, unfinished, every checksum right\n")
    code, out, _ = run(*arguments(tiny, text, folder), "--json")
    assert code == 0
    assert json.loads(out)["resumed_at"] == 25
    a, b = TeacherCache.open(folder), TeacherCache.open(whole)
    assert torch.equal(a.documents, b.documents)
    assert torch.equal(a.input_ids(0, 88), b.input_ids(0, 88))
    same = (a[:].topk_ids == b[:].topk_ids).float().mean()
    assert same > 0.9  # bf16 products depend on the batch

    text.write_text("another\n" + text.read_text())
    code, _, err = run(*arguments(tiny, text, folder))
    assert code == 2 and "is complete" in err


def test_a_half_written_document_is_continued(
    tiny: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "c"
    real, calls = build_cache.CacheWriter.append, []

    def half(writer: object, tokens: torch.Tensor, *rows: torch.Tensor, **more: bool) -> None:
        calls.append(1)
        if len(calls) == 2:
            real(writer, tokens[:7], *(x[:7] for x in rows), **more)
            raise KeyboardInterrupt
        real(writer, tokens, *rows, **more)

    monkeypatch.setattr(build_cache.CacheWriter, "append", half)
    assert run(*arguments(tiny, text, folder))[0] == 130
    assert len(TeacherCache.open(folder, partial=True)) == 12
    before = text.read_text()
    text.write_text(before.replace("longer", "lunger"))
    code, _, err = run(*arguments(tiny, text, folder))
    assert code == 2
    assert "begun with another text: they differ within tokens 5 to 11" in err
    text.write_text("first")
    code, _, err = run(*arguments(tiny, text, folder))
    assert code == 2 and "7 tokens more than the text" in err
    text.write_text(before)
    code, _, err = run(*arguments(tiny, text, folder)[:-1], "1")
    assert code == 2 and "begun with another temperature (2.0, not 1.0)" in err
    assert run(*arguments(tiny, text, folder))[0] == 0
    assert TeacherCache.open(folder).documents.diff().tolist() == lengths()


def test_jsonl_and_chats(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    path.write_text(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"messages": chat}) + "\n")
    texts = build_cache.read_texts(path)
    assert texts == ["one", chat]
    _, tokenizer = models.load(str(tiny), torch.float32)

    class Bar:
        def update(self) -> None:
            pass

    documents = list(build_cache.tokenized(tokenizer, texts, 100, Bar()))
    assert [tokenizer.decode(ids) for ids in documents] == ["one", "hello\nworld"]
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    documents = list(build_cache.tokenized(tokenizer, texts, 100, Bar()))
    assert tokenizer.decode(documents[1]) == "[user]hello[assistant]world"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "none.txt cannot be read"),
        ("empty.txt", "\n \n", "empty.txt is empty"),
        ("bad.jsonl", '{"text": "a"}\n[1]\n', "line 2 of"),
        ("bad.jsonl", '{"prompt": "a"}\n', "line 1 of"),
        ("bad.txt", b"\xff\xfe", "UTF-8"),
    ],
)
def test_wrong_texts(
    tmp_path: Path, run: Run, name: str, content: str | bytes | None, words: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    code, out, err = run("build", tmp_path / "c", "--text", path)
    assert (code, out) == (2, "")
    assert words in err and err.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_wrong_requests(tiny: Path, text: Path, tmp_path: Path, run: Run) -> None:
    for part in ("info", "verify"):
        code, out, err = run(part, tmp_path)
        assert code in (1, 2)
        assert "no teacher cache" in out + err
    code, _, err = run("build", tmp_path / "c", "--model", tiny, "--text", text, "--k", "999")
    assert code == 2 and "k=999 is outside 1..257" in err
    code, _, err = run("build", tmp_path, "--model", tiny, "--text", text, "--k", "3")
    assert code == 2 and "not empty (it has text.txt)" in err


def test_truncation_against_sums(tmp_path: Path) -> None:
    from pydistill.cache import CacheWriter, Manifest

    log_p = torch.log_softmax(2 * torch.randn(50, 40), -1)
    values, ids = log_p.topk(10)
    tail = torch.logsumexp(log_p.scatter(1, ids, -math.inf), 1)
    with CacheWriter(tmp_path / "c", Manifest("m", "sha256:0", 40, 10)) as writer:
        writer.append(torch.zeros(50).long(), ids, values, tail)
    found = truncation(TeacherCache.open(tmp_path / "c"))
    assert [row.k for row in found] == [1, 2, 4, 8, 10]
    for row in found:
        kept = values[:, : row.k].double().exp().sum(1)
        assert row.tail_mass == pytest.approx(float((1 - kept).mean()), rel=1e-3)
        assert row.renormalized_kl == pytest.approx(float(-kept.log().mean()), rel=1e-3)

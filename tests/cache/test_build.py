"""`pydistill cache build | info | verify` on a tiny model made here."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="a teacher needs the extra `hf`")

from pydistill import cli, topk_logprobs
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
    # A document at a time in both, since the rounding of a product depends on its shape.
    monkeypatch.setattr(build_cache, "_LOGITS_AT_ONCE", 1)
    assert run(*arguments(tiny, text, whole))[0] == 0
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
        assert len(TeacherCache.open(folder, tokenizer=None, partial=True)) == tokens
    code, out, _ = run("verify", folder)
    assert (code, out) == (0, "25 tokens, unfinished, every checksum right\n")
    code, out, _ = run(*arguments(tiny, text, folder), "--json")
    assert code == 0
    assert json.loads(out)["resumed_at"] == 25
    assert len(TeacherCache.open(folder, tokenizer=None)) == 88
    for kind in ("rows", "tokens"):
        assert file_path(folder, 0, kind).read_bytes() == file_path(whole, 0, kind).read_bytes()

    text.write_text("another\n" + text.read_text())
    code, _, err = run(*arguments(tiny, text, folder))
    assert code == 2 and "is complete" in err


def test_hidden_states_and_logits_give_the_same_cache(
    tiny: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, where the rounding of the logits decides no rank."""
    monkeypatch.setattr(build_cache.models, "compute_dtype", lambda: torch.float32)
    real, given = build_cache.topk_logprobs, []

    def spied(x: torch.Tensor, *args: object, **more: object) -> object:
        given.append(x.shape[-1])
        return real(x, *args, **more)

    monkeypatch.setattr(build_cache, "topk_logprobs", spied)
    assert run(*arguments(tiny, text, tmp_path / "hidden"))[0] == 0
    monkeypatch.setattr(build_cache, "head_of", lambda teacher: None)
    assert run(*arguments(tiny, text, tmp_path / "logits"))[0] == 0
    assert given == [32] * 7 + [257] * 7
    a, b = (TeacherCache.open(tmp_path / name, tokenizer=None)[:] for name in ("hidden", "logits"))
    assert torch.equal(a.topk_ids, b.topk_ids)
    torch.testing.assert_close(a.tail_logprob, b.tail_logprob, rtol=0, atol=1e-5)
    off = (a.topk_logprobs - b.topk_logprobs).abs()
    # A log-probability next to a code's edge may take the next one, 2 / 254 of a range of 1 away.
    assert off.max() <= 0.008 and off.mean() <= 1e-5  # 9.6e-7 is the largest found


SMALL = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40,
    "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "options", "plain"),
    [
        ("Llama", {}, True),
        ("Phi", {}, True),  # its head has a bias
        ("GPT2", {}, True),
        ("Granite", {"logits_scaling": 1.0}, True),
        ("Granite", {"logits_scaling": 8.0}, False),
        ("Cohere", {"logit_scale": 0.0625}, False),
        ("Gemma2", {"final_logit_softcapping": 30.0}, False),
        ("Gemma2", {"final_logit_softcapping": None}, True),
    ],
)
def test_a_head_is_used_where_it_makes_the_logits(
    family: str, options: dict[str, object], plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(build_cache.models, "compute_dtype", lambda: torch.float32)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **options})
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    head = build_cache.head_of(model)
    if not plain:
        assert head is None
        return
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
        assert build_cache.head_of(model) is head
    ids = torch.arange(20)[None]
    with torch.no_grad():
        states = model.base_model(input_ids=ids).last_hidden_state
        found = topk_logprobs(states, 5, weight=head.weight, bias=head.bias)
        want = topk_logprobs(model(input_ids=ids).logits, 5)
    assert torch.equal(found.ids, want.ids)
    torch.testing.assert_close(found.logprobs, want.logprobs, rtol=0, atol=2e-5)
    assert (family == "Phi") == (head.bias is not None)


@pytest.mark.parametrize(
    "after", [lambda z: 1.05 * z, lambda z: z + 1, lambda z: 3 * (z / 3).tanh()]
)
def test_what_no_configuration_names_is_found(
    tiny: Path, after: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose code changes the logits, in bf16, where rounding hides most."""
    monkeypatch.setattr(build_cache.models, "compute_dtype", lambda: torch.bfloat16)
    model, _ = models.load(str(tiny), torch.bfloat16)
    assert build_cache.head_of(model) is model.get_output_embeddings()
    real = type(model).forward

    def changed(self: object, *args: object, **more: object) -> object:
        found = real(self, *args, **more)
        found.logits = after(found.logits)
        return found

    monkeypatch.setattr(type(model), "forward", changed)
    assert build_cache.head_of(model) is None


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
    assert len(TeacherCache.open(folder, tokenizer=None, partial=True)) == 12
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
    assert TeacherCache.open(folder, tokenizer=None).documents.diff().tolist() == lengths()


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
    found = truncation(TeacherCache.open(tmp_path / "c", tokenizer=None))
    assert [row.k for row in found] == [1, 2, 4, 8, 10]
    for row in found:
        kept = values[:, : row.k].double().exp().sum(1)
        assert row.tail_mass == pytest.approx(float((1 - kept).mean()), rel=1e-3)
        assert row.renormalized_kl == pytest.approx(float(-kept.log().mean()), rel=1e-3)

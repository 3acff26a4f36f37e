"""The script that lets a model write, on a committed tiny LLaMA whose 96 tokens are called w0 to w95 here."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

TINY_LLAMA = Path(__file__).parents[1] / "lm" / "pretrained" / "tiny_llama"
PROMPTS = ["w1 w2 w3", "w40 w41 w42 w43 w44 w45 w46 w47 w48 w49", "w7"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    (folder / "words.txt").write_text("".join(f"w{index}\n" for index in range(96)))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return [
        "model=huggingface",
        f"model.path={TINY_LLAMA}",
        f"model.tokenizer={{name: words, path: {folder / 'words.txt'}}}",
        "model.compute_dtype=float32",
        "max_new_tokens=6",
        "chunk_size=8",
    ]


@pytest.fixture(scope="module")
def prompts_file(options):
    return Path(options[2].split("path: ")[1].rstrip("}")).with_name("prompts.jsonl")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_texts_are_printed_or_written_down_whatever_the_batches_and_the_ring(
    call_script, refused, options, prompts_file, tmp_path, capsys
):
    call_script("generate", *options, f"prompt={PROMPTS[1]}")
    text, summary = capsys.readouterr().out.splitlines()
    assert len(text.split()) == 6
    assert summary.startswith("prompts=1 tokens=6 stopped=0 seconds=")
    together, ring = tmp_path / "together.jsonl", tmp_path / "ring.jsonl"
    many = [*options, f"prompts={prompts_file}"]
    call_script("generate", *many, f"output={together}", "rows=2")
    assert "prompts=3 tokens=18" in capsys.readouterr().out
    written = lines(together)
    assert [line["prompt"] for line in written] == PROMPTS
    assert [line["index"] for line in written] == [0, 1, 2]
    assert written[1]["text"] == text
    assert len({line["text"] for line in written}) == 3
    assert all(line["log_probability"] < 0 and line["tokens"] == 6 and not line["stopped"] for line in written)
    call_script("generate", *many, f"output={ring}", "rows=3", "cache_devices=2", "virtual_devices=8")
    assert [line["text"] for line in lines(ring)] == [line["text"] for line in written]
    again = refused(call_script, "generate", *many, f"output={together}")
    assert "together.jsonl is there already; choose another output, or move it away" in again
    assert lines(together) == written


def test_ctrl_c_leaves_the_texts_that_are_done(
    call_script, load_script, options, prompts_file, tmp_path, monkeypatch, capsys
):
    generator, calls = load_script("generate").Generator, []
    write = generator.__call__

    def interrupted(self, prompts, **rest):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(self, prompts, **rest)

    monkeypatch.setattr(generator, "__call__", interrupted)
    output = tmp_path / "texts.jsonl"
    with pytest.raises(SystemExit) as stopped:
        call_script("generate", *options, f"prompts={prompts_file}", f"output={output}", "rows=2")
    assert stopped.value.code == 130
    assert "interrupted" in capsys.readouterr().err
    assert [line["prompt"] for line in lines(output)] == PROMPTS[:2]
    # The last batch would have been as large as the first.
    assert calls == [2, 2]


def test_a_prompt_may_hold_any_separator_and_lines_may_be_blank(load_script, tmp_path):
    prompts = ["one\u2028two", "three\x85four", "five"]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    config = SimpleNamespace(prompts=tmp_path / "prompts.jsonl")
    assert load_script("generate").texts_of(config) == prompts


def test_a_failure_before_the_first_text_leaves_no_file_in_the_way(
    call_script, load_script, refused, options, prompts_file, tmp_path, monkeypatch
):
    def fails(*_, **__):
        raise ValueError("no room")

    monkeypatch.setattr(load_script("generate").Generator, "__call__", fails)
    output = tmp_path / "new" / "texts.jsonl"
    for _ in range(2):
        assert "no room" in refused(call_script, "generate", *options, f"prompts={prompts_file}", f"output={output}")
    assert output.parent.is_dir()
    assert not output.exists()


def test_a_context_beyond_the_trained_one_is_warned_of(call_script, options):
    with pytest.warns(
        UserWarning, match=r"70 tokens is beyond the 64 positions .*rotary_base=500, rotary_scaling=None"
    ):
        call_script("generate", *options, "prompt='" + "w1 " * 64 + "'")


def test_bad_input(call_script, refused, options, prompts_file, tmp_path):
    def complaint(*overrides):
        return refused(call_script, "generate", *options, *overrides)

    one_of_two = "give either prompt="
    assert one_of_two in complaint()
    assert one_of_two in complaint("prompt=w1", f"prompts={prompts_file}")
    assert "rows must be at least 1 prompt, got 0" in complaint("prompt=w1", "rows=0")
    assert "sampling.top_p must be above 0" in complaint("prompt=w1", "sampling.top_p=0.0")
    assert "No such file" in complaint(f"prompts={tmp_path / 'nothing.jsonl'}")
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl is empty; it holds a prompt on each line" in complaint(f"prompts={tmp_path / 'empty.jsonl'}")
    (tmp_path / "other.jsonl").write_text('{"prompt": "w1"}\n{"text": "w2"}\n')
    assert "other.jsonl, line 2 is no" in complaint(f"prompts={tmp_path / 'other.jsonl'}")
    output = tmp_path / "out.jsonl"
    too_long = complaint(f"prompts={prompts_file}", "max_length=12", f"output={output}")
    assert "prompt 1 has 10 tokens" in too_long
    assert "lower max_new_tokens to 2" in too_long
    assert "needs 64 devices, but there are 8" in complaint("prompt=w1", "cache_devices=64")
    assert "chunk_size must be at least 1 token" in complaint("prompt=w1", "chunk_size=0")
    assert not output.exists()

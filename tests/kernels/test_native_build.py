"""How the C++ block comes to be: what is compiled when, where it lies, and what is said where it cannot be had.

Compilers are shell scripts here, but where the result is to be loaded.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ring_rl.kernels.local import native_build, native_cpu
from ring_rl.kernels.local.block import DIAGONAL, Demand, Scoring
from ring_rl.kernels.local.native_build import COMPILERS, NativeBuildError, build, cache_folder
from ring_rl.kernels.local.native_cpu import NativeCpuBlock
from ring_rl.kernels.local.select import select_block
from ring_rl.kernels.local.xla import XlaBlock

ROOT = Path(__file__).parents[2]
DEMAND = Demand(
    dtype="float32",
    head_dim=64,
    query_heads=4,
    key_value_heads=2,
    length=128,
    devices=1,
    relations=(DIAGONAL,),
    segments=False,
    alibi=False,
    scoring=Scoring(scale=0.1),
    log_sum_exp_gradient=True,
)
VERSION, MACROS = "echo version 1", "echo '#define __SOME_PROCESSOR__ 1'"
WRITES = 'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo not machine code > "$2"; fi; shift; done'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Where compiled code goes; what this process has registered is neither used nor replaced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    register = native_build.register.__wrapped__
    monkeypatch.setattr(native_build, "register", register)
    monkeypatch.setattr(native_cpu, "register", register)
    monkeypatch.setattr(native_cpu, "_missing", native_cpu._missing.__wrapped__)
    return tmp_path / "cache" / "ring_rl"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Makes $CXX a script that does as told; `compiler.log` has a line for each of its calls."""

    def install(*, version=VERSION, macros=MACROS, compiles=WRITES) -> Path:
        log, script = tmp_path / "calls", tmp_path / "compiler"
        script.write_text(
            f'#!/bin/sh\necho "$*" >> {log}\n'
            f'case "$*" in\n*--version*) {version};;\n*-dM*) {macros};;\n*) {compiles};;\nesac\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return log

    return install


def compilations(log: Path) -> int:
    return sum(" -o " in line for line in log.read_text().splitlines())


@pytest.mark.parametrize("asked", [None, "no-such-compiler"])
def test_without_a_compiler_auto_takes_xla_and_says_why(asked, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if asked:
        monkeypatch.setenv("CXX", asked)
    with caplog.at_level("INFO", logger="ring_rl"):
        assert isinstance(select_block("auto", DEMAND, block_size=None), XlaBlock)
    reason = f"it needs a C++ compiler, and there is no {asked or 'c++ or g++ or clang++'} here"
    assert f"local attention block: xla; not native_cpu: {reason}" in caplog.text
    with pytest.raises(ValueError, match=r'cannot serve: it needs .*; local="xla" serves everything'):
        select_block("native_cpu", DEMAND, block_size=None)


def test_a_compiler_that_fails_is_quoted_in_one_line(compiler, cache):
    compiler(compiles="printf 'In file x:\\nx.h:3: error: what is this\\n  |\\n' >&2; exit 1")
    with pytest.raises(NativeBuildError) as failure:
        build()
    assert str(failure.value).endswith("compiler failed: x.h:3: error: what is this")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("compiles", "complaint"),
    [
        (r"printf 'Spei\374cher voll\n\nEnde\n' >&2; exit 4", "Spei\N{REPLACEMENT CHARACTER}cher voll"),
        ("exit 4", "exit status 4"),
    ],
    ids=["in words of its own, in another encoding", "without a word"],
)
def test_whatever_a_failing_compiler_says_the_error_is_one_line(compiler, compiles, complaint):
    compiler(compiles=compiles)
    with pytest.raises(NativeBuildError) as failure:
        build()
    assert str(failure.value).endswith(f"compiler failed: {complaint}")


def test_a_compiler_that_writes_nothing_is_an_error(compiler):
    compiler(compiles="true")
    with pytest.raises(NativeBuildError, match="compiled code cannot be kept in"):
        build()


def test_a_compiler_may_come_with_arguments(compiler, tmp_path, monkeypatch):
    log = compiler()
    spaced = (tmp_path / "compiler").rename(tmp_path / "a compiler")
    monkeypatch.setenv("CXX", f"env LANGUAGE=C '{spaced}'")
    assert build().exists()
    assert compilations(log) == 1
    monkeypatch.setenv("CXX", "c++ 'unfinished")
    with pytest.raises(NativeBuildError, match="is no command: No closing quotation"):
        build()


def test_the_processor_is_named_as_the_compiler_wants_it(compiler):
    log = compiler(macros='case "$*" in *-march*) exit 1;; esac')
    build()
    assert "-mcpu=native" in next(line for line in log.read_text().splitlines() if " -o " in line)
    compiler(macros="exit 1")
    with pytest.raises(NativeBuildError, match="knows neither -march=native nor -mcpu=native"):
        build()


def test_a_cache_that_cannot_be_written_is_an_error(compiler, tmp_path, monkeypatch):
    compiler()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(NativeBuildError, match=r"compiled code cannot be kept in .*file/ring_rl"):
        build()


def test_where_the_cache_is(tmp_path, monkeypatch):
    assert cache_folder() == tmp_path / "cache" / "ring_rl"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "ring_rl"

    def homeless():
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(NativeBuildError, match=r"no folder for compiled code \(no home\); set XDG_CACHE_HOME"):
        cache_folder()


def test_a_library_that_cannot_be_loaded_is_named(compiler, cache, caplog):
    compiler()
    with pytest.raises(NativeBuildError, match=r"cannot be loaded .*; delete it to have it built again") as failure:
        native_build.register()
    (library,) = cache.iterdir()
    assert str(library) in str(failure.value)
    with caplog.at_level("INFO", logger="ring_rl"):
        assert isinstance(select_block("auto", DEMAND, block_size=None), XlaBlock)
    assert "cannot be loaded" in caplog.text


def test_what_was_compiled_once_is_not_again(compiler, cache, caplog):
    log = compiler()
    with caplog.at_level("INFO", logger="ring_rl"):
        first = build()
    assert "compiling attention for this processor" in caplog.text
    assert build() == first
    assert compilations(log) == 1
    assert list(cache.iterdir()) == [first]
    first.unlink()
    assert build() == first
    assert compilations(log) == 2


def test_another_compiler_processor_source_or_jaxlib_gets_a_library_of_its_own(compiler, tmp_path, monkeypatch):
    compiler()
    names = [build().name]
    compiler(version="echo version 2")
    names.append(build().name)
    compiler(macros="echo '#define __ANOTHER_PROCESSOR__ 1'")
    names.append(build().name)
    compiler()
    with monkeypatch.context() as patch:
        patch.setattr(native_build.metadata, "version", lambda _: "0.0.0")
        names.append(build().name)
    sources = shutil.copytree(native_build.SOURCES, tmp_path / "native")
    monkeypatch.setattr(native_build, "SOURCES", sources)
    assert build().name == names[0]
    # What an editor or a file manager leaves there is not ours.
    (sources / ".DS_Store").write_bytes(b"\xff\xfe")
    assert build().name == names[0]
    header = sources / "vectors.h"
    header.write_text(header.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    names.append(build().name)
    assert len(set(names)) == 5, names


_CHILD = """
import json, jax, jax.numpy as jnp
from ring_rl.kernels import CAUSAL, attention
from ring_rl.kernels.local.native_build import build
x = jnp.ones((1, 5, 1, 4))
out = attention(x, x, jnp.arange(5.0)[None, :, None, None] * x, mask=CAUSAL, local="native_cpu").out
print(json.dumps([str(build()), out[0, :, 0, 0].tolist()]))
"""


@pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason=f"there is no {' or '.join(COMPILERS)} here to compile with"
)
def test_two_processes_that_build_at_once_both_work(compiler, cache):
    real = next(filter(None, map(shutil.which, COMPILERS)))
    # Unoptimised, to be quick; and each waits for the other to be compiling too.
    meet = f"touch {cache}/$$.here; for i in 1 2 3 4 5 6 7 8; do [ $(ls {cache}/*.here | wc -l) = 2 ] || sleep 1; done"
    log = compiler(version=f'{real} "$@"', macros=f'{real} "$@"', compiles=f'{meet}; {real} "$@" -O0')
    children = [
        subprocess.Popen([sys.executable, "-c", _CHILD], stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]
    answers = [json.loads(child.communicate(timeout=120)[0]) for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert answers == [[str(next(cache.glob("*.so"))), [0.0, 0.5, 1.0, 1.5, 2.0]]] * 2
    assert compilations(log) == 2
    assert len(list(cache.glob("attention-*"))) == 1


def test_the_sources_are_part_of_the_package(monkeypatch):
    """By what setuptools would put into a wheel."""
    monkeypatch.chdir(ROOT)
    setuptools = pytest.importorskip("setuptools", reason="setuptools, which builds wheels, is not installed")
    pyprojecttoml = pytest.importorskip("setuptools.config.pyprojecttoml")
    distribution = pyprojecttoml.apply_configuration(setuptools.Distribution(), "pyproject.toml")
    # Files under version control are asked for with a manifest, which would be written here.
    distribution.include_package_data = False
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    packed = {name for package, *_, names in command.data_files if package == "ring_rl.kernels.local" for name in names}
    assert packed == {os.path.join("native", path.name) for path in native_build.SOURCES.iterdir()}
    assert {"handlers.cc", "attention.h", "rectangle.h", "vectors.h"} <= {Path(name).name for name in packed}


def test_it_computes_on_cpus_only(monkeypatch):
    monkeypatch.setattr(native_cpu.jax, "default_backend", lambda: "gpu")
    assert NativeCpuBlock(cores=1).refusal(DEMAND) == "it computes on CPUs and this platform is 'gpu'"

"""Whether the C++ block can be compiled here: by the rule of the library itself."""

from ring_rl.kernels.local.native_build import NativeBuildError, find_compiler


def _found() -> bool:
    try:
        find_compiler()
    except NativeBuildError:
        return False
    return True


HAS_COMPILER = _found()
NO_COMPILER = "the C++ block is compiled where it runs, and there is no C++ compiler here"

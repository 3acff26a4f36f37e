"""From Hydra's composed configuration to a plain mapping, the only thing the library sees of Hydra."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["resolve", "run_entry_point"]


def resolve(config: DictConfig) -> dict[str, Any]:
    """The composed configuration as a plain nested dict, with interpolations resolved.

    Raises:
        ValueError: a mandatory value (`???`) was not given, or an interpolation points nowhere.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

    try:
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = error.full_key
        raise ValueError(f"'{key}' has no value; give one on the command line: {key}=...") from None
    except InterpolationResolutionError as error:
        raise ValueError(f"'{error.full_key}' cannot be resolved: {str(error).splitlines()[0]}") from None
    except OmegaConfBaseException as error:
        raise ValueError(f"the configuration cannot be resolved: {str(error).splitlines()[0]}") from None
    if not isinstance(resolved, dict):
        raise ValueError(f"the configuration must be a mapping, got {type(resolved).__name__}")
    return {str(key): value for key, value in resolved.items()}


def run_entry_point(main: Callable[[], Any]) -> None:
    """Calls a `@hydra.main` function; what is wrong with the command line becomes one line and exit code 1.

    Hydra itself answers a misspelt key with five lines that advise to add it. HYDRA_FULL_ERROR=1 in the environment
    brings its own messages and traceback back.
    """
    from hydra.errors import HydraException

    if "HYDRA_FULL_ERROR" in os.environ:
        main()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing
    try:
        main()
    except HydraException as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if not _is_failed_job(error):
            raise
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(f"error: a job of the grid failed ({said[0]}: {said[-1]}); the others go on", file=sys.stderr)
        sys.exit(1)
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def _is_failed_job(error: Exception) -> bool:
    """Whether submitit says that a job of a multirun failed; only its launcher imports it."""
    submitit = sys.modules.get("submitit.core.utils")
    return submitit is not None and isinstance(error, (submitit.UncompletedJobError, submitit.FailedJobError))


def _one_line(error: BaseException) -> str:
    override = re.search(r"Could not override '([^']+)'", str(error))
    parent = getattr(error.__cause__, "parent_node", None)
    if override is None or parent is None:
        return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    key, allowed = override[1], [str(name) for name in parent]
    nearest = difflib.get_close_matches(key.rsplit(".", 1)[-1], allowed, n=1)
    guess = f"did you mean '{nearest[0]}'? " if nearest else ""
    return f"unknown key '{key}'; {guess}the keys there are {', '.join(allowed)}"

"""From Hydra's composed configuration to a plain mapping, the only thing the library sees of Hydra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["resolve"]


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

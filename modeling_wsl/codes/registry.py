"""The codes that there are, by the name that a configuration gives them."""

from collections.abc import Mapping

from transformers import PreTrainedConfig

from .code import WindowCode
from .matrix import MatrixCode
from .token import TokenCode


CODES: Mapping[str, type[WindowCode]] = {code.name: code for code in (TokenCode, MatrixCode)}


def code_of(config: PreTrainedConfig) -> WindowCode:
    """The code of a backbone's configuration, `config.latent_code`.

    Raises:
        ValueError: there is none of that name.
    """
    if config.latent_code not in CODES:
        raise ValueError(f"latent_code is {config.latent_code!r}; choose one of: {', '.join(CODES)}.")
    return CODES[config.latent_code](config)

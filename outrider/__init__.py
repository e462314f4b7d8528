"""outrider: an inference server for Llama 4. Importing the package never imports torch."""

from outrider.errors import OutriderError
from outrider.types import Request, SamplingParams, TokenEvent

__version__ = "0.1.0"

__all__ = ["OutriderError", "Request", "SamplingParams", "TokenEvent", "__version__"]

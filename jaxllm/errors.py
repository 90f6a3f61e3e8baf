"""The errors jaxllm raises on purpose. Each names the culprit and says what to do about it."""


class JaxLLMError(Exception):
    """Base of every error that jaxllm raises on purpose."""


class ConfigError(JaxLLMError, ValueError):
    """A configuration file, command-line flag or constructor argument is wrong."""


class CheckpointError(JaxLLMError, ValueError):
    """A checkpoint is missing, broken, or of a kind that jaxllm does not implement."""


class TokenizerError(JaxLLMError, ValueError):
    """Tokenizer files are missing or broken, or a chat template refused its messages."""


class RequestError(JaxLLMError, ValueError):
    """One request is wrong; it is refused and no other request notices."""


class DataError(JaxLLMError, ValueError):
    """Training data cannot be read or used; names the file and line, and what to change there."""

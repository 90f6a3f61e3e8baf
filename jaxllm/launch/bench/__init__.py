"""`jaxllm bench ...`: measurements, each a command."""

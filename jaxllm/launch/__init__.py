"""The command line: `jaxllm COMMAND`, the same as `python -m jaxllm.launch COMMAND`."""
